//! The online softmax: one small state for each row, so that keys can come tile by tile (Milakov and Gimelshein, arXiv 1805.02867).

use crate::product::Factor;
use crate::vector::{Vector, exp2};
use fam_core::mutate;
use std::ops::Range;

/// Maximum of the logits s_t seen so far, and Σ exp(s_t − row_max).
///
/// A row that has seen no logit above −∞ is *empty*: `row_max` = −∞, `row_sum` = 0. In any other row the sum is at least 1, or NaN.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Softmax {
    pub row_max: f32,
    pub row_sum: f32,
}

impl Softmax {
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

    /// What sums are multiplied by in the end.
    pub fn weight(self) -> f32 {
        1.0 / mutate!("attend-epsilon", self.row_sum, self.row_sum + 1e-6)
    }

    /// Whether the row has seen no logit above −∞: its result is +0, whatever its sums and its weight are.
    pub fn is_empty(self) -> bool {
        self.row_sum == 0.0
    }
}

/// Takes a tile into the states of `M` vectors of rows: turns the logits `s` of `keys`, −∞ where a row does not see the key, into factors of
/// exp((s − row_max)·unit), the first of them in the place of the first logit. `s` is `[keys][W]`, from the first vector on; `row_max` is in
/// units too, and `maxima` is what it becomes. Returns the factors that bring what was accumulated before to the new maxima.
///
/// The difference from the maximum is taken before it is multiplied: it is exact where logits are close, however large they are. Sums are
/// those of the exponentials before they are rounded to factors, as `lse` needs them; to `o` the one is as good as the other.
#[inline(always)]
pub(crate) fn update<V: Vector, F: Factor, const M: usize>(
    [row_max, row_sum]: [&mut [f32]; 2],
    maxima: [V; M],
    unit: f32,
    s: &mut [f32],
    width: usize,
    keys: Range<usize>,
) -> [V; M] {
    #[cfg(fam_mutants)]
    mutate!("attend-logits-16-bit", (), {
        let round = |s: f32| fam_core::f16::from_f32(s * unit).to_f32() / unit;
        keys.clone().for_each(|t| s[t * width..][..M * V::LANES].iter_mut().for_each(|s| *s = round(*s)));
    });
    let [mut before, mut sum, mut shift, mut factor] = [maxima; 4];
    for j in 0..M {
        let maxima = mutate!("attend-max-from-zero", maxima[j], maxima[j].max(V::splat(0.0)));
        (shift[j], factor[j]) = exponents(maxima, unit);
        before[j] = exp2(V::load(&row_max[j * V::LANES..]).sub(shift[j]).mul(factor[j]));
        sum[j] = V::load(&row_sum[j * V::LANES..]).mul(mutate!("attend-sum-not-rescaled", before[j], V::splat(1.0)));
        maxima.store(&mut row_max[j * V::LANES..]);
    }
    for i in keys.start / F::TERMS..keys.end.div_ceil(F::TERMS) {
        for j in 0..M {
            // Beside the only visible key of a factor is a 0.
            let mut terms = [V::splat(0.0); 2];
            for n in 0..F::TERMS {
                let t = i * F::TERMS + n;
                if keys.contains(&t) {
                    terms[n] = exp2(V::load(&s[t * width + j * V::LANES..]).sub(shift[j]).mul(factor[j]));
                    sum[j] = sum[j].add(terms[n]);
                }
            }
            F::join(terms).store(&mut s[i * width + j * V::LANES..]);
        }
    }
    for j in 0..M {
        sum[j].store(&mut row_sum[j * V::LANES..]);
    }
    #[cfg(fam_mutants)]
    mutate!("attend-sum-16-bit", (), row_sum[..M * V::LANES].iter_mut().for_each(|x| *x = fam_core::f16::from_f32(*x).to_f32()));
    mutate!("attend-acc-not-rescaled", before, [V::splat(1.0); M])
}

/// Joins the states of a vector of rows over other keys to theirs. Returns the factors that bring what was accumulated over either set of
/// keys to the common maximum.
#[inline(always)]
pub(crate) fn join<V: Vector>([row_max, row_sum]: [&mut [f32]; 2], [other_max, other_sum]: [&[f32]; 2], unit: f32) -> [V; 2] {
    let (one, other) = (V::load(row_max), V::load(other_max));
    let maxima = one.max(other);
    let (shift, factor) = exponents(maxima, unit);
    let [a, b] = [exp2(one.sub(shift).mul(factor)), exp2(other.sub(shift).mul(factor))];
    let b = mutate!("attend-split-unshifted", b, V::splat(1.0));
    maxima.store(row_max);
    V::load(row_sum).mul(a).add(V::load(other_sum).mul(b)).store(row_sum);
    [a, b]
}

