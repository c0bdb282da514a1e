//! A panel of rows over one tile of keys: logits, softmax and P·V without leaving L1.
//!
//! ```text
//! Sᵀ[t][r] = Σ_c k[t][c]·Qᵀ[c][r]        P = exp((S − row_max)·unit)        Oᵀ[c][r] = Oᵀ[c][r]·before + Σ_t v[t][c]·Pᵀ[t][r]
//! ```
//!
//! A lane is a row everywhere, so maxima and sums of rows need no horizontal step, and keys and values no transposition. Factors are f32,
//! or pairs of bf16: of channels in the first product, of keys in the second.

use crate::pack::Rows;
use crate::product::{All, Factor, Lanes, Within, accumulate, load, store, zero};
use crate::softmax;
use crate::tile::{CHAIN, MAX_MR};
use crate::vector::{Body, Vector};
use crate::walk::Seen;
use bytemuck::cast_slice;
use fam_core::mutate;
use std::ops::Range;

/// See the file's head. Buffers are of one panel, `[..][W]`.
pub(super) struct PanelOverTile<'a, F> {
    /// Qᵀ, `[dp / TERMS][W]`, with the sign of the scale.
    pub q: &'a [F],
    /// Keys, and values in factors of keys, of `d` channels.
    pub k: Rows<'a, F>,
    pub v: Rows<'a, F>,
    pub d: usize,
    /// Whether all values are known to be finite.
    pub is_finite: bool,
    /// Places of the tile's keys: t counts from where factors of keys begin.
    pub keys: Range<usize>,
    /// |scale|.
    pub unit: f32,
    /// What each vector sees; and each row of a vector that does not see all: its first key, and the one after its last.
    pub seen: [Seen; MAX_MR],
    pub ranges: [&'a [f32]; 2],
    /// Sᵀ, then Pᵀ, `[BLOCK_N][W]`.
    pub s: &'a mut [f32],
    /// Oᵀ, `[dp][W]`.
    pub acc: &'a mut [f32],
    pub row_max: &'a mut [f32],
    pub row_sum: &'a mut [f32],
}

impl<F: Factor> Body for PanelOverTile<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector, const MR: usize, const NR: usize>(mut self) {
        let Some(any) = Seen::of_panel(&self.seen) else { return };
        let mut maxima = [V::splat(0.0); MR];
        for (j, max) in maxima.iter_mut().enumerate() {
            *max = V::load(&self.row_max[j * V::LANES..]);
        }
        let mut t = any.start;
        while t < any.end {
            if any.len() < NR {
                self.logits::<V, MR, 1>(t, &mut maxima);
                t += 1;
            } else {
                // The last keys again rather than fewer at once: a logit is the same however often it is computed.
                self.logits::<V, MR, NR>(t.min(any.end - NR), &mut maxima);
                t += NR;
            }
        }

        let mut before = [V::splat(1.0); MR];
        let (width, [row_max, row_sum]) = (MR * V::LANES, [&mut *self.row_max, &mut *self.row_sum]);
        if self.seen[..MR].iter().all(|s| s.any == any) {
            before = softmax::update::<V, F, MR>([row_max, row_sum], maxima, self.unit, self.s, width, any.clone());
        } else {
            for j in (0..MR).filter(|j| !self.seen[*j].any.is_empty()) {
                let (first, keys) = (j * V::LANES, self.seen[j].any.clone());
                let state = [&mut row_max[first..], &mut row_sum[first..]];
                [before[j]] = softmax::update::<V, F, 1>(state, [maxima[j]], self.unit, &mut self.s[first..], width, keys);
            }
        }

        if self.seen[..MR].iter().all(|s| *s == self.seen[0]) {
            let factors = self.seen[0].factors(F::TERMS, &self.keys);
            self.values::<V, MR, MR, NR>(0, before, &factors);
        } else if self.is_finite {
            // What a row does not see weighs 0, and 0 times a finite value is nothing.
            let factors = any.start / F::TERMS..any.end.div_ceil(F::TERMS);
            for j in 0..MR {
                let keys = &self.seen[j].any;
                let written = keys.start / F::TERMS..keys.end.div_ceil(F::TERMS);
                for i in factors.clone().filter(|i| !written.contains(i)) {
                    V::splat(0.0).store(&mut self.s[(i * MR + j) * V::LANES..]);
                }
            }
            self.values::<V, MR, MR, NR>(0, before, &(factors.clone(), factors));
        } else {
            for (j, before) in before.into_iter().enumerate() {
                let factors = self.seen[j].factors(F::TERMS, &self.keys);
                self.values::<V, MR, 1, NR>(j, [before], &factors);
            }
        }
    }
}

