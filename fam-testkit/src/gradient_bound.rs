//! The bound that a gradient of `attend` is held to: derived from the problem, as [`crate::tolerance`] does for its outputs.
//!
//! A gradient is a sum of terms, each of which has an error of its own. Per query row and key t, with logit s_t and the lse that was handed
//! in, S_t = |scale| Σ_c |q_c k_tc|, X_t = d_o·v_t − d_o·o + d_lse and T_t the sum of the magnitudes that X_t is made of:
//!
//! ```text
//! p_t       = exp(s_t − lse)       relative error   e_t = expm1(u32·((D+4) S_t + 2|lse| + 3|s_t − lse| + 8))
//! d_logit_t = p_t X_t              error            p_t (e_t |X_t| + u32 (D+4) T_t + 2 u32 |X_t|)
//! sums      of n terms x           error            Σ errors + u32·(n + 4)·(Σ|x| + |old|) + u_out|result| + underflow
//! ```
//!
//! STAT takes √D for D and 4√n for n. Where f32 forms the logit exactly, S_t and |lse| count as at most 40. docs/math.md derives each.

pub(crate) mod infini;

use crate::check::Rule;
use crate::distribution::{exp2, largest};
use crate::rows::{CARRIED, is_exact};
use crate::tolerance::{Bound, Level, Tolerance, U32, lost_to_flush, tiny};
use fam_core::{Dtype, Result};
use fam_ref::{Array, Attend, AttendGradients, AttendUpstream, Attended, Row, Rows};

/// The least positive number of f32: twice what a rounding there loses.
pub(crate) const LEAST: f64 = 1.0 / (1u128 << 75) as f64 / (1u128 << 74) as f64;

/// A sum that an element is: how many terms, what they are made of, and how far they may be off together.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sum {
    pub terms: f64,
    /// Σ |terms|.
    pub magnitude: f64,
    /// The same of what the terms are made of, where those are differences: a bound as large as that judges nothing.
    pub made_of: f64,
    /// The largest Σ |terms| on the way, e.g. before a scale: beyond f32 nothing is known.
    pub peak: f64,
    /// Of the terms, not of adding them; not finite where a term is unspecified.
    pub error: f64,
}

impl Sum {
    /// One more term, of which numbers of magnitude `peak` may be formed on the way.
    pub fn add(&mut self, magnitude: f64, peak: f64, error: f64) {
        self.add_made_of(magnitude, magnitude, peak, error);
    }

    /// One more term that is a difference of what has magnitude `made_of`.
    pub fn add_made_of(&mut self, made_of: f64, magnitude: f64, peak: f64, error: f64) {
        self.terms += 1.0;
        self.magnitude += magnitude;
        self.made_of += made_of;
        self.peak += peak.max(magnitude);
        self.error += error;
    }

    /// The terms of another sum too.
    pub fn join(&mut self, other: &Sum) {
        self.terms += other.terms;
        self.magnitude += other.magnitude;
        self.made_of += other.made_of;
        self.peak += other.peak;
        self.error += other.error;
    }

    /// What an element of `dtype` is held to that holds `expected`, of which `old` was there before: one more term.
    pub fn rule(&self, level: Level, dtype: Dtype, old: f64, expected: f64) -> Rule {
        let magnitude = self.magnitude + old.abs();
        let roundings = match level {
            Level::Hard => self.terms + 4.0,
            Level::Stat => 4.0 * self.terms.sqrt() + 4.0,
        };
        let underflow = LEAST * self.terms + tiny(dtype);
        let bound = self.error + U32 * roundings * magnitude + dtype.unit_roundoff() * expected.abs() + underflow;
        let is_within = self.peak + old.abs() <= f64::from(f32::MAX) && expected.abs() + bound <= largest(dtype);
        if is_within { Rule::Near(Tolerance { bound, magnitude: self.made_of + old.abs() }) } else { Rule::Any }
    }
}

/// A gradient of the reference, with what each of its elements is held to. `[N, i, rows, heads, D]`.
#[derive(Clone, Debug)]
pub(crate) struct Gradient {
    pub value: Array<5>,
    sums: Vec<Sum>,
}

impl Gradient {
    pub fn zeros(shape: [usize; 5]) -> Self {
        Self::new(Array::zeros(shape))
    }

    pub fn new(value: Array<5>) -> Self {
        let sums = vec![Sum::default(); value.data.len()];
        Gradient { value, sums }
    }

