//! Memory of the CPU: bytes, read as elements where their address allows it.

use crate::vector::Vector;
use bytemuck::Pod;
use fam_core::{Dtype, Error, Keys, Layout, Result, Spec, View, bf16, f16, mutate};
use std::ops::Range;

/// Bytes of a cache line, as a prefetch brings them.
const CACHE_LINE: usize = 64;

/// Elements of any dtype.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Elements<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    Bf16(&'a [bf16]),
}

impl<'a> Elements<'a> {
    /// None, as f32.
    pub const NONE: Self = Elements::F32(&[]);

    /// The whole elements of aligned bytes; an op has validated its arguments.
    fn new(mem: &'a [u8], dtype: Dtype) -> Self {
        fn whole<T: Pod>(mem: &[u8]) -> &[T] {
            let whole = mem.len() / size_of::<T>() * size_of::<T>();
            bytemuck::try_cast_slice(&mem[..whole]).unwrap_or_default()
        }
        match dtype {
            Dtype::F32 => Elements::F32(whole(mem)),
            Dtype::F16 => Elements::F16(whole(mem)),
            Dtype::Bf16 => Elements::Bf16(whole(mem)),
            other => unreachable!("refused when the plan was made: {other}"),
        }
    }

    /// `len` elements from `first` on.
    #[inline(always)]
    pub fn part(self, first: usize, len: usize) -> Self {
        match self {
            Elements::F32(x) => Elements::F32(&x[first..first + len]),
            Elements::F16(x) => Elements::F16(&x[first..first + len]),
            Elements::Bf16(x) => Elements::Bf16(&x[first..first + len]),
        }
    }

    /// How many.
    #[inline(always)]
    pub fn len(self) -> usize {
        match self {
            Elements::F32(x) => x.len(),
            Elements::F16(x) => x.len(),
            Elements::Bf16(x) => x.len(),
        }
    }

    /// The elements of a tensor that is f32 in any plan.
    #[inline(always)]
    fn f32(self) -> &'a [f32] {
        match self {
            Elements::F32(x) => x,
            _ => unreachable!("validated: f32"),
        }
    }

    /// Asks for them.
    pub fn prefetch<V: Vector>(self) {
        self.bytes().chunks(CACHE_LINE).for_each(|line| V::prefetch_far(line.as_ptr()));
    }

    /// Their bytes.
    pub fn bytes(self) -> &'a [u8] {
        match self {
            Elements::F32(x) => bytemuck::cast_slice(x),
            Elements::F16(x) => bytemuck::cast_slice(x),
            Elements::Bf16(x) => bytemuck::cast_slice(x),
        }
    }
}

/// An input tensor: its elements and where they lie.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Input<'a> {
    data: Elements<'a>,
    layout: Layout,
}

impl<'a> Input<'a> {
    /// A validated view as elements.
    pub fn new(view: &View<'a, [u8]>) -> Self {
        Input { data: Elements::new(view.mem, view.layout.dtype), layout: view.layout }
    }

    /// Sizes and strides.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The row `[batch, blocks, rows, heads]`.
    #[inline(always)]
    pub fn row(&self, at: [usize; 4]) -> Elements<'a> {
        self.data.part(self.layout.at(at), self.layout.shape[4])
    }

    /// The same of a tensor that is f32 in any plan.
    #[inline(always)]
    pub fn f32(&self, at: [usize; 4]) -> &'a [f32] {
        self.row(at).f32()
    }

    /// The rows of `[batch, blocks, .., heads]`.
    pub fn rows(&self, at: [usize; 3]) -> HeadRows<'a> {
        self.wrapped_rows(at, u64::MAX)
    }

    /// The same, with numbers of rows that wrap at `wrap`.
    fn wrapped_rows(&self, [batch, block, head]: [usize; 3], wrap: u64) -> HeadRows<'a> {
        let [first, stride, len] = match self.layout.shape[2] {
            // A cache of no rows, of which none is read.
            0 => [0; 3],
            _ => [self.layout.at([batch, block, 0, head]), self.layout.stride[2], self.layout.shape[4]],
        };
        HeadRows { data: self.data, first, stride, len, wrap }
    }
}

/// One head's rows of keys or values, in a cache that may wrap.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HeadRows<'a> {
    data: Elements<'a>,
    first: usize,
    stride: usize,
    len: usize,
    wrap: u64,
}

