//! Snapshot and restore of one stream: a byte string that any backend can take up again, bit for bit.
//!
//! Layout, little-endian: magic and version (8 bytes), [`FIELDS`] as u64, the payload, CRC-32 of all that. The payload: keys, then values of
//! the live tokens in position order, never the ring's image; keys and values of the memory rows of the block before, then of the block of
//! the next token; for Infini-attention un-rotated keys and values of the current segment, m and z. Every header field, length and the
//! checksum are verified before anything is allocated or touched.

use crate::streams::{Slot, Staged, Streams};
use crate::{
    Append, Device, Dtype, Error, InfiniRule, Layout, Plan, ReadRing, Result, Shape, Span, Spans, View, ViewMut, Window,
};
use std::borrow::{Borrow, BorrowMut};
use std::ops::Range;

const MAGIC: &[u8; 8] = b"famstrm\x01";

/// Names of the header's fields, in order.
const FIELDS: [&str; 15] = [
    "heads",
    "kv_heads",
    "head_dim",
    "block_len",
    "window kind",
    "window",
    "mem_len",
    "dtype",
    "scale",
    "infini rule",
    "origin",
    "position",
    "mem_rows",
    "staged memory",
    "staged rows",
];
/// Fields that describe the shape; the rest is the stream.
const SHAPE_FIELDS: usize = 10;
const HEADER: usize = MAGIC.len() + 8 * FIELDS.len();
const CHECKSUM: usize = 4;

fn shape_fields(shape: &Shape) -> [u64; SHAPE_FIELDS] {
    let (kind, window) = match shape.window() {
        Window::Blocks(m) => (0, m),
        Window::Tokens(w) => (1, w),
    };
    let infini = match shape.infini() {
        None => 0,
        Some(InfiniRule::Linear) => 1,
        Some(InfiniRule::Delta) => 2,
    };
    let sizes = [shape.heads(), shape.kv_heads(), shape.head_dim(), shape.block_len()].map(|s| s as u64);
    let [heads, kv_heads, head_dim, block_len] = sizes;
    let dtype = match shape.dtype() {
        Dtype::F32 => 0,
        Dtype::F16 => 1,
        Dtype::Bf16 => 2,
    };
    let scale = u64::from(shape.scale().to_bits());
    [heads, kv_heads, head_dim, block_len, kind, window as u64, shape.mem_len() as u64, dtype, scale, infini]
}

fn slot_fields(slot: &Slot) -> [u64; FIELDS.len() - SHAPE_FIELDS] {
    let (staged, rows) = match slot.staged {
        Staged::None => (0, 0),
        Staged::Kept => (1, 0),
        Staged::Set(rows) => (2, rows),
    };
    [slot.origin, slot.position, slot.mem_rows.into(), staged, rows.into()]
}

/// Some tokens of one slot.
struct Tokens {
    slot: u32,
    origin: u64,
    positions: Range<u64>,
}

/// What the payload holds, in order, in bytes; a pure function of shape and slot.
struct Sections {
    /// The live keys.
    live: Tokens,
    /// The current segment's keys, with a compressive memory.
    segment: Tokens,
    keys: usize,
    mem: usize,
    staged: usize,
    segment_keys: usize,
    m: usize,
    z: usize,
}

impl Sections {
    fn new(shape: &Shape, index: u32, slot: &Slot) -> Self {
        let row = shape.kv_heads() * shape.head_dim() * shape.kv_dtype().bytes();
        // What the block's first token sees: the stream may be rolled back to it.
        let first_token = slot.position - slot.tokens_in_block(shape);
        let live = Span::new(0, first_token, 0).with_origin(slot.origin).first_key(shape)..slot.position;
        let (segment, m, z) = match shape.infini() {
            None => (slot.position..slot.position, 0, 0),
            Some(_) => {
                let z = shape.kv_heads() * shape.head_dim() * size_of::<f32>();
                (first_token..slot.position, z * shape.head_dim(), z)
            }
        };
        let staged = if let Staged::Set(rows) = slot.staged { rows as usize } else { 0 };
        let tokens = |positions| Tokens { slot: index, origin: slot.origin, positions };
        let bytes = |range: &Range<u64>| (range.end - range.start) as usize * row;
        Sections {
            keys: bytes(&live),
            segment_keys: bytes(&segment),
            live: tokens(live),
            segment: tokens(segment),
            mem: slot.mem_rows as usize * row,
            staged: staged * row,
            m,
            z,
        }
    }

