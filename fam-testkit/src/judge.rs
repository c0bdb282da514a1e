//! Judging the outputs of a case file, whoever computed them.

use crate::casefile::{CaseFile, InfiniCase, OUTPUTS, Tensor};
use crate::check::{Checker, Element, Worst, Wrong, edges};
use crate::finite::Finite;
use crate::tolerance::{Bound, Condition, Level, Limits, infini_delta, infini_read, infini_write, infini_z, tiles};
use fam_core::{Dtype, InfiniRule, Result, Span};
use fam_ref::{Array, Attended, Rows};
use std::collections::BTreeMap;
use std::ops::Range;

/// What a file's outputs are worth.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// Elements compared with the reference, and with `expected_*` where the case has them.
    pub compared: u64,
    /// The largest share of its bound that an element's error took, by output.
    pub worst: BTreeMap<&'static str, Worst>,
    /// The first element that is wrong, and the edges it lies on, in words.
    pub wrong: Option<(Wrong, String)>,
}

impl Verdict {
    /// The largest share of any output.
    pub fn worst_ratio(&self) -> f64 {
        self.worst.values().map(|w| w.ratio).fold(0.0, f64::max)
    }
}

/// The reference's results of a case, with what their bounds are derived from.
#[derive(Debug)]
pub struct Reference {
    attended: Attended,
    infini: Option<InfiniReference>,
}

/// A free-running recurrence: the bound of a segment's result holds the bounds of all states before it.
#[derive(Debug)]
struct InfiniReference {
    /// a and the bound of its error, `[N, L, Hq, D]`.
    a: Array<4>,
    a_error: Array<4>,
    gate: Vec<f64>,
    /// After the last whole segment, with bounds: `[N, Hkv, D, D]` and `[N, Hkv, 1, D]`.
    m: [Array<4>; 2],
    z: [Array<4>; 2],
}

fn spans(case: &CaseFile) -> Vec<Span> {
    let mem_rows = if case.mem.is_some() { case.shape.mem_len() } else { 0 };
    let spans = (0..case.batch).map(|n| Span::new(n as u32, case.start[n], case.lengths[n] as u32).with_origin(case.start[n]));
    spans.map(|s| s.with_mem_rows(mem_rows as u32)).collect()
}

fn tokens(tensor: &Tensor) -> Array<4> {
    Array { shape: std::array::from_fn(|axis| tensor.shape[axis]), data: tensor.values() }
}

/// Memory rows with every stream and block written out.
fn memory(case: &CaseFile, tensor: &Tensor) -> Array<5> {
    let sizes: [usize; 5] = std::array::from_fn(|axis| tensor.shape[axis]);
    let given = Array { shape: sizes, data: tensor.values() };
    let [_, _, f, h, d] = sizes;
    let mut full = Array::zeros([case.batch, case.blocks(), f, h, d]);
    for n in 0..case.batch {
        for i in 0..case.blocks() {
            let from = [n.min(sizes[0] - 1), i.min(sizes[1] - 1)];
            full.row_mut(&[n, i]).copy_from_slice(given.row(&from));
        }
    }
    full
}

/// What is finite among the keys and values of each stream and kv head.
fn finite(case: &CaseFile, kv: [&Array<4>; 2], mem: Option<&(Array<5>, Array<5>)>) -> Vec<Vec<Finite>> {
    let mut finite = vec![vec![Finite::new(case.shape.head_dim()); case.shape.kv_heads()]; case.batch];
    for (n, heads) in finite.iter_mut().enumerate() {
        for (h, seen) in heads.iter_mut().enumerate() {
            let [k, v] = kv;
            for t in 0..case.lengths[n] as usize {
                seen.key(k.row(&[n, t, h]));
                seen.value(v.row(&[n, t, h]));
            }
            if let Some((k, v)) = mem {
                for (i, f) in (0..k.shape[1]).flat_map(|i| (0..k.shape[2]).map(move |f| (i, f))) {
                    seen.key(k.row(&[n, i, f, h]));
                    seen.value(v.row(&[n, i, f, h]));
                }
            }
        }
    }
    finite
}

