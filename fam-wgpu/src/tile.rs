//! Every size that a kernel is tuned by, from the shape and the device's limits.

use fam_core::Shape;

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

    /// Workgroup memory: eight columns of q and of keys, or sixteen of values; weights; partial results.
    fn bytes(self) -> usize {
        16 * ((8 * (self.block_m + BLOCK_N)).max(16 * BLOCK_N) + BLOCK_N * self.block_m / 4 + 2 * self.block_m)
    }
}

/// Keys in a tile: they are added up before the running maximum is looked at again.
pub const BLOCK_N: usize = 32;