    fn bytes(&self) -> usize {
        2 * (self.keys + self.mem + self.staged + self.segment_keys) + self.m + self.z
    }
}

/// Header, length and checksum, each against the shape; the slot that they describe.
fn parse(bytes: &[u8], shape: &Shape, index: u32) -> Result<Slot> {
    let wrong = |reason: String| Err(Error::malformed("snapshot", reason));
    let Some((header, _)) = bytes.split_at_checked(HEADER) else {
        return wrong(format!("{} bytes, a header has {HEADER}", bytes.len()));
    };
    let (magic, fields) = header.split_at(MAGIC.len());
    if magic[..7] != MAGIC[..7] {
        return wrong("not a snapshot: magic bytes differ".into());
    }
    if magic[7] != MAGIC[7] {
        return wrong(format!("version {}, this reads version {}", magic[7], MAGIC[7]));
    }
    let mut values = [0u64; FIELDS.len()];
    for (value, bytes) in values.iter_mut().zip(fields.chunks_exact(8)) {
        *value = bytes.iter().rev().fold(0, |v, &b| v << 8 | u64::from(b));
    }
    for ((name, &have), want) in FIELDS.iter().zip(&values).zip(shape_fields(shape)) {
        if have != want {
            return wrong(format!("{name} {have}, the streams have {want}"));
        }
    }
    let [origin, position, mem_rows, staged, staged_rows] = [10, 11, 12, 13, 14].map(|field: usize| values[field]);
    let most = shape.mem_len() as u64;
    if position > u64::MAX / 2 || origin > position {
        return wrong(format!("origin {origin}, position {position}"));
    }
    if mem_rows > most || staged_rows > most || staged > 2 || (staged != 2 && staged_rows != 0) {
        return wrong(format!("memory of {mem_rows} rows, staged {staged} with {staged_rows}; mem_len is {most}"));
    }
    let slot = Slot {
        origin,
        position,
        mem_entry: 0,
        mem_rows: mem_rows as u32,
        staged: match staged {
            0 => Staged::None,
            1 => Staged::Kept,
            _ => Staged::Set(staged_rows as u32),
        },
        state_entry: 0,
        poisoned: false,
    };
    // A block that has tokens has its memory, and the first block none before it.
    let is_due = slot.check_boundary(shape).is_err() && slot.memory(shape, index).is_err();
    if is_due || (mem_rows > 0 && shape.block(position) == shape.block(origin)) {
        return wrong(format!("memory of {mem_rows} rows, staged {staged}, at position {position} from origin {origin}"));
    }
    let length = HEADER + Sections::new(shape, index, &slot).bytes() + CHECKSUM;
    if bytes.len() != length {
        return wrong(format!("{} bytes, its header describes {length}", bytes.len()));
    }
    let (body, checksum) = bytes.split_at(length - CHECKSUM);
    if crc32fast::hash(body).to_le_bytes() != checksum {
        return wrong("checksum differs: the bytes are corrupted".into());
    }
    Ok(slot)
}

impl<B: Device> Streams<B> {
    /// The stream in `slot` as bytes: live keys, memory, m, z and position. Submits what was enqueued on `queue`, and waits.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a slot out of range or a foreign plan; [`Error::Poisoned`]; those of the device.
    pub fn snapshot(&self, plan: &B::Plan, queue: &mut B::Queue<'_>, slot: u32) -> Result<Vec<u8>> {
        self.check_plan(plan)?;
        self.backend.check_queue(queue)?;
        let state = *self.live_slot(slot)?;
        self.backend.synchronize(queue)?;
        let sections = Sections::new(&self.shape, slot, &state);
        let mut out = Vec::with_capacity(HEADER + sections.bytes() + CHECKSUM);
        out.extend_from_slice(MAGIC);
        for field in shape_fields(&self.shape).into_iter().chain(slot_fields(&state)) {
            out.extend_from_slice(&field.to_le_bytes());
        }
        self.read_keys(plan, queue, &self.buffers.ring, &sections.live, &mut out)?;
        if let Some(mem) = &self.buffers.mem {
            for (entry, bytes) in [(state.mem_entry, sections.mem), (state.mem_entry ^ 1, sections.staged)] {
                let offset = entry_offset(&mem.layout, slot, entry);
                self.download(&mem.k, offset, bytes, &mut out)?;
                self.download(&mem.v, offset, bytes, &mut out)?;
            }
        }
        if let Some(i) = &self.buffers.infini {
            self.read_keys(plan, queue, &i.ring, &sections.segment, &mut out)?;
            self.download(&i.m, entry_offset(&i.m_layout, slot, state.state_entry), sections.m, &mut out)?;
            self.download(&i.z, entry_offset(&i.z_layout, slot, state.state_entry), sections.z, &mut out)?;
        }
        let checksum = crc32fast::hash(&out);
        out.extend_from_slice(&checksum.to_le_bytes());
        Ok(out)
    }

