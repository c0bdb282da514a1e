//! One joint softmax over window, memory and current block (TransformerFAM, Alg. 1 and 2; contract section 2).
//!
//! ```text
//! p_ij ∝ exp(scale · q_i·k_j) over the visible j        o_i = Σ p_ij v_j        lse_i = ln Σ exp(scale · q_i·k_j)
//! ```
//!
//! A task is one stream, one kv head and one tile of rows: up to `BLOCK_M` rows of block rows (`q`) or of memory rows (`mem_q`), the query
//! heads of a group folded into rows, so that they share keys. A tile is worked off in pieces that lie in one block, since a block's rows
//! share its window and its memory. A piece walks its keys in the order
//!
//! ```text
//! window, oldest first  |  memory rows  |  current block
//! ```
//!
//! in tiles of `BLOCK_N` keys. Window tiles are counted back from the block's start, those of the current block forward from it. So which
//! keys share a tile depends on their distance to the row's block alone: a row's arithmetic is the same in a step, a prefill and a
//! decode, in any batch, slot, cache or tile of rows, and so are its bits. Of each tile a row sees a range; what lies outside weighs
//! exactly 0 and its values are not touched, so NaN there stays where it is seen.

mod panel;

use crate::CpuPlan;
use crate::infini_read::State;
use crate::memory::{Cache, HeadRows, Input};
use crate::pack::{self, Convert, Rows, with_element};
use crate::parallel::output::{Output, Owner};
use crate::parallel::{Grid, Par, Task, run};
use crate::softmax::Softmax;
use crate::span::SpanSource;
use crate::tile::{BLOCK_N, MAX_MR, MAX_WIDTH, Tile, carve};
use crate::vector::{Body, Vector};
use fam_core::{Attend, Plan, Result, Shape, Span, mutate};
use panel::{PanelOverTile, Seen};
use std::ops::Range;

/// Sizes of a worker's buffers, in the order of [`Buffers`].
pub(crate) fn scratch(shape: &Shape, tile: Tile) -> [usize; 11] {
    let Tile { rows, dp, .. } = tile;
    let [read, m] = if shape.infini().is_some() { [MAX_WIDTH * dp, dp * dp] } else { [0; 2] };
    let (keys, s, states) = (BLOCK_N * dp, BLOCK_N * MAX_WIDTH, 2 * rows);
    [rows * dp, rows * dp, keys, keys, s, pack::stage(dp), states, 2 * MAX_WIDTH, read, read, m]
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
    let scale = mutate!("attend-scale", shape.scale(), shape.scale() * 0.5);
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
        sign: if scale == 0.0 { 0.0 } else { scale.signum() },
        unit: if scale == 0.0 { 1.0 } else { scale.abs() },
    };
    let tiles = row_tiles + mem_blocks * mem_tiles;
    let grid = Grid { streams: spans.batch(), groups: shape.kv_heads(), tiles, spans: Some(spans), writes_slots: false };
    run(par, &grid, scratch, plan.share, &|task, scratch| plan.isa.run(TileOfRows { kernel: &kernel, task, scratch }))
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
    /// The scale is `sign` · `unit`. The sign goes into q, where it costs nothing and is exact, so that the largest product is the largest
    /// logit; the rest is applied to the difference of two products. Of a scale of 0 the sign is 0.
    sign: f32,
    unit: f32,
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

/// A worker's buffers; see [`scratch`] and, for the forms of panels and tiles, [`pack`].
struct Buffers<'s> {
    /// Panels of q.
    q: &'s mut [f32],
    /// Panels of Σ p v over the tiles so far.
    acc: &'s mut [f32],
    /// A tile of keys.
    k: &'s mut [f32],
    /// A tile of values.
    v: &'s mut [f32],
    /// Logits, then p, of a panel over the tile: `[BLOCK_N][W]`.
    s: &'s mut [f32],
    /// For transposing.
    stage: &'s mut [f32],
    /// Maxima of all rows, then their sums.
    states: &'s mut [f32],
    /// What the rows of a panel see, if not all the same.
    ranges: &'s mut [f32],
    /// σ(q) of a panel, what its rows read from the compressive memory, and that memory's m.
    sigma_q: &'s mut [f32],
    read: &'s mut [f32],
    m: &'s mut [f32],
}

/// A task on its worker.
struct TileOfRows<'a, 's, T> {
    kernel: &'a Kernel<'a, T>,
    task: &'s mut Task,
    scratch: &'s mut [f32],
}

impl<T: Convert> Body for TileOfRows<'_, '_, T> {
    type Output = ();

