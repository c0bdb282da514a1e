//! Rows of attention, and what each of them is held to: one way for generated cases and for files.

use crate::check::Rule;
use crate::finite::{Finite, magnitude};
use crate::tolerance::{Bound, Condition, Limits, NanReach, Tolerance, lost_to_flush, tiles};
use fam_core::{Result, Shape, Span};
use fam_ref::{Array, Attended};
use std::ops::Range;

/// S of a row whose logits are exact in f32: the largest distance from the maximum that still carries weight.
pub(crate) const CARRIED: f64 = 40.0;

/// Rows, and keys, of the largest tiles in use: how far a tile may reach where a kernel does not say.
pub(crate) const LARGEST_TILE: usize = 128;

/// The inputs of `attend`. Row 0 of a stream's keys is that of its span's origin.
#[derive(Debug)]
pub(crate) struct Inputs {
    pub shape: Shape,
    pub spans: Vec<Span>,
    pub q: Option<Array<4>>,
    pub mem_q: Option<Array<5>>,
    pub k: Array<4>,
    pub v: Array<4>,
    pub mem: Option<[Array<5>; 2]>,
    pub sink: Option<Vec<f64>>,
}

/// A problem, the reference's answer, and what the bounds of an answer are derived from.
#[derive(Debug)]
pub(crate) struct Problem {
    inputs: Inputs,
    attended: Attended,
    /// Of each stream and kv head.
    seen: Vec<Vec<Seen>>,
}

/// The keys and values of one stream and kv head.
#[derive(Clone, Debug)]
struct Seen {
    finite: Finite,
    /// Positions and blocks of the call whose key or value, or memory, is not finite.
    positions: Vec<u64>,
    blocks: Vec<usize>,
}

impl Problem {
    /// Computes the answer in f64.
    ///
    /// # Errors
    /// Where tensors do not fit each other.
    pub fn new(inputs: Inputs) -> Result<Self> {
        let attended = fam_ref::attend(&inputs.args())?;
        let streams = inputs.spans.iter().enumerate();
        let seen = streams.map(|(n, span)| (0..inputs.shape.kv_heads()).map(|h| inputs.seen(n, span, h)).collect()).collect();
        Ok(Problem { inputs, attended, seen })
    }

    /// The reference's block rows or memory rows.
    pub fn rows(&self, is_memory: bool) -> Option<&fam_ref::Rows> {
        if is_memory { self.attended.mem_rows.as_ref() } else { self.attended.rows.as_ref() }
    }

    /// Every row of the call, `[n, i, r, h]`.
    pub fn indices(&self, is_memory: bool) -> impl Iterator<Item = [usize; 4]> {
        let Inputs { shape, spans, .. } = &self.inputs;
        let per_stream = move |n: usize| {
            let (blocks, rows) =
                if is_memory { (spans[n].blocks(shape.block_len()), shape.mem_len()) } else { (1, spans[n].len as usize) };
            (0..blocks).flat_map(move |i| (0..rows).flat_map(move |r| (0..shape.heads()).map(move |h| [n, i, r, h])))
        };
        (0..spans.len()).flat_map(per_stream)
    }

