//! Calls that must be refused: a typed error that names the field, and not a byte written.

mod gradients;

use crate::guard::{CANARY, Tensor};
use crate::harness::{Harness, Mem, Owned};
use crate::launch::{Stop, plan};
use crate::runner::{Outcome, Passed, caught};
use fam_core::{
    Append, Attend, Backend, Dtype, Error, InfiniRule, InfiniState, InfiniWrite, Keys, Layout, Merge, Op, Partial, Plan, Result,
    Rows, Shape, Span, Spans, View, ViewMut, Window,
};
use std::borrow::{Borrow, BorrowMut};
use std::collections::BTreeMap;

// Sizes of the call that every entry of the table spoils in one place.
const N: usize = 2;
const L: usize = 6;
const HQ: usize = 4;
const HKV: usize = 2;
const D: usize = 8;
const B: usize = 4;
const F: usize = 3;
const SLOTS: usize = 3;

/// Outputs of `attend`, in the order of the table of tensors.
const OUTPUTS: [&str; 4] = ["o", "lse", "mem_o", "mem_lse"];

/// Spans and layouts of a valid call of `attend`.
struct Call {
    spans: Vec<Span>,
    tensors: Vec<(&'static str, Layout)>,
    has_mem: bool,
    has_infini: bool,
    uses_ring: bool,
    /// Bytes that ring and scratch are short of what the plan asks for.
    short: [u64; 2],
}

impl Call {
    fn valid() -> Self {
        let dtype = Dtype::F32;
        let rows = |heads, d| Layout::tokens(dtype, [N, L, heads, d]);
        let memory = |n, heads, d| Layout::packed(dtype, [n, 2, F, heads, d]);
        let keys = Layout::tokens(dtype, [SLOTS, L, HKV, D]);
        Call {
            spans: vec![Span::new(2, 0, 6).with_mem_rows(3), Span::new(0, 0, 4).with_mem_rows(1)],
            tensors: vec![
                ("q", rows(HQ, D)),
                ("o", rows(HQ, D)),
                ("lse", rows(HQ, 1)),
                ("mem_q", memory(N, HQ, D)),
                ("mem_o", memory(N, HQ, D)),
                ("mem_lse", memory(N, HQ, 1)),
                ("k", keys),
                ("v", keys),
                ("mem_k", memory(SLOTS, HKV, D)),
                ("mem_v", memory(SLOTS, HKV, D)),
                ("sink", Layout::per_head(HQ)),
                ("m", Layout::infini_m(SLOTS, 3, HKV, D)),
                ("z", Layout::infini_z(SLOTS, 3, HKV, D)),
            ],
            has_mem: true,
            has_infini: false,
            uses_ring: false,
            short: [0, 0],
        }
    }

