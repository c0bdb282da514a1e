//! Sizes of a layer ([`Shape`]) and of the calls that a plan is made for ([`Spec`]), each validated once.

use crate::{Dtype, Error, Op, Result};

/// The most elements of any tensor whose size follows from shape and spec: 2³¹. Caches that a caller brings may have more; kernels count
/// their elements in 64 bits.
pub const MAX_ELEMENTS: u64 = 1 << 31;

/// Which keys before its own block a block row sees (contract: section 2 of the crate docs).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Window {
    /// The last `M` whole blocks before the row's own: TransformerFAM's memory segments (Alg. 1). May be 0.
    Blocks(usize),
    /// The last `w` tokens, the row itself included (flash-attention's `window_size_left` is `w − 1`). At least 1.
    Tokens(usize),
}

impl Window {
    /// The smallest position that a block row at `position` may see. The stream's origin may cut it further.
    pub fn first(self, position: u64, block_len: usize) -> u64 {
        match self {
            Window::Blocks(m) => {
                let block_len = block_len.max(1) as u64;
                (position / block_len).saturating_sub(m as u64).saturating_mul(block_len)
            }
            Window::Tokens(w) => position.saturating_add(1).saturating_sub(w as u64),
        }
    }

    /// Ring rows for the window beside the blocks of a call: a multiple of `block_len`.
    fn ring_rows(self, block_len: usize) -> Option<usize> {
        match self {
            Window::Blocks(m) => m.checked_mul(block_len),
            Window::Tokens(w) => w.saturating_sub(1).div_ceil(block_len).checked_mul(block_len),
        }
    }
}

/// How Infini-attention writes its compressive memory (arXiv 2404.07143, Eq. 8 and 9).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum InfiniRule {
    /// m' = m + σ(k)ᵀ v.
    Linear,
    /// m' = m + σ(k)ᵀ (v − σ(k) m / (σ(k)·z)).
    Delta,
}

/// The sizes of one attention layer. Made by [`Shape::builder`], valid from then on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    block_len: usize,
    window: Window,
    mem_len: usize,
    dtype: Dtype,
    scale: f32,
    infini: Option<InfiniRule>,
}

impl Shape {
    /// Starts a shape: 1 head of 64, blocks of 128 tokens, no window, no memory rows, f32.
    pub fn builder() -> ShapeBuilder {
        ShapeBuilder {
            heads: 1,
            kv_heads: None,
            head_dim: 64,
            block_len: 128,
            window: Window::Blocks(0),
            mem_len: 0,
            dtype: Dtype::F32,
            kv_dtype: None,
            scale: None,
            infini: None,
        }
    }

    /// Hq: query heads.
    pub fn heads(&self) -> usize {
        self.heads
    }
    /// Hkv: key and value heads; divides `heads`.
    pub fn kv_heads(&self) -> usize {
        self.kv_heads
    }
    /// Query heads that share a key and value head: Hq / Hkv. Query head `h` reads kv head `h / group`.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }
    /// D: elements per head, of q, k and v alike.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }
    /// B: tokens in a block.
    pub fn block_len(&self) -> usize {
        self.block_len
    }
    /// Past keys that a block row still sees.
    pub fn window(&self) -> Window {
        self.window
    }
    /// F: memory rows; 0 for plain block sliding window attention.
    pub fn mem_len(&self) -> usize {
        self.mem_len
    }
    /// Type of q, k, v and of the memory rows.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }
    /// Type of cached keys and values. Today always [`Shape::dtype`].
    pub fn kv_dtype(&self) -> Dtype {
        self.dtype
    }
    /// Factor on q·k before the softmax. Finite; default 1/√D.
    pub fn scale(&self) -> f32 {
        self.scale
    }
    /// The rule of the compressive memory, or `None` without one.
    pub fn infini(&self) -> Option<InfiniRule> {
        self.infini
    }
    /// The block of the token at `position`.
    pub fn block(&self, position: u64) -> u64 {
        position / self.block_len as u64
    }

    /// Starts a plan's request: calls of at most `batch` streams and `rows` tokens a stream.
    pub fn spec(&self, batch: usize, rows: usize) -> SpecBuilder {
        SpecBuilder { shape: *self, batch, rows, blocks: None, slots: None, ring_rows: None, out_dtype: None, ops: None }
    }
}

