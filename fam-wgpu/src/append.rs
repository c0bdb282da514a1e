//! New keys and values enter the cached tensors, and leave the ring again for a snapshot (contract section 2, "The key ring"). Rows are copied as
//! they are: kv_dtype is the shape's dtype. A thread copies a word of a row's keys and one of its values.

use crate::call::{Caches, Call, Size, T, Writes};
use crate::pipeline::{Dispatch, Gpu, Kernel, Shader, enqueue};
use crate::{Region, WgpuPlan};
use fam_core::{Append, Keys, Plan, ReadRing, Result, Spec};
use std::slice;

/// Threads of a workgroup.
const THREADS: u64 = 64;

/// The kernels of a plan.
#[derive(Clone, Debug)]
pub(crate) struct Kernels {
    rows: Kernel,
    mem_rows: Kernel,
    read_ring: Kernel,
}

impl Kernels {
    pub fn new(gpu: &Gpu, spec: &Spec) -> Result<Self> {
        let (d, dtype) = (spec.shape().head_dim(), crate::call::code(spec.shape().dtype()));
        let kernel = |kind, tensors| {
            let constants = format!("const HEAD_DIM = {d}u;\nconst DTYPE = {dtype}u;\nconst KIND = {kind};\n");
            gpu.kernel(Shader { name: "append", text: include_str!("append.wgsl"), tensors }, &constants)
        };
        Ok(Kernels {
            rows: kernel("TO_RING", &[T::Q, T::InfiniQ, T::K, T::V])?,
            mem_rows: kernel("TO_MEMORY", &[T::MemQ, T::Gated, T::MemK, T::MemV])?,
            read_ring: kernel("FROM_RING", &[T::K, T::V, T::Q, T::InfiniQ])?,
        })
    }
}

/// Workgroups that copy `rows` rows of each of `blocks` blocks.
fn groups(call: &mut Call<'_>, blocks: usize, rows: usize) -> u64 {
    let shape = call.plan.spec().shape();
    let words = (shape.head_dim() * shape.dtype().bytes()).div_ceil(4);
    call.set(Size::Blocks, blocks as u32);
    call.set(Size::MostRows, rows as u32);
    (call.batch() as u64 * (blocks * rows) as u64 * (shape.kv_heads() * words) as u64).div_ceil(THREADS)
}

/// [`fam_core::Backend::append`].
pub(crate) fn append(
    plan: &WgpuPlan,
    encoder: &mut wgpu::CommandEncoder,
    args: Append<'_, Region>,
    scratch: &mut Region,
) -> Result<()> {
    args.validate(plan, scratch)?;
    let Some(kernels) = &plan.append else { return Ok(()) };
    let caches =
        Caches { mem_entries: args.mem_rows.as_ref().map(|mem| mem.to_k.layout.shape[1]), writes: Writes::Rows, ..Caches::NONE };
    // Either both calls are enqueued or none.
    let mut calls = Vec::with_capacity(2);
    if let Some(rows) = &args.rows {
        let mut call = Call::new(plan, &args.spans, caches)?;
        call.input(T::Q, &rows.k)?;
        call.input(T::InfiniQ, &rows.v)?;
        call.ring(rows.ring)?;
        let most = call.max_rows;
        let groups = groups(&mut call, 1, most);
        calls.push((call, Dispatch { kernel: &kernels.rows, groups }));
    }
    if let Some(mem) = &args.mem_rows {
        let mut call = Call::new(plan, &args.spans, caches)?;
        call.input(T::MemQ, &mem.k)?;
        call.input(T::Gated, &mem.v)?;
        call.output(T::MemK, &mem.to_k)?;
        call.output(T::MemV, &mem.to_v)?;
        let most = call.max_blocks.max(1);
        let groups = groups(&mut call, most, plan.spec().shape().mem_len());
        calls.push((call, Dispatch { kernel: &kernels.mem_rows, groups }));
    }
    let calls: Vec<_> = calls.iter().map(|(call, dispatch)| (call, slice::from_ref(dispatch))).collect();
    enqueue(encoder, &calls)
}

/// [`fam_core::Device::read_ring`].
pub(crate) fn read_ring(plan: &WgpuPlan, encoder: &mut wgpu::CommandEncoder, args: ReadRing<'_, Region>) -> Result<()> {
    args.validate(plan)?;
    let Some(kernels) = &plan.append else { return Ok(()) };
    let mut call = Call::new(plan, &args.spans, Caches::of(&Keys::Ring(args.ring)))?;
    call.ring(args.ring)?;
    call.output(T::Q, &args.k)?;
    call.output(T::InfiniQ, &args.v)?;
    let most = call.max_rows;
    let groups = groups(&mut call, 1, most);
    enqueue(encoder, &[(&call, &[Dispatch { kernel: &kernels.read_ring, groups }])])
}
