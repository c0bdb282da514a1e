//! One joint softmax over window, memory and current block (TransformerFAM, Alg. 1 and 2; contract section 2).
//!
//! ```text
//! p_ij ∝ exp(scale · q_i·k_j) over the visible j        o_i = Σ p_ij v_j        lse_i = ln Σ exp(scale · q_i·k_j)
//! ```
//!
//! A workgroup is one stream, one block of the call, one kv head and a tile of rows: block rows or memory rows, the query heads of a group folded
//! into rows. Its keys come in the order window | memory rows | own block, in tiles whose edges count from the block's start, so a row's bits do
//! not depend on the call. What a row sees is a range; there is no mask tensor, and what no row of the tile sees is not loaded.
//!
//! Both row groups run in one dispatch where the device binds eleven buffers, else in two. Blocks with few rows have kernels of their own (`few.rs`).

use crate::call::{Caches, Call, Size, T, code};
use crate::load::LoadKernels;
use crate::pipeline::{Dispatch, Gpu, Kernel, Shader, enqueue};
use crate::tile::{AttendTile, FEW_ROWS, FewTile};
use crate::{Region, WgpuPlan, few, infini_read};
use fam_core::{Attend, Dtype, Error, Layout, Memory, Plan, Result, Rows, Spans, Spec, View};

/// Storage buffers of a shader that both row groups share: theirs and the call block.
const BUFFERS_OF_BOTH: u32 = 11;

/// The kernels of a plan.
#[derive(Clone, Debug)]
pub(crate) struct Kernels {
    tile: AttendTile,
    groups: RowGroups,
    few: Option<few::Kernels>,
    /// What reads the compressive memory behind the rows.
    read: Option<Kernel>,
}

/// Who serves the row groups.
#[derive(Clone, Debug)]
enum RowGroups {
    /// One kernel both.
    Together(LoadKernels),
    /// One kernel each.
    Apart { rows: LoadKernels, mem_rows: LoadKernels },
}

const TOGETHER: Shader = Shader {
    name: "attend",
    text: concat!(
        include_str!("rows_both.wgsl"),
        include_str!("rows.wgsl"),
        include_str!("grid.wgsl"),
        include_str!("softmax.wgsl"),
        include_str!("attend.wgsl")
    ),
    tensors: &[T::Q, T::O, T::Lse, T::K, T::V, T::MemK, T::MemV, T::MemQ, T::MemO, T::MemLse],
};
const ROWS: Shader = Shader {
    name: "attend",
    text: concat!(
        include_str!("rows_one.wgsl"),
        include_str!("rows.wgsl"),
        include_str!("grid.wgsl"),
        include_str!("softmax.wgsl"),
        include_str!("attend.wgsl")
    ),
    tensors: &[T::Q, T::O, T::Lse, T::K, T::V, T::MemK, T::MemV],
};
const MEM_ROWS: Shader = Shader { tensors: &[T::MemQ, T::MemO, T::MemLse, T::K, T::V, T::MemK, T::MemV], ..ROWS };

impl Kernels {
    pub fn new(gpu: &Gpu, spec: &Spec) -> Result<Self> {
        let shape = spec.shape();
        let tile = AttendTile::of(shape, &gpu.limits);
        let kernel = |shader, has_rows, has_mem_rows| {
            let AttendTile { block_m } = tile;
            let constants = format!(
                "const HEAD_DIM = {}u;\nconst DTYPE = {}u;\nconst BLOCK_M = {block_m}u;\n\
                 const FEW_ROWS = {FEW_ROWS}u;\nconst ROW_TILES = RowTiles;\n\
                 const HAS_ROWS = {has_rows};\nconst HAS_MEM_ROWS = {has_mem_rows};\n{}",
                shape.head_dim(),
                code(shape.dtype()),
                gpu.lanes(),
            );
            LoadKernels::new(gpu, shape, shader, &constants)
        };
        let groups = match are_together(&gpu.limits) {
            true => RowGroups::Together(kernel(TOGETHER, true, true)?),
            false => RowGroups::Apart { rows: kernel(ROWS, true, false)?, mem_rows: kernel(MEM_ROWS, false, true)? },
        };
        let read = shape.infini().map(|_| infini_read::kernel(gpu, spec)).transpose()?;
        Ok(Kernels { tile, groups, few: few::Kernels::new(gpu, spec)?, read })
    }
}

/// Whether both row groups run in one dispatch.
pub(crate) fn are_together(limits: &wgpu::Limits) -> bool {
    limits.max_storage_buffers_per_shader_stage >= BUFFERS_OF_BOTH
}

/// Bytes of scratch memory of the largest call.
pub(crate) fn scratch_bytes(spec: &Spec, limits: &wgpu::Limits) -> u64 {
    let parts = FewTile::of(spec, limits).map_or(0, |tile| tile.parts(spec));
    local_elements(spec).saturating_add(parts).saturating_mul(4)
}

/// Elements of the local attention's output, which lies in scratch memory where a compressive memory is read behind it.
fn local_elements(spec: &Spec) -> u64 {
    match spec.shape().infini() {
        Some(_) => local_layout(spec, spec.batch(), spec.rows()).elements().unwrap_or(u64::MAX),
        None => 0,
    }
}

fn local_layout(spec: &Spec, batch: usize, rows: usize) -> Layout {
    Layout::tokens(Dtype::F32, [batch, rows, spec.shape().heads(), spec.shape().head_dim()])
}

