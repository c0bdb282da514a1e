//! Spans: which tokens of which stream a call covers, and which rows of the cached tensors are that stream's.

use crate::{Error, Result, Shape, Spec};

/// The part of one stream that a call covers: tokens `start .. start + len`.
///
/// Plain data of 40 bytes, so that an array of spans can also lie in a device buffer ([`Spans::Device`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Span {
    /// Absolute position of the call's first token.
    pub start: u64,
    /// Absolute position of the stream's first key. Earlier keys do not exist; a ring's row of position j is `(j − origin) mod C`.
    pub origin: u64,
    /// Tokens in the call.
    pub len: u32,
    /// Row of every cached tensor (ring, linear cache, `mem_k`, `mem_v`, `m`, `z`) that is this stream's. No slot twice in a call.
    pub slot: u32,
    /// Memory keys present, at most F: a stream without an initial memory has 0 in its first block.
    pub mem_rows: u32,
    /// Entry (axis `blocks`) of `mem_k`, `mem_v` that serves the call's first block; the i-th block reads entry `(mem_entry + i) mod entries`.
    pub mem_entry: u32,
    /// Entry of `m`, `z` before the call's first block; the i-th block reads `(state_entry + i) mod entries` and writes the entry after it.
    pub state_entry: u32,
    /// Unused; 0.
    pub reserved: u32,
}

impl Span {
    /// Tokens `start .. start + len` of the stream in `slot`, whose first key has position 0; all memory rows absent.
    pub fn new(slot: u32, start: u64, len: u32) -> Self {
        Span { start, len, slot, ..Span::default() }
    }

    /// The same span with `mem_rows` memory keys present.
    #[must_use]
    pub fn with_mem_rows(mut self, mem_rows: u32) -> Self {
        self.mem_rows = mem_rows;
        self
    }

    /// The same span of a stream whose first key has position `origin`.
    #[must_use]
    pub fn with_origin(mut self, origin: u64) -> Self {
        self.origin = origin;
        self
    }

    /// One past the last token's position.
    pub fn end(&self) -> u64 {
        self.start.saturating_add(self.len.into())
    }

    /// nb: blocks that the tokens touch; 0 without tokens.
    pub fn blocks(&self, block_len: usize) -> usize {
        if self.len == 0 {
            return 0;
        }
        let b = block_len.max(1) as u64;
        // A span at the end of u64, which no op takes, has one block too.
        ((self.end() - 1).max(self.start) / b - self.start / b + 1) as usize
    }

    /// Positions of the keys that the memory rows of the call's `i`-th block see: the block's keys up to the call's end.
    pub fn block_keys(&self, i: usize, block_len: usize) -> std::ops::Range<u64> {
        let b = block_len.max(1) as u64;
        let first = (self.start / b).saturating_add(i as u64).saturating_mul(b);
        first.max(self.origin)..first.saturating_add(b).min(self.end())
    }

    /// Position of the first key that a block row at `position` sees.
    pub fn window_first(&self, position: u64, shape: &Shape) -> u64 {
        shape.window().first(position, shape.block_len()).max(self.origin)
    }

    /// Smallest position of any key that the call may read.
    pub fn first_key(&self, shape: &Shape) -> u64 {
        let block = self.start - self.start % shape.block_len() as u64;
        self.window_first(self.start, shape).min(block.max(self.origin))
    }

    /// The span cut to what the plan serves: for spans read from a device buffer, where an error cannot be returned.
    #[must_use]
    pub fn clamped(mut self, spec: &Spec) -> Self {
        let block_len = spec.shape().block_len();
        if self.slot as usize >= spec.slots() || self.origin > self.start || self.start > u64::MAX / 2 {
            return Span::default();
        }
        let in_blocks = (spec.blocks() * block_len) as u64 - self.start % block_len as u64;
        self.len = u64::from(self.len).min(spec.rows() as u64).min(in_blocks) as u32;
        self.mem_rows = self.mem_rows.min(spec.shape().mem_len() as u32);
        self
    }
}

/// The spans of a call, one for each stream of the batch.
#[derive(Debug)]
pub enum Spans<'a, M: ?Sized> {
    /// Host values; checked before anything is enqueued.
    Host(&'a [Span]),
    /// `batch` spans in device memory, as [`Span`] lays them out, at byte 0. The kernel reads them, clamps them to the plan
    /// ([`Span::clamped`]) and to the sizes of the views, and takes `mem_rows` for 0 where there are no memory keys; so a captured graph
    /// can be replayed as the streams move on.
    Device {
        /// The memory that holds them.
        mem: &'a M,
        /// How many.
        batch: usize,
    },
}

