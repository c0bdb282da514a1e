//! One joint softmax over window, memory and current block (TransformerFAM, Alg. 1 and 2; contract section 2).
//!
//! ```text
//! p_ij ∝ exp(scale · q_i·k_j) over the visible j        o_i = Σ p_ij v_j        lse_i = ln Σ exp(scale · q_i·k_j)
//! ```
//!
//! A task is one stream, one kv head and one tile of rows: up to `BLOCK_M` rows of block rows (`q`) or of memory rows (`mem_q`), the query
//! heads of a group folded into rows, so that keys are packed once for all of them. A tile is worked off in pieces that lie in one block,
//! since a block's rows share its window and its memory. A piece walks its keys in the order
//!
//! ```text
//! window, oldest first  |  memory rows  |  current block
//! ```
//!
//! in tiles of `BLOCK_N` keys. Window tiles are counted back from the block's start, those of the current block forward from it. So which
//! keys share a tile depends on their distance to the row's block alone: a row's arithmetic is the same in a step, a prefill and a
//! decode, in any batch, slot, cache or tile of rows, and so are its bits. Of each tile a row sees a range; what lies outside weighs
//! exactly 0 and its values are not touched, so NaN there stays where it is seen.

use crate::infini_read::State;
use crate::memory::{Cache, HeadRows, Input};
use crate::pack::{self, Convert, PAD, with_element};
use crate::parallel::output::{Output, Owner};
use crate::parallel::{Grid, Par, Task, run};
use crate::product::{accumulate, logits};
use crate::softmax::Softmax;
use crate::span::SpanSource;
use crate::tile::{BLOCK_N, MAX_MR, Tile, carve};
use crate::vector::{Vector, scalar::Scalar};
use crate::{CpuPlan, Isa};
use fam_core::{Attend, Plan, Result, Shape, Span, mutate};
use std::ops::Range;

/// Sizes of a worker's buffers, in the order of [`Buffers`].
pub(crate) fn scratch(shape: &Shape, tile: Tile) -> [usize; 9] {
    let Tile { rows, dp, .. } = tile;
    let read = if shape.infini().is_some() { rows * dp } else { 0 };
    [rows * dp, rows * dp, BLOCK_N * dp, BLOCK_N * dp, MAX_MR * BLOCK_N, MAX_MR * dp, PAD * dp, 2 * rows, read]
}

/// [`fam_core::Backend::attend`].
pub(crate) fn attend(plan: &CpuPlan, par: &Par<'_>, args: Attend<'_, [u8]>, scratch: &mut [u8]) -> Result<()> {
    args.validate(plan, scratch)?;
    with_element!(plan, T => typed::<T>(plan, par, args, scratch))
}

fn typed<T: Convert>(plan: &CpuPlan, par: &Par<'_>, args: Attend<'_, [u8]>, scratch: &mut [u8]) -> Result<()> {
    let spec = plan.spec();
    let shape = spec.shape();
    let spans = SpanSource::new(args.spans, spec, Some(&args.keys), args.mem.is_some());
    let tile = plan.tile;
    let row_tiles = args.rows.as_ref().map_or(0, |_| spans.max_rows().div_ceil(tile.tokens));
    let mem_tiles = args.mem_rows.as_ref().map_or(0, |_| shape.mem_len().div_ceil(tile.tokens));
    let mem_blocks = args.mem_rows.as_ref().map_or(0, |_| spans.max_blocks());
    let owner = |tiles, first| Owner::Tile { heads: shape.group(), rows: tile.tokens, tiles, first };
    let kernel = Kernel {
        shape,
        tile,
        rows: args.rows.map(|r| RowGroup::<T>::new(r, owner(row_tiles, 0))),
        mem_rows: args.mem_rows.map(|r| RowGroup::new(r, owner(mem_tiles, row_tiles))),
        row_tiles,
        mem_tiles,
        keys: Cache::<T>::tokens(&args.keys, spec)?,
        mem: args.mem.as_ref().map(|m| Cache::memory(&m.k, &m.v)),
        sink: args.sink.as_ref().map(Input::<f32>::new),
        infini: args.infini.as_ref().map(State::<T>::new),
    };
    let tiles = row_tiles + mem_blocks * mem_tiles;
    let grid = Grid { streams: spans.batch(), groups: shape.kv_heads(), tiles, spans: Some(spans), writes_slots: false };
    run(par, &grid, scratch, plan.share, &|task, scratch| match plan.isa {
        Isa::Scalar => kernel.task::<Scalar, 4, 1>(task, scratch),
    })
}

