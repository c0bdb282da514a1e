//! Cases of `append`: what enters the ring comes back from it, and nothing else in it moves.

use crate::case::Case;
use crate::check::{Element, Wrong};
use crate::data::{Chunk, Data, Place, Role};
use crate::guard::{CANARY, POISON, Tensor, arrange};
use crate::harness::Harness;
use crate::launch::{Loaded, LoadedSpans, PlanOf, Region, Stop, digest, fill_ring, plan};
use crate::rng::Rng;
use crate::runner::Passed;
use fam_core::{Append, Backend, Device, Plan, ReadRing, Span, Spans};
use fam_ref::Array;
use std::ops::Range;

/// Runs one case.
pub(crate) fn run<H: Harness + ?Sized>(h: &H, case: &Case) -> Result<Passed, Stop> {
    let data = Data::new(case);
    let mut arrays = tokens(h, case, &data)?;
    arrays.extend(memory_rows(h, case, &data)?);
    Ok(Passed { digest: digest(arrays.iter()), ..Passed::default() })
}

/// Appends the case's chunks, then reads every token that is in a ring back.
fn tokens<H: Harness + ?Sized>(h: &H, case: &Case, data: &Data) -> Result<Vec<Array<5>>, Stop> {
    let plan = plan(h, &case.spec()?)?;
    let k = Loaded::input(h, case, data, Role::K, POISON)?;
    let v = Loaded::input(h, case, data, Role::V, POISON)?;
    let mut ring = Region::new(h, "ring", plan.support().ring_bytes, CANARY)?;
    fill_ring(h, case, &plan, [&k, &v], &mut ring)?;

    // Slots that are not in the call keep every byte.
    let after = ring.download(h)?;
    for (slot, page) in after.chunks_exact((after.len() / case.slots.max(1)).max(1)).enumerate() {
        let is_used = case.spans.iter().any(|s| s.slot as usize == slot && s.len > 0);
        if !is_used && page.iter().any(|byte| *byte != CANARY) {
            return Err(Stop::Failed(format!("ring: slot {slot}, which is in no call, was written")));
        }
    }

    let got = read_back(h, case, &plan, &ring)?;
    let mut expected = vec![0.0; case.shape.head_dim()];
    for (got, source) in got.iter().zip([&k, &v]) {
        for (n, span) in case.spans.iter().enumerate() {
            let held = held(case, span);
            for (c, chunk) in case.chunks(span).into_iter().enumerate() {
                for x in (0..u64::from(chunk.len)).filter(|x| held.contains(&(chunk.start + x))) {
                    for head in 0..case.shape.kv_heads() {
                        source.host.get([n, 0, c * case.plan_rows + x as usize, head], &mut expected);
                        let at = [n, 0, (chunk.start + x - held.start) as usize, head];
                        same_row(source.name, at, got.row(&at), &expected)?;
                    }
                }
            }
        }
    }
    Ok(got.into())
}

/// Positions of a stream that are in its ring: the last, as many as it has rows, of those that were appended.
fn held(case: &Case, span: &Span) -> Range<u64> {
    let first = case.chunks(span).first().map_or(span.end(), |chunk| chunk.start);
    first.max(span.end().saturating_sub(case.ring_rows() as u64))..span.end()
}

/// Every token in the rings of the call's streams, k and v as `[N, 1, C, Hkv, D]` in the order of positions.
fn read_back<H: Harness + ?Sized>(h: &H, case: &Case, plan: &PlanOf<H>, ring: &Region<H>) -> Result<[Array<5>; 2], Stop> {
    let s = &case.shape;
    let mut values = [(); 2].map(|()| Array::zeros([case.batch(), 1, case.ring_rows(), s.kv_heads(), s.head_dim()]));
    let held: Vec<_> = case.spans.iter().map(|span| held(case, span)).collect();
    let pieces: Vec<_> = held.iter().map(|positions| case.pieces(positions.clone())).collect();
    let mut rng = Rng::of(case.seed, "read_ring");
    for call in 0..pieces.iter().map(Vec::len).max().unwrap_or(0) {
        let spans: Vec<Span> = case
            .spans
            .iter()
            .zip(&pieces)
            .map(|(span, pieces)| {
                let piece = pieces.get(call).copied().unwrap_or(Chunk { start: span.start, len: 0 });
                Span { start: piece.start, len: piece.len, mem_rows: 0, ..*span }
            })
            .collect();
        let mut output = |name| {
            let shape = [case.batch(), 1, case.plan_rows, s.kv_heads(), s.head_dim()];
            Loaded::output(h, name, arrange(case.strides, s.kv_dtype(), shape, true, &mut rng))
        };
        let (mut to_k, mut to_v) = (output("k")?, output("v")?);
        h.run(&mut |queue| {
            let args = ReadRing::new(Spans::Host(&spans), ring.mem(), to_k.view_mut(), to_v.view_mut());
            h.backend().read_ring(plan, queue, args)
        })?;
        let rows = || spans.iter().enumerate().flat_map(|(n, s)| (0..s.len as usize).map(move |r| [n, 0, r]));
        for (values, loaded) in values.iter_mut().zip([to_k, to_v]) {
            let tensor = loaded.finish(h, rows())?;
            for [n, i, r] in rows() {
                let row = (spans[n].start - held[n].start) as usize + r;
                (0..s.kv_heads()).for_each(|head| tensor.get([n, i, r, head], values.row_mut(&[n, 0, row, head])));
            }
        }
    }
    Ok(values)
}

