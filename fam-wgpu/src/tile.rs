//! Every size that a kernel is tuned by, from the shape and the device's limits.

use fam_core::Shape;

/// Channels of the widest head that there are kernels for.
pub(crate) const MAX_HEAD_DIM: usize = 256;

/// Channels in a chunk of the shaders: sixteen threads with four each.
const CHUNK: usize = 64;

/// The tile of `attend`: 16 × `ty` threads with four rows and `block_n` / 16 keys each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AttendTile {
    pub ty: usize,
    /// Keys in a tile.
    pub block_n: usize,
    /// Chunks of q that stay in workgroup memory: all of a head's, or one, which is then loaded again for each tile of keys.
    pub q_chunks: usize,
}

impl AttendTile {
    /// The first that fits.
    pub fn of(shape: &Shape, limits: &wgpu::Limits) -> Self {
        let chunks = shape.head_dim().div_ceil(CHUNK);
        let tile = |ty, block_n, q_chunks| AttendTile { ty, block_n, q_chunks };
        let choices = [tile(16, 32, chunks), tile(16, 16, chunks), tile(8, 32, chunks), tile(8, 16, chunks), tile(8, 32, 1)];
        let fits = |tile: &AttendTile| {
            tile.bytes() <= limits.max_compute_workgroup_storage_size as usize
                && 16 * tile.ty <= limits.max_compute_invocations_per_workgroup as usize
        };
        // The least that WebGPU guarantees, 16 KiB and 256 threads, holds the last.
        choices.into_iter().find(fits).unwrap_or(tile(8, 16, 1))
    }

    /// Rows in a tile.
    pub fn block_m(self) -> usize {
        4 * self.ty
    }

    fn bytes(self) -> usize {
        16 * (self.block_m() * 16 * self.q_chunks + self.block_n * 16 + self.block_n * self.ty + 16 * self.ty)
    }
}

/// Keys that are added up before the running maximum is looked at again, on any device at least.
pub const BLOCK_N: usize = 16;
