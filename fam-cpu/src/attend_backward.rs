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

use crate::CpuPlan;
use crate::convert::widen;
use crate::infini_backward::{count_in, dot, per_stream, sum_streams};
use crate::memory::{Cache, Elements, Input};
use crate::pack::{self, Rows};
use crate::parallel::output::{Output, Owner};
use crate::parallel::{Grid, Par, Phase, Task, run_phase, shared};
use crate::span::SpanSource;
use crate::tile::{BLOCK_N, MAX_WIDTH, Tile, carve};
use crate::vector::{Body, Vector};
use crate::walk::{KeyTile, Piece, Visit, walk};
use fam_core::{AttendBackward, KeyGradients, Keys, Plan, Result, RowsBackward, Shape, View, ViewMut, mutate};
use keys::KeysBackward;
use panel::PanelBackward;

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
        of_keys,
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
    /// Rows of q and of d_o.
    q_rows: &'s mut [f32],
    d_o_rows: &'s mut [f32],
    /// A tile of keys and of values, and what the rows add to their gradients.
    k: &'s mut [f32],
    v: &'s mut [f32],
    d_k: &'s mut [f32],
    d_v: &'s mut [f32],
    /// P and dS of all rows over the tile: `[BLOCK_N][rows]` each.
    p: &'s mut [f32],
    /// For transposing.
    stage: &'s mut [f32],
    /// lse of all rows, then their δ.
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
    let grid = Grid {
        streams: spans.batch(),
        groups: shape.kv_heads(),
        tiles: 1,
        spans: Some(spans),
        writes_slots: Some(|s| s.len > 0),
    };
    run_phase(par, Phase { number: 0, of: 2 }, &grid, scratch, plan.share, &|task, scratch| {
        plan.isa.run(StreamOfRows { kernel: &kernel, task, scratch });
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
struct StreamOfRows<'a, 's> {
    kernel: &'a Kernel<'a>,
    task: &'s mut Task,
    scratch: &'s mut [f32],
}

impl Body for StreamOfRows<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector, const MR: usize, const NR: usize>(self) {
        let StreamOfRows { kernel, task, scratch } = self;
        let (shape, tile) = (kernel.shape, kernel.tile);
        let [q, d_o, d_q, q_rows, d_o_rows, k, v, d_k, d_v, p, stage, states, ranges] = carve(scratch, self::scratch(tile));
        let mut b = Buffers { q, d_o, d_q, q_rows, d_o_rows, k, v, d_k, d_v, p, stage, states, ranges };
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
                    kernel.piece::<V>(task, &Piece::new(shape, span, i, tile, is_memory), rows, &mut b);
                }
            }
        }
    }
}

impl Kernel<'_> {
    #[inline(always)]
    fn piece<V: Vector>(&self, task: &mut Task, piece: &Piece, rows: &RowGroup<'_>, b: &mut Buffers<'_>) {
        let (shape, dp, width) = (self.shape, self.tile.dp, V::MR * V::LANES);
        let (n, kv_head, group, d) = (task.n(), task.group(), shape.group(), shape.head_dim());
        let count = piece.tokens * group;
        let places = |r: usize| piece.places(shape, [n, kv_head], r);

        // 1. Rows, and δ of each.
        let (lse, delta) = b.states.split_at_mut(self.tile.rows);
        // Absent rows of a panel weigh nothing.
        lse.fill(f32::INFINITY);
        delta.fill(0.0);
        for (r, at) in (0..count).zip(places(0)) {
            let row = r * dp..(r + 1) * dp;
            // o is not needed after this: its place is that of q.
            let (o, d_o) = (&mut b.q_rows[row.clone()], &mut b.d_o_rows[row]);
            widen::<V>(rows.o.row(at), o);
            widen::<V>(rows.d_o.row(at), d_o);
            let d_lse = rows.d_lse.as_ref().map_or(0.0, |d_lse| d_lse.f32(at)[0]);
            delta[r] = mutate!("backward-delta", dot(d_o, o), 0.0) - mutate!("backward-d-lse", d_lse, 0.0);
            widen::<V>(rows.q.row(at), o);
            // A row without keys, or with none of any weight, passes nothing on.
            let saved = rows.lse.f32(at)[0];
            if saved > f32::NEG_INFINITY || saved.is_nan() {
                lse[r] = saved;
                if let Some(sink) = &self.sink {
                    let of_sink = (sink.f32([0, 0, 0, at[3]])[0] - saved).exp();
                    count_in(self.d_sink.row(task, [n, 0, 0, at[3]]), -of_sink * delta[r]);
                }
            }
        }
        let panels = b.q.chunks_exact_mut(dp * width).zip(b.d_o.chunks_exact_mut(dp * width));
        for ((q, d_o), first) in panels.zip((0..count).step_by(width)) {
            let count = width.min(count - first);
            let row = |r: usize| (first + r) * dp..(first + r) * dp + d;
            pack::panel::<V, f32>((0..count).map(|r| Elements::F32(&b.q_rows[row(r)])), count, 1.0, q);
            pack::panel::<V, f32>((0..count).map(|r| Elements::F32(&b.d_o_rows[row(r)])), count, 1.0, d_o);
        }
        b.d_q[..count.next_multiple_of(width) * dp].fill(0.0);

        // 2. All keys.
        walk::<V>(shape, &self.keys, self.mem.as_ref(), piece, kv_head, &mut Tiles { kernel: self, task, piece, b });

        // 3. What is left of the rows.
        let scale = mutate!("backward-scale-q", shape.scale(), 1.0);
        for first in (0..count).step_by(width) {
            let panel = &mut b.d_q[first * dp..][..width * dp];
            panel.iter_mut().for_each(|x| *x *= scale);
            rows.d_q.write_panel::<V>(task, panel, width.min(count - first), b.stage, places(first));
        }
    }
}