    fn range(&self, [n, i, r, h]: [usize; 4]) -> std::ops::Range<usize> {
        let [_, blocks, rows, heads, d] = self.value.shape;
        let first = (((n * blocks + i) * rows + r) * heads + h) * d;
        first..first + d
    }

    pub fn sums(&self, at: [usize; 4]) -> &[Sum] {
        &self.sums[self.range(at)]
    }

    pub fn sums_mut(&mut self, at: [usize; 4]) -> &mut [Sum] {
        let range = self.range(at);
        &mut self.sums[range]
    }
}

/// All gradients of one call of `attend`, each where the problem has its tensor.
#[derive(Clone, Debug)]
pub(crate) struct AttendBounds {
    pub d_q: Option<Gradient>,
    pub d_mem_q: Option<Gradient>,
    pub d_keys: [Gradient; 2],
    pub d_mem: Option<[Gradient; 2]>,
    pub d_sink: Option<Gradient>,
}

/// Roundings of a dot product of `d` terms and of what surrounds it.
pub(crate) fn products(level: Level, d: usize) -> f64 {
    match level {
        Level::Hard => d as f64 + 4.0,
        Level::Stat => (d as f64).sqrt() + 4.0,
    }
}

/// Σ |a b|.
pub(crate) fn magnitude_of(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a * b).abs()).sum()
}

pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// An error, unless what it belongs to leaves f32.
pub(crate) fn within_f32(magnitude: f64, error: f64) -> f64 {
    if magnitude <= f64::from(f32::MAX) { error } else { f64::INFINITY }
}

/// The reference's gradients, with their bounds. `saved` is what the kernel is handed: rounded to its types.
///
/// # Errors
/// Those of [`fam_ref::attend_backward`].
pub(crate) fn attend(args: &Attend, saved: &Attended, upstream: &AttendUpstream, bound: &Bound<'_>) -> Result<AttendBounds> {
    let AttendGradients { d_q, d_mem_q, d_k, d_v, d_mem_k, d_mem_v, d_sink } = fam_ref::attend_backward(args, saved, upstream)?;
    let wide = |x: Array<4>| {
        let [n, rows, h, d] = x.shape;
        Gradient::new(Array { shape: [n, 1, rows, h, d], data: x.data })
    };
    let mut bounds = AttendBounds {
        d_q: d_q.map(wide),
        d_mem_q: d_mem_q.map(Gradient::new),
        d_keys: [d_k, d_v].map(wide),
        d_mem: d_mem_k.zip(d_mem_v).map(|(k, v)| [k, v].map(Gradient::new)),
        d_sink: d_sink.map(|data| Gradient::new(Array { shape: [1, 1, 1, data.len(), 1], data })),
    };
    let groups = [
        (false, args.block_rows(), &saved.rows, upstream.d_o, upstream.d_lse),
        (true, args.mem_rows(), &saved.mem_rows, upstream.d_mem_o, upstream.d_mem_lse),
    ];
    let mut queries: Vec<Query<'_>> = Vec::new();
    for (is_memory, rows, saved, d_o, d_lse) in groups {
        let (Some(saved), Some(d_o)) = (saved, d_o) else { continue };
        let rows = rows.into_iter().filter_map(|row| Query::new(args, is_memory, row, saved, d_o, d_lse));
        queries.extend(rows);
    }
    // What one row of a stream and kv head reads may reach all gradients of that stream and head.
    let reached: Vec<_> = queries.iter().filter(|row| !row.is_finite).map(Query::keys_of).collect();
    for mut row in queries {
        row.is_finite &= !reached.contains(&row.keys_of());
        bounds.row(args, &row, bound);
    }
    Ok(bounds)
}

/// One query row: what was read of it, and of the keys that it sees.
struct Query<'a> {
    is_memory: bool,
    at: [usize; 4],
    kv_head: usize,
    q: &'a [f64],
    o: &'a [f64],
    lse: f64,
    d_o: &'a [f64],
    d_lse: f64,
    /// Place, key and value of the memory's keys that it sees, and of the tokens'.
    memory: Vec<Seen<'a>>,
    tokens: Vec<Seen<'a>>,
    /// Whether all of these are finite.
    is_finite: bool,
}

type Seen<'a> = ([usize; 4], &'a [f64], &'a [f64]);

