//! Every tuning number, in one place.

use crate::pack::padded;
use crate::span::SpanSource;
use fam_core::{Op, Shape, Spec};

/// Keys in a tile. Fixed, since the bits of a result depend on where tiles are cut: those of one row must not change with anything else.
///
/// At D = 64 a tile of keys and one of values are 16 KiB each and stay in L1 while all rows of a row tile pass over them; at D = 256 they
/// stay in L2. 32 rescales twice as often, 128 leaves L1 at D = 64; a tile's chain of sums is as long as the tile, and its rounding
/// errors with it.
pub const BLOCK_N: usize = 64;

/// Rows (tokens times query heads of a group) that share packed keys, and in the backward pass what they add to the gradients of keys. At
/// D = 64 q and the sums of so many take 128 KiB, and the five forms of rows, P and dS of the backward pass 448 KiB: they stay in an L2 of 1 MiB.
/// `attend` takes half or a quarter of them where tasks would be few.
const BLOCK_M: usize = 256;

/// The largest head_dim: beyond it tiles of keys leave L2, and another tile choice would be needed. From D = 128 on a tile's rows leave an L2 of
/// 1 MiB in the backward pass; they are read in order, panel by panel.
pub(crate) const MAX_HEAD_DIM: usize = 256;

/// Most vectors of rows in a panel, at any level, and most rows.
pub(crate) const MAX_MR: usize = 4;
pub(crate) const MAX_WIDTH: usize = 32;

/// Channels that are summed in one chain. A longer dot product adds up chains, so that its error grows with its square root even where
/// all terms are equal and each rounding errs to the same side.
pub(crate) const CHAIN: usize = 64;

/// Most rows of a block in a call, tokens times query heads of a group, that a lane for each channel serves better than a lane for each row.
/// Rows that are few, and rows that are not, differ in their last bits.
pub const FEW_ROWS: usize = 16;

/// The same of a block's memory rows, times query heads of a group: beside a block of tokens their keys come from a cache, not from memory.
pub const FEW_MEM_ROWS: usize = 8;

/// Keys that few rows take at once. A step of keys and one of values are read in turn, and the shorter the turns, the better does memory
/// deliver both; but each step rescales.
pub(crate) const STEP: usize = 16;

/// Bytes between what few rows read and what they ask for into the second level of cache, and into the first.
pub(crate) const AHEAD: usize = 16384;
pub(crate) const SOON: usize = 1024;

/// Fewest tiles in a split of few rows' keys, and most splits.
const SPLIT: usize = 4;
pub(crate) const MAX_SPLITS: usize = 16;

/// Tiles of keys in a split of few rows' keys, if a row of the shape sees at most so many. Each split is a softmax of its own, and they are
/// joined in their order. What a row gets must not depend on the rows beside it: so the cuts do not depend on what the call's rows see.
pub(crate) fn tiles_of_split(most_tiles: usize) -> usize {
    most_tiles.div_ceil(MAX_SPLITS).max(SPLIT)
}

/// Splits for one task, where so many heads (streams times kv heads) are to keep so many threads busy: all of them, if there are four heads
/// for each thread. More tasks make a second phase, which joins what they leave.
pub(crate) fn splits_of_task(heads: usize, threads: usize) -> usize {
    match heads >= TASKS_ENOUGH.saturating_mul(threads) || threads == 1 {
        true => MAX_SPLITS,
        false => MAX_SPLITS.div_ceil(TASKS_ENOUGH.saturating_mul(threads).div_ceil(heads.max(1)).min(MAX_SPLITS)),
    }
}

/// Tasks for each thread from which on there need not be more: the last to finish is then at most a quarter late.
const TASKS_ENOUGH: usize = 4;

/// How an op is cut into tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tile {
    /// Tokens, or memory rows, in a row tile.
    pub tokens: usize,
    /// Rows in a row tile: tokens times the query heads of a group, up to whole panels.
    pub rows: usize,
    /// D padded.
    pub dp: usize,
}

impl Tile {
    /// Whether the rows of so many tokens are few.
    pub fn is_few(shape: &Shape, tokens: usize) -> bool {
        tokens * shape.group() <= FEW_ROWS
    }

