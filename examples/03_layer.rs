//! A whole TransformerFAM layer over twenty blocks: where the memory comes from, and where it goes.
//!
//! ```sh
//! cargo run --release --example 03_layer
//! ```
//!
//! The kernels compute attention. Norms, projections, rotary positions, W_o, residuals and the feed-forward belong to the model;
//! here fam_ref's layer lends them, in f64 and with random weights. Attention runs in f32 on the CPU, and the outputs are held against
//! the layer that is f64 throughout. Since every block builds on the memory of the one before, errors accumulate: the yardstick is the
//! drift of the same layer with a naive attention in f32.

use fam::cpu::{Cpu, Par, Pool};
use fam::{Backend, Plan, Result, Rows, Shape, Step, Streams, View, ViewMut, Window};
use fam_ref::Array;
use fam_ref::layer::{Config, Layer, LayerState, Projected, Random, Stack};

const BLOCKS: usize = 20;
const BLOCK: usize = 32;
const MEM: usize = 8;
const WINDOW: usize = 2;
const D_MODEL: usize = 128;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 32;

fn main() -> Result<()> {
    let shape = Shape::builder()
        .heads(HEADS)
        .kv_heads(KV_HEADS)
        .head_dim(HEAD_DIM)
        .block_len(BLOCK)
        .window(Window::Blocks(WINDOW))
        .mem_len(MEM)
        .build()?;
    let stack = Stack::random(&Config { shape, d_model: D_MODEL, d_ff: 2 * D_MODEL, layers: 1, feedback_norm: true }, 1);
    let (layer, prompt) = (&stack.layers[0], &stack.prompt);
    let mut random = Random::new(2);
    let text: Vec<Array<2>> = (0..BLOCKS).map(|_| random.array([BLOCK, D_MODEL], 1.0)).collect();

    // The layer in f64, as the paper has it.
    let mut state = LayerState::new(&shape, prompt.clone(), 0);
    let reference = text.iter().map(|x| Ok(layer.block(x, &mut state)?.0)).collect::<Result<Vec<_>>>()?;

    // The layer around fam's kernels.
    let cpu = Cpu::new()?;
    let plan = cpu.plan(&shape.spec(1, BLOCK).build()?)?;
    let mut streams = Streams::new(cpu, &plan)?;
    let mut scratch = vec![0; plan.support().scratch_bytes as usize];
    let pool = Pool::new(cpu.threads())?;
    let queue = &mut Par::Pool(&pool);
    let [q_shape, kv_shape] = [HEADS, KV_HEADS].map(|heads| [1, BLOCK, heads, HEAD_DIM]);
    let [mem_q_shape, mem_kv_shape] = [HEADS, KV_HEADS].map(|heads| [1, MEM, heads, HEAD_DIM]);
    let kernel = blocks(layer, prompt, &text, |tokens, mem| {
        let ([q, k, v], [mem_q, mem_k, mem_v]) = (narrow(tokens), narrow(mem));
        let (mut o, mut mem_o) = (vec![0f32; q.len()], vec![0f32; mem_q.len()]);
        // The keys and values of the memory rows, for this block's tokens and for the memory rows themselves.
        let [mem_k, mem_v] = [&mem_k, &mem_v].map(|x| View::tokens(x, mem_kv_shape));
        streams.set_memory(&plan, queue, &[0], mem_k, mem_v, &mut scratch)?;
        // Both groups of rows in one launch: tokens look at window, memory and their block, memory rows at memory and the block.
        let rows = Rows::new(View::tokens(&q, q_shape), ViewMut::tokens(&mut o, q_shape));
        let mem_rows = Rows::new(View::tokens(&mem_q, mem_q_shape), ViewMut::tokens(&mut mem_o, mem_q_shape));
        let step = Step::new(&[0], View::tokens(&k, kv_shape), View::tokens(&v, kv_shape)).rows(rows).mem_rows(mem_rows);
        streams.step(&plan, queue, step, &mut scratch)?.commit();
        Ok([o, mem_o])
    })?;

    // The layer around naive attention.
    let mut past = Vec::new();
    let naive = blocks(layer, prompt, &text, |tokens, mem| Ok(naive_attention(&shape, &mut past, tokens, mem)))?;

    for block in [1, 5, 10, BLOCKS] {
        let [kernel, naive] = [&kernel, &naive].map(|outputs| rms_error(&outputs[..block], &reference[..block]));
        println!("rms error of the outputs up to block {block:>2}: fam {kernel:.2e}, naive attention in f32 {naive:.2e}");
        assert!(kernel <= 2.0 * naive, "bound: twice the drift of naive attention");
    }
    println!("bound: twice the naive drift; {} tokens through {} bytes of state", streams.position(0)?, streams.state_bytes());
    Ok(())
}

