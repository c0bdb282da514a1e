//! A call of `attend` over keys of the caller's own, wherever its tensors lie.

use fam_core::{
    Attend, Backend, Device, Dtype, Keys, Layout, Memory, Op, Plan, Result, Rows, Shape, Span, Spans, View, ViewMut, Window,
};
use fam_wgpu::{Region, Wgpu, WgpuPlan};

pub const HEADS: usize = 2;
pub const D: usize = 24;
pub const BLOCK: usize = 8;
/// Tokens of the caches.
pub const TOKENS: usize = 4 * BLOCK;
/// Elements of q and o, and of k and v.
pub const Q: usize = BLOCK * HEADS * D;
pub const KV: usize = TOKENS * D;

pub fn shape(dtype: Dtype) -> Shape {
    let shape = Shape::builder().heads(HEADS).kv_heads(1).head_dim(D).block_len(BLOCK).window(Window::Blocks(1)).dtype(dtype);
    shape.build().expect("a shape")
}

pub fn plan(wgpu: &Wgpu, dtype: Dtype) -> WgpuPlan {
    let spec = shape(dtype).spec(1, BLOCK).ops(&[Op::Attend]).build().expect("a spec");
    wgpu.plan(&spec).expect("a plan")
}

/// `count` numbers in [−1, 1) as bytes of `dtype`; each `tensor` has its own.
pub fn numbers(dtype: Dtype, tensor: usize, count: usize) -> Vec<u8> {
    let number = |i: usize| ((i * 37 + tensor * 101) % 64) as f32 / 32.0 - 1.0;
    // Multiples of 1/32 are exact in every dtype: bf16 is the upper half of f32, and f16 is not asked for.
    let bits = |i| number(i).to_bits();
    match dtype {
        Dtype::F32 => (0..count).flat_map(|i| bits(i).to_le_bytes()).collect(),
        _ => (0..count).flat_map(|i| ((bits(i) >> 16) as u16).to_le_bytes()).collect(),
    }
}

/// q, k and v, and where o goes.
pub struct Tensors {
    pub q: Region,
    pub k: Region,
    pub v: Region,
    pub o: Region,
}

impl Tensors {
    /// Each in a buffer of its own.
    pub fn apart(wgpu: &Wgpu, dtype: Dtype) -> Self {
        let new = |tensor, count| {
            let mut region = wgpu.alloc((count * dtype.bytes()) as u64).expect("memory");
            wgpu.upload(&mut region, 0, &numbers(dtype, tensor, count)).expect("uploaded");
            region
        };
        Tensors { q: new(0, Q), k: new(1, KV), v: new(2, KV), o: new(3, Q) }
    }

    /// One block of the stream, whose first token has position `start`.
    pub fn attend(&mut self, wgpu: &Wgpu, plan: &WgpuPlan, encoder: &mut wgpu::CommandEncoder, start: usize) -> Result<()> {
        let dtype = plan.spec().shape().dtype();
        let [rows, kv] = [[1, BLOCK, HEADS, D], [1, TOKENS, 1, D]].map(|sizes| Layout::tokens(dtype, sizes));
        let keys = Keys::Strided { k: View::new(&self.k, kv), v: View::new(&self.v, kv) };
        let span = [Span::new(0, start as u64, BLOCK as u32)];
        let args =
            Attend::new(Spans::Host(&span), keys).rows(Rows::new(View::new(&self.q, rows), ViewMut::new(&mut self.o, rows)));
        let mut scratch = wgpu.alloc(plan.support().scratch_bytes)?;
        wgpu.attend(plan, encoder, args, &mut scratch)
    }

    pub fn result(&self, wgpu: &Wgpu) -> Vec<u8> {
        let mut bytes = vec![0; self.o.bytes() as usize];
        wgpu.download(&self.o, 0, &mut bytes).expect("a result");
        bytes
    }
}

pub fn encoder(wgpu: &Wgpu) -> wgpu::CommandEncoder {
    wgpu.device().create_command_encoder(&Default::default())
}

/// The block at `start` alone, in an encoder and in buffers of its own.
pub fn alone(wgpu: &Wgpu, plan: &WgpuPlan, start: usize) -> Vec<u8> {
    let mut tensors = Tensors::apart(wgpu, plan.spec().shape().dtype());
    let mut encoder = encoder(wgpu);
    tensors.attend(wgpu, plan, &mut encoder, start).expect("encoded");
    wgpu.synchronize(&mut encoder).expect("done");
    tensors.result(wgpu)
}
