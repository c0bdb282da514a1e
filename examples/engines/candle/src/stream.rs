//! Inference: what a layer remembers of its streams, and steps through them.

use crate::attention::Attention;
use crate::threads::queue;
use crate::view::{self, Number, with_number};
use crate::wrap;
use candle_core::{Device, Result, Tensor};
use fam::cpu::Cpu;
use fam::{Pending, Rows, Step, Streams, ViewMut};

/// One layer's window of keys, memory rows and positions, one slot for each stream: constant in the length of the streams.
///
/// Tensors are (N, heads, rows, D), row n of the batch for slot `slots[n]`. A stream begins without a memory; every later block needs
/// [`Stream::set_memory`] or [`Stream::keep_memory`] before its first token, where the shape has memory rows.
#[derive(Debug)]
pub struct Stream {
    attention: Attention,
    streams: Streams<Cpu>,
}

impl Stream {
    /// As many empty streams as the attention serves in a call.
    ///
    /// # Errors
    /// Where memory runs out.
    pub fn new(attention: &Attention) -> Result<Self> {
        let streams = Streams::new(attention.cpu(), attention.plan()).map_err(wrap)?;
        Ok(Stream { attention: attention.clone(), streams })
    }

    /// Bytes of keys, values and memory of all streams.
    pub fn state_bytes(&self) -> u64 {
        self.streams.state_bytes()
    }

    /// Position of the stream's next token.
    ///
    /// # Errors
    /// For a slot out of range.
    pub fn position(&self, slot: u32) -> Result<u64> {
        self.streams.position(slot).map_err(wrap)
    }

    /// The memory of the block that the slots enter next, (N, Hkv, at most F, D).
    ///
    /// # Errors
    /// Inside a block, and for tensors that do not fit the shape.
    pub fn set_memory(&mut self, slots: &[u32], mem_k: &Tensor, mem_v: &Tensor) -> Result<()> {
        with_number!(self.attention.shape().dtype(), T, self.set_memory_of::<T>(slots, mem_k, mem_v))
    }

    /// Lets the memory of the block before serve the next one too.
    ///
    /// # Errors
    /// Inside a block.
    pub fn keep_memory(&mut self, slots: &[u32]) -> Result<()> {
        self.streams.keep_memory(slots).map_err(wrap)
    }

    /// The next tokens of the slots, inside the block that each is in: q (N, Hq, L, D), k and v (N, Hkv, L, D). Returns o like q. Takes effect
    /// at once; an engine that drops steps of all its layers together keeps each layer's [`Pending`] and commits them in the end.
    ///
    /// With `mem_q` (N, Hq, F, D) the memory rows attend too, to the memory and to the block's keys so far; o then has their F rows behind
    /// those of the tokens, (N, Hq, L + F, D). That takes one stream.
    ///
    /// # Errors
    /// For a block without a word about its memory, tokens past its end, and tensors that do not fit the shape.
    pub fn step(&mut self, slots: &[u32], q: &Tensor, k: &Tensor, v: &Tensor, mem_q: Option<&Tensor>) -> Result<Tensor> {
        with_number!(self.attention.shape().dtype(), T, self.step_of::<T>(slots, [q, k, v], mem_q))
    }

    fn set_memory_of<T: Number>(&mut self, slots: &[u32], mem_k: &Tensor, mem_v: &Tensor) -> Result<()> {
        let [k, v] = [mem_k, mem_v].map(Tensor::storage_and_layout);
        let (k, v) = (view::tokens::<T>(&k)?, view::tokens::<T>(&v)?);
        let plan = self.attention.plan();
        self.attention.with_scratch(|scratch| self.streams.set_memory(plan, &mut queue(), slots, k, v, scratch)).map_err(wrap)
    }

    fn step_of<T: Number>(&mut self, slots: &[u32], [q, k, v]: [&Tensor; 3], mem_q: Option<&Tensor>) -> Result<Tensor> {
        let (batch, heads, tokens, d) = q.dims4()?;
        let mem_rows = mem_q.map_or(Ok(0), |q| q.dim(2))?;
        if batch > 1 && mem_rows > 0 {
            candle_core::bail!("rows of {batch} streams and of their memory interleave in o: step them one by one");
        }
        let mut out = vec![T::from_f64(0.0); batch * (tokens + mem_rows) * heads * d];
        let (o, mem_o) = out.split_at_mut(batch * tokens * heads * d);

        let [q, k, v] = [q, k, v].map(Tensor::storage_and_layout);
        let mem_q = mem_q.map(Tensor::storage_and_layout);
        let rows = Rows::new(view::tokens::<T>(&q)?, ViewMut::tokens(o, [batch, tokens, heads, d]));
        let mut step = Step::new(slots, view::tokens::<T>(&k)?, view::tokens::<T>(&v)?).rows(rows);
        if let Some(mem_q) = &mem_q {
            step = step.mem_rows(Rows::new(view::tokens::<T>(mem_q)?, ViewMut::tokens(mem_o, [batch, mem_rows, heads, d])));
        }
        let plan = self.attention.plan();
        self.attention
            .with_scratch(|scratch| self.streams.step(plan, &mut queue(), step, scratch).map(Pending::commit))
            .map_err(wrap)?;
        Tensor::from_vec(out, (batch, tokens + mem_rows, heads, d), &Device::Cpu)?.transpose(1, 2)
    }
}
