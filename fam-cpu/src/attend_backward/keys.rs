//! What all rows of a piece add to the gradients of one tile of keys; see [`super`].

use super::KeyOutputs;
use crate::parallel::Task;
use crate::parallel::output::Run;
use crate::product::{Broadcast, Factor, Lanes, chained, store};
use crate::tile::{BLOCK_N, MAX_WIDTH};
use crate::vector::{Body, Vector};
use crate::walk::KeyTile;
use std::array;
use std::ops::Range;

/// dV += Pᵀ·dO and dK += dSᵀ·Q·scale: a lane is a channel, and the sums run over rows.
pub(super) struct KeysBackward<'a, F> {
    /// Pᵀ and dSᵀ in factors of rows, `[keys][stride]`.
    pub p: &'a [F],
    pub d_s: &'a [F],
    pub stride: usize,
    /// The rows, in factors of rows, `[rows / TERMS][dp]`.
    pub d_o: &'a [F],
    pub q: &'a [F],
    pub dp: usize,
    pub scale: f32,
    /// Which rows see which keys.
    pub tile: &'a KeyTile<'a>,
    /// The gradients, of the slot that the task owns.
    pub to: &'a KeyOutputs<'a>,
    pub task: &'a mut Task,
}

impl<F: Factor> Body for KeysBackward<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector, const MR: usize, const NR: usize>(self) {
        let KeysBackward { p, d_s, stride, d_o, q, dp, scale, tile, to, task } = self;
        // Of keys from t on. Beside a row that sees a key, one that does not weighs 0.
        let mut factors: [Range<usize>; BLOCK_N] = array::from_fn(|_| 0..0);
        let range = tile.range.start as usize..tile.range.end as usize;
        let (keys, width) = (range.len(), MR * V::LANES);
        let whole = keys / NR * NR;
        for t in (0..whole).step_by(NR).chain(whole..keys) {
            let rows = tile.rows_seeing(&(t..if t < whole { t + NR } else { t + 1 }));
            if !rows.is_empty() {
                factors[t] = rows.start / F::TERMS..rows.end.div_ceil(F::TERMS);
            }
        }
        for (weights, rows, to, scale) in [(p, d_o, &to.d_v, 1.0), (d_s, q, &to.d_k, scale)] {
            let x = Lanes { data: rows, stride: dp };
            let weights = Broadcast { data: weights, i: stride, k: 1 };
            let to = to.run(task, tile.at, range.clone());
            let mut of_tile = Gradients { x, weights, factors: &factors[..keys], scale, to };
            let mut lane = 0;
            while lane < dp {
                if lane + width <= dp {
                    of_tile.channels::<V, MR, NR>(lane);
                    lane += width;
                } else {
                    of_tile.channels::<V, 1, NR>(lane);
                    lane += V::LANES;
                }
            }
        }
    }
}

/// Of keys or of values.
struct Gradients<'a, 't, F> {
    x: Lanes<'a, F>,
    weights: Broadcast<'a, F>,
    /// Of each key, or of `NR` in the place of the first.
    factors: &'a [Range<usize>],
    scale: f32,
    to: Run<'t, f32>,
}

impl<F: Factor> Gradients<'_, '_, F> {
    /// The channels of `M` vectors from `lane` on: those of all rows stay in L1 while the keys pass.
    #[inline(always)]
    fn channels<V: Vector, const M: usize, const NR: usize>(&mut self, lane: usize) {
        let whole = self.factors.len() / NR * NR;
        for t in (0..whole).step_by(NR) {
            self.keys::<V, M, NR>(t, lane);
        }
        for t in whole..self.factors.len() {
            self.keys::<V, M, 1>(t, lane);
        }
    }

    /// The same of the keys `t .. t + N`.
    #[inline(always)]
    fn keys<V: Vector, const M: usize, const N: usize>(&mut self, t: usize, lane: usize) {
        let (factors, stride) = (&self.factors[t], self.x.stride);
        let x = Lanes { data: &self.x.data[factors.start * stride + lane..], stride };
        let weights = self.weights.skip(t);
        let weights = Broadcast { data: &weights.data[factors.start..], ..weights };
        let end = lane + M * V::LANES;
        // What is added to lies further away than caches of a core reach. It is asked for while the products before it are made.
        for i in if t == 0 { 0..2 * N } else { N..2 * N } {
            let to = self.to.row((t + i).min(self.factors.len() - 1)).as_ptr().wrapping_add(lane);
            for j in 0..M {
                V::prefetch(to.wrapping_add(j * V::LANES));
            }
        }
        let sums = chained::<V, F, M, N>(x, weights, factors.len());
        if end <= self.to.len() {
            for i in 0..N {
                let to = &mut self.to.row(t + i)[lane..end];
                for j in 0..M {
                    let to = &mut to[j * V::LANES..];
                    sums[i][j].mul_add(V::splat(self.scale), V::load(to)).store(to);
                }
            }
        } else {
            let mut padded = [[0.0; MAX_WIDTH]; N];
            store(&sums, padded.as_flattened_mut(), MAX_WIDTH);
            for (i, sums) in padded.iter().enumerate() {
                let to = self.to.row(t + i).get_mut(lane..).unwrap_or_default();
                to.iter_mut().zip(sums).for_each(|(to, sum)| *to += self.scale * sum);
            }
        }
    }
}