    /// The tile's rows, cut at block boundaries.
    #[inline(always)]
    fn run<V: Vector, const MR: usize, const NR: usize>(self) {
        let TileOfRows { kernel, task, scratch } = self;
        let (shape, tile) = (kernel.shape, kernel.tile);
        let [q, acc, k, v, s, stage, states, ranges, sigma_q, read, m] = carve(scratch, self::scratch(shape, tile));
        let mut buffers = Buffers { q, acc, k, v, s, stage, states, ranges, sigma_q, read, m };
        let (span, block_len) = (task.span(), shape.block_len() as u64);
        let block = |i: usize| (span.start / block_len + i as u64) * block_len;
        let is_memory = task.tile() >= kernel.row_tiles;
        let (rows, mut first, end, mem_block) = match task.tile().checked_sub(kernel.row_tiles) {
            None => (&kernel.rows, task.tile() * tile.tokens, span.len as usize, 0),
            Some(mem_tile) => {
                let (i, first) = (mem_tile / kernel.mem_tiles, mem_tile % kernel.mem_tiles * tile.tokens);
                let end = if i < span.blocks(shape.block_len()) { shape.mem_len() } else { 0 };
                (&kernel.mem_rows, first, end, i)
            }
        };
        let Some(rows) = rows else { return };
        let end = end.min(first + tile.tokens);
        while first < end {
            let (i, tokens) = if is_memory {
                (mem_block, end - first)
            } else {
                let i = ((span.start + first as u64) / block_len - span.start / block_len) as usize;
                (i, (end - first).min((block(i) + block_len - span.start) as usize - first))
            };
            kernel.piece::<V>(task, &Piece { span, i, block: block(i), first, tokens, is_memory }, rows, &mut buffers);
            first += tokens;
        }
    }
}

/// Keys and values that may share a tile.
struct Segment<'a, T> {
    rows: (HeadRows<'a, T>, HeadRows<'a, T>),
    /// Row number of key 0. Arithmetic with it wraps, since a tile may begin before the origin while its keys do not.
    first: u64,
    /// Memory keys that all rows see; `None` for tokens.
    mem: Option<Range<i64>>,
}