    /// Whether a block's memory rows are few.
    pub fn has_few_mem_rows(shape: &Shape) -> bool {
        shape.mem_len() * shape.group() <= FEW_MEM_ROWS
    }

    /// The tiles of a shape. A group of more than `BLOCK_M` heads is not cut: its rows share keys best.
    pub fn of(shape: &Shape) -> Self {
        Self::of_rows(shape, BLOCK_M)
    }

    /// The tiles of a shape, or half or a quarter of them where those of the streams' tokens do not keep so many threads busy.
    pub fn for_threads(shape: &Shape, spans: &SpanSource<'_>, threads: usize) -> Self {
        let tasks = |tile: &Tile| (0..spans.batch()).map(|n| (spans.get(n).len as usize).div_ceil(tile.tokens)).sum::<usize>();
        let is_enough = |tile: &Tile| threads == 1 || tasks(tile) * shape.kv_heads() >= TASKS_ENOUGH.saturating_mul(threads);
        let of = |rows| Self::of_rows(shape, rows);
        [BLOCK_M, BLOCK_M / 2].map(of).into_iter().find(is_enough).unwrap_or(of(BLOCK_M / 4))
    }

    fn of_rows(shape: &Shape, rows: usize) -> Self {
        let tokens = (rows / shape.group()).max(1);
        Tile { tokens, rows: (tokens * shape.group()).next_multiple_of(MAX_WIDTH), dp: padded(shape.head_dim()) }
    }
}

/// Elements of scratch memory that one worker needs for any op of the plan.
pub(crate) fn worker_share(spec: &Spec) -> usize {
    let tile = Tile::of(spec.shape());
    let sizes = spec.ops().iter().map(|op| match op {
        Op::Attend => {
            total(crate::attend::scratch(spec.shape(), tile)).max(total(crate::attend::scratch_of_few(spec.shape(), tile)))
        }
        Op::InfiniRead => total(crate::infini_read::scratch(tile)),
        Op::InfiniWrite => total(crate::infini_write::scratch(tile)),
        Op::AttendBackward => total(crate::attend_backward::scratch(tile)),
        Op::InfiniReadBackward | Op::InfiniWriteBackward => total(crate::infini_backward::scratch(tile)),
        _ => 0,
    });
    sizes.max().unwrap_or(0)
}

/// Elements of scratch memory that all tasks of an op share, for any op of the plan: what splits leave, or each stream's part of a gradient
/// per head.
pub(crate) fn shared(spec: &Spec, threads: usize) -> usize {
    let (shape, has) = (spec.shape(), |op| spec.ops().contains(&op));
    let heads = (spec.batch() * shape.kv_heads()).min(TASKS_ENOUGH.saturating_mul(threads).saturating_sub(1));
    let splits =
        if has(Op::Attend) && threads > 1 { heads * shape.group() * MAX_SPLITS * few_tokens(spec) * partial(shape) } else { 0 };
    let has_sums = has(Op::AttendBackward) || has(Op::InfiniReadBackward);
    let sums = if has_sums { crate::infini_backward::PER_HEAD * spec.batch() * shape.heads() } else { 0 };
    splits.max(sums)
}

/// Most tokens of a stream in a call that are few.
pub(crate) fn few_tokens(spec: &Spec) -> usize {
    (FEW_ROWS / spec.shape().group()).min(spec.rows())
}

/// Elements of what a split leaves of a row: its sums, and a cache line with the maximum and Σ p.
pub(crate) fn partial(shape: &Shape) -> usize {
    padded(shape.head_dim()) + 16
}

/// Elements of buffers of `sizes`.
fn total<const N: usize>(sizes: [usize; N]) -> usize {
    sizes.into_iter().map(rounded).sum()
}

/// A buffer's size rounded up to whole cache lines.
fn rounded(elements: usize) -> usize {
    elements.next_multiple_of(16)
}

/// Cuts a worker's scratch memory into buffers of `sizes`, each aligned to a cache line.
pub(crate) fn carve<const N: usize>(mut scratch: &mut [f32], sizes: [usize; N]) -> [&mut [f32]; N] {
    sizes.map(|size| {
        let (buffer, rest) = std::mem::take(&mut scratch).split_at_mut(rounded(size));
        scratch = rest;
        &mut buffer[..size]
    })
}
