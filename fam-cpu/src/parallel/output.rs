//! Tensors that several tasks write at once, each its own rows.

use super::Task;
use crate::convert::{Convert, narrow};
use crate::memory::Elements;
use crate::pack::unpack;
use crate::vector::{Body, Vector};
use crate::walk::Places;
use fam_core::{Dtype, Element, Layout, Memory, ViewMut, bf16, f16};
use std::marker::PhantomData;
use std::ops::Range;

/// Which rows `[batch, blocks, rows, heads]` of an output belong to which task.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Owner {
    /// A call tensor, indexed by stream: heads of the task's group, and rows of its tile.
    Tile {
        /// Heads in a group.
        heads: usize,
        /// Rows in a tile.
        rows: usize,
        /// Tiles of one entry of the axis `blocks`; those of entry b are `first + b·tiles ..`.
        tiles: usize,
        /// Number of the first tile.
        first: usize,
    },
    /// A call tensor, indexed by stream: all blocks and rows of the stream, in the heads of the task's group.
    Stream {
        /// Heads in a group.
        heads: usize,
    },
    /// A cached tensor, indexed by slot: all blocks and rows of the stream's slot, in the task's kv head.
    Slot,
    /// A cached tensor, indexed by slot: all that is the slot's, for the first task of its stream.
    First,
    /// The key ring of `capacity` rows: those that the new tokens of the task's tile take, `rows` of them, in all heads.
    Ring {
        /// Tokens in a tile.
        rows: usize,
        /// Rows of a slot.
        capacity: usize,
    },
}

impl Owner {
    #[inline(always)]
    fn owns(&self, task: &Task, [batch, block, row, head]: [usize; 4]) -> bool {
        match *self {
            Owner::Tile { heads, rows, tiles, first } => {
                let tile = task.tile.wrapping_sub(first + block * tiles);
                batch == task.n && is_part(head, task.group, heads) && tile < tiles && is_part(row, tile, rows)
            }
            Owner::Stream { heads } => batch == task.n && is_part(head, task.group, heads) && task.tiles == 1,
            Owner::Slot => task.slot == Some(batch) && head == task.group && task.tiles == 1,
            Owner::First => task.slot == Some(batch) && task.group == 0 && task.tile == 0,
            Owner::Ring { rows, capacity } => {
                let first = ((task.span.start - task.span.origin) % capacity as u64) as usize;
                let token = if row < first { row + capacity - first } else { row - first };
                task.slot == Some(batch) && task.group == 0 && row < capacity && is_part(token, task.tile, rows)
            }
        }
    }
}

/// Whether `i` is in part `part` of parts of `size`. Without a division, for it is asked for every row.
fn is_part(i: usize, part: usize, size: usize) -> bool {
    i.wrapping_sub(part * size) < size
}

/// An output, shared by the tasks of one op.
pub(crate) struct Output<'a> {
    first: *mut u8,
    bytes: usize,
    layout: Layout,
    owner: Owner,
    _borrow: PhantomData<&'a mut [u8]>,
}

// SAFETY: rows are reached only through `row` and `run`, which hand each to the one task that owns it.
unsafe impl Sync for Output<'_> {}

impl<'a> Output<'a> {
    /// Takes the borrow of `view`, whose elements are distinct and aligned: the op has validated its arguments.
    pub fn new(view: ViewMut<'a, [u8]>, owner: Owner) -> Self {
        let ViewMut { mem, layout } = view;
        assert!(mem.is_aligned(layout.dtype), "validated: aligned for {}", layout.dtype);
        Output { first: mem.as_mut_ptr(), bytes: mem.len(), layout, owner, _borrow: PhantomData }
    }

    /// Sizes and strides.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The row `[batch, blocks, rows, heads]`, which must be the task's own. Exclusively borrowed with the task, so there is one row at a
    /// time.
    #[inline(always)]
    pub fn row<'t, T: Element>(&'t self, task: &'t mut Task, at: [usize; 4]) -> &'t mut [T] {
        assert!(self.owner.owns(task, at), "row {at:?} is another task's");
        assert!(T::DTYPE == self.layout.dtype);
        assert!(at.iter().zip(&self.layout.shape).all(|(at, size)| at < size), "no row {at:?} in {:?}", self.layout.shape);
        let (first, len) = (self.layout.at(at) * size_of::<T>(), self.layout.shape[4]);
        assert!(first + len * size_of::<T>() <= self.bytes);
        // SAFETY: the row lies in the borrowed bytes, aligned (`new`), and any bytes are a T. A row has one owner, tasks exist once, and
        // rows of different indices within the layout's shape are distinct, so no other thread touches it; this thread holds no other row,
        // since it needs the task.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(first).cast::<T>(), len) }
    }

    /// Rows `rows` of `[batch, blocks, .., heads]` where a task owns all of them or none: as [`Output::row`] would give them one by one, but
    /// asked for once.
    #[inline(always)]
    pub fn run<'t, T: Element>(&'t self, task: &'t mut Task, [batch, block, head]: [usize; 3], rows: Range<usize>) -> Run<'t, T> {
        assert!(matches!(self.owner, Owner::Slot));
        let mut first = 0;
        if !rows.is_empty() {
            // What all of them must be, and the first row reaches less far.
            self.row::<T>(task, [batch, block, rows.end - 1, head]);
            first = self.layout.at([batch, block, rows.start, head]);
        }
        let first = self.first.cast::<T>().wrapping_add(first);
        Run { first, stride: self.layout.stride[2], count: rows.len(), len: self.layout.shape[4], _task: PhantomData }
    }