impl<'a> HeadRows<'a> {
    /// Where row number `index` is, reduced modulo the size of a ring.
    #[inline(always)]
    fn row(&self, index: u64) -> u64 {
        let index = mutate!("attend-index-32-bit", index, index & 0xffff_ffff);
        // A division takes as long as copying a row.
        let reduced = if index < self.wrap { index } else { index % self.wrap };
        mutate!("attend-ring-wrap", reduced, index.min(self.wrap - 1))
    }

    /// The same rows by numbers that do not wrap before a ring's end.
    pub fn reduced(&self, rows: Range<u64>) -> Range<u64> {
        let first = self.row(rows.start);
        first..first + (rows.end - rows.start)
    }

    /// Row number `index`.
    #[inline(always)]
    pub fn get(&self, index: u64) -> Elements<'a> {
        self.data.part(self.first + self.row(index) as usize * self.stride, self.len)
    }

    /// Asks for rows that lie apart. A processor's own prefetch finds those that do not; and of rows around a ring's end each comes when it is
    /// read.
    #[inline(always)]
    pub fn prefetch<V: Vector>(&self, rows: Range<u64>) {
        let count = (rows.end - rows.start) as usize;
        let Some((run, stride)) = self.run(rows.start, count).filter(|(_, stride)| *stride > self.len) else { return };
        (0..count).for_each(|t| run.part(t * stride, self.len).prefetch::<V>());
    }

    /// Rows `index .. index + count` as one run of memory, and the stride between them; `None` where a ring's end is between them.
    #[inline(always)]
    pub fn run(&self, index: u64, count: usize) -> Option<(Elements<'a>, usize)> {
        let row = self.row(index);
        (count > 0 && count as u64 <= self.wrap - row).then(|| {
            let first = self.first + row as usize * self.stride;
            (self.data.part(first, (count - 1) * self.stride + self.len), self.stride)
        })
    }
}

/// Keys and values of one kind: of tokens in a ring or a linear cache, or of memory rows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cache<'a> {
    k: Input<'a>,
    v: Input<'a>,
    /// Rows of a ring; beyond every row number otherwise.
    wrap: u64,
}

impl<'a> Cache<'a> {
    /// Keys and values of tokens: row number is position − origin.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a kind of cache that this crate does not know.
    pub fn tokens(keys: &Keys<'a, [u8]>, spec: &Spec) -> Result<Self> {
        match *keys {
            Keys::Strided { k, v } => Ok(Cache { k: Input::new(&k), v: Input::new(&v), wrap: u64::MAX }),
            Keys::Ring(ring) => {
                let mut layout = ring_layout(spec);
                layout.shape[1] = 1;
                let half = |offset| Input::new(&View::new(ring, layout.with_offset(offset)));
                Ok(Cache { k: half(0), v: half(layout.stride[1]), wrap: spec.ring_rows() as u64 })
            }
            _ => Err(Error::unsupported("keys", "a new kind", "linear caches and the key ring")),
        }
    }

    /// Keys and values of memory rows: row number is f.
    pub fn memory(k: &View<'a, [u8]>, v: &View<'a, [u8]>) -> Self {
        Cache { k: Input::new(k), v: Input::new(v), wrap: u64::MAX }
    }

    /// Entries of memory rows, at least 1 where a span has any.
    pub fn entries(&self) -> usize {
        self.k.layout.shape[1]
    }

    /// Whether row numbers wrap.
    #[cfg(fam_mutants)]
    pub fn is_ring(&self) -> bool {
        self.wrap != u64::MAX
    }

    /// Memory rows in an entry.
    #[cfg(fam_mutants)]
    pub fn rows_per_entry(&self) -> usize {
        self.k.layout.shape[2].min(self.v.layout.shape[2])
    }

    /// Keys and values of `[slot, entry, head]`.
    pub fn rows(&self, at: [usize; 3]) -> (HeadRows<'a>, HeadRows<'a>) {
        (self.k.wrapped_rows(at, self.wrap), self.v.wrapped_rows(at, self.wrap))
    }
}

/// Where keys and values lie in the key ring, as one tensor `[slots, K or V, C, Hkv, D]` of kv_dtype.
///
/// A slot is contiguous, in it keys before values, and each head's rows together: a tile of one head's keys is one run of memory.
pub(crate) fn ring_layout(spec: &Spec) -> Layout {
    let shape = spec.shape();
    let (kv_heads, d, rows) = (shape.kv_heads(), shape.head_dim(), spec.ring_rows());
    let head = rows * d;
    let half = head * kv_heads;
    Layout::packed(shape.kv_dtype(), [spec.slots(), 2, rows, kv_heads, d]).with_stride([2 * half, half, d, head])
}
