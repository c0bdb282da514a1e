//! The backward pass of Algorithm 2: a whole sequence through [`Layer::sequence`] and [`Stack::sequence`], gradients through window and
//! memory included. Each step names the line of the forward pass that it differentiates, in reverse order.
//!
//! Nothing is detached: without gradients through the memory of all blocks the memory does not form.

use super::{Layer, Projected, Stack, batch_of_one, block_of_one, without_batch};
use crate::array::Array;
use crate::attend::{Attend, attend};
use crate::attend_backward::{AttendGradients, AttendUpstream, add, attend_backward};
use crate::dense::{gated, gated_backward, linear, linear_backward, rms_norm, rms_norm_backward, rotate_backward};
use fam_core::{Result, Span};

/// Gradients of a loss through [`Layer::sequence`].
#[derive(Clone, Debug)]
pub struct LayerGradients {
    /// Of the tokens, `[L, d_model]`.
    pub x: Array<2>,
    /// Of the initial memory, `[F, d_model]`.
    pub memory: Array<2>,
    /// Of each weight, in its place.
    pub weights: Layer,
}

/// Gradients of a loss through [`Stack::sequence`].
#[derive(Clone, Debug)]
pub struct StackGradients {
    /// Of the tokens, `[L, d_model]`.
    pub x: Array<2>,
    /// Of each weight and of the prompt, in its place.
    pub weights: Stack,
}

impl Stack {
    /// Gradients of a loss whose gradient with respect to the output of [`Stack::sequence`] is `d_output` `[L, d_model]`.
    ///
    /// # Errors
    /// Those of [`Stack::sequence`]; a `d_output` of other sizes.
    pub fn sequence_backward(&self, x: &Array<2>, position_offset: i64, d_output: &Array<2>) -> Result<StackGradients> {
        // What every layer was given: tokens, and the memory that travelled up.
        let mut inputs = vec![(x.clone(), self.prompt.clone())];
        for layer in &self.layers {
            let (x, mut memory) = inputs[inputs.len() - 1].clone();
            let (output, memories) = layer.sequence(&x, &memory, position_offset)?;
            if memories.shape[0] > 0 {
                memory.data.copy_from_slice(memories.row(&[0]));
            }
            inputs.push((output, memory));
        }
        let (mut d_x, mut d_memory) = (d_output.clone(), Array::zeros(self.prompt.shape));
        let mut layers = Vec::new();
        for (layer, (x, memory)) in self.layers.iter().zip(&inputs).rev() {
            // F_0 is what the layer above starts from.
            let mut d_memories =
                Array::zeros([x.shape[0].div_ceil(layer.shape.block_len()), d_memory.shape[0], d_memory.shape[1]]);
            if d_memories.shape[0] > 0 {
                d_memories.row_mut(&[0]).copy_from_slice(&d_memory.data);
            }
            let gradients = layer.sequence_backward(x, memory, position_offset, &d_x, &d_memories)?;
            (d_x, d_memory) = (gradients.x, gradients.memory);
            layers.push(gradients.weights);
        }
        layers.reverse();
        Ok(StackGradients { x: d_x, weights: Stack { layers, prompt: d_memory } })
    }
}

