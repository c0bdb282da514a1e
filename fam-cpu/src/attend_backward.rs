//! Gradients of `attend` (contract section 8); the formulas stand at [`AttendBackward`].
//!
//! A task is one stream and one kv head: all rows that see its keys, so that no other task adds to their gradients, in an order that depends on
//! the stream alone. It walks the keys of each tile of rows as the forward pass does, and makes the logits again from q, k and lse; no
//! matrix of scores leaves L1. In the order of a panel of rows over a tile of keys:
//!
//! ```text
//! Pᵀ  = exp(K·Qᵀ·scale − lse)        dSᵀ = Pᵀ ∘ (V·dOᵀ − δ), δ = d_o·o − d_lse        a lane is a row
//! dQᵀ += Kᵀ·dSᵀ                                                                       a lane is a row
//! dV  += Pᵀ·dO                       dK  += dSᵀ·Q                                     a lane is a channel
//! ```

mod keys;
mod panel;

use crate::convert::widen_here;
use crate::infini_backward::{count_in, dot, per_stream, sum_streams};
use crate::memory::{Cache, Input};
use crate::pack::{self, Form, Rows};
use crate::parallel::output::{Output, Owner};
use crate::parallel::{Grid, Par, Phase, Task, run_phase, shared};
use crate::product::{Factor, Pair};
use crate::span::SpanSource;
use crate::tile::{BLOCK_N, MAX_WIDTH, Tile, carve};
use crate::vector::{Body, Vector};
use crate::walk::{KeyTile, Piece, Places, Walk};
use crate::{CpuPlan, Isa};
use bytemuck::{cast_slice, cast_slice_mut};
use fam_core::{AttendBackward, KeyGradients, Keys, Op, Plan, Result, RowsBackward, Shape, View, ViewMut, mutate};
use keys::KeysBackward;
use panel::PanelBackward;
use std::marker::PhantomData;

/// Sizes of a worker's buffers, in the order of [`Buffers`].
pub(crate) fn scratch(tile: Tile) -> [usize; 13] {
    let Tile { rows, dp, .. } = tile;
    let (of_rows, of_keys, logits) = (rows * dp, BLOCK_N * dp, BLOCK_N * rows);
    [
        of_rows,
        of_rows,
        of_rows,
        of_rows,
        of_rows,
        of_keys,
        of_keys,
        of_keys,
        BLOCK_N * MAX_WIDTH,
        2 * logits,
        pack::stage(dp),
        2 * rows,
        2 * MAX_WIDTH,
    ]
}

/// A worker's buffers; for the forms of panels and tiles see [`pack`].
struct Buffers<'s> {
    /// Panels of q, with the sign of the scale, of d_o, and of the gradient of q over the scale.
    q: &'s mut [f32],
    d_o: &'s mut [f32],
    d_q: &'s mut [f32],
    /// Rows of q and of d_o in factors of rows.
    q_rows: &'s mut [f32],
    d_o_rows: &'s mut [f32],
    /// A tile of keys and of values.
    k: &'s mut [f32],
    v: &'s mut [f32],
    /// The keys in factors of keys.
    k_of_keys: &'s mut [f32],
    /// dS of a panel over the tile in factors of keys: `[BLOCK_N / TERMS][W]`.
    s: &'s mut [f32],
    /// P and dS of all rows over the tile in factors of rows: `[BLOCK_N][rows]` terms each.
    p: &'s mut [f32],
    /// For transposing.
    stage: &'s mut [f32],
    /// −lse of all rows, then their δ.
    states: &'s mut [f32],
    /// What the rows of a panel see, if not all the same.
    ranges: &'s mut [f32],
}

