//! All backward ops of one layer, with buffers made once.

use super::random;
use fam_core::{
    AttendBackward, Backend, Dtype, InfiniReadBackward, InfiniRule, InfiniState, InfiniWriteBackward, Layout, MergeBackward, Op,
    Partial, PartialGradients, Plan, RowsBackward, Shape, Span, Spans, View, ViewMut, Window,
};
use fam_cpu::{Cpu, CpuPlan, Par};

const N: usize = 2;
const LEN: usize = 40;
const H: usize = 4;
const KV: usize = 2;
const D: usize = 24;
const F: usize = 3;
const B: usize = 16;
const NB: usize = 3;
const ENTRIES: usize = NB + 1;

/// Spans of two streams in each other's slot.
pub fn spans() -> [Span; N] {
    [Span::new(1, 0, LEN as u32).with_mem_rows(3), Span::new(0, 16, 37).with_mem_rows(2)]
}

pub struct Gradients {
    cpu: Cpu,
    plan: CpuPlan,
    scratch: Vec<u8>,
    /// Random numbers: queries, keys, values, results and upstream gradients alike.
    x: Vec<f32>,
    z: Vec<f32>,
    outputs: Outputs,
}

#[derive(Clone)]
struct Outputs {
    d_q: Vec<f32>,
    d_mem_q: Vec<f32>,
    d_o_local: Vec<f32>,
    d_k: Vec<f32>,
    d_v: Vec<f32>,
    d_mem_k: Vec<f32>,
    d_mem_v: Vec<f32>,
    d_sink: Vec<f32>,
    d_m: Vec<f32>,
    d_z: Vec<f32>,
    d_beta: Vec<f32>,
    d_o_a: Vec<f32>,
    d_lse_a: Vec<f32>,
    d_o_b: Vec<f32>,
    d_lse_b: Vec<f32>,
}

impl Outputs {
    fn new() -> Self {
        let [rows, memory, keys, mem_keys] =
            [N * LEN * H, N * NB * F * H, N * 2 * LEN * KV, N * NB * F * KV].map(|rows| rows * D);
        let [d_q, d_o_local, d_o_a, d_o_b] = [0; 4].map(|_| vec![7.0; rows]);
        let [d_lse_a, d_lse_b] = [0; 2].map(|_| vec![7.0; N * LEN * H]);
        let [d_k, d_v] = [0; 2].map(|_| vec![0.5; keys]);
        let [d_mem_k, d_mem_v] = [0; 2].map(|_| vec![0.5; mem_keys]);
        let [d_sink, d_beta] = [0; 2].map(|_| vec![0.5; H]);
        let (d_m, d_z) = (vec![0.5; N * ENTRIES * KV * D * D], vec![0.5; N * ENTRIES * KV * D]);
        let d_mem_q = vec![7.0; memory];
        Outputs { d_q, d_mem_q, d_o_local, d_k, d_v, d_mem_k, d_mem_v, d_sink, d_m, d_z, d_beta, d_o_a, d_lse_a, d_o_b, d_lse_b }
    }
}

impl Gradients {
    pub fn new(cpu: Cpu) -> Self {
        let builder = Shape::builder().heads(H).kv_heads(KV).head_dim(D).block_len(B).window(Window::Blocks(1)).mem_len(F);
        let shape = builder.infini(InfiniRule::Delta).build().unwrap();
        let plan = cpu.plan(&shape.spec(N, LEN).blocks(NB).ops(&Op::BACKWARD).build().unwrap()).unwrap();
        let x = random::<f32>(3, N * ENTRIES * KV * D * D + 2 * N * LEN * H * D);
        let z = x.iter().map(|x| x.abs() + 0.5).collect();
        Gradients { scratch: vec![0xff; plan.support().scratch_bytes as usize], cpu, plan, x, z, outputs: Outputs::new() }
    }

    /// Phases of an op.
    pub fn phases(&self, op: Op) -> usize {
        self.plan.support().phases(op)
    }

