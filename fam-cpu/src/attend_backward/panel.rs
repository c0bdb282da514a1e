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
    /// dSᵀ in factors of keys, `[BLOCK_N / TERMS][W]`.
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
        // From whole factors on, and up to whole ones where the tile has their last terms: those weigh 0.
        let first = any.start / F::TERMS * F::TERMS;
        let end = any.end.next_multiple_of(F::TERMS).min(self.keys);
        let whole = end / F::TERMS * F::TERMS;
        let mut t = first;
        while t < whole {
            if whole - first >= NR {
                // The last keys again rather than fewer at once: the same numbers, in the same places.
                self.weights::<V, MR, NR>(t.min(whole - NR));
                t += NR;
            } else if F::TERMS == 2 {
                self.weights::<V, MR, 2>(t);
                t += 2;
            } else {
                self.weights::<V, MR, 1>(t);
                t += 1;
            }
        }
        if whole < end {
            self.weights::<V, MR, 1>(whole);
        }

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
                (t..t + N).for_each(|t| self.hide::<V>(t, j));
                for i in t / F::TERMS..(t + N).div_ceil(F::TERMS) {
                    V::splat(0.0).store(&mut self.s[i * MR * V::LANES + j * V::LANES..]);
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
        let mut p = logits;
        for i in 0..N {
            let to = &mut self.p[(t + i) * self.stride..][..width / F::TERMS];
            for j in 0..M {
                // 2¹²⁸ is ∞: of an lse that is not that of these keys, as the formula has it.
                let exponent = logits[i][j].mul_add(scale, less[j]).mul(V::splat(std::f32::consts::LOG2_E)).min(V::splat(128.0));
                let of_key = exp2(exponent);
                p[i][j] = if sees_all[j] { of_key } else { within.or_0(of_key, t + i, j) };
                F::put(p[i][j], &mut to[(lanes + j * V::LANES) / F::TERMS..]);
            }
        }
        let d_o = Lanes { data: &self.d_o[lanes..], stride: width };
        let d_p = chained::<V, F, M, N>(d_o, self.v.over_channels().skip(t), factors);
        for factor in 0..N.div_ceil(F::TERMS) {
            for j in 0..M {
                let mut terms = [V::splat(0.0); 2];
                for n in 0..F::TERMS {
                    let i = factor * F::TERMS + n;
                    if mutate!("backward-pair-lost", i < N, i + n < N) {
                        let d_s = p[i][j].mul(d_p[i][j].sub(delta[j]));
                        terms[n] = if sees_all[j] { d_s } else { within.or_0(d_s, t + i, j) };
                        F::put(terms[n], &mut self.d_s[(t + i) * self.stride + (lanes + j * V::LANES) / F::TERMS..]);
                    }
                }
                F::join(terms).store(&mut self.s[(t / F::TERMS + factor) * width + lanes + j * V::LANES..]);
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
