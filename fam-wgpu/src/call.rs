//! The call block: everything that a call's shaders need to know beside the tensors, in one small storage buffer.
//!
//! ```text
//! words    0 .. 40     sizes of the call (Size)
//!         40 .. 176    seventeen tensors: where each lies in its binding (T)
//!        176 ..        ten words a stream; then one f32 a head of the sink, and of beta
//! ```
//!
//! Positions are 64 bits and WGSL has none, so a stream is told in numbers that fit: where its tokens lie in their block, in which row of the
//! cache, how many keys there are before them. Host spans become that here. Device spans, a sink and a beta are brought into the block by a
//! shader, `call.wgsl`, ahead of the op's own: it does on the device what [`record`] does, and leaves the op's bindings free.
//!
//! A plan has some hundred blocks. One is written for each call and comes back when the work of the encoder that it went into is done, or the
//! encoder is dropped; so any number of calls may wait in one encoder, each with what it was enqueued with.

use crate::pipeline::{Binding, Gpu};
use crate::{Region, WgpuPlan};
use fam_core::{Dtype, Error, Keys, Layout, Memory, Plan, Result, Span, Spans, Spec, View, ViewMut, Window};
use std::sync::{Arc, Mutex, PoisonError};

const TENSORS: usize = 40;
const STREAMS: usize = 176;
/// Words of a stream.
const STREAM: usize = 10;
/// Keys before a call are counted so far: no window and no block reaches further.
const FAR: u64 = 1 << 30;
/// Bytes of a plan's blocks, and the fewest blocks: a step of a hundred layers has some hundred calls.
const POOL_BYTES: u64 = 2 << 20;
const FEWEST: u64 = 64;

/// Declares names of words, here and in WGSL.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($word:ident),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum $name { $($word),* }

        impl $name {
            /// The names as constants of WGSL.
            pub fn wgsl() -> String {
                [$($name::$word),*].iter().map(|word| format!("const {word:?} = {}u;\n", *word as u32)).collect()
            }
        }
    };
}

words! {
    /// The sizes of a call. Those of the plan first.
    Size {
        Batch, Heads, KvHeads, Group, BlockLen, MemLen, RingRows,
        // Of the window: keys before the row's block, or before the row.
        WindowBlocks, WindowTokens,
        // The scale: its sign, which goes into q, and its magnitude times log2(e), and without that.
        Sign, UnitLog2, Unit,
        // The grid: tiles of each block's rows and memory rows, and of its rows where the compressive memory is read; blocks; rows of a copy.
        RowTiles, MemTiles, ReadTiles, Blocks, MostRows,
        // Of blocks with few rows: tiles of them, blocks of a stream that may be such, their rows, splits of their keys.
        FewTiles, FewBlocks, FewRows, Splits,
        // What is there.
        HasLse, HasMemLse, SinkAt, BetaAt, IsRing, Rule,
        // What device spans are cut to.
        Slots, Rows, MostBlocks, KeyRows, HasMem, MemEntries, StateEntries, Writes, SpansAt,
    }
}

words! {
    /// The tensors of all ops. O is the local attention's output where a compressive memory is read, and Gated is then what the call gives.
    /// Parts are what splits of few rows leave.
    T {
        Q, O, Lse, MemQ, MemO, MemLse, K, V, MemK, MemV, M, Z, InfiniQ, Gated, Sink, Beta, Parts,
    }
}

/// Which of several streams that name one slot in a device buffer has it: the first that writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Writes {
    /// The op writes no slot.
    Nothing = 0,
    /// `append`: tokens or memory rows.
    Rows = 1,
    /// `infini_write`: tokens.
    Tokens = 2,
}

/// What a call's spans are looked at with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Caches {
    /// Rows of a linear key cache; of a ring `None`.
    pub key_rows: Option<u64>,
    /// Whether there are memory keys, and how many entries of them.
    pub mem_entries: Option<usize>,
    /// Entries of m and z.
    pub state_entries: usize,
    pub writes: Writes,
}

impl Caches {
    /// Those that `keys` names.
    pub fn of(keys: &Keys<'_, Region>) -> Self {
        let key_rows = match keys {
            Keys::Strided { k, .. } => Some(k.layout.shape[2] as u64),
            _ => None,
        };
        Caches { key_rows, ..Caches::NONE }
    }

