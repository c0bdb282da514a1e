//! What all rows of a piece add to the gradients of one tile of keys; see [`super`].

use crate::product::{Broadcast, Factor, Lanes, chained};
use crate::vector::{Body, Vector};
use crate::walk::KeyTile;
use std::ops::Range;

/// dV += Pᵀ·dO and dK += dSᵀ·Q: a lane is a channel, and the sums run over rows.
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
    /// Gradients of values and of keys over the scale, `[keys][dp]`, added to.
    pub d_v: &'a mut [f32],
    pub d_k: &'a mut [f32],
}

impl<F: Factor> Body for KeysBackward<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector, const MR: usize, const NR: usize>(mut self) {
        let keys = self.d_v.len() / self.dp;
        let mut t = 0;
        while t + NR <= keys {
            self.keys::<V, MR, NR>(t);
            t += NR;
        }
        while t < keys {
            self.keys::<V, MR, 1>(t);
            t += 1;
        }
    }
}

impl<F: Factor> KeysBackward<'_, F> {
    /// Keys `t .. t + N`, over the rows that see one of them.
    #[inline(always)]
    fn keys<V: Vector, const MR: usize, const N: usize>(&mut self, t: usize) {
        let (width, rows) = (MR * V::LANES, self.tile.rows_seeing(&(t..t + N)));
        if rows.is_empty() {
            return;
        }
        let mut lane = 0;
        while lane < self.dp {
            if lane + width <= self.dp {
                self.channels::<V, MR, N>(t, rows.clone(), lane);
                lane += width;
            } else {
                self.channels::<V, 1, N>(t, rows.clone(), lane);
                lane += V::LANES;
            }
        }
    }

    /// The channels of `M` vectors from `lane` on.
    #[inline(always)]
    fn channels<V: Vector, const M: usize, const N: usize>(&mut self, t: usize, rows: Range<usize>, lane: usize) {
        // Beside a row that sees a key, one that does not weighs 0.
        let rows = rows.start / F::TERMS..rows.end.div_ceil(F::TERMS);
        for (weights, of_rows, sums) in [(self.p, self.d_o, &mut *self.d_v), (self.d_s, self.q, &mut *self.d_k)] {
            let x = Lanes { data: &of_rows[rows.start * self.dp + lane..], stride: self.dp };
            let b = Broadcast { data: &weights[t * self.stride + rows.start..], i: self.stride, k: 1 };
            let sum = chained::<V, F, M, N>(x, b, rows.len());
            for i in 0..N {
                for j in 0..M {
                    let to = &mut sums[(t + i) * self.dp + lane + j * V::LANES..];
                    V::load(to).add(sum[i][j]).store(to);
                }
            }
        }
    }
}
