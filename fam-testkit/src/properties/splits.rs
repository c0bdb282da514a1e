//! Properties 6 and 12: keys split and merged, and the sink as a factor.

use super::{conclude, suitable};
use crate::attend::{launch, problem};
use crate::case::{Case, KeySource};
use crate::check::{Element, Tally};
use crate::data::{Data, Role};
use crate::distribution::Distribution;
use crate::distribution::exp2;
use crate::finite::magnitude;
use crate::guard::POISON;
use crate::harness::Harness;
use crate::launch::Stop;
use crate::merge::{self, Part};
use crate::rng::Rng;
use crate::runner::Passed;
use crate::tolerance::{Bound, Condition, Level, Tolerance, U32, merged_lse, tiny};
use fam_core::{Dtype, Op, Shape, Span, Window};

/// Logits that f32 rounds, so that S is what it says, and values well inside f32.
fn is_plain(case: &Case) -> bool {
    !case.distribution.has_exact_logits() && case.distribution != Distribution::Denormals
}

/// 6: one query a stream, its keys cut at two places, three calls, two merges.
pub(super) fn splits<H: Harness + ?Sized>(h: &H, seed: u64) -> Result<Passed, Stop> {
    let base = suitable(seed, |c| is_plain(c) && c.shape.infini().is_none());
    let mut rng = Rng::of(seed, "splits");
    let keys = 3 + rng.below(90) as u64;
    let mut cuts = [1 + rng.below(keys as usize - 2) as u64, 1 + rng.below(keys as usize - 2) as u64];
    cuts.sort_unstable();
    let s = &base.shape;
    let builder = Shape::builder().heads(s.heads()).kv_heads(s.kv_heads()).head_dim(s.head_dim());
    let shape =
        builder.block_len(s.block_len()).window(Window::Tokens(keys as usize)).dtype(s.dtype()).scale(s.scale()).build()?;
    // A query has no position: the same one ends each part.
    let part = |first: u64, end: u64| Case {
        shape,
        spans: (0..base.batch() as u32).map(|n| Span::new(n, end - 1, 1).with_origin(first)).collect(),
        slots: base.batch(),
        plan_rows: 1,
        plan_blocks: 1,
        mem_entries: 1,
        keys: KeySource::Linear,
        stale: 0,
        rows: true,
        mem_rows: false,
        sink: false,
        fused: false,
        out_dtype: Dtype::F32,
        ..base.clone()
    };
    let whole = part(0, keys);
    let data = Data::new(&whole);
    let problem = problem(&whole, &data)?;
    let expected = problem.rows(false).ok_or_else(|| Stop::Failed("no rows".into()))?;
    let mut parts = Vec::new();
    for [first, end] in [[0, cuts[0]], [cuts[0], cuts[1]], [cuts[1], keys]] {
        if first < end {
            let case = part(first, end);
            let rows = launch(h, &case, &cut(&data, first, end), POISON)?.rows;
            parts.extend(rows.and_then(|g| Some(Part { o: g.o, lse: g.lse? })));
        }
    }
    let merging = Case { op: Op::Merge, part_dtypes: [Dtype::F32; 2], ..whole.clone() };
    let merges = parts.len() as f64 - 1.0;
    let mut parts = parts.into_iter();
    let mut merged = parts.next().ok_or_else(|| Stop::Failed("no parts".into()))?;
    for next in parts {
        let (o, lse) = merge::launch(h, &merging, &mut [merged, next])?;
        merged = Part { o, lse: lse.ok_or_else(|| Stop::Failed("no lse".into()))? };
    }

    let limits = h.limits();
    let bound = Bound::new(Level::Hard, s.dtype(), Dtype::F32, &limits);
    let mut tally = Tally::default();
    for at in problem.indices(false) {
        let [n, i, r, head] = at;
        let row = problem.row(false, expected, at, &limits);
        // Parts have as many rows as the whole.
        let bound = bound.of_rows(row.is_few);
        // A part may begin inside a tile.
        let c = Condition { tiles: row.condition.tiles + 1.0, ..row.condition };
        // No lse of a part is larger than this, so no two are further apart than twice it.
        let lse_max = expected.s[at] + c.n.ln();
        let lse_error = bound.lse(lse_max, &c) + merges * merged_lse(lse_max);
        let merging = U32 * (3.0 * 2.0 * lse_max + 14.0);
        for (x, &got) in merged.o.row(&at).iter().enumerate() {
            let (o, a) = (row.o[x], row.a[x]);
            let parts = bound.o_f32(&Condition { o, a, ..c }) + U32 * a + tiny(Dtype::F32);
            let weights = 2.0 * a * lse_error;
            let merging = merges * (merging * a + exp2(-147) * c.v_max + exp2(-149));
            let tolerance = Tolerance { bound: parts + weights + merging, magnitude: a };
            tally.near(Element { tensor: "o", index: [n, i, r, head, x] }, got, o, tolerance);
        }
        let tolerance = Tolerance { bound: lse_error, magnitude: lse_max };
        tally.near(Element { tensor: "lse", index: [n, i, r, head, 0] }, merged.lse.row(&at)[0], row.lse, tolerance);
    }
    conclude(&whole, tally)
}

