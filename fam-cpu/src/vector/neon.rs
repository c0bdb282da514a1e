//! NEON (AdvSIMD): four lanes, thirty-two registers (every AArch64 processor with an operating system).

use super::{Body, MAX_LANES, Vector};
use fam_core::{bf16, f16};
use std::arch::{aarch64::*, asm};

/// Four f32 lanes.
///
/// Values exist only inside the shell, which [`crate::Isa::run`] enters on machines that have its instructions.
#[derive(Clone, Copy)]
pub(crate) struct Neon(float32x4_t);

impl Neon {
    /// Whether this machine has the instructions.
    pub fn is_available() -> bool {
        std::arch::is_aarch64_feature_detected!("neon")
    }
}

#[target_feature(enable = "neon")]
fn shell<B: Body>(body: B) -> B::Output {
    body.run::<Neon, { Neon::MR }, 6>()
}

/// The value of an expression of intrinsics.
macro_rules! simd {
    ($value:expr) => {{
        // SAFETY: verbs are called inside the shell alone, and what loads and stores touch is checked here or vouched for by callers.
        unsafe { $value }
    }};
}

impl Vector for Neon {
    const LANES: usize = 4;
    const MR: usize = 4;
    type Mask = uint32x4_t;

    #[inline(always)]
    fn run<B: Body>(body: B) -> B::Output {
        debug_assert!(Self::is_available());
        simd!(shell(body))
    }

    #[inline(always)]
    fn splat(value: f32) -> Self {
        Neon(simd!(vdupq_n_f32(value)))
    }
    #[inline(always)]
    unsafe fn load_from(from: *const f32) -> Self {
        Neon(simd!(vld1q_f32(from)))
    }
    #[inline(always)]
    unsafe fn store_to(self, to: *mut f32) {
        simd!(vst1q_f32(to, self.0));
    }
    #[inline(always)]
    fn load_f16(from: &[f16]) -> Self {
        let from = &from[..4];
        // Intrinsics on f16 are younger than the oldest compiler that builds this; the instruction is part of every NEON.
        Neon(simd!({
            let half = vld1_u16(from.as_ptr().cast());
            let wide: float32x4_t;
            asm!("fcvtl {0:v}.4s, {1:v}.4h", out(vreg) wide, in(vreg) half, options(pure, nomem, nostack));
            wide
        }))
    }
    #[inline(always)]
    fn store_f16(self, to: &mut [f16]) {
        let to = &mut to[..4];
        simd!({
            let half: uint16x4_t;
            asm!("fcvtn {0:v}.4h, {1:v}.4s", out(vreg) half, in(vreg) self.0, options(pure, nomem, nostack));
            vst1_u16(to.as_mut_ptr().cast(), half);
        });
    }
    #[inline(always)]
    fn load_bf16(from: &[bf16]) -> Self {
        Neon(simd!(vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(from[..4].as_ptr().cast())))))
    }
    #[inline(always)]
    fn store_bf16(self, to: &mut [bf16]) {
        let to = &mut to[..4];
        simd!({
            // Half an ulp is added, less one where the upper half is even; of a NaN its payload may not carry into the exponent.
            let x = vreinterpretq_u32_f32(self.0);
            let is_odd = vandq_u32(vshrq_n_u32::<16>(x), vdupq_n_u32(1));
            let rounded = vaddq_u32(x, vaddq_u32(is_odd, vdupq_n_u32(0x7fff)));
            let quiet = vorrq_u32(x, vdupq_n_u32(0x0040_0000));
            let is_number = vceqq_f32(self.0, self.0);
            vst1_u16(to.as_mut_ptr().cast(), vshrn_n_u32::<16>(vbslq_u32(is_number, rounded, quiet)));
        });
    }
    #[inline(always)]
    fn transpose(rows: [Self; MAX_LANES]) -> [Self; MAX_LANES] {
        let [a, b, c, d] = [rows[0].0, rows[1].0, rows[2].0, rows[3].0];
        let mut to = rows;
        // Every second element of pairs of rows; then halves, as if they were one f64 each.
        let columns = simd!({
            let low = |x, y| vreinterpretq_f32_f64(vtrn1q_f64(vreinterpretq_f64_f32(x), vreinterpretq_f64_f32(y)));
            let high = |x, y| vreinterpretq_f32_f64(vtrn2q_f64(vreinterpretq_f64_f32(x), vreinterpretq_f64_f32(y)));
            let [ab0, ab1, cd0, cd1] = [vtrn1q_f32(a, b), vtrn2q_f32(a, b), vtrn1q_f32(c, d), vtrn2q_f32(c, d)];
            [low(ab0, cd0), low(ab1, cd1), high(ab0, cd0), high(ab1, cd1)]
        });
        for j in 0..4 {
            to[j] = Neon(columns[j]);
        }
        to
    }

    #[inline(always)]
    fn unzip(self, other: Self) -> [Self; 2] {
        simd!([Neon(vuzp1q_f32(self.0, other.0)), Neon(vuzp2q_f32(self.0, other.0))])
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Neon(simd!(vaddq_f32(self.0, other.0)))
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        Neon(simd!(vsubq_f32(self.0, other.0)))
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        Neon(simd!(vmulq_f32(self.0, other.0)))
    }
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        Neon(simd!(vdivq_f32(self.0, other.0)))
    }
    #[inline(always)]
    fn mul_add(self, a: Self, b: Self) -> Self {
        Neon(simd!(vfmaq_f32(b.0, self.0, a.0)))
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        // FMAX would take a NaN of `other`, and FMAXNM lose one of `self`.
        Neon(simd!(vbslq_f32(vcgtq_f32(other.0, self.0), other.0, self.0)))
    }
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        Neon(simd!(vbslq_f32(vcltq_f32(other.0, self.0), other.0, self.0)))
    }
    #[inline(always)]
    fn ldexp(self, n: Self) -> Self {
        // In two factors, since 2ⁿ itself may be too small for f32: the first product is exact, the second rounds.
        Neon(simd!({
            let n = vcvtnq_s32_f32(n.0);
            let half = vshrq_n_s32::<1>(n);
            let power = |n| vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(n, vdupq_n_s32(127))));
            vmulq_f32(vmulq_f32(self.0, power(half)), power(vsubq_s32(n, half)))
        }))
    }
    #[inline(always)]
    fn round(self) -> Self {
        Neon(simd!(vrndnq_f32(self.0)))
    }

    #[inline(always)]
    fn is_within(self, first: Self, end: Self) -> uint32x4_t {
        simd!(vandq_u32(vcleq_f32(first.0, self.0), vcltq_f32(self.0, end.0)))
    }
    #[inline(always)]
    fn select(self, mask: uint32x4_t, other: Self) -> Self {
        Neon(simd!(vbslq_f32(mask, self.0, other.0)))
    }
}
