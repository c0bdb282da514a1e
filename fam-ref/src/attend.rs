//! `attend`: one joint softmax over window, memory and the current block (TransformerFAM, Algorithms 1 and 2).
//!
//! ```text
//!                block rows q                           memory rows mem_q
//!   window       the M past blocks, whole               -
//!   memory       the first mem_rows rows                the first mem_rows rows
//!   own block    causal, the row itself included        all keys up to the call's end
//!
//!   logit_t = scale * q.k_t        p_t = exp(logit_t) / sum        o = sum_t p_t v_t        lse = ln sum
//!   sum     = exp(sink) + sum_t exp(logit_t)                                        the sink only where there is one
//! ```

use crate::Array;
use crate::array::{check, check_len};
use fam_core::{Result, Shape, Span};
use std::ops::Range;

/// Arguments of [`attend`]. All arrays are indexed by stream n and, on the axis nb, by the n-th call's block i: `slot`,
/// `mem_entry` and `state_entry` of a span are not looked at.
#[derive(Clone, Copy, Debug)]
pub struct Attend<'a> {
    /// Sizes, window and scale of the layer. Its dtype plays no part.
    pub shape: &'a Shape,
    /// One for each stream.
    pub spans: &'a [Span],
    /// Block rows, `[N, L, Hq, D]`.
    pub q: Option<&'a Array<4>>,
    /// Memory rows, `[N, nb, F, Hq, D]`: all F of a block, whatever `mem_rows`.
    pub mem_q: Option<&'a Array<5>>,
    /// Keys, `[N, T, Hkv, D]`; position j is row `j − origin`.
    pub k: &'a Array<4>,
    /// Values, as `k`.
    pub v: &'a Array<4>,
    /// Keys of the memory rows, `[N, nb, F, Hkv, D]`; the first `mem_rows` of each block are present, and no others need a place in the
    /// array. Needed where a span has any.
    pub mem_k: Option<&'a Array<5>>,
    /// Values of the memory rows, as `mem_k`.
    pub mem_v: Option<&'a Array<5>>,
    /// `[Hq]`: a logit that joins every row's denominator with a zero value.
    pub sink: Option<&'a [f64]>,
}

/// What one group of rows gets: `[N, 1, L, Hq, ..]` for block rows, `[N, nb, F, Hq, ..]` for memory rows. Rows outside a span's
/// `len` or blocks keep `o = 0`, `n = 0`, `lse = −inf`.
///
/// Beside the results stands what the error bound of a kernel is derived from.
#[derive(Clone, Debug, PartialEq)]
pub struct Rows {
    /// Output, `[.., Hq, D]`.
    pub o: Array<5>,
    /// Natural logarithm of the denominator, `[.., Hq]`; −inf for an empty row without sink.
    pub lse: Array<4>,
    /// A_j = Σ_t p_t |v_tj|, `[.., Hq, D]`.
    pub a: Array<5>,
    /// S = |scale| · max_t Σ_c |q_c k_tc|, `[.., Hq]`.
    pub s: Array<4>,
    /// Visible keys, the sink not counted, `[.., Hq]`.
    pub n: Array<4>,
    /// max |v| over the visible keys and all channels, `[.., Hq]`.
    pub v_max: Array<4>,
}

/// Results of [`attend`], each present where its queries were.
#[derive(Clone, Debug, PartialEq)]
pub struct Attended {
    /// Block rows.
    pub rows: Option<Rows>,
    /// Memory rows.
    pub mem_rows: Option<Rows>,
}

/// Attends as the module says; both row groups are independent of each other.
///
/// A visible logit of −inf has weight 0, and a row without any other is empty: `o = +0`, `lse` = the sink or −inf. A logit of NaN
/// or +inf makes its row NaN, and no other.
///
/// # Errors
/// Where an array does not have the sizes that shape and spans ask for, or a span breaks its own rules.
pub fn attend(args: &Attend) -> Result<Attended> {
    args.validate()?;
    let (batch, heads, d) = (args.spans.len(), args.shape.heads(), args.shape.head_dim());
    let rows = args.q.map(|q| {
        let mut rows = Rows::empty([batch, 1, q.shape[1], heads, d]);
        for row in args.block_rows() {
            let [n, _, t, h] = row.at;
            rows.set(row.at, q.row(&[n, t, h]), &args.keys(&row), args.scale(), args.sink(h));
        }
        rows
    });
    let mem_rows = args.mem_q.map(|mem_q| {
        let [_, blocks, mem_len, ..] = mem_q.shape;
        let mut rows = Rows::empty([batch, blocks, mem_len, heads, d]);
        for row in args.mem_rows() {
            rows.set(row.at, mem_q.row(&row.at), &args.keys(&row), args.scale(), args.sink(row.at[3]));
        }
        rows
    });
    Ok(Attended { rows, mem_rows })
}