    /// No caches.
    pub const NONE: Caches = Caches { key_rows: None, mem_entries: None, state_entries: 1, writes: Writes::Nothing };
}

/// A call on its way to its shaders.
pub(crate) struct Call<'a> {
    pub plan: &'a WgpuPlan,
    words: Vec<u32>,
    bindings: [Option<Binding>; 17],
    spans: Option<Binding>,
    /// Most tokens and blocks of a stream, as far as the host knows.
    pub max_rows: usize,
    pub max_blocks: usize,
    batch: usize,
}

impl<'a> Call<'a> {
    /// A call of `spans`.
    pub fn new(plan: &'a WgpuPlan, spans: &Spans<'_, Region>, caches: Caches) -> Result<Self> {
        let spec = plan.spec();
        let (shape, batch) = (spec.shape(), spans.batch());
        let mut call = Call::without_spans(plan);
        call.batch = batch;
        call.set(Size::Batch, batch as u32);
        match spans {
            Spans::Host(spans) => {
                for (n, span) in spans.iter().enumerate() {
                    call.words[STREAMS + STREAM * n..][..STREAM].copy_from_slice(&record(span, spec, caches));
                }
                call.max_rows = spans.iter().map(|s| s.len as usize).max().unwrap_or(0);
                call.max_blocks = spans.iter().map(|s| s.blocks(shape.block_len())).max().unwrap_or(0);
            }
            Spans::Device { mem, batch } => {
                if !mem.is_aligned(Dtype::F32) {
                    return Err(Error::invalid("spans", "misaligned memory", "at a multiple of 4 bytes"));
                }
                let bytes = (batch * size_of::<Span>()) as u64;
                let (binding, at) = Binding::new(&plan.gpu, "spans", mem, 0..bytes)?;
                call.spans = Some(binding);
                call.set(Size::SpansAt, 1 + (at / 4) as u32);
                let [slots, rows, blocks] = [spec.slots(), spec.rows(), spec.blocks()].map(|size| size as u32);
                call.set(Size::Slots, slots);
                call.set(Size::Rows, rows);
                call.set(Size::MostBlocks, blocks);
                call.set(Size::KeyRows, caches.key_rows.map_or(u32::MAX, |rows| rows.min(u64::from(u32::MAX)) as u32));
                call.set(Size::HasMem, u32::from(caches.mem_entries.is_some()));
                call.set(Size::MemEntries, size32("entries of memory keys", caches.mem_entries.unwrap_or(1).max(1))?);
                call.set(Size::StateEntries, size32("entries of states", caches.state_entries.max(1))?);
                call.set(Size::Writes, caches.writes as u32);
                (call.max_rows, call.max_blocks) = (spec.rows(), spec.blocks());
            }
        }
        Ok(call)
    }

    /// A call of an op that knows no streams.
    pub fn without_spans(plan: &'a WgpuPlan) -> Self {
        let spec = plan.spec();
        let shape = spec.shape();
        let mut call = Call {
            plan,
            words: vec![0; block_words(spec)],
            bindings: Default::default(),
            spans: None,
            max_rows: 0,
            max_blocks: 0,
            batch: 0,
        };
        let sizes = [shape.heads(), shape.kv_heads(), shape.group(), shape.block_len(), shape.mem_len(), spec.ring_rows()];
        for (at, size) in (Size::Heads as usize..).zip(sizes) {
            call.words[at] = size as u32;
        }
        let (blocks, tokens) = match shape.window() {
            Window::Blocks(m) => ((m as u64).saturating_mul(shape.block_len() as u64), 0),
            Window::Tokens(w) => (0, w as u64),
            // A new kind has no kernel: `support` refuses it.
            _ => (0, 0),
        };
        call.set(Size::WindowBlocks, blocks.min(FAR) as u32);
        call.set(Size::WindowTokens, tokens.min(FAR) as u32);
        let scale = shape.scale();
        // The sign goes into q, where it costs nothing and is exact, so that the largest product is the largest logit. Of a scale of 0 it is 0.
        let (sign, unit) = if scale == 0.0 { (0.0, 1.0) } else { (scale.signum(), scale.abs()) };
        call.set(Size::Sign, sign.to_bits());
        call.set(Size::Unit, unit.to_bits());
        call.set(Size::UnitLog2, (unit * std::f32::consts::LOG2_E).to_bits());
        call
    }

