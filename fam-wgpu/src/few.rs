//! Rows of a block of which a call has few, as in decode: at most [`FEW_ROWS`], query heads of a group folded into rows.
//!
//! A workgroup is one stream, one such block, one kv head and one split of the keys; a second dispatch joins the splits in their order, where the
//! shape has more than one. Which rows are few is seen in the shaders, stream by stream, since spans may be the device's. Tiles of keys lie where
//! the row's block puts them, tile t is split t mod `splits`, and what a row does not see leaves its bits as they are: so they are those of the
//! token alone, as one of a draft, in any batch, from a ring or a linear cache, and any window, however far it goes, keeps all splits busy.

use crate::call::{Call, Size, T, code};
use crate::pipeline::{Dispatch, Gpu, Kernel, Shader};
use crate::tile::{FEW_ROWS, FewTile};
use fam_core::{Dtype, Plan, Result, Spec};

/// The kernels of few rows.
#[derive(Clone, Debug)]
pub(crate) struct Kernels {
    tile: FewTile,
    split: Kernel,
    join: Option<Kernel>,
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

/// Where a split leaves its part: with one split, in the output.
const fn split(o: T) -> Shader {
    let tensors: &[T] = match o {
        T::Parts => &[T::Q, T::Parts, T::Lse, T::K, T::V, T::MemK, T::MemV],
        T::OLocal => &[T::Q, T::OLocal, T::Lse, T::K, T::V, T::MemK, T::MemV],
        _ => &[T::Q, T::O, T::Lse, T::K, T::V, T::MemK, T::MemV],
    };
    Shader { name: "few_split", text: text!("few_split.wgsl"), tensors }
}

/// The parts take the place of q.
const fn join(o: T) -> Shader {
    let tensors: &[T] = match o {
        T::OLocal => &[T::Parts, T::OLocal, T::Lse, T::K, T::V, T::MemK, T::MemV],
        _ => &[T::Parts, T::O, T::Lse, T::K, T::V, T::MemK, T::MemV],
    };
    Shader { name: "few_join", text: text!("few_join.wgsl"), tensors }
}

impl Kernels {
    /// Those that leave their rows in `o`, of type `out`.
    pub fn new(gpu: &Gpu, spec: &Spec, o: T, out: Dtype) -> Result<Option<Self>> {
        let Some(tile) = FewTile::of(spec, &gpu.limits) else { return Ok(None) };
        let constants = constants(spec, tile, o, out);
        let is_one = tile.splits == 1;
        let split = gpu.kernel(split(if is_one { o } else { T::Parts }), &constants)?;
        let join = (!is_one).then(|| gpu.kernel(join(o), &constants)).transpose()?;
        Ok(Some(Kernels { tile, split, join }))
    }

    /// Floats of scratch memory of the largest call.
    pub fn parts(&self, spec: &Spec) -> usize {
        self.tile.parts(spec) as usize
    }

    /// The dispatches of a call whose tensors are named, but for the parts, which are `parts` of it.
    pub fn dispatches(&self, call: &mut Call<'_>) -> Vec<Dispatch<'_>> {
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
        let split = Dispatch { kernel: &self.split, groups: heads * (splits * tiles) as u64 };
        let join = self.join.as_ref().map(|kernel| Dispatch { kernel, groups: threads.div_ceil(64) });
        std::iter::once(split).chain(join).collect()
    }
}

fn constants(spec: &Spec, tile: FewTile, o: T, out: Dtype) -> String {
    let FewTile { quads, value_lanes, splits, .. } = tile;
    format!(
        "const HEAD_DIM = {}u;\nconst DTYPE = {}u;\nconst OUT = {}u;\nconst TENSOR_O = {o:?};\nconst FEW_ROWS = {FEW_ROWS}u;\n\
         const QUADS = {quads}u;\nconst VALUE_LANES = {value_lanes}u;\nconst IS_WHOLE = {};\n",
        spec.shape().head_dim(),
        code(spec.shape().dtype()),
        code(out),
        splits == 1,
    )
}