impl<M: ?Sized> Clone for Spans<'_, M> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<M: ?Sized> Copy for Spans<'_, M> {}

impl<'a, M: crate::Memory + ?Sized> Spans<'a, M> {
    /// N.
    pub fn batch(&self) -> usize {
        match self {
            Spans::Host(spans) => spans.len(),
            Spans::Device { batch, .. } => *batch,
        }
    }

    /// Checks the spans against the plan; the largest `len`, nb and one past the largest slot.
    pub(crate) fn validate(&self, spec: &Spec) -> Result<Extent> {
        let batch = self.batch();
        if batch > spec.batch() {
            return Err(Error::LimitExceeded {
                what: "streams in a call (batch)",
                requested: batch as u64,
                max: spec.batch() as u64,
            });
        }
        match self {
            Spans::Host(spans) => validate_host(spans, spec),
            Spans::Device { mem, batch } => {
                let need = (batch * size_of::<Span>()) as u64;
                if mem.bytes() < need {
                    return Err(Error::invalid("spans", format!("{} bytes", mem.bytes()), format!("at least {need} bytes")));
                }
                // What a device span may name is only known to the kernel: views must serve the plan's maxima.
                Ok(Extent { batch: *batch, rows: spec.rows(), blocks: spec.blocks(), slots: spec.slots(), keys: None })
            }
        }
    }
}

impl Spans<'_, [u8]> {
    /// The span of stream `n`, for a backend whose memory is the host's: as given, or read from memory and clamped to the plan. An empty one
    /// beyond the batch.
    pub fn get(&self, n: usize, spec: &Spec) -> Span {
        match self {
            Spans::Host(spans) => spans.get(n).copied().unwrap_or_default(),
            Spans::Device { mem, batch } => {
                // A caller's buffer may begin at any address.
                let bytes = mem.chunks_exact(size_of::<Span>()).take(*batch).nth(n);
                bytes.map_or(Span::default(), |bytes| bytemuck::pod_read_unaligned::<Span>(bytes).clamped(spec))
            }
        }
    }
}

/// The sizes that a call's spans ask of its views.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Extent {
    pub batch: usize,
    pub rows: usize,
    pub blocks: usize,
    /// One past the largest slot.
    pub slots: usize,
    /// Rows that a linear key cache must have; `None` where only the kernel knows.
    pub keys: Option<u64>,
}

fn validate_host(spans: &[Span], spec: &Spec) -> Result<Extent> {
    let shape = spec.shape();
    let mut extent = Extent { batch: spans.len(), keys: Some(0), ..Extent::default() };
    for (n, span) in spans.iter().enumerate() {
        if span.slot as usize >= spec.slots() {
            return Err(Error::invalid("span.slot", span.slot, format!("below the plan's {} slots", spec.slots())));
        }
        if spans[..n].iter().any(|other| other.slot == span.slot) {
            return Err(Error::invalid("span.slot", span.slot, "no slot twice in a call"));
        }
        if span.mem_rows as usize > shape.mem_len() {
            return Err(Error::invalid("span.mem_rows", span.mem_rows, format!("at most mem_len = {}", shape.mem_len())));
        }
        if span.len as usize > spec.rows() {
            let max = spec.rows() as u64;
            return Err(Error::LimitExceeded { what: "tokens of a stream in a call (rows)", requested: span.len.into(), max });
        }
        if span.origin > span.start {
            return Err(Error::invalid("span.origin", span.origin, format!("at most span.start = {}", span.start)));
        }
        if span.reserved != 0 {
            return Err(Error::invalid("span.reserved", span.reserved, "0"));
        }
        // Half of u64, so that sums of a position and a window cannot wrap.
        if span.start > u64::MAX / 2 {
            return Err(Error::LimitExceeded { what: "span.start", requested: span.start, max: u64::MAX / 2 });
        }
        let blocks = span.blocks(shape.block_len());
        if blocks > spec.blocks() {
            let max = spec.blocks() as u64;
            return Err(Error::LimitExceeded { what: "blocks touched by a stream in a call", requested: blocks as u64, max });
        }
        extent.rows = extent.rows.max(span.len as usize);
        extent.blocks = extent.blocks.max(blocks);
        extent.slots = extent.slots.max(span.slot as usize + 1);
        extent.keys = extent.keys.max(Some(span.end() - span.origin));
    }
    Ok(extent)
}
