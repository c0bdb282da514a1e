//! Every size that a kernel is tuned by, from the shape and the device's limits.

use fam_core::{Shape, Spec, Window};

/// Channels of the widest head that there are kernels for.
pub(crate) const MAX_HEAD_DIM: usize = 256;

/// The tile of `attend`: 8 × 8 threads, each with four or eight of its rows and four of [`BLOCK_N`] keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AttendTile {
    /// Rows: 64, or 32.
    pub block_m: usize,
}

impl AttendTile {
    /// 64 rows where their sums fit into registers, of heads of up to 128 channels, and the tile into workgroup memory. The least that WebGPU
    /// guarantees, 16 KiB, holds 32.
    pub fn of(shape: &Shape, limits: &wgpu::Limits) -> Self {
        let (wide, narrow) = (AttendTile { block_m: 64 }, AttendTile { block_m: 32 });
        let fits = wide.bytes() <= limits.max_compute_workgroup_storage_size as usize;
        if fits && shape.head_dim() <= 128 { wide } else { narrow }
    }

    /// Workgroup memory: sixteen columns of rows; weights; partial results and factors.
    fn bytes(self) -> usize {
        16 * (16 * self.block_m + BLOCK_N * self.block_m / 4 + 2 * self.block_m) + 4 * self.block_m
    }
}

/// Keys in a tile: they are added up before the running maximum is looked at again.
pub const BLOCK_N: usize = 32;

/// Most rows of a block of a call, query heads of a group folded, that the kernel of few rows serves: see `few.rs`.
pub const FEW_ROWS: usize = 16;

/// Fewest keys in a split of few rows, of all that a row of the shape can see, and most splits.
const SPLIT: u64 = 256;
const MAX_SPLITS: u64 = 32;

/// The tile of few rows: 128 threads, 32 keys and `quads` times four rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FewTile {
    pub quads: usize,
    /// Threads side by side, each with four channels of values.
    pub value_lanes: usize,
    pub splits: usize,
    /// Most rows of a block that are few.
    pub rows: usize,
    /// Most blocks of a stream in a call that have few rows: its first and its last, or all where blocks are that short.
    pub blocks: usize,
}

impl FewTile {
    /// That of a plan; nothing where the heads of a group alone are more.
    pub fn of(spec: &Spec, limits: &wgpu::Limits) -> Option<Self> {
        let shape = spec.shape();
        let most = (FEW_ROWS / shape.group()).min(shape.block_len());
        let blocks = if shape.block_len() > most { spec.blocks().min(2) } else { spec.blocks() };
        let rows = most.min(spec.rows()) * shape.group();
        let columns = shape.head_dim().div_ceil(4);
        // Of four rows: q, eight lanes' products for each key, its logits and weights, and a factor.
        let bytes = |quads: &usize| 16 * quads * (4 * columns + 10 * 32 + 1);
        let fits = |quads: &usize| bytes(quads) <= limits.max_compute_workgroup_storage_size as usize;
        let quads = if rows <= 4 { 1 } else { [4, 2, 1].into_iter().find(fits)? };
        Some(FewTile { quads, value_lanes: columns.next_power_of_two().max(4), splits: splits(shape), rows, blocks })
    }

    /// Rows in a tile.
    pub fn block_m(self) -> usize {
        4 * self.quads
    }

    /// Floats that splits leave of a call's few rows.
    pub fn parts(self, spec: &Spec) -> u64 {
        let shape = spec.shape();
        let sizes = [spec.batch(), shape.kv_heads(), self.blocks, self.rows, self.splits, shape.head_dim() + 2];
        sizes.iter().fold(1, |product: u64, &size| product.saturating_mul(size as u64))
    }
}

/// Splits of the keys that a row of the shape can see. It is a matter of the shape, and so are bits.
fn splits(shape: &Shape) -> usize {
    let block_len = shape.block_len() as u64;
    let tokens = match shape.window() {
        Window::Blocks(m) => (m as u64).saturating_add(1).saturating_mul(block_len),
        Window::Tokens(w) => w as u64,
        _ => block_len,
    };
    (tokens.saturating_add(shape.mem_len() as u64) / SPLIT).clamp(1, MAX_SPLITS) as usize
}
