//! Cases of `attend`: one joint softmax over window, memory and the current block, with the fused read of the compressive memory.

use crate::case::Case;
use crate::check::{Checker, RowCheck};
use crate::data::{Data, Role};
use crate::distribution::Distribution;
use crate::finite::Finite;
use crate::harness::Harness;
use crate::launch::{Loaded, LoadedKeys, LoadedSpans, Stop, plan};
use crate::tolerance::{Condition, Level, Limits, infini_read, tiles};
use fam_core::{Attend, Backend, InfiniState, Plan, Result, Rows, Span};
use fam_ref::Array;
use std::borrow::BorrowMut;

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
}

impl Outputs {
    /// Every array, for digests and bitwise comparison.
    pub fn arrays(&self) -> impl Iterator<Item = &Array<5>> {
        self.rows.iter().chain(&self.mem_rows).flat_map(|g| std::iter::once(&g.o).chain(&g.lse))
    }
}

/// Runs the case on `data`, with `fill` in every byte that the call may not see.
pub(crate) fn launch<H: Harness + ?Sized>(h: &H, case: &Case, data: &Data, fill: u8) -> Result<Outputs, Stop> {
    let plan = plan(h, &case.spec()?)?;
    let input = |role| Loaded::input(h, case, data, role, fill);
    let output = |role| Loaded::output(h, case.layout(role));

    let keys = LoadedKeys::new(h, case, data, &plan, fill)?;
    let spans = LoadedSpans::new(h, case)?;
    let mem = (case.shape.mem_len() > 0).then(|| Ok::<_, Stop>((input(Role::MemK)?, input(Role::MemV)?))).transpose()?;
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
    let mut scratch = h.poisoned(plan.support().scratch_bytes)?;

    h.run(&mut |queue| {
        let mut args = Attend::new(spans.spans(), keys.keys());
        if let Some((q, o, lse)) = &mut rows {
            args = args.rows(with_lse(Rows::new(q.view(), o.view_mut()), lse));
        }
        if let Some((q, o, lse)) = &mut mem_rows {
            args = args.mem_rows(with_lse(Rows::new(q.view(), o.view_mut()), lse));
        }
        if let Some((k, v)) = &mem {
            args = args.mem(k.view(), v.view());
        }
        if let Some(sink) = &sink {
            args = args.sink(sink.view());
        }
        if let Some([q, m, z, beta]) = &infini {
            args = args.infini(InfiniState { q: q.view(), m: m.view(), z: z.view(), beta: beta.view() });
        }
        h.backend().attend(&plan, queue, args, scratch.borrow_mut())
    })?;

    let finish = |group: Option<(_, Loaded<H>, Option<Loaded<H>>)>, o_role, lse_role, [o_name, lse_name]: [&str; 2]| {
        let Some((_, o, lse)) = group else { return Ok::<_, Stop>(None) };
        let o = o.values(h, case, o_role, o_name)?;
        let lse = lse.map(|lse| lse.values(h, case, lse_role, lse_name)).transpose()?;
        Ok(Some(Group { o, lse }))
    };
    Ok(Outputs {
        rows: finish(rows, Role::O, Role::Lse, ["o", "lse"])?,
        mem_rows: finish(mem_rows, Role::MemO, Role::MemLse, ["mem_o", "mem_lse"])?,
    })
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

/// The reference's answer to a case.
pub(crate) fn reference(case: &Case, data: &Data) -> Result<fam_ref::Attended> {
    // Keys before the first visible one are not stored: to the reference they do not exist.
    let spans: Vec<Span> = case.spans.iter().map(|s| Span { origin: case.first_key(s), ..*s }).collect();
    let (q, k, v) = (data.tokens(Role::Q), data.tokens(Role::K), data.tokens(Role::V));
    fam_ref::attend(&fam_ref::Attend {
        shape: &case.shape,
        spans: &spans,
        q: case.rows.then_some(&q),
        mem_q: case.mem_rows.then(|| data.get(Role::MemQ)),
        k: &k,
        v: &v,
        mem_k: Some(data.get(Role::MemK)),
        mem_v: Some(data.get(Role::MemV)),
        sink: case.sink.then(|| data.get(Role::Sink).data.as_slice()),
    })
}

/// Holds a kernel's outputs against the reference.
pub(crate) fn check<'a>(case: &Case, data: &Data, outputs: &Outputs, level: Level, limits: &'a Limits) -> Result<Checker<'a>> {
    let mut checker = Checker::new(level, case.shape.dtype(), case.out_dtype, limits);
    let expected = reference(case, data)?;
    if let (Some(got), Some(rows)) = (&outputs.rows, &expected.rows) {
        let read = case.fused.then(|| Reads::new(case, data));
        check_group(case, data, &mut checker, Role::O, got, rows, read.as_ref())?;
    }
    if let (Some(got), Some(rows)) = (&outputs.mem_rows, &expected.mem_rows) {
        check_group(case, data, &mut checker, Role::MemO, got, rows, None)?;
    }
    Ok(checker)
}