/// Collects the sizes of a [`Shape`]; see there for the meaning of each.
#[derive(Clone, Debug)]
#[must_use]
pub struct ShapeBuilder {
    heads: usize,
    kv_heads: Option<usize>,
    head_dim: usize,
    block_len: usize,
    window: Window,
    mem_len: usize,
    dtype: Dtype,
    kv_dtype: Option<Dtype>,
    scale: Option<f32>,
    infini: Option<InfiniRule>,
}

impl ShapeBuilder {
    /// Hq. Default 1.
    pub fn heads(mut self, heads: usize) -> Self {
        self.heads = heads;
        self
    }
    /// Hkv. Default: as many as query heads.
    pub fn kv_heads(mut self, kv_heads: usize) -> Self {
        self.kv_heads = Some(kv_heads);
        self
    }
    /// D. Default 64.
    pub fn head_dim(mut self, head_dim: usize) -> Self {
        self.head_dim = head_dim;
        self
    }
    /// B, in tokens. Default 128.
    pub fn block_len(mut self, block_len: usize) -> Self {
        self.block_len = block_len;
        self
    }
    /// Past keys seen. Default `Window::Blocks(0)`.
    pub fn window(mut self, window: Window) -> Self {
        self.window = window;
        self
    }
    /// F. Default 0.
    pub fn mem_len(mut self, mem_len: usize) -> Self {
        self.mem_len = mem_len;
        self
    }
    /// Type of q, k, v. Default f32.
    pub fn dtype(mut self, dtype: Dtype) -> Self {
        self.dtype = dtype;
        self
    }
    /// Type of cached keys and values. Default, and today the only value served: the shape's `dtype`.
    pub fn kv_dtype(mut self, kv_dtype: Dtype) -> Self {
        self.kv_dtype = Some(kv_dtype);
        self
    }
    /// Softmax scale. Default 1/√D, rounded to f32.
    pub fn scale(mut self, scale: f32) -> Self {
        self.scale = Some(scale);
        self
    }
    /// Adds the compressive memory of Infini-attention.
    pub fn infini(mut self, rule: InfiniRule) -> Self {
        self.infini = Some(rule);
        self
    }

    /// Checks the sizes.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a size of 0 (but `mem_len`), heads that kv_heads does not divide, or a non-finite scale;
    /// [`Error::LimitExceeded`] where one token's or one block's elements pass 2³¹; [`Error::Unsupported`] for a `kv_dtype` of its own.
    pub fn build(self) -> Result<Shape> {
        let kv_heads = self.kv_heads.unwrap_or(self.heads);
        for (field, value) in
            [("heads", self.heads), ("kv_heads", kv_heads), ("head_dim", self.head_dim), ("block_len", self.block_len)]
        {
            if value == 0 {
                return Err(Error::invalid(field, 0, "at least 1"));
            }
        }
        if !self.heads.is_multiple_of(kv_heads) {
            return Err(Error::invalid("heads", self.heads, format!("a multiple of kv_heads = {kv_heads}")));
        }
        if self.window == Window::Tokens(0) {
            return Err(Error::invalid("window", "Tokens(0)", "a token window counts the row itself: at least 1"));
        }
        let scale = self.scale.unwrap_or((1.0 / (self.head_dim as f64).sqrt()) as f32);
        if !scale.is_finite() {
            return Err(Error::invalid("scale", scale, "a finite number"));
        }
        if let Some(kv_dtype) = self.kv_dtype
            && kv_dtype != self.dtype
        {
            return Err(Error::unsupported("kv_dtype", kv_dtype, format!("{}, the dtype of the shape", self.dtype)));
        }
        elements("elements of one block's q", &[self.block_len, self.heads, self.head_dim])?;
        elements("elements of one set of memory rows", &[self.mem_len, self.heads, self.head_dim])?;
        elements("elements of one slot's m", &[kv_heads, self.head_dim, self.head_dim])?;
        Ok(Shape {
            heads: self.heads,
            kv_heads,
            head_dim: self.head_dim,
            block_len: self.block_len,
            window: self.window,
            mem_len: self.mem_len,
            dtype: self.dtype,
            scale,
            infini: self.infini,
        })
    }
}

