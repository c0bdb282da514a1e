//! Calls of the backward ops that must be refused.

use super::{Call, D, F, HKV, HQ, L, N, SLOTS, buffer, is_untouched, refused, shape, typed};
use crate::harness::{Harness, Mem, Owned};
use crate::launch::{Stop, plan};
use crate::runner::Outcome;
use fam_core::{
    AttendBackward, Backend, Dtype, InfiniReadBackward, InfiniState, InfiniWriteBackward, Layout, MergeBackward, Op, Partial,
    PartialGradients, Plan, RowsBackward, Span, Spans, View, ViewMut,
};
use std::borrow::{Borrow, BorrowMut};
use std::collections::BTreeMap;

/// Spans and layouts of a valid call of a backward op.
struct Gradients {
    op: Op,
    spans: Vec<Span>,
    tensors: BTreeMap<&'static str, Layout>,
    /// Optional arguments that are left out.
    absent: Vec<&'static str>,
    /// Bytes that scratch is short of what the plan asks for.
    short: u64,
}

impl Gradients {
    fn valid(op: Op) -> Self {
        let rows = |heads, d| Layout::tokens(Dtype::F32, [N, L, heads, d]);
        let memory = |n, heads, d| Layout::packed(Dtype::F32, [n, 2, F, heads, d]);
        let (keys, head) = (Layout::tokens(Dtype::F32, [SLOTS, L, HKV, D]), Layout::per_head(HQ));
        let (m, z) = (Layout::infini_m(SLOTS, 3, HKV, D), Layout::infini_z(SLOTS, 3, HKV, D));
        let (wide, per_row) = (rows(HQ, D), rows(HQ, 1));
        let (mem_wide, mem_per_row, mem_keys) = (memory(N, HQ, D), memory(N, HQ, 1), memory(SLOTS, HKV, D));
        let tensors: &[(&str, Layout)] = match op {
            Op::AttendBackward => &[
                ("q", wide),
                ("o", wide),
                ("lse", per_row),
                ("d_o", wide),
                ("d_lse", per_row),
                ("d_q", wide),
                ("mem_q", mem_wide),
                ("mem_o", mem_wide),
                ("mem_lse", mem_per_row),
                ("d_mem_o", mem_wide),
                ("d_mem_lse", mem_per_row),
                ("d_mem_q", mem_wide),
                ("k", keys),
                ("v", keys),
                ("d_k", keys),
                ("d_v", keys),
                ("mem_k", mem_keys),
                ("mem_v", mem_keys),
                ("d_mem_k", mem_keys),
                ("d_mem_v", mem_keys),
                ("sink", head),
                ("d_sink", head),
            ],
            Op::InfiniReadBackward => &[
                ("infini_q", wide),
                ("m", m),
                ("z", z),
                ("beta", head),
                ("o_local", wide),
                ("d_o", wide),
                ("d_q", wide),
                ("d_o_local", wide),
                ("d_m", m),
                ("d_z", z),
                ("d_beta", head),
            ],
            Op::InfiniWriteBackward => {
                &[("k", keys), ("v", keys), ("m", m), ("z", z), ("d_m", m), ("d_z", z), ("d_k", keys), ("d_v", keys)]
            }
            _ => &[
                ("o_a", wide),
                ("lse_a", per_row),
                ("o_b", wide),
                ("lse_b", per_row),
                ("d_o", wide),
                ("d_lse", per_row),
                ("d_o_a", wide),
                ("d_lse_a", per_row),
                ("d_o_b", wide),
                ("d_lse_b", per_row),
            ],
        };
        let spans = Call::valid().spans;
        Gradients { op, spans, tensors: tensors.iter().copied().collect(), absent: Vec::new(), short: 0 }
    }

    fn layout(&mut self, name: &str) -> &mut Layout {
        self.tensors.get_mut(name).expect("the table names tensors of the call")
    }

    /// Which of its tensors the op returns.
    fn outputs(&self) -> &'static [&'static str] {
        match self.op {
            Op::AttendBackward => &["d_q", "d_mem_q", "d_k", "d_v", "d_mem_k", "d_mem_v", "d_sink"],
            Op::InfiniReadBackward => &["d_q", "d_o_local", "d_m", "d_z", "d_beta"],
            Op::InfiniWriteBackward => &["d_m", "d_z", "d_k", "d_v"],
            _ => &["d_o_a", "d_lse_a", "d_o_b", "d_lse_b"],
        }
    }
}

/// An entry: op, its name, the field that the error must name, and what it spoils.
type Entry = (Op, &'static str, &'static str, fn(&mut Gradients));

const ATTEND: Op = Op::AttendBackward;
const READ: Op = Op::InfiniReadBackward;
const WRITE: Op = Op::InfiniWriteBackward;
const MERGE: Op = Op::MergeBackward;

