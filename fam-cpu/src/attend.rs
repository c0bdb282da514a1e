//! One joint softmax over window, memory and current block (TransformerFAM, Alg. 1 and 2; contract section 2).
//!
//! ```text
//! p_ij ∝ exp(scale · q_i·k_j) over the visible j        o_i = Σ p_ij v_j        lse_i = ln Σ exp(scale · q_i·k_j)
//! ```
//!
//! A task is one stream, one kv head and one tile of rows: up to `BLOCK_M` rows of block rows (`q`) or of memory rows (`mem_q`), the query
//! heads of a group folded into rows, so that they share keys. A tile is worked off in pieces that lie in one block, since a block's rows
//! share its window and its memory; [`crate::walk`] has their keys in order. Of each tile of keys a row sees a range; what lies outside
//! weighs exactly 0 and its values are not touched, so NaN there stays where it is seen.
//!
//! Where a block has few rows in the call, they take another way through their keys ([`decode`]).

mod decode;
mod panel;
mod rows;

use crate::infini_read::State;
use crate::memory::{Cache, Input};
use crate::pack::{self, Form, Rows};
use crate::parallel::output::{Output, Owner};
use crate::parallel::{Grid, Par, Phase, Task, run_phase, shared};
use crate::product::{Factor, Pair};
use crate::softmax::Softmax;
use crate::span::SpanSource;
use crate::tile::{BLOCK_N, MAX_SPLITS, MAX_WIDTH, Tile, carve, splits_of_task};
use crate::vector::{Body, Vector};
use crate::walk::{KeyTile, Piece, Walk};
use crate::{CpuPlan, Isa};
use bytemuck::cast_slice;
pub(crate) use decode::scratch as scratch_of_few;
use decode::{FewRows, JoinSplits};
use fam_core::{Attend, Op, Plan, Result, Shape, View, ViewMut, mutate};
use panel::PanelOverTile;
use std::marker::PhantomData;

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
    let spec = plan.spec();
    let shape = spec.shape();
    let spans = SpanSource::new(args.spans, spec, Some(&args.keys), args.mem.is_some());
    let heads = spans.batch() * shape.kv_heads();
    let tile = Tile::for_threads(shape, &spans, plan.threads);
    let (keys, mem) = (Cache::tokens(&args.keys, spec)?, args.mem.as_ref().map(|m| Cache::memory(&m.k, &m.v)));
    let splits = splits_of_task(heads, plan.threads);
    // Tasks of a head that has more splits than one takes.
    let parts = match &args.rows {
        Some(_) if splits < MAX_SPLITS => decode::splits_end(shape, &spans, mem.as_ref()).div_ceil(splits).max(1),
        _ => 1,
    };
    let row_tiles = args.rows.as_ref().map_or(0, |_| spans.max_rows().div_ceil(tile.tokens).max(parts));
    let mem_tiles = args.mem_rows.as_ref().map_or(0, |_| shape.mem_len().div_ceil(tile.tokens));
    let mem_blocks = args.mem_rows.as_ref().map_or(0, |_| spans.max_blocks());
    let scale = mutate!("attend-scale", shape.scale(), shape.scale() * 0.5);
    let owner = |tiles, first| Owner::Tile { heads: shape.group(), rows: tile.tokens, tiles, first };
    let kernel = Kernel {
        shape,
        tile,
        rows: args.rows.map(|r| RowGroup::new(r, owner(row_tiles, 0))),
        mem_rows: args.mem_rows.map(|r| RowGroup::new(r, owner(mem_tiles, row_tiles))),
        row_tiles,
        mem_tiles,
        splits,
        keys,
        mem,
        sink: args.sink.as_ref().map(Input::new),
        infini: args.infini.as_ref().map(State::new),
        o_local: args.o_local.map(|view| Output::new(view, owner(row_tiles, 0))),
        sign: if scale == 0.0 { 0.0 } else { scale.signum() },
        unit: if scale == 0.0 { 1.0 } else { scale.abs() },
    };
    let tiles = row_tiles + mem_blocks * mem_tiles;
    let grid = Grid { streams: spans.batch(), groups: shape.kv_heads(), tiles, spans: Some(spans), writes_slots: None };
    let (bytes, scratch) = shared(scratch, plan.shared);
    let layout = decode::partials(spec, spans.batch());
    let partials = (parts > 1).then(|| Output::new(ViewMut::new(&mut *bytes, layout), decode::owner(spec, splits, parts)));
    let in_pairs = plan.isa.kernel(Op::Attend, shape.dtype()) == Isa::Avx512Bf16;
    run_phase(par, Phase { number: 0, of: 2 }, &grid, scratch, plan.share, &|task, scratch| {
        let Some((rows, pieces)) = kernel.pieces(task) else { return };
        for piece in pieces {
            let (kernel, scratch) = (&kernel, &mut *scratch);
            if piece.is_few(shape) {
                plan.isa.run(FewRows { kernel, rows, piece, partials: partials.as_ref(), task, scratch });
            } else if in_pairs {
                Pair::run(plan.isa, PieceOfRows { kernel, rows, piece, task, scratch, factors: PhantomData::<Pair> });
            } else {
                plan.isa.run(PieceOfRows { kernel, rows, piece, task, scratch, factors: PhantomData::<f32> });
            }
        }
    })?;
    if parts == 1 {
        return Ok(());
    }
    let partials = Input::new(&View::new(&*bytes, layout));
    let grid = Grid { tiles: 1, ..grid };
    run_phase(par, Phase { number: 1, of: 2 }, &grid, scratch, plan.share, &|task, scratch| {
        plan.isa.run(JoinSplits { kernel: &kernel, partials, task, scratch });
    })
}

