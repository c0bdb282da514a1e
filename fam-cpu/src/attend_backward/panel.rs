//! A panel of rows over one tile of keys, backward; see [`super`].

use crate::pack::{Form, Rows};
use crate::product::{All, Lanes, Within, accumulate, chained, zero};
use crate::tile::MAX_MR;
use crate::vector::{Body, Vector, exp2};
use crate::walk::Seen;
use bytemuck::cast_slice;
use std::ops::Range;

/// P and dS of a panel, and what it adds to dQ. Buffers are `[..][W]` where nothing else is said.
pub(super) struct PanelBackward<'a, F> {
    /// Qᵀ and dOᵀ, `[dp / TERMS][W]`.
    pub q: &'a [F],
    pub d_o: &'a [F],
    /// Keys and values, of `d` channels; and keys in factors of keys.
    pub k: Rows<'a, F>,
    pub v: Rows<'a, F>,
    pub k_of_keys: Rows<'a, F>,
    pub d: usize,
    pub scale: f32,
    /// One for each row; +∞ for a row that passes nothing on.
    pub lse: &'a [f32],
    pub delta: &'a [f32],
    /// What each vector sees; and each row of a vector that does not see all: its first key, and the one after its last.
    pub seen: &'a [Seen; MAX_MR],
    pub ranges: [&'a [f32]; 2],
    /// Pᵀ, then dSᵀ, `[BLOCK_N][W]`.
    pub s: &'a mut [f32],
    /// Pᵀ and dSᵀ of all rows in factors of rows, `[keys][stride]` terms each, of which the panel's first row is `first`. Those of keys that a
    /// row does not see become 0.
    pub p: &'a mut [f32],
    pub d_s: &'a mut [f32],
    pub stride: usize,
    pub first: usize,
    pub keys: usize,
    /// dQᵀ over the scale, `[dp][W]`, added to.
    pub d_q: &'a mut [f32],
}

impl<F: Form> Body for PanelBackward<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector, const MR: usize, const NR: usize>(mut self) {
        let Some(any) = Seen::of_panel(&self.seen[..MR]) else { return };
        for t in (0..any.start).chain(any.end..self.keys) {
            (0..MR).for_each(|j| self.hide::<V>(t, j));
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

        self.join::<V, MR>(&any);
        let seen = &self.seen[..MR];
        if seen.iter().all(|s| *s == seen[0] && s.any == s.all) {
            self.queries::<V, MR, MR, NR>(0);
        } else {
            (0..MR).for_each(|j| self.queries::<V, MR, 1, NR>(j));
        }
    }
}

impl<F: Form> PanelBackward<'_, F> {
    /// P and dS of a key that vector `j` does not see.
    #[inline(always)]
    fn hide<V: Vector>(&mut self, t: usize, j: usize) {
        let at = t * self.stride + self.first + j * V::LANES;
        F::put(V::splat(0.0), self.p, at);
        F::put(V::splat(0.0), self.d_s, at);
    }

    /// dS of the panel in factors of keys, in the places of their first keys.
    #[inline(always)]
    fn join<V: Vector, const MR: usize>(&mut self, any: &Range<usize>) {
        if F::TERMS == 1 {
            return;
        }
        let width = MR * V::LANES;
        for i in any.start / F::TERMS..any.end.div_ceil(F::TERMS) {
            for lane in (0..width).step_by(V::LANES) {
                let mut terms = [V::splat(0.0); 2];
                for n in 0..F::TERMS {
                    if any.contains(&(i * F::TERMS + n)) {
                        terms[n] = V::load(&self.s[(i * F::TERMS + n) * width + lane..]);
                    }
                }
                F::join(terms).store(&mut self.s[i * width + lane..]);
            }
        }
    }

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
                    self.hide::<V>(t, j);
                    V::splat(0.0).store(&mut self.s[t * MR * V::LANES + j * V::LANES..]);
                }
            }
        }
    }

    /// The same in `M` vectors from vector `first` on.
    #[inline(always)]
    fn weights_of<V: Vector, const MR: usize, const M: usize, const N: usize>(&mut self, first: usize, t: usize) {
        let (width, lanes, factors) = (MR * V::LANES, first * V::LANES, self.d.div_ceil(F::TERMS));
        let q = Lanes { data: &self.q[lanes..], stride: width };
        let logits = chained::<V, F, M, N>(q, self.k.over_channels().skip(t), factors);
        let scale = V::splat(self.scale);
        for i in 0..N {
            for j in 0..M {
                let at = lanes + j * V::LANES;
                let lse = V::load(&self.lse[at..]);
                let less = logits[i][j].mul_add(scale, V::splat(0.0).sub(lse));
                let p = exp2(less.mul(V::splat(std::f32::consts::LOG2_E)));
                let p = self.seen_of::<V, N>(p, first + j, t, i);
                p.store(&mut self.s[(t + i) * width + at..]);
                F::put(p, self.p, (t + i) * self.stride + self.first + at);
            }
        }
        let d_o = Lanes { data: &self.d_o[lanes..], stride: width };
        let d_p = chained::<V, F, M, N>(d_o, self.v.over_channels().skip(t), factors);
        for i in 0..N {
            for j in 0..M {
                let at = lanes + j * V::LANES;
                let p = V::load(&self.s[(t + i) * width + at..]);
                let d_s = p.mul(d_p[i][j].sub(V::load(&self.delta[at..])));
                // 0 times what a hidden key holds need not be 0.
                let d_s = self.seen_of::<V, N>(d_s, first + j, t, i);
                d_s.store(&mut self.s[(t + i) * width + at..]);
                F::put(d_s, self.d_s, (t + i) * self.stride + self.first + at);
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
        let d_s = Lanes { data: cast_slice(&self.s[lanes..]), stride: width };
        let k = self.k_of_keys.over_rows().skip(c);
        let mut sum = zero::<V, M, N>();
        let (some, whole) = self.seen[first].factors(F::TERMS, &(0..self.keys));
        if whole == some {
            accumulate(d_s, k, whole, &All, &mut sum);
        } else {
            let mut within = Within { first: [V::splat(0.0); M], end: [V::splat(0.0); M] };
            for j in 0..M {
                within.first[j] = V::load(&self.ranges[0][lanes + j * V::LANES..]);
                within.end[j] = V::load(&self.ranges[1][lanes + j * V::LANES..]);
            }
            accumulate(d_s, k, some.start..whole.start, &within, &mut sum);
            accumulate(d_s, k, whole.clone(), &All, &mut sum);
            accumulate(d_s, k, whole.end..some.end, &within, &mut sum);
        }
        for i in 0..N {
            for j in 0..M {
                let to = &mut self.d_q[(c + i) * width + lanes + j * V::LANES..];
                V::load(to).add(sum[i][j]).store(to);
            }
        }
    }
}