const ENTRIES: [Entry; 30] = [
    (ATTEND, "gradients of a slot twice", "span.slot", |c| c.spans[1].slot = 2),
    (ATTEND, "a saved o of another dtype", "o", |c| c.layout("o").dtype = Dtype::Bf16),
    (ATTEND, "a saved lse in 16 bits", "lse", |c| c.layout("lse").dtype = Dtype::F16),
    (ATTEND, "a saved mem_lse of too few blocks", "mem_lse", |c| c.layout("mem_lse").shape[1] = 1),
    (ATTEND, "d_o with too few rows", "d_o", |c| c.layout("d_o").shape[2] = 5),
    (ATTEND, "d_lse past its buffer", "d_lse", |c| c.layout("d_lse").offset = 1000),
    (ATTEND, "d_mem_o of the wrong heads", "d_mem_o", |c| c.layout("d_mem_o").shape[3] = 2),
    (ATTEND, "d_q of another dtype", "d_q", |c| c.layout("d_q").dtype = Dtype::F16),
    (ATTEND, "d_q that repeats elements", "d_q", |c| c.layout("d_q").stride[3] = 0),
    (ATTEND, "d_mem_q whose rows overlap", "d_mem_q", |c| c.layout("d_mem_q").stride[2] = 9),
    (ATTEND, "d_k in 16 bits", "d_k", |c| c.layout("d_k").dtype = Dtype::F16),
    (ATTEND, "d_k with too few rows", "d_k", |c| c.layout("d_k").shape[2] = 5),
    (ATTEND, "d_v of too few slots", "d_v", |c| c.layout("d_v").shape[0] = 2),
    (ATTEND, "d_mem_k with too few rows", "d_mem_k", |c| c.layout("d_mem_k").shape[2] = 2),
    (ATTEND, "d_mem_v with other entries than mem_v", "d_mem_v", |c| c.layout("d_mem_v").shape[1] = 1),
    (ATTEND, "gradients of memory rows without keys", "mem", |c| c.absent.push("mem")),
    (ATTEND, "d_mem without mem", "d_mem", |c| {
        c.absent.push("mem");
        c.spans.iter_mut().for_each(|span| span.mem_rows = 0);
    }),
    (ATTEND, "d_sink without a sink", "d_sink", |c| c.absent.push("sink")),
    (ATTEND, "d_sink of other heads", "d_sink", |c| c.layout("d_sink").shape[3] = 2),
    (ATTEND, "scratch memory of a backward op that is too short", "scratch", |c| c.short = 1),
    (READ, "o_local of another dtype", "o_local", |c| c.layout("o_local").dtype = Dtype::Bf16),
    (READ, "d_o_local in 16 bits", "d_o_local", |c| c.layout("d_o_local").dtype = Dtype::F16),
    (READ, "d_m with other entries than m", "d_m", |c| *c.layout("d_m") = Layout::infini_m(SLOTS, 2, HKV, D)),
    (READ, "d_z with too few slots", "d_z", |c| c.layout("d_z").shape[0] = 2),
    (READ, "d_beta of other heads", "d_beta", |c| c.layout("d_beta").shape[3] = 2),
    (WRITE, "too few entries of the states that were read", "m", |c| *c.layout("m") = Layout::infini_m(SLOTS, 2, HKV, D)),
    (WRITE, "d_z with other entries than z", "d_z", |c| c.layout("d_z").shape[1] = 4),
    (WRITE, "d_v of keys in 16 bits", "d_v", |c| c.layout("d_v").dtype = Dtype::Bf16),
    (MERGE, "d_o_a of another dtype", "d_o_a", |c| c.layout("d_o_a").dtype = Dtype::F16),
    (MERGE, "d_lse_b of fewer streams", "d_lse_b", |c| c.layout("d_lse_b").shape[0] = N - 1),
];

/// The valid calls, and those that must be refused.
pub(super) fn calls<H: Harness + ?Sized>(h: &H) -> Vec<(&'static str, Outcome)> {
    let valid = [
        (ATTEND, "the valid call of attend_backward"),
        (READ, "the valid call of infini_read_backward"),
        (WRITE, "the valid call of infini_write_backward"),
        (MERGE, "the valid call of merge_backward"),
    ];
    let accepted = valid.map(|(op, name)| (name, super::accepted(|| call(h, Gradients::valid(op)))));
    let spoilt = ENTRIES.into_iter().map(|(op, name, field, spoil)| {
        let mut gradients = Gradients::valid(op);
        spoil(&mut gradients);
        (name, refused(field, || call(h, gradients)))
    });
    accepted.into_iter().chain(spoilt).collect()
}

