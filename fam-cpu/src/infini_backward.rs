//! The backward passes of the compressive memory (contract section 8); the formulas stand at [`InfiniReadBackward`] and
//! [`InfiniWriteBackward`].
//!
//! Both go through tiles of `ROWS` rows, queries or keys, in which a lane is a channel: sums over rows and over channels are products of
//! [`crate::product`] whose other factor is broadcast from where it lies. A transposed copy of a state serves sums over its second axis.

mod rows;

use crate::CpuPlan;
use crate::convert::widen;
use crate::memory::{Cache, Elements, Input};
use crate::parallel::output::{Output, Owner};
use crate::parallel::{Grid, Par, Phase, Task, run, run_phase, shared};
use crate::span::SpanSource;
use crate::tile::{Tile, carve};
use crate::vector::{Body, Vector};
use fam_core::{
    InfiniReadBackward, InfiniRule, InfiniWriteBackward, Keys, Layout, Plan, Result, Shape, Span, StateGradients, View, ViewMut,
    mutate,
};
pub(crate) use rows::dot;
use rows::{Read, ReadBackward, WriteBackward, add, transpose};

/// Rows of a tile. The states are what fills the caches: at D = 128 each is 64 KiB, a tile of rows 32 KiB.
const ROWS: usize = 64;

/// Sizes of a worker's buffers: seven tiles of rows; m, its transposed copy, and two gradients of it with one such copy; z and two gradients of
/// it; a number for each row.
pub(crate) fn scratch(tile: Tile) -> [usize; 16] {
    let dp = tile.dp;
    let (rows, state) = (ROWS * dp, dp * dp);
    [rows, rows, rows, rows, rows, rows, rows, state, state, state, state, state, dp, dp, dp, ROWS]
}

/// [`fam_core::Backend::infini_read_backward`].
pub(crate) fn infini_read_backward(
    plan: &CpuPlan,
    par: &Par<'_>,
    args: InfiniReadBackward<'_, [u8]>,
    scratch: &mut [u8],
) -> Result<()> {
    args.validate(plan, scratch)?;
    let spec = plan.spec();
    let shape = spec.shape();
    let spans = SpanSource::new(args.spans, spec, None, false);
    let owner = Owner::Stream { heads: shape.group() };
    let (parts, scratch) = shared(scratch, plan.shared);
    let layout = per_stream(spans.batch(), shape);
    let kernel = ReadKernel {
        shape,
        tile: plan.tile,
        q: Input::new(&args.state.q),
        state: State { m: Input::new(&args.state.m), z: Input::new(&args.state.z) },
        beta: Input::new(&args.state.beta),
        o_local: Input::new(&args.o_local),
        d_o: Input::new(&args.d_o),
        d_q: Output::new(args.d_q, owner),
        d_o_local: Output::new(args.d_o_local, owner),
        d_state: args.d_state.map(StateOutput::new),
        d_beta: Output::new(ViewMut::new(&mut *parts, layout), owner),
    };
    let grid = Grid {
        streams: spans.batch(),
        groups: shape.kv_heads(),
        tiles: 1,
        spans: Some(spans),
        writes_slots: Some(|s| s.len > 0),
    };
    run_phase(par, Phase { number: 0, of: 2 }, &grid, scratch, plan.share, &|task, scratch| {
        plan.isa.run(ReadTask { kernel: &kernel, task, scratch });
    })?;
    sum_streams(par, scratch, shape, View::new(parts, layout), args.d_beta)
}

/// Where each stream's part of a gradient per head lies, in two numbers: `[N, Hq, 2]`, each head's in a cache line of its own, since tasks add to
/// them row by row.
pub(crate) fn per_stream(streams: usize, shape: &Shape) -> Layout {
    let heads = shape.heads();
    Layout { shape: [streams, 1, 1, heads, 2], stride: [PER_HEAD * heads, 0, 0, PER_HEAD], ..Layout::per_head(heads) }
}

/// Elements of a head's part.
pub(crate) const PER_HEAD: usize = 16;

/// Adds to a sum of two numbers, of which the second has what the first has lost: all rows of a stream add to it one by one, and a single f32
/// would stop counting.
#[inline(always)]
pub(crate) fn count_in(sum: &mut [f32], x: f32) {
    let total = f64::from(sum[0]) + f64::from(sum[1]) + f64::from(x);
    sum[0] = total as f32;
    sum[1] = (total - f64::from(sum[0])) as f32;
}