/// The keys of a piece.
struct Tiles<'a, 'b, 's> {
    kernel: &'a Kernel<'a>,
    task: &'b mut Task,
    piece: &'b Piece,
    b: &'b mut Buffers<'s>,
}

impl Visit for Tiles<'_, '_, '_> {
    /// A tile of keys, for all rows.
    #[inline(always)]
    fn tile<V: Vector>(&mut self, tile: &KeyTile<'_>) {
        let Tiles { kernel, task, piece, b } = self;
        let (d, dp, width) = (kernel.shape.head_dim(), kernel.tile.dp, V::MR * V::LANES);
        let count = piece.tokens * kernel.shape.group();
        let (k_rows, v_rows) = &tile.rows;
        let (size, stride) = ((tile.range.end - tile.range.start) as usize, kernel.tile.rows);
        let (k, v) = (Rows::of::<V>(k_rows, tile.range.clone(), dp, b.k), Rows::of::<V>(v_rows, tile.range.clone(), dp, b.v));
        let (d_k, d_v) = (&mut b.d_k[..size * dp], &mut b.d_v[..size * dp]);
        d_k.fill(0.0);
        d_v.fill(0.0);
        let (lse, delta) = b.states.split_at(stride);
        let (p, d_s) = b.p.split_at_mut(BLOCK_N * stride);
        for first in (0..count).step_by(width) {
            let seen = tile.seen::<V>(first..count.min(first + width), 0, b.ranges);
            let panel = first * dp..(first + width) * dp;
            V::run(PanelBackward {
                q: &b.q[panel.clone()],
                d_o: &b.d_o[panel.clone()],
                k,
                v,
                d,
                scale: kernel.shape.scale(),
                lse: &lse[first..][..width],
                delta: &delta[first..][..width],
                seen: &seen,
                ranges: b.ranges.split_at(MAX_WIDTH).into(),
                p: &mut p[first..],
                d_s: &mut d_s[first..],
                stride,
                keys: size,
                d_q: &mut b.d_q[panel],
            });
        }
        let (q, d_o) = (&b.q_rows[..count * dp], &b.d_o_rows[..count * dp]);
        V::run(KeysBackward { p, d_s, stride, d_o, q, dp, tile, d_v: &mut *d_v, d_k: &mut *d_k });
        let to = if tile.is_memory { &kernel.d_mem } else { &kernel.d_keys };
        let to = mutate!("backward-mem-from-rows", to.as_ref(), to.as_ref().filter(|_| !tile.is_memory || !piece.is_memory));
        let Some(to) = to.filter(|_| task.owns_slot()) else { return };
        let scale = mutate!("backward-scale-k", kernel.shape.scale(), 1.0);
        for ((index, d_k), d_v) in tile.range.clone().zip(d_k.chunks_exact(dp)).zip(d_v.chunks_exact(dp)) {
            let at = [tile.at[0], tile.at[1], index as usize, tile.at[2]];
            let (to_k, to_v) = (&to.d_k, &to.d_v);
            to_k.row::<f32>(task, at).iter_mut().zip(d_k).for_each(|(to, x)| *to += scale * x);
            to_v.row::<f32>(task, at).iter_mut().zip(d_v).for_each(|(to, x)| *to += x);
        }
    }
}