/// What all tasks share.
struct Kernel<'a> {
    shape: &'a Shape,
    tile: Tile,
    rows: Option<RowGroup<'a>>,
    mem_rows: Option<RowGroup<'a>>,
    /// Tiles of block rows; then come `mem_tiles` of each block's memory rows.
    row_tiles: usize,
    mem_tiles: usize,
    /// Splits of few block rows' keys that a task takes: tile i of such a stream is the i-th of these.
    splits: usize,
    keys: Cache<'a>,
    mem: Option<Cache<'a>>,
    sink: Option<Input<'a>>,
    infini: Option<State<'a>>,
    /// The block rows' output before the gate.
    o_local: Option<Output<'a>>,
    /// The scale is `sign` · `unit`. The sign goes into q, where it costs nothing and is exact, so that the largest product is the largest
    /// logit; the rest is applied to the difference of two products. Of a scale of 0 the sign is 0.
    sign: f32,
    unit: f32,
}

/// Block rows or memory rows.
struct RowGroup<'a> {
    q: Input<'a>,
    o: Output<'a>,
    lse: Option<Output<'a>>,
}

impl<'a> RowGroup<'a> {
    fn new(rows: fam_core::Rows<'a, [u8]>, owner: Owner) -> Self {
        let lse = rows.lse.map(|view| Output::new(view, owner));
        RowGroup { q: Input::new(&rows.q), o: Output::new(rows.o, owner), lse }
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

impl<'s> Buffers<'s> {
    fn new(kernel: &Kernel<'_>, scratch: &'s mut [f32]) -> Self {
        let [q, acc, k, v, s, stage, states, ranges, sigma_q, read, m] = carve(scratch, self::scratch(kernel.shape, kernel.tile));
        Buffers { q, acc, k, v, s, stage, states, ranges, sigma_q, read, m }
    }
}

impl<'a> Kernel<'a> {
    /// The rows of a task, tokens of its stream or memory rows of a block, cut at block boundaries.
    fn pieces(&'a self, task: &Task) -> Option<(&'a RowGroup<'a>, impl Iterator<Item = Piece> + use<'a>)> {
        let (shape, span, tokens) = (self.shape, task.span(), self.tile.tokens);
        let (rows, tokens, memory) = match task.tile().checked_sub(self.row_tiles) {
            // A tile of few tokens is some of their splits.
            None if Tile::is_few(shape, span.len as usize) => (&self.rows, 0..span.len as usize, None),
            None => (&self.rows, task.tile() * tokens..(span.len as usize).min((task.tile() + 1) * tokens), None),
            Some(mem_tile) => {
                let (i, first) = (mem_tile / self.mem_tiles, mem_tile % self.mem_tiles * tokens);
                let piece = || Piece::new(shape, span, i, first..shape.mem_len().min(first + tokens), true);
                (&self.mem_rows, 0..0, (i < span.blocks(shape.block_len())).then(piece))
            }
        };
        Some((rows.as_ref()?, Piece::of_rows(shape, span, tokens).chain(memory)))
    }
}

/// Rows of a block that are not few.
struct PieceOfRows<'a, 's, F> {
    kernel: &'a Kernel<'a>,
    rows: &'a RowGroup<'a>,
    piece: Piece,
    task: &'s mut Task,
    scratch: &'s mut [f32],
    factors: PhantomData<F>,
}

impl<F: Form> Body for PieceOfRows<'_, '_, F> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector, const MR: usize, const NR: usize>(self) {
        let PieceOfRows { kernel, rows, piece, task, scratch, .. } = self;
        kernel.piece::<V, F>(task, &piece, rows, &mut Buffers::new(kernel, scratch));
    }
}

impl Kernel<'_> {
    #[inline(always)]
    fn piece<V: Vector, F: Form>(&self, task: &mut Task, piece: &Piece, rows: &RowGroup<'_>, b: &mut Buffers<'_>) {
        let (shape, dp, width) = (self.shape, self.tile.dp, V::MR * V::LANES);
        let (n, kv_head, group) = (task.n(), task.group(), shape.group());
        let (count, size) = (piece.tokens * group, dp * width);
        let places = |r: usize| piece.places(shape, [n, kv_head], r);
        for (q, first) in b.q.chunks_exact_mut(size).zip((0..count).step_by(width)) {
            pack::panel::<V, F>(places(first).map(|at| rows.q.row(at)), width.min(count - first), self.sign, q);
        }
        let (row_max, row_sum) = b.states.split_at_mut(self.tile.rows);
        let fresh = mutate!("attend-stale-row", self.tile.rows, 1);
        row_max[..fresh].fill(f32::NEG_INFINITY);
        row_sum[..fresh].fill(0.0);
        b.acc[..count.next_multiple_of(width) * dp].fill(0.0);

        for tile in Walk::new(shape, &self.keys, self.mem.as_ref(), piece, kv_head) {
            self.tile::<V, F>(&tile, count, b);
        }

        for first in (0..count).step_by(width) {
            let count = width.min(count - first);
            let acc = &mut b.acc[first * dp..][..size];
            let weights = &mut b.ranges[..width];
            for (r, at) in (0..count).zip(places(first)) {
                let (row_max, row_sum) = (b.states[first + r], b.states[self.tile.rows + first + r]);
                let weight = self.weigh(task, rows, at, Softmax { row_max, row_sum });
                if weight.is_none() {
                    acc.iter_mut().skip(r).step_by(width).for_each(|o| *o = 0.0);
                }
                weights[r] = weight.unwrap_or(0.0);
            }
            for lanes in (0..width).step_by(V::LANES) {
                let weight = V::load(&weights[lanes..]);
                for at in (lanes..size).step_by(width) {
                    // Beside a key that the row does not see a pair adds 0: which zero, must not show.
                    V::load(&acc[at..]).mul_add(weight, V::splat(0.0)).store(&mut acc[at..]);
                }
            }
            if let (Some(o_local), false) = (&self.o_local, piece.is_memory) {
                o_local.write_panel::<V>(task, acc, count, b.stage, places(first));
            }
            if let (Some(state), false) = (&self.infini, piece.is_memory) {
                let row = |at| mutate!("infini-rotated-query", state.q.row(at), rows.q.row(at));
                let heads = kv_head * group..(kv_head + 1) * group;
                let buffers = [&mut *b.sigma_q, &mut *b.read, &mut *b.m, &mut *b.ranges];
                state.gate_panel::<V>(&piece.span, piece.i, heads, first..first + count, places(first).map(row), buffers, acc);
            }
            rows.o.write_panel::<V>(task, acc, count, b.stage, places(first));
        }
    }

