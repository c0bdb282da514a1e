//! AVX-512 F, BW, DQ and VL: sixteen lanes, thirty-two registers, masks (Intel since Skylake-X, AMD since Zen 4); and the same with the
//! dot of AVX512-BF16 (Intel since Cooper Lake, AMD since Zen 4).

use super::avx2::Avx2;
use super::{Body, MAX_LANES, Vector, plain};
use fam_core::{bf16, f16};
use std::arch::x86_64::*;

/// Sixteen f32 lanes, with or without AVX512-BF16.
///
/// Values exist only inside the shells, which [`crate::Isa::run`] and [`crate::Isa::run_pairs`] enter on machines that have their
/// instructions.
#[derive(Clone, Copy)]
pub(crate) struct Avx512<const BF16: bool>(__m512);

impl<const BF16: bool> Avx512<BF16> {
    /// Whether this machine has the instructions.
    pub fn is_available() -> bool {
        Avx2::is_available()
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && (!BF16 || is_x86_feature_detected!("avx512bf16"))
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn shell<B: Body>(body: B) -> B::Output {
    body.run::<Avx512<false>, 2, 8>()
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
fn shell_with_bf16<B: Body>(body: B) -> B::Output {
    body.run::<Avx512<true>, 2, 8>()
}

/// The value of an expression of intrinsics.
macro_rules! simd {
    ($value:expr) => {{
        // SAFETY: verbs are called inside the shell alone, and what loads and stores touch is checked here or vouched for by callers.
        unsafe { $value }
    }};
}

impl<const BF16: bool> Vector for Avx512<BF16> {
    const LANES: usize = 16;
    const MR: usize = 2;
    type Mask = __mmask16;

    #[inline(always)]
    fn run<B: Body>(body: B) -> B::Output {
        debug_assert!(Self::is_available());
        if BF16 { simd!(shell_with_bf16(body)) } else { simd!(shell(body)) }
    }

    #[inline(always)]
    fn splat(value: f32) -> Self {
        Avx512(simd!(_mm512_set1_ps(value)))
    }
    #[inline(always)]
    unsafe fn load_from(from: *const f32) -> Self {
        Avx512(simd!(_mm512_loadu_ps(from)))
    }
    #[inline(always)]
    unsafe fn store_to(self, to: *mut f32) {
        simd!(_mm512_storeu_ps(to, self.0));
    }
    #[inline(always)]
    fn load_f16(from: &[f16]) -> Self {
        Avx512(simd!(_mm512_cvtph_ps(_mm256_loadu_si256(from[..16].as_ptr().cast()))))
    }
    #[inline(always)]
    fn store_f16(self, to: &mut [f16]) {
        simd!(_mm256_storeu_si256(to[..16].as_mut_ptr().cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0)));
    }
    #[inline(always)]
    fn load_bf16(from: &[bf16]) -> Self {
        let upper = simd!(_mm512_cvtepu16_epi32(_mm256_loadu_si256(from[..16].as_ptr().cast())));
        Avx512(simd!(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(upper))))
    }
    #[inline(always)]
    fn store_bf16(self, to: &mut [bf16]) {
        let to = &mut to[..16];
        simd!({
            // Half an ulp is added, less one where the upper half is even; of a NaN its payload may not carry into the exponent.
            let x = _mm512_castps_si512(self.0);
            let is_odd = _mm512_and_si512(_mm512_srli_epi32::<16>(x), _mm512_set1_epi32(1));
            let rounded = _mm512_add_epi32(x, _mm512_add_epi32(is_odd, _mm512_set1_epi32(0x7fff)));
            let is_nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(self.0, self.0);
            let rounded = _mm512_mask_or_epi32(rounded, is_nan, x, _mm512_set1_epi32(0x0040_0000));
            _mm256_storeu_si256(to.as_mut_ptr().cast(), _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(rounded)));
        });
    }
    #[inline(always)]
    fn interleave(first: &[bf16], second: &[bf16]) -> Self {
        let (first, second) = (&first[..16], &second[..16]);
        Avx512(simd!({
            let first = _mm512_cvtepu16_epi32(_mm256_loadu_si256(first.as_ptr().cast()));
            let second = _mm512_cvtepu16_epi32(_mm256_loadu_si256(second.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_or_si512(first, _mm512_slli_epi32::<16>(second)))
        }))
    }
    #[inline(always)]
    fn transpose(rows: [Self; MAX_LANES]) -> [Self; MAX_LANES] {
        let mut r = [rows[0].0; 16];
        for i in 0..16 {
            r[i] = rows[i].0;
        }
        let mut t = r;
        // Pairs of rows, then fours, each within the quarters of a register; then quarters, twice.
        for i in (0..16).step_by(2) {
            (t[i], t[i + 1]) = simd!((_mm512_unpacklo_ps(r[i], r[i + 1]), _mm512_unpackhi_ps(r[i], r[i + 1])));
        }
        for i in (0..16).step_by(4) {
            for j in 0..2 {
                let (a, b) = (t[i + j], t[i + j + 2]);
                let four = simd!([_mm512_shuffle_ps::<0x44>(a, b), _mm512_shuffle_ps::<0xee>(a, b)]);
                (r[i + 2 * j], r[i + 2 * j + 1]) = (four[0], four[1]);
            }
        }
        let mut columns = rows;
        for c in 0..4 {
            let [a, b, x, y] = [r[c], r[c + 4], r[c + 8], r[c + 12]];
            let quarters = simd!({
                let [ab0, ab1] = [_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b)];
                let [xy0, xy1] = [_mm512_shuffle_f32x4::<0x88>(x, y), _mm512_shuffle_f32x4::<0xdd>(x, y)];
                [
                    _mm512_shuffle_f32x4::<0x88>(ab0, xy0),
                    _mm512_shuffle_f32x4::<0x88>(ab1, xy1),
                    _mm512_shuffle_f32x4::<0xdd>(ab0, xy0),
                    _mm512_shuffle_f32x4::<0xdd>(ab1, xy1),
                ]
            });
            for quarter in 0..4 {
                columns[4 * quarter + c] = Avx512(quarters[quarter]);
            }
        }
        columns
    }