/// [`fam_core::Backend::attend_backward`].
pub(crate) fn attend_backward(plan: &CpuPlan, par: &Par<'_>, args: AttendBackward<'_, [u8]>, scratch: &mut [u8]) -> Result<()> {
    args.validate(plan, scratch)?;
    let spec = plan.spec();
    let shape = spec.shape();
    let keys = Keys::Strided { k: args.k, v: args.v };
    let spans = SpanSource::new(args.spans, spec, Some(&keys), args.mem.is_some());
    let (parts, scratch) = shared(scratch, plan.shared);
    let layout = per_stream(spans.batch(), shape);
    let owner = Owner::Stream { heads: shape.group() };
    let kernel = Kernel {
        shape,
        tile: plan.tile,
        rows: args.rows.map(|rows| RowGroup::new(rows, owner)),
        mem_rows: args.mem_rows.map(|rows| RowGroup::new(rows, owner)),
        keys: Cache::tokens(&keys, spec)?,
        mem: args.mem.as_ref().map(|m| Cache::memory(&m.k, &m.v)),
        sink: args.sink.as_ref().map(Input::new),
        d_keys: args.d_keys.map(KeyOutputs::new),
        d_mem: args.d_mem.map(KeyOutputs::new),
        d_sink: Output::new(ViewMut::new(&mut *parts, layout), owner),
    };
    let in_pairs = plan.isa.kernel(Op::AttendBackward, shape.dtype()) == Isa::Avx512Bf16;
    let grid = Grid {
        streams: spans.batch(),
        groups: shape.kv_heads(),
        tiles: 1,
        spans: Some(spans),
        writes_slots: Some(|s| s.len > 0),
    };
    run_phase(par, Phase { number: 0, of: 2 }, &grid, scratch, plan.share, &|task, scratch| match in_pairs {
        true => Pair::run(plan.isa, StreamOfRows { kernel: &kernel, task, scratch, factors: PhantomData::<Pair> }),
        false => plan.isa.run(StreamOfRows { kernel: &kernel, task, scratch, factors: PhantomData::<f32> }),
    })?;
    sum_streams(par, scratch, shape, View::new(parts, layout), args.d_sink)
}

/// What all tasks share.
struct Kernel<'a> {
    shape: &'a Shape,
    tile: Tile,
    rows: Option<RowGroup<'a>>,
    mem_rows: Option<RowGroup<'a>>,
    keys: Cache<'a>,
    mem: Option<Cache<'a>>,
    sink: Option<Input<'a>>,
    d_keys: Option<KeyOutputs<'a>>,
    d_mem: Option<KeyOutputs<'a>>,
    /// The stream's part.
    d_sink: Output<'a>,
}

/// Block rows or memory rows.
struct RowGroup<'a> {
    q: Input<'a>,
    o: Input<'a>,
    lse: Input<'a>,
    d_o: Input<'a>,
    d_lse: Option<Input<'a>>,
    d_q: Output<'a>,
}

impl<'a> RowGroup<'a> {
    fn new(rows: RowsBackward<'a, [u8]>, owner: Owner) -> Self {
        RowGroup {
            q: Input::new(&rows.q),
            o: Input::new(&rows.o),
            lse: Input::new(&rows.lse),
            d_o: Input::new(&rows.d_o),
            d_lse: rows.d_lse.as_ref().map(Input::new),
            d_q: Output::new(rows.d_q, owner),
        }
    }

    /// Asks for the inputs of a row.
    fn prefetch<V: Vector>(&self, at: [usize; 4]) {
        [self.q, self.o, self.d_o].iter().for_each(|input| input.row(at).prefetch::<V>());
    }
}

/// Rows whose inputs are on their way: together as many cache lines as a core waits for.
const AHEAD: usize = 8;

/// δ of rows.
struct Deltas<'a, 's> {
    rows: &'a RowGroup<'a>,
    places: Places,
    delta: &'s mut [f32],
    /// o and d_o of a row.
    wide: [&'s mut [f32]; 2],
}

impl Body for Deltas<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector, const MR: usize, const NR: usize>(self) {
        let Deltas { rows, places, delta, wide: [o, d_o] } = self;
        let mut ahead = places.clone().take(delta.len());
        (&mut ahead).take(AHEAD).for_each(|at| rows.prefetch::<V>(at));
        for (delta, at) in delta.iter_mut().zip(places) {
            if let Some(at) = ahead.next() {
                rows.prefetch::<V>(at);
            }
            widen_here::<V>(rows.o.row(at), o);
            widen_here::<V>(rows.d_o.row(at), d_o);
            let d_lse = rows.d_lse.as_ref().map_or(0.0, |d_lse| d_lse.f32(at)[0]);
            *delta = mutate!("backward-delta", dot(d_o, o), 0.0) - mutate!("backward-d-lse", d_lse, 0.0);
        }
    }
}

