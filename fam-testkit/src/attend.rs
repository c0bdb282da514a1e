//! Cases of `attend`: one joint softmax over window, memory and the current block, with the fused read of the compressive memory.

use crate::case::Case;
use crate::check::Checker;
use crate::data::{Data, Role};
use crate::distribution::Distribution;
use crate::harness::Harness;
use crate::launch::{Loaded, LoadedKeys, LoadedSpans, Region, Stop, plan};
use crate::rows::{Inputs, Problem, Read, near};
use crate::tolerance::{Level, Limits, NanReach, infini_read};
use fam_core::{Attend, Backend, Dtype, InfiniState, Result, Rows, Span};
use fam_ref::Array;

/// What a kernel returned for one group of rows: the call's values.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Group {
    /// `[N, 1, L, Hq, D]` or `[N, nb, F, Hq, D]`.
    pub o: Array<5>,
    /// `[.., Hq, 1]`.
    pub lse: Option<Array<5>>,
}

/// What a kernel returned.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Outputs {
    pub rows: Option<Group>,
    pub mem_rows: Option<Group>,
    /// The block rows' `o` before the gate, `[N, 1, L, Hq, D]`.
    pub o_local: Option<Array<5>>,
}

impl Outputs {
    /// Every array, for digests and bitwise comparison.
    pub fn arrays(&self) -> impl Iterator<Item = &Array<5>> {
        let groups = self.rows.iter().chain(&self.mem_rows).flat_map(|g| std::iter::once(&g.o).chain(&g.lse));
        groups.chain(&self.o_local)
    }
}

/// Runs the case on `data`, with `fill` in every byte that the call may not see.
pub(crate) fn launch<H: Harness + ?Sized>(h: &H, case: &Case, data: &Data, fill: u8) -> Result<Outputs, Stop> {
    let plan = plan(h, &case.spec()?)?;
    let input = |role| Loaded::input(h, case, data, role, fill);
    let output = |role| Loaded::result(h, case, role);

    let keys = LoadedKeys::new(h, case, data, &plan, fill)?;
    let spans = LoadedSpans::new(h, case)?;
    let mem = (case.shape.mem_len() > 0).then(|| Ok::<_, Stop>([input(Role::MemK)?, input(Role::MemV)?])).transpose()?;
    let sink = case.sink.then(|| input(Role::Sink)).transpose()?;
    let infini = case
        .fused
        .then(|| Ok::<_, Stop>([input(Role::InfiniQ)?, input(Role::M)?, input(Role::Z)?, input(Role::Beta)?]))
        .transpose()?;
    let group = |is_present: bool, q, o, lse| {
        let lse = || case.lse.then(|| output(lse)).transpose();
        is_present.then(|| Ok::<_, Stop>((input(q)?, output(o)?, lse()?))).transpose()
    };
    let mut rows = group(case.rows, Role::Q, Role::O, Role::Lse)?;
    let mut mem_rows = group(case.mem_rows, Role::MemQ, Role::MemO, Role::MemLse)?;
    let mut o_local = (case.fused && case.rows && case.o_local).then(|| output(Role::OLocal)).transpose()?;
    let mut scratch = Region::scratch(h, &plan)?;

    h.run(&mut |queue| {
        let mut args = Attend::new(spans.spans(), keys.keys());
        if let Some((q, o, lse)) = &mut rows {
            args = args.rows(with_lse(Rows::new(q.view(), o.view_mut()), lse));
        }
        if let Some((q, o, lse)) = &mut mem_rows {
            args = args.mem_rows(with_lse(Rows::new(q.view(), o.view_mut()), lse));
        }
        if let Some([k, v]) = &mem {
            args = args.mem(k.view(), v.view());
        }
        if let Some(sink) = &sink {
            args = args.sink(sink.view());
        }
        if let Some([q, m, z, beta]) = &infini {
            args = args.infini(InfiniState { q: q.view(), m: m.view(), z: z.view(), beta: beta.view() });
        }
        if let Some(o_local) = &mut o_local {
            args = args.o_local(o_local.view_mut());
        }
        h.backend().attend(&plan, queue, args, scratch.mem_mut())
    })?;

    keys.check(h)?;
    spans.check(h)?;
    scratch.check(h)?;
    let inputs = mem.iter().flatten().chain(&sink).chain(infini.iter().flatten());
    inputs.chain([&rows, &mem_rows].into_iter().flatten().map(|(q, ..)| q)).try_for_each(|input| input.check(h))?;
    let finish = |group: Option<(_, Loaded<H>, Option<Loaded<H>>)>, o_role, lse_role| {
        let Some((_, o, lse)) = group else { return Ok::<_, Stop>(None) };
        let o = o.values(h, case, o_role)?;
        let lse = lse.map(|lse| lse.values(h, case, lse_role)).transpose()?;
        Ok(Some(Group { o, lse }))
    };
    let o_local = o_local.map(|o_local| o_local.values(h, case, Role::OLocal)).transpose()?;
    Ok(Outputs { rows: finish(rows, Role::O, Role::Lse)?, mem_rows: finish(mem_rows, Role::MemO, Role::MemLse)?, o_local })
}

fn with_lse<'a, H: Harness + ?Sized>(
    rows: Rows<'a, crate::harness::Mem<H>>,
    lse: &'a mut Option<Loaded<H>>,
) -> Rows<'a, crate::harness::Mem<H>> {
    match lse {
        Some(lse) => rows.lse(lse.view_mut()),
        None => rows,
    }
}

/// The case as a problem, with the reference's answer.
pub(crate) fn problem(case: &Case, data: &Data) -> Result<Problem> {
    Problem::new(inputs(case, data))
}