fn call<H: Harness + ?Sized>(h: &H, gradients: Gradients) -> Result<(), Stop> {
    let is_infini = matches!(gradients.op, READ | WRITE);
    let plan = plan(h, &shape(is_infini)?.spec(N, 8).blocks(2).slots(SLOTS).ops(&[gradients.op]).build()?)?;
    let scratch_bytes = plan.support().scratch_bytes;
    if gradients.short > scratch_bytes {
        return Err(Stop::Skipped("a plan without scratch memory".into()));
    }
    let mut scratch = h.upload(&vec![0; (scratch_bytes - gradients.short) as usize])?;
    // Buffers are those of the valid call, whatever the spoilt layouts say.
    let (mut inputs, mut outputs) = (BTreeMap::new(), Vec::new());
    for (name, layout) in Gradients::valid(gradients.op).tensors {
        let buffer = buffer(h, layout)?;
        if gradients.outputs().contains(&name) {
            outputs.push((name, buffer, layout));
        } else {
            inputs.insert(name, buffer);
        }
    }
    let result = h.run(&mut |queue| enqueue(h, &plan, queue, &gradients, &inputs, &mut outputs, scratch.borrow_mut()));
    let mut all_untouched = true;
    for (_, buffer, layout) in &outputs {
        all_untouched &= is_untouched(h, buffer, layout)?;
    }
    typed(result, all_untouched)
}

type Outputs<H> = Vec<(&'static str, Owned<H>, Layout)>;

fn enqueue<H: Harness + ?Sized>(
    h: &H,
    plan: &crate::launch::PlanOf<H>,
    queue: &mut crate::harness::Queue<'_, H>,
    gradients: &Gradients,
    inputs: &BTreeMap<&'static str, Owned<H>>,
    outputs: &mut Outputs<H>,
    scratch: &mut Mem<H>,
) -> fam_core::Result<()> {
    let view = |name: &str| View::<Mem<H>>::new(inputs[name].borrow(), gradients.tensors[name]);
    let mut views: BTreeMap<_, _> =
        outputs.iter_mut().map(|(name, buffer, _)| (*name, ViewMut::new(buffer.borrow_mut(), gradients.tensors[name]))).collect();
    let mut output = |name: &str| views.remove(name).expect("each output is taken once");
    let (spans, has) = (Spans::Host(&gradients.spans), |name: &str| !gradients.absent.contains(&name));
    match gradients.op {
        ATTEND => {
            let mut args = AttendBackward::new(spans, view("k"), view("v"));
            let rows = RowsBackward::new(view("q"), view("o"), view("lse"), view("d_o"), output("d_q"));
            let mem_rows = RowsBackward::new(view("mem_q"), view("mem_o"), view("mem_lse"), view("d_mem_o"), output("d_mem_q"));
            args = args.rows(rows.d_lse(view("d_lse"))).mem_rows(mem_rows.d_lse(view("d_mem_lse")));
            args = args.d_keys(output("d_k"), output("d_v")).d_mem(output("d_mem_k"), output("d_mem_v"));
            args = args.d_sink(output("d_sink"));
            if has("mem") {
                args = args.mem(view("mem_k"), view("mem_v"));
            }
            if has("sink") {
                args = args.sink(view("sink"));
            }
            h.backend().attend_backward(plan, queue, args, scratch)
        }
        READ => {
            let state = InfiniState { q: view("infini_q"), m: view("m"), z: view("z"), beta: view("beta") };
            let (d_q, d_o_local) = (output("d_q"), output("d_o_local"));
            let args = InfiniReadBackward::new(spans, state, view("o_local"), view("d_o"), d_q, d_o_local);
            let args = args.d_state(output("d_m"), output("d_z")).d_beta(output("d_beta"));
            h.backend().infini_read_backward(plan, queue, args, scratch)
        }
        WRITE => {
            let d_state = [output("d_m"), output("d_z")];
            let args = InfiniWriteBackward::new(spans, [view("k"), view("v")], [view("m"), view("z")], d_state);
            let args = args.d_keys(output("d_k"), output("d_v"));
            h.backend().infini_write_backward(plan, queue, args, scratch)
        }
        _ => {
            let part = |o, lse| Partial { o: view(o), lse: view(lse) };
            let a = PartialGradients { d_o: output("d_o_a"), d_lse: output("d_lse_a") };
            let b = PartialGradients { d_o: output("d_o_b"), d_lse: output("d_lse_b") };
            let args = MergeBackward::new([part("o_a", "lse_a"), part("o_b", "lse_b")], view("d_o"), [a, b]);
            h.backend().merge_backward(plan, queue, args.d_lse(view("d_lse")), scratch)
        }
    }
}
