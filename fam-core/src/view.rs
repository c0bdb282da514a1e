//! Borrowed memory with strides: how every tensor reaches an op.

use crate::{Dtype, Element, Error, Result};

/// What a backend hands out as memory: bytes on the CPU, a region of a buffer on a GPU.
pub trait Memory {
    /// Size in bytes.
    fn bytes(&self) -> u64;

    /// The buffer that the bytes lie in and their first address there, or `None` where borrows already prove that what is
    /// written is nobody else's (CPU slices). With `Some`, ops refuse an output that overlaps another argument.
    fn place(&self) -> Option<(u64, u64)> {
        None
    }

    /// Whether elements of `dtype` may begin at the first byte.
    fn is_aligned(&self, _dtype: Dtype) -> bool {
        true
    }
}

impl Memory for [u8] {
    fn bytes(&self) -> u64 {
        self.len() as u64
    }

    fn is_aligned(&self, dtype: Dtype) -> bool {
        self.is_empty() || self.as_ptr().addr().is_multiple_of(dtype.bytes())
    }
}

/// Where the elements of a tensor lie: `[batch, blocks, rows, heads, head_dim]`, the last axis with unit stride.
///
/// One layout serves every argument; axes that a tensor lacks have size 1:
///
/// | tensor | shape |
/// |---|---|
/// | `q`, `k`, `v`, `o` (tokens) | `[N, 1, L, H, D]` |
/// | `mem_q`, `mem_k`, `mem_v`, `mem_o` | `[N, nb, F, H, D]` |
/// | `lse`, `mem_lse` | `[N, 1, L, Hq, 1]`, `[N, nb, F, Hq, 1]` |
/// | `sink`, `beta` | `[1, 1, 1, Hq, 1]` |
/// | `m` (row = key channel), `z` | `[N, nb, D, Hkv, D]`, `[N, nb, 1, Hkv, D]` |
///
/// Strides and offset count elements. A stride of 0 repeats an input along that axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Element type.
    pub dtype: Dtype,
    /// Sizes.
    pub shape: [usize; 5],
    /// Elements from one entry to the next, of the first four axes.
    pub stride: [usize; 4],
    /// Element of the memory at which index (0, 0, 0, 0, 0) lies.
    pub offset: usize,
}

impl Layout {
    /// Row-major without gaps.
    pub fn packed(dtype: Dtype, shape: [usize; 5]) -> Self {
        let mut stride = [0; 4];
        let mut step = shape[4];
        for axis in (0..4).rev() {
            stride[axis] = step;
            step = step.saturating_mul(shape[axis]);
        }
        Layout { dtype, shape, stride, offset: 0 }
    }

    /// `[batch, tokens, heads, head_dim]`, packed.
    pub fn tokens(dtype: Dtype, [batch, tokens, heads, head_dim]: [usize; 4]) -> Self {
        Self::packed(dtype, [batch, 1, tokens, heads, head_dim])
    }

    /// `(batch, heads, rows, head_dim)`, for engines whose heads lie in front of their rows, with its strides of `[batch, heads, rows]` in
    /// elements. The same memory, read where it lies.
    ///
    /// ```
    /// use fam_core::{Dtype, Layout};
    ///
    /// // A projection of 5 rows to 3 heads of 4, transposed: the heads in front.
    /// let packed = Layout::heads_first(Dtype::F32, [2, 3, 5, 4], [60, 4, 12]);
    /// assert_eq!(packed, Layout::tokens(Dtype::F32, [2, 5, 3, 4]));
    /// // The first 3 rows are tokens; behind them lies 1 memory row of each of 2 blocks.
    /// let (q, mem_q) = (packed.rows(0, 3)?, packed.rows(3, 2)?.blocks_of(1)?);
    /// assert_eq!((q.shape, mem_q.shape), ([2, 1, 3, 3, 4], [2, 2, 1, 3, 4]));
    /// assert_eq!(mem_q.at([1, 1, 0, 2]), packed.at([1, 0, 4, 2]));
    /// # Ok::<(), fam_core::Error>(())
    /// ```
    pub fn heads_first(dtype: Dtype, [batch, heads, rows, head_dim]: [usize; 4], [sb, sh, sr]: [usize; 3]) -> Self {
        Layout { dtype, shape: [batch, 1, rows, heads, head_dim], stride: [sb, rows.saturating_mul(sr), sr, sh], offset: 0 }
    }