    /// What a row of `rows` is held to, from a kernel of these limits.
    pub fn row<'a>(&self, is_memory: bool, rows: &'a fam_ref::Rows, at: [usize; 4], limits: &Limits) -> Row<'a> {
        let Inputs { shape, spans, sink, .. } = &self.inputs;
        let [n, i, r, h] = at;
        let (span, seen) = (&spans[n], &self.seen[n][h / shape.group()]);
        let position = span.start + r as u64;
        let keys =
            if is_memory { span.block_keys(i, shape.block_len()) } else { span.window_first(position, shape)..position + 1 };
        // −∞ is no sink.
        let sink = sink.as_ref().map(|sinks| sinks[h]).filter(|sink| *sink > f64::NEG_INFINITY);
        let (o, a, lse) = (rows.o.row(&at), rows.a.row(&at), rows.lse[at]);
        let block = if is_memory { i } else { (shape.block(position) - shape.block(span.start)) as usize };
        let (s, is_beyond_f32) = self.logits(is_memory, rows.s[at], at, block, keys.clone());
        let rows_of_block = if is_memory {
            shape.mem_len()
        } else {
            let own = span.block_keys(block, shape.block_len());
            (own.end - own.start.max(span.start)) as usize
        };
        let is_few = limits.is_few(shape, is_memory, rows_of_block);
        let flushes = !is_few && limits.flushes.contains(&shape.dtype());
        let v_max = rows.v_max[at];
        let hides_all = rows.s[at].is_infinite() && a.iter().all(|a| *a == 0.0) && sink == Some(lse);
        // A query, a key or a value that is not finite, or a logit.
        let sees_others = !rows.s[at].is_finite() || o.iter().any(|o| !o.is_finite());
        let class = if is_beyond_f32 || (limits.nan == NanReach::Unspecified && sees_others) {
            Class::Unspecified
        } else if lse == f64::NEG_INFINITY || rows.n[at] == 0.0 || hides_all {
            Class::Empty
        } else if rows.n[at] == 1.0 && sink.is_none() && lse.is_finite() {
            Class::Copy
        } else {
            Class::Mean
        };
        let condition = Condition {
            o: 0.0,
            a: 0.0,
            s,
            // A sink that carries no weight does nothing but that: exp of a distance beyond CARRIED, however rounded, is next to none.
            sink: sink.filter(|sink| *sink > lse - CARRIED).unwrap_or(0.0).abs(),
            n: rows.n[at],
            tiles: tiles(keys.clone(), shape.block_len(), span.mem_rows as usize, limits.key_tile),
            d: shape.head_dim() as f64,
            v_max: if v_max.is_finite() { v_max } else { seen.finite.v_max },
            flushed: if flushes { self.flushed(is_memory, at, block, keys.clone()) } else { 0.0 },
        };
        let may_be_nan = limits.nan != NanReach::Rows && self.loads_others(is_memory, at, limits);
        let sums_leave_f32 = condition.n * condition.v_max > f64::from(f32::MAX) && {
            let mut sums = vec![0.0; o.len()];
            let values = self.inputs.visible(Of::Values, n, block, keys.clone(), h / shape.group());
            values.for_each(|v| sums.iter_mut().zip(v).for_each(|(sum, v)| *sum += magnitude(*v)));
            sums.iter().any(|sum| *sum > f64::from(f32::MAX))
        };
        Row { index: at, o, a, lse, condition, class, is_few, sums_leave_f32, may_be_nan }
    }

    /// S as the bound takes it, and whether a logit may leave f32.
    fn logits(&self, is_memory: bool, s: f64, at: [usize; 4], block: usize, keys: Range<u64>) -> (f64, bool) {
        let (q, scale) = (self.inputs.query(is_memory, at), f64::from(self.inputs.shape.scale()));
        let (n, kv_head) = (at[0], at[3] / self.inputs.shape.group());
        if !s.is_finite() {
            return (self.seen[n][kv_head].finite.s(q, scale), false);
        }
        // Σ_c |q_c k_c|, before the scale: it is formed in f32 too.
        let dot = if scale == 0.0 { 0.0 } else { s / scale.abs() };
        if dot.max(s) > f64::from(f32::MAX) {
            return (s, true);
        }
        let is_exact = s > CARRIED && self.inputs.visible(Of::Keys, n, block, keys, kv_head).all(|k| is_exact(q, k, scale));
        (if is_exact { CARRIED } else { s }, false)
    }

    /// What any logit of a row may lose where products take subnormal numbers for 0.
    fn flushed(&self, is_memory: bool, at: [usize; 4], block: usize, keys: Range<u64>) -> f64 {
        let (q, kv_head) = (self.inputs.query(is_memory, at), at[3] / self.inputs.shape.group());
        let keys = self.inputs.visible(Of::Keys, at[0], block, keys, kv_head);
        keys.map(|k| lost_to_flush(q, k, self.inputs.shape.scale().into())).fold(0.0, f64::max)
    }

    /// Whether the tiles of a row may load a key or value that is not finite: one near what the row, or a row near it, sees.
    fn loads_others(&self, is_memory: bool, [n, i, r, h]: [usize; 4], limits: &Limits) -> bool {
        let Inputs { shape, spans, .. } = &self.inputs;
        let (span, seen) = (&spans[n], &self.seen[n][h / shape.group()]);
        if !seen.finite.has_others {
            return false;
        }
        let (keys, blocks) = if is_memory {
            (span.block_keys(i, shape.block_len()), i..i + 1)
        } else {
            let rows = near(span, r);
            let block = |position| (shape.block(position) - shape.block(span.start)) as usize;
            (span.window_first(rows.start, shape)..rows.end, block(rows.start)..block(rows.end - 1) + 1)
        };
        let tile = if limits.is_tile_stated() { limits.key_tile } else { LARGEST_TILE } as u64;
        let keys = keys.start.saturating_sub(tile - 1)..keys.end + (tile - 1);
        seen.positions.iter().any(|p| keys.contains(p)) || seen.blocks.iter().any(|b| blocks.contains(b))
    }
}