/// The product of `sizes`, refused beyond [`MAX_ELEMENTS`].
pub(crate) fn elements(what: &'static str, sizes: &[usize]) -> Result<u64> {
    let product = sizes
        .iter()
        .try_fold(1u64, |acc, &s| acc.checked_mul(s as u64))
        // A zero anywhere makes the tensor empty, however large the rest.
        .or_else(|| sizes.contains(&0).then_some(0))
        .unwrap_or(u64::MAX);
    if product > MAX_ELEMENTS {
        return Err(Error::LimitExceeded { what, requested: product, max: MAX_ELEMENTS });
    }
    Ok(product)
}

/// What a plan must serve: a [`Shape`] and the largest calls. Made by [`Shape::spec`], valid from then on.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    shape: Shape,
    batch: usize,
    rows: usize,
    blocks: usize,
    slots: usize,
    ring_rows: usize,
    out_dtype: Dtype,
    ops: Vec<Op>,
}

impl Spec {
    /// The layer's sizes.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }
    /// Most streams (N) in a call.
    pub fn batch(&self) -> usize {
        self.batch
    }
    /// Most tokens of a stream in a call.
    pub fn rows(&self) -> usize {
        self.rows
    }
    /// Most blocks (nb) that a stream's tokens touch in a call.
    pub fn blocks(&self) -> usize {
        self.blocks
    }
    /// Slots: rows of the ring and of every other cached tensor.
    pub fn slots(&self) -> usize {
        self.slots
    }
    /// C: rows of a slot's ring; a multiple of B that holds the window and `blocks` blocks. 0 for a plan over linear caches alone.
    pub fn ring_rows(&self) -> usize {
        self.ring_rows
    }
    /// Type of `o` and `mem_o`: the shape's dtype or f32.
    pub fn out_dtype(&self) -> Dtype {
        self.out_dtype
    }
    /// The ops that the plan will be used for.
    pub fn ops(&self) -> &[Op] {
        &self.ops
    }

    /// Bytes that the largest forward call keeps for its backward call, beside its arguments and its outputs `o`: for [`Op::AttendBackward`]
    /// the f32 tensors `lse`, `mem_lse` and, with a compressive memory, `o_local`; for the infini ops m and z as each of the call's blocks read
    /// them (a caller that keeps fewer writes them again with `infini_write`). 0 without backward ops. Linear keys are arguments.
    pub fn saved_bytes(&self) -> u64 {
        let s = &self.shape;
        let [batch, heads, rows, blocks, mem_len, d, kv_heads] =
            [self.batch, s.heads, self.rows, self.blocks, s.mem_len, s.head_dim, s.kv_heads].map(|size| size as u64);
        let of = |ops: &[Op], elements: u64| if ops.iter().any(|op| self.ops.contains(op)) { 4 * elements } else { 0 };
        let per_row = if s.infini.is_some() { 1 + d } else { 1 };
        // q, mem_q and a slot's m were checked to have at most 2³¹ elements each.
        let results = of(&[Op::AttendBackward], batch * heads * rows * per_row + batch * heads * blocks * mem_len);
        let states = (kv_heads * d * (d + 1)).saturating_mul(batch * blocks);
        results.saturating_add(of(&[Op::InfiniReadBackward, Op::InfiniWriteBackward], states.min(u64::MAX / 4)))
    }
}

/// Collects the maxima of a [`Spec`].
#[derive(Clone, Debug)]
#[must_use]
pub struct SpecBuilder {
    shape: Shape,
    batch: usize,
    rows: usize,
    blocks: Option<usize>,
    slots: Option<usize>,
    ring_rows: Option<usize>,
    out_dtype: Option<Dtype>,
    ops: Option<Vec<Op>>,
}