    pub fn set(&mut self, size: Size, value: u32) {
        self.words[size as usize] = value;
    }

    /// Names an input.
    pub fn input(&mut self, tensor: T, view: &View<'_, Region>) -> Result<()> {
        self.tensor(tensor, view.mem, &view.layout)
    }

    /// Names an output.
    pub fn output(&mut self, tensor: T, view: &ViewMut<'_, Region>) -> Result<()> {
        self.tensor(tensor, view.mem, &view.layout)
    }

    /// Names `[Hq]` of f32 that the block holds: the sink, or beta.
    pub fn per_head(&mut self, tensor: T, view: &View<'_, Region>) -> Result<()> {
        let heads = self.plan.spec().shape().heads();
        let (size, first) = match tensor {
            T::Sink => (Size::SinkAt, 0),
            _ => (Size::BetaAt, heads),
        };
        let at = STREAMS + STREAM * self.plan.spec().batch() + first;
        self.set(size, at as u32);
        self.input(tensor, view)
    }

    /// Keys and values: of linear caches, or the two halves of each slot's ring.
    pub fn keys(&mut self, keys: &Keys<'_, Region>) -> Result<()> {
        match keys {
            Keys::Strided { k, v } => {
                self.input(T::K, k)?;
                self.input(T::V, v)
            }
            Keys::Ring(ring) => self.ring(ring),
            _ => Err(Error::unsupported("keys", "a new kind", "linear caches and the key ring")),
        }
    }

    /// The two halves of each slot's ring as K and V.
    pub fn ring(&mut self, ring: &Region) -> Result<()> {
        self.set(Size::IsRing, 1);
        let layout = ring_layout(self.plan.spec());
        let mut half = layout;
        half.shape[1] = 1;
        self.tensor(T::K, ring, &half)?;
        self.tensor(T::V, ring, &half.with_offset(layout.stride[1]))
    }

    fn tensor(&mut self, tensor: T, mem: &Region, layout: &Layout) -> Result<()> {
        let Some(bytes) = layout.end_bytes().filter(|bytes| *bytes > 0) else { return Ok(()) };
        let size = layout.dtype.bytes() as u64;
        let first = layout.offset as u64 * size;
        let (binding, at) = Binding::new(&self.plan.gpu, "bytes of a tensor that a shader reaches", mem, first..bytes)?;
        // Strides along axes of one entry are never taken, and may be anything.
        let stride = |axis: usize| if layout.shape[axis] > 1 { layout.stride[axis] as u32 } else { 0 };
        let blocks = size32("entries of a tensor", layout.shape[1])?;
        let rows = size32("rows of a tensor", layout.shape[2])?;
        let words = [(at / size) as u32, stride(0), stride(1), stride(2), stride(3), blocks, rows, code(layout.dtype)];
        self.words[TENSORS + 8 * tensor as usize..][..8].copy_from_slice(&words);
        self.bindings[tensor as usize] = Some(binding);
        Ok(())
    }

    /// Whether all rows of these tensors begin at multiples of four elements of their bindings.
    pub fn are_aligned(&self, mut tensors: impl Iterator<Item = T>) -> bool {
        // Offset and strides: 0 of a tensor that was not named.
        tensors.all(|tensor| self.words[TENSORS + 8 * tensor as usize..][..5].iter().all(|word| word.is_multiple_of(4)))
    }

    /// What `tensor` is bound to, if it was named and has elements.
    pub fn binding(&self, tensor: T) -> Option<&Binding> {
        self.bindings[tensor as usize].as_ref()
    }

    /// The spans in device memory.
    pub fn spans(&self) -> Option<&Binding> {
        self.spans.as_ref()
    }

    /// Streams of the call.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Whether `call.wgsl` has something to do.
    pub fn is_gathered(&self) -> bool {
        self.spans.is_some() || self.binding(T::Sink).is_some() || self.binding(T::Beta).is_some()
    }

    /// The words of the block.
    pub fn words(&self) -> &[u32] {
        &self.words
    }
}

