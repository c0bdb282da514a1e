//! AVX2 with FMA and F16C: eight lanes, sixteen registers (Intel since Haswell, AMD since Excavator).

use super::{Body, MAX_LANES, Vector};
use fam_core::{bf16, f16};
use std::arch::x86_64::*;

/// Eight f32 lanes.
///
/// Values exist only inside the shell, which [`crate::Isa::run`] enters on machines that have its instructions.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(__m256);

impl Avx2 {
    /// Whether this machine has the instructions.
    pub fn is_available() -> bool {
        is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn shell<B: Body>(body: B) -> B::Output {
    body.run::<Avx2, { Avx2::MR }, 6>()
}

/// The value of an expression of intrinsics.
macro_rules! simd {
    ($value:expr) => {{
        // SAFETY: verbs are called inside the shell alone, and what loads and stores touch is checked here or vouched for by callers.
        unsafe { $value }
    }};
}

impl Vector for Avx2 {
    const LANES: usize = 8;
    const MR: usize = 2;
    type Mask = __m256;

    #[inline(always)]
    fn run<B: Body>(body: B) -> B::Output {
        debug_assert!(Self::is_available());
        simd!(shell(body))
    }

    #[inline(always)]
    fn splat(value: f32) -> Self {
        Avx2(simd!(_mm256_set1_ps(value)))
    }
    #[inline(always)]
    unsafe fn load_from(from: *const f32) -> Self {
        Avx2(simd!(_mm256_loadu_ps(from)))
    }
    #[inline(always)]
    unsafe fn store_to(self, to: *mut f32) {
        simd!(_mm256_storeu_ps(to, self.0));
    }
    #[inline(always)]
    fn load_f16(from: &[f16]) -> Self {
        Avx2(simd!(_mm256_cvtph_ps(_mm_loadu_si128(from[..8].as_ptr().cast()))))
    }
    #[inline(always)]
    fn store_f16(self, to: &mut [f16]) {
        simd!(_mm_storeu_si128(to[..8].as_mut_ptr().cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0)));
    }
    #[inline(always)]
    fn load_bf16(from: &[bf16]) -> Self {
        let upper = simd!(_mm256_cvtepu16_epi32(_mm_loadu_si128(from[..8].as_ptr().cast())));
        Avx2(simd!(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(upper))))
    }
    #[inline(always)]
    fn store_bf16(self, to: &mut [bf16]) {
        let to = &mut to[..8];
        simd!({
            // Half an ulp is added, less one where the upper half is even; of a NaN its payload may not carry into the exponent.
            let x = _mm256_castps_si256(self.0);
            let is_odd = _mm256_and_si256(_mm256_srli_epi32::<16>(x), _mm256_set1_epi32(1));
            let rounded = _mm256_add_epi32(x, _mm256_add_epi32(is_odd, _mm256_set1_epi32(0x7fff)));
            let quiet = _mm256_or_si256(x, _mm256_set1_epi32(0x0040_0000));
            let is_nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(self.0, self.0));
            let upper = _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, quiet, is_nan));
            let packed = _mm256_permute4x64_epi64::<0x08>(_mm256_packus_epi32(upper, upper));
            _mm_storeu_si128(to.as_mut_ptr().cast(), _mm256_castsi256_si128(packed));
        });
    }
    #[inline(always)]
    fn transpose(rows: [Self; MAX_LANES]) -> [Self; MAX_LANES] {
        let mut r = [rows[0].0; 8];
        for i in 0..8 {
            r[i] = rows[i].0;
        }
        // Pairs of rows, then fours, each within the halves of a register; then the halves.
        let columns = simd!({
            let pair = |i: usize| [_mm256_unpacklo_ps(r[i], r[i + 1]), _mm256_unpackhi_ps(r[i], r[i + 1])];
            let [[a0, a1], [b0, b1], [c0, c1], [d0, d1]] = [pair(0), pair(2), pair(4), pair(6)];
            let four = |a, b| [_mm256_shuffle_ps::<0x44>(a, b), _mm256_shuffle_ps::<0xee>(a, b)];
            let [[l0, l1], [l2, l3], [h0, h1], [h2, h3]] = [four(a0, b0), four(a1, b1), four(c0, d0), four(c1, d1)];
            let low = |l, h| _mm256_permute2f128_ps::<0x20>(l, h);
            let high = |l, h| _mm256_permute2f128_ps::<0x31>(l, h);
            [low(l0, h0), low(l1, h1), low(l2, h2), low(l3, h3), high(l0, h0), high(l1, h1), high(l2, h2), high(l3, h3)]
        });
        let mut to = rows;
        for j in 0..8 {
            to[j] = Avx2(columns[j]);
        }
        to
    }

    #[inline(always)]
    fn unzip(self, other: Self) -> [Self; 2] {
        simd!({
            // Within the halves of a register, whose quarters are then put in order.
            let even = _mm256_castps_pd(_mm256_shuffle_ps::<0x88>(self.0, other.0));
            let odd = _mm256_castps_pd(_mm256_shuffle_ps::<0xdd>(self.0, other.0));
            [
                Avx2(_mm256_castpd_ps(_mm256_permute4x64_pd::<0xd8>(even))),
                Avx2(_mm256_castpd_ps(_mm256_permute4x64_pd::<0xd8>(odd))),
            ]
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
        Avx2(simd!(_mm256_add_ps(self.0, other.0)))
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        Avx2(simd!(_mm256_sub_ps(self.0, other.0)))
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        Avx2(simd!(_mm256_mul_ps(self.0, other.0)))
    }
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        Avx2(simd!(_mm256_div_ps(self.0, other.0)))
    }
    #[inline(always)]
    fn mul_add(self, a: Self, b: Self) -> Self {
        Avx2(simd!(_mm256_fmadd_ps(self.0, a.0, b.0)))
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        // Where either is NaN the instruction takes its second operand.
        Avx2(simd!(_mm256_max_ps(other.0, self.0)))
    }
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        Avx2(simd!(_mm256_min_ps(other.0, self.0)))
    }
    #[inline(always)]
    fn ldexp(self, n: Self) -> Self {
        // In two factors, since 2ⁿ itself may be too small for f32: the first product is exact, the second rounds.
        Avx2(simd!({
            let n = _mm256_cvtps_epi32(n.0);
            let half = _mm256_srai_epi32::<1>(n);
            let bias = _mm256_set1_epi32(127);
            let power = |n| _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(n, bias)));
            _mm256_mul_ps(_mm256_mul_ps(self.0, power(half)), power(_mm256_sub_epi32(n, half)))
        }))
    }
    #[inline(always)]
    fn round(self) -> Self {
        Avx2(simd!(_mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0)))
    }

    #[inline(always)]
    fn is_within(self, first: Self, end: Self) -> __m256 {
        simd!(_mm256_and_ps(_mm256_cmp_ps::<_CMP_LE_OQ>(first.0, self.0), _mm256_cmp_ps::<_CMP_LT_OQ>(self.0, end.0)))
    }
    #[inline(always)]
    fn select(self, mask: __m256, other: Self) -> Self {
        Avx2(simd!(_mm256_blendv_ps(other.0, self.0, mask)))
    }
}