/// Appends memory rows to a buffer whose layout is ours.
fn memory_rows<H: Harness + ?Sized>(h: &H, case: &Case, data: &Data) -> Result<Vec<Array<5>>, Stop> {
    // Blocks that share an entry would race for it.
    if case.mem_entries < case.blocks() {
        return Ok(Vec::new());
    }
    let plan = plan(h, &case.spec()?)?;
    let s = &case.shape;
    let mut rng = Rng::of(case.seed, "new memory rows");
    let mut source = |role| {
        let values = data.get(role);
        let [n, ..] = values.shape;
        let mut shape = values.shape;
        if case.device_spans {
            (shape[1], shape[2]) = (case.plan_blocks, s.mem_len());
        }
        let strides = if case.strides == crate::Strides::Broadcast { crate::Strides::Padded } else { case.strides };
        let mut tensor = Tensor::new(arrange(strides, s.dtype(), shape, false, &mut rng), POISON);
        for n in 0..n {
            let span = &case.spans[n];
            for (i, r) in (0..span.blocks(s.block_len()).max(1)).flat_map(|i| (0..span.mem_rows as usize).map(move |r| (i, r))) {
                for head in 0..s.kv_heads() {
                    tensor.put([n, i, r, head], values.row(&[n, i, r, head]));
                }
            }
        }
        Loaded::new(h, role.name(), tensor)
    };
    let (k, v) = (source(Role::MemK)?, source(Role::MemV)?);
    let output = |role| {
        let mut layout = case.layout(role);
        // As an input it may repeat rows; as the destination it may not.
        if layout.stride.contains(&0) {
            layout = fam_core::Layout::packed(layout.dtype, layout.shape);
        }
        Loaded::output(h, role.name(), layout)
    };
    let (mut to_k, mut to_v) = (output(Role::MemK)?, output(Role::MemV)?);
    let spans = LoadedSpans::new(h, case)?;
    let mut scratch = Region::scratch(h, &plan)?;
    h.run(&mut |queue| {
        let args = Append::new(spans.spans()).mem_rows(k.view(), v.view(), to_k.view_mut(), to_v.view_mut());
        h.backend().append(&plan, queue, args, scratch.mem_mut())
    })?;
    [&k, &v].into_iter().try_for_each(|input| input.check(h))?;
    spans.check(h)?;
    scratch.check(h)?;
    [(to_k, Role::MemK), (to_v, Role::MemV)]
        .into_iter()
        .map(|(loaded, role)| {
            let (got, expected) = (loaded.values(h, case, role)?, data.get(role));
            for Place { value: [n, i, r], .. } in case.places(role) {
                for at in (0..s.kv_heads()).map(|head| [n, i, r, head]) {
                    same_row(role.name(), at, got.row(&at), expected.row(&at))?;
                }
            }
            Ok(got)
        })
        .collect()
}

fn same_row(tensor: &'static str, [n, i, r, h]: [usize; 4], got: &[f64], expected: &[f64]) -> Result<(), Stop> {
    for (c, (&got, &expected)) in got.iter().zip(expected).enumerate() {
        if got.to_bits() != expected.to_bits() && !(got.is_nan() && expected.is_nan()) {
            let at = Element { tensor, index: [n, i, r, h, c] };
            return Err(Stop::Failed(Wrong { at, got, expected, bound: 0.0 }.to_string()));
        }
    }
    Ok(())
}