/// Words of a call block of the plan's largest call.
pub(crate) fn block_words(spec: &Spec) -> usize {
    STREAMS + STREAM * spec.batch() + 2 * spec.shape().heads()
}

/// The code of a dtype in shaders.
pub(crate) fn code(dtype: Dtype) -> u32 {
    match dtype {
        Dtype::F16 => 1,
        Dtype::Bf16 => 2,
        _ => 0,
    }
}

/// A size that shaders count with; an axis of stride 0 can have more.
fn size32(what: &'static str, size: usize) -> Result<u32> {
    u32::try_from(size).map_err(|_| Error::LimitExceeded { what, requested: size as u64, max: u32::MAX.into() })
}

/// A validated host span as shaders read it; `call.wgsl` says the same of device spans.
fn record(span: &Span, spec: &Spec, caches: Caches) -> [u32; STREAM] {
    let shape = spec.shape();
    let before = span.start - span.origin;
    let first_row = match spec.ring_rows() as u64 {
        rows if caches.key_rows.is_none() && rows > 0 => before % rows,
        _ => before,
    };
    let modulo = |entry: u32, entries: usize| (u64::from(entry) % entries.max(1) as u64) as u32;
    [
        span.len,
        span.slot,
        if caches.mem_entries.is_some() { span.mem_rows } else { 0 },
        modulo(span.mem_entry, caches.mem_entries.unwrap_or(1)),
        modulo(span.state_entry, caches.state_entries),
        span.blocks(shape.block_len()) as u32,
        (span.start % shape.block_len() as u64) as u32,
        first_row as u32,
        before.min(FAR) as u32,
        1,
    ]
}

/// Where keys and values lie in the key ring, as one tensor `[slots, K or V, C, Hkv, D]` of kv_dtype. A slot is one page, in it keys before
/// values, and each head's rows together. Rows are padded to four elements, so that they can be read as vectors of whole words.
pub(crate) fn ring_layout(spec: &Spec) -> Layout {
    let shape = spec.shape();
    let (kv_heads, d, rows) = (shape.kv_heads(), shape.head_dim(), spec.ring_rows());
    let row = d.next_multiple_of(4);
    let half = rows * row * kv_heads;
    Layout::packed(shape.kv_dtype(), [spec.slots(), 2, rows, kv_heads, d]).with_stride([2 * half, half, row, rows * row])
}

/// The call blocks of a plan.
#[derive(Debug)]
pub(crate) struct Pool {
    pub buffer: wgpu::Buffer,
    pub block_bytes: u64,
    free: Mutex<Vec<u32>>,
    blocks: u64,
}

impl Pool {
    /// Bytes of a block of `words`, and how many blocks there are.
    pub fn size(words: usize, alignment: u64) -> (u64, u64) {
        let block = (4 * words as u64).next_multiple_of(alignment);
        (block, (POOL_BYTES / block).max(FEWEST))
    }

    pub fn new(buffer: wgpu::Buffer, block_bytes: u64) -> Self {
        let blocks = buffer.size() / block_bytes;
        Pool { buffer, block_bytes, free: Mutex::new((0..blocks as u32).rev().collect()), blocks }
    }

    /// A block of one's own.
    ///
    /// # Errors
    /// [`Error::LimitExceeded`] where as many calls as there are blocks wait for their encoders' end.
    pub fn lease(self: &Arc<Self>, gpu: &Gpu) -> Result<Lease> {
        let take = || self.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let block = take().or_else(|| {
            // Those whose work is done come back when the device is asked.
            let _ = gpu.poll(wgpu::PollType::Poll);
            take()
        });
        let limit = Error::LimitExceeded { what: "calls that wait to be done", requested: self.blocks + 1, max: self.blocks };
        Ok(Lease { pool: Arc::clone(self), block: block.ok_or(limit)? })
    }
}

/// A block in use; given back when dropped.
#[derive(Debug)]
pub(crate) struct Lease {
    pool: Arc<Pool>,
    block: u32,
}

impl Lease {
    /// Byte of the pool's buffer at which the block begins.
    pub fn offset(&self) -> u64 {
        u64::from(self.block) * self.pool.block_bytes
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.pool.free.lock().unwrap_or_else(PoisonError::into_inner).push(self.block);
    }
}