/// Gradients of cached keys and values, which the task that owns the slot adds to.
struct KeyOutputs<'a> {
    d_k: Output<'a>,
    d_v: Output<'a>,
}

impl<'a> KeyOutputs<'a> {
    fn new(gradients: KeyGradients<'a, [u8]>) -> Self {
        KeyOutputs { d_k: Output::new(gradients.d_k, Owner::Slot), d_v: Output::new(gradients.d_v, Owner::Slot) }
    }
}

/// A task on its worker.
struct StreamOfRows<'a, 's, F> {
    kernel: &'a Kernel<'a>,
    task: &'s mut Task,
    scratch: &'s mut [f32],
    factors: PhantomData<F>,
}

impl<F: Form> Body for StreamOfRows<'_, '_, F> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector, const MR: usize, const NR: usize>(self) {
        let StreamOfRows { kernel, task, scratch, .. } = self;
        let (shape, tile) = (kernel.shape, kernel.tile);
        let [q, d_o, d_q, q_rows, d_o_rows, k, v, k_of_keys, s, p, stage, states, ranges] = carve(scratch, self::scratch(tile));
        let mut b = Buffers { q, d_o, d_q, q_rows, d_o_rows, k, v, k_of_keys, s, p, stage, states, ranges };
        let (span, group) = (task.span(), shape.group());
        for head in task.group() * group..(task.group() + 1) * group {
            kernel.d_sink.row::<f32>(task, [task.n(), 0, 0, head]).fill(0.0);
        }
        for i in 0..span.blocks(shape.block_len()) {
            let in_block = Piece::tokens_of_block(shape, &span, i);
            for (rows, is_memory, of_block) in [(&kernel.rows, false, in_block), (&kernel.mem_rows, true, 0..shape.mem_len())] {
                let Some(rows) = rows else { continue };
                for first in of_block.clone().step_by(tile.tokens) {
                    let tile = first..of_block.end.min(first + tile.tokens);
                    kernel.piece::<V, F>(task, &Piece::new(shape, span, i, tile, is_memory), rows, &mut b);
                }
            }
        }
    }
}

