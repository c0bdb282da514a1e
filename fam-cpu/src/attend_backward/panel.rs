//! A panel of rows over one tile of keys, backward; see [`super`].

use crate::pack::Rows;
use crate::product::{All, Broadcast, Lanes, Within, accumulate, chained, product, zero};
use crate::tile::{BLOCK_N, MAX_MR};
use crate::vector::{Body, Vector, exp2};
use crate::walk::Seen;

/// Buffers of a panel are `[..][W]`, those of rows and keys `[..][dp]`.
pub(super) struct PanelBackward<'a> {
    /// Qᵀ and dOᵀ, `[dp][W]`, and the same rows as they lie.
    pub q: &'a [f32],
    pub d_o: &'a [f32],
    pub q_rows: &'a [f32],
    pub d_o_rows: &'a [f32],
    /// Keys and values, of `d` channels.
    pub k: Rows<'a>,
    pub v: Rows<'a>,
    pub d: usize,
    pub dp: usize,
    pub scale: f32,
    /// One for each row; +∞ for a row that passes nothing on.
    pub lse: &'a [f32],
    pub delta: &'a [f32],
    /// What each vector sees; and each row of a vector that does not see all: its first key, and the one after its last.
    pub seen: [Seen; MAX_MR],
    pub ranges: [&'a [f32]; 2],
    /// Pᵀ, then dSᵀ, `[BLOCK_N][W]` each.
    pub p: &'a mut [f32],
    /// dQᵀ over the scale, `[dp][W]`, added to.
    pub d_q: &'a mut [f32],
    /// Of the tile's keys, over the scale, and of its values, added to.
    pub d_k: &'a mut [f32],
    pub d_v: &'a mut [f32],
}

impl Body for PanelBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector, const MR: usize, const NR: usize>(mut self) {
        let any = self.seen[..MR].iter().map(|s| s.any.clone()).filter(|any| !any.is_empty());
        let Some(any) = any.reduce(|a, b| a.start.min(b.start)..a.end.max(b.end)) else { return };
        let mut t = any.start;
        while t < any.end {
            if any.len() < NR {
                self.weights::<V, MR, 1>(t);
                t += 1;
            } else {
                // The last keys again rather than fewer at once: the same numbers, in the same places.
                self.weights::<V, MR, NR>(t.min(any.end - NR));
                t += NR;
            }
        }

        let seen = &self.seen[..MR];
        if seen.iter().all(|s| *s == seen[0] && s.any == s.all) {
            self.queries::<V, MR, MR, NR>(0);
        } else {
            (0..MR).for_each(|j| self.queries::<V, MR, 1, NR>(j));
        }

        let (width, dp) = (MR * V::LANES, self.dp);
        let (p, d_s) = self.p.split_at(BLOCK_N * width);
        for (weights, rows, sums) in [(p, self.d_o_rows, &mut *self.d_v), (d_s, self.q_rows, &mut *self.d_k)] {
            let weights = Broadcast { data: &weights[any.start * width..], i: width, k: 1 };
            let sums = &mut sums[any.start * dp..];
            let sizes = [any.len(), dp, rows.len() / dp];
            product::<V, MR, NR>(Lanes { data: rows, stride: dp }, weights, sizes, &mut |t, c, sum: V| {
                let to = &mut sums[t * dp + c..];
                V::load(to).add(sum).store(to);
            });
        }
    }
}