/// The case as the reference is asked it.
pub(crate) fn inputs(case: &Case, data: &Data) -> Inputs {
    // Keys before the first visible one are not stored: to the reference they do not exist.
    let spans = case.spans.iter().map(|s| Span { origin: case.first_key(s), ..*s });
    Inputs {
        shape: case.shape,
        spans: spans.collect(),
        q: case.rows.then(|| data.tokens(Role::Q)),
        mem_q: case.mem_rows.then(|| data.get(Role::MemQ).clone()),
        k: data.tokens(Role::K),
        v: data.tokens(Role::V),
        mem: Some([Role::MemK, Role::MemV].map(|role| data.get(role).clone())),
        sink: case.sink.then(|| data.get(Role::Sink).data.clone()),
    }
}

/// Holds a kernel's outputs against the reference.
pub(crate) fn check<'a>(case: &Case, data: &Data, outputs: &Outputs, level: Level, limits: &'a Limits) -> Result<Checker<'a>> {
    let mut checker = Checker::new(level, case.shape.dtype(), case.out_dtype, limits);
    // Before the gate nothing is rounded to the output's type.
    let mut before_gate = Checker::new(level, case.shape.dtype(), Dtype::F32, limits);
    let problem = problem(case, data)?;
    let reads = case.fused.then(|| Reads::new(case, data));
    let counts_for_bias = !matches!(case.distribution, Distribution::NonFinite | Distribution::Denormals);
    for (is_memory, got) in [(false, &outputs.rows), (true, &outputs.mem_rows)] {
        let (Some(got), Some(rows)) = (got, problem.rows(is_memory)) else { continue };
        let [tensor, lse_tensor] = if is_memory { ["mem_o", "mem_lse"] } else { ["o", "lse"] };
        for at in problem.indices(is_memory) {
            let row = problem.row(is_memory, rows, at, limits);
            let read = reads.as_ref().filter(|_| !is_memory).map(|reads| reads.row(at, limits)).transpose()?;
            checker.row(tensor, &row, read.as_ref(), got.o.row(&at), None);
            if let (false, Some(o_local)) = (is_memory, &outputs.o_local) {
                before_gate.row("o_local", &row, None, o_local.row(&at), None);
            }
            if counts_for_bias && read.is_none() {
                checker.rounding(&row, got.o.row(&at));
            }
            if let Some(lse) = &got.lse {
                checker.lse(lse_tensor, &row, lse.row(&at)[0], None);
            }
        }
    }
    checker.tally.add(&before_gate.tally);
    Ok(checker)
}

/// Reads of the compressive memory by the reference.
pub(crate) struct Reads<'a> {
    case: &'a Case,
    q: &'a Array<5>,
    z: &'a Array<5>,
    /// `m` of `[n, i, kv head]` as one matrix.
    m: Vec<Vec<f64>>,
    beta: &'a [f64],
}

impl<'a> Reads<'a> {
    pub fn new(case: &'a Case, data: &'a Data) -> Self {
        let m = data.get(Role::M);
        let [batch, blocks, d, kv_heads, _] = m.shape;
        let mut matrices = Vec::with_capacity(batch * blocks * kv_heads);
        for n in 0..batch {
            for i in 0..blocks {
                for h in 0..kv_heads {
                    matrices.push((0..d).flat_map(|r| m.row(&[n, i, r, h])).copied().collect());
                }
            }
        }
        Reads { case, q: data.get(Role::InfiniQ), z: data.get(Role::Z), m: matrices, beta: &data.get(Role::Beta).data }
    }

    /// The block of the call that holds a position of stream n.
    fn block(&self, n: usize, position: u64) -> usize {
        let shape = &self.case.shape;
        (shape.block(position) - shape.block(self.case.spans[n].start)) as usize
    }

    /// m and z before block i of stream n.
    fn entry(&self, n: usize, i: usize, kv: usize) -> (&[f64], &[f64]) {
        let [_, blocks, _, kv_heads, _] = self.z.shape;
        (&self.m[(n * blocks + i) * kv_heads + kv], self.z.row(&[n, i, 0, kv]))
    }

    /// What the block row `[n, _, r, h]` sees: its block, and m and z before it.
    pub fn state(&self, [n, _, r, h]: [usize; 4]) -> (usize, &[f64], &[f64]) {
        let i = self.block(n, self.case.spans[n].start + r as u64);
        let (m, z) = self.entry(n, i, h / self.case.shape.group());
        (i, m, z)
    }

    /// What the block row `[n, _, r, h]` reads.
    pub fn row(&self, at @ [n, _, r, h]: [usize; 4], limits: &Limits) -> Result<Read> {
        let (shape, span) = (&self.case.shape, &self.case.spans[n]);
        let (_, m, z) = self.state(at);
        let fam_ref::Retrieved { a, magnitude } = fam_ref::infini_retrieve(self.q.row(&[n, 0, r, h]), m, z)?;
        let rows = near(span, r);
        let loads_others = || {
            let mut states = self.block(n, rows.start)..self.block(n, rows.end - 1) + 1;
            let spoilt = |(m, z): (&[f64], &[f64])| m.iter().chain(z).any(|x| !x.is_finite());
            states.any(|i| spoilt(self.entry(n, i, h / shape.group())))
        };
        let may_be_nan = limits.nan != NanReach::Rows && loads_others();
        let error = a.iter().zip(&magnitude).map(|(a, magnitude)| infini_read(shape.head_dim(), *magnitude, *a)).collect();
        let beta = self.beta[h];
        Ok(Read { shares: [fam_ref::gate(beta), fam_ref::gate(-beta)], a, error, magnitude, may_be_nan })
    }
}
