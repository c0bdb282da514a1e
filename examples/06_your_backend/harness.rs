//! What surrounds the loops: rows in memory, and for the suite the memory itself and a queue.

use crate::Loops;
use fam::*;
use fam_testkit::Harness;

/// All of `0..a` × `0..b` × `0..c`.
pub fn indices([a, b, c]: [usize; 3]) -> impl Iterator<Item = (usize, usize, usize)> {
    (0..a * b * c).map(move |i| (i / (b * c), i / c % b, i % c))
}

/// A row of `view`.
pub fn load(view: &View<'_, [u8]>, at: [usize; 4]) -> Vec<f32> {
    let row = &view.mem[4 * view.layout.at(at)..][..4 * view.layout.shape[4]];
    row.chunks_exact(4).map(bytemuck::pod_read_unaligned).collect()
}

/// Writes a row of `view`.
pub fn store(view: &mut ViewMut<'_, [u8]>, at: [usize; 4], row: &[f32]) {
    view.mem[4 * view.layout.at(at)..][..4 * row.len()].copy_from_slice(bytemuck::cast_slice(row));
}

impl Device for Loops {
    type Owned = Vec<u8>;

    fn alloc(&self, bytes: u64) -> Result<Vec<u8>> {
        Ok(vec![0; bytes as usize])
    }
    fn upload(&self, mem: &mut [u8], offset: u64, bytes: &[u8]) -> Result<()> {
        mem[offset as usize..][..bytes.len()].copy_from_slice(bytes);
        Ok(())
    }
    fn download(&self, mem: &[u8], offset: u64, bytes: &mut [u8]) -> Result<()> {
        bytes.copy_from_slice(&mem[offset as usize..][..bytes.len()]);
        Ok(())
    }
    fn synchronize(&self, _: &mut ()) -> Result<()> {
        Ok(())
    }
}

impl Harness for Loops {
    type Backend = Self;

    fn backend(&self) -> &Self {
        self
    }
    fn run(&self, work: &mut dyn FnMut(&mut ()) -> Result<()>) -> Result<()> {
        work(&mut ())
    }
}