impl PanelBackward<'_> {
    /// P and dS of the keys `t .. t + N` in all vectors; 0 where a row does not see the key.
    #[inline(always)]
    fn weights<V: Vector, const MR: usize, const N: usize>(&mut self, t: usize) {
        let sees = |s: &Seen| s.any.start < t + N && t < s.any.end;
        if self.seen[..MR].iter().all(sees) {
            return self.weights_of::<V, MR, MR, N>(0, t);
        }
        for j in 0..MR {
            if sees(&self.seen[j]) {
                self.weights_of::<V, MR, 1, N>(j, t);
            } else {
                let width = MR * V::LANES;
                for at in (t..t + N).flat_map(|t| [t, BLOCK_N + t]).map(|t| t * width + j * V::LANES) {
                    V::splat(0.0).store(&mut self.p[at..]);
                }
            }
        }
    }

    /// The same in `M` vectors from vector `first` on.
    #[inline(always)]
    fn weights_of<V: Vector, const MR: usize, const M: usize, const N: usize>(&mut self, first: usize, t: usize) {
        let (width, lanes) = (MR * V::LANES, first * V::LANES);
        let is_seen = |j: usize| {
            let all = &self.seen[first + j].all;
            all.start <= t && t + N <= all.end
        };
        let mask = |x: V, i: usize, j: usize| {
            if is_seen(j) {
                return x;
            }
            let begin = lanes + j * V::LANES;
            let (from, until) = (V::load(&self.ranges[0][begin..]), V::load(&self.ranges[1][begin..]));
            x.select(V::splat((t + i) as f32).is_within(from, until), V::splat(0.0))
        };
        let logits = chained::<V, M, N>(Lanes { data: &self.q[lanes..], stride: width }, self.k.over_channels().skip(t), self.d);
        let scale = V::splat(self.scale);
        for i in 0..N {
            for j in 0..M {
                let at = lanes + j * V::LANES;
                let lse = V::load(&self.lse[at..]);
                let less = logits[i][j].mul_add(scale, V::splat(0.0).sub(lse));
                let p = exp2(less.mul(V::splat(std::f32::consts::LOG2_E)));
                mask(p, i, j).store(&mut self.p[(t + i) * width + at..]);
            }
        }
        let d_p = chained::<V, M, N>(Lanes { data: &self.d_o[lanes..], stride: width }, self.v.over_channels().skip(t), self.d);
        for i in 0..N {
            for j in 0..M {
                let at = lanes + j * V::LANES;
                let p = V::load(&self.p[(t + i) * width + at..]);
                let d_s = p.mul(d_p[i][j].sub(V::load(&self.delta[at..])));
                // 0 times what a hidden key holds need not be 0.
                mask(d_s, i, j).store(&mut self.p[(BLOCK_N + t + i) * width + at..]);
            }
        }
    }

    /// Adds the tile's part of dQᵀ in `M` vectors from vector `first` on, each row's over the keys that it sees alone.
    #[inline(always)]
    fn queries<V: Vector, const MR: usize, const M: usize, const NR: usize>(&mut self, first: usize) {
        if self.seen[first].any.is_empty() {
            return;
        }
        let mut c = 0;
        while c + NR <= self.d {
            self.queries_of::<V, MR, M, NR>(first, c);
            c += NR;
        }
        while c < self.d {
            self.queries_of::<V, MR, M, 1>(first, c);
            c += 1;
        }
    }

    /// The same for channels `c .. c + N`.
    #[inline(always)]
    fn queries_of<V: Vector, const MR: usize, const M: usize, const N: usize>(&mut self, first: usize, c: usize) {
        let (width, lanes) = (MR * V::LANES, first * V::LANES);
        let d_s = Lanes { data: &self.p[BLOCK_N * width + lanes..], stride: width };
        let k = self.k.over_rows().skip(c);
        let mut sum = zero::<V, M, N>();
        let Seen { any, all } = &self.seen[first];
        if any == all {
            accumulate(d_s, k, all.clone(), &All, &mut sum);
        } else {
            let mut within = Within { first: [V::splat(0.0); M], end: [V::splat(0.0); M] };
            for j in 0..M {
                within.first[j] = V::load(&self.ranges[0][lanes + j * V::LANES..]);
                within.end[j] = V::load(&self.ranges[1][lanes + j * V::LANES..]);
            }
            accumulate(d_s, k, any.start..all.start, &within, &mut sum);
            accumulate(d_s, k, all.clone(), &All, &mut sum);
            accumulate(d_s, k, all.end..any.end, &within, &mut sum);
        }
        for i in 0..N {
            for j in 0..M {
                let to = &mut self.d_q[(c + i) * width + lanes + j * V::LANES..];
                V::load(to).add(sum[i][j]).store(to);
            }
        }
    }
}