    /// A tile of keys, for all `count` rows.
    #[inline(always)]
    fn tile<V: Vector, F: Form>(&self, tile: &KeyTile<'_>, count: usize, b: &mut Buffers<'_>) {
        let (d, dp, width) = (self.shape.head_dim(), self.tile.dp, V::MR * V::LANES);
        let lead = tile.lead(F::TERMS);
        let k = Rows::<F>::of::<V>(&tile.rows.0, tile.range.clone(), dp, b.k);
        let v = F::values::<V>(&tile.rows.1, tile.range.clone(), lead, dp, b.v);
        let keys = lead..lead + (tile.range.end - tile.range.start) as usize;
        let is_finite = !tile.is_whole && v.are_finite::<V>(keys.end.div_ceil(F::TERMS), d);
        let (row_max, row_sum) = b.states.split_at_mut(self.tile.rows);
        for first in (0..count).step_by(width) {
            let seen = tile.seen(first..count.min(first + width), V::LANES, lead, b.ranges);
            V::run(PanelOverTile {
                q: cast_slice(&b.q[first * dp..][..width * dp]),
                k,
                v,
                d,
                is_finite,
                keys: keys.clone(),
                unit: self.unit,
                seen,
                ranges: b.ranges.split_at(MAX_WIDTH).into(),
                s: &mut *b.s,
                acc: &mut b.acc[first * dp..][..width * dp],
                row_max: &mut row_max[first..][..width],
                row_sum: &mut row_sum[first..][..width],
            });
        }
    }

    /// Ends a row, whose maximum is in units: writes its lse. Returns what its sums are multiplied by; `None` of an empty row, whose result
    /// is 0 whatever its sums are.
    fn weigh(&self, task: &mut Task, rows: &RowGroup<'_>, at: [usize; 4], keys: Softmax) -> Option<f32> {
        let without_sink = Softmax { row_max: keys.row_max * self.unit, ..keys };
        let (mut state, mut before) = (without_sink, 1.0);
        if let Some(sink) = &self.sink {
            (state, [before, _]) = state.merge(Softmax::one(sink.f32([0, 0, 0, at[3]])[0]));
        }
        if let Some(lse) = &rows.lse {
            let value = mutate!("attend-lse-without-sink", state, without_sink).lse();
            lse.row(task, at)[0] = mutate!("attend-lse-log2", value, value * std::f32::consts::LOG2_E);
        }
        let divisor = mutate!("attend-sink-weightless", state, without_sink);
        (!divisor.is_empty()).then(|| before * divisor.weight())
    }
}
