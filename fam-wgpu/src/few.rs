//! Rows of a block of which a call has few, as in decode: at most [`FEW_ROWS`], query heads of a group folded into rows.
//!
//! A workgroup is one stream, one such block, one kv head and one split of the keys; a second dispatch joins the splits in their order. Which rows are few is seen in the shaders, stream by stream, since spans may be the device's. Tiles of keys lie where
//! the row's block puts them, tile t is split t mod `splits`, and what a row does not see leaves its bits as they are: so they are those of the
//! token alone, as one of a draft, in any batch, from a ring or a linear cache, and any window, however far it goes, keeps all splits busy.

use crate::call::{Call, Size, T, code};
use crate::load::{self, LoadKernels};
use crate::pipeline::{Dispatch, Gpu, Kernel, Shader};
use crate::tile::{FEW_ROWS, FewTile};
use fam_core::{Plan, Result, Spec};

/// The kernels of few rows.
#[derive(Clone, Debug)]
pub(crate) struct Kernels {
    tile: FewTile,
    split: LoadKernels,
    join: Kernel,
}

macro_rules! text {
    ($own:literal) => {
        concat!(
            include_str!("rows_one.wgsl"),
            include_str!("rows.wgsl"),
            include_str!("softmax.wgsl"),
            include_str!("few.wgsl"),
            include_str!($own)
        )
    };
}

const SPLIT: Shader =
    Shader { name: "few_split", text: text!("few_split.wgsl"), tensors: &[T::Q, T::Parts, T::Lse, T::K, T::V, T::MemK, T::MemV] };
/// The parts take the place of q.
const JOIN: Shader =
    Shader { name: "few_join", text: text!("few_join.wgsl"), tensors: &[T::Parts, T::O, T::Lse, T::K, T::V, T::MemK, T::MemV] };

impl Kernels {
    pub fn new(gpu: &Gpu, spec: &Spec) -> Result<Option<Self>> {
        let Some(tile) = FewTile::of(spec, &gpu.limits) else { return Ok(None) };
        let FewTile { quads, value_lanes, .. } = tile;
        let shape = spec.shape();
        let constants = format!(
            "const HEAD_DIM = {}u;\nconst DTYPE = {}u;\nconst FEW_ROWS = {FEW_ROWS}u;\n",
            shape.head_dim(),
            code(shape.dtype()),
        );
        let sizes = format!("{constants}const QUADS = {quads}u;\nconst VALUE_LANES = {value_lanes}u;\n{}", gpu.lanes());
        let split = LoadKernels::new(gpu, shape, SPLIT, &sizes)?;
        Ok(Some(Kernels { tile, split, join: gpu.kernel(JOIN, &format!("{constants}{}", load::unaligned()))? }))
    }

    /// Floats of scratch memory of the largest call.
    pub fn parts(&self, spec: &Spec) -> usize {
        self.tile.parts(spec) as usize
    }

    /// The dispatches of a call whose tensors are named, but for the parts, which are `parts` of it.
    pub fn dispatches(&self, call: &mut Call<'_>) -> [Dispatch<'_>; 2] {
        let FewTile { splits, rows, blocks, .. } = self.tile;
        let shape = call.plan.spec().shape();
        let blocks = blocks.min(call.max_blocks);
        let rows = rows.min(call.max_rows * shape.group());
        let tiles = rows.div_ceil(self.tile.block_m());
        for (size, value) in [(Size::FewTiles, tiles), (Size::FewBlocks, blocks), (Size::FewRows, rows), (Size::Splits, splits)] {
            call.set(size, value as u32);
        }
        let heads = (call.batch() * shape.kv_heads() * blocks) as u64;
        let threads = heads * (rows * shape.head_dim().div_ceil(4)) as u64;
        [
            Dispatch { kernel: self.split.of(call), groups: heads * (splits * tiles) as u64 },
            Dispatch { kernel: &self.join, groups: threads.div_ceil(64) },
        ]
    }
}