/// What a key is made of.
#[derive(Clone, Copy)]
enum Of {
    Keys,
    Values,
}

/// Positions of the call that may share a tile of rows with row `r`.
pub(crate) fn near(span: &Span, r: usize) -> Range<u64> {
    let position = span.start + r as u64;
    let reach = LARGEST_TILE as u64 - 1;
    position.saturating_sub(reach).max(span.start)..(position + reach + 1).min(span.end())
}

impl Inputs {
    /// As the reference takes them.
    pub fn args(&self) -> fam_ref::Attend<'_> {
        let [mem_k, mem_v] = self.mem.as_ref().map_or([None; 2], |[k, v]| [Some(k), Some(v)]);
        fam_ref::Attend {
            shape: &self.shape,
            spans: &self.spans,
            q: self.q.as_ref(),
            mem_q: self.mem_q.as_ref(),
            k: &self.k,
            v: &self.v,
            mem_k,
            mem_v,
            sink: self.sink.as_deref(),
        }
    }

    /// The query of row `[n, i, r, h]`.
    fn query(&self, is_memory: bool, [n, i, r, h]: [usize; 4]) -> &[f64] {
        let q = if is_memory {
            self.mem_q.as_ref().map(|q| q.row(&[n, i, r, h]))
        } else {
            self.q.as_ref().map(|q| q.row(&[n, r, h]))
        };
        q.unwrap_or_default()
    }

    /// What is finite among the keys and values of one stream and kv head, and where the rest is.
    fn seen(&self, n: usize, span: &Span, h: usize) -> Seen {
        let mut seen = Seen { finite: Finite::new(self.shape.head_dim()), positions: Vec::new(), blocks: Vec::new() };
        let is_finite = |row: &[f64]| row.iter().all(|x| x.is_finite());
        let rows = if span.len == 0 { 0 } else { (span.end() - span.origin) as usize };
        for t in 0..rows {
            let (k, v) = (self.k.row(&[n, t, h]), self.v.row(&[n, t, h]));
            seen.finite.key(k);
            seen.finite.value(v);
            if !is_finite(k) || !is_finite(v) {
                seen.positions.push(span.origin + t as u64);
            }
        }
        let Some([k, v]) = &self.mem else { return seen };
        let blocks = span.blocks(self.shape.block_len());
        for (i, f) in (0..blocks).flat_map(|i| (0..span.mem_rows as usize).map(move |f| (i, f))) {
            let (k, v) = (k.row(&[n, i, f, h]), v.row(&[n, i, f, h]));
            seen.finite.key(k);
            seen.finite.value(v);
            if !is_finite(k) || !is_finite(v) {
                seen.blocks.push(i);
            }
        }
        seen
    }

    /// The keys, or the values, that a row of the call's `block` sees.
    fn visible(&self, of: Of, n: usize, block: usize, positions: Range<u64>, kv_head: usize) -> impl Iterator<Item = &[f64]> {
        let (span, tokens) = (&self.spans[n], [&self.k, &self.v][of as usize]);
        let memory = self.mem.iter().map(move |mem| &mem[of as usize]);
        let memory = memory.flat_map(move |x| (0..span.mem_rows as usize).map(move |f| x.row(&[n, block, f, kv_head])));
        memory.chain(positions.map(move |p| tokens.row(&[n, (p - span.origin) as usize, kv_head])))
    }
}