/// Key and value of one visible row.
pub(crate) type Key<'a> = (&'a [f64], &'a [f64]);

/// A query row, and what it sees.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Place in [`Rows`]: stream, block entry, row, query head.
    pub at: [usize; 4],
    /// Block of the call whose memory keys it sees.
    pub block: usize,
    /// Positions of the tokens whose keys it sees.
    pub visible: Range<u64>,
}

impl<'a> Attend<'a> {
    /// Block rows see the window, the memory of their block, and their block up to themselves.
    pub fn block_rows(&self) -> Vec<Row> {
        let block_len = self.shape.block_len() as u64;
        let mut rows = Vec::new();
        for (n, span) in self.spans.iter().enumerate() {
            for t in 0..span.len as usize {
                let position = span.start + t as u64;
                let block = (position / block_len - span.start / block_len) as usize;
                let visible = span.window_first(position, self.shape)..position + 1;
                rows.extend((0..self.shape.heads()).map(|h| Row { at: [n, 0, t, h], block, visible: visible.clone() }));
            }
        }
        rows
    }

    /// Memory rows see the memory of their block, and the block, which they compress.
    pub fn mem_rows(&self) -> Vec<Row> {
        let (block_len, heads) = (self.shape.block_len(), self.shape.heads());
        let mut rows = Vec::new();
        for (n, span) in self.spans.iter().enumerate() {
            for block in 0..span.blocks(block_len) {
                let visible = span.block_keys(block, block_len);
                let places = (0..self.shape.mem_len()).flat_map(|f| (0..heads).map(move |h| [n, block, f, h]));
                rows.extend(places.map(|at| Row { at, block, visible: visible.clone() }));
            }
        }
        rows
    }

    /// Checks all that is read against shape and spans.
    pub(crate) fn validate(&self) -> Result<()> {
        let s = self.shape;
        let (batch, heads, kv_heads, d, mem_len) = (self.spans.len(), s.heads(), s.kv_heads(), s.head_dim(), s.mem_len());
        let (mut rows, mut blocks, mut keys, mut mem_rows) = (0, 0, 0, 0);
        for span in self.spans {
            check("span.origin", span.origin, span.origin <= span.start, format_args!("at most span.start = {}", span.start))?;
            check("span.start", span.start, span.start <= u64::MAX / 2, format_args!("at most {}", u64::MAX / 2))?;
            check(
                "span.mem_rows",
                span.mem_rows,
                span.mem_rows as usize <= mem_len,
                format_args!("at most mem_len = {mem_len}"),
            )?;
            if span.len > 0 {
                rows = rows.max(span.len as usize);
                blocks = blocks.max(span.blocks(s.block_len()));
                keys = keys.max(span.end() - span.origin);
                mem_rows = mem_rows.max(span.mem_rows);
            }
        }

        let at_least = |field, axis, size: usize, least: u64| {
            check(
                field,
                format_args!("{size} {axis}"),
                size as u64 >= least,
                format_args!("at least {least}, which the spans cover"),
            )
        };
        if let Some(q) = self.q {
            q.check("q", [batch, q.shape[1], heads, d])?;
            at_least("q", "rows", q.shape[1], rows as u64)?;
        }
        for (field, x) in [("k", self.k), ("v", self.v)] {
            x.check(field, [batch, x.shape[1], kv_heads, d])?;
            at_least(field, "rows", x.shape[1], keys)?;
        }
        if let Some(q) = self.mem_q {
            q.check("mem_q", [batch, q.shape[1], mem_len, heads, d])?;
            at_least("mem_q", "blocks", q.shape[1], blocks as u64)?;
        }
        for (field, x) in [("mem_k", self.mem_k), ("mem_v", self.mem_v)] {
            if let Some(x) = x {
                x.check(field, [batch, x.shape[1], x.shape[2], kv_heads, d])?;
                at_least(field, "blocks", x.shape[1], blocks as u64)?;
                at_least(field, "rows", x.shape[2], mem_rows.into())?;
            } else {
                check(field, "none", mem_rows == 0, "needed where a span has memory rows")?;
            }
        }
        self.sink.map_or(Ok(()), |sink| check_len("sink", sink.len(), heads))
    }