/// What all tasks share.
struct Kernel<'a, T> {
    shape: &'a Shape,
    tile: Tile,
    rows: Option<RowGroup<'a, T>>,
    mem_rows: Option<RowGroup<'a, T>>,
    /// Tiles of block rows; then come `mem_tiles` of each block's memory rows.
    row_tiles: usize,
    mem_tiles: usize,
    keys: Cache<'a, T>,
    mem: Option<Cache<'a, T>>,
    sink: Option<Input<'a, f32>>,
    infini: Option<State<'a, T>>,
}

/// Block rows or memory rows.
struct RowGroup<'a, T> {
    q: Input<'a, T>,
    o: Output<'a>,
    lse: Option<Output<'a>>,
}

impl<'a, T: Convert> RowGroup<'a, T> {
    fn new(rows: fam_core::Rows<'a, [u8]>, owner: Owner) -> Self {
        let lse = rows.lse.map(|view| Output::new(view, owner));
        RowGroup { q: Input::new(&rows.q), o: Output::new(rows.o, owner), lse }
    }
}

/// Rows of one tile in one block. Row `r` is query head `r mod group` of the group, of token (or memory row) `first + r / group`.
struct Piece {
    span: Span,
    /// Block of the call.
    i: usize,
    /// Position of the block's first token.
    block: u64,
    /// First token, counted from the call's first; or first memory row.
    first: usize,
    tokens: usize,
    is_memory: bool,
}

impl Piece {
    /// Keys of window and current block that token `t` of the piece sees, counted from the block's start.
    fn visible(&self, t: usize, shape: &Shape) -> Range<i64> {
        let from_block = |position: u64| position.wrapping_sub(self.block).cast_signed();
        let (span, block_len) = (&self.span, shape.block_len());
        if self.is_memory {
            let keys = span.block_keys(self.i, block_len);
            let (first, end) = (from_block(keys.start), from_block(keys.end));
            let first = mutate!("attend-mem-rows-window", first, first.min(from_block(span.window_first(self.block, shape))));
            return first..mutate!("attend-mem-rows-causal", end, end.min((self.first + t) as i64 + 1));
        }
        let position = span.start + (self.first + t) as u64;
        let first = from_block(span.window_first(position, shape));
        let end = from_block(position + 1);
        let first = mutate!("attend-window-block", first, (first + block_len as i64).min(first.max(0)));
        let first = mutate!(
            "attend-window-tokens",
            first,
            match shape.window() {
                fam_core::Window::Blocks(m) => first.max(end - 1 - (m * block_len) as i64),
                _ => first,
            }
        );
        let first = mutate!(
            "attend-token-window",
            first,
            if shape.window() == fam_core::Window::Tokens(1) { first } else { (first + 1).min(end - 1) }
        );
        first..mutate!("attend-dropped-key", end, (first + 1).max(end - 1))
    }
}

/// A worker's buffers; see [`scratch`] and, for the forms of tiles, [`pack`].
struct Buffers<'s> {
    /// Rows.
    q: &'s mut [f32],
    /// Σ p v of each row over the tiles so far.
    acc: &'s mut [f32],
    /// A tile of keys.
    k: &'s mut [f32],
    /// A tile of values.
    v: &'s mut [f32],
    /// Logits, then p, of `MR` rows over the tile: `[MR][BLOCK_N]`.
    s: &'s mut [f32],
    /// Σ p v of `MR` rows over the tile.
    part: &'s mut [f32],
    /// The keys of a panel before they are transposed.
    panel: &'s mut [f32],
    states: &'s mut [Softmax],
    /// What each row reads from the compressive memory.
    read: &'s mut [f32],
}