/// The second phase of an op: adds each stream's part of a gradient per head to the whole, in the order of the streams.
pub(crate) fn sum_streams(
    par: &Par<'_>,
    scratch: &mut [u8],
    shape: &Shape,
    parts: View<'_, [u8]>,
    to: Option<ViewMut<'_, [u8]>>,
) -> Result<()> {
    let parts = Input::new(&parts);
    let to = to.map(|to| Output::new(to, Owner::Stream { heads: shape.group() }));
    let groups = if to.is_some() { shape.kv_heads() } else { 0 };
    let grid = Grid { streams: 1, groups, tiles: 1, spans: None, writes_slots: None };
    run_phase(par, Phase { number: 1, of: 2 }, &grid, scratch, 0, &|task, _| {
        let Some(to) = &to else { return };
        for head in task.group() * shape.group()..(task.group() + 1) * shape.group() {
            let sum: f64 = (0..parts.layout().shape[0]).flat_map(|n| parts.f32([n, 0, 0, head])).map(|x| f64::from(*x)).sum();
            to.row::<f32>(task, [0, 0, 0, head])[0] += sum as f32;
        }
    })
}

/// Entry of a state that the call's block `i` reads.
fn entry(span: &Span, i: usize, m: &Layout) -> usize {
    ((u64::from(span.state_entry) + i as u64) % m.shape[1] as u64) as usize
}

/// The states, as they are read.
struct State<'a> {
    m: Input<'a>,
    z: Input<'a>,
}

impl State<'_> {
    /// Reads an entry `[slot, entry, head]` to `[dp][dp]`, the same transposed, and `[dp]`.
    #[inline(always)]
    fn load<V: Vector>(&self, [slot, entry, head]: [usize; 3], m: &mut [f32], m_t: &mut [f32], z: &mut [f32]) {
        m.fill(0.0);
        for (c, m) in m.chunks_exact_mut(z.len()).take(self.m.layout().shape[4]).enumerate() {
            widen::<V>(self.m.row([slot, entry, c, head]), m);
        }
        widen::<V>(self.z.row([slot, entry, 0, head]), z);
        transpose(m, m_t, z.len());
    }
}

/// Gradients of the states, as the task that owns the slot writes them.
struct StateOutput<'a> {
    m: Output<'a>,
    z: Output<'a>,
}

impl<'a> StateOutput<'a> {
    fn new(state: StateGradients<'a, [u8]>) -> Self {
        StateOutput { m: Output::new(state.d_m, Owner::Slot), z: Output::new(state.d_z, Owner::Slot) }
    }

    /// As [`State::load`].
    #[inline(always)]
    fn load<V: Vector>(&self, task: &mut Task, [slot, entry, head]: [usize; 3], m: &mut [f32], m_t: &mut [f32], z: &mut [f32]) {
        m.fill(0.0);
        for (c, m) in m.chunks_exact_mut(z.len()).take(self.m.layout().shape[4]).enumerate() {
            widen::<V>(Elements::F32(self.m.row(task, [slot, entry, c, head])), m);
        }
        widen::<V>(Elements::F32(self.z.row(task, [slot, entry, 0, head])), z);
        transpose(m, m_t, z.len());
    }

    /// Adds to an entry.
    #[inline(always)]
    fn add(&self, task: &mut Task, [slot, entry, head]: [usize; 3], m: &[f32], z: &[f32]) {
        for (c, m) in m.chunks_exact(z.len()).take(self.m.layout().shape[4]).enumerate() {
            add(self.m.row(task, [slot, entry, c, head]), m);
        }
        add(self.z.row(task, [slot, entry, 0, head]), z);
    }
}

/// What all tasks of the read share.
struct ReadKernel<'a> {
    shape: &'a Shape,
    tile: Tile,
    q: Input<'a>,
    state: State<'a>,
    beta: Input<'a>,
    o_local: Input<'a>,
    d_o: Input<'a>,
    d_q: Output<'a>,
    d_o_local: Output<'a>,
    d_state: Option<StateOutput<'a>>,
    /// The stream's part.
    d_beta: Output<'a>,
}

/// The rows of one stream and group of heads.
struct ReadTask<'a> {
    kernel: &'a ReadKernel<'a>,
    task: &'a mut Task,
    scratch: &'a mut [f32],
}