    /// Makes `slot` the stream that [`Streams::snapshot`] saved, on this or another backend. Submits what was enqueued on `queue`, and waits.
    ///
    /// # Errors
    /// [`Error::Malformed`] for bytes that are truncated, corrupted, of another version or another shape; [`Error::Invalid`] and
    /// [`Error::LimitExceeded`] for a plan or scratch memory that does not fit; [`Error::OutOfMemory`]: the slot is untouched. Errors of the
    /// device after that poison it.
    pub fn restore(
        &mut self,
        plan: &B::Plan,
        queue: &mut B::Queue<'_>,
        slot: u32,
        snapshot: &[u8],
        scratch: &mut B::Mem,
    ) -> Result<()> {
        self.check_plan(plan)?;
        self.backend.check_queue(queue)?;
        self.slot(slot)?;
        let state = parse(snapshot, &self.shape, slot)?;
        let sections = Sections::new(&self.shape, slot, &state);
        let mut rest = &snapshot[HEADER..];
        let mut take = |bytes: usize| {
            let (head, tail) = rest.split_at(bytes);
            rest = tail;
            head
        };
        let live = [take(sections.keys), take(sections.keys)];
        let mem = [sections.mem, sections.mem, sections.staged, sections.staged].map(&mut take);
        let segment = [take(sections.segment_keys), take(sections.segment_keys)];
        let (m, z) = (take(sections.m), take(sections.z));

        // All that can be refused comes before the slot is touched.
        let backend = &self.backend;
        let staged = Staging::new(backend, plan, sections.live, live)
            .and_then(|live| Ok((live, Staging::new(backend, plan, sections.segment, segment)?)));
        let (live, segment) = self.poison_if_lost(staged)?;
        let buffers = &mut self.buffers;
        live.check::<B>(plan, buffers.ring.borrow_mut(), scratch)?;
        if let Some(i) = &mut buffers.infini {
            segment.check::<B>(plan, i.ring.borrow_mut(), scratch)?;
        }
        // What is still enqueued may read this slot.
        let done = self.backend.synchronize(queue);
        self.poison_if_lost(done)?;

        self.slots[slot as usize].poisoned = true;
        let Streams { backend, buffers, .. } = self;
        let mut load = || {
            live.append(backend, plan, queue, buffers.ring.borrow_mut(), scratch)?;
            if let Some(to) = &mut buffers.mem {
                let [k, v, staged_k, staged_v] = mem;
                for (entry, k, v) in [(state.mem_entry, k, v), (state.mem_entry ^ 1, staged_k, staged_v)] {
                    let offset = entry_offset(&to.layout, slot, entry);
                    backend.upload(to.k.borrow_mut(), offset, k)?;
                    backend.upload(to.v.borrow_mut(), offset, v)?;
                }
            }
            if let Some(i) = &mut buffers.infini {
                segment.append(backend, plan, queue, i.ring.borrow_mut(), scratch)?;
                backend.upload(i.m.borrow_mut(), entry_offset(&i.m_layout, slot, state.state_entry), m)?;
                backend.upload(i.z.borrow_mut(), entry_offset(&i.z_layout, slot, state.state_entry), z)?;
            }
            // The staging memory ends with this function.
            backend.synchronize(queue)
        };
        let done = load();
        self.poison_if_lost(done)?;
        self.slots[slot as usize] = state;
        Ok(())
    }

    fn download(&self, mem: &B::Owned, offset: u64, bytes: usize, out: &mut Vec<u8>) -> Result<()> {
        let start = out.len();
        out.resize(start + bytes, 0);
        self.backend.download(mem.borrow(), offset, &mut out[start..])
    }

