//! What all rows of a piece add to the gradients of one tile of keys; see [`super`].

use crate::product::{Broadcast, Factor, Lanes, chained, store};
use crate::tile::BLOCK_N;
use crate::vector::{Body, Vector};
use crate::walk::KeyTile;
use std::array;
use std::ops::Range;

/// dV = Pᵀ·dO and dK = dSᵀ·Q: a lane is a channel, and the sums run over rows.
pub(super) struct KeysBackward<'a, F> {
    /// Pᵀ and dSᵀ in factors of rows, `[keys][stride]`.
    pub p: &'a [F],
    pub d_s: &'a [F],
    pub stride: usize,
    /// The rows, in factors of rows, `[rows / TERMS][dp]`.
    pub d_o: &'a [F],
    pub q: &'a [F],
    pub dp: usize,
    /// Which rows see which keys.
    pub tile: &'a KeyTile<'a>,
    /// Gradients of values and of keys over the scale, `[keys][dp]`.
    pub d_v: &'a mut [f32],
    pub d_k: &'a mut [f32],
}

impl<F: Factor> Body for KeysBackward<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector, const MR: usize, const NR: usize>(mut self) {
        // Of keys from t on. Beside a row that sees a key, one that does not weighs 0.
        let mut factors: [Range<usize>; BLOCK_N] = array::from_fn(|_| 0..0);
        let (keys, width) = (self.d_v.len() / self.dp, MR * V::LANES);
        let whole = keys / NR * NR;
        for t in (0..whole).step_by(NR).chain(whole..keys) {
            let rows = self.tile.rows_seeing(&(t..if t < whole { t + NR } else { t + 1 }));
            if !rows.is_empty() {
                factors[t] = rows.start / F::TERMS..rows.end.div_ceil(F::TERMS);
            }
        }
        let mut lane = 0;
        while lane < self.dp {
            if lane + width <= self.dp {
                self.channels::<V, MR, NR>(&factors[..keys], lane);
                lane += width;
            } else {
                self.channels::<V, 1, NR>(&factors[..keys], lane);
                lane += V::LANES;
            }
        }
    }
}

impl<F: Factor> KeysBackward<'_, F> {
    /// The channels of `M` vectors from `lane` on: those of all rows stay in L1 while the keys pass.
    #[inline(always)]
    fn channels<V: Vector, const M: usize, const NR: usize>(&mut self, factors: &[Range<usize>], lane: usize) {
        for (weights, of_rows, sums) in [(self.p, self.d_o, &mut *self.d_v), (self.d_s, self.q, &mut *self.d_k)] {
            let x = Lanes { data: &of_rows[lane..], stride: self.dp };
            let b = Broadcast { data: weights, i: self.stride, k: 1 };
            let (sums, whole) = (&mut sums[lane..], factors.len() / NR * NR);
            for t in (0..whole).step_by(NR) {
                keys::<V, F, M, NR>(x, b.skip(t), &factors[t], &mut sums[t * self.dp..]);
            }
            for t in whole..factors.len() {
                keys::<V, F, M, 1>(x, b.skip(t), &factors[t], &mut sums[t * self.dp..]);
            }
        }
    }
}

/// The sums of `N` keys over so many factors.
#[inline(always)]
fn keys<V: Vector, F: Factor, const M: usize, const N: usize>(
    x: Lanes<'_, F>,
    b: Broadcast<'_, F>,
    factors: &Range<usize>,
    sums: &mut [f32],
) {
    let of_rows = Lanes { data: &x.data[factors.start * x.stride..], ..x };
    let weights = Broadcast { data: &b.data[factors.start..], ..b };
    store(&chained::<V, F, M, N>(of_rows, weights, factors.len()), sums, x.stride);
}
