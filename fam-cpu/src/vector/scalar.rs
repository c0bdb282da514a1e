//! The level that runs anywhere: plain Rust on eight lanes, in a form that LLVM turns into the target's baseline vectors.

use super::Vector;

/// Eight f32 lanes without intrinsics.
#[derive(Clone, Copy)]
#[repr(align(32))]
pub(crate) struct Scalar([f32; 8]);

impl Scalar {
    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Scalar(std::array::from_fn(|i| f(self.0[i], other.0[i])))
    }

    /// Lanes i and i + 4 first, as a target with registers of four lanes would.
    #[inline(always)]
    fn reduce(self, f: impl Fn(f32, f32) -> f32) -> f32 {
        let v = self.0;
        let four: [f32; 4] = std::array::from_fn(|i| f(v[i], v[i + 4]));
        f(f(four[0], four[2]), f(four[1], four[3]))
    }
}

impl Vector for Scalar {
    const LANES: usize = 8;

    #[inline(always)]
    fn splat(value: f32) -> Self {
        Scalar([value; 8])
    }
    #[inline(always)]
    fn load(from: &[f32]) -> Self {
        Scalar(std::array::from_fn(|i| from[..8][i]))
    }
    #[inline(always)]
    fn store(self, to: &mut [f32]) {
        to[..8].copy_from_slice(&self.0);
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
    fn largest(self) -> f32 {
        // −inf first, so that a NaN lane is never the receiver.
        Scalar([f32::NEG_INFINITY; 8]).max(self).reduce(|a, b| if b > a { b } else { a })
    }
    #[inline(always)]
    fn sum(self) -> f32 {
        self.reduce(|a, b| a + b)
    }
}

/// 1.5·2²³.
const MAGIC: f32 = 12_582_912.0;
