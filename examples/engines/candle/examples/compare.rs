//! fam's attention beside candle's own on the CPU, in turn in one run, on tensors of the same numbers; what each returns is compared first.
//!
//! ```sh
//! cargo run --release --example compare
//! ```

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::attention::{AttnMask, flash_attn};
use fam::{Shape, Span, Window};
use fam_candle::{Attends, Attention, Naive, Packing};
use fam_ref::Array;
use fam_ref::layer::Random;
use std::time::Instant;

/// Those of SmolLM2-135M.
const HEADS: usize = 9;
const KV_HEADS: usize = 3;
const D: usize = 64;
const ROUNDS: usize = 15;

/// A call: some blocks of a stream's tokens over a window and memory keys.
struct Case {
    name: &'static str,
    block: usize,
    blocks: usize,
    window: usize,
    mem: usize,
}

const CASES: [Case; 4] = [
    Case { name: "step: a block of 128 over 1 block and 4 memory rows", block: 128, blocks: 1, window: 1, mem: 4 },
    Case { name: "step: a block of 512 over 3 blocks and 64 memory rows", block: 512, blocks: 1, window: 3, mem: 64 },
    Case { name: "prefill: 16 blocks of 128, window of 1 block", block: 128, blocks: 16, window: 1, mem: 0 },
    Case { name: "prefill: 1024 tokens, causal", block: 1024, blocks: 1, window: 0, mem: 0 },
];

fn main() -> Result<()> {
    println!("{HEADS} query heads on {KV_HEADS} kv heads of {D}, f32, {} threads", rayon::current_num_threads());
    println!("| median of {ROUNDS}, ms | fam | candle: matmul, mask, softmax | candle: flash_attn |\n|---|---|---|---|");
    CASES.iter().try_for_each(|case| Device::Cpu.with_context(|| compare(case)))
}

fn compare(case: &Case) -> Result<()> {
    let &Case { name, block, blocks, window, mem } = case;
    let builder = Shape::builder().heads(HEADS).kv_heads(KV_HEADS).head_dim(D).block_len(block);
    let shape = builder.window(Window::Blocks(window)).mem_len(mem).build().map_err(candle_core::Error::wrap)?;
    // A step somewhere in a stream, or a stream from its beginning.
    let past = if blocks == 1 { window * block } else { 0 };
    let (rows, keys) = (blocks * block, past + blocks * block + blocks * mem);
    let span = [Span::new(0, past as u64, rows as u32).with_mem_rows(mem as u32)];
    let tensor = |seed, heads, rows| {
        let x: Array<4> = Random::new(seed).array([1, rows, heads, D], 1.0);
        Tensor::from_vec(x.data, (1, rows, heads, D), &Device::Cpu)?.to_dtype(DType::F32)
    };
    // (batch, rows, heads, dim) as projections return them: what flash_attn takes; the others take the transposed view.
    let rows_first = [tensor(1, HEADS, rows)?, tensor(2, KV_HEADS, keys)?, tensor(3, KV_HEADS, keys)?];
    let [q, k, v] = rows_first.each_ref().map(|x| x.transpose(1, 2));
    let (q, k, v) = (q?, k?, v?);

    let (attention, naive) = (Attention::new(&shape, 1, rows)?, Naive { shape });
    let packing = Packing::new(&shape, &span, rows, [&q, &k, &v])?;
    // Given for free: an engine makes it once for many layers.
    let mask = naive.mask(&span, &packing, &q)?;
    let flash_mask = match case {
        Case { blocks: 1, window: 0, mem: 0, .. } => AttnMask::causal(),
        _ => AttnMask::Mask(mask.squeeze(1)?.squeeze(0)?),
    };
    let flash = || {
        let [q, k, v] = &rows_first;
        flash_attn::<f32>(q, k, v, shape.scale(), flash_mask.clone(), None, None)
    };
    let fam = || Ok(attention.attend(&span, rows, &q, &k, &v)?.o);
    let naive = || naive.masked(&q, &k, &v, &mask);
    let ways: [&dyn Fn() -> Result<Tensor>; 3] = [&fam, &naive, &flash];

    let expected = ways[0]()?;
    for way in &ways[1..] {
        let apart = (way()? - &expected)?.abs()?.max_all()?.to_scalar::<f32>()?;
        if apart > 1e-4 {
            candle_core::bail!("{name}: {apart} apart");
        }
    }
    let mut times = [const { Vec::new() }; 3];
    for _ in 0..ROUNDS {
        for (way, times) in ways.iter().zip(&mut times) {
            let start = Instant::now();
            way()?;
            times.push(start.elapsed().as_secs_f64() * 1e3);
        }
    }
    let [fam, naive, flash] = times.map(|mut times| {
        times.sort_by(f64::total_cmp);
        times[ROUNDS / 2]
    });
    println!("| {name} | {fam:.2} | {naive:.2} | {flash:.2} |");
    Ok(())
}