impl<'a> Query<'a> {
    fn new(
        args: &Attend<'a>,
        is_memory: bool,
        row: Row,
        saved: &'a Rows,
        d_o: &'a Array<5>,
        d_lse: Option<&'a Array<4>>,
    ) -> Option<Self> {
        let at @ [n, _, r, h] = row.at;
        let q = if is_memory { args.mem_q?.row(&at) } else { args.q?.row(&[n, r, h]) };
        let (memory, tokens) = args.key_places(&row);
        let memory = match (args.mem_k, args.mem_v) {
            (Some(k), Some(v)) => memory.map(|at| (at, k.row(&at), v.row(&at))).collect(),
            _ => Vec::new(),
        };
        let tokens = tokens.map(|at @ [n, t, h]| ([n, 0, t, h], args.k.row(&at), args.v.row(&at))).collect();
        let (o, lse, d_o) = (saved.o.row(&at), saved.lse[at], d_o.row(&at));
        let d_lse = d_lse.map_or(0.0, |d_lse| d_lse[at]);
        let mut query =
            Query { is_memory, at, kv_head: h / args.shape.group(), q, o, lse, d_o, d_lse, memory, tokens, is_finite: true };
        let sink = args.sink.map(|sink| sink[h]).filter(|sink| *sink != f64::NEG_INFINITY).unwrap_or(0.0);
        let of_keys = query.memory.iter().chain(&query.tokens).flat_map(|(_, k, v)| [*k, *v]);
        let mut all = [q, o, d_o].into_iter().chain(of_keys).flatten().chain([&lse, &d_lse, &sink]);
        query.is_finite = all.all(|x| x.is_finite());
        Some(query)
    }

    /// Stream and kv head.
    fn keys_of(&self) -> [usize; 2] {
        [self.at[0], self.kv_head]
    }
}

impl AttendBounds {
    /// Adds what one row contributes.
    fn row(&mut self, args: &Attend, row: &Query, bound: &Bound<'_>) {
        let products = products(bound.level, row.q.len());
        let d_out = magnitude_of(row.d_o, row.o);
        let delta = dot(row.d_o, row.o);
        let sink = args.sink.map(|sink| sink[row.at[3]]);
        if let (Some(d_sink), Some(sink)) = (&mut self.d_sink, sink) {
            let [sum] = d_sink.sums_mut([0, 0, 0, row.at[3]]) else { return };
            let total = d_out + row.d_lse.abs();
            let (p, error) = if sink == f64::NEG_INFINITY {
                (0.0, 0.0)
            } else {
                let exponent = 2.0 * sink.abs().min(CARRIED) + 2.0 * row.lse.abs().min(CARRIED) + 3.0 * (sink - row.lse).abs();
                let p = (sink - row.lse).exp();
                (p, p * (U32 * (exponent + 8.0)).exp_m1() + LEAST)
            };
            let error = within_f32(total, (p + error) * U32 * products * total + error * total + LEAST * products);
            sum.add(p * total, total, if row.is_finite { error } else { f64::INFINITY });
        }
        let d_q = if row.is_memory { &mut self.d_mem_q } else { &mut self.d_q };
        let Some(d_q) = d_q.as_mut().map(|d_q| d_q.sums_mut(row.at)) else { return };
        let [d_k, d_v] = &mut self.d_keys;
        for (at, k, v) in &row.tokens {
            let pair = Pair::new(args, row, k, v, delta, d_out, products, bound);
            pair.pass(row, k, d_k.sums_mut(*at), d_v.sums_mut(*at), d_q);
        }
        if let Some([d_k, d_v]) = &mut self.d_mem {
            for (at, k, v) in &row.memory {
                let pair = Pair::new(args, row, k, v, delta, d_out, products, bound);
                pair.pass(row, k, d_k.sums_mut(*at), d_v.sums_mut(*at), d_q);
            }
        }
    }
}

/// A query row and a key: p and the logit's gradient, with the bounds of their errors.
struct Pair {
    scale: f64,
    p: f64,
    p_error: f64,
    d_logit: f64,
    d_logit_error: f64,
    /// p T.
    made_of: f64,
    /// What is below it may count as 0: the least normal number of f32 where products of 16 bits take subnormal numbers for 0, else 0.
    flushed: f64,
}

