//! A panel of rows over one tile of keys, backward; see [`super`].

use crate::pack::Rows;
use crate::product::{All, Lanes, Within, accumulate, chained, zero};
use crate::tile::MAX_MR;
use crate::vector::{Body, Vector, exp2};
use crate::walk::Seen;

/// P and dS of a panel, and what it adds to dQ. Buffers are `[..][W]` where nothing else is said.
pub(super) struct PanelBackward<'a> {
    /// Qᵀ and dOᵀ, `[dp][W]`.
    pub q: &'a [f32],
    pub d_o: &'a [f32],
    /// Keys and values, of `d` channels.
    pub k: Rows<'a>,
    pub v: Rows<'a>,
    pub d: usize,
    pub scale: f32,
    /// One for each row; +∞ for a row that passes nothing on.
    pub lse: &'a [f32],
    pub delta: &'a [f32],
    /// What each vector sees; and each row of a vector that does not see all: its first key, and the one after its last.
    pub seen: &'a [Seen; MAX_MR],
    pub ranges: [&'a [f32]; 2],
    /// Pᵀ and dSᵀ from the panel's first row on, `[keys][stride]` each. Those of keys that a row does not see become 0.
    pub p: &'a mut [f32],
    pub d_s: &'a mut [f32],
    pub stride: usize,
    pub keys: usize,
    /// dQᵀ over the scale, `[dp][W]`, added to.
    pub d_q: &'a mut [f32],
}

impl Body for PanelBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector, const MR: usize, const NR: usize>(mut self) {
        let Some(any) = Seen::of_panel(&self.seen[..MR]) else { return };
        for t in (0..any.start).chain(any.end..self.keys) {
            for j in 0..MR {
                V::splat(0.0).store(&mut self.p[t * self.stride + j * V::LANES..]);
                V::splat(0.0).store(&mut self.d_s[t * self.stride + j * V::LANES..]);
            }
        }
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
                for t in t..t + N {
                    V::splat(0.0).store(&mut self.p[t * self.stride + j * V::LANES..]);
                    V::splat(0.0).store(&mut self.d_s[t * self.stride + j * V::LANES..]);
                }
            }
        }
    }

    /// The same in `M` vectors from vector `first` on.
    #[inline(always)]
    fn weights_of<V: Vector, const MR: usize, const M: usize, const N: usize>(&mut self, first: usize, t: usize) {
        let (width, lanes) = (MR * V::LANES, first * V::LANES);
        let logits =
            chained::<V, _, M, N>(Lanes { data: &self.q[lanes..], stride: width }, self.k.over_channels().skip(t), self.d);
        let scale = V::splat(self.scale);
        for i in 0..N {
            for j in 0..M {
                let at = lanes + j * V::LANES;
                let lse = V::load(&self.lse[at..]);
                let less = logits[i][j].mul_add(scale, V::splat(0.0).sub(lse));
                let p = exp2(less.mul(V::splat(std::f32::consts::LOG2_E)));
                self.seen_of::<V, N>(p, first + j, t, i).store(&mut self.p[(t + i) * self.stride + at..]);
            }
        }
        let d_p =
            chained::<V, _, M, N>(Lanes { data: &self.d_o[lanes..], stride: width }, self.v.over_channels().skip(t), self.d);
        for i in 0..N {
            for j in 0..M {
                let at = lanes + j * V::LANES;
                let p = V::load(&self.p[(t + i) * self.stride + at..]);
                let d_s = p.mul(d_p[i][j].sub(V::load(&self.delta[at..])));
                // 0 times what a hidden key holds need not be 0.
                self.seen_of::<V, N>(d_s, first + j, t, i).store(&mut self.d_s[(t + i) * self.stride + at..]);
            }
        }
    }

    /// `x`, but 0 in the lanes of vector `j` that do not see key `t + i`, of the keys `t .. t + N`.
    #[inline(always)]
    fn seen_of<V: Vector, const N: usize>(&self, x: V, j: usize, t: usize, i: usize) -> V {
        let all = &self.seen[j].all;
        if all.start <= t && t + N <= all.end {
            return x;
        }
        let [from, until] = [V::load(&self.ranges[0][j * V::LANES..]), V::load(&self.ranges[1][j * V::LANES..])];
        x.select(V::splat((t + i) as f32).is_within(from, until), V::splat(0.0))
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
        let d_s = Lanes { data: &self.d_s[lanes..], stride: self.stride };
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