/// Algorithm 2 of TransformerFAM, block after block, around any attention: from queries, keys and values of tokens and memory rows to
/// their outputs `[rows, heads, head_dim]`.
fn blocks(
    layer: &Layer,
    prompt: &Array<2>,
    text: &[Array<2>],
    mut attention: impl FnMut(&Projected, &Projected) -> Result<[Vec<f32>; 2]>,
) -> Result<Vec<Array<2>>> {
    // Before the first block the memory is a prompt, at the level of embeddings.
    let mut memory = prompt.clone();
    let mut outputs = Vec::new();
    for (block, x) in text.iter().enumerate() {
        // Norm, projections, rotary positions. Tokens and memory rows share the weights.
        let start = (block * BLOCK) as i64;
        let (tokens, mem) = (layer.project(x, start)?, layer.project_memory(&memory, start)?);

        let [o, mem_o] = attention(&tokens, &mem)?;
        let [o, mem_o] = [(o, BLOCK), (mem_o, MEM)]
            .map(|(o, rows)| Array { shape: [rows, HEADS, HEAD_DIM], data: o.into_iter().map(f64::from).collect() });

        // W_o, residual, feed-forward: to the layer above.
        outputs.push(layer.finish(&o, x)?);
        // The memory rows take the same way, but come back to this same layer: they are the memory of the next block.
        memory = layer.feed_back(&layer.finish_memory(&mem_o, &memory, block as u64)?)?;
    }
    Ok(outputs)
}

/// q, k, v as the kernel takes them.
fn narrow(rows: &Projected) -> [Vec<f32>; 3] {
    [&rows.q, &rows.k, &rows.v].map(|x| x.data.iter().map(|&x| x as f32).collect())
}

/// Attention as one would write it down, in f32. `past` keeps the keys and values of all blocks.
fn naive_attention(shape: &Shape, past: &mut Vec<[Vec<f32>; 3]>, tokens: &Projected, mem: &Projected) -> [Vec<f32>; 2] {
    let mem = narrow(mem);
    past.push(narrow(tokens));
    let (block, before) = past.split_last().expect("there is a block");
    let window = &before[before.len().saturating_sub(WINDOW)..];
    // Head `h` of row `row`.
    let at = |x: &[f32], heads: usize, row: usize, h: usize| x[(row * heads + h) * HEAD_DIM..][..HEAD_DIM].to_vec();
    let keys = |[_, k, v]: &[Vec<f32>; 3], rows: usize, h: usize| -> Vec<_> {
        let h = h / shape.group();
        (0..rows).map(|row| (at(k, KV_HEADS, row, h), at(v, KV_HEADS, row, h))).collect()
    };
    let mut outputs = [Vec::new(), Vec::new()];
    for (row, h) in (0..BLOCK).flat_map(|row| (0..HEADS).map(move |h| (row, h))) {
        let window = window.iter().flat_map(|past| keys(past, BLOCK, h));
        let visible = window.chain(keys(&mem, MEM, h)).chain(keys(block, row + 1, h)).collect::<Vec<_>>();
        outputs[0].extend(softmax(&at(&block[0], HEADS, row, h), &visible, shape.scale()));
    }
    for (row, h) in (0..MEM).flat_map(|row| (0..HEADS).map(move |h| (row, h))) {
        let visible = [keys(&mem, MEM, h), keys(block, BLOCK, h)].concat();
        outputs[1].extend(softmax(&at(&mem[0], HEADS, row, h), &visible, shape.scale()));
    }
    outputs
}

/// One row over keys and values.
fn softmax(q: &[f32], keys: &[(Vec<f32>, Vec<f32>)], scale: f32) -> Vec<f32> {
    let logits: Vec<f32> = keys.iter().map(|(k, _)| scale * q.iter().zip(k).map(|(q, k)| q * k).sum::<f32>()).collect();
    let row_max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f32> = logits.iter().map(|logit| (logit - row_max).exp()).collect();
    let row_sum: f32 = weights.iter().sum();
    (0..q.len()).map(|c| weights.iter().zip(keys).map(|(p, (_, v))| p * v[c]).sum::<f32>() / row_sum).collect()
}

fn rms_error(outputs: &[Array<2>], reference: &[Array<2>]) -> f64 {
    let pairs = || outputs.iter().zip(reference).flat_map(|(x, y)| x.data.iter().zip(&y.data));
    (pairs().map(|(x, y)| (x - y).powi(2)).sum::<f64>() / pairs().count() as f64).sqrt()
}
