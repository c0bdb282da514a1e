//! TransformerFAM whole (arXiv 2404.09173 v3, Algorithm 2): what a feedback memory is made from and where it goes.
//!
//! One layer, one block τ of B tokens, with memory F_{τ−1} of F rows, all in the residual stream `[.., d_model]`:
//!
//! ```text
//!   q, k, v             = rotate(QKV(norm(I_τ)))              positions of the block's tokens
//!   mem_q, mem_k, mem_v = rotate(QKV(norm(F_{τ-1})))          the same weights; positions of the last F tokens of block τ-1
//!   o, mem_o            = attend(q | mem_q over window, mem_k, k)
//!   A   = o W_o + I_τ                    O_τ = FF(norm(A)) + A               to the layer above
//!   A_F = mem_o W_o + F_{τ-1}            F_τ = FF(norm(A_F)) + A_F           to this layer, at block τ+1
//! ```
//!
//! Block 0 starts from a prompt, F rows at the level of token embeddings, and differs twice (App. B.1): its memory rows have no
//! residual (`A_F = mem_o W_o`), and F_0 of layer l is also what layer l + 1 starts from: the prompt travels up.
//!
//! The papers leave open, and chosen here: RMSNorm with gain as the norm, [`RMS_EPSILON`] under its root; FF is SwiGLU,
//! silu(x W_gate) · (x W_up) W_down; pairs of rotary channels ([`ROPE_THETA`]) are half-split; q and k of a memory row share one
//! position (−F … −1 at block 0). `feedback_norm` is ours and not the paper's: RMSNorm with a learned gain on the memory that is fed
//! back (not on the one that travels up), without which its magnitude grows with every block.
//!
//! To run the attention in a kernel, put it between the hooks: [`Layer::project`], [`Layer::project_memory`] → kernel →
//! [`Layer::finish`], [`Layer::finish_memory`] → [`Layer::feed_back`] → the next block's [`Layer::project_memory`].

use crate::array::check;
mod backward;

pub use crate::dense::{RMS_EPSILON, ROPE_THETA, Random};
use crate::dense::{add, gated, linear, rms_norm, rotate};
use crate::{Array, Attend, Rows, attend};
pub use backward::{LayerGradients, StackGradients};
use fam_core::{Result, Shape, Span};

/// Sizes of a [`Stack`].
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Sizes of the attention: Hq, Hkv, D, B, window, F and scale.
    pub shape: Shape,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Width of the feed-forward.
    pub d_ff: usize,
    /// Layers.
    pub layers: usize,
    /// Whether the memory is normalised before it is fed back.
    pub feedback_norm: bool,
}

/// Layers above each other, and the prompt that their memories grow from.
#[derive(Clone, Debug)]
pub struct Stack {
    /// From the bottom up.
    pub layers: Vec<Layer>,
    /// The initial memory of the lowest layer, `[F, d_model]`.
    pub prompt: Array<2>,
}

/// One layer's weights. Tokens and memory rows share them all. Linear maps are `[in, out]`.
#[derive(Clone, Debug)]
pub struct Layer {
    /// Sizes of the attention.
    pub shape: Shape,
    /// Gain of the norm before the attention, `[d_model]`.
    pub attend_norm: Array<1>,
    /// `[d_model, Hq·D]`.
    pub w_q: Array<2>,
    /// `[d_model, Hkv·D]`.
    pub w_k: Array<2>,
    /// `[d_model, Hkv·D]`.
    pub w_v: Array<2>,
    /// `[Hq·D, d_model]`.
    pub w_o: Array<2>,
    /// Gain of the norm before the feed-forward, `[d_model]`.
    pub ff_norm: Array<1>,
    /// `[d_model, d_ff]`.
    pub w_gate: Array<2>,
    /// `[d_model, d_ff]`.
    pub w_up: Array<2>,
    /// `[d_ff, d_model]`.
    pub w_down: Array<2>,
    /// Gain of the norm on the memory that is fed back, `[d_model]`; `None`: fed back as it is, as the paper does.
    pub feedback_norm: Option<Array<1>>,
}

/// Queries, keys and values of some rows, `[T, Hq, D]` and `[T, Hkv, D]`; q and k are rotated.
#[derive(Clone, Debug)]
pub struct Projected {
    /// Queries.
    pub q: Array<3>,
    /// Keys.
    pub k: Array<3>,
    /// Values.
    pub v: Array<3>,
}

/// One stream's way through one layer.
#[derive(Clone, Debug)]
pub struct LayerState {
    /// F_{τ−1}, `[F, d_model]`.
    pub memory: Array<2>,
    /// Position of the next token.
    position: u64,
    /// Added to every rotary position.
    position_offset: i64,
    /// Position of the first key kept.
    origin: u64,
    /// Keys that the window still reaches, `[1, T, Hkv, D]`.
    k: Array<4>,
    /// Values, as `k`.
    v: Array<4>,
}

