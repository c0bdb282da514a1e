//! What the model remembers of the text.

use crate::model::Model;
use candle_core::{Result, Tensor, bail};
use fam::{Shape, Window};
use fam_candle::{Attention, Stream};

/// What a token sees beside the window and its own block.
#[derive(Clone, Debug)]
pub enum Memory {
    /// Nothing.
    None,
    /// The text's first `rows` tokens, once the window has left them behind: their keys, turned so that they stay just in front of it.
    Frozen {
        /// How many.
        rows: usize,
    },
    /// Memory rows that every layer makes anew after each block, from the embeddings of a `prompt` on (Algorithm 2).
    Feedback {
        /// One token for each row.
        prompt: Vec<u32>,
    },
}

/// One text's way through the model.
#[derive(Debug)]
pub struct Session {
    /// One for each layer.
    pub layers: Vec<Layer>,
    pub memory: Memory,
    shape: Shape,
    /// Tokens so far.
    pub position: u64,
}

/// Where some tokens begin.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// Position of the first.
    pub start: i64,
    /// Whether it is the first of its block.
    pub is_at_block: bool,
    /// The first position of its block's window.
    pub window_start: i64,
}

/// One text's way through one layer.
#[derive(Debug)]
pub struct Layer {
    pub stream: Stream,
    /// Keys without rotary positions, and values, of the text's first tokens: (1, Hkv, rows, D).
    pub first: Option<(Tensor, Tensor)>,
    /// F_{τ−1}, (1, F, d_model), once it is known.
    pub memory: Option<Tensor>,
}

impl Session {
    /// The start of a text in blocks of `block` tokens that see `window` blocks back.
    pub fn new(model: &Model, block: usize, window: usize, memory: Memory) -> Result<Self> {
        let mem_len = match &memory {
            Memory::None => 0,
            Memory::Frozen { rows } => *rows,
            Memory::Feedback { prompt } => prompt.len(),
        };
        if mem_len > block {
            bail!("a memory of {mem_len} rows: at most a block of {block}");
        }
        let shape = model.shape().block_len(block).window(Window::Blocks(window)).mem_len(mem_len);
        let shape = shape.build().map_err(candle_core::Error::wrap)?;
        // One plan and one scratch memory for all layers; a ring for each.
        let attention = Attention::new(&shape, 1, block)?;
        let layer = |_| Ok(Layer { stream: Stream::new(&attention)?, first: None, memory: None });
        Ok(Session { layers: (0..model.layers()).map(layer).collect::<Result<_>>()?, memory, shape, position: 0 })
    }

    /// B.
    pub fn block_len(&self) -> usize {
        self.shape.block_len()
    }

    /// The place of the next tokens.
    pub fn call(&self) -> Call {
        let block_len = self.shape.block_len();
        Call {
            start: self.position as i64,
            is_at_block: self.position.is_multiple_of(block_len as u64),
            window_start: self.shape.window().first(self.position, block_len) as i64,
        }
    }

    /// Bytes of everything that is kept between blocks.
    pub fn state_bytes(&self) -> u64 {
        let bytes = |x: &Tensor| (x.elem_count() * x.dtype().size_in_bytes()) as u64;
        let layer = |layer: &Layer| {
            let first = layer.first.as_ref().map_or(0, |(k, v)| bytes(k) + bytes(v));
            layer.stream.state_bytes() + first + layer.memory.as_ref().map_or(0, bytes)
        };
        self.layers.iter().map(layer).sum()
    }
}