impl<T: Convert> Kernel<'_, T> {
    #[inline(always)]
    fn piece<V: Vector>(&self, task: &mut Task, piece: &Piece, rows: &RowGroup<'_, T>, b: &mut Buffers<'_>) {
        let (shape, dp, width) = (self.shape, self.tile.dp, V::MR * V::LANES);
        let (n, kv_head, group) = (task.n(), task.group(), shape.group());
        let (count, size) = (piece.tokens * group, dp * width);
        let at = |r: usize| {
            let (row, head) = (piece.first + r / group, kv_head * group + r % group);
            [n, if piece.is_memory { piece.i } else { 0 }, row, head]
        };
        for (q, first) in b.q.chunks_exact_mut(size).zip((0..count).step_by(width)) {
            pack::panel::<V, T>(|r| rows.q.row(at(first + r)), width.min(count - first), self.sign, b.stage, q);
        }
        let (row_max, row_sum) = b.states.split_at_mut(self.tile.rows);
        let fresh = mutate!("attend-stale-row", self.tile.rows, 1);
        row_max[..fresh].fill(f32::NEG_INFINITY);
        row_sum[..fresh].fill(0.0);
        b.acc[..count.next_multiple_of(width) * dp].fill(0.0);

        self.walk::<V>(kv_head, piece, b);

        for first in (0..count).step_by(width) {
            let count = width.min(count - first);
            let acc = &mut b.acc[first * dp..][..size];
            let weights = &mut b.ranges[..width];
            for r in 0..count {
                let (row_max, row_sum) = (b.states[first + r] * self.unit, b.states[self.tile.rows + first + r]);
                let without_sink = Softmax { row_max, row_sum };
                let (mut state, mut before) = (without_sink, 1.0);
                if let Some(sink) = &self.sink {
                    (state, [before, _]) = state.merge(Softmax::one(sink.row([0, 0, 0, at(first + r)[3]])[0]));
                }
                let divisor = mutate!("attend-sink-weightless", state, without_sink);
                weights[r] = before * divisor.weight();
                if divisor.is_empty() {
                    weights[r] = 0.0;
                    acc.iter_mut().skip(r).step_by(width).for_each(|o| *o = 0.0);
                }
                if let Some(lse) = &rows.lse {
                    let value = mutate!("attend-lse-without-sink", state, without_sink).lse();
                    lse.write(task, at(first + r), &[mutate!("attend-lse-log2", value, value * std::f32::consts::LOG2_E)]);
                }
            }
            for acc in acc.chunks_exact_mut(width) {
                for (o, weight) in acc.chunks_exact_mut(V::LANES).zip(weights.chunks_exact(V::LANES)) {
                    V::load(o).mul(V::load(weight)).store(o);
                }
            }
            if let (Some(state), false) = (&self.infini, piece.is_memory) {
                let row = |r: usize| mutate!("infini-rotated-query", state.q.row(at(r)), rows.q.row(at(r)));
                let heads = kv_head * group..(kv_head + 1) * group;
                let buffers = [&mut *b.sigma_q, &mut *b.read, &mut *b.m, &mut *b.ranges, &mut *b.stage];
                state.gate_panel::<V>(&piece.span, piece.i, heads, first..first + count, row, buffers, acc);
            }
            pack::unpack::<V>(acc, count, b.stage, |r, o| rows.o.write(task, at(first + r), &o[..shape.head_dim()]));
        }
    }

    /// All keys of a piece, in order.
    #[inline(always)]
    fn walk<V: Vector>(&self, kv_head: usize, piece: &Piece, b: &mut Buffers<'_>) {
        let (span, shape) = (&piece.span, self.shape);
        let kv_head = mutate!("attend-gqa", kv_head, kv_head * shape.group() % shape.kv_heads());
        let (first, end) = (piece.visible(0, shape).start, piece.visible(piece.tokens - 1, shape).end);
        let slot = mutate!("attend-slot", span.slot as usize, 0);
        let origin = mutate!("attend-origin", span.origin, if self.keys.is_ring() { 0 } else { span.origin });
        let tokens = Segment { rows: self.keys.rows([slot, 0, kv_head]), first: piece.block.wrapping_sub(origin), mem: None };
        let memory = self.mem.as_ref().map(|mem| {
            let count = mutate!("attend-mem-rows-all", span.mem_rows as usize, mem.rows_per_entry().min(shape.mem_len())) as i64;
            let count = mutate!("attend-mem-rows-short", count, (count - 1).max(0));
            let i = mutate!("attend-next-memory", piece.i, piece.i + 1);
            let entry = (u64::from(span.mem_entry) + i as u64) % mem.entries() as u64;
            Segment { rows: mem.rows([slot, entry as usize, kv_head]), first: 0, mem: Some(0..count) }
        });

        let step = BLOCK_N as i64;
        let window = -(-first.min(0) as u64).next_multiple_of(BLOCK_N as u64).cast_signed()..end.min(0);
        let own =
            first.max(0) / step * step..mutate!("attend-partial-tile", end, if end > step { end / step * step } else { end });
        let mem = memory.iter().filter_map(|m| m.mem.clone().map(|keys| (m, keys)));
        for (segment, keys) in [(&tokens, window)].into_iter().chain(mem).chain([(&tokens, own)]) {
            let mut x = keys.start;
            while x < keys.end {
                let seen = |t| clip(segment.mem.clone().unwrap_or_else(|| piece.visible(t, shape)), x);
                self.tile::<V>(segment, x, piece.tokens, seen, b);
                x += step;
            }
        }
    }

    /// The tile of keys from `x` on, for all rows of a piece. `seen(t)`: the keys of the tile that token t sees.
    #[inline(always)]
    fn tile<V: Vector>(
        &self,
        segment: &Segment<'_, T>,
        x: i64,
        tokens: usize,
        seen: impl Fn(usize) -> Range<usize>,
        b: &mut Buffers<'_>,
    ) {
        let (group, d, dp, width) = (self.shape.group(), self.shape.head_dim(), self.tile.dp, V::MR * V::LANES);
        // Keys that no token sees are never read. From here on keys are counted from the first that one does.
        let union = seen(0).start..seen(tokens - 1).end;
        if union.is_empty() {
            return;
        }
        let seen = |r: usize| {
            let keys = seen(r / group);
            keys.start.saturating_sub(union.start)..keys.end.saturating_sub(union.start)
        };
        let first = segment.first.wrapping_add(x.cast_unsigned()).wrapping_add(union.start as u64);
        let rows = first..first + union.len() as u64;
        let k = Rows::of(&segment.rows.0, rows.clone(), dp, b.k);
        let v = Rows::of(&segment.rows.1, rows, dp, b.v);
        let (row_max, row_sum) = b.states.split_at_mut(self.tile.rows);
        let (from, until) = b.ranges.split_at_mut(MAX_WIDTH);
        let count = tokens * group;
        for first in (0..count).step_by(width) {
            let mut of_vectors: [Seen; MAX_MR] = Default::default();
            for (of_vector, r) in of_vectors.iter_mut().zip((first..count.min(first + width)).step_by(V::LANES)) {
                let last = count.min(r + V::LANES) - 1;
                *of_vector = Seen::new(seen(r), seen(last));
                if of_vector.is_mixed() {
                    for lane in 0..V::LANES {
                        let keys = seen(last.min(r + lane));
                        (from[r - first + lane], until[r - first + lane]) = (keys.start as f32, keys.end as f32);
                    }
                }
            }
            V::run(PanelOverTile {
                q: &b.q[first * dp..][..width * dp],
                k,
                v,
                d,
                unit: self.unit,
                seen: of_vectors,
                ranges: [&*from, &*until],
                s: &mut *b.s,
                acc: &mut b.acc[first * dp..][..width * dp],
                row_max: &mut row_max[first..][..width],
                row_sum: &mut row_sum[first..][..width],
            });
        }
    }
}

/// The part of `keys` in the tile that begins at `x`, as keys of the tile.
#[inline(always)]
fn clip(keys: Range<i64>, x: i64) -> Range<usize> {
    let in_tile = |key: i64| (key - x).clamp(0, BLOCK_N as i64) as usize;
    in_tile(keys.start)..in_tile(keys.end)
}
