//! What the benches share: the layers that they run, random tensors, and a plan with its scratch memory. One file per op; each op runs on
//! one thread, so that its figures speak of the kernel alone. `fam perf` times whole steps.
#![forbid(unsafe_code)]

use fam::cpu::Cpu;
use fam::{Backend, Dtype, Element, Op, Plan, Result, Shape, ShapeBuilder, Window};
use fam_testkit::Rng;

/// A layer to measure on: the first two have the sizes of cases A and B of `fam perf`.
#[derive(Clone, Copy, Debug)]
pub struct Layer {
    /// In the bench's id.
    pub name: &'static str,
    /// Hq.
    pub heads: usize,
    /// Hkv.
    pub kv_heads: usize,
    /// D.
    pub head_dim: usize,
    /// B.
    pub block_len: usize,
    /// M.
    pub window_blocks: usize,
    /// F.
    pub mem_len: usize,
}

/// Every layer.
pub const LAYERS: [Layer; 2] = [
    Layer { name: "h8-d64", heads: 8, kv_heads: 8, head_dim: 64, block_len: 256, window_blocks: 1, mem_len: 16 },
    Layer { name: "h16-kv4-d128", heads: 16, kv_heads: 4, head_dim: 128, block_len: 512, window_blocks: 2, mem_len: 64 },
];

impl Layer {
    /// Its sizes, to be added to and built.
    pub fn shape(&self, dtype: Dtype) -> ShapeBuilder {
        let shape = Shape::builder().heads(self.heads).kv_heads(self.kv_heads).head_dim(self.head_dim).dtype(dtype);
        shape.block_len(self.block_len).window(Window::Blocks(self.window_blocks)).mem_len(self.mem_len)
    }

    /// The id of a bench on this layer.
    pub fn id<T: Element>(&self, what: &str) -> String {
        format!("{}/{}/{what}", T::DTYPE, self.name)
    }
}

/// `len` normal numbers, rounded to `T`.
pub fn values<T: Element>(name: &str, len: usize) -> Vec<T> {
    let mut rng = Rng::of(1, name);
    (0..len).map(|_| T::from_f32(rng.normal() as f32)).collect()
}

/// The CPU's plan for one op over calls of `rows` tokens of one stream, and scratch memory for it.
///
/// # Errors
/// Those of planning.
pub fn plan(shape: Shape, rows: usize, op: Op) -> Result<(Cpu, <Cpu as Backend>::Plan, Vec<u8>)> {
    let cpu = Cpu::new()?.with_threads(1);
    let plan = cpu.plan(&shape.spec(1, rows).ops(&[op]).build()?)?;
    let scratch = vec![0; plan.support().scratch_bytes as usize];
    Ok((cpu, plan, scratch))
}