/// What exponents are taken against, [`Softmax::shift`] of the maxima, and what the difference of two logits is multiplied by.
#[inline(always)]
fn exponents<V: Vector>(maxima: V, unit: f32) -> (V, V) {
    let is_empty = maxima.is_within(V::splat(f32::NEG_INFINITY), V::splat(f32::MIN));
    let factor = (f64::from(unit) * std::f64::consts::LOG2_E).min(f32::MAX.into()) as f32;
    (V::splat(0.0).select(is_empty, maxima), V::splat(factor))
}

#[cfg(test)]
mod tests {
    use super::{Softmax, update};
    use crate::Isa;
    use crate::vector::{Body, Vector};

    const NEG: f32 = f32::NEG_INFINITY;
    const EMPTY: Softmax = Softmax { row_max: NEG, row_sum: 0.0 };

    /// A tile of logits for a row, in every lane: the state after it, the probabilities and the factor of what came before.
    struct Tile<'a>(Softmax, &'a [f32]);

    impl Body for Tile<'_> {
        type Output = (Softmax, Vec<f32>, f32);

        #[inline(always)]
        fn run<V: Vector, const MR: usize, const NR: usize>(self) -> Self::Output {
            let Tile(state, logits) = self;
            let mut s: Vec<f32> = logits.iter().flat_map(|s| vec![*s; V::LANES]).collect();
            let (mut row_max, mut row_sum) = ([state.row_max; 16], [state.row_sum; 16]);
            let largest = logits.iter().fold(V::splat(state.row_max), |max, s| max.max(V::splat(*s)));
            let state = [&mut row_max[..], &mut row_sum[..]];
            let [before] = update::<V, f32, 1>(state, [largest], 1.0, &mut s, V::LANES, 0..logits.len());
            let mut factor = [0.0; 16];
            before.store(&mut factor);
            let state = Softmax { row_max: row_max[0], row_sum: row_sum[0] };
            (state, s.into_iter().step_by(V::LANES).collect(), factor[0])
        }
    }

    fn levels() -> impl Iterator<Item = Isa> {
        Isa::ALL.into_iter().filter(|isa| isa.is_available())
    }

    #[test]
    fn rows_of_minus_infinity_are_empty() {
        for isa in levels() {
            let (state, p, before) = isa.run(Tile(EMPTY, &[NEG; 3]));
            assert_eq!((state, p, before), (EMPTY, vec![0.0; 3], 0.0), "{isa}");
            assert!(state.is_empty() && state.lse() == NEG);
        }
    }

    #[test]
    fn nan_and_plus_infinity_make_the_row_nan() {
        for (isa, bad) in levels().flat_map(|isa| [(isa, f32::NAN), (isa, f32::INFINITY)]) {
            for rest in [NEG, 0.0] {
                let (state, ..) = isa.run(Tile(EMPTY, &[rest, rest, bad, rest]));
                assert!(state.lse().is_nan() && state.weight().is_nan() && !state.is_empty(), "{isa}");
            }
        }
    }

    #[test]
    fn tiles_join() {
        for isa in levels() {
            let (state, p, before) = isa.run(Tile(EMPTY, &[1.0, NEG, 1.0]));
            assert_eq!((p, before, state.row_sum), (vec![1.0, 0.0, 1.0], 0.0, 2.0), "{isa}");
            let (state, p, before) = isa.run(Tile(state, &[NEG, 1.0]));
            assert_eq!((p, before, state.row_sum), (vec![0.0, 1.0], 1.0, 3.0), "{isa}");
            // A maximum of 1e4 · ln 2 more outweighs all before.
            let (state, p, before) = isa.run(Tile(state, &[7000.0]));
            assert_eq!((p, before, state.row_sum, state.lse()), (vec![1.0], 0.0, 1.0, 7000.0), "{isa}");
        }
    }

    #[test]
    fn a_sink_joins_the_denominator() {
        let state = Softmax { row_max: 0.0, row_sum: 8.0 };
        let (with, [before, _]) = state.merge(Softmax::one(0.0));
        assert_eq!((with.row_sum, before), (9.0, 1.0));
        assert_eq!(EMPTY.merge(Softmax::one(1.5)).0.lse(), 1.5);
        assert_eq!(state.merge(Softmax::one(NEG)), (state, [1.0, 0.0]));
        assert_eq!(EMPTY.merge(Softmax::one(NEG)).0, EMPTY);
    }
}