impl Pair {
    #[allow(clippy::too_many_arguments)] // What a row's keys share is computed once.
    fn new(args: &Attend, row: &Query, k: &[f64], v: &[f64], delta: f64, d_out: f64, products: f64, bound: &Bound<'_>) -> Self {
        let scale = f64::from(args.shape.scale());
        let dots = magnitude_of(row.q, k);
        let s_abs = scale.abs() * dots;
        let difference = scale * dot(row.q, k) - row.lse;
        let (mut s, mut lse) = (s_abs, row.lse.abs());
        if s > CARRIED && is_exact(row.q, k, scale) {
            (s, lse) = (CARRIED, lse.min(CARRIED));
        }
        let exponent = products * s + 2.0 * lse + 3.0 * difference.abs() + 8.0;
        let flushed = if bound.flushes && bound.p16_backward.is_some() { f64::from(f32::MIN_POSITIVE) } else { 0.0 };
        let lost = |a: &[f64], b: &[f64], scale| if flushed > 0.0 { lost_to_flush(a, b, scale) } else { 0.0 };
        // So far below 0 exp is 0 in f32, however its argument was rounded: p is lost whole, and no more than that.
        let is_nothing = difference + U32 * exponent < -110.0;
        let p = difference.exp();
        let p_error = if is_nothing { 2.0 * p } else { p * (U32 * exponent + lost(row.q, k, scale)).exp_m1() + LEAST };
        let p_error = within_f32(dots.max(s_abs), p_error);
        let x = dot(row.d_o, v) - delta + row.d_lse;
        let total = magnitude_of(row.d_o, v) + d_out + row.d_lse.abs();
        let x_error = within_f32(total, U32 * products * total + LEAST * products + lost(row.d_o, v, 1.0));
        let d_logit = p * x;
        // 0 times what is beyond f32 is no number.
        let through = if x_error.is_finite() { (p + p_error) * x_error } else { f64::INFINITY };
        let least = if is_nothing { 0.0 } else { LEAST };
        let d_logit_error = through + p_error * x.abs() + 2.0 * U32 * d_logit.abs() + least;
        let mut pair = Pair { scale, p, p_error, d_logit, d_logit_error, made_of: p * total, flushed };
        // P16, and dS16: both are rounded to 16 bits before they meet a matrix, and so is a d_o of f32, for d_o·v and for d_v alike.
        if let Some(p16) = bound.p16_backward {
            let rounded = |x: f64| 1.01 * p16.unit_roundoff() * x.abs() + tiny(p16).max(flushed);
            if bound.out_dtype == Dtype::F32 {
                pair.p_error += rounded(p);
                pair.d_logit_error +=
                    p * (rounded(magnitude_of(row.d_o, v)) + tiny(p16) * v.iter().map(|v| v.abs()).sum::<f64>());
            }
            pair.p_error += rounded(p);
            pair.d_logit_error += if d_logit.abs() > largest(p16) / 2.0 { f64::INFINITY } else { rounded(d_logit) };
        }
        if !row.is_finite {
            (pair.p_error, pair.d_logit_error) = (f64::INFINITY, f64::INFINITY);
        }
        pair
    }

    /// What the pair adds to the gradients of its key, its value and its query.
    fn pass(&self, row: &Query, k: &[f64], d_k: &mut [Sum], d_v: &mut [Sum], d_q: &mut [Sum]) {
        let Pair { scale, p, p_error, d_logit, d_logit_error, made_of, flushed } = *self;
        let (scale, most) = (scale.abs(), scale.abs().max(1.0));
        // An error times 0 is nothing, unless it is no number.
        let times = |error: f64, x: f64| if error.is_finite() { error * x.abs() } else { f64::INFINITY };
        // A term whose other factor counts as 0, and what its sum loses behind it.
        let lost = |term: f64, x: f64| if x.abs() < flushed { term + flushed } else { flushed };
        let through = |sum: &mut Sum, x: f64| {
            let term = (d_logit * x).abs();
            let error = scale * times(d_logit_error, x)
                + if p > exp2(-150) { LEAST * most * (1.0 + x.abs()) } else { 0.0 }
                + scale * lost(term, x);
            // Rounding may leave of a difference more than there is.
            let peak = most * (term + times(d_logit_error, x));
            sum.add_made_of(scale * made_of * x.abs(), scale * term, peak, error);
        };
        for (c, &d_o) in row.d_o.iter().enumerate() {
            d_v[c].add(p * d_o.abs(), 0.0, times(p_error, d_o) + lost(p * d_o.abs(), d_o));
            through(&mut d_k[c], row.q[c]);
            through(&mut d_q[c], k[c]);
        }
    }
}
