//! Frozen memory: a few keys that every block sees, however long ago they were read. Attention sinks, a prompt, meta tokens.
//!
//! ```sh
//! cargo run --release --example 02_frozen_memory
//! ```
//!
//! The memory is set once and kept for every block. No row updates it, so no model needs training for it: keeping the first tokens
//! of a text is what lets a pre-trained model run on a sliding window.

use fam::cpu::{Cpu, Par, Pool};
use fam::{Backend, Error, Plan, Rows, Shape, Step, Streams, View, ViewMut, Window};

const BLOCK: usize = 64;
const SINKS: usize = 4;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 32;

fn main() -> fam::Result<()> {
    let shape = Shape::builder()
        .heads(HEADS)
        .kv_heads(KV_HEADS)
        .head_dim(HEAD_DIM)
        .block_len(BLOCK)
        .window(Window::Blocks(1))
        .mem_len(SINKS)
        .build()?;
    let cpu = Cpu::new()?;
    let plan = cpu.plan(&shape.spec(1, BLOCK).build()?)?;
    let mut streams = Streams::new(cpu, &plan)?;
    let mut scratch = vec![0; plan.support().scratch_bytes as usize];
    let pool = Pool::new(cpu.threads())?;
    let queue = &mut Par::Pool(&pool);

    // The sinks' values are 1 and all others 0: what a row returns is the share of its attention that reaches the sinks. Their keys
    // match the queries, those of the text are 0.
    let q = vec![0.5f32; BLOCK * HEADS * HEAD_DIM];
    let text = vec![0f32; BLOCK * KV_HEADS * HEAD_DIM];
    let (sink_k, sink_v) = (vec![1f32; SINKS * KV_HEADS * HEAD_DIM], vec![1f32; SINKS * KV_HEADS * HEAD_DIM]);
    let mut o = vec![0f32; q.len()];
    let (q_shape, kv_shape, sink_shape) =
        ([1, BLOCK, HEADS, HEAD_DIM], [1, BLOCK, KV_HEADS, HEAD_DIM], [1, SINKS, KV_HEADS, HEAD_DIM]);

    let (sink_k, sink_v) = (View::tokens(&sink_k, sink_shape), View::tokens(&sink_v, sink_shape));
    streams.set_memory(&plan, queue, &[0], sink_k, sink_v, &mut scratch)?;
    for block in 0..1000 {
        let text = View::tokens(&text, kv_shape);
        if block > 0 {
            // Entering a block without a word about its memory is an error, never a stale or missing memory.
            let forgotten = streams.step(&plan, queue, Step::new(&[0], text, text), &mut scratch);
            assert_eq!(forgotten.unwrap_err(), Error::MemoryDue { slot: 0, block });
            streams.keep_memory(&[0])?;
        }
        // Block rows alone: without memory rows the memory stays as it is.
        let rows = Rows::new(View::tokens(&q, q_shape), ViewMut::tokens(&mut o, q_shape));
        streams.step(&plan, queue, Step::new(&[0], text, text).rows(rows), &mut scratch)?.commit();

        let last_row = o[o.len() - 1];
        if [0, 1, 10, 100, 999].contains(&block) {
            println!("block {block:>3}: {:.2} % of the last row's attention is on the {SINKS} sinks", 100.0 * last_row);
        }
        // exp(q·k·scale) of a sink, beside the 1 of a token: those of this block, and of the block before.
        let sink = (f64::from(shape.scale()) * 0.5 * HEAD_DIM as f64).exp() * SINKS as f64;
        let tokens = (BLOCK * if block == 0 { 1 } else { 2 }) as f64;
        assert!((f64::from(last_row) - sink / (sink + tokens)).abs() < 1e-5);
    }
    println!("after {} tokens: {} bytes of state", streams.position(0)?, streams.state_bytes());
    Ok(())
}