    /// `[heads]` of f32: `sink` and `beta`.
    pub fn per_head(heads: usize) -> Self {
        Self::packed(Dtype::F32, [1, 1, 1, heads, 1])
    }

    /// The compressive memory `m`, packed as `[slots, entries, kv_heads, head_dim, head_dim]` of f32.
    pub fn infini_m(slots: usize, entries: usize, kv_heads: usize, head_dim: usize) -> Self {
        let matrix = head_dim.saturating_mul(head_dim);
        let mut layout = Self::packed(Dtype::F32, [slots, entries, head_dim, kv_heads, head_dim]);
        let entry = matrix.saturating_mul(kv_heads);
        layout.stride = [entry.saturating_mul(entries), entry, head_dim, matrix];
        layout
    }

    /// The normaliser `z`, packed as `[slots, entries, kv_heads, head_dim]` of f32.
    pub fn infini_z(slots: usize, entries: usize, kv_heads: usize, head_dim: usize) -> Self {
        Self::packed(Dtype::F32, [slots, entries, 1, kv_heads, head_dim])
    }

    /// The same tensor elsewhere in its memory.
    pub fn with_offset(mut self, offset: usize) -> Self {
        self.offset = offset;
        self
    }

    /// The same sizes with other strides of `[batch, blocks, rows, heads]`, in elements.
    pub fn with_stride(mut self, stride: [usize; 4]) -> Self {
        self.stride = stride;
        self
    }

    /// `count` rows of the tensor, from row `first` of each block on.
    ///
    /// # Errors
    /// [`Error::Invalid`] where the tensor has fewer.
    pub fn rows(mut self, first: usize, count: usize) -> Result<Self> {
        let all = self.shape[2];
        if first.checked_add(count).is_none_or(|end| end > all) {
            return Err(Error::invalid("rows", format!("{first} + {count}"), format!("at most the tensor's {all} rows")));
        }
        self.shape[2] = count;
        self.offset = self.offset.saturating_add(first.saturating_mul(self.stride[2]));
        Ok(self)
    }

    /// Rows that lie block after block as the blocks that they are, of `rows` rows each.
    ///
    /// # Errors
    /// [`Error::Invalid`] where the rows are no whole number of blocks, or already divided into some.
    pub fn blocks_of(mut self, rows: usize) -> Result<Self> {
        let [_, blocks, all, ..] = self.shape;
        if blocks != 1 {
            return Err(Error::invalid("blocks", blocks, "1: rows that are not divided into blocks yet"));
        }
        if rows == 0 || !all.is_multiple_of(rows) {
            return Err(Error::invalid("rows", all, format!("a whole number of blocks of {rows} rows")));
        }
        (self.shape[1], self.shape[2]) = (all / rows, rows);
        self.stride[1] = rows.saturating_mul(self.stride[2]);
        Ok(self)
    }

    /// Number of elements, counting repeated ones, or `None` past `u64`.
    pub fn elements(&self) -> Option<u64> {
        if self.shape.contains(&0) {
            return Some(0);
        }
        self.shape.iter().try_fold(1u64, |n, &s| n.checked_mul(s as u64))
    }

    /// Bytes that the memory must have for every element to lie in it; 0 for an empty tensor; `None` past `u64`.
    pub fn end_bytes(&self) -> Option<u64> {
        if self.shape.contains(&0) {
            return Some(0);
        }
        let mut last = self.offset as u64;
        for (size, stride) in self.shape.iter().zip(self.stride.iter().chain([&1])) {
            last = last.checked_add((*size as u64 - 1).checked_mul(*stride as u64)?)?;
        }
        last.checked_add(1)?.checked_mul(self.dtype.bytes() as u64)
    }