/// Takes S and max |v| over what is finite, where the rows see other values too.
fn keep_finite<'a>(case: &CaseFile, rows: &mut Rows, finite: &[Vec<Finite>], q: impl Fn([usize; 4]) -> &'a [f64]) {
    let [batch, blocks, count, heads] = rows.s.shape;
    for (n, h) in (0..batch).flat_map(|n| (0..heads).map(move |h| (n, h))) {
        let seen = &finite[n][h / case.shape.group()];
        for at in (0..blocks).flat_map(|i| (0..count).map(move |r| [n, i, r, h])) {
            if !rows.s[at].is_finite() {
                rows.s[at] = seen.s(q(at), case.shape.scale().into());
            }
            if !rows.v_max[at].is_finite() {
                rows.v_max[at] = seen.v_max;
            }
        }
    }
}

impl Reference {
    /// Computes the case in f64.
    ///
    /// # Errors
    /// Where tensors do not fit each other; a case file that was read has none of those.
    pub fn new(case: &CaseFile) -> Result<Self> {
        let (spans, q, k, v) = (spans(case), tokens(&case.q), tokens(&case.k), tokens(&case.v));
        let mem_q = case.mem_q.as_ref().map(|t| memory(case, t));
        let mem = case.mem.as_ref().map(|(k, v)| (memory(case, k), memory(case, v)));
        let sink = case.sink.as_ref().map(Tensor::values);
        let mut attended = fam_ref::attend(&fam_ref::Attend {
            shape: &case.shape,
            spans: &spans,
            q: Some(&q),
            mem_q: mem_q.as_ref(),
            k: &k,
            v: &v,
            mem_k: mem.as_ref().map(|(k, _)| k),
            mem_v: mem.as_ref().map(|(_, v)| v),
            sink: sink.as_deref(),
        })?;
        let finite = finite(case, [&k, &v], mem.as_ref());
        let q_rows = |[n, _, r, h]: [usize; 4]| q.row(&[n, r, h]);
        attended.rows.iter_mut().for_each(|rows| keep_finite(case, rows, &finite, q_rows));
        if let (Some(rows), Some(q)) = (&mut attended.mem_rows, &mem_q) {
            keep_finite(case, rows, &finite, |at| q.row(&at));
        }
        let infini = case.infini.as_ref().map(|infini| {
            let q = infini.q.as_ref().map_or(q, tokens);
            let k = infini.k.as_ref().map_or(k, tokens);
            InfiniReference::new(case, infini, &q, &k, &v)
        });
        Ok(Reference { attended, infini: infini.transpose()? })
    }

    /// Holds `outputs` against the reference, and against `expected_*` where the case has them (those are stored in f32: half an ulp more).
    /// `limits` are those of the kernel that computed them.
    pub fn judge(&self, case: &CaseFile, outputs: &BTreeMap<String, Tensor>, limits: &Limits) -> Verdict {
        self.judge_from(0, case, outputs, limits)
    }

    /// As [`Reference::judge`], but only tokens from row `first` on, memory rows of their blocks, and the state.
    pub fn judge_from(&self, first: usize, case: &CaseFile, outputs: &BTreeMap<String, Tensor>, limits: &Limits) -> Verdict {
        let mut verdict = Verdict { compared: 0, worst: BTreeMap::new(), wrong: None };
        for name in OUTPUTS {
            let Some(output) = outputs.get(name) else { continue };
            let got = output.values();
            let expected = case.expected.get(name).map(Tensor::values);
            let mut checker = Checker::new(Level::Hard, case.shape.dtype(), output.dtype, limits);
            let bound = checker.bound;
            self.elements(case, name, &bound, limits.key_tile, |item| {
                let [n, i, r, ..] = item.at.index;
                let is_before = match name {
                    "o" | "lse" => r < first,
                    "mem_o" | "mem_lse" => i < block_of(case, n, first),
                    _ => false,
                };
                if is_before {
                    return;
                }
                let got = got[item.index];
                match item.rule {
                    // +0, to the bit.
                    Rule::Empty if got.to_bits() != 0 => checker.fail(Wrong { at: item.at, got, expected: 0.0, bound: 0.0 }),
                    Rule::Empty => {}
                    Rule::Copy => checker.exactly(item.at, got, item.expected),
                    Rule::Bound(bound) => checker.element(item.at, got, item.expected, bound),
                }
                verdict.compared += 1;
                if let (Some(stored), Rule::Bound(bound)) = (&expected, item.rule) {
                    let stored = stored[item.index];
                    checker.element(item.at, got, stored, bound + stored.abs() * Dtype::F32.unit_roundoff());
                    verdict.compared += 1;
                }
            });
            verdict.worst.extend(checker.worst.map(|w| (name, w)));
            if verdict.wrong.is_none() {
                verdict.wrong = checker.wrong.map(|wrong| {
                    let span = spans(case)[wrong.at.index[0]];
                    (wrong, edges(&case.shape, &span, &wrong.at, limits.key_tile))
                });
            }
        }
        verdict
    }