impl Body for ReadTask<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector, const MR: usize, const NR: usize>(self) {
        let ReadTask { kernel, task, scratch } = self;
        let (d, dp, group) = (kernel.shape.head_dim(), kernel.tile.dp, kernel.shape.group());
        let [x, s, a, d_a, d_x, o, _, m, m_t, d_m, _, _, z, d_z, _, den] = carve(scratch, self::scratch(kernel.tile));
        let (n, span, kv_head) = (task.n(), task.span(), task.group());
        let (first_head, block_len) = (kv_head * group, kernel.shape.block_len() as u64);
        for head in first_head..first_head + group {
            kernel.d_beta.row::<f32>(task, [n, 0, 0, head]).fill(0.0);
        }
        for i in 0..span.blocks(block_len as usize) {
            let i = mutate!("infini-backward-entry", i, i + 1);
            let at = [span.slot as usize, entry(&span, i, kernel.state.m.layout()), kv_head];
            kernel.state.load::<V>(at, m, m_t, z);
            d_m.fill(0.0);
            d_z.fill(0.0);
            let reads = z.iter().any(|z| *z != 0.0);

            // Tokens of the block, as rows with the heads of the group.
            let block = (span.start / block_len + i as u64) * block_len;
            let first = (block.max(span.start) - span.start) as usize;
            let rows = ((block + block_len).min(span.end()) - span.start) as usize * group - first * group;
            for tile in (0..rows).step_by(ROWS) {
                let count = ROWS.min(rows - tile);
                let at = |r: usize| [n, 0, first + (tile + r) / group, first_head + (tile + r) % group];
                let [x, s, a, d_a, d_x, o] = [&mut *x, s, a, d_a, d_x, o].map(|buffer| &mut buffer[..count * dp]);
                for r in 0..count {
                    let row = r * dp..(r + 1) * dp;
                    widen::<V>(kernel.q.row(at(r)), &mut x[row.clone()]);
                    widen::<V>(kernel.o_local.row(at(r)), &mut o[row.clone()]);
                    widen::<V>(kernel.d_o.row(at(r)), &mut d_a[row]);
                }
                a.fill(0.0);
                if reads {
                    V::run(Read { x, d, m, z, s, a, den });
                }
                for r in 0..count {
                    let (row, at) = (r * dp..(r + 1) * dp, at(r));
                    let beta = f64::from(kernel.beta.f32([0, 0, 0, at[3]])[0]);
                    // Each share from its own exponential: 1 − g cancels where g is close to 1.
                    let [of_memory, of_local] = [-beta, beta].map(|x| (1.0 / (1.0 + x.exp())) as f32);
                    let (of_memory, of_local) = mutate!("infini-backward-gate", (of_memory, of_local), (of_local, of_memory));
                    let (d_o, o) = (&mut d_a[row.clone()], &mut o[row.clone()]);
                    let d_gate = dot(d_o, &a[row]) - dot(d_o, o);
                    count_in(kernel.d_beta.row(task, [n, 0, 0, at[3]]), of_memory * of_local * d_gate);
                    o.iter_mut().zip(&*d_o).for_each(|(o, d_o)| *o = of_local * d_o);
                    d_o.iter_mut().for_each(|d_o| *d_o *= of_memory);
                    kernel.d_o_local.write::<V>(task, at, &o[..d]);
                }
                d_x.fill(0.0);
                if reads {
                    V::run(ReadBackward { x, s, a, den, d, m_t, z, d_a, d_x, d_m, d_z });
                }
                for r in 0..count {
                    kernel.d_q.write::<V>(task, at(r), &d_x[r * dp..][..d]);
                }
            }
            if let Some(d_state) = &kernel.d_state
                && task.owns_slot()
            {
                d_state.add(task, at, d_m, d_z);
            }
        }
    }
}

/// [`fam_core::Backend::infini_write_backward`].
pub(crate) fn infini_write_backward(
    plan: &CpuPlan,
    par: &Par<'_>,
    args: InfiniWriteBackward<'_, [u8]>,
    scratch: &mut [u8],
) -> Result<()> {
    args.validate(plan, scratch)?;
    let spec = plan.spec();
    let shape = spec.shape();
    let keys = Keys::Strided { k: args.k, v: args.v };
    let spans = SpanSource::new(args.spans, spec, Some(&keys), false);
    let kernel = WriteKernel {
        shape,
        tile: plan.tile,
        keys: Cache::tokens(&keys, spec)?,
        state: State { m: Input::new(&args.m), z: Input::new(&args.z) },
        d_state: StateOutput::new(args.d_state),
        d_keys: args.d_keys.map(|g| [g.d_k, g.d_v].map(|view| Output::new(view, Owner::Slot))),
    };
    let grid = Grid {
        streams: spans.batch(),
        groups: shape.kv_heads(),
        tiles: 1,
        spans: Some(spans),
        writes_slots: Some(|s| s.len > 0),
    };
    run(par, &grid, scratch, plan.share, &|task, scratch| plan.isa.run(WriteTask { kernel: &kernel, task, scratch }))
}

