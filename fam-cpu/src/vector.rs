//! The narrow waist between kernels and instruction sets: fourteen verbs over a register of f32 lanes.
//!
//! A kernel is written once, generic over [`Vector`] and `#[inline(always)]`; an instruction set implements the verbs in a file of its
//! own and calls the kernels from a shell with its `#[target_feature]`. The shell is the only way in, so a verb runs only on a machine
//! that has its instructions.
//!
//! What NaN does is part of the contract: no verb loses the NaN of its receiver.

pub(crate) mod scalar;

/// A register of f32 lanes.
pub(crate) trait Vector: Copy {
    /// Lanes.
    const LANES: usize;

    /// The same value in every lane.
    fn splat(value: f32) -> Self;
    /// The first `LANES` elements of `from`.
    fn load(from: &[f32]) -> Self;
    /// Writes the first `LANES` elements of `to`.
    fn store(self, to: &mut [f32]);

    /// `self + other`.
    fn add(self, other: Self) -> Self;
    /// `self − other`.
    fn sub(self, other: Self) -> Self;
    /// `self · other`.
    fn mul(self, other: Self) -> Self;
    /// `self / other`.
    fn div(self, other: Self) -> Self;
    /// `self · a + b`, rounded once or twice: once where the instruction set fuses.
    fn mul_add(self, a: Self, b: Self) -> Self;
    /// The larger; `self` where either is NaN.
    fn max(self, other: Self) -> Self;
    /// The smaller; `self` where either is NaN.
    fn min(self, other: Self) -> Self;
    /// `self · 2ⁿ` for integral n in −152 ..= 127, rounded once, subnormal results included. Any value where `self` and `n` are NaN
    /// together is NaN.
    fn ldexp(self, n: Self) -> Self;
    /// The nearest integer, for |self| < 2²².
    fn round(self) -> Self;

    /// The largest lane; NaN lanes are passed over.
    fn largest(self) -> f32;
    /// The sum of the lanes, in an order that is fixed for the instruction set.
    fn sum(self) -> f32;
}

/// exp(x) for x ≤ 0 within 2 ulp: 1 for 0, 0 for −∞, NaN for NaN, correctly rounded subnormals. Not for x > 88.
///
/// x = n·ln 2 + r with |r| ≤ ln 2 / 2, and exp(r) by the polynomial of Cephes' `expf` (S. Moshier), whose error is below 2⁻²⁶. ln 2 is
/// split in two so that n times its upper part is exact.
#[inline(always)]
pub(crate) fn exp<V: Vector>(x: V) -> V {
    const LN2_UPPER: f32 = 355.0 / 512.0;
    const LN2_LOWER: f32 = -2.121_944_4e-4;
    const POLYNOMIAL: [f32; 6] = [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];
    // exp(−105) is below half the smallest subnormal: from here on the result is 0, and n stays in range.
    let x = x.max(V::splat(-105.0));
    let n = x.mul(V::splat(std::f32::consts::LOG2_E)).round();
    let r = n.mul_add(V::splat(-LN2_UPPER), x);
    let r = n.mul_add(V::splat(-LN2_LOWER), r);
    let mut p = V::splat(POLYNOMIAL[0]);
    for c in &POLYNOMIAL[1..] {
        p = p.mul_add(r, V::splat(*c));
    }
    p.mul_add(r.mul(r), r).add(V::splat(1.0)).ldexp(n)
}

/// σ(x) = ELU(x) + 1: x + 1 for x > 0, exp(x) otherwise (Infini-attention, Eq. 3; never `expm1(x) + 1`, which cancels).
///
/// Written as exp(min(x, 0)) + max(x, 0): one of the two terms is always the exact 1 or 0.
#[inline(always)]
pub(crate) fn sigma<V: Vector>(x: V) -> V {
    let zero = V::splat(0.0);
    exp(x.min(zero)).add(x.max(zero))
}

#[cfg(test)]
mod tests {
    use super::scalar::Scalar;
    use super::{Vector, exp, sigma};

    /// Every lane holds `x`; the first of the result.
    fn lane<V: Vector>(x: f32, f: impl Fn(V) -> V) -> f32 {
        let mut out = [0.0; 16];
        f(V::splat(x)).store(&mut out);
        out[0]
    }

    /// Distance in units of the last place of the exact value, which for subnormal results is the smallest subnormal.
    fn ulps(got: f32, exact: f64) -> f64 {
        let exponent = exact.log2().floor().max(-126.0);
        (f64::from(got) - exact).abs() / (exponent - 23.0).exp2()
    }

    fn exp_is_accurate<V: Vector>() {
        let mut worst = 0.0f64;
        for bits in ((-0.0f32).to_bits()..(-106.0f32).to_bits()).step_by(997) {
            let x = f32::from_bits(bits);
            worst = worst.max(ulps(lane::<V>(x, exp), f64::from(x).exp()));
        }
        assert!(worst <= 2.0, "{worst} ulp");
        for (x, want) in [(0.0, 1.0), (-0.0, 1.0), (f32::NEG_INFINITY, 0.0), (-1e30, 0.0), (-104.1, 0.0)] {
            assert_eq!(lane::<V>(x, exp).to_bits(), f32::to_bits(want), "exp({x})");
        }
        for nan in [f32::NAN, -f32::NAN, f32::from_bits(0x7f80_0001)] {
            assert!(lane::<V>(nan, exp).is_nan() && lane::<V>(nan, sigma).is_nan());
        }
    }

    #[test]
    fn exp_is_within_two_ulp() {
        exp_is_accurate::<Scalar>();
    }

    #[test]
    fn sigma_is_exact_above_zero() {
        for x in [1e-30f32, 0.1, 1.0, 3.3e7, f32::MAX, f32::INFINITY] {
            assert_eq!(lane::<Scalar>(x, sigma), x + 1.0);
        }
        assert_eq!(lane::<Scalar>(0.0, sigma), 1.0);
        assert!(ulps(lane::<Scalar>(-20.0, sigma), (-20f64).exp()) <= 2.0);
    }

    #[test]
    fn reductions_pass_nan_over_or_on() {
        let lanes: Vec<f32> = (0..16).map(|i| if i == 3 { f32::NAN } else { -(i as f32) }).collect();
        assert_eq!(Scalar::load(&lanes).largest(), 0.0);
        assert!(Scalar::load(&lanes).sum().is_nan());
        assert_eq!(Scalar::splat(f32::NAN).largest(), f32::NEG_INFINITY);
    }
}