/// One stream's way through a [`Stack`]. Its size does not grow with the stream.
#[derive(Clone, Debug)]
pub struct State {
    /// One for each layer, once block 0 has passed.
    pub layers: Vec<LayerState>,
    position_offset: i64,
}

impl LayerState {
    /// The start of a stream with the initial `memory`, `[F, d_model]`. `position_offset` is added to the rotary positions of all
    /// tokens and memory rows: the random position offset of training (App. B.2), 0 otherwise.
    pub fn new(shape: &Shape, memory: Array<2>, position_offset: i64) -> Self {
        let none = Array::zeros([1, 0, shape.kv_heads(), shape.head_dim()]);
        LayerState { memory, position: 0, position_offset, origin: 0, k: none.clone(), v: none }
    }

    /// Position of the next token.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Keys kept: the window's and the last block's, however long the stream.
    pub fn cached_rows(&self) -> usize {
        self.k.shape[1]
    }

    /// Drops the keys that no later row sees, then appends the block's.
    fn append(&mut self, tokens: &Projected, shape: &Shape) {
        let first = shape.window().first(self.position, shape.block_len()).max(self.origin);
        let dropped = (first - self.origin) as usize;
        self.origin = first;
        for (cache, new) in [(&mut self.k, &tokens.k), (&mut self.v, &tokens.v)] {
            let [rows, heads, d] = new.shape;
            cache.data.drain(..dropped * heads * d);
            cache.data.extend_from_slice(&new.data);
            cache.shape[1] = cache.shape[1] - dropped + rows;
        }
    }
}

impl Layer {
    /// Random weights, scaled so that a unit-variance input gives unit-variance outputs; gains of 1.
    fn random(config: &Config, random: &mut Random) -> Self {
        let &Config { shape, d_model, d_ff, .. } = config;
        let (q, kv) = (shape.heads() * shape.head_dim(), shape.kv_heads() * shape.head_dim());
        let ones = || Array::full([d_model], 1.0);
        let mut weights = |inputs: usize, outputs| random.array([inputs, outputs], 1.0 / (inputs as f64).sqrt());
        Layer {
            shape,
            attend_norm: ones(),
            w_q: weights(d_model, q),
            w_k: weights(d_model, kv),
            w_v: weights(d_model, kv),
            w_o: weights(q, d_model),
            ff_norm: ones(),
            w_gate: weights(d_model, d_ff),
            w_up: weights(d_model, d_ff),
            w_down: weights(d_ff, d_model),
            feedback_norm: config.feedback_norm.then(ones),
        }
    }

    /// rotate(QKV(norm(x))) of rows `[T, d_model]` at positions `first_position`, `first_position + 1`, …
    ///
    /// # Errors
    /// Where `x` or a weight has another width than the layer.
    pub fn project(&self, x: &Array<2>, first_position: i64) -> Result<Projected> {
        let x = rms_norm(x, "attend_norm", &self.attend_norm)?;
        let d = self.shape.head_dim();
        let project = |field, w: &Array<2>, heads: usize| {
            w.check(field, [x.shape[1], heads * d])?;
            Ok(Array { shape: [x.shape[0], heads, d], data: linear(&x, field, w)?.data })
        };
        let mut q = project("w_q", &self.w_q, self.shape.heads())?;
        let mut k = project("w_k", &self.w_k, self.shape.kv_heads())?;
        let v = project("w_v", &self.w_v, self.shape.kv_heads())?;
        rotate(&mut q, first_position);
        rotate(&mut k, first_position);
        Ok(Projected { q, k, v })
    }

    /// [`Layer::project`] of the `memory` `[F, d_model]` that serves the block whose first token is at `block_start`: at the last F
    /// positions before it.
    ///
    /// # Errors
    /// As [`Layer::project`].
    pub fn project_memory(&self, memory: &Array<2>, block_start: i64) -> Result<Projected> {
        self.project(memory, block_start.saturating_sub(self.shape.mem_len() as i64))
    }

    /// From the attention's `o` `[T, Hq, D]` to the layer's output `[T, d_model]`: W_o, the residual `x`, and the feed-forward.
    ///
    /// # Errors
    /// Where `o`, `x` or a weight has other sizes.
    pub fn finish(&self, o: &Array<3>, x: &Array<2>) -> Result<Array<2>> {
        self.feed_forward(add(self.project_output(o)?, x)?)
    }

