//! The host's part of one stream: where it stands, and how a step moves it.

use crate::{Error, Result, Shape, Span};

/// Position and entries of one slot. Plain values: a step computes the next one, a commit stores it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Slot {
    pub origin: u64,
    pub position: u64,
    /// Entry of the memory that served the block before. It moves on with a block's last token, so that a rollback to the first one finds
    /// all as it was.
    pub mem_entry: u32,
    pub mem_rows: u32,
    pub staged: Staged,
    pub state_entry: u32,
    pub poisoned: bool,
}

/// The memory of the block of the next token.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) enum Staged {
    #[default]
    None,
    /// The entry of the block before serves again.
    Kept,
    /// The other entry, with so many rows.
    Set(u32),
}

impl Slot {
    /// A memory can be exchanged only before the first token of a block.
    pub fn check_boundary(&self, shape: &Shape) -> Result<()> {
        if !self.position.is_multiple_of(shape.block_len() as u64) && self.position != self.origin {
            let rule = "at a block's boundary: the memory of a block that has tokens is fixed";
            return Err(Error::invalid("position", self.position, rule));
        }
        Ok(())
    }

    /// Tokens of the current block that are already there.
    pub fn tokens_in_block(&self, shape: &Shape) -> u64 {
        let block = self.position - self.position % shape.block_len() as u64;
        self.position - block.max(self.origin)
    }

    /// Entry and rows of the memory that serves the block of the next token.
    pub fn memory(&self, shape: &Shape, slot: u32) -> Result<(u32, u32)> {
        let block = shape.block(self.position);
        match self.staged {
            _ if shape.mem_len() == 0 => Ok((0, 0)),
            Staged::Set(rows) => Ok((self.mem_entry ^ 1, rows)),
            Staged::Kept => Ok((self.mem_entry, self.mem_rows)),
            // A stream without an initial memory.
            Staged::None if block == shape.block(self.origin) => Ok((self.mem_entry, 0)),
            Staged::None => Err(Error::MemoryDue { slot, block }),
        }
    }

    /// The span of the next `len` tokens, and the slot after them.
    pub fn advance(&self, shape: &Shape, slot: u32, len: u32) -> Result<(Span, Slot)> {
        let span = Span { state_entry: self.state_entry, ..Span::new(slot, self.position, len).with_origin(self.origin) };
        if len == 0 {
            return Ok((span, *self));
        }
        let block_len = shape.block_len() as u64;
        let room = block_len - self.position % block_len;
        if u64::from(len) > room {
            let rule = format!("at most {room}: a step stays inside one block of {block_len}");
            return Err(Error::invalid("len", len, rule));
        }
        if self.position + u64::from(len) > u64::MAX / 2 {
            let requested = self.position + u64::from(len);
            return Err(Error::LimitExceeded { what: "position after the step", requested, max: u64::MAX / 2 });
        }
        let (mem_entry, mem_rows) = self.memory(shape, slot)?;
        let mut next = Slot { position: self.position + u64::from(len), ..*self };
        if u64::from(len) == room {
            let state_entry = self.state_entry ^ 1;
            next = Slot { mem_entry, mem_rows, staged: Staged::None, state_entry, ..next };
        }
        Ok((Span { mem_entry, mem_rows, ..span }, next))
    }
}
