//! Judging the outputs of a case file, whoever computed them.

use crate::casefile::{CaseFile, InfiniCase, OUTPUTS, Tensor};
use crate::check::{Checker, Element, Rule, Worst, Wrong, edges};
use crate::rows::{Inputs, LARGEST_TILE, Problem, Read};
use crate::tolerance::{Bound, Level, Limits, NanReach, Tolerance, infini_read, infini_write};
use fam_core::{Dtype, InfiniRule, Result, Span};
use fam_ref::Array;
use std::collections::BTreeMap;
use std::ops::Range;

/// What a file's outputs are worth.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// Elements judged: held against the reference, and against `expected_*` where the case has them, by a bound that can be broken.
    pub compared: u64,
    /// Elements not judged: logits beyond f32, NaN where the kernel may spread it, or a bound as large as the element's terms together.
    /// An output of which nothing was judged is neither right nor wrong.
    pub vacuous: u64,
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
    problem: Problem,
    infini: Option<InfiniReference>,
}

/// A free-running recurrence: the bound of a segment's result holds the bounds of all states before it.
#[derive(Debug)]
struct InfiniReference {
    /// a, the bound of its error, and what that grows by for each result that may be lost, `[N, L, Hq, D]`.
    a: Array<4>,
    a_error: [Array<4>; 2],
    /// Σ_c s_c |m_cj| / den, as a.
    magnitude: Array<4>,
    /// Shares of the memory and of the local attention, of each head.
    shares: Vec<[f64; 2]>,
    /// After the last whole segment, with bounds and what these grow by as above: `[N, Hkv, D, D]` and `[N, Hkv, 1, D]`.
    m: [Array<4>; 3],
    z: [Array<4>; 3],
    /// What their elements were summed from.
    m_magnitude: Array<4>,
    z_magnitude: Array<4>,
    /// The first row of a stream and kv head that reads a state with NaN or an infinity: `usize::MAX` where none does.
    first_spoiled: Vec<Vec<usize>>,
}

pub(crate) fn spans(case: &CaseFile) -> Vec<Span> {
    let mem_rows = if case.mem.is_some() { case.shape.mem_len() } else { 0 };
    let spans = (0..case.batch).map(|n| Span::new(n as u32, case.start[n], case.lengths[n] as u32).with_origin(case.start[n]));
    spans.map(|s| s.with_mem_rows(mem_rows as u32)).collect()
}

pub(crate) fn tokens(tensor: &Tensor) -> Array<4> {
    Array { shape: std::array::from_fn(|axis| tensor.shape[axis]), data: tensor.values() }
}