impl Layer {
    /// Gradients of a loss, given those with respect to both results of [`Layer::sequence`]: `d_output` `[L, d_model]` and, of F_τ of every
    /// block as it travels up, `d_memories` `[nb, F, d_model]`.
    ///
    /// # Errors
    /// Those of [`Layer::sequence`]; gradients of other sizes.
    pub fn sequence_backward(
        &self,
        x: &Array<2>,
        memory: &Array<2>,
        position_offset: i64,
        d_output: &Array<2>,
        d_memories: &Array<3>,
    ) -> Result<LayerGradients> {
        let (_, memories) = self.sequence(x, memory, position_offset)?;
        d_output.check("d_output", x.shape)?;
        d_memories.check("d_memories", memories.shape)?;
        let ([rows, d_model], [blocks, mem_len, _]) = (x.shape, memories.shape);
        let block_len = self.shape.block_len();
        let start = |block: usize| position_offset.saturating_add((block * block_len) as i64);
        let memory_at = |block: usize| match block {
            0 => Ok(memory.clone()),
            _ => self.feed_back(&Array { shape: [mem_len, d_model], data: memories.row(&[block - 1]).to_vec() }),
        };
        let mut weights = self.without_weights();

        // What the forward pass projected.
        let tokens = self.project(x, position_offset)?;
        let (q, k, v) = (batch_of_one(tokens.q), batch_of_one(tokens.k), batch_of_one(tokens.v));
        let mut mem_k = Array::zeros([1, blocks, mem_len, self.shape.kv_heads(), self.shape.head_dim()]);
        let mut mem_v = mem_k.clone();
        let mut mems = Vec::new();
        for block in 0..blocks {
            let mem = self.project_memory(&memory_at(block)?, start(block))?;
            mem_k.row_mut(&[0, block]).copy_from_slice(&mem.k.data);
            mem_v.row_mut(&[0, block]).copy_from_slice(&mem.v.data);
            mems.push(mem);
        }

        // 3. The block rows of all blocks: residual and feed-forward, then attention.
        let spans = [Span::new(0, 0, rows as u32).with_mem_rows(mem_len as u32)];
        let (mem_k, mem_v) = (Some(&mem_k), Some(&mem_v));
        let args = Attend { shape: &self.shape, spans: &spans, q: Some(&q), mem_q: None, k: &k, v: &v, mem_k, mem_v, sink: None };
        let saved = attend(&args)?;
        let o = without_batch(saved.rows.clone());
        let (d_o, mut d_x) = self.finish_backward(&o, Some(x), d_output, &mut weights)?;
        let d_o = block_of_one(d_o);
        let rows_back = attend_backward(&args, &saved, &AttendUpstream { d_o: Some(&d_o), ..AttendUpstream::default() })?;
        let AttendGradients { d_q, mut d_k, mut d_v, d_mem_k, d_mem_v, .. } = rows_back;
        let (d_mem_k, d_mem_v) = (d_mem_k.unwrap_or(Array::zeros([0; 5])), d_mem_v.unwrap_or(Array::zeros([0; 5])));

        // 2. The recurrence, from the last block to the first. `d_next` is the gradient of what a block feeds back.
        let mut d_next = Array::zeros([mem_len, d_model]);
        for (block, mem) in mems.into_iter().enumerate().rev() {
            let before = memory_at(block)?;
            let (k_of_block, v_of_block) = (block_of_one(mem.k), block_of_one(mem.v));
            let mem_q = block_of_one(mem.q);
            let len = block_len.min(rows - block * block_len);
            let spans = [Span::new(0, (block * block_len) as u64, len as u32).with_mem_rows(mem_len as u32)];
            let (mem_k, mem_v) = (Some(&k_of_block), Some(&v_of_block));
            let args = Attend {
                shape: &self.shape,
                spans: &spans,
                q: None,
                mem_q: Some(&mem_q),
                k: &k,
                v: &v,
                mem_k,
                mem_v,
                sink: None,
            };
            let saved = attend(&args)?;
            let mem_o = without_batch(saved.mem_rows.clone());

            // F_τ goes up, and back to this layer.
            let memory = Array { shape: [mem_len, d_model], data: memories.row(&[block]).to_vec() };
            let mut d_memory = self.feed_back_backward(&memory, d_next, &mut weights);
            add(&mut d_memory.data, 1.0, d_memories.row(&[block]));
            // At block 0 there is no residual.
            let residual = (block > 0).then_some(&before);
            let (d_mem_o, d_before) = self.finish_backward(&mem_o, residual, &d_memory, &mut weights)?;
            let d_mem_o = block_of_one(d_mem_o);
            let back = attend_backward(&args, &saved, &AttendUpstream { d_mem_o: Some(&d_mem_o), ..AttendUpstream::default() })?;
            add(&mut d_k.data, 1.0, &back.d_k.data);
            add(&mut d_v.data, 1.0, &back.d_v.data);

            // The block's memory keys served both groups of rows.
            let both = |of_mem: Option<Array<5>>, of_rows: &Array<5>| {
                let mut sum = without_block(of_mem);
                add(&mut sum.data, 1.0, of_rows.row(&[0, block]));
                sum
            };
            let d =
                Projected { q: without_block(back.d_mem_q), k: both(back.d_mem_k, &d_mem_k), v: both(back.d_mem_v, &d_mem_v) };
            d_next = d_before;
            let first = start(block).saturating_sub(mem_len as i64);
            add(&mut d_next.data, 1.0, &self.project_backward(&before, first, d, &mut weights)?.data);
        }

        // 1. Queries, keys and values of all tokens.
        let d = Projected { q: without_stream(d_q), k: without_stream(Some(d_k)), v: without_stream(Some(d_v)) };
        add(&mut d_x.data, 1.0, &self.project_backward(x, position_offset, d, &mut weights)?.data);
        Ok(LayerGradients { x: d_x, memory: d_next, weights })
    }

    /// The layer with all weights 0.
    fn without_weights(&self) -> Layer {
        let mut zero = self.clone();
        for w in [&mut zero.w_q, &mut zero.w_k, &mut zero.w_v, &mut zero.w_o, &mut zero.w_gate, &mut zero.w_up, &mut zero.w_down]
        {
            w.data.fill(0.0);
        }
        for gain in [&mut zero.attend_norm, &mut zero.ff_norm].into_iter().chain(&mut zero.feedback_norm) {
            gain.data.fill(0.0);
        }
        zero
    }