    /// The reference's results by output name, in f32; 0 in rows past a stream's length.
    pub(crate) fn expected(&self, case: &CaseFile) -> BTreeMap<String, Tensor> {
        let limits = Limits::default();
        let checker = Checker::new(Level::Hard, case.shape.dtype(), Dtype::F32, &limits);
        let mut expected = BTreeMap::new();
        for name in OUTPUTS {
            let shape = case.output_shape(name);
            let mut values = vec![0.0; shape.iter().product()];
            let mut is_there = false;
            self.elements(case, name, &checker.bound, limits.key_tile, |item| {
                values[item.index] = item.expected;
                is_there = true;
            });
            if is_there {
                expected.insert(name.to_string(), Tensor::from_values(Dtype::F32, shape, values));
            }
        }
        expected
    }

    /// Calls `visit` for every element of output `name`.
    fn elements(&self, case: &CaseFile, name: &'static str, bound: &Bound<'_>, key_tile: usize, visit: impl FnMut(Item)) {
        match (name, &self.attended) {
            ("o" | "lse", Attended { rows: Some(rows), .. }) => self.rows(case, name, rows, bound, key_tile, visit),
            ("mem_o" | "mem_lse", Attended { mem_rows: Some(rows), .. }) => self.rows(case, name, rows, bound, key_tile, visit),
            ("m" | "z", _) => self.state(case, name, visit),
            _ => {}
        }
    }

    fn rows(
        &self,
        case: &CaseFile,
        name: &'static str,
        rows: &Rows,
        bound: &Bound<'_>,
        key_tile: usize,
        mut visit: impl FnMut(Item),
    ) {
        let is_memory = name.starts_with("mem_");
        let (shape, sizes) = (&case.shape, rows.o.shape);
        let (b, d) = (shape.block_len(), shape.head_dim());
        let sinks = case.sink.as_ref().map(Tensor::values);
        for (n, span) in spans(case).iter().enumerate() {
            let (blocks, in_block) = if is_memory { (span.blocks(b), shape.mem_len()) } else { (1, span.len as usize) };
            for (i, r) in (0..blocks).flat_map(|i| (0..in_block).map(move |r| (i, r))) {
                let position = span.start + r as u64;
                let keys = if is_memory { span.block_keys(i, b) } else { span.window_first(position, shape)..position + 1 };
                for h in 0..shape.heads() {
                    let row = [n, i, r, h];
                    // −inf is no sink.
                    let sink = sinks.as_ref().map(|s| s[h]).filter(|s| *s != f64::NEG_INFINITY);
                    let lse = rows.lse[row];
                    let condition = Condition {
                        o: 0.0,
                        a: 0.0,
                        s: rows.s[row],
                        sink: sink.map_or(0.0, f64::abs),
                        n: rows.n[row],
                        tiles: tiles(keys.clone(), b, span.mem_rows as usize, key_tile),
                        d: d as f64,
                        v_max: rows.v_max[row],
                    };
                    let index = ((n * sizes[1] + i) * sizes[2] + r) * sizes[3] + h;
                    if name.ends_with("lse") {
                        let at = Element { tensor: name, index: [n, i, r, h, 0] };
                        visit(Item { at, index, expected: lse, rule: Rule::Bound(bound.lse(lse, &condition)) });
                        continue;
                    }
                    for c in 0..d {
                        let at = Element { tensor: name, index: [n, i, r, h, c] };
                        let (o, condition) =
                            (rows.o[at.index], Condition { o: rows.o[at.index], a: rows.a[at.index], ..condition });
                        let (expected, rule) = match &self.infini {
                            Some(infini) if !is_memory => {
                                let (g, at) = (infini.gate[h], [n, r, h, c]);
                                let memory = [infini.a[at], infini.a_error[at]];
                                let rule = Rule::Bound(bound.gated(g, memory, [o, bound.o_f32(&condition)]));
                                (g * memory[0] + (1.0 - g) * o, rule)
                            }
                            _ if lse == f64::NEG_INFINITY || rows.n[row] == 0.0 => (0.0, Rule::Empty),
                            _ if rows.n[row] == 1.0 && sink.is_none() && lse.is_finite() => (o, Rule::Copy),
                            _ => (o, Rule::Bound(bound.o(&condition))),
                        };
                        visit(Item { at, index: index * d + c, expected, rule });
                    }
                }
            }
        }
    }

