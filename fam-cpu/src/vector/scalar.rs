//! The level that runs anywhere: plain Rust on eight lanes, in a form that LLVM turns into the target's baseline vectors.

use super::{Body, MAX_LANES, Vector};
use fam_core::{Element, bf16, f16};

/// Eight f32 lanes without intrinsics.
#[derive(Clone, Copy)]
#[repr(align(32))]
pub(crate) struct Scalar([f32; 8]);

impl Scalar {
    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Scalar(std::array::from_fn(|i| f(self.0[i], other.0[i])))
    }
}

impl Vector for Scalar {
    const LANES: usize = 8;
    const MR: usize = 1;
    type Mask = [bool; 8];

    #[inline(never)]
    fn run<B: Body>(body: B) -> B::Output {
        body.run::<Self, 1, 4>()
    }

    #[inline(always)]
    fn splat(value: f32) -> Self {
        Scalar([value; 8])
    }
    #[inline(always)]
    unsafe fn load_from(from: *const f32) -> Self {
        // SAFETY: as the caller promises.
        Scalar(unsafe { from.cast::<[f32; 8]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store_to(self, to: *mut f32) {
        // SAFETY: as the caller promises.
        unsafe { to.cast::<[f32; 8]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    fn load_f16(from: &[f16]) -> Self {
        let from = &from[..8];
        Scalar(std::array::from_fn(|i| widen_f16(from[i])))
    }
    #[inline(always)]
    fn store_f16(self, to: &mut [f16]) {
        to[..8].iter_mut().zip(self.0).for_each(|(to, x)| *to = Element::from_f32(x));
    }
    #[inline(always)]
    fn load_bf16(from: &[bf16]) -> Self {
        let from = &from[..8];
        Scalar(std::array::from_fn(|i| from[i].to_f32()))
    }
    #[inline(always)]
    fn store_bf16(self, to: &mut [bf16]) {
        to[..8].iter_mut().zip(self.0).for_each(|(to, x)| *to = Element::from_f32(x));
    }
    #[inline(always)]
    fn transpose(rows: [Self; MAX_LANES]) -> [Self; MAX_LANES] {
        std::array::from_fn(|j| Scalar(std::array::from_fn(|i| rows[i].0[j % 8])))
    }

    #[inline(always)]
    fn unzip(self, other: Self) -> [Self; 2] {
        let lane = |i: usize| if i < 8 { self.0[i] } else { other.0[i - 8] };
        [0, 1].map(|odd| Scalar(std::array::from_fn(|i| lane(2 * i + odd))))
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        self.zip(other, |a, b| a / b)
    }
    /// Rounded twice: `f32::mul_add` is a library call where the target does not fuse.
    #[inline(always)]
    fn mul_add(self, a: Self, b: Self) -> Self {
        self.mul(a).add(b)
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        self.zip(other, |a, b| if b > a { b } else { a })
    }
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        self.zip(other, |a, b| if b < a { b } else { a })
    }
    /// In two factors, since 2ⁿ itself may be too small for f32: the first product is exact, the second rounds.
    #[inline(always)]
    fn ldexp(self, n: Self) -> Self {
        self.zip(n, |x, n| {
            // Adding 1.5·2²³ leaves the integer in the low bits of the sum.
            let n = (n + MAGIC).to_bits() as i32 - MAGIC.to_bits() as i32;
            let half = n >> 1;
            let power = |n: i32| f32::from_bits(((n + 127) << 23) as u32);
            x * power(half) * power(n - half)
        })
    }
    #[inline(always)]
    fn round(self) -> Self {
        // In 2²³ .. 2²⁴ f32 has no fraction, so the addition rounds to an integer.
        self.zip(self, |x, _| (x + MAGIC) - MAGIC)
    }

    #[inline(always)]
    fn is_within(self, first: Self, end: Self) -> [bool; 8] {
        std::array::from_fn(|i| first.0[i] <= self.0[i] && self.0[i] < end.0[i])
    }
    #[inline(always)]
    fn select(self, mask: [bool; 8], other: Self) -> Self {
        Scalar(std::array::from_fn(|i| if mask[i] { self.0[i] } else { other.0[i] }))
    }
}

/// The exact value, in operations that a loop does for all lanes of a vector at once: with its fraction and exponent moved to where f32
/// has them, a number is too small by 2⁻¹¹², subnormal ones included.
#[inline(always)]
fn widen_f16(x: f16) -> f32 {
    let bits = u32::from(x.to_bits());
    let number = f32::from_bits((bits & 0x7fff) << 13) * 2f32.powi(112);
    let is_finite = bits & 0x7c00 != 0x7c00;
    let magnitude = if is_finite { number.to_bits() } else { (bits & 0x03ff) << 13 | 0x7f80_0000 };
    f32::from_bits((bits & 0x8000) << 16 | magnitude)
}

/// 1.5·2²³.
const MAGIC: f32 = 12_582_912.0;
