//! The way back: gradients of the op, and through three blocks of two layers, beside those of candle's own operations.

mod common;

use candle_core::{DType, Device, Result, Tensor, Var};
use common::strided;
use fam::{Shape, Span, Window};
use fam_candle::{Attends, Attention, Layer, LayerState, Naive};
use fam_ref::Array;
use fam_ref::layer::{Config, Random, Stack};

const BLOCK: usize = 4;
const MEM: usize = 3;

fn shape() -> Shape {
    let builder = Shape::builder().heads(4).kv_heads(2).head_dim(8).block_len(BLOCK);
    builder.window(Window::Blocks(1)).mem_len(MEM).build().unwrap()
}

/// Relative distance of two tensors, by their largest elements.
fn apart(x: &Tensor, y: &Tensor) -> Result<f32> {
    let largest = |x: &Tensor| x.abs()?.max_all()?.to_scalar::<f32>();
    Ok(largest(&(x - y)?)? / largest(y)?)
}

#[test]
fn of_the_op() -> Result<()> {
    // Two blocks of two streams, the second of which has fewer memory keys.
    let spans = [Span::new(0, 4, 8).with_mem_rows(3), Span::new(1, 8, 8).with_origin(4).with_mem_rows(2)];
    let weight = strided(4, [2, 4, 8 + 2 * MEM, 8], DType::F32)?;
    let gradients = |attention: &dyn Attends, frozen: bool| -> Result<Vec<Tensor>> {
        let rows = if frozen { 8 } else { 8 + 2 * MEM };
        let leaf = |seed, heads, rows| Var::from_tensor(&strided(seed, [2, heads, rows, 8], DType::F32)?);
        let (q, k, v) = (leaf(1, 4, rows)?, leaf(2, 2, 12 + 2 * MEM)?, leaf(3, 2, 12 + 2 * MEM)?);
        let out = attention.attend(&spans, 8, &q, &k, &v)?;
        let out = Tensor::cat(&[out.o, out.mem_o], 2)?;
        let grads = (out * weight.narrow(2, 0, rows)?)?.sum_all()?.backward()?;
        let of = |x: &Var| grads.get(x).cloned().ok_or_else(|| candle_core::Error::msg("no gradient"));
        Ok(vec![of(&q)?, of(&k)?, of(&v)?])
    };
    for frozen in [false, true] {
        let ours = gradients(&Attention::new(&shape(), 2, 8)?, frozen)?;
        let naive = gradients(&Naive { shape: shape() }, frozen)?;
        for ((ours, naive), name) in ours.iter().zip(&naive).zip(["q", "k", "v"]) {
            let apart = apart(ours, naive)?;
            assert!(apart < 1e-5, "d_{name}: {apart}");
        }
    }
    Ok(())
}

#[test]
fn through_three_blocks_of_two_layers() -> Result<()> {
    let config = Config { shape: shape(), d_model: 32, d_ff: 48, layers: 2, feedback_norm: true };
    let stack = Stack::random(&config, 5);
    let text: Array<4> = Random::new(6).array([3, 1, BLOCK, 32], 1.0);
    let text = Tensor::from_slice(&text.data, &text.shape, &Device::Cpu)?.to_dtype(DType::F32)?;
    let layers = stack.layers.iter().map(|layer| Layer::from_reference(layer, DType::F32)).collect::<Result<Vec<_>>>()?;

    // Only what the last block returns is looked at: the prompt reaches it through every memory on the way.
    let gradient = |attention: &dyn Attends| -> Result<Tensor> {
        let prompt = Tensor::from_slice(&stack.prompt.data, (1, MEM, 32), &Device::Cpu)?.to_dtype(DType::F32)?;
        let prompt = Var::from_tensor(&prompt)?;
        let (mut states, mut last): (Vec<LayerState>, _) = (Vec::new(), None);
        for block in 0..3 {
            let (mut x, mut below) = (text.get(block)?, prompt.as_tensor().clone());
            for (l, layer) in layers.iter().enumerate() {
                if states.len() == l {
                    states.push(LayerState::new(below));
                }
                (x, below) = layer.block(&x, &mut states[l], attention)?;
            }
            last = Some(x);
        }
        let grads = last.map_or_else(|| candle_core::bail!("no block"), |x| x.sqr()?.sum_all()?.backward())?;
        grads.get(&prompt).cloned().ok_or_else(|| candle_core::Error::msg("no gradient"))
    };
    let ours = gradient(&Attention::new(&shape(), 1, BLOCK)?)?;
    let naive = gradient(&Naive { shape: shape() })?;
    let apart = apart(&ours, &naive)?;
    assert!(apart < 1e-4, "{apart}");
    Ok(())
}