    fn state(&self, case: &CaseFile, name: &'static str, mut visit: impl FnMut(Item)) {
        let Some(infini) = &self.infini else { return };
        let [values, bounds] = if name == "m" { &infini.m } else { &infini.z };
        let [_, kv_heads, rows, d] = values.shape;
        for (index, (&expected, &bound)) in values.data.iter().zip(&bounds.data).enumerate() {
            let (n, h, r, c) = (index / (kv_heads * rows * d), index / (rows * d) % kv_heads, index / d % rows, index % d);
            let last = whole_segments(case, n).last().map_or(0, |(i, _)| i);
            visit(Item { at: Element { tensor: name, index: [n, last, r, h, c] }, index, expected, rule: Rule::Bound(bound) });
        }
    }
}

/// The call's block that holds stream n's token in row `row`.
fn block_of(case: &CaseFile, n: usize, row: usize) -> usize {
    let b = case.shape.block_len();
    ((case.start[n] % b as u64) as usize + row) / b
}

/// One element of an output, and what it is held to.
struct Item {
    at: Element,
    /// Place in the packed output.
    index: usize,
    expected: f64,
    rule: Rule,
}

#[derive(Clone, Copy)]
enum Rule {
    /// No visible key: exactly +0.
    Empty,
    /// One visible key: its value, bit for bit.
    Copy,
    /// So far from the reference.
    Bound(f64),
}

/// The segments that are written: the call's block i, and its first token's row in q, k and v.
fn whole_segments(case: &CaseFile, n: usize) -> impl Iterator<Item = (usize, usize)> + use<> {
    let (b, start, end) = (case.shape.block_len() as u64, case.start[n], case.start[n] + case.lengths[n]);
    let first = start / b;
    (first..end / b).filter(move |t| t * b >= start).map(move |t| ((t - first) as usize, (t * b - start) as usize))
}

