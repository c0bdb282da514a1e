//! SmolLM2: a Llama of 30 layers, 9 query heads on 3 kv heads of 64, from a GGUF file.

use crate::session::{Call, Layer, Memory, Session};
use candle_core::quantized::gguf_file::{Content, Value};
use candle_core::{Device, Module, Result, Tensor, bail};
use candle_nn::ops::rms_norm;
use candle_nn::rotary_emb::rope_i;
use candle_nn::{Embedding, Linear};
use fam::{Shape, ShapeBuilder};
use std::io::{Read, Seek};

/// Weights in f32: with a block of tokens at a time the products are bound by arithmetic, and quantised ones are slower.
pub struct Model {
    embedding: Embedding,
    blocks: Vec<Block>,
    norm: Tensor,
    head: Linear,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    eps: f32,
    theta: f64,
}

struct Block {
    attend_norm: Tensor,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    ff_norm: Tensor,
    gate: Linear,
    up: Linear,
    down: Linear,
}

/// Rotary positions of some rows: cosines and sines, (rows, D/2).
type Angles = (Tensor, Tensor);

impl Model {
    /// Reads all weights.
    pub fn new(content: &Content, file: &mut (impl Read + Seek)) -> Result<Self> {
        let value = |key: &str| -> Result<&Value> {
            content.metadata.get(key).ok_or_else(|| candle_core::Error::msg(format!("the model file lacks {key}")))
        };
        let size = |key: &str| Ok::<_, candle_core::Error>(value(key)?.to_u32()? as usize);
        if value("general.architecture")?.to_string()? != "llama" {
            bail!("the model file is no Llama");
        }
        let mut tensor = |name: &str| content.tensor(file, name, &Device::Cpu)?.dequantize(&Device::Cpu);
        let embedding = tensor("token_embd.weight")?;
        let mut blocks = Vec::new();
        for l in 0..size("llama.block_count")? {
            let mut tensor = |name: &str| tensor(&format!("blk.{l}.{name}.weight"));
            blocks.push(Block {
                attend_norm: tensor("attn_norm")?,
                q: Linear::new(tensor("attn_q")?, None),
                k: Linear::new(tensor("attn_k")?, None),
                v: Linear::new(tensor("attn_v")?, None),
                o: Linear::new(tensor("attn_output")?, None),
                ff_norm: tensor("ffn_norm")?,
                gate: Linear::new(tensor("ffn_gate")?, None),
                up: Linear::new(tensor("ffn_up")?, None),
                down: Linear::new(tensor("ffn_down")?, None),
            });
        }
        Ok(Model {
            norm: tensor("output_norm.weight")?,
            // Input and output share one matrix.
            head: Linear::new(embedding.clone(), None),
            embedding: Embedding::new(embedding, size("llama.embedding_length")?),
            blocks,
            heads: size("llama.attention.head_count")?,
            kv_heads: size("llama.attention.head_count_kv")?,
            head_dim: size("llama.rope.dimension_count")?,
            eps: value("llama.attention.layer_norm_rms_epsilon")?.to_f32()?,
            theta: f64::from(value("llama.rope.freq_base")?.to_f32()?),
        })
    }

    /// The sizes that the weights fix.
    pub fn shape(&self) -> ShapeBuilder {
        Shape::builder().heads(self.heads).kv_heads(self.kv_heads).head_dim(self.head_dim)
    }

    /// Number of layers.
    pub fn layers(&self) -> usize {
        self.blocks.len()
    }

    /// Logits (tokens, vocabulary) behind each of the next tokens, all inside one block; with feedback memory, a whole one or the text's last.
    pub fn forward(&self, ids: &[u32], session: &mut Session) -> Result<Tensor> {
        let call = session.call();
        let mut x = self.embed(ids)?;
        // Feedback memory starts as a prompt, and what a layer makes of it in block 0 is also what the next layer starts from.
        let mut memory = match &session.memory {
            Memory::Feedback { prompt } => Some(self.embed(prompt)?),
            _ => None,
        };
        for (block, layer) in self.blocks.iter().zip(&mut session.layers) {
            (x, memory) = self.block(block, x, layer.memory.take().or(memory), layer, &session.memory, &call)?;
            layer.memory = memory.clone();
        }
        session.position += ids.len() as u64;
        self.head.forward(&rms_norm(&x, &self.norm, self.eps)?)?.squeeze(0)
    }

