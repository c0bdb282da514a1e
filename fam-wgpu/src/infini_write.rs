//! Writing the compressive memory (Infini-attention, Eq. 8 and 9; contract section 3).
//!
//! ```text
//! linear  m' = m + σ(k)ᵀ v        delta  m' = m + σ(k)ᵀ (v − σ(k) m / (σ(k)·z))        z' = z + Σ_t σ(k_t)
//! ```
//!
//! A workgroup is one stream, one kv head and 64 channels of values: neither m's sums nor what delta reads of it needs the others. It takes the
//! call's segments in order.

use crate::call::{Caches, Call, Size, T, Writes, code};
use crate::pipeline::{Dispatch, Gpu, Kernel, Shader, enqueue};
use crate::{Region, WgpuPlan};
use fam_core::{InfiniRule, InfiniWrite, Plan, Result, Spec};

const SHADER: Shader =
    Shader { name: "infini_write", text: include_str!("infini_write.wgsl"), tensors: &[T::K, T::V, T::M, T::Z] };

pub(crate) fn kernel(gpu: &Gpu, spec: &Spec) -> Result<Kernel> {
    let d = spec.shape().head_dim();
    // Keys of a step, and rows of threads: σ(k) of all of them, v and z take 12 KiB of workgroup memory at most.
    let ty = if d > 128 { 8 } else { 16 };
    let constants = format!("const HEAD_DIM = {d}u;\nconst DTYPE = {}u;\nconst TY = {ty}u;\n", code(spec.shape().dtype()));
    gpu.kernel(SHADER, &constants)
}

/// [`fam_core::Backend::infini_write`].
pub(crate) fn infini_write(
    plan: &WgpuPlan,
    encoder: &mut wgpu::CommandEncoder,
    args: InfiniWrite<'_, Region>,
    scratch: &mut Region,
) -> Result<()> {
    args.validate(plan, scratch)?;
    let Some(kernel) = &plan.infini_write else { return Ok(()) };
    let shape = plan.spec().shape();
    let caches = Caches { state_entries: args.m.layout.shape[1], writes: Writes::Tokens, ..Caches::of(&args.keys) };
    let mut call = Call::new(plan, &args.spans, caches)?;
    call.keys(&args.keys)?;
    call.output(T::M, &args.m)?;
    call.output(T::Z, &args.z)?;
    call.set(Size::Rule, u32::from(shape.infini() == Some(InfiniRule::Delta)));
    let groups = if call.max_rows == 0 { 0 } else { (call.batch() * shape.kv_heads() * shape.head_dim().div_ceil(64)) as u64 };
    enqueue(encoder, &[(&call, &[Dispatch { kernel, groups }])])
}