    /// The element index of `[batch, block, row, head]`, channel 0. The caller has checked the sizes.
    #[inline(always)]
    pub fn at(&self, [batch, block, row, head]: [usize; 4]) -> usize {
        debug_assert!(batch < self.shape[0] && block < self.shape[1] && row < self.shape[2] && head < self.shape[3]);
        let [sb, sk, sr, sh] = self.stride;
        self.offset + batch * sb + block * sk + row * sr + head * sh
    }

    /// Whether two different indices can name the same element: forbidden for outputs.
    ///
    /// Sufficient, not necessary: each axis, from the smallest stride up, must step over all elements of the ones before.
    pub(crate) fn is_repeating(&self) -> bool {
        if self.shape.contains(&0) {
            return false;
        }
        let mut axes = [(1usize, self.shape[4]), (0, 0), (0, 0), (0, 0), (0, 0)];
        for a in 0..4 {
            axes[a + 1] = (self.stride[a], self.shape[a]);
        }
        axes.sort_unstable();
        let mut reach = 1u128;
        for (stride, size) in axes {
            if size > 1 {
                if (stride as u128) < reach {
                    return true;
                }
                reach += stride as u128 * (size as u128 - 1);
            }
        }
        false
    }
}

/// An input: borrowed memory and the layout of the tensor in it.
#[derive(Debug)]
pub struct View<'a, M: ?Sized> {
    /// The memory.
    pub mem: &'a M,
    /// Where the elements lie.
    pub layout: Layout,
}

impl<M: ?Sized> Clone for View<'_, M> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<M: ?Sized> Copy for View<'_, M> {}

/// An output: exclusively borrowed memory and the layout of the tensor in it.
#[derive(Debug)]
pub struct ViewMut<'a, M: ?Sized> {
    /// The memory.
    pub mem: &'a mut M,
    /// Where the elements lie; all of them distinct.
    pub layout: Layout,
}

impl<'a, M: ?Sized> View<'a, M> {
    /// A tensor in `mem`.
    pub fn new(mem: &'a M, layout: Layout) -> Self {
        View { mem, layout }
    }
}

impl<'a, M: ?Sized> ViewMut<'a, M> {
    /// A tensor in `mem`.
    pub fn new(mem: &'a mut M, layout: Layout) -> Self {
        ViewMut { mem, layout }
    }

    /// The same output, borrowed for less long.
    pub fn reborrow(&mut self) -> ViewMut<'_, M> {
        ViewMut { mem: self.mem, layout: self.layout }
    }

    /// The output read as an input.
    pub fn as_view(&self) -> View<'_, M> {
        View { mem: self.mem, layout: self.layout }
    }
}

impl<'a> View<'a, [u8]> {
    /// A CPU tensor `[batch, tokens, heads, head_dim]`, packed in `data`.
    pub fn tokens<T: Element>(data: &'a [T], shape: [usize; 4]) -> Self {
        Self::of(data, Layout::tokens(T::DTYPE, shape))
    }

    /// A CPU tensor of any layout in `data`.
    pub fn of<T: Element>(data: &'a [T], layout: Layout) -> Self {
        View::new(bytemuck::cast_slice(data), layout)
    }
}

impl<'a> ViewMut<'a, [u8]> {
    /// A CPU tensor `[batch, tokens, heads, head_dim]`, packed in `data`.
    pub fn tokens<T: Element>(data: &'a mut [T], shape: [usize; 4]) -> Self {
        Self::of(data, Layout::tokens(T::DTYPE, shape))
    }

    /// A CPU tensor of any layout in `data`.
    pub fn of<T: Element>(data: &'a mut [T], layout: Layout) -> Self {
        ViewMut::new(bytemuck::cast_slice_mut(data), layout)
    }
}
