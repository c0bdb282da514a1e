//! Cases of `append`: what enters the ring comes back from it, and nothing else in it moves.

use crate::case::Case;
use crate::check::{Element, Wrong};
use crate::data::{Data, Place, Role};
use crate::guard::{CANARY, POISON, Tensor, arrange};
use crate::harness::Harness;
use crate::launch::{Loaded, LoadedSpans, Stop, digest, fill_ring, plan};
use crate::rng::Rng;
use crate::runner::Passed;
use fam_core::{Append, Backend, Device, Plan, ReadRing, Span, Spans};
use std::borrow::BorrowMut;

/// Runs one case.
pub(crate) fn run<H: Harness + ?Sized>(h: &H, case: &Case) -> Result<Passed, Stop> {
    let data = Data::new(case);
    let tokens = tokens(h, case, &data)?;
    let memory = memory_rows(h, case, &data)?;
    Ok(Passed { digest: tokens ^ memory.rotate_left(1), ..Passed::default() })
}

/// Appends the case's chunks, then reads every live token back.
fn tokens<H: Harness + ?Sized>(h: &H, case: &Case, data: &Data) -> Result<u64, Stop> {
    let plan = plan(h, &case.spec()?)?;
    let k = Loaded::input(h, case, data, Role::K, POISON)?;
    let v = Loaded::input(h, case, data, Role::V, POISON)?;
    let before = vec![CANARY; plan.support().ring_bytes as usize];
    let mut ring = h.upload(&before)?;
    fill_ring(h, case, &plan, (&k, &v), &mut ring)?;

    // Slots that are not in the call keep every byte.
    let after = h.download(&ring, before.len())?;
    let slot_bytes = before.len() / case.slots.max(1);
    for slot in 0..case.slots {
        let is_used = case.spans.iter().any(|s| s.slot as usize == slot && s.len > 0);
        let range = slot * slot_bytes..(slot + 1) * slot_bytes;
        if !is_used && before[range.clone()] != after[range] {
            return Err(Stop::Failed(format!("ring: slot {slot}, which is in no call, was written")));
        }
    }

    // The call's last tokens, as many as the plan serves: all of them are live.
    let spans: Vec<Span> = case
        .spans
        .iter()
        .map(|s| {
            let first = s.end().saturating_sub(case.plan_rows as u64).max(s.start);
            Span { start: first, len: (s.end() - first) as u32, mem_rows: 0, ..*s }
        })
        .collect();
    let s = &case.shape;
    let mut rng = Rng::of(case.seed, "read_ring");
    let mut output = || {
        let shape = [case.batch(), 1, case.plan_rows, s.kv_heads(), s.head_dim()];
        Loaded::output(h, arrange(case.strides, s.kv_dtype(), shape, true, &mut rng))
    };
    let (mut to_k, mut to_v) = (output()?, output()?);
    h.run(&mut |queue| {
        let ring = std::borrow::Borrow::borrow(&ring);
        let args = ReadRing::new(Spans::Host(&spans), ring, to_k.view_mut(), to_v.view_mut());
        h.backend().read_ring(&plan, queue, args)
    })?;
    let rows = || spans.iter().enumerate().flat_map(|(n, s)| (0..s.len as usize).map(move |r| [n, 0, r]));
    let (to_k, to_v) = (to_k.finish(h, "k", rows())?, to_v.finish(h, "v", rows())?);
    for (tensor, got, role) in [("k", &to_k, Role::K), ("v", &to_v, Role::V)] {
        let values = data.get(role);
        for [n, i, r] in rows() {
            let row = (spans[n].start - case.first_key(&case.spans[n])) as usize + r;
            for head in 0..s.kv_heads() {
                same_row(tensor, got, [n, i, r, head], values.row(&[n, 0, row, head]))?;
            }
        }
    }
    Ok(fam_core_digest(&after))
}

/// Appends memory rows to a buffer whose layout is ours.
fn memory_rows<H: Harness + ?Sized>(h: &H, case: &Case, data: &Data) -> Result<u64, Stop> {
    // Blocks that share an entry would race for it.
    if case.mem_entries < case.blocks() {
        return Ok(0);
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
        Loaded::new(h, tensor)
    };
    let (k, v) = (source(Role::MemK)?, source(Role::MemV)?);
    let output = |role| {
        let mut layout = case.layout(role);
        // As an input it may repeat rows; as the destination it may not.
        if layout.stride.contains(&0) {
            layout = fam_core::Layout::packed(layout.dtype, layout.shape);
        }
        Loaded::output(h, layout)
    };
    let (mut to_k, mut to_v) = (output(Role::MemK)?, output(Role::MemV)?);
    let spans = LoadedSpans::new(h, case)?;
    let mut scratch = h.poisoned(plan.support().scratch_bytes)?;
    h.run(&mut |queue| {
        let args = Append::new(spans.spans()).mem_rows(k.view(), v.view(), to_k.view_mut(), to_v.view_mut());
        h.backend().append(&plan, queue, args, scratch.borrow_mut())
    })?;
    let mut arrays = Vec::new();
    for (name, got, role) in [("to_k", to_k, Role::MemK), ("to_v", to_v, Role::MemV)] {
        let places = case.places(role);
        let got = got.finish(h, name, places.iter().map(|p| p.tensor))?;
        let values = data.get(role);
        for Place { value: [n, i, r], tensor: [tn, ti, tr] } in places {
            for head in 0..s.kv_heads() {
                same_row(name, &got, [tn, ti, tr, head], values.row(&[n, i, r, head]))?;
            }
        }
        arrays.push(values.clone());
    }
    Ok(digest(arrays.iter()))
}

fn same_row(tensor: &'static str, got: &Tensor, at: [usize; 4], expected: &[f64]) -> Result<(), Stop> {
    let mut row = vec![0.0; expected.len()];
    got.get(at, &mut row);
    for (c, (got, expected)) in row.into_iter().zip(expected).enumerate() {
        if got.to_bits() != expected.to_bits() && !(got.is_nan() && expected.is_nan()) {
            let [n, i, r, h] = at;
            let at = Element { tensor, index: [n, i, r, h, c] };
            return Err(Stop::Failed(Wrong { at, got, expected: *expected, bound: 0.0 }.to_string()));
        }
    }
    Ok(())
}

fn fam_core_digest(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, b| (hash ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3))
}
