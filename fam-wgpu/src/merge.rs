//! Attention over two disjoint key sets becomes attention over their union (contract section 4). A thread has four channels of a row and head.

use crate::call::{Call, Size, T};
use crate::pipeline::{Dispatch, Gpu, Kernel, Shader, enqueue};
use crate::{Region, WgpuPlan};
use fam_core::{Merge, Result, Spec};

const SHADER: Shader =
    Shader { name: "merge", text: include_str!("merge.wgsl"), tensors: &[T::K, T::MemK, T::V, T::MemV, T::O, T::Lse] };

pub(crate) fn kernel(gpu: &Gpu, spec: &Spec) -> Result<Kernel> {
    gpu.kernel(SHADER, &format!("const HEAD_DIM = {}u;\n", spec.shape().head_dim()))
}

/// [`fam_core::Backend::merge`].
pub(crate) fn merge(
    plan: &WgpuPlan,
    encoder: &mut wgpu::CommandEncoder,
    args: Merge<'_, Region>,
    scratch: &mut Region,
) -> Result<()> {
    args.validate(plan, scratch)?;
    let Some(kernel) = &plan.merge else { return Ok(()) };
    let mut call = Call::without_spans(plan);
    call.input(T::K, &args.a.o)?;
    call.input(T::MemK, &args.a.lse)?;
    call.input(T::V, &args.b.o)?;
    call.input(T::MemV, &args.b.lse)?;
    call.output(T::O, &args.o)?;
    if let Some(lse) = &args.lse {
        call.set(Size::HasLse, 1);
        call.output(T::Lse, lse)?;
    }
    let [batch, blocks, rows, heads, d] = args.o.layout.shape;
    for (size, value) in [(Size::Batch, batch), (Size::Blocks, blocks), (Size::MostRows, rows)] {
        call.set(size, value as u32);
    }
    // Axes beside an empty one can have any size.
    let threads = [batch, blocks, rows, heads, d.div_ceil(4)].iter().fold(1, |n: u64, &size| n.saturating_mul(size as u64));
    enqueue(encoder, &[(&call, &[Dispatch { kernel, groups: threads.div_ceil(64) }])])
}