impl SpecBuilder {
    /// Most blocks that a stream's tokens touch. Default ⌈rows / B⌉: calls that start at a block or stay inside one.
    pub fn blocks(mut self, blocks: usize) -> Self {
        self.blocks = Some(blocks);
        self
    }
    /// Slots of the cached tensors. Default: `batch`.
    pub fn slots(mut self, slots: usize) -> Self {
        self.slots = Some(slots);
        self
    }
    /// C. Default: the least, (M + blocks)·B, or ⌈(w−1)/B⌉·B + blocks·B for a window of tokens; without the op append no ring.
    pub fn ring_rows(mut self, ring_rows: usize) -> Self {
        self.ring_rows = Some(ring_rows);
        self
    }
    /// Type of `o` and `mem_o`. Default: the shape's dtype; f32 is the other choice (partial results to be merged).
    pub fn out_dtype(mut self, out_dtype: Dtype) -> Self {
        self.out_dtype = Some(out_dtype);
        self
    }
    /// Ops that the plan must serve. Default: append and attend, and with a compressive memory infini_read and infini_write.
    pub fn ops(mut self, ops: &[Op]) -> Self {
        self.ops = Some(ops.to_vec());
        self
    }

    /// Checks the maxima.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a ring that is too short or no multiple of B, or an output type of neither kind;
    /// [`Error::LimitExceeded`] where a tensor of the largest call, or the ring, passes 2³¹ elements.
    pub fn build(self) -> Result<Spec> {
        let s = &self.shape;
        let blocks = self.blocks.unwrap_or(self.rows.div_ceil(s.block_len).max(1));
        let slots = self.slots.unwrap_or(self.batch);
        if blocks == 0 {
            return Err(Error::invalid("blocks", 0, "at least 1"));
        }
        if slots > u32::MAX as usize || self.rows > u32::MAX as usize {
            let requested = slots.max(self.rows) as u64;
            return Err(Error::LimitExceeded { what: "slots or rows", requested, max: u32::MAX.into() });
        }
        if blocks.checked_mul(s.block_len).is_none_or(|tokens| tokens > u32::MAX as usize) {
            let requested = (blocks as u64).saturating_mul(s.block_len as u64);
            return Err(Error::LimitExceeded { what: "tokens of the blocks in a call", requested, max: u32::MAX.into() });
        }
        elements("elements of q", &[self.batch, self.rows, s.heads, s.head_dim])?;
        elements("elements of mem_q", &[self.batch, blocks, s.mem_len.max(1), s.heads, s.head_dim])?;
        let ops = self.ops.unwrap_or_else(|| match s.infini {
            None => vec![Op::Append, Op::Attend],
            Some(_) => vec![Op::Append, Op::Attend, Op::InfiniRead, Op::InfiniWrite],
        });
        // Linear caches need no ring, and their window may be of any size.
        let has_ring = ops.contains(&Op::Append) || self.ring_rows.is_some();
        let ring_rows = if has_ring { ring_rows(s, slots, blocks, self.ring_rows)? } else { 0 };
        elements("elements of the memory keys", &[slots, 2, s.mem_len, s.kv_heads, s.head_dim])?;
        if s.infini.is_some() {
            elements("elements of m", &[slots, 2, s.kv_heads, s.head_dim, s.head_dim])?;
        }
        let out_dtype = self.out_dtype.unwrap_or(s.dtype);
        if out_dtype != s.dtype && out_dtype != Dtype::F32 {
            return Err(Error::invalid("out_dtype", out_dtype, format!("{} or f32", s.dtype)));
        }
        Ok(Spec { shape: self.shape, batch: self.batch, rows: self.rows, blocks, slots, ring_rows, out_dtype, ops })
    }
}

/// C: as asked for, or the least that holds the window and the blocks of a call.
fn ring_rows(s: &Shape, slots: usize, blocks: usize, asked: Option<usize>) -> Result<usize> {
    let least = s
        .window
        .ring_rows(s.block_len)
        .and_then(|w| w.checked_add(blocks.checked_mul(s.block_len)?))
        .ok_or(Error::LimitExceeded { what: "ring rows", requested: u64::MAX, max: MAX_ELEMENTS })?;
    let ring_rows = asked.unwrap_or(least);
    if ring_rows < least || !ring_rows.is_multiple_of(s.block_len) {
        return Err(Error::invalid(
            "ring_rows",
            ring_rows,
            format!("a multiple of block_len = {} and at least {least} (window + {blocks} blocks)", s.block_len),
        ));
    }
    elements("elements of the key ring", &[slots.max(1), 2, ring_rows, s.kv_heads, s.head_dim])?;
    Ok(ring_rows)
}
