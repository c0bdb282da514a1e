//! Reading the compressive memory (Infini-attention, Eq. 6 and 10; contract section 3), behind `attend` or on its own.
//!
//! ```text
//! a = σ(q) m / (σ(q)·z), 0 where z is all 0        o = g·a + (1 − g)·o_local, g = sigmoid(β_h)
//! ```
//!
//! Rows come in tiles as in `attend`, cut at blocks, since rows of a block read one state; channels of keys come sixteen at a time.

use crate::call::{Caches, Call, Size, T, code};
use crate::pipeline::{Dispatch, Gpu, Kernel, Shader, enqueue};
use crate::{Region, WgpuPlan};
use fam_core::{InfiniRead, InfiniState, Plan, Result, Spec};

/// Rows of sixteen threads, each with four rows: 128 threads.
const TY: usize = 8;

const SHADER: Shader = Shader {
    name: "infini_read",
    text: concat!(include_str!("rows.wgsl"), include_str!("grid.wgsl"), include_str!("infini_read.wgsl")),
    tensors: &[T::InfiniQ, T::Gated, T::O, T::M, T::Z],
};

pub(crate) fn kernel(gpu: &Gpu, spec: &Spec) -> Result<Kernel> {
    let shape = spec.shape();
    let constants = format!(
        "const HEAD_DIM = {}u;\nconst DTYPE = {}u;\nconst TY = {TY}u;\nconst BLOCK_M = {}u;\n\
         const HAS_ROWS = true;\nconst HAS_MEM_ROWS = false;\nconst ROW_TILES = ReadTiles;\n",
        shape.head_dim(),
        code(shape.dtype()),
        4 * TY,
    );
    gpu.kernel(SHADER, &constants)
}

/// Names the tensors of the state.
pub(crate) fn name(call: &mut Call<'_>, state: &InfiniState<'_, Region>) -> Result<()> {
    call.input(T::InfiniQ, &state.q)?;
    call.input(T::M, &state.m)?;
    call.input(T::Z, &state.z)?;
    call.per_head(T::Beta, &state.beta)
}

/// The dispatch of a call whose tensors are named.
pub(crate) fn dispatch<'k>(call: &mut Call<'_>, kernel: &'k Kernel) -> Dispatch<'k> {
    let shape = call.plan.spec().shape();
    let tokens = call.max_rows.min(shape.block_len());
    let row_tiles = (tokens * shape.group()).div_ceil(4 * TY);
    call.set(Size::Blocks, call.max_blocks as u32);
    call.set(Size::ReadTiles, row_tiles as u32);
    Dispatch { kernel, groups: (call.batch() * shape.kv_heads()) as u64 * (call.max_blocks * row_tiles) as u64 }
}

/// [`fam_core::Backend::infini_read`].
pub(crate) fn infini_read(
    plan: &WgpuPlan,
    encoder: &mut wgpu::CommandEncoder,
    args: InfiniRead<'_, Region>,
    scratch: &mut Region,
) -> Result<()> {
    args.validate(plan, scratch)?;
    let Some(kernel) = &plan.infini_read else { return Ok(()) };
    let caches = Caches { state_entries: args.state.m.layout.shape[1], ..Caches::NONE };
    let mut call = Call::new(plan, &args.spans, caches)?;
    name(&mut call, &args.state)?;
    call.input(T::O, &args.o_local)?;
    call.output(T::Gated, &args.o)?;
    let dispatch = dispatch(&mut call, kernel);
    enqueue(encoder, &[(&call, &[dispatch])])
}