impl Kernel<'_> {
    #[inline(always)]
    fn piece<V: Vector, F: Form>(&self, task: &mut Task, piece: &Piece, rows: &RowGroup<'_>, b: &mut Buffers<'_>) {
        let (shape, dp, width) = (self.shape, self.tile.dp, V::MR * V::LANES);
        let (n, kv_head, group) = (task.n(), task.group(), shape.group());
        let count = piece.tokens * group;
        let places = |r: usize| piece.places(shape, [n, kv_head], r);
        let mut tiles = Walk::new(shape, &self.keys, self.mem.as_ref(), piece, kv_head).peekable();
        if let Some(first) = tiles.peek() {
            first.prefetch::<V>();
        }

        // 1. Rows, and δ of each.
        let (less, delta) = b.states.split_at_mut(self.tile.rows);
        // Absent rows of a panel weigh nothing.
        less.fill(f32::NEG_INFINITY);
        delta.fill(0.0);
        let (o, d_o) = b.stage[..2 * dp].split_at_mut(dp);
        V::run(Deltas { rows, places: places(0), delta: &mut delta[..count], wide: [o, d_o] });
        for (r, at) in (0..count).zip(places(0)) {
            // A row without keys, or with none of any weight, passes nothing on.
            let saved = rows.lse.f32(at)[0];
            if saved > f32::NEG_INFINITY || saved.is_nan() {
                less[r] = -saved;
                if let Some(sink) = &self.sink {
                    let of_sink = (sink.f32([0, 0, 0, at[3]])[0] - saved).exp();
                    count_in(self.d_sink.row(task, [n, 0, 0, at[3]]), -of_sink * delta[r]);
                }
            }
        }
        let panels = b.q.chunks_exact_mut(dp * width).zip(b.d_o.chunks_exact_mut(dp * width));
        for ((q, d_o), first) in panels.zip((0..count).step_by(width)) {
            let count = width.min(count - first);
            pack::panel::<V, F>(places(first).map(|at| rows.q.row(at)), count, 1.0, q);
            pack::panel::<V, F>(places(first).map(|at| rows.d_o.row(at)), count, 1.0, d_o);
        }
        pack::rows::<V, F>(&rows.q, places(0), count, dp, b.q_rows);
        pack::rows::<V, F>(&rows.d_o, places(0), count, dp, b.d_o_rows);
        b.d_q[..count.next_multiple_of(width) * dp].fill(0.0);

        // 2. All keys.
        while let Some(tile) = tiles.next() {
            if let Some(next) = tiles.peek() {
                next.prefetch::<V>();
            }
            self.tile::<V, F>(task, piece, &tile, b);
        }

        // 3. What is left of the rows.
        let scale = mutate!("backward-scale-q", shape.scale(), 1.0);
        for first in (0..count).step_by(width) {
            let panel = &mut b.d_q[first * dp..][..width * dp];
            panel.iter_mut().for_each(|x| *x *= scale);
            rows.d_q.write_panel::<V>(task, panel, width.min(count - first), b.stage, places(first));
        }
    }

    /// A tile of keys, for all rows.
    #[inline(always)]
    fn tile<V: Vector, F: Form>(&self, task: &mut Task, piece: &Piece, tile: &KeyTile<'_>, b: &mut Buffers<'_>) {
        let (d, dp, width) = (self.shape.head_dim(), self.tile.dp, V::MR * V::LANES);
        let count = piece.tokens * self.shape.group();
        let (k_rows, v_rows) = &tile.rows;
        let (size, stride) = ((tile.range.end - tile.range.start) as usize, self.tile.rows / F::TERMS);
        let k = Rows::<F>::of::<V>(k_rows, tile.range.clone(), dp, b.k);
        let v = Rows::<F>::of::<V>(v_rows, tile.range.clone(), dp, b.v);
        let k_of_keys = if F::TERMS == 1 { k } else { F::values::<V>(k_rows, tile.range.clone(), 0, dp, b.k_of_keys) };
        let is_finite = !tile.is_whole && k_of_keys.are_finite::<V>(size.div_ceil(F::TERMS), d);
        let (less, delta) = b.states.split_at(self.tile.rows);
        let (p, d_s) = cast_slice_mut::<_, F>(b.p).split_at_mut(BLOCK_N * stride);
        for first in (0..count).step_by(width) {
            let seen = tile.seen(first..count.min(first + width), V::LANES, 0, b.ranges);
            let panel = first * dp..(first + width) * dp;
            V::run(PanelBackward {
                q: cast_slice(&b.q[panel.clone()]),
                d_o: cast_slice(&b.d_o[panel.clone()]),
                k,
                v,
                k_of_keys,
                is_finite,
                d,
                scale: self.shape.scale(),
                less: &less[first..][..width],
                delta: &delta[first..][..width],
                seen: &seen,
                ranges: b.ranges.split_at(MAX_WIDTH).into(),
                s: &mut *b.s,
                p: &mut p[first / F::TERMS..],
                d_s: &mut d_s[first / F::TERMS..],
                stride,
                keys: size,
                d_q: &mut b.d_q[panel],
            });
        }
        let to = if tile.is_memory { &self.d_mem } else { &self.d_keys };
        let to = mutate!("backward-mem-from-rows", to.as_ref(), to.as_ref().filter(|_| !tile.is_memory || !piece.is_memory));
        let Some(to) = to.filter(|_| task.owns_slot()) else { return };
        let (d_o, q) = (cast_slice(b.d_o_rows), cast_slice(b.q_rows));
        let scale = mutate!("backward-scale-k", self.shape.scale(), 1.0);
        V::run(KeysBackward { p, d_s, stride, d_o, q, dp, scale, tile, to, task });
    }
}
