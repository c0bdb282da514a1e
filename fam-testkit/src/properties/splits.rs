//! Properties 6 and 12: keys split and merged, and the sink as a factor.

use super::{Near, suitable};
use crate::attend::{launch, reference};
use crate::case::{Case, KeySource};
use crate::check::Element;
use crate::data::{Data, Role};
use crate::distribution::Distribution;
use crate::finite::magnitude;
use crate::guard::POISON;
use crate::harness::Harness;
use crate::launch::Stop;
use crate::merge::{self, Part};
use crate::rng::Rng;
use crate::runner::Passed;
use crate::tolerance::{Bound, Condition, Level, merged_lse, tiles};
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
    let expected = reference(&whole, &data)?.rows.ok_or_else(|| Stop::Failed("no rows".into()))?;
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
    let mut near = Near::default();
    for n in 0..whole.batch() {
        for head in 0..s.heads() {
            let at = [n, 0, 0, head];
            let c = condition(&whole, &expected, at, limits.key_tile);
            let lse_bound = bound.lse(expected.lse[at], &c);
            // Every part is as far off as the whole would be; each merge rounds, and leans on lse that are off.
            let lse_error = (merges + 1.0) * (lse_bound + merged_lse(expected.lse[at].abs() + 2.0 * c.s));
            for (x, &got) in merged.o.row(&at).iter().enumerate() {
                let (o, a) = (expected.o.row(&at)[x], expected.a.row(&at)[x]);
                let weights = bound.merged(o, [0.5, 2.0 * a], [0.5, 2.0 * a], 2.0 * c.s) * merges;
                let error = bound.o(&Condition { o, a, ..c }) + 2.0 * a * lse_error + weights;
                near.element(Element { tensor: "o", index: [n, 0, 0, head, x] }, got, o, error);
            }
            near.element(
                Element { tensor: "lse", index: [n, 0, 0, head, 0] },
                merged.lse.row(&at)[0],
                expected.lse[at],
                lse_error,
            );
        }
    }
    near.conclude(&whole)
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

fn condition(case: &Case, rows: &fam_ref::Rows, at: [usize; 4], key_tile: usize) -> Condition {
    let span = &case.spans[at[0]];
    let position = span.start + at[2] as u64;
    let keys = span.window_first(position, &case.shape)..position + 1;
    Condition {
        o: 0.0,
        a: 0.0,
        s: rows.s[at],
        sink: 0.0,
        n: rows.n[at],
        tiles: tiles(keys, case.shape.block_len(), span.mem_rows as usize, key_tile),
        d: case.shape.head_dim() as f64,
        v_max: rows.v_max[at],
    }
}

/// 12: what the kernel gives with a sink is what it gives without, times the share that the sink leaves.
pub(super) fn sink<H: Harness + ?Sized>(h: &H, seed: u64) -> Result<Passed, Stop> {
    let without = suitable(seed, |c| is_plain(c) && c.rows && !c.fused);
    let without = Case { sink: false, out_dtype: Dtype::F32, mem_rows: false, ..without };
    let with = Case { sink: true, ..without.clone() };
    let data = Data::new(&with);
    let rows = |case| launch(h, case, &data, POISON)?.rows.ok_or_else(|| Stop::Failed("no rows".into()));
    let (without_sink, with_sink) = (rows(&without)?, rows(&with)?);
    let expected = reference(&without, &data)?.rows.ok_or_else(|| Stop::Failed("no rows".into()))?;
    let limits = h.limits();
    let bound = Bound::new(Level::Hard, with.shape.dtype(), Dtype::F32, &limits);
    let mut near = Near::default();
    for place in with.places(Role::O) {
        let [n, i, r] = place.value;
        for head in 0..with.shape.heads() {
            let (at, sink) = ([n, i, r, head], data.get(Role::Sink).data[head]);
            let lse = without_sink.lse.as_ref().map_or(f64::NAN, |lse| lse.row(&at)[0]);
            let share = fam_ref::gate(lse - sink);
            let c = condition(&with, &expected, at, limits.key_tile);
            let sunk = Condition { sink: magnitude(sink), ..c };
            let lse_error = bound.lse(lse, &c);
            for (x, &got) in with_sink.o.row(&at).iter().enumerate() {
                let (o, a) = (without_sink.o.row(&at)[x], expected.a.row(&at)[x]);
                let plain = bound.o(&Condition { o, a, ..c });
                let rounded = bound.o(&Condition { o: o * share, a: a * share, ..sunk });
                let error = share * plain + rounded + share * o.abs() * lse_error;
                near.element(Element { tensor: "o", index: [n, i, r, head, x] }, got, o * share, error);
            }
        }
    }
    near.conclude(&with)
}