/// [`fam_core::Backend::attend`].
pub(crate) fn attend(
    plan: &WgpuPlan,
    encoder: &mut wgpu::CommandEncoder,
    args: Attend<'_, Region>,
    scratch: &mut Region,
) -> Result<()> {
    args.validate(plan, scratch)?;
    let Some(kernels) = &plan.attend else { return Ok(()) };
    if plan.support().scratch_bytes > 0 && !scratch.is_aligned(Dtype::F32) {
        return Err(Error::invalid("scratch", "misaligned memory", "at a multiple of 4 bytes"));
    }
    let spec = plan.spec();
    let shape = spec.shape();
    let caches = Caches {
        mem_entries: args.mem.as_ref().map(|mem| mem.k.layout.shape[1]),
        state_entries: args.infini.as_ref().map_or(1, |infini| infini.m.layout.shape[1]),
        ..Caches::of(&args.keys)
    };
    let mut call = Call::new(plan, &args.spans, caches)?;
    call.keys(&args.keys)?;
    if let Some(mem) = &args.mem {
        call.input(T::MemK, &mem.k)?;
        call.input(T::MemV, &mem.v)?;
    }
    if let Some(sink) = &args.sink {
        call.per_head(T::Sink, sink)?;
    }
    let tiles = |rows: usize| (rows * shape.group()).div_ceil(kernels.tile.block_m);
    let ([mut row_tiles, mut mem_tiles], mut has_few) = ([0; 2], false);
    if let Some(rows) = &args.rows {
        name(&mut call, rows, [T::Q, T::O, T::Lse], Size::HasLse)?;
        let sides = sides(&args.spans, spec);
        has_few = sides.few;
        if sides.more {
            row_tiles = tiles(call.max_rows.min(shape.block_len()));
        }
    }
    if let Some(rows) = &args.mem_rows {
        name(&mut call, rows, [T::MemQ, T::MemO, T::MemLse], Size::HasMemLse)?;
        mem_tiles = tiles(shape.mem_len());
    }
    let blocks = call.max_blocks;
    call.set(Size::Blocks, blocks as u32);
    call.set(Size::RowTiles, row_tiles as u32);
    call.set(Size::MemTiles, mem_tiles as u32);
    let heads = (call.batch() * shape.kv_heads()) as u64;
    let dispatch = |kernel, tiles: usize| Dispatch { kernel, groups: heads * (blocks * tiles) as u64 };
    let mut dispatches = match &kernels.groups {
        RowGroups::Together(both) => vec![dispatch(both.of(&call), row_tiles + mem_tiles)],
        RowGroups::Apart { rows, mem_rows } => vec![dispatch(rows.of(&call), row_tiles), dispatch(mem_rows.of(&call), mem_tiles)],
    };
    if let Some(few) = kernels.few.as_ref().filter(|_| has_few) {
        // Behind the local attention's output.
        let parts = Layout::tokens(Dtype::F32, [1, 1, 1, few.parts(spec)]).with_offset(local_elements(spec) as usize);
        call.input(T::Parts, &View::new(&*scratch, parts))?;
        dispatches.extend(few.dispatches(&mut call));
    }
    if let (Some(rows), Some(infini), Some(read)) = (&args.rows, &args.infini, &kernels.read) {
        // What is gated is not rounded before: the rows go to where the read finds them.
        call.output(T::Gated, &rows.o)?;
        match &args.o_local {
            Some(local) => call.output(T::O, local)?,
            None => call.input(T::O, &View::new(&*scratch, local_layout(spec, call.batch(), call.max_rows)))?,
        }
        infini_read::name(&mut call, infini)?;
        dispatches.push(infini_read::dispatch(&mut call, read));
    }
    enqueue(encoder, &[(&call, &dispatches)])
}

/// Whether a call has blocks with few rows, and blocks with more, as far as the host knows.
struct Sides {
    few: bool,
    more: bool,
}

fn sides(spans: &Spans<'_, Region>, spec: &Spec) -> Sides {
    let (block_len, group) = (spec.shape().block_len() as u64, spec.shape().group() as u64);
    let is_few = |tokens: u64| tokens * group <= FEW_ROWS as u64;
    match spans {
        Spans::Host(spans) => {
            // Of a stream's first block in the call, its last, and one between.
            let tokens = spans.iter().flat_map(|span| {
                let first = u64::from(span.len).min(block_len - span.start % block_len);
                let behind = u64::from(span.len) - first;
                [first, behind % block_len, behind.min(block_len) * u64::from(behind >= block_len)]
            });
            let tokens: Vec<u64> = tokens.filter(|tokens| *tokens > 0).collect();
            Sides { few: tokens.iter().any(|&tokens| is_few(tokens)), more: tokens.iter().any(|&tokens| !is_few(tokens)) }
        }
        Spans::Device { .. } => Sides { few: true, more: !is_few(block_len.min(spec.rows() as u64)) },
    }
}

/// Names the tensors of a row group.
fn name(call: &mut Call<'_>, rows: &Rows<'_, Region>, [q, o, lse]: [T; 3], has_lse: Size) -> Result<()> {
    call.input(q, &rows.q)?;
    call.output(o, &rows.o)?;
    if let Some(view) = &rows.lse {
        call.set(has_lse, 1);
        call.output(lse, view)?;
    }
    Ok(())
}