/// Whether f32 forms the logit of q and k exactly, in any order: all products are integers times one power of two, 24 bits hold the sum
/// of their magnitudes, and the scale is a power of two that neither over- nor underflows.
pub(crate) fn is_exact(q: &[f64], k: &[f64], scale: f64) -> bool {
    let products = || q.iter().zip(k).filter(|(q, k)| **q != 0.0 && **k != 0.0);
    let Some(unit) = products().map(|(q, k)| lowest_bit(*q) + lowest_bit(*k)).min() else { return true };
    let sum: f64 = products().map(|(q, k)| (q * k).abs()).sum();
    let shift = lowest_bit(scale);
    scale.abs() == 2f64.powi(shift)
        && unit.min(unit + shift) >= -149
        && sum.max(sum * scale.abs()) <= f64::from(f32::MAX)
        && sum < 2f64.powi(24 + unit)
}

/// The exponent of the lowest bit of x ≠ 0, a number of f32.
fn lowest_bit(x: f64) -> i32 {
    let bits = x.to_bits();
    let exponent = ((bits >> 52) & 0x7ff) as i32 - 1075;
    // The leading 1 is not stored.
    exponent + (bits | (1 << 52)).trailing_zeros() as i32
}

/// One row of the reference.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Row<'a> {
    /// `[n, i, r, h]`.
    pub index: [usize; 4],
    pub o: &'a [f64],
    pub a: &'a [f64],
    pub lse: f64,
    /// The `o` and `a` of a channel are filled in for each.
    pub condition: Condition,
    pub class: Class,
    /// Whether the kernel computes the row in f32 whatever the dtype ([`Limits::few_rows`]).
    pub is_few: bool,
    /// Values whose sum, before it is divided by that of their weights, is no number of f32: `o` is left open, `lse` is not.
    pub sums_leave_f32: bool,
    /// One of the row's tiles may load what is not finite, and the kernel says that its NaN then spreads.
    pub may_be_nan: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// No visible logit is above −∞: the zero is exact.
    Empty,
    /// One visible key and nothing else: its value, bit for bit, where it is not flushed.
    Copy,
    /// A weighted mean of values.
    Mean,
    /// Whatever it is, it is right.
    Unspecified,
}

/// What a row reads from the compressive memory.
#[derive(Clone, Debug)]
pub(crate) struct Read {
    /// Of the memory and of the local attention: g and 1 − g.
    pub shares: [f64; 2],
    pub a: Vec<f64>,
    /// Bound of a's error.
    pub error: Vec<f64>,
    /// Σ_c s_c |m_cj| / den.
    pub magnitude: Vec<f64>,
    /// As [`Row::may_be_nan`], of the state.
    pub may_be_nan: bool,
}

impl Read {
    /// What channel c should be after the gate, and how closely: the local attention gives `o` with an error, from terms of `magnitude`.
    pub fn gate(&self, c: usize, bound: &Bound<'_>, [o, o_error]: [f64; 2], magnitude: f64) -> (f64, Rule) {
        let [of_memory, of_local] = self.shares;
        let tolerance = Tolerance {
            bound: bound.gated(self.shares, [self.a[c], self.error[c]], [o, o_error]),
            magnitude: of_memory * self.magnitude[c] + of_local * magnitude,
        };
        (of_memory * self.a[c] + of_local * o, Rule::Near(tolerance))
    }
}