    /// Appends keys, then values, of `tokens` to `out`.
    fn read_keys(
        &self,
        plan: &B::Plan,
        queue: &mut B::Queue<'_>,
        ring: &B::Owned,
        tokens: &Tokens,
        out: &mut Vec<u8>,
    ) -> Result<()> {
        let (staging, bytes) = staging(&self.shape, tokens);
        let mut k = self.backend.alloc(bytes)?;
        let mut v = self.backend.alloc(bytes)?;
        for (span, layout) in chunks(plan, tokens, staging) {
            let (k, v) = (ViewMut::new(k.borrow_mut(), layout), ViewMut::new(v.borrow_mut(), layout));
            self.backend.read_ring(plan, queue, ReadRing::new(Spans::Host(&[span]), ring.borrow(), k, v))?;
        }
        self.backend.synchronize(queue)?;
        self.download(&k, 0, bytes as usize, out)?;
        self.download(&v, 0, bytes as usize, out)
    }
}

/// Keys and values of some tokens, in device memory of their own, on their way into a ring.
struct Staging<O> {
    tokens: Tokens,
    k: O,
    v: O,
    layout: Layout,
}

impl<O> Staging<O> {
    fn new<B: Device<Owned = O>>(backend: &B, plan: &B::Plan, tokens: Tokens, [k_bytes, v_bytes]: [&[u8]; 2]) -> Result<Self>
    where
        O: BorrowMut<B::Mem>,
    {
        let (layout, bytes) = staging(plan.spec().shape(), &tokens);
        let (mut k, mut v) = (backend.alloc(bytes)?, backend.alloc(bytes)?);
        backend.upload(k.borrow_mut(), 0, k_bytes)?;
        backend.upload(v.borrow_mut(), 0, v_bytes)?;
        Ok(Staging { tokens, k, v, layout })
    }

    /// Checks every append without enqueuing it.
    fn check<B: Device<Owned = O>>(&self, plan: &B::Plan, ring: &mut B::Mem, scratch: &B::Mem) -> Result<()>
    where
        O: Borrow<B::Mem>,
    {
        chunks(plan, &self.tokens, self.layout).try_for_each(|(span, layout)| {
            let (k, v) = (View::new(self.k.borrow(), layout), View::new(self.v.borrow(), layout));
            Append::new(Spans::Host(&[span])).rows(k, v, ring).validate(plan, scratch)
        })
    }

    fn append<B: Device<Owned = O>>(
        &self,
        backend: &B,
        plan: &B::Plan,
        queue: &mut B::Queue<'_>,
        ring: &mut B::Mem,
        scratch: &mut B::Mem,
    ) -> Result<()>
    where
        O: Borrow<B::Mem>,
    {
        chunks(plan, &self.tokens, self.layout).try_for_each(|(span, layout)| {
            let (k, v) = (View::new(self.k.borrow(), layout), View::new(self.v.borrow(), layout));
            backend.append(plan, queue, Append::new(Spans::Host(&[span])).rows(k, v, ring), scratch)
        })
    }
}

/// Layout and bytes of packed keys (or values) of `tokens`.
fn staging(shape: &Shape, tokens: &Tokens) -> (Layout, u64) {
    let rows = (tokens.positions.end - tokens.positions.start) as usize;
    let layout = Layout::tokens(shape.kv_dtype(), [1, rows, shape.kv_heads(), shape.head_dim()]);
    (layout, layout.end_bytes().unwrap_or(u64::MAX))
}

/// Cuts `tokens` into calls that the plan serves (inside a block, at most `rows` tokens), with each one's part of the staging memory.
fn chunks<P: Plan>(plan: &P, tokens: &Tokens, staging: Layout) -> impl Iterator<Item = (Span, Layout)> + use<P> {
    let (slot, origin, first, end) = (tokens.slot, tokens.origin, tokens.positions.start, tokens.positions.end);
    let block_len = plan.spec().shape().block_len() as u64;
    // A plan for empty calls serves no chunk; one token then fails with the plan's own error.
    let most = (plan.spec().rows() as u64).max(1);
    let mut start = first;
    std::iter::from_fn(move || {
        if start >= end {
            return None;
        }
        let len = (end - start).min(most).min(block_len - start % block_len);
        let span = Span::new(slot, start, len as u32).with_origin(origin);
        let mut layout = staging.with_offset((start - first) as usize * staging.stride[2]);
        layout.shape[2] = len as usize;
        start += len;
        Some((span, layout))
    })
}

/// Byte at which an entry of a slot starts in a packed `[slots, entries, …]` buffer.
fn entry_offset(layout: &Layout, slot: u32, entry: u32) -> u64 {
    (slot as usize * layout.stride[0] + entry as usize * layout.stride[1]) as u64 * layout.dtype.bytes() as u64
}