    /// Runs an op, which adds to or overwrites what earlier ones have left.
    pub fn run(&mut self, op: Op, mut par: Par<'_>, spans: Spans<'_, [u8]>) {
        let Gradients { cpu, plan, scratch, x, z, outputs: out } = self;
        let f32s = |shape: [usize; 5]| Layout::packed(Dtype::F32, shape);
        let (rows, per_row) = (f32s([N, 1, LEN, H, D]), f32s([N, 1, LEN, H, 1]));
        let (memory, per_memory_row) = (f32s([N, NB, F, H, D]), f32s([N, NB, F, H, 1]));
        let (keys, mem_keys, per_head) = (f32s([N, 1, 2 * LEN, KV, D]), f32s([N, NB, F, KV, D]), Layout::per_head(H));
        let (m, z_layout) = (Layout::infini_m(N, ENTRIES, KV, D), Layout::infini_z(N, ENTRIES, KV, D));
        // Other numbers for other tensors.
        let input = |layout: Layout, offset: usize| View::of(&x[offset..], layout);
        let z = View::of(z, z_layout);
        match op {
            Op::AttendBackward => {
                let d_q = ViewMut::of(&mut out.d_q, rows);
                let of_rows = RowsBackward::new(input(rows, 0), input(rows, 1), input(per_row, 2), input(rows, 3), d_q);
                let (d_mem_q, lse) = (ViewMut::of(&mut out.d_mem_q, memory), input(per_memory_row, 6));
                let of_memory = RowsBackward::new(input(memory, 4), input(memory, 5), lse, input(memory, 7), d_mem_q);
                let args = AttendBackward::new(spans, input(keys, 8), input(keys, 9))
                    .rows(of_rows.d_lse(input(per_row, 10)))
                    .mem_rows(of_memory.d_lse(input(per_memory_row, 11)))
                    .mem(input(mem_keys, 12), input(mem_keys, 13))
                    .sink(input(per_head, 14))
                    .d_keys(ViewMut::of(&mut out.d_k, keys), ViewMut::of(&mut out.d_v, keys))
                    .d_mem(ViewMut::of(&mut out.d_mem_k, mem_keys), ViewMut::of(&mut out.d_mem_v, mem_keys))
                    .d_sink(ViewMut::of(&mut out.d_sink, per_head));
                cpu.attend_backward(plan, &mut par, args, scratch).unwrap();
            }
            Op::InfiniReadBackward => {
                let state = InfiniState { q: input(rows, 15), m: input(m, 16), z, beta: input(per_head, 17) };
                let (d_q, d_o_local) = (ViewMut::of(&mut out.d_q, rows), ViewMut::of(&mut out.d_o_local, rows));
                let args = InfiniReadBackward::new(spans, state, input(rows, 18), input(rows, 19), d_q, d_o_local)
                    .d_state(ViewMut::of(&mut out.d_m, m), ViewMut::of(&mut out.d_z, z_layout))
                    .d_beta(ViewMut::of(&mut out.d_beta, per_head));
                cpu.infini_read_backward(plan, &mut par, args, scratch).unwrap();
            }
            Op::InfiniWriteBackward => {
                let d_state = [ViewMut::of(&mut out.d_m, m), ViewMut::of(&mut out.d_z, z_layout)];
                let args = InfiniWriteBackward::new(spans, [input(keys, 20), input(keys, 21)], [input(m, 22), z], d_state)
                    .d_keys(ViewMut::of(&mut out.d_k, keys), ViewMut::of(&mut out.d_v, keys));
                cpu.infini_write_backward(plan, &mut par, args, scratch).unwrap();
            }
            Op::MergeBackward => {
                let part = |offset| Partial { o: input(rows, offset), lse: input(per_row, offset + 1) };
                let d_a =
                    PartialGradients { d_o: ViewMut::of(&mut out.d_o_a, rows), d_lse: ViewMut::of(&mut out.d_lse_a, per_row) };
                let d_b =
                    PartialGradients { d_o: ViewMut::of(&mut out.d_o_b, rows), d_lse: ViewMut::of(&mut out.d_lse_b, per_row) };
                let args = MergeBackward::new([part(23), part(25)], input(rows, 27), [d_a, d_b]).d_lse(input(per_row, 28));
                cpu.merge_backward(plan, &mut par, args, scratch).unwrap();
            }
            other => panic!("{other} is no backward op"),
        }
    }

    /// Every output's bits.
    pub fn bits(&self) -> Vec<u32> {
        let o = &self.outputs;
        let of_rows = [&o.d_q, &o.d_mem_q, &o.d_o_local, &o.d_o_a, &o.d_lse_a, &o.d_o_b, &o.d_lse_b];
        let shared = [&o.d_k, &o.d_v, &o.d_mem_k, &o.d_mem_v, &o.d_sink, &o.d_m, &o.d_z, &o.d_beta];
        of_rows.into_iter().chain(shared).flatten().map(|x| x.to_bits()).collect()
    }
}
