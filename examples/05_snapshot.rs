//! A stream as bytes: saved, taken up elsewhere, rolled back and copied, bit for bit the stream that was never interrupted.
//!
//! ```sh
//! cargo run --release --example 05_snapshot
//! ```

use fam::cpu::{Cpu, CpuPlan, Par};
use fam::{Backend, Error, Plan, Result, Rows, Shape, Step, Streams, View, ViewMut, Window};
use fam_ref::layer::Random;

const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 32;
const BLOCK: usize = 16;
const MEM: usize = 4;

/// The streams of one layer, and what their calls need.
struct Layer {
    plan: CpuPlan,
    streams: Streams<Cpu>,
    scratch: Vec<u8>,
}

impl Layer {
    fn new(slots: usize) -> Result<Self> {
        let shape = Shape::builder()
            .heads(HEADS)
            .kv_heads(KV_HEADS)
            .head_dim(HEAD_DIM)
            .block_len(BLOCK)
            .window(Window::Blocks(2))
            .mem_len(MEM)
            .build()?;
        let cpu = Cpu::new()?;
        let plan = cpu.plan(&shape.spec(1, BLOCK).slots(slots).build()?)?;
        Ok(Layer { streams: Streams::new(cpu, &plan)?, scratch: vec![0; plan.support().scratch_bytes as usize], plan })
    }

    /// Decodes tokens `position .. end` of a text, one at a time, each block with a memory of its own; their outputs.
    fn decode(&mut self, slot: u32, text: u64, end: u64) -> Result<Vec<f32>> {
        let mut outputs = Vec::new();
        while self.streams.position(slot)? < end {
            let position = self.streams.position(slot)?;
            let mut random = Random::new(text + position);
            let mut rows = |rows, heads| -> Vec<f32> {
                random.array([rows * heads * HEAD_DIM], 1.0).data.iter().map(|&x| x as f32).collect()
            };
            let (q, k, v) = (rows(1, HEADS), rows(1, KV_HEADS), rows(1, KV_HEADS));
            if position.is_multiple_of(BLOCK as u64) {
                let (mem_k, mem_v) = (rows(MEM, KV_HEADS), rows(MEM, KV_HEADS));
                let [mem_k, mem_v] = [&mem_k, &mem_v].map(|x| View::tokens(x, [1, MEM, KV_HEADS, HEAD_DIM]));
                self.streams.set_memory(&self.plan, &mut Par::Serial, &[slot], mem_k, mem_v, &mut self.scratch)?;
            }
            let mut o = vec![0f32; q.len()];
            let rows = Rows::new(View::tokens(&q, [1, 1, HEADS, HEAD_DIM]), ViewMut::tokens(&mut o, [1, 1, HEADS, HEAD_DIM]));
            let [k, v] = [&k, &v].map(|x| View::tokens(x, [1, 1, KV_HEADS, HEAD_DIM]));
            let pending =
                self.streams.step(&self.plan, &mut Par::Serial, Step::new(&[slot], k, v).rows(rows), &mut self.scratch)?;
            pending.commit();
            outputs.extend(o);
        }
        Ok(outputs)
    }

    fn snapshot(&self, slot: u32) -> Result<Vec<u8>> {
        self.streams.snapshot(&self.plan, &mut Par::Serial, slot)
    }

    fn restore(&mut self, slot: u32, snapshot: &[u8]) -> Result<()> {
        self.streams.restore(&self.plan, &mut Par::Serial, slot, snapshot, &mut self.scratch)
    }
}

fn main() -> Result<()> {
    let (text, other_text) = (1, 1 << 32);

    // In the middle of a block, after some wraps of the ring.
    let mut layer = Layer::new(1)?;
    layer.decode(0, text, 1000)?;
    let snapshot = layer.snapshot(0)?;
    let expected = layer.decode(0, text, 1100)?;
    println!("at position 1000 the stream is {} bytes", snapshot.len());

    // Another object, with more slots, in one that another stream has used.
    let mut elsewhere = Layer::new(4)?;
    elsewhere.decode(2, other_text, 77)?;
    elsewhere.restore(2, &snapshot)?;
    assert_eq!(elsewhere.decode(2, text, 1100)?, expected);
    println!("restored elsewhere, tokens 1000 to 1100 have the same bits");

    // Speculative decoding: tokens of the current block that were not accepted are forgotten.
    elsewhere.restore(2, &snapshot)?;
    elsewhere.decode(2, other_text, 1005)?;
    elsewhere.streams.rollback(2, 5)?;
    assert_eq!(elsewhere.snapshot(2)?, snapshot);
    println!("five wrong tokens rolled back, the stream is the same bytes");

    // A shared prefix: one copy on the device, two streams from there.
    elsewhere.streams.copy_slot(&mut Par::Serial, 2, 0)?;
    elsewhere.decode(2, other_text, 1050)?;
    assert_eq!(elsewhere.decode(0, text, 1100)?, expected);
    println!("copied, the copy goes on while the original went another way");

    // One flipped bit, and nothing is touched.
    let mut corrupted = snapshot.clone();
    corrupted[snapshot.len() / 2] ^= 1;
    let before = elsewhere.snapshot(0)?;
    let error = elsewhere.restore(0, &corrupted).unwrap_err();
    assert!(matches!(error, Error::Malformed { .. }) && elsewhere.snapshot(0)? == before);
    println!("one flipped bit: \"{error}\"");
    Ok(())
}
