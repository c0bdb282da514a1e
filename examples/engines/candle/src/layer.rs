//! A TransformerFAM layer (arXiv 2404.09173, Algorithm 2) of candle tensors.
//!
//! Tokens and memory rows go through norm, projections, W_o and feed-forward as one tensor of `[block | memory]` rows, as the method shares
//! all weights between them; only attention and residual tell them apart.

use crate::attention::{Attended, Attends};
use candle_core::{D, DType, Device, Result, Tensor, bail};
use fam::{Shape, Span};
use fam_ref::layer::{Layer as Reference, RMS_EPSILON, ROPE_THETA};

/// One layer's weights, linear maps as (in, out).
#[derive(Clone, Debug)]
pub struct Layer {
    /// Sizes of the attention.
    pub shape: Shape,
    /// (d_model).
    pub attend_norm: Tensor,
    /// (d_model, (Hq + 2·Hkv)·D): queries, keys and values in one map.
    pub w_qkv: Tensor,
    /// (Hq·D, d_model).
    pub w_o: Tensor,
    /// (d_model).
    pub ff_norm: Tensor,
    /// (d_model, d_ff).
    pub w_gate: Tensor,
    /// (d_model, d_ff).
    pub w_up: Tensor,
    /// (d_ff, d_model).
    pub w_down: Tensor,
    /// (d_model): the norm on the memory that is fed back, where there is one.
    pub feedback_norm: Option<Tensor>,
}

/// One batch's way through one layer. Its size does not grow with the streams.
#[derive(Clone, Debug)]
pub struct LayerState {
    /// F_{τ−1}, (N, F, d_model).
    pub memory: Tensor,
    /// Keys and values that the window still reaches, (N, Hkv, T, D).
    window: Option<(Tensor, Tensor)>,
    position: u64,
    origin: u64,
}

impl LayerState {
    /// The start of streams with the initial `memory` (N, F, d_model): a prompt at the lowest layer, F_0 of the layer below at the others.
    pub fn new(memory: Tensor) -> Self {
        LayerState { memory, window: None, position: 0, origin: 0 }
    }
}

impl Layer {
    /// The reference's weights as tensors of `dtype` on the CPU.
    ///
    /// # Errors
    /// Where an array does not have the elements that its shape says.
    pub fn from_reference(layer: &Reference, dtype: DType) -> Result<Self> {
        let vector = |x: &fam_ref::Array<1>| Tensor::from_slice(&x.data, &x.shape, &Device::Cpu)?.to_dtype(dtype);
        let matrix = |x: &fam_ref::Array<2>| Tensor::from_slice(&x.data, &x.shape, &Device::Cpu)?.to_dtype(dtype);
        Ok(Layer {
            shape: layer.shape,
            attend_norm: vector(&layer.attend_norm)?,
            w_qkv: Tensor::cat(&[matrix(&layer.w_q)?, matrix(&layer.w_k)?, matrix(&layer.w_v)?], 1)?,
            w_o: matrix(&layer.w_o)?,
            ff_norm: vector(&layer.ff_norm)?,
            w_gate: matrix(&layer.w_gate)?,
            w_up: matrix(&layer.w_up)?,
            w_down: matrix(&layer.w_down)?,
            feedback_norm: layer.feedback_norm.as_ref().map(vector).transpose()?,
        })
    }