impl Row<'_> {
    /// What channel c of `o` should be, and how closely; with what was read where the compressive memory is gated in.
    pub fn element(&self, c: usize, bound: &Bound<'_>, read: Option<&Read>) -> (f64, Rule) {
        let condition = Condition { o: self.o[c], a: self.a[c], ..self.condition };
        let bound = &bound.of_rows(self.is_few);
        let (expected, rule) = match (read, self.class) {
            (None, Class::Empty) => (0.0, Rule::Zero),
            (None, Class::Copy) if !(bound.flushes && self.o[c].abs() < f32::MIN_POSITIVE.into()) => (self.o[c], Rule::Same),
            (None, _) => (self.o[c], Rule::Near(Tolerance { bound: bound.o(&condition), magnitude: self.a[c] })),
            (Some(read), _) => read.gate(c, bound, [self.o[c], bound.o_f32(&condition)], self.a[c]),
        };
        let is_open = self.class == Class::Unspecified || self.sums_leave_f32;
        (expected, if is_open { Rule::Any } else { rule })
    }

    /// What `lse` should be, and how closely.
    pub fn lse(&self, bound: &Bound<'_>) -> (f64, Rule) {
        let Condition { s, sink, .. } = self.condition;
        let rule = match self.class {
            Class::Unspecified => Rule::Any,
            // Minus infinity, or the sink.
            Class::Empty => Rule::Same,
            // A logit of +∞ or NaN.
            _ if self.lse.is_nan() => Rule::NotFinite,
            _ => {
                let magnitude = self.lse.abs() + s + sink;
                Rule::Near(Tolerance { bound: bound.lse(self.lse, &self.condition), magnitude })
            }
        };
        (self.lse, rule)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lowest_bits() {
        let of = [1.0, 3.0, 12.0, 0.75, -640.0, f64::from(f32::MAX), f64::from(f32::from_bits(1)), f64::from(f32::from_bits(6))];
        assert_eq!(of.map(lowest_bit), [0, 0, 2, -2, 7, 104, -149, -148]);
    }

    /// What is called exact is: sums in f32 in three orders give the sum in f64. What is not exact is not called so.
    #[test]
    fn exact_logits_are_found() {
        let huge = f64::from(f32::MAX) / 4.0;
        let (thirds, pi) = (f64::from(1f32 / 3.0), f64::from(std::f32::consts::PI));
        for (q, k, scale, exact) in [
            ([3.0, -5.0, 7.0], [2.0, 6.0, -1.0], 1.0, true),
            ([3.0, -5.0, 7.0], [2.0, 6.0, -1.0], 0.3, false),
            ([0.0, 1.0, 0.0], [pi, huge, 5.0], 1.0, true),
            ([0.0, 1.0, 0.0], [pi, huge, 5.0], 8.0, false),
            ([65504.0, -65504.0, 65504.0], [2.0, 2.0, -1.0], 0.125, true),
            ([2e6, 4.0, 1.0], [8.0, 4.0, 1.0], 1.0, true),
            ([2e6, 4.0, 1.0], [9.0, 4.0, 1.0], 1.0, false),
            ([thirds, thirds, 0.0], [1.0, 1.0, 1.0], 1.0, false),
            // Integers times one power of two, each in a channel of another size.
            ([1024.0, 1.0 / 1024.0, 2.0], [1.0 / 512.0, 4096.0, 3.0], -4.0, true),
            ([2f64.powi(-100), 0.0, 0.0], [2f64.powi(-40), 0.0, 0.0], 1.0, true),
            ([2f64.powi(-100), 0.0, 0.0], [2f64.powi(-40), 0.0, 0.0], 2f64.powi(-10), false),
            ([2f64.powi(-100), 0.0, 0.0], [2f64.powi(-50), 0.0, 0.0], 1.0, false),
        ] {
            assert_eq!(is_exact(&q, &k, scale), exact, "{q:?} {k:?} {scale}");
            if exact {
                let sum: f64 = q.iter().zip(&k).map(|(q, k)| q * k).sum();
                for order in [[0, 1, 2], [2, 1, 0], [1, 2, 0]] {
                    let rounded = order.iter().map(|&c| q[c] as f32 * k[c] as f32).fold(0f32, |sum, x| sum + x) * scale as f32;
                    assert_eq!(f64::from(rounded), sum * scale, "{q:?} {k:?} {scale}");
                }
            }
        }
    }
}