/// The keys of positions `first .. end`, of data whose first key is at 0.
fn cut(data: &Data, first: u64, end: u64) -> Data {
    let mut part = data.clone();
    for role in [Role::K, Role::V] {
        let values = data.get(role);
        let [n, _, _, heads, d] = values.shape;
        let mut rows = fam_ref::Array::zeros([n, 1, (end - first) as usize, heads, d]);
        for (n, r) in (0..n).flat_map(|n| (first..end).map(move |r| (n, r as usize))) {
            rows.row_mut(&[n, 0, r - first as usize]).copy_from_slice(values.row(&[n, 0, r]));
        }
        *part.get_mut(role) = rows;
    }
    part
}

/// 12: what the kernel gives with a sink is what it gives without, times the share that the sink leaves.
pub(super) fn sink<H: Harness + ?Sized>(h: &H, seed: u64) -> Result<Passed, Stop> {
    let without = suitable(seed, |c| is_plain(c) && c.rows && !c.fused);
    let without = Case { sink: false, out_dtype: Dtype::F32, mem_rows: false, ..without };
    let with = Case { sink: true, ..without.clone() };
    let data = Data::new(&with);
    let rows = |case| launch(h, case, &data, POISON)?.rows.ok_or_else(|| Stop::Failed("no rows".into()));
    let (without_sink, with_sink) = (rows(&without)?, rows(&with)?);
    let problem = problem(&without, &data)?;
    let expected = problem.rows(false).ok_or_else(|| Stop::Failed("no rows".into()))?;
    let limits = h.limits();
    let bound = Bound::new(Level::Hard, with.shape.dtype(), Dtype::F32, &limits);
    let mut tally = Tally::default();
    for at in problem.indices(false) {
        let ([n, i, r, head], sink) = (at, data.get(Role::Sink).data[at[3]]);
        let lse = without_sink.lse.as_ref().map_or(f64::NAN, |lse| lse.row(&at)[0]);
        let share = fam_ref::gate(lse - sink);
        let row = problem.row(false, expected, at, &limits);
        let bound = bound.of_rows(row.is_few);
        let sunk = Condition { sink: magnitude(sink), ..row.condition };
        let lse_error = bound.lse(lse, &row.condition);
        for (x, &got) in with_sink.o.row(&at).iter().enumerate() {
            let (o, a) = (without_sink.o.row(&at)[x], row.a[x]);
            let plain = bound.o(&Condition { o, a, ..row.condition });
            let rounded = bound.o(&Condition { o: o * share, a: a * share, ..sunk });
            let tolerance = Tolerance { bound: share * plain + rounded + share * o.abs() * lse_error, magnitude: share * a };
            tally.near(Element { tensor: "o", index: [n, i, r, head, x] }, got, o * share, tolerance);
        }
    }
    conclude(&with, tally)
}