    #[inline(always)]
    fn unzip(self, other: Self) -> [Self; 2] {
        simd!({
            let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
            let odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
            [Avx512(_mm512_permutex2var_ps(self.0, even, other.0)), Avx512(_mm512_permutex2var_ps(self.0, odd, other.0))]
        })
    }
    #[inline(always)]
    fn prefetch<T>(at: *const T) {
        simd!(_mm_prefetch::<_MM_HINT_T0>(at.cast()));
    }
    #[inline(always)]
    fn prefetch_far<T>(at: *const T) {
        simd!(_mm_prefetch::<_MM_HINT_T1>(at.cast()));
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Avx512(simd!(_mm512_add_ps(self.0, other.0)))
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        Avx512(simd!(_mm512_sub_ps(self.0, other.0)))
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        Avx512(simd!(_mm512_mul_ps(self.0, other.0)))
    }
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        Avx512(simd!(_mm512_div_ps(self.0, other.0)))
    }
    #[inline(always)]
    fn mul_add(self, a: Self, b: Self) -> Self {
        Avx512(simd!(_mm512_fmadd_ps(self.0, a.0, b.0)))
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        // Where either is NaN the instruction takes its second operand.
        Avx512(simd!(_mm512_max_ps(other.0, self.0)))
    }
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        Avx512(simd!(_mm512_min_ps(other.0, self.0)))
    }
    #[inline(always)]
    fn ldexp(self, n: Self) -> Self {
        Avx512(simd!(_mm512_scalef_ps(self.0, n.0)))
    }
    #[inline(always)]
    fn round(self) -> Self {
        Avx512(simd!(_mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0)))
    }

    #[inline(always)]
    fn is_within(self, first: Self, end: Self) -> __mmask16 {
        simd!(_mm512_cmp_ps_mask::<_CMP_LE_OQ>(first.0, self.0) & _mm512_cmp_ps_mask::<_CMP_LT_OQ>(self.0, end.0))
    }
    #[inline(always)]
    fn select(self, mask: __mmask16, other: Self) -> Self {
        Avx512(simd!(_mm512_mask_blend_ps(mask, other.0, self.0)))
    }
    #[inline(always)]
    fn pair(first: Self, second: Self) -> Self {
        if !BF16 {
            return plain::pair(first, second);
        }
        // Whole numbers 0, 16, 1, 17, …: the instruction leaves all that is first before all that is second.
        const INTERLEAVED: [u16; 32] = {
            let mut order = [0; 32];
            let mut i = 0;
            while i < 32 {
                order[i] = (i / 2 + i % 2 * 16) as u16;
                i += 1;
            }
            order
        };
        Avx512(simd!({
            let halves: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(second.0, first.0));
            let order = _mm512_loadu_si512(INTERLEAVED.as_ptr().cast());
            _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, halves))
        }))
    }
    #[inline(always)]
    fn store_terms(self, to: &mut [bf16]) {
        let to = &mut to[..16];
        if !BF16 {
            return plain::store_terms(self, to);
        }
        simd!(_mm256_storeu_si256(to.as_mut_ptr().cast(), std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(self.0))));
    }
    #[inline(always)]
    fn dot(self, x: Self, b: Self) -> Self {
        if !BF16 {
            return plain::dot(self, x, b);
        }
        Avx512(simd!(_mm512_dpbf16_ps(
            self.0,
            std::mem::transmute::<__m512, __m512bh>(x.0),
            std::mem::transmute::<__m512, __m512bh>(b.0)
        )))
    }
}