    pub(crate) fn scale(&self) -> f64 {
        self.shape.scale().into()
    }

    pub(crate) fn sink(&self, h: usize) -> Option<f64> {
        self.sink.map(|sink| sink[h])
    }

    /// Places `[n, block, f, h]` of the memory keys that a row sees, and `[n, row, h]` of the tokens' keys.
    ///
    /// Of a row of these arguments; another's may name places that there are not.
    pub fn key_places(&self, row: &Row) -> (impl Iterator<Item = [usize; 4]> + use<>, impl Iterator<Item = [usize; 3]> + use<>) {
        let ([n, _, _, h], block) = (row.at, row.block);
        let h = h / self.shape.group();
        let Span { origin, mem_rows, .. } = self.spans[n];
        let memory = (0..mem_rows as usize).map(move |f| [n, block, f, h]);
        (memory, row.visible.clone().map(move |position| [n, (position - origin) as usize, h]))
    }

    /// The keys that a row sees: its memory's, then the tokens'.
    pub(crate) fn keys(&self, row: &Row) -> Vec<Key<'a>> {
        let (memory, tokens) = self.key_places(row);
        let (most, _) = tokens.size_hint();
        let mut keys = Vec::with_capacity(self.shape.mem_len() + most);
        if let (Some(mem_k), Some(mem_v)) = (self.mem_k, self.mem_v) {
            keys.extend(memory.map(|at| (mem_k.row(&at), mem_v.row(&at))));
        }
        keys.extend(tokens.map(|at| (self.k.row(&at), self.v.row(&at))));
        keys
    }
}

impl Rows {
    fn empty(shape: [usize; 5]) -> Self {
        let [batch, blocks, rows, heads, _] = shape;
        let per_row = [batch, blocks, rows, heads];
        Rows {
            o: Array::zeros(shape),
            lse: Array::full(per_row, f64::NEG_INFINITY),
            a: Array::zeros(shape),
            s: Array::zeros(per_row),
            n: Array::zeros(per_row),
            v_max: Array::zeros(per_row),
        }
    }

    /// Softmax over `keys` for the query `q`, in two passes.
    fn set(&mut self, at: [usize; 4], q: &[f64], keys: &[Key], scale: f64, sink: Option<f64>) {
        let (o, a) = (self.o.row_mut(&at), self.a.row_mut(&at));

        // 1. Logits, their maximum, and the conditioning.
        let mut logits = Vec::with_capacity(keys.len());
        let (mut row_max, mut s, mut v_max) = (f64::NEG_INFINITY, 0.0, 0.0);
        for (k, v) in keys {
            let (mut dot, mut dot_abs) = (0.0, 0.0);
            for (q, k) in q.iter().zip(*k) {
                dot += q * k;
                dot_abs += (q * k).abs();
            }
            logits.push(scale * dot);
            row_max = max(row_max, scale * dot);
            s = max(s, scale.abs() * dot_abs);
            v_max = v.iter().fold(v_max, |m, v| max(m, v.abs()));
        }
        (self.s[at], self.v_max[at], self.n[at]) = (s, v_max, keys.len() as f64);

        // 2. An empty row has nothing but its sink.
        if row_max == f64::NEG_INFINITY {
            self.lse[at] = sink.unwrap_or(f64::NEG_INFINITY);
            return;
        }

        // 3. Weights relative to the maximum, so that none overflows; the sink joins the sum alone.
        row_max = sink.map_or(row_max, |sink| max(row_max, sink));
        let mut row_sum = sink.map_or(0.0, |sink| (sink - row_max).exp());
        for (logit, (_, v)) in logits.iter().zip(keys) {
            let p = (logit - row_max).exp();
            row_sum += p;
            for ((o, a), v) in o.iter_mut().zip(a.iter_mut()).zip(*v) {
                *o += p * v;
                *a += p * v.abs();
            }
        }

        // 4. Normalise once.
        o.iter_mut().for_each(|o| *o /= row_sum);
        a.iter_mut().for_each(|a| *a /= row_sum);
        self.lse[at] = row_max + row_sum.ln();
    }
}

/// The larger one, or NaN where either is: `f64::max` would lose it.
pub(crate) fn max(a: f64, b: f64) -> f64 {
    if b > a || b.is_nan() { b } else { a }
}
