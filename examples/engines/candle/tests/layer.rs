//! Two TransformerFAM layers of candle tensors over eight blocks: the reference's outputs, in f32.

use candle_core::{DType, Device, Result, Tensor};
use fam::{Shape, Window};
use fam_candle::{Attends, Attention, Layer, LayerState, Naive};
use fam_ref::Array;
use fam_ref::layer::{Config, Random, Stack};

const BLOCKS: usize = 8;
const BLOCK: usize = 16;
const D_MODEL: usize = 48;

fn tensor(x: &Array<2>) -> Result<Tensor> {
    Tensor::from_slice(&x.data, (1, x.shape[0], x.shape[1]), &Device::Cpu)?.to_dtype(DType::F32)
}

/// The outputs of all blocks, one after the other.
fn run(stack: &Stack, text: &[Array<2>], attention: &dyn Attends) -> Result<Vec<f64>> {
    let layers = stack.layers.iter().map(|layer| Layer::from_reference(layer, DType::F32)).collect::<Result<Vec<_>>>()?;
    let mut states: Vec<LayerState> = Vec::new();
    let mut outputs = Vec::new();
    for x in text {
        let (mut x, mut below) = (tensor(x)?, tensor(&stack.prompt)?);
        for (l, layer) in layers.iter().enumerate() {
            if states.len() == l {
                // Block 0: this layer's memory starts from the one below.
                states.push(LayerState::new(below));
            }
            (x, below) = layer.block(&x, &mut states[l], attention)?;
        }
        outputs.extend(x.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?);
    }
    Ok(outputs)
}

fn rms(x: impl Iterator<Item = f64>) -> f64 {
    let (sum, n) = x.fold((0.0, 0), |(sum, n), x| (sum + x * x, n + 1));
    (sum / n as f64).sqrt()
}

#[test]
fn two_layers_over_eight_blocks() -> Result<()> {
    let builder = Shape::builder().heads(4).kv_heads(2).head_dim(12).block_len(BLOCK).window(Window::Blocks(2)).mem_len(5);
    let shape = builder.build().unwrap();
    for feedback_norm in [false, true] {
        let config = Config { shape, d_model: D_MODEL, d_ff: 96, layers: 2, feedback_norm };
        let stack = Stack::random(&config, 7);
        let mut random = Random::new(8);
        let text: Vec<Array<2>> = (0..BLOCKS).map(|_| random.array([BLOCK, D_MODEL], 1.0)).collect();

        let mut state = stack.start(0);
        let mut reference = Vec::new();
        for x in &text {
            reference.extend(stack.block(x, &mut state).map_err(candle_core::Error::wrap)?.data);
        }
        let ours = run(&stack, &text, &Attention::new(&shape, 1, BLOCK)?)?;
        let naive = run(&stack, &text, &Naive { shape })?;

        // Each block builds on the memory of the one before, so errors accumulate: no more than those of the same layers in f32
        // around candle's own operations.
        let [ours, naive] = [ours, naive].map(|x| {
            assert_eq!(x.len(), reference.len());
            rms(x.iter().zip(&reference).map(|(x, y)| x - y)) / rms(reference.iter().copied())
        });
        println!("relative error: {ours:.2e}, around candle's own attention {naive:.2e}");
        assert!(ours <= 2.0 * naive, "{ours:.2e} against {naive:.2e}");
        assert!(ours < 1e-5, "{ours:.2e}");
    }
    Ok(())
}