/// What all tasks of the write share.
struct WriteKernel<'a> {
    shape: &'a Shape,
    tile: Tile,
    keys: Cache<'a>,
    state: State<'a>,
    d_state: StateOutput<'a>,
    d_keys: Option<[Output<'a>; 2]>,
}

/// The segments of one stream and head.
struct WriteTask<'a> {
    kernel: &'a WriteKernel<'a>,
    task: &'a mut Task,
    scratch: &'a mut [f32],
}

impl Body for WriteTask<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector, const MR: usize, const NR: usize>(self) {
        let WriteTask { kernel, task, scratch } = self;
        if !task.owns_slot() {
            return;
        }
        let (d, dp) = (kernel.shape.head_dim(), kernel.tile.dp);
        let [x, s, a, d_u, d_x, u, sigma, m, m_t, d_m, passed_m, d_m_t, z, d_z, passed_z, den] =
            carve(scratch, self::scratch(kernel.tile));
        let (span, kv_head, block_len) = (task.span(), task.group(), kernel.shape.block_len());
        let slot = span.slot as usize;
        let is_delta = mutate!("infini-backward-delta", kernel.shape.infini() == Some(InfiniRule::Delta), false);
        let segments = span.blocks(block_len);
        for back in 0..segments {
            let i = mutate!("infini-backward-order", segments - 1 - back, back);
            let first = (span.start / block_len as u64 + i as u64) * block_len as u64;
            let end = first + block_len as u64;
            // Only whole segments were written.
            if end > span.end() {
                continue;
            }
            let [read_at, written_at] = [i, i + 1].map(|i| [slot, entry(&span, i, kernel.state.m.layout()), kv_head]);
            kernel.d_state.load::<V>(task, written_at, d_m, d_m_t, d_z);
            passed_m.copy_from_slice(d_m);
            passed_z.copy_from_slice(d_z);
            // A segment that began before the stream passes the gradient on, and no more.
            if mutate!("infini-backward-origin", first >= span.origin, true) {
                kernel.state.load::<V>(read_at, m, m_t, z);
                let reads = is_delta && z.iter().any(|z| *z != 0.0);
                let (k_rows, v_rows) = kernel.keys.rows([slot, 0, kv_head]);
                for tile in (first.max(span.origin)..end).step_by(ROWS) {
                    let count = ROWS.min((end - tile) as usize);
                    let row_of = |r: usize| tile - span.origin + r as u64;
                    let [x, s, a, d_u, d_x, u, sigma] =
                        [&mut *x, s, a, d_u, d_x, u, sigma].map(|buffer| &mut buffer[..count * dp]);
                    for (r, (x, u)) in x.chunks_exact_mut(dp).zip(u.chunks_exact_mut(dp)).enumerate() {
                        widen::<V>(k_rows.get(row_of(r)), x);
                        widen::<V>(v_rows.get(row_of(r)), u);
                    }
                    if reads {
                        V::run(Read { x, d, m, z, s, a, den });
                        u.iter_mut().zip(&*a).for_each(|(u, a)| *u -= a);
                    }
                    V::run(WriteBackward { x, u, d, d_m, d_m_t, d_z, sigma, d_x, d_u });
                    if let Some([_, d_v]) = &kernel.d_keys {
                        for (r, d_u) in d_u.chunks_exact(dp).enumerate() {
                            add(d_v.row(task, [slot, 0, row_of(r) as usize, kv_head]), d_u);
                        }
                    }
                    if reads {
                        // u = v − a.
                        d_u.iter_mut().for_each(|d_u| *d_u = -*d_u);
                        V::run(ReadBackward { x, s, a, den, d, m_t, z, d_a: d_u, d_x, d_m: passed_m, d_z: passed_z });
                    }
                    if let Some([d_k, _]) = &kernel.d_keys {
                        for (r, d_x) in d_x.chunks_exact(dp).enumerate() {
                            add(d_k.row(task, [slot, 0, row_of(r) as usize, kv_head]), d_x);
                        }
                    }
                }
            }
            kernel.d_state.add(task, read_at, passed_m, passed_z);
        }
    }
}