    /// [`Layer::finish`] for the memory rows: F_τ from `mem_o` `[F, Hq, D]` and F_{τ−1}; at block 0 without the residual.
    ///
    /// # Errors
    /// As [`Layer::finish`].
    pub fn finish_memory(&self, mem_o: &Array<3>, memory: &Array<2>, block: u64) -> Result<Array<2>> {
        let projected = self.project_output(mem_o)?;
        self.feed_forward(if block == 0 { projected } else { add(projected, memory)? })
    }

    /// The memory of the next block from this block's F_τ.
    ///
    /// # Errors
    /// Where `memory` has another width than the gain.
    pub fn feed_back(&self, memory: &Array<2>) -> Result<Array<2>> {
        match &self.feedback_norm {
            Some(gain) => rms_norm(memory, "feedback_norm", gain),
            None => Ok(memory.clone()),
        }
    }

    /// o W_o.
    fn project_output(&self, o: &Array<3>) -> Result<Array<2>> {
        let [tokens, ..] = o.shape;
        let (heads, d) = (self.shape.heads(), self.shape.head_dim());
        o.check("o", [tokens, heads, d])?;
        self.w_o.check("w_o", [heads * d, self.attend_norm.shape[0]])?;
        linear(&Array { shape: [tokens, heads * d], data: o.data.clone() }, "w_o", &self.w_o)
    }

    /// FF(norm(a)) + a.
    fn feed_forward(&self, a: Array<2>) -> Result<Array<2>> {
        let x = rms_norm(&a, "ff_norm", &self.ff_norm)?;
        let hidden = gated(linear(&x, "w_gate", &self.w_gate)?, linear(&x, "w_up", &self.w_up)?);
        add(linear(&hidden, "w_down", &self.w_down)?, &a)
    }

    /// Algorithm 2: one block of tokens `x` `[≤ B, d_model]`. Returns O_τ, like `x`, and F_τ `[F, d_model]` as it travels up at block
    /// 0. Only the last block of a stream may have fewer than B tokens; its F_τ compresses those.
    ///
    /// # Errors
    /// Where sizes do not fit, `x` has more than B rows, or it follows a partial block; the state is then as before.
    pub fn block(&self, x: &Array<2>, state: &mut LayerState) -> Result<(Array<2>, Array<2>)> {
        let (rows, mem_len, block_len) = (x.shape[0], self.shape.mem_len(), self.shape.block_len());
        let (block, position) = (self.shape.block(state.position), state.position);
        check("x", format_args!("{rows} tokens"), rows <= block_len, format_args!("at most a block of {block_len}"))?;
        check("position", position, position.is_multiple_of(block_len as u64), "only a stream's last block is partial")?;
        state.k.check("state", [1, state.cached_rows(), self.shape.kv_heads(), self.shape.head_dim()])?;

        // 1. Queries, keys and values of tokens and memory.
        let start = (position as i64).saturating_add(state.position_offset);
        let tokens = self.project(x, start)?;
        let mem = self.project_memory(&state.memory, start)?;
        let mut next = state.clone();
        next.append(&tokens, &self.shape);

        // 2. One joint softmax for both groups of rows.
        let span = Span::new(0, position, rows as u32).with_origin(next.origin).with_mem_rows(mem_len as u32);
        let attended = attend(&Attend {
            shape: &self.shape,
            spans: &[span],
            q: Some(&batch_of_one(tokens.q)),
            mem_q: Some(&block_of_one(mem.q)),
            k: &next.k,
            v: &next.v,
            mem_k: Some(&block_of_one(mem.k)),
            mem_v: Some(&block_of_one(mem.v)),
            sink: None,
        })?;

        // 3. Residual and feed-forward; what becomes of the memory.
        let output = self.finish(&without_batch(attended.rows), x)?;
        let memory = self.finish_memory(&without_batch(attended.mem_rows), &state.memory, block)?;
        next.memory = self.feed_back(&memory)?;
        next.position += rows as u64;
        *state = next;
        Ok((output, memory))
    }