    /// Writes a row of f32, rounded once to the output's type.
    #[inline(always)]
    pub fn write<V: Vector>(&self, task: &mut Task, at: [usize; 4], values: &[f32]) {
        V::run(Write { output: self, task, at, values });
    }

    /// Writes rows of f32, `stride` apart, to `places`, each value rounded once to the output's type.
    #[inline(always)]
    pub fn write_rows<V: Vector>(&self, task: &mut Task, rows: &[f32], stride: usize, places: Places) {
        V::run(WriteRows { output: self, task, rows, stride, places });
    }

    /// Copies a row of the output's type.
    pub fn copy(&self, task: &mut Task, at: [usize; 4], from: Elements<'_>) {
        match from {
            Elements::F32(from) => self.row(task, at).copy_from_slice(from),
            Elements::F16(from) => self.row(task, at).copy_from_slice(from),
            Elements::Bf16(from) => self.row(task, at).copy_from_slice(from),
        }
    }

    /// Writes the first `count` rows of a panel to `places`. `stage` is for transposing.
    #[inline(always)]
    pub fn write_panel<V: Vector>(&self, task: &mut Task, panel: &[f32], count: usize, stage: &mut [f32], places: Places) {
        V::run(WritePanel { output: self, task, panel, count, stage, places });
    }
}

/// Rows of one head of an output, which belong to the task that is borrowed.
pub(crate) struct Run<'t, T> {
    first: *mut T,
    stride: usize,
    count: usize,
    len: usize,
    _task: PhantomData<&'t mut T>,
}

impl<T> Run<'_, T> {
    /// Elements of a row.
    pub fn len(&self) -> usize {
        self.len
    }

    /// The `i`-th row.
    #[inline(always)]
    pub fn row(&mut self, i: usize) -> &mut [T] {
        assert!(i < self.count);
        // SAFETY: as in `Output::row`, which has asked all that it asserts of the last row: those before it reach less far and are the same
        // task's (`Output::run`), and the pointer is that of the whole output. One row at a time: it borrows the run, and the run the task.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(i * self.stride), self.len) }
    }
}

/// [`Output::write`].
struct Write<'a, 'o> {
    output: &'a Output<'o>,
    task: &'a mut Task,
    at: [usize; 4],
    values: &'a [f32],
}

impl Body for Write<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector, const MR: usize, const NR: usize>(self) {
        let Write { output, task, at, values } = self;
        match output.layout.dtype {
            Dtype::F32 => narrow::<V, f32>(values, output.row(task, at)),
            Dtype::F16 => narrow::<V, f16>(values, output.row(task, at)),
            Dtype::Bf16 => narrow::<V, bf16>(values, output.row(task, at)),
            other => unreachable!("refused when the plan was made: {other}"),
        }
    }
}

/// [`Output::write_rows`].
struct WriteRows<'a, 'o> {
    output: &'a Output<'o>,
    task: &'a mut Task,
    rows: &'a [f32],
    stride: usize,
    places: Places,
}

impl Body for WriteRows<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector, const MR: usize, const NR: usize>(self) {
        match self.output.layout.dtype {
            Dtype::F32 => self.write::<V, f32>(),
            Dtype::F16 => self.write::<V, f16>(),
            Dtype::Bf16 => self.write::<V, bf16>(),
            other => unreachable!("refused when the plan was made: {other}"),
        }
    }
}

impl WriteRows<'_, '_> {
    #[inline(always)]
    fn write<V: Vector, T: Convert>(self) {
        let WriteRows { output, task, rows, stride, places } = self;
        for (row, at) in rows.chunks_exact(stride).zip(places) {
            narrow::<V, T>(row, output.row(task, at));
        }
    }
}

/// [`Output::write_panel`].
struct WritePanel<'a, 'o> {
    output: &'a Output<'o>,
    task: &'a mut Task,
    panel: &'a [f32],
    count: usize,
    stage: &'a mut [f32],
    places: Places,
}

impl Body for WritePanel<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector, const MR: usize, const NR: usize>(self) {
        match self.output.layout.dtype {
            Dtype::F32 => self.write::<V, f32>(),
            Dtype::F16 => self.write::<V, f16>(),
            Dtype::Bf16 => self.write::<V, bf16>(),
            other => unreachable!("refused when the plan was made: {other}"),
        }
    }
}

impl WritePanel<'_, '_> {
    #[inline(always)]
    fn write<V: Vector, T: Convert>(self) {
        let WritePanel { output, task, panel, count, stage, mut places } = self;
        let dp = panel.len() / (V::MR * V::LANES);
        for first in (0..count).step_by(V::LANES) {
            unpack::<V>(panel, first, stage);
            for (row, at) in stage.chunks_exact(dp).take(V::LANES.min(count - first)).zip(&mut places) {
                narrow::<V, T>(row, output.row(task, at));
            }
        }
    }
}

impl std::fmt::Debug for Output<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Output").field("layout", &self.layout).field("owner", &self.owner).finish_non_exhaustive()
    }
}