    fn layout(&mut self, name: &str) -> &mut Layout {
        let found = self.tensors.iter_mut().find(|(n, _)| *n == name);
        &mut found.expect("the table names tensors of the call").1
    }
}

/// An entry: its name, the field that the error must name, and what it spoils.
type Entry = (&'static str, &'static str, fn(&mut Call));

const ENTRIES: [Entry; 32] = [
    ("a slot beyond the plan's", "span.slot", |c| c.spans[0].slot = 3),
    ("a slot twice", "span.slot", |c| c.spans[1].slot = 2),
    ("more memory rows than F", "span.mem_rows", |c| c.spans[0].mem_rows = 4),
    ("more tokens than planned", "tokens of a stream in a call (rows)", |c| c.spans[0].len = 9),
    ("a start before the origin", "span.origin", |c| c.spans[0].origin = 1),
    ("a start beyond half of u64", "span.start", |c| {
        (c.spans[0].start, c.spans[0].origin) = (u64::MAX / 2 + 8, u64::MAX / 2 + 8)
    }),
    ("more blocks than planned", "blocks touched by a stream in a call", |c| (c.spans[0].start, c.spans[0].origin) = (3, 3)),
    ("more streams than planned", "streams in a call (batch)", |c| c.spans.push(Span::new(1, 0, 1))),
    ("q of another dtype", "q", |c| c.layout("q").dtype = Dtype::Bf16),
    ("q with too few rows", "q", |c| c.layout("q").shape[2] = 5),
    ("q with too few streams", "q", |c| c.layout("q").shape[0] = 1),
    ("q with the wrong heads", "q", |c| c.layout("q").shape[3] = 2),
    ("q with the wrong head_dim", "q", |c| c.layout("q").shape[4] = 7),
    ("q past its buffer", "q", |c| c.layout("q").offset = 1000),
    ("strides of q that overflow", "q", |c| c.layout("q").stride[0] = usize::MAX),
    ("o that repeats elements", "o", |c| c.layout("o").stride[3] = 0),
    ("o whose rows overlap", "o", |c| c.layout("o").stride[2] = 9),
    ("o of another dtype", "o", |c| c.layout("o").dtype = Dtype::F16),
    ("lse with too few rows", "lse", |c| c.layout("lse").shape[2] = 5),
    ("lse in 16 bits", "lse", |c| c.layout("lse").dtype = Dtype::F16),
    ("mem_q with too few blocks", "mem_q", |c| c.layout("mem_q").shape[1] = 1),
    ("mem_o with too few rows", "mem_o", |c| c.layout("mem_o").shape[2] = 2),
    ("mem_lse past its buffer", "mem_lse", |c| c.layout("mem_lse").offset = 100),
    ("fewer keys than the streams have", "k", |c| c.layout("k").shape[2] = 5),
    ("keys of too few slots", "k", |c| c.layout("k").shape[0] = 2),
    ("v of another shape than k", "v", |c| c.layout("v").shape[0] = 4),
    ("memory rows without keys", "mem", |c| c.has_mem = false),
    ("mem_k with too few rows", "mem_k", |c| c.layout("mem_k").shape[2] = 2),
    ("mem_v with other entries than mem_k", "mem_v", |c| c.layout("mem_v").shape[1] = 1),
    ("a sink of other heads", "sink", |c| c.layout("sink").shape[3] = 2),
    ("a compressive memory that the shape lacks", "infini", |c| c.has_infini = true),
    ("scratch memory that is too short", "scratch", |c| c.short[1] = 1),
];

/// Calls of every op that must be refused, by name. Passed: a typed error that names the field, and outputs untouched.
pub fn invalid_calls<H: Harness + ?Sized>(h: &H) -> Vec<(&'static str, Outcome)> {
    let mut outcomes = vec![("the valid call beside them", accepted(|| attend(h, Call::valid())))];
    for (name, field, spoil) in ENTRIES {
        let mut call = Call::valid();
        spoil(&mut call);
        outcomes.push((name, refused(field, || attend(h, call))));
    }
    let mut ring = Call::valid();
    (ring.uses_ring, ring.short[0]) = (true, 1);
    outcomes.push(("a ring that is too short", refused("ring", || attend(h, ring))));
    outcomes.push(("memory rows for values of fewer entries than for keys", refused("to_v", || append(h, [4, 3]))));
    outcomes.push(("too few entries of m", refused("m", || infini_write(h, 2, 3, D))));
    outcomes.push(("z with other entries than m", refused("z", || infini_write(h, 3, 4, D))));
    outcomes.push(("z of another head_dim", refused("z", || infini_write(h, 3, 3, D - 1))));
    outcomes.push(("a part of another dtype", refused("o_a", || merge(h, Dtype::Bf16, N))));
    outcomes.push(("a part of fewer streams", refused("lse_b", || merge(h, Dtype::F32, N - 1))));
    outcomes.extend(gradients::calls(h));
    outcomes
}

/// Passes if the call does.
fn accepted(call: impl FnOnce() -> Result<(), Stop>) -> Outcome {
    caught(|| call().map(|()| Passed::default()))
}

/// Passes if the call stops with an error of the right kind about `field`.
fn refused(field: &str, call: impl FnOnce() -> Result<(), Stop>) -> Outcome {
    caught(|| match call() {
        Err(Stop::Refused(Error::Invalid { field: named, .. } | Error::LimitExceeded { what: named, .. })) if named == field => {
            Ok(Passed::default())
        }
        Err(Stop::Refused(error)) => Err(Stop::Failed(format!("an error about {field} was due, not: {error}"))),
        Err(other) => Err(other),
        Ok(()) => Err(Stop::Failed(format!("accepted; an error about {field} was due"))),
    })
}

/// The call's own error, unless a byte was written.
fn typed(result: Result<()>, is_untouched: bool) -> Result<(), Stop> {
    match result {
        Err(error) if !is_untouched => Err(Stop::Failed(format!("refused ({error}), but an output was written"))),
        other => Ok(other?),
    }
}

fn shape(infini: bool) -> Result<Shape> {
    let builder = Shape::builder().heads(HQ).kv_heads(HKV).head_dim(D).block_len(B).mem_len(F).window(Window::Blocks(1));
    if infini { builder.infini(InfiniRule::Linear).build() } else { builder.build() }
}

fn bytes(layout: &Layout) -> usize {
    layout.end_bytes().unwrap_or(0) as usize
}

/// A buffer for `layout`, full of canaries.
fn buffer<H: Harness + ?Sized>(h: &H, layout: Layout) -> Result<Owned<H>> {
    h.upload(&vec![CANARY; bytes(&layout)])
}

fn is_untouched<H: Harness + ?Sized>(h: &H, buffer: &Owned<H>, layout: &Layout) -> Result<bool> {
    Ok(h.download(buffer, bytes(layout))?.iter().all(|b| *b == CANARY))
}

fn attend<H: Harness + ?Sized>(h: &H, call: Call) -> Result<(), Stop> {
    let ops: &[Op] = if call.uses_ring { &[Op::Append, Op::Attend] } else { &[Op::Attend] };
    let plan = plan(h, &shape(false)?.spec(N, 8).blocks(2).slots(SLOTS).ops(ops).build()?)?;
    // Buffers are those of the valid call, whatever the spoilt layouts say.
    let mut buffers = BTreeMap::new();
    let mut outputs = Vec::new();
    for (name, layout) in Call::valid().tensors {
        let buffer = buffer(h, layout)?;
        if OUTPUTS.contains(&name) { outputs.push((buffer, layout)) } else { drop(buffers.insert(name, buffer)) }
    }
    let layouts: BTreeMap<&str, Layout> = call.tensors.iter().copied().collect();
    let ring = h.upload(&vec![0; plan.support().ring_bytes.saturating_sub(call.short[0]) as usize])?;
    let scratch_bytes = plan.support().scratch_bytes;
    if call.short[1] > scratch_bytes {
        return Err(Stop::Skipped("a plan without scratch memory".into()));
    }
    let mut scratch = h.upload(&vec![0; (scratch_bytes - call.short[1]) as usize])?;
    let view = |name: &str| View::<Mem<H>>::new(buffers[name].borrow(), layouts[name]);
    let result = h.run(&mut |queue| {
        let mut views =
            outputs.iter_mut().zip(OUTPUTS).map(|((buffer, _), name)| ViewMut::new(buffer.borrow_mut(), layouts[name]));
        let mut group = |q| views.next().zip(views.next()).map(|(o, lse)| Rows::new(view(q), o).lse(lse));
        let keys = if call.uses_ring { Keys::Ring(ring.borrow()) } else { Keys::Strided { k: view("k"), v: view("v") } };
        let mut args = Attend::new(Spans::Host(&call.spans), keys).sink(view("sink"));
        (args.rows, args.mem_rows) = (group("q"), group("mem_q"));
        if call.has_mem {
            args = args.mem(view("mem_k"), view("mem_v"));
        }
        if call.has_infini {
            args = args.infini(InfiniState { q: view("q"), m: view("m"), z: view("z"), beta: view("sink") });
        }
        h.backend().attend(&plan, queue, args, scratch.borrow_mut())
    });
    let mut all_untouched = true;
    for (buffer, layout) in &outputs {
        all_untouched &= is_untouched(h, buffer, layout)?;
    }
    typed(result, all_untouched)
}

/// Memory rows into so many entries of keys and of values.
fn append<H: Harness + ?Sized>(h: &H, entries: [usize; 2]) -> Result<(), Stop> {
    let plan = plan(h, &shape(false)?.spec(N, 8).blocks(2).slots(SLOTS).ops(&[Op::Append]).build()?)?;
    let new = Tensor::new(Layout::packed(Dtype::F32, [N, 2, F, HKV, D]), 0);
    let layouts = entries.map(|entries| Layout::packed(Dtype::F32, [SLOTS, entries, F, HKV, D]));
    let (mut to_k, mut to_v) = (buffer(h, layouts[0])?, buffer(h, layouts[1])?);
    let kv = h.upload(&new.bytes)?;
    let mut scratch = h.poisoned(plan.support().scratch_bytes)?;
    let spans = Call::valid().spans;
    let result = h.run(&mut |queue| {
        let kv = View::new(kv.borrow(), new.layout);
        let (to_k, to_v) = (ViewMut::new(to_k.borrow_mut(), layouts[0]), ViewMut::new(to_v.borrow_mut(), layouts[1]));
        let args = Append::new(Spans::Host(&spans)).mem_rows(kv, kv, to_k, to_v);
        h.backend().append(&plan, queue, args, scratch.borrow_mut())
    });
    let both_untouched = is_untouched(h, &to_k, &layouts[0])? && is_untouched(h, &to_v, &layouts[1])?;
    typed(result, both_untouched)
}

fn infini_write<H: Harness + ?Sized>(h: &H, m_entries: usize, z_entries: usize, z_dim: usize) -> Result<(), Stop> {
    let plan = plan(h, &shape(true)?.spec(N, 8).blocks(2).slots(SLOTS).ops(&[Op::InfiniWrite]).build()?)?;
    let keys = Tensor::new(Layout::tokens(Dtype::F32, [SLOTS, L, HKV, D]), 0);
    let layouts = [Layout::infini_m(SLOTS, m_entries, HKV, D), Layout::infini_z(SLOTS, z_entries, HKV, z_dim)];
    let (mut m, mut z) = (buffer(h, layouts[0])?, buffer(h, layouts[1])?);
    let kv = h.upload(&keys.bytes)?;
    let mut scratch = h.poisoned(plan.support().scratch_bytes)?;
    let spans = Call::valid().spans;
    let result = h.run(&mut |queue| {
        let kv = View::new(kv.borrow(), keys.layout);
        let (m, z) = (ViewMut::new(m.borrow_mut(), layouts[0]), ViewMut::new(z.borrow_mut(), layouts[1]));
        let args = InfiniWrite::new(Spans::Host(&spans), Keys::Strided { k: kv, v: kv }, m, z);
        h.backend().infini_write(&plan, queue, args, scratch.borrow_mut())
    });
    let both_untouched = is_untouched(h, &m, &layouts[0])? && is_untouched(h, &z, &layouts[1])?;
    typed(result, both_untouched)
}

fn merge<H: Harness + ?Sized>(h: &H, part_dtype: Dtype, part_streams: usize) -> Result<(), Stop> {
    let plan = plan(h, &shape(false)?.spec(N, 8).ops(&[Op::Merge]).build()?)?;
    let o_layout = Layout::tokens(Dtype::F32, [N, L, HQ, D]);
    let part_o = Layout { dtype: part_dtype, ..o_layout };
    let part_lse = Layout::tokens(Dtype::F32, [N, L, HQ, 1]);
    let short_lse = Layout::tokens(Dtype::F32, [part_streams, L, HQ, 1]);
    let (inputs, lse) = (buffer(h, o_layout)?, buffer(h, part_lse)?);
    let mut o = buffer(h, o_layout)?;
    let mut scratch = h.poisoned(plan.support().scratch_bytes)?;
    let result = h.run(&mut |queue| {
        let a = Partial { o: View::new(inputs.borrow(), part_o), lse: View::new(lse.borrow(), part_lse) };
        let b = Partial { o: View::new(inputs.borrow(), o_layout), lse: View::new(lse.borrow(), short_lse) };
        h.backend().merge(&plan, queue, Merge::new(a, b, ViewMut::new(o.borrow_mut(), o_layout)), scratch.borrow_mut())
    });
    let untouched = is_untouched(h, &o, &o_layout)?;
    typed(result, untouched)
}