    /// One layer: tokens `x` (1, L, d_model), and F_{τ−1} where there is feedback memory. Returns both one layer up: O_τ and F_τ.
    fn block(
        &self,
        block: &Block,
        x: Tensor,
        memory: Option<Tensor>,
        layer: &mut Layer,
        kind: &Memory,
        call: &Call,
    ) -> Result<(Tensor, Option<Tensor>)> {
        // 1. Queries, keys and values; tokens and memory rows share the weights.
        let tokens = x.dim(1)?;
        let rows = match &memory {
            Some(memory) => Tensor::cat(&[&x, memory], 1)?,
            None => x.clone(),
        };
        let mem_rows = rows.dim(1)? - tokens;
        let normed = rms_norm(&rows, &block.attend_norm, self.eps)?;
        let heads = |linear: &Linear, heads| {
            linear.forward(&normed)?.reshape((1, tokens + mem_rows, heads, self.head_dim))?.transpose(1, 2)
        };
        let (q, k, v) = (heads(&block.q, self.heads)?, heads(&block.k, self.kv_heads)?, heads(&block.v, self.kv_heads)?);
        let angles = self.angles((call.start..call.start + tokens as i64).chain(call.start - mem_rows as i64..call.start))?;
        let (turned_q, turned_k) = (turn(&q, &angles)?, turn(&k, &angles)?);
        let split = |x: &Tensor| Ok::<_, candle_core::Error>((x.narrow(2, 0, tokens)?, x.narrow(2, tokens, mem_rows)?));
        let ((q, mem_q), (block_k, mem_k), (block_v, mem_v)) = (split(&turned_q)?, split(&turned_k)?, split(&v)?);

        // 2. The memory of the block that begins.
        if let (Memory::Frozen { rows }, 0) = (kind, call.start) {
            let rows = tokens.min(*rows);
            layer.first = Some((k.narrow(2, 0, rows)?.contiguous()?, v.narrow(2, 0, rows)?.contiguous()?));
        }
        match (kind, &layer.first) {
            (Memory::None, _) => {}
            _ if !call.is_at_block => {}
            (Memory::Feedback { .. }, _) => layer.stream.set_memory(&[0], &mem_k, &mem_v)?,
            (Memory::Frozen { .. }, Some((k, v))) if call.window_start > 0 => {
                let angles = self.angles(call.window_start - k.dim(2)? as i64..call.window_start)?;
                layer.stream.set_memory(&[0], &turn(k, &angles)?, v)?;
            }
            // The window still reaches the first tokens.
            (Memory::Frozen { .. }, _) => layer.stream.keep_memory(&[0])?,
        }

        // 3. Attention.
        let mem_q = memory.as_ref().map(|_| &mem_q);
        let o = layer.stream.step(&[0], &q, &block_k, &block_v, mem_q)?;
        let o = block.o.forward(&o.transpose(1, 2)?.flatten_from(2)?)?;

        // 4. Residual and feed-forward. At block 0 the memory rows have no residual.
        let residual = match &memory {
            Some(memory) if call.start == 0 => Tensor::cat(&[x, memory.zeros_like()?], 1)?,
            _ => rows,
        };
        let a = (o + residual)?;
        let normed = rms_norm(&a, &block.ff_norm, self.eps)?;
        let hidden = (block.gate.forward(&normed)?.silu()? * block.up.forward(&normed)?)?;
        let rows = (block.down.forward(&hidden)? + a)?;
        let memory = memory.map(|_| rows.narrow(1, tokens, mem_rows)).transpose()?;
        Ok((rows.narrow(1, 0, tokens)?.contiguous()?, memory))
    }

    /// (1, tokens, d_model).
    fn embed(&self, ids: &[u32]) -> Result<Tensor> {
        self.embedding.forward(&Tensor::new(ids, &Device::Cpu)?)?.unsqueeze(0)
    }

    /// Position · θ^(−2i/D), formed in f64: f32 would lose digits as the text goes on.
    fn angles(&self, positions: impl Iterator<Item = i64>) -> Result<Angles> {
        let half = self.head_dim / 2;
        let frequency = |i: usize| self.theta.powf(-2.0 * i as f64 / self.head_dim as f64);
        let angles: Vec<f64> = positions.flat_map(|p| (0..half).map(move |i| p as f64 * frequency(i))).collect();
        let table = |f: fn(f64) -> f64| {
            let table: Vec<f32> = angles.iter().map(|&angle| f(angle) as f32).collect();
            Tensor::from_vec(table, (angles.len() / half, half), &Device::Cpu)
        };
        Ok((table(f64::cos)?, table(f64::sin)?))
    }
}

/// Rotary positions: x (1, H, rows, D), channels 2i and 2i + 1 a pair, as GGUF files of Llamas have them.
fn turn(x: &Tensor, (cos, sin): &Angles) -> Result<Tensor> {
    rope_i(&x.contiguous()?, cos, sin)
}
