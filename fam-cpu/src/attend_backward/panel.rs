//! A panel of rows over one tile of keys, backward; see [`super`].

use crate::pack::{Form, Rows};
use crate::product::{All, Lanes, Within, accumulate, chained, load, zero};
use crate::tile::MAX_MR;
use crate::vector::{Body, Vector, exp2};
use crate::walk::Seen;
use bytemuck::cast_slice;
use fam_core::mutate;
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
    /// Whether the keys are known to be finite: then a dS of 0 hides them.
    pub is_finite: bool,
    pub d: usize,
    pub scale: f32,
    /// −lse and δ of each row; −∞ for a row that passes nothing on.
    pub less: &'a [f32],
    pub delta: &'a [f32],
    /// What each vector sees; and each row of a vector that does not see all: its first key, and the one after its last.
    pub seen: &'a [Seen; MAX_MR],
    pub ranges: [&'a [f32]; 2],
    /// Pᵀ, then dSᵀ, `[BLOCK_N][W]`.
    pub s: &'a mut [f32],
    /// Pᵀ and dSᵀ of all rows in factors of rows, `[keys][stride]`, from the panel's first row on. Those of keys that a row does not see
    /// become 0.
    pub p: &'a mut [F],
    pub d_s: &'a mut [F],
    pub stride: usize,
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
        let keys = 0..self.keys;
        let of_all = if self.seen[..MR].iter().all(|s| *s == self.seen[0]) {
            Some(self.seen[0].factors(F::TERMS, &keys))
        } else {
            // All vectors have a dS for each key of `any`: 0 where it is hidden.
            let factors = any.start / F::TERMS..any.end.div_ceil(F::TERMS);
            self.is_finite.then(|| (factors.clone(), factors))
        };
        match of_all {
            Some(factors) => self.queries::<V, MR, MR, NR>(0, &factors),
            None => (0..MR).for_each(|j| self.queries::<V, MR, 1, NR>(j, &self.seen[j].factors(F::TERMS, &keys))),
        }
    }
}

impl<F: Form> PanelBackward<'_, F> {
    /// P and dS of a key that vector `j` does not see.
    #[inline(always)]
    fn hide<V: Vector>(&mut self, t: usize, j: usize) {
        let at = t * self.stride + j * V::LANES / F::TERMS;
        F::put(V::splat(0.0), &mut self.p[at..]);
        F::put(V::splat(0.0), &mut self.d_s[at..]);
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
                    let key = i * F::TERMS + n;
                    if mutate!("backward-pair-lost", any.contains(&key), any.start <= key && key + n < any.end) {
                        terms[n] = V::load(&self.s[key * width + lane..]);
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
        // 0 times what a hidden key holds need not be 0.
        let within = self.within::<V, M>(first);
        let mut sees_all = [true; M];
        for j in 0..M {
            let all = &self.seen[first + j].all;
            sees_all[j] = all.start <= t && t + N <= all.end;
        }
        let less = load::<V, M, 1>(&self.less[lanes..], 0)[0];
        let delta = load::<V, M, 1>(&self.delta[lanes..], 0)[0];
        for i in 0..N {
            let s = &mut self.s[(t + i) * width..][..width];
            let to = &mut self.p[(t + i) * self.stride..][..width / F::TERMS];
            for j in 0..M {
                let p = exp2(logits[i][j].mul_add(scale, less[j]).mul(V::splat(std::f32::consts::LOG2_E)));
                let p = if sees_all[j] { p } else { within.or_0(p, t + i, j) };
                p.store(&mut s[lanes + j * V::LANES..]);
                F::put(p, &mut to[(lanes + j * V::LANES) / F::TERMS..]);
            }
        }
        let d_o = Lanes { data: &self.d_o[lanes..], stride: width };
        let d_p = chained::<V, F, M, N>(d_o, self.v.over_channels().skip(t), factors);
        for i in 0..N {
            let s = &mut self.s[(t + i) * width..][..width];
            let to = &mut self.d_s[(t + i) * self.stride..][..width / F::TERMS];
            for j in 0..M {
                let s = &mut s[lanes + j * V::LANES..];
                let d_s = V::load(s).mul(d_p[i][j].sub(delta[j]));
                let d_s = if sees_all[j] { d_s } else { within.or_0(d_s, t + i, j) };
                d_s.store(s);
                F::put(d_s, &mut to[(lanes + j * V::LANES) / F::TERMS..]);
            }
        }
    }

    /// The keys that the lanes of `M` vectors from vector `first` on see, unless a vector sees all.
    #[inline(always)]
    fn within<V: Vector, const M: usize>(&self, first: usize) -> Within<V, M> {
        let of = |ranges: &[f32]| load::<V, M, 1>(&ranges[first * V::LANES..], 0)[0];
        Within { first: of(self.ranges[0]), end: of(self.ranges[1]) }
    }

    /// Adds the tile's part of dQᵀ in `M` vectors from vector `first` on, over `factors`: the first ones, but of those that are not among the
    /// second each row's over the keys that it sees alone.
    #[inline(always)]
    fn queries<V: Vector, const MR: usize, const M: usize, const NR: usize>(
        &mut self,
        first: usize,
        factors: &(Range<usize>, Range<usize>),
    ) {
        if factors.0.is_empty() {
            return;
        }
        let whole = self.d / NR * NR;
        for c in (0..whole).step_by(NR) {
            self.queries_of::<V, MR, M, NR>(first, c, factors);
        }
        for c in whole..self.d {
            self.queries_of::<V, MR, M, 1>(first, c, factors);
        }
    }

    /// The same for channels `c .. c + N`.
    #[inline(always)]
    fn queries_of<V: Vector, const MR: usize, const M: usize, const N: usize>(
        &mut self,
        first: usize,
        c: usize,
        (some, whole): &(Range<usize>, Range<usize>),
    ) {
        let (width, lanes) = (MR * V::LANES, first * V::LANES);
        let d_s = Lanes { data: cast_slice(&self.s[lanes..]), stride: width };
        let k = self.k_of_keys.over_rows().skip(c);
        let mut sum = zero::<V, M, N>();
        if whole == some {
            accumulate(d_s, k, whole.clone(), &All, &mut sum);
        } else {
            let within = self.within::<V, M>(first);
            accumulate(d_s, k, some.start..whole.start, &within, &mut sum);
            accumulate(d_s, k, whole.clone(), &All, &mut sum);
            accumulate(d_s, k, whole.end..some.end, &within, &mut sum);
        }
        for i in 0..N {
            let d_q = &mut self.d_q[(c + i) * width..][..width];
            for j in 0..M {
                let to = &mut d_q[lanes + j * V::LANES..];
                V::load(to).add(sum[i][j]).store(to);
            }
        }
    }
}