impl InfiniReference {
    fn new(case: &CaseFile, infini: &InfiniCase, q: &Array<4>, k: &Array<4>, v: &Array<4>) -> Result<Self> {
        let s = &case.shape;
        let (kv_heads, d, b) = (s.kv_heads(), s.head_dim(), s.block_len());
        let state = |given: &Option<Tensor>, rows: usize| {
            let shape = [case.batch, kv_heads, rows, d];
            given.as_ref().map_or(Array::zeros(shape), |t| Array { shape, data: t.values() })
        };
        let mut out = InfiniReference {
            a: Array::zeros(q.shape),
            a_error: Array::zeros(q.shape),
            gate: infini.beta.values().into_iter().map(fam_ref::gate).collect(),
            m: [state(&infini.m0, d), state(&None, d)],
            z: [state(&infini.z0, 1), state(&None, 1)],
        };
        for n in 0..case.batch {
            let mut segments = whole_segments(case, n).peekable();
            let (start, end) = (case.start[n], case.start[n] + case.lengths[n]);
            for position in start..end {
                let t = (position - start) as usize;
                for h in 0..s.heads() {
                    let kv = [n, h / s.group()];
                    let read = fam_ref::infini_retrieve(q.row(&[n, t, h]), out.m[0].row(&kv), out.z[0].row(&kv))?;
                    let error = out.propagated(kv, q.row(&[n, t, h]), &read.a);
                    for (c, carried) in error.into_iter().enumerate() {
                        out.a[[n, t, h, c]] = read.a[c];
                        out.a_error[[n, t, h, c]] = infini_read(d, read.magnitude[c], read.a[c]) + carried;
                    }
                }
                // The segment's last token: all its rows have read, now it is written.
                if (position + 1).is_multiple_of(b as u64)
                    && let Some((_, first)) = segments.next_if(|&(_, first)| first + b == t + 1)
                {
                    (0..kv_heads).try_for_each(|h| out.write([n, h], infini.rule, first..t + 1, k, v))?;
                }
            }
        }
        Ok(out)
    }

    /// Error of σ(q)·m / σ(q)·z that comes from the errors of m and z, to first order.
    fn propagated(&self, kv: [usize; 2], q: &[f64], a: &[f64]) -> Vec<f64> {
        let shift = q.iter().copied().fold(f64::NEG_INFINITY, f64::max).min(0.0);
        let sigma: Vec<f64> = q.iter().map(|&x| if shift < 0.0 { (x - shift).exp() } else { fam_ref::sigma(x) }).collect();
        let dot = |values: &[f64]| sigma.iter().zip(values).map(|(s, x)| s * x).sum::<f64>();
        let (den, z_error) = (dot(self.z[0].row(&kv)), dot(self.z[1].row(&kv)));
        if den == 0.0 {
            return vec![0.0; a.len()];
        }
        let d = a.len();
        let m_error = self.m[1].row(&kv);
        let column = |j: usize| (0..d).map(|c| sigma[c] * m_error[c * d + j]).sum::<f64>();
        (0..d).map(|j| (column(j) + a[j].abs() * z_error) / den).collect()
    }

    /// Writes one segment of one head, value and bound.
    fn write(&mut self, kv: [usize; 2], rule: InfiniRule, rows: Range<usize>, k: &Array<4>, v: &Array<4>) -> Result<()> {
        let [n, h] = kv;
        let keys: Vec<&[f64]> = rows.clone().map(|t| k.row(&[n, t, h])).collect();
        let values: Vec<&[f64]> = rows.map(|t| v.row(&[n, t, h])).collect();
        let written = fam_ref::infini_write(rule, &keys, &values, self.m[0].row(&kv), self.z[0].row(&kv))?;
        let (count, d) = (keys.len(), k.shape[3]);
        let mut carried = vec![0.0; d * d];
        if rule == InfiniRule::Delta {
            // What delta subtracts was read from the old state, with that state's error.
            for key in &keys {
                let read = fam_ref::infini_retrieve(key, self.m[0].row(&kv), self.z[0].row(&kv))?;
                let error = self.propagated(kv, key, &read.a);
                for (i, &x) in key.iter().enumerate() {
                    (0..d).for_each(|j| carried[i * d + j] += fam_ref::sigma(x) * error[j]);
                }
            }
        }
        for (i, error) in self.m[1].row_mut(&kv).iter_mut().enumerate() {
            *error += carried[i] + infini_write(count, written.s_v[i], written.m[i]);
            if rule == InfiniRule::Delta {
                *error += infini_delta(count, d, written.s_read[i], written.s_diff[i]);
            }
        }
        for (i, error) in self.z[1].row_mut(&kv).iter_mut().enumerate() {
            *error += infini_z(count, written.s_sum[i], written.z[i]);
        }
        self.m[0].row_mut(&kv).copy_from_slice(&written.m);
        self.z[0].row_mut(&kv).copy_from_slice(&written.z);
        Ok(())
    }
}