impl<F: Factor> PanelOverTile<'_, F> {
    /// Logits of the keys `t .. t + N` in all vectors that see any of them.
    #[inline(always)]
    fn logits<V: Vector, const MR: usize, const N: usize>(&mut self, t: usize, maxima: &mut [V; MR]) {
        let sees = |s: &Seen| s.any.start < t + N && t < s.any.end;
        if self.seen[..MR].iter().all(sees) {
            return self.logits_of::<V, MR, MR, N>(0, t, maxima);
        }
        for (j, max) in maxima.iter_mut().enumerate() {
            if sees(&self.seen[j]) {
                let mut one = [*max];
                self.logits_of::<V, MR, 1, N>(j, t, &mut one);
                [*max] = one;
            }
        }
    }

    /// Logits of the keys `t .. t + N` in `M` vectors from vector `first` on; −∞ where a row does not see the key.
    #[inline(always)]
    fn logits_of<V: Vector, const MR: usize, const M: usize, const N: usize>(
        &mut self,
        first: usize,
        t: usize,
        maxima: &mut [V; M],
    ) {
        let (width, lanes) = (MR * V::LANES, first * V::LANES);
        let (q, k) = (Lanes { data: &self.q[lanes..], stride: width }, self.k.over_channels().skip(t - self.keys.start));
        let (factors, step) = (self.d.div_ceil(F::TERMS), CHAIN / F::TERMS);
        for c in (0..factors).step_by(step) {
            let end = factors.min(c + step);
            let mut sum = zero::<V, M, N>();
            accumulate(q, k, c..end, &All, &mut sum);
            let s = &mut self.s[t * width + lanes..];
            if c > 0 {
                let before: [[V; M]; N] = load(s, width);
                for i in 0..N {
                    for j in 0..M {
                        sum[i][j] = before[i][j].add(sum[i][j]);
                    }
                }
            }
            if end == factors {
                for j in 0..M {
                    let all = &self.seen[first + j].all;
                    if all.start > t || t + N > all.end {
                        let begin = lanes + j * V::LANES;
                        let (from, until) = (V::load(&self.ranges[0][begin..]), V::load(&self.ranges[1][begin..]));
                        let hidden = V::splat(mutate!("attend-finite-sentinel", f32::NEG_INFINITY, -1e4));
                        for i in 0..N {
                            sum[i][j] = sum[i][j].select(V::splat((t + i) as f32).is_within(from, until), hidden);
                        }
                    }
                    for i in 0..N {
                        maxima[j] = maxima[j].max(sum[i][j]);
                    }
                }
            }
            store(&sum, s, width);
        }
    }

    /// Rescales the sums of `M` vectors from vector `first` on and adds the tile's over `factors`: the first ones, but of those that are not
    /// among the second each row's over the keys that it sees alone, since the value of another may be NaN.
    #[inline(always)]
    fn values<V: Vector, const MR: usize, const M: usize, const NR: usize>(
        &mut self,
        first: usize,
        before: [V; M],
        factors: &(Range<usize>, Range<usize>),
    ) {
        if factors.0.is_empty() {
            return;
        }
        let mut c = 0;
        while c + NR <= self.d {
            self.values_of::<V, MR, M, NR>(first, c, before, factors);
            c += NR;
        }
        while c < self.d {
            self.values_of::<V, MR, M, 1>(first, c, before, factors);
            c += 1;
        }
    }

    /// The same for channels `c .. c + N`.
    #[inline(always)]
    fn values_of<V: Vector, const MR: usize, const M: usize, const N: usize>(
        &mut self,
        first: usize,
        c: usize,
        before: [V; M],
        (some, whole): &(Range<usize>, Range<usize>),
    ) {
        let (width, lanes) = (MR * V::LANES, first * V::LANES);
        let p = Lanes { data: cast_slice(&self.s[lanes..]), stride: width };
        let v = self.v.over_rows().skip(c);
        // A tile's sums are a chain of their own: chains of 64 err less than one of all keys.
        let mut sum = zero::<V, M, N>();
        if whole == some {
            accumulate(p, v, whole.clone(), &All, &mut sum);
        } else {
            let mut within = Within { first: [V::splat(0.0); M], end: [V::splat(0.0); M] };
            for j in 0..M {
                within.first[j] = V::load(&self.ranges[0][lanes + j * V::LANES..]);
                within.end[j] = V::load(&self.ranges[1][lanes + j * V::LANES..]);
            }
            accumulate(p, v, some.start..whole.start, &within, &mut sum);
            accumulate(p, v, whole.clone(), &All, &mut sum);
            accumulate(p, v, whole.end..some.end, &within, &mut sum);
        }
        let acc = &mut self.acc[c * width + lanes..];
        let acc_before: [[V; M]; N] = load(acc, width);
        for i in 0..N {
            for j in 0..M {
                sum[i][j] = acc_before[i][j].mul_add(before[j], sum[i][j]);
            }
        }
        store(&sum, acc, width);
    }
}