    /// [`Layer::project`]: the gradient of its rows `x`; those of the weights are added to `weights`.
    fn project_backward(&self, x: &Array<2>, first_position: i64, mut d: Projected, weights: &mut Layer) -> Result<Array<2>> {
        rotate_backward(&mut d.q, first_position);
        rotate_backward(&mut d.k, first_position);
        let normed = rms_norm(x, "attend_norm", &self.attend_norm)?;
        let mut d_normed = Array::zeros(x.shape);
        let projections =
            [(&self.w_q, &mut weights.w_q, d.q), (&self.w_k, &mut weights.w_k, d.k), (&self.w_v, &mut weights.w_v, d.v)];
        for (w, to, d_y) in projections {
            let [tokens, heads, head_dim] = d_y.shape;
            let (d_x, d_w) = linear_backward(&normed, w, &Array { shape: [tokens, heads * head_dim], data: d_y.data });
            add(&mut d_normed.data, 1.0, &d_x.data);
            add(&mut to.data, 1.0, &d_w.data);
        }
        let (d_x, d_gain) = rms_norm_backward(x, &self.attend_norm, &d_normed);
        add(&mut weights.attend_norm.data, 1.0, &d_gain.data);
        Ok(d_x)
    }

    /// [`Layer::finish`] and [`Layer::finish_memory`]: the gradients of `o` `[T, Hq, D]` and of the `residual`, 0 where there is none; those
    /// of the weights are added to `weights`.
    fn finish_backward(
        &self,
        o: &Array<3>,
        residual: Option<&Array<2>>,
        d_output: &Array<2>,
        weights: &mut Layer,
    ) -> Result<(Array<3>, Array<2>)> {
        // A = o W_o + residual; x = norm(A); output = (silu(x W_gate) · (x W_up)) W_down + A.
        let mut a = self.project_output(o)?;
        if let Some(residual) = residual {
            add(&mut a.data, 1.0, &residual.data);
        }
        let x = rms_norm(&a, "ff_norm", &self.ff_norm)?;
        let (gate, up) = (linear(&x, "w_gate", &self.w_gate)?, linear(&x, "w_up", &self.w_up)?);
        let hidden = gated(gate.clone(), up.clone());

        let (d_hidden, d_w_down) = linear_backward(&hidden, &self.w_down, d_output);
        let (d_gate, d_up) = gated_backward(&gate, &up, &d_hidden);
        let ((mut d_x, d_w_gate), (d_x_up, d_w_up)) =
            (linear_backward(&x, &self.w_gate, &d_gate), linear_backward(&x, &self.w_up, &d_up));
        add(&mut d_x.data, 1.0, &d_x_up.data);
        let (mut d_a, d_ff_norm) = rms_norm_backward(&a, &self.ff_norm, &d_x);
        add(&mut d_a.data, 1.0, &d_output.data);

        let flat = Array { shape: [o.shape[0], o.shape[1] * o.shape[2]], data: o.data.clone() };
        let (d_o, d_w_o) = linear_backward(&flat, &self.w_o, &d_a);
        for (to, d_w) in [
            (&mut weights.w_down, d_w_down),
            (&mut weights.w_gate, d_w_gate),
            (&mut weights.w_up, d_w_up),
            (&mut weights.w_o, d_w_o),
        ] {
            add(&mut to.data, 1.0, &d_w.data);
        }
        add(&mut weights.ff_norm.data, 1.0, &d_ff_norm.data);
        let d_residual = if residual.is_some() { d_a } else { Array::zeros(d_a.shape) };
        Ok((Array { shape: o.shape, data: d_o.data }, d_residual))
    }

    /// [`Layer::feed_back`]: the gradient of F_τ; that of the gain is added to `weights`.
    fn feed_back_backward(&self, memory: &Array<2>, d_next: Array<2>, weights: &mut Layer) -> Array<2> {
        let (Some(gain), Some(to)) = (&self.feedback_norm, &mut weights.feedback_norm) else { return d_next };
        let (d_memory, d_gain) = rms_norm_backward(memory, gain, &d_next);
        add(&mut to.data, 1.0, &d_gain.data);
        d_memory
    }
}

/// `[1, 1, F, H, D]` as `[F, H, D]`; nothing where the call had no memory rows.
fn without_block(x: Option<Array<5>>) -> Array<3> {
    let Some(Array { shape: [.., rows, heads, d], data }) = x else { return Array::zeros([0; 3]) };
    Array { shape: [rows, heads, d], data }
}

/// `[1, T, H, D]` as `[T, H, D]`; nothing where the call had no rows.
fn without_stream(x: Option<Array<4>>) -> Array<3> {
    let Some(Array { shape: [_, tokens, heads, d], data }) = x else { return Array::zeros([0; 3]) };
    Array { shape: [tokens, heads, d], data }
}
