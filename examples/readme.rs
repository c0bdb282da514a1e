//! A stream through one attention layer: a window of blocks, and memory rows.
use fam::cpu::{Cpu, Par, Pool};
use fam::{Backend, Plan, Rows, Shape, Step, Streams, View, ViewMut, Window};

fn main() -> fam::Result<()> {
    // A layer whose blocks of 64 tokens see two blocks back and 16 memory rows; a plan for calls of one stream and one block.
    let shape = Shape::builder().heads(8).kv_heads(2).head_dim(64).block_len(64).window(Window::Blocks(2)).mem_len(16).build()?;
    let (cpu, pool) = (Cpu::new()?, Pool::new(2)?);
    let (plan, queue) = (cpu.plan(&shape.spec(1, 64).build()?)?, &mut Par::Pool(&pool));
    let (mut streams, mut scratch) = (Streams::new(cpu, &plan)?, vec![0; plan.support().scratch_bytes as usize]);
    // [stream, row, head, channel]: your model's projections of the tokens, and of the memory rows.
    let (q, k, v) = (vec![0.5f32; 64 * 8 * 64], vec![0.25f32; 64 * 2 * 64], vec![1f32; 64 * 2 * 64]);
    let (mem_q, mem_k, mem_v) = (vec![0.5f32; 16 * 8 * 64], vec![0.25f32; 16 * 2 * 64], vec![3f32; 16 * 2 * 64]);
    let (mut o, mut mem_o) = (vec![0f32; q.len()], vec![0f32; mem_q.len()]);
    let [k, v] = [&k, &v].map(|x| View::tokens(x, [1, 64, 2, 64]));
    let [mem_k, mem_v] = [&mem_k, &mem_v].map(|x| View::tokens(x, [1, 16, 2, 64]));
    for _block in 0..100 {
        streams.set_memory(&plan, queue, &[0], mem_k, mem_v, &mut scratch)?;
        let rows = Rows::new(View::tokens(&q, [1, 64, 8, 64]), ViewMut::tokens(&mut o, [1, 64, 8, 64]));
        let mem_rows = Rows::new(View::tokens(&mem_q, [1, 16, 8, 64]), ViewMut::tokens(&mut mem_o, [1, 16, 8, 64]));
        streams.step(&plan, queue, Step::new(&[0], k, v).rows(rows).mem_rows(mem_rows), &mut scratch)?.commit();
        // Now your model makes the next block's memory from mem_o: W_o, feed-forward, norm, projections.
    }
    // Equal logits: the last row weighs 192 tokens and 16 memory rows alike.
    assert!((o[o.len() - 1] - (192.0 + 16.0 * 3.0) / 208.0).abs() < 1e-6);
    println!("{} tokens through {} bytes of state", streams.position(0)?, streams.state_bytes());
    Ok(())
}