/// Memory rows with every stream and block written out.
pub(crate) fn memory(case: &CaseFile, tensor: &Tensor) -> Array<5> {
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

impl Reference {
    /// Computes the case in f64.
    ///
    /// # Errors
    /// Where tensors do not fit each other; a case file that was read has none of those.
    pub fn new(case: &CaseFile) -> Result<Self> {
        let (q, k, v) = (tokens(&case.q), tokens(&case.k), tokens(&case.v));
        let infini = case.infini.as_ref().map(|infini| {
            let q = infini.q.as_ref().map_or_else(|| q.clone(), tokens);
            let k = infini.k.as_ref().map_or_else(|| k.clone(), tokens);
            InfiniReference::new(case, infini, &q, &k, &v)
        });
        let infini = infini.transpose()?;
        let problem = Problem::new(Inputs {
            shape: case.shape,
            spans: spans(case),
            q: Some(q),
            mem_q: case.mem_q.as_ref().map(|t| memory(case, t)),
            k,
            v,
            mem: case.mem.as_ref().map(|(k, v)| [memory(case, k), memory(case, v)]),
            sink: case.sink.as_ref().map(Tensor::values),
        })?;
        Ok(Reference { problem, infini })
    }

    /// Holds `outputs` against the reference, and against `expected_*` where the case has them (those are stored in f32: half an ulp more).
    /// `limits` are those of the kernel that computed them.
    pub fn judge(&self, case: &CaseFile, outputs: &BTreeMap<String, Tensor>, limits: &Limits) -> Verdict {
        self.judge_from(0, case, outputs, limits)
    }

    /// As [`Reference::judge`], but only tokens from row `first` on, memory rows of their blocks, and the state.
    pub fn judge_from(&self, first: usize, case: &CaseFile, outputs: &BTreeMap<String, Tensor>, limits: &Limits) -> Verdict {
        let mut verdict = Verdict { compared: 0, vacuous: 0, worst: BTreeMap::new(), wrong: None };
        for name in OUTPUTS {
            let Some(output) = outputs.get(name) else { continue };
            let got = output.values();
            let stored = case.expected.get(name).map(Tensor::values);
            let mut checker = Checker::new(Level::Hard, case.shape.dtype(), output.dtype, limits);
            match name {
                "m" | "z" => self.state(case, name, checker.bound.flushed_result(), |at, index, expected, tolerance| {
                    let stored = stored.as_ref().map(|stored| stored[index]);
                    checker.element(at, got[index], expected, Rule::Near(tolerance), false, stored);
                }),
                _ => self.rows(first, case, name, &mut checker, &got, stored.as_deref()),
            }
            let tally = checker.tally;
            verdict.compared += tally.compared;
            verdict.vacuous += tally.vacuous;
            verdict.worst.extend(tally.worst.map(|w| (name, w)));
            if verdict.wrong.is_none() {
                verdict.wrong = tally.wrong.map(|wrong| {
                    let span = spans(case)[wrong.at.index[0]];
                    (wrong, edges(&case.shape, &span, &wrong.at, limits))
                });
            }
        }
        verdict
    }

    /// Block rows from row `first` on, or memory rows from its block on: `o` or `lse` of them.
    fn rows(
        &self,
        first: usize,
        case: &CaseFile,
        name: &'static str,
        checker: &mut Checker<'_>,
        got: &[f64],
        stored: Option<&[f64]>,
    ) {
        let is_memory = name.starts_with("mem_");
        let Some(rows) = self.problem.rows(is_memory) else { return };
        let (limits, d) = (checker.limits, case.shape.head_dim());
        for at in self.problem.indices(is_memory) {
            let [n, i, r, _] = at;
            if if is_memory { i < block_of(case, n, first) } else { r < first } {
                continue;
            }
            let row = self.problem.row(is_memory, rows, at, limits);
            let index = place(rows.lse.shape, at);
            if name.ends_with("lse") {
                checker.lse(name, &row, got[index], stored.map(|stored| stored[index]));
            } else {
                let read = self.read(case, is_memory, at, limits, checker.bound.flushed_result());
                let of_row = index * d..(index + 1) * d;
                checker.row(name, &row, read.as_ref(), &got[of_row.clone()], stored.map(|stored| &stored[of_row]));
            }
        }
    }

    /// What a block row reads from the compressive memory; `flushed`: what any result may lose.
    fn read(&self, case: &CaseFile, is_memory: bool, [n, _, r, h]: [usize; 4], limits: &Limits, flushed: f64) -> Option<Read> {
        let infini = self.infini.as_ref().filter(|_| !is_memory)?;
        let at = [n, r, h];
        let first_spoiled = infini.first_spoiled[n][h / case.shape.group()];
        Some(Read {
            shares: infini.shares[h],
            a: infini.a.row(&at).to_vec(),
            error: with_flush(infini.a_error[0].row(&at), infini.a_error[1].row(&at), flushed).collect(),
            magnitude: infini.magnitude.row(&at).to_vec(),
            // A row may share its tile of rows with one that reads it.
            may_be_nan: limits.nan != NanReach::Rows && r.saturating_add(LARGEST_TILE) > first_spoiled,
        })
    }

    /// The reference's results by output name, in f32; 0 in rows past a stream's length.
    pub(crate) fn expected(&self, case: &CaseFile) -> BTreeMap<String, Tensor> {
        let limits = Limits::default();
        let bound = Bound::new(Level::Hard, case.shape.dtype(), Dtype::F32, &limits);
        let mut expected = BTreeMap::new();
        for name in OUTPUTS {
            let is_memory = name.starts_with("mem_");
            let shape = case.output_shape(name);
            let mut values = vec![0.0; shape.iter().product()];
            if matches!(name, "m" | "z") {
                if self.infini.is_none() {
                    continue;
                }
                self.state(case, name, 0.0, |_, index, expected, _| values[index] = expected);
            } else {
                let Some(rows) = self.problem.rows(is_memory) else { continue };
                let d = case.shape.head_dim();
                for at in self.problem.indices(is_memory) {
                    let (row, index) = (self.problem.row(is_memory, rows, at, &limits), place(rows.lse.shape, at));
                    if name.ends_with("lse") {
                        values[index] = row.lse;
                        continue;
                    }
                    let read = self.read(case, is_memory, at, &limits, 0.0);
                    (0..d).for_each(|c| values[index * d + c] = row.element(c, &bound, read.as_ref()).0);
                }
            }
            expected.insert(name.to_string(), Tensor::from_values(Dtype::F32, shape, values));
        }
        expected
    }

    /// Calls `visit` with every element of `m` or `z`: which, its place, its value, and how close a result must be; `flushed`: what any result
    /// may lose.
    fn state(&self, case: &CaseFile, name: &'static str, flushed: f64, mut visit: impl FnMut(Element, usize, f64, Tolerance)) {
        let Some(infini) = &self.infini else { return };
        let ([values, errors, lost], magnitudes) =
            if name == "m" { (&infini.m, &infini.m_magnitude) } else { (&infini.z, &infini.z_magnitude) };
        let [_, kv_heads, rows, d] = values.shape;
        for (index, (&expected, bound)) in values.data.iter().zip(with_flush(&errors.data, &lost.data, flushed)).enumerate() {
            let (n, h, r, c) = (index / (kv_heads * rows * d), index / (rows * d) % kv_heads, index / d % rows, index % d);
            let last = whole_segments(case, n).last().map_or(0, |(i, _)| i);
            let tolerance = Tolerance { bound, magnitude: magnitudes.data[index] };
            visit(Element { tensor: name, index: [n, last, r, h, c] }, index, expected, tolerance);
        }
    }
}

/// Bounds of errors, and what they grow by where any result may lose `flushed`.
fn with_flush<'a>(errors: &'a [f64], lost: &'a [f64], flushed: f64) -> impl Iterator<Item = f64> + 'a {
    errors.iter().zip(lost).map(move |(error, lost)| if flushed > 0.0 { error + flushed * lost } else { *error })
}

/// Number of an element in a packed tensor.
fn place(shape: [usize; 4], at: [usize; 4]) -> usize {
    shape.into_iter().zip(at).fold(0, |place, (size, i)| place * size + i)
}

/// The call's block that holds stream n's token in row `row`.
fn block_of(case: &CaseFile, n: usize, row: usize) -> usize {
    let b = case.shape.block_len();
    ((case.start[n] % b as u64) as usize + row) / b
}

/// The segments that are written: the call's block i, and its first token's row in q, k and v.
pub(crate) fn whole_segments(case: &CaseFile, n: usize) -> impl Iterator<Item = (usize, usize)> + use<> {
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
            a_error: [Array::zeros(q.shape), Array::zeros(q.shape)],
            magnitude: Array::zeros(q.shape),
            shares: infini.beta.values().into_iter().map(|beta| [fam_ref::gate(beta), fam_ref::gate(-beta)]).collect(),
            m: [state(&infini.m0, d), state(&None, d), state(&None, d)],
            z: [state(&infini.z0, 1), state(&None, 1), state(&None, 1)],
            m_magnitude: state(&None, d),
            z_magnitude: state(&None, 1),
            first_spoiled: vec![vec![usize::MAX; kv_heads]; case.batch],
        };
        for (n, h) in (0..case.batch).flat_map(|n| (0..kv_heads).map(move |h| (n, h))) {
            out.look_for_others([n, h], 0);
        }
        for n in 0..case.batch {
            let mut segments = whole_segments(case, n).peekable();
            let (start, end) = (case.start[n], case.start[n] + case.lengths[n]);
            for position in start..end {
                let t = (position - start) as usize;
                for h in 0..s.heads() {
                    let kv = [n, h / s.group()];
                    let read = fam_ref::infini_retrieve(q.row(&[n, t, h]), out.m[0].row(&kv), out.z[0].row(&kv))?;
                    let [error, lost] = out.propagated(kv, q.row(&[n, t, h]), &read.a);
                    for c in 0..d {
                        out.a[[n, t, h, c]] = read.a[c];
                        out.magnitude[[n, t, h, c]] = read.magnitude[c];
                        out.a_error[0][[n, t, h, c]] = infini_read(d, read.magnitude[c], read.a[c]) + error[c];
                        out.a_error[1][[n, t, h, c]] = lost[c];
                    }
                }
                // The segment's last token: all its rows have read, now it is written.
                if (position + 1).is_multiple_of(b as u64)
                    && let Some((_, first)) = segments.next_if(|&(_, first)| first + b == t + 1)
                {
                    for h in 0..kv_heads {
                        out.write([n, h], infini.rule, first..t + 1, k, v)?;
                        out.look_for_others([n, h], t + 1);
                    }
                }
            }
        }
        Ok(out)
    }

    /// Error of σ(q)·m / σ(q)·z that comes from the errors of m and z, to first order; and by how much that grows, times a result that is lost:
    /// beside those in m and z each weight may be one, each product, and each sum.
    fn propagated(&self, kv: [usize; 2], q: &[f64], a: &[f64]) -> [Vec<f64>; 2] {
        let shift = q.iter().copied().fold(f64::NEG_INFINITY, f64::max).min(0.0);
        let sigma: Vec<f64> = q.iter().map(|&x| if shift < 0.0 { (x - shift).exp() } else { fam_ref::sigma(x) }).collect();
        let dot = |values: &[f64]| sigma.iter().zip(values).map(|(s, x)| s * x).sum::<f64>();
        let (d, den) = (a.len(), dot(self.z[0].row(&kv)));
        if den == 0.0 {
            return [vec![0.0; d], vec![0.0; d]];
        }
        let column = |m: &[f64], j: usize| (0..d).map(|c| sigma[c] * m[c * d + j]).sum::<f64>();
        let from = |state: usize| {
            let (m, z) = (self.m[state].row(&kv), dot(self.z[state].row(&kv)));
            (0..d).map(move |j| (column(m, j) + a[j].abs() * z) / den).collect::<Vec<_>>()
        };
        let (m, z) = (self.m[0].row(&kv), self.z[0].row(&kv).iter().sum::<f64>());
        let of_read =
            |j: usize| (0..d).map(|c| m[c * d + j].abs()).sum::<f64>() + a[j].abs() * z + 2.0 * d as f64 * (1.0 + a[j].abs());
        let lost = from(2).into_iter().enumerate().map(|(j, lost)| lost + of_read(j) / den).collect();
        [from(1), lost]
    }

    /// Writes one segment of one head, value and bound.
    fn write(&mut self, kv: [usize; 2], rule: InfiniRule, rows: Range<usize>, k: &Array<4>, v: &Array<4>) -> Result<()> {
        let [n, h] = kv;
        let keys: Vec<&[f64]> = rows.clone().map(|t| k.row(&[n, t, h])).collect();
        let values: Vec<&[f64]> = rows.map(|t| v.row(&[n, t, h])).collect();
        let written = fam_ref::infini_write(rule, &keys, &values, self.m[0].row(&kv), self.z[0].row(&kv))?;
        let (count, d) = (keys.len(), k.shape[3]);
        let mut carried = [vec![0.0; d * d], vec![0.0; d * d]];
        if rule == InfiniRule::Delta {
            // What delta subtracts was read from the old state, with that state's error.
            for key in &keys {
                let read = fam_ref::infini_retrieve(key, self.m[0].row(&kv), self.z[0].row(&kv))?;
                for (carried, error) in carried.iter_mut().zip(self.propagated(kv, key, &read.a)) {
                    for (i, &x) in key.iter().enumerate() {
                        (0..d).for_each(|j| carried[i * d + j] += fam_ref::sigma(x) * error[j]);
                    }
                }
            }
        }
        // The bound is linear in what a result may lose.
        let (tolerances, with_loss) = (infini_write(count, &written, 0.0), infini_write(count, &written, 1.0));
        let magnitudes = [&mut self.m_magnitude, &mut self.z_magnitude];
        let states = [&mut self.m, &mut self.z].into_iter().zip(magnitudes);
        for ((state, magnitudes), (of, with_loss)) in states.zip(tolerances.iter().zip(&with_loss)) {
            for (at, (of, with_loss)) in of.iter().zip(with_loss).enumerate() {
                state[1].row_mut(&kv)[at] += of.bound;
                state[2].row_mut(&kv)[at] += with_loss.bound - of.bound;
                magnitudes.row_mut(&kv)[at] += of.magnitude;
            }
        }
        for (errors, carried) in self.m[1..].iter_mut().zip(carried) {
            errors.row_mut(&kv).iter_mut().zip(carried).for_each(|(error, carried)| *error += carried);
        }
        self.m[0].row_mut(&kv).copy_from_slice(&written.m);
        self.z[0].row_mut(&kv).copy_from_slice(&written.z);
        Ok(())
    }

    /// Notes the first row from which on the state holds what is not finite.
    fn look_for_others(&mut self, kv: [usize; 2], row: usize) {
        let [n, h] = kv;
        let mut state = self.m[0].row(&kv).iter().chain(self.z[0].row(&kv));
        if state.any(|x| !x.is_finite()) {
            self.first_spoiled[n][h] = self.first_spoiled[n][h].min(row);
        }
    }
}
