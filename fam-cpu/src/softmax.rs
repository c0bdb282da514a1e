//! The online softmax: one small state for each row, so that keys can come tile by tile (Milakov and Gimelshein, arXiv 1805.02867).

use crate::vector::{Vector, exp};
use fam_core::mutate;
use std::ops::Range;

/// Maximum of the logits s_t seen so far, and Σ exp(s_t − row_max).
///
/// A row that has seen no logit above −∞ is *empty*: `row_max` = −∞, `row_sum` = 0. In any other row the sum is at least 1, or NaN.
#[derive(Clone, Copy, Debug, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(crate) struct Softmax {
    pub row_max: f32,
    pub row_sum: f32,
}

impl Softmax {
    /// A row before its first key.
    pub const EMPTY: Self = Softmax { row_max: f32::NEG_INFINITY, row_sum: 0.0 };

    /// A row of one logit. −∞ makes an empty one, whatever `row_sum` says: `merge` gives it no weight.
    pub fn one(logit: f32) -> Self {
        Softmax { row_max: logit, row_sum: 1.0 }
    }

    /// What exponents are taken against: the maximum, but 0 while that is −∞, since −∞ − (−∞) is NaN. exp(−∞ − 0) is the right 0, and a
    /// NaN logit, which no maximum shows, stays NaN.
    #[inline(always)]
    fn shift(row_max: f32) -> f32 {
        if row_max == f32::NEG_INFINITY { 0.0 } else { row_max }
    }

    /// Takes in one tile: turns the logits `s`, whole vectors of which only `visible` count, into exp(s − row_max), 0 outside `visible`.
    /// Returns the factor that brings what was accumulated before to the new maximum.
    #[inline(always)]
    pub fn update<V: Vector>(&mut self, s: &mut [f32], visible: Range<usize>) -> f32 {
        let hidden = mutate!("attend-finite-sentinel", f32::NEG_INFINITY, -1e4);
        s[..visible.start].fill(hidden);
        s[visible.end..].fill(hidden);
        #[cfg(fam_mutants)]
        mutate!("attend-logits-16-bit", (), s.iter_mut().for_each(|s| *s = fam_core::f16::from_f32(*s).to_f32()));

        let mut largest = V::splat(mutate!("attend-max-from-zero", self.row_max, self.row_max.max(0.0)));
        for s in s.chunks_exact(V::LANES) {
            largest = largest.max(V::load(s));
        }
        let row_max = largest.largest();
        let shift = Self::shift(row_max);
        let mut sum = V::splat(0.0);
        for s in s.chunks_exact_mut(V::LANES) {
            let p = exp(V::load(s).sub(V::splat(shift)));
            sum = sum.add(p);
            p.store(s);
        }
        let before = (self.row_max - shift).exp();
        self.row_sum = mutate!("attend-sum-not-rescaled", self.row_sum * before, self.row_sum) + sum.sum();
        #[cfg(fam_mutants)]
        mutate!("attend-sum-16-bit", (), self.row_sum = fam_core::f16::from_f32(self.row_sum).to_f32());
        self.row_max = row_max;
        mutate!("attend-acc-not-rescaled", before, 1.0)
    }

    /// The row over both key sets, and the factors that bring what was accumulated over each to the common maximum. 0 is exact: a part
    /// of weight 0 must not be multiplied, but left out, where it may be NaN.
    pub fn merge(self, other: Self) -> (Self, [f32; 2]) {
        // `other` replaces a maximum of −∞, and a NaN on either side wins.
        let row_max = if self.row_max >= other.row_max || self.row_max.is_nan() { self.row_max } else { other.row_max };
        let shift = mutate!("merge-unshifted", mutate!("merge-empties", Self::shift(row_max), row_max), 0.0);
        let [a, b] = [self, other].map(|part| (part.row_max - shift).exp());
        (Softmax { row_max, row_sum: self.row_sum * a + other.row_sum * b }, [a, b])
    }

    /// ln Σ exp(s_t): −∞ for an empty row.
    pub fn lse(self) -> f32 {
        self.row_max + self.row_sum.ln()
    }

    /// Divides what was accumulated by the sum; an empty row becomes +0.
    #[inline(always)]
    pub fn normalise<V: Vector>(self, acc: &mut [f32]) {
        if self.row_sum == 0.0 {
            return acc.fill(0.0);
        }
        let sum = V::splat(mutate!("attend-epsilon", self.row_sum, self.row_sum + 1e-6));
        for c in acc.chunks_exact_mut(V::LANES) {
            V::load(c).div(sum).store(c);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Softmax;
    use crate::vector::scalar::Scalar;

    const NEG: f32 = f32::NEG_INFINITY;

    /// State and probabilities after one tile of eight logits, all visible.
    fn after(mut s: [f32; 8]) -> (Softmax, [f32; 8]) {
        let mut state = Softmax::EMPTY;
        state.update::<Scalar>(&mut s, 0..8);
        (state, s)
    }

    #[test]
    fn rows_of_minus_infinity_are_empty() {
        let (state, p) = after([NEG; 8]);
        assert_eq!((state, p), (Softmax::EMPTY, [0.0; 8]));
        assert_eq!(state.lse(), NEG);
        let mut acc = [3.0; 8];
        state.normalise::<Scalar>(&mut acc);
        assert_eq!(acc.map(f32::to_bits), [0; 8]);
    }

    #[test]
    fn nan_and_plus_infinity_make_the_row_nan() {
        for bad in [f32::NAN, f32::INFINITY] {
            for rest in [NEG, 0.0] {
                let mut s = [rest; 8];
                s[5] = bad;
                let (state, _) = after(s);
                assert!(state.lse().is_nan() && state.row_sum.is_nan());
                let mut acc = [1.0; 8];
                state.normalise::<Scalar>(&mut acc);
                assert!(acc.iter().all(|c| c.is_nan()));
            }
        }
    }

    #[test]
    fn hidden_logits_weigh_nothing() {
        let mut state = Softmax::EMPTY;
        let mut s = [f32::NAN, 1.0, 2.0, f32::NAN, 9.0, 9.0, 9.0, 9.0];
        assert_eq!(state.update::<Scalar>(&mut s, 1..3), 0.0);
        assert_eq!(s.map(|p| p > 0.0), [false, true, true, false, false, false, false, false]);
        assert_eq!(state.row_max, 2.0);
    }

    #[test]
    fn a_sink_joins_the_denominator() {
        let (state, _) = after([0.0; 8]);
        let (with, [before, _]) = state.merge(Softmax::one(0.0));
        assert_eq!((with.row_sum, before), (9.0, 1.0));
        assert_eq!(Softmax::EMPTY.merge(Softmax::one(1.5)).0.lse(), 1.5);
        assert_eq!(state.merge(Softmax::one(NEG)), (state, [1.0, 0.0]));
        assert_eq!(Softmax::EMPTY.merge(Softmax::one(NEG)).0, Softmax::EMPTY);
    }
}