    /// All blocks of a sequence `x` `[L, d_model]` at once, as training goes: the same as [`Layer::block`] on each in turn. Returns
    /// the outputs, like `x`, and F_τ of every block, `[nb, F, d_model]`.
    ///
    /// # Errors
    /// Where sizes do not fit.
    pub fn sequence(&self, x: &Array<2>, memory: &Array<2>, position_offset: i64) -> Result<(Array<2>, Array<3>)> {
        let [rows, d_model] = x.shape;
        let (block_len, mem_len) = (self.shape.block_len(), self.shape.mem_len());
        let blocks = rows.div_ceil(block_len);

        // 1. Queries, keys and values of all tokens.
        let tokens = self.project(x, position_offset)?;
        let (q, k, v) = (batch_of_one(tokens.q), batch_of_one(tokens.k), batch_of_one(tokens.v));

        // 2. The only true recurrence: memory rows, block after block.
        let mut mem_k = Array::zeros([1, blocks, mem_len, self.shape.kv_heads(), self.shape.head_dim()]);
        let mut mem_v = mem_k.clone();
        let mut memories = Array::zeros([blocks, mem_len, d_model]);
        let mut memory = memory.clone();
        for block in 0..blocks {
            let start = block * block_len;
            let mem = self.project_memory(&memory, position_offset.saturating_add(start as i64))?;
            memory.check("memory", [mem_len, d_model])?;
            mem_k.row_mut(&[0, block]).copy_from_slice(&mem.k.data);
            mem_v.row_mut(&[0, block]).copy_from_slice(&mem.v.data);
            let span = Span::new(0, start as u64, block_len.min(rows - start) as u32).with_mem_rows(mem_len as u32);
            let attended = attend(&Attend {
                shape: &self.shape,
                spans: &[span],
                q: None,
                mem_q: Some(&block_of_one(mem.q)),
                k: &k,
                v: &v,
                mem_k: Some(&block_of_one(mem.k)),
                mem_v: Some(&block_of_one(mem.v)),
                sink: None,
            })?;
            let next = self.finish_memory(&without_batch(attended.mem_rows), &memory, block as u64)?;
            memories.row_mut(&[block]).copy_from_slice(&next.data);
            memory = self.feed_back(&next)?;
        }

        // 3. The block rows of all blocks in one call.
        let attended = attend(&Attend {
            shape: &self.shape,
            spans: &[Span::new(0, 0, rows as u32).with_mem_rows(mem_len as u32)],
            q: Some(&q),
            mem_q: None,
            k: &k,
            v: &v,
            mem_k: Some(&mem_k),
            mem_v: Some(&mem_v),
            sink: None,
        })?;
        Ok((self.finish(&without_batch(attended.rows), x)?, memories))
    }
}

impl Stack {
    /// Random weights and prompt from a seed, the same on every machine.
    pub fn random(config: &Config, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let layers = (0..config.layers).map(|_| Layer::random(config, &mut random)).collect();
        Stack { layers, prompt: random.array([config.shape.mem_len(), config.d_model], 1.0) }
    }

    /// The start of a stream; see [`LayerState::new`] for `position_offset`.
    pub fn start(&self, position_offset: i64) -> State {
        State { layers: Vec::with_capacity(self.layers.len()), position_offset }
    }

    /// One block of a stream, `[≤ B, d_model]`, through all layers.
    ///
    /// # Errors
    /// As [`Layer::block`].
    pub fn block(&self, x: &Array<2>, state: &mut State) -> Result<Array<2>> {
        let mut x = x.clone();
        let mut below = self.prompt.clone();
        let mut next = state.clone();
        for (l, layer) in self.layers.iter().enumerate() {
            if next.layers.len() == l {
                // Block 0: this layer's memory starts from the one below.
                next.layers.push(LayerState::new(&layer.shape, below, state.position_offset));
            }
            (x, below) = layer.block(&x, &mut next.layers[l])?;
        }
        *state = next;
        Ok(x)
    }

    /// A whole sequence, `[L, d_model]`, layer by layer: the same as [`Stack::block`] on each block in turn.
    ///
    /// # Errors
    /// As [`Layer::sequence`].
    pub fn sequence(&self, x: &Array<2>, position_offset: i64) -> Result<Array<2>> {
        let mut x = x.clone();
        let mut prompt = self.prompt.clone();
        for layer in &self.layers {
            let memories;
            (x, memories) = layer.sequence(&x, &prompt, position_offset)?;
            if memories.shape[0] > 0 {
                prompt.data.copy_from_slice(memories.row(&[0]));
            }
        }
        Ok(x)
    }
}

/// `[T, H, D]` as `[1, T, H, D]`.
fn batch_of_one(x: Array<3>) -> Array<4> {
    let [tokens, heads, d] = x.shape;
    Array { shape: [1, tokens, heads, d], data: x.data }
}

/// `[F, H, D]` as `[1, 1, F, H, D]`.
fn block_of_one(x: Array<3>) -> Array<5> {
    let [rows, heads, d] = x.shape;
    Array { shape: [1, 1, rows, heads, d], data: x.data }
}

/// The output `[1, 1, T, Hq, D]` of a call with one stream and block axis 1, as `[T, Hq, D]`; no rows where the call had none.
fn without_batch(rows: Option<Rows>) -> Array<3> {
    let Some(Rows { o, .. }) = rows else { return Array::zeros([0; 3]) };
    let [.., tokens, heads, d] = o.shape;
    Array { shape: [tokens, heads, d], data: o.data }
}