    /// One whole block of tokens `x` (N, B, d_model). Returns the layer's output, like `x`, and F_τ (N, F, d_model) as it travels up at
    /// block 0.
    ///
    /// # Errors
    /// For a block of another length, and those of the attention.
    pub fn block(&self, x: &Tensor, state: &mut LayerState, attention: &dyn Attends) -> Result<(Tensor, Tensor)> {
        let ((n, tokens, _), f) = (x.dims3()?, self.shape.mem_len());
        if tokens != self.shape.block_len() {
            bail!("{tokens} tokens: expected a block of {}", self.shape.block_len());
        }
        let (heads, kv_heads, d) = (self.shape.heads(), self.shape.kv_heads(), self.shape.head_dim());

        // 1. Queries, keys and values of tokens and memory: transposed views of one projection.
        let rows = Tensor::cat(&[x, &state.memory], 1)?;
        let qkv = linear(&norm(&rows, &self.attend_norm)?, &self.w_qkv)?;
        let qkv = qkv.reshape((n, tokens + f, heads + 2 * kv_heads, d))?.transpose(1, 2)?;
        let start = state.position as i64;
        let positions: Vec<i64> = (start..start + tokens as i64).chain(start - f as i64..start).collect();
        let rotated = rotate(&qkv.narrow(1, 0, heads + kv_heads)?, &positions)?;
        let (q, k, v) =
            (rotated.narrow(1, 0, heads)?, rotated.narrow(1, heads, kv_heads)?, qkv.narrow(1, heads + kv_heads, kv_heads)?);

        // 2. One joint softmax for both groups of rows.
        let (k, v) = match &state.window {
            Some((past_k, past_v)) => (Tensor::cat(&[past_k, &k], 2)?, Tensor::cat(&[past_v, &v], 2)?),
            None => (k, v),
        };
        let spans: Vec<Span> = (0..n as u32)
            .map(|n| Span::new(n, state.position, tokens as u32).with_origin(state.origin).with_mem_rows(f as u32))
            .collect();
        let Attended { o, mem_o } = attention.attend(&spans, tokens, &q, &k, &v)?;

        // 3. Residual and feed-forward; at block 0 the memory has no residual.
        let [o, mem_o] = [o, mem_o].map(|o| linear(&o.transpose(1, 2)?.flatten_from(2)?, &self.w_o));
        let residual = if state.position == 0 { mem_o? } else { (mem_o? + &state.memory)? };
        let rows = self.feed_forward(&Tensor::cat(&[&(o? + x)?, &residual], 1)?)?;
        let (output, memory) = (rows.narrow(1, 0, tokens)?, rows.narrow(1, tokens, f)?);

        // 4. What the next block finds.
        state.memory = match &self.feedback_norm {
            Some(gain) => norm(&memory, gain)?,
            None => memory.clone(),
        };
        state.position += tokens as u64;
        let first = self.shape.window().first(state.position, self.shape.block_len()).max(state.origin);
        let (dropped, kept) = ((first - state.origin) as usize, (state.position - first) as usize);
        state.window = Some((k.narrow(2, dropped, kept)?, v.narrow(2, dropped, kept)?));
        state.origin = first;
        Ok((output, memory))
    }

    /// FF(norm(a)) + a.
    fn feed_forward(&self, a: &Tensor) -> Result<Tensor> {
        let x = norm(a, &self.ff_norm)?;
        let hidden = (linear(&x, &self.w_gate)?.silu()? * linear(&x, &self.w_up)?)?;
        linear(&hidden, &self.w_down)? + a
    }
}

/// x w of rows (N, T, in).
fn linear(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    x.broadcast_matmul(w)
}

/// x / rms(x) · gain.
fn norm(x: &Tensor, gain: &Tensor) -> Result<Tensor> {
    let rms = (x.sqr()?.mean_keepdim(D::Minus1)? + RMS_EPSILON)?.sqrt()?;
    x.broadcast_div(&rms)?.broadcast_mul(gain)
}

/// Turns channels i and i + D/2 of row t by positions[t] · θ^(−2i/D). x is (N, H, T, D).
fn rotate(x: &Tensor, positions: &[i64]) -> Result<Tensor> {
    let d = x.dim(D::Minus1)?;
    let half = d / 2;
    let angle = |&position: &i64| (0..half).map(move |i| position as f64 * ROPE_THETA.powf(-2.0 * i as f64 / d as f64));
    let angles: Vec<f64> = positions.iter().flat_map(angle).collect();
    // Angles are formed in f64: at position 100,000 an f32 has lost two digits of them.
    let angles = Tensor::from_vec(angles, (positions.len(), half), x.device())?;
    let (sin, cos) = (angles.sin()?.to_dtype(x.dtype())?, angles.cos()?.to_dtype(x.dtype())?);
    let (a, b) = (x.narrow(3, 0, half)?, x.narrow(3, half, half)?);
    let turned = [
        (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?,
        (a.broadcast_mul(&sin)? + b.broadcast_mul(&cos)?)?,
        x.narrow(3, 2 * half, d - 2 * half)?,
    ];
    // Along the last axis candle concatenates through a transposition, and leaves channels far apart.
    Tensor::cat(&turned, 3)?.contiguous()
}