impl<T: Convert> Kernel<'_, T> {
    /// The tile's rows, cut at block boundaries. `MR` rows are held in registers at once, `NR` vectors of keys or channels beside them.
    #[inline(always)]
    fn task<V: Vector, const MR: usize, const NR: usize>(&self, task: &mut Task, scratch: &mut [f32]) {
        let [q, acc, k, v, s, part, panel, states, read] = carve(scratch, self::scratch(self.shape, self.tile));
        let mut buffers = Buffers { q, acc, k, v, s, part, panel, states: bytemuck::cast_slice_mut(states), read };
        let (span, block_len) = (task.span(), self.shape.block_len() as u64);
        let block = |i: usize| (span.start / block_len + i as u64) * block_len;
        if let Some(tile) = task.tile().checked_sub(self.row_tiles) {
            let (i, first) = (tile / self.mem_tiles, tile % self.mem_tiles * self.tile.tokens);
            if let Some(rows) = &self.mem_rows
                && i < span.blocks(self.shape.block_len())
            {
                let tokens = self.tile.tokens.min(self.shape.mem_len() - first);
                let piece = Piece { span, i, block: block(i), first, tokens, is_memory: true };
                self.piece::<V, MR, NR>(task, &piece, rows, &mut buffers);
            }
        } else if let Some(rows) = &self.rows {
            let mut first = task.tile() * self.tile.tokens;
            let end = (first + self.tile.tokens).min(span.len as usize);
            while first < end {
                let i = ((span.start + first as u64) / block_len - span.start / block_len) as usize;
                let tokens = (end - first).min((block(i) + block_len - span.start) as usize - first);
                let piece = Piece { span, i, block: block(i), first, tokens, is_memory: false };
                self.piece::<V, MR, NR>(task, &piece, rows, &mut buffers);
                first += tokens;
            }
        }
    }

    #[inline(always)]
    fn piece<V: Vector, const MR: usize, const NR: usize>(
        &self,
        task: &mut Task,
        piece: &Piece,
        rows: &RowGroup<'_, T>,
        b: &mut Buffers<'_>,
    ) {
        let (group, dp) = (self.shape.group(), self.tile.dp);
        let (n, kv_head) = (task.n(), task.group());
        let count = piece.tokens * group;
        let at = |r: usize| {
            let (row, head) = (piece.first + r / group, kv_head * group + r % group);
            [n, if piece.is_memory { piece.i } else { 0 }, row, head]
        };
        for (r, q) in b.q.chunks_exact_mut(dp).take(count).enumerate() {
            pack::row(rows.q.row(at(r)), q, 0.0);
        }
        b.acc[..count * dp].fill(0.0);
        let fresh = mutate!("attend-stale-row", count, 1);
        b.states[..fresh].fill(Softmax::EMPTY);

        self.walk::<V, MR, NR>(kv_head, piece, b);

        for r in 0..count {
            let without_sink = b.states[r];
            let mut state = without_sink;
            let acc = &mut b.acc[r * dp..][..dp];
            if let Some(sink) = &self.sink {
                let (with_sink, [before, _]) = state.merge(Softmax::one(sink.row([0, 0, 0, at(r)[3]])[0]));
                acc.iter_mut().for_each(|c| *c *= before);
                state = with_sink;
            }
            mutate!("attend-sink-weightless", state, without_sink).normalise::<V>(acc);
            if let Some(lse) = &rows.lse {
                let value = mutate!("attend-lse-without-sink", state, without_sink).lse();
                lse.write(task, at(r), &[mutate!("attend-lse-log2", value, value * std::f32::consts::LOG2_E)]);
            }
        }
        if let (Some(state), false) = (&self.infini, piece.is_memory) {
            let q = |r: usize| mutate!("infini-rotated-query", state.q.row(at(r)), rows.q.row(at(r)));
            let heads = kv_head * group..(kv_head + 1) * group;
            state.gate_rows::<V, MR, NR>(&piece.span, piece.i, heads, q, [b.q, b.v, b.read], &mut b.acc[..count * dp]);
        }
        let d = self.shape.head_dim();
        for r in 0..count {
            rows.o.write(task, at(r), &b.acc[r * dp..][..d]);
        }
    }

    /// All keys of a piece, in order.
    #[inline(always)]
    fn walk<V: Vector, const MR: usize, const NR: usize>(&self, kv_head: usize, piece: &Piece, b: &mut Buffers<'_>) {
        let (span, shape) = (&piece.span, self.shape);
        let kv_head = mutate!("attend-gqa", kv_head, kv_head * shape.group() % shape.kv_heads());
        let visible = |t: usize| piece.visible(t, shape);
        let (first, end) = (visible(0).start, visible(piece.tokens - 1).end);
        let slot = mutate!("attend-slot", span.slot as usize, 0);
        let origin = mutate!("attend-origin", span.origin, if self.keys.is_ring() { 0 } else { span.origin });
        let tokens = self.keys.rows([slot, 0, kv_head]);
        let step = BLOCK_N as i64;
        // Row number of key x: with wrapping arithmetic, since the tile may begin before the origin while its keys do not.
        let row_of = |x: i64| piece.block.wrapping_sub(origin).wrapping_add(x.cast_unsigned());

        let mut x = -(-first.min(0) as u64).next_multiple_of(BLOCK_N as u64).cast_signed();
        while x < 0 && x < end {
            let seen = |t| clip(visible(t), x);
            self.tile::<V, MR, NR>(tokens, row_of(x), piece.tokens, seen, b);
            x += step;
        }
        if let Some(mem) = &self.mem {
            let count = mutate!("attend-mem-rows-all", span.mem_rows as usize, mem.rows_per_entry().min(shape.mem_len())) as i64;
            let count = mutate!("attend-mem-rows-short", count, (count - 1).max(0));
            let i = mutate!("attend-next-memory", piece.i, piece.i + 1);
            let entry = (u64::from(span.mem_entry) + i as u64) % mem.entries() as u64;
            let memory = mem.rows([slot, entry as usize, kv_head]);
            for x in (0..count).step_by(BLOCK_N) {
                self.tile::<V, MR, NR>(memory, x.cast_unsigned(), piece.tokens, |_| clip(0..count, x), b);
            }
        }
        let mut x = first.max(0) / step * step;
        while mutate!("attend-partial-tile", x < end, x + step <= end || x == 0 && x < end) {
            let seen = |t| clip(visible(t), x);
            self.tile::<V, MR, NR>(tokens, row_of(x), piece.tokens, seen, b);
            x += step;
        }
    }

    /// One tile of keys and values for all rows of a piece. `first`: row number of key 0; `seen(t)`: the keys that token t sees.
    #[inline(always)]
    fn tile<V: Vector, const MR: usize, const NR: usize>(
        &self,
        (k, v): (HeadRows<'_, T>, HeadRows<'_, T>),
        first: u64,
        tokens: usize,
        seen: impl Fn(usize) -> Range<usize>,
        b: &mut Buffers<'_>,
    ) {
        let (group, dp) = (self.shape.group(), self.tile.dp);
        // Keys that no token sees are not packed, so their bytes are never read.
        let not_empty = (0..tokens).map(&seen).filter(|s| !s.is_empty());
        let Some(union) = not_empty.reduce(|a, b| a.start.min(b.start)..a.end.max(b.end)) else { return };
        pack::keys::<V, T>(&k, first, union.clone(), self.shape.head_dim(), b.panel, b.k);
        pack::values(&v, first, union, dp, b.v);
        let mut r = 0;
        while r + MR <= tokens * group {
            self.rows_of_tile::<V, MR, NR>(r, std::array::from_fn(|i| seen((r + i) / group)), b);
            r += MR;
        }
        while r < tokens * group {
            self.rows_of_tile::<V, 1, 4>(r, [seen(r / group)], b);
            r += 1;
        }
    }

    /// `MR` rows from row `r` on over the packed tile.
    #[inline(always)]
    fn rows_of_tile<V: Vector, const MR: usize, const NR: usize>(&self, r: usize, seen: [Range<usize>; MR], b: &mut Buffers<'_>) {
        let (d, dp) = (self.shape.head_dim(), self.tile.dp);
        let not_empty = || seen.iter().filter(|s| !s.is_empty());
        let Some(first) = not_empty().map(|s| s.start).min() else { return };
        let end = not_empty().map(|s| s.end).max().unwrap_or(first);
        let panels = first / V::LANES..end.div_ceil(V::LANES);
        let scale = mutate!("attend-scale", self.shape.scale(), self.shape.scale() * 0.5);
        logits::<V, MR, NR>(&b.q[r * dp..], dp, d, b.k, panels.clone(), scale, b.s);

        // Keys that all rows see go through the kernel of MR rows; those before and after, row by row, in the same order.
        let common = seen.iter().map(|s| s.start).max().unwrap_or(0)..seen.iter().map(|s| s.end).min().unwrap_or(0);
        let common = if common.is_empty() { BLOCK_N..BLOCK_N } else { common };
        let lanes = panels.start * V::LANES..panels.end * V::LANES;
        b.part[..MR * dp].fill(0.0);
        let mut before = [1.0; MR];
        for i in 0..MR {
            let Range { start, end } = seen[i].clone();
            if start < end {
                let s = &mut b.s[i * BLOCK_N..][..BLOCK_N];
                before[i] = b.states[r + i].update::<V>(&mut s[lanes.clone()], start - lanes.start..end - lanes.start);
                accumulate::<V, 1, 4>(s, BLOCK_N, b.v, start..end.min(common.start), dp, &mut b.part[i * dp..]);
            }
        }
        accumulate::<V, MR, NR>(b.s, BLOCK_N, b.v, common.clone(), dp, b.part);
        for i in 0..MR {
            let Range { start, end } = seen[i].clone();
            if start < end {
                let s = &b.s[i * BLOCK_N..][..BLOCK_N];
                accumulate::<V, 1, 4>(s, BLOCK_N, b.v, start.max(common.end)..end, dp, &mut b.part[i * dp..]);
                // A tile's sums are added to the row's at once: chains of 64 err less than one of all keys.
                let part = b.part[i * dp..].chunks_exact(V::LANES);
                for (acc, part) in b.acc[(r + i) * dp..][..dp].chunks_exact_mut(V::LANES).zip(part) {
                    V::load(acc).mul_add(V::splat(before[i]), V::load(part)).store(acc);
                }
            }
        }
    }
}

/// The part of `keys` in the tile that begins at `x`, as keys of the tile.
#[inline(always)]
fn clip(keys: Range<i64>, x: i64) -> Range<usize> {
    let in_tile = |key: i64| (key - x).clamp(0, BLOCK_N as i64) as usize;
    in_tile(keys.start)..in_tile(keys.end)
}