fn check_group(
    case: &Case,
    data: &Data,
    checker: &mut Checker<'_>,
    role: Role,
    got: &Group,
    expected: &fam_ref::Rows,
    read: Option<&Reads<'_>>,
) -> Result<()> {
    let shape = &case.shape;
    let (b, d) = (shape.block_len(), shape.head_dim());
    let is_memory = role == Role::MemO;
    let [tensor, lse_tensor] = if is_memory { ["mem_o", "mem_lse"] } else { ["o", "lse"] };
    let visible = Visible::new(case, data);
    let q = data.get(if is_memory { Role::MemQ } else { Role::Q });
    let key_tile = checker.limits.key_tile;
    for place in case.places(role) {
        let [n, i, r] = place.value;
        let span = &case.spans[n];
        let keys = if is_memory {
            span.block_keys(i, b)
        } else {
            let position = span.start + r as u64;
            span.window_first(position, shape)..position + 1
        };
        let tiles = tiles(keys, b, span.mem_rows as usize, key_tile);
        for h in 0..shape.heads() {
            let at = [n, i, r, h];
            // −inf is no sink.
            let sink = case.sink.then(|| data.get(Role::Sink).data[h]).filter(|sink| *sink > f64::NEG_INFINITY);
            let seen = visible.of(n, h / shape.group());
            let v_max = expected.v_max[at];
            let s = expected.s[at];
            let s = if case.distribution.has_exact_logits() {
                40.0
            } else {
                seen.filter(|_| !s.is_finite()).map_or(s, |seen| seen.s(q.row(&at), case.scale()))
            };
            let (o, a) = (expected.o.row(&at), expected.a.row(&at));
            let lse = expected.lse[at];
            let is_hidden = expected.s[at].is_infinite() && a.iter().all(|a| *a == 0.0);
            let condition = Condition {
                o: 0.0,
                a: 0.0,
                s,
                sink: sink.unwrap_or(0.0).abs(),
                n: expected.n[at],
                tiles,
                d: d as f64,
                v_max: seen.filter(|_| !v_max.is_finite()).map_or(v_max, |seen| seen.v_max),
            };
            let row = RowCheck {
                tensor,
                lse_tensor,
                index: at,
                got: got.o.row(&at),
                o,
                a,
                lse: got.lse.as_ref().map(|got| (got[[n, i, r, h, 0]], lse)),
                condition,
                is_empty: lse == f64::NEG_INFINITY || (is_hidden && sink == Some(lse)),
                is_copy: expected.n[at] == 1.0 && sink.is_none() && lse.is_finite(),
                sees_poisoned_tile: seen.is_some_and(|seen| seen.has_others),
                counts_for_bias: !matches!(case.distribution, Distribution::NonFinite | Distribution::Denormals),
            };
            match read {
                None => checker.row(&row),
                Some(read) => check_gated(checker, &row, read, (span.start + r as u64) / b as u64 - span.start / b as u64)?,
            }
        }
    }
    Ok(())
}

/// A row whose local attention is gated with what the compressive memory holds.
fn check_gated(checker: &mut Checker<'_>, row: &RowCheck<'_>, read: &Reads<'_>, block: u64) -> Result<()> {
    let [n, i, r, h] = row.index;
    let g = fam_ref::gate(read.beta[h]);
    let retrieved = read.row([n, block as usize, r, h])?;
    for (c, &got) in row.got.iter().enumerate() {
        let at = crate::check::Element { tensor: row.tensor, index: [n, i, r, h, c] };
        let (a, local) = (retrieved.a[c], row.o[c]);
        let a_error = infini_read(row.got.len(), retrieved.magnitude[c], a);
        let local_error = checker.bound.o_f32(&Condition { o: local, a: row.a[c], ..row.condition });
        let bound = checker.bound.gated(g, [a, a_error], [local, local_error]);
        checker.element(at, got, g * a + (1.0 - g) * local, bound);
    }
    checker.lse(row);
    Ok(())
}

/// Reads of the compressive memory by the reference.
pub(crate) struct Reads<'a> {
    case: &'a Case,
    q: &'a Array<5>,
    z: &'a Array<5>,
    /// `m` of `[n, i, kv head]` as one matrix.
    m: Vec<Vec<f64>>,
    pub beta: &'a [f64],
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

    /// σ(q)·m / σ(q)·z for the block row `r` of the call's block `i`.
    pub fn row(&self, [n, i, r, h]: [usize; 4]) -> Result<fam_ref::Retrieved> {
        let [_, blocks, _, kv_heads, _] = self.z.shape;
        let kv = h / self.case.shape.group();
        let m = &self.m[(n * blocks + i) * kv_heads + kv];
        fam_ref::infini_retrieve(self.q.row(&[n, 0, r, h]), m, self.z.row(&[n, i, 0, kv]))
    }
}

/// What is finite among the keys and values that each stream and kv head sees, in cases where not all are.
struct Visible(Vec<Vec<Finite>>);

impl Visible {
    fn new(case: &Case, data: &Data) -> Self {
        if case.distribution != Distribution::NonFinite {
            return Visible(Vec::new());
        }
        let mut seen = vec![vec![Finite::new(case.shape.head_dim()); case.shape.kv_heads()]; case.batch()];
        for role in [Role::K, Role::V, Role::MemK, Role::MemV] {
            let take = if matches!(role, Role::K | Role::MemK) { Finite::key } else { Finite::value };
            let values = data.get(role);
            for place in case.places(role) {
                let [n, i, r] = place.value;
                seen[n].iter_mut().enumerate().for_each(|(h, seen)| take(seen, values.row(&[n, i, r, h])));
            }
        }
        Visible(seen)
    }

    fn of(&self, n: usize, kv_head: usize) -> Option<&Finite> {
        self.0.get(n).map(|heads| &heads[kv_head])
    }
}
