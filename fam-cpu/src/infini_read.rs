//! Reading the compressive memory (Infini-attention, Eq. 6 and 10; contract section 3), fused into `attend` or on its own.
//!
//! ```text
//! a = σ(q) m / (σ(q)·z), 0 where z is all 0        o = g·a + (1 − g)·o_local, g = sigmoid(β_h)
//! ```
//!
//! a does not change when σ(q) is multiplied by a number. So a row whose q are all ≤ 0, where σ = exp, is shifted by its maximum first:
//! its largest σ becomes 1 and the denominator cannot underflow.

use crate::CpuPlan;
use crate::memory::{Elements, Input};
use crate::pack::{self, Rows};
use crate::parallel::output::{Output, Owner};
use crate::parallel::{Grid, Par, Task, run};
use crate::product::{All, Lanes, accumulate, zero};
use crate::span::SpanSource;
use crate::tile::{MAX_WIDTH, Tile, carve};
use crate::vector::{Body, Vector, sigma};
use crate::walk::Places;
use fam_core::{InfiniRead, InfiniState, Plan, Result, Shape, Span, mutate};
use std::ops::Range;

/// Sizes of a worker's buffers: a panel of o, then those of [`State::gate_panel`].
pub(crate) fn scratch(tile: Tile) -> [usize; 6] {
    let panel = MAX_WIDTH * tile.dp;
    [panel, panel, panel, tile.dp * tile.dp, 2 * MAX_WIDTH, pack::stage(tile.dp)]
}

/// [`fam_core::Backend::infini_read`].
pub(crate) fn infini_read(plan: &CpuPlan, par: &Par<'_>, args: InfiniRead<'_, [u8]>, scratch: &mut [u8]) -> Result<()> {
    args.validate(plan, scratch)?;
    let spec = plan.spec();
    let shape = spec.shape();
    let spans = SpanSource::new(args.spans, spec, None, false);
    let tile = Tile::for_threads(shape, &spans, plan.threads);
    let tiles = spans.max_rows().div_ceil(tile.tokens);
    let o = Output::new(args.o, Owner::Tile { heads: shape.group(), rows: tile.tokens, tiles, first: 0 });
    let grid = Grid { streams: spans.batch(), groups: shape.kv_heads(), tiles, spans: Some(spans), writes_slots: None };
    let kernel = Kernel { shape, tile, state: State::new(&args.state), o_local: Input::new(&args.o_local), o };
    run(par, &grid, scratch, plan.share, &|task, scratch| plan.isa.run(TileOfRows { kernel: &kernel, task, scratch }))
}

/// What all tasks share.
struct Kernel<'a> {
    shape: &'a Shape,
    tile: Tile,
    state: State<'a>,
    o_local: Input<'a>,
    o: Output<'a>,
}

/// A task on its worker.
struct TileOfRows<'a, 's> {
    kernel: &'a Kernel<'a>,
    task: &'s mut Task,
    scratch: &'s mut [f32],
}

impl Body for TileOfRows<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector, const MR: usize, const NR: usize>(self) {
        let TileOfRows { kernel: Kernel { shape, tile, state, o_local, o }, task, scratch } = self;
        let [panel, sigma_q, a, m, shares, stage] = carve(scratch, self::scratch(*tile));
        let (n, group, span, width) = (task.n(), shape.group(), task.span(), V::MR * V::LANES);
        let heads = task.group() * group..(task.group() + 1) * group;
        let end = ((task.tile() + 1) * tile.tokens).min(span.len as usize);
        let mut token = task.tile() * tile.tokens;
        while token < end {
            // Rows of one block read one state.
            let position = span.start + token as u64;
            let i = (shape.block(position) - shape.block(span.start)) as usize;
            let in_block = shape.block_len() - (position % shape.block_len() as u64) as usize;
            let tokens = (end - token).min(in_block);
            let places = |r: usize| Places::new([n, 0, token, heads.start], group, r);
            for first in (0..tokens * group).step_by(width) {
                let rows = first..(tokens * group).min(first + width);
                let panel = &mut panel[..width * tile.dp];
                pack::panel::<V, f32>(places(first).map(|at| o_local.row(at)), rows.len(), 1.0, panel);
                let buffers = [&mut *sigma_q, &mut *a, &mut *m, &mut *shares];
                state.gate_panel::<V>(
                    &span,
                    i,
                    heads.clone(),
                    rows.clone(),
                    places(first).map(|at| state.q.row(at)),
                    buffers,
                    panel,
                );
                o.write_panel::<V>(task, panel, rows.len(), stage, places(first));
            }
            token += tokens;
        }
    }
}

/// The compressive memory as the kernels read it.
pub(crate) struct State<'a> {
    pub q: Input<'a>,
    m: Input<'a>,
    z: Input<'a>,
    beta: Input<'a>,
}

impl<'a> State<'a> {
    pub fn new(args: &InfiniState<'a, [u8]>) -> Self {
        State { q: Input::new(&args.q), m: Input::new(&args.m), z: Input::new(&args.z), beta: Input::new(&args.beta) }
    }

    /// Gates the memory into `o`, a panel of f32 of block `i`: row `r` of `rows` is of head `heads[r mod group]`, `q` are their queries.
    /// The buffers are for panels of σ(q) and of a, for m and for the shares of the gate.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    pub fn gate_panel<'q, V: Vector>(
        &self,
        span: &Span,
        i: usize,
        heads: Range<usize>,
        rows: Range<usize>,
        q: impl Iterator<Item = Elements<'q>>,
        [sigma_q, a, m, shares]: [&mut [f32]; 4],
        o: &mut [f32],
    ) {
        let (d, group) = (self.m.layout().shape[4], heads.len());
        let (dp, width) = (pack::padded(d), V::MR * V::LANES);
        let i = mutate!("infini-next-state", i, i + 1);
        let entry = (u64::from(span.state_entry) + i as u64) % self.m.layout().shape[1] as u64;
        let (slot, entry, kv_head) = (span.slot as usize, entry as usize, heads.start / group);
        let (x, a) = (&mut sigma_q[..width * dp], &mut a[..width * dp]);
        pack::panel::<V, f32>(q, rows.len(), 1.0, x);
        let m = Rows::of::<V>(&self.m.rows([slot, entry, kv_head]), 0..d as u64, dp, m);
        let z = self.z.f32([slot, entry, 0, kv_head]);
        V::run(Retrieve { x, m, z, vectors: rows.len().div_ceil(V::LANES), a });

        let (of_memory, of_local) = shares.split_at_mut(MAX_WIDTH);
        for lane in 0..rows.len() {
            if lane >= group {
                // The heads of the next token.
                [of_memory[lane], of_local[lane]] = [of_memory[lane - group], of_local[lane - group]];
                continue;
            }
            let r = rows.start + lane;
            let head = mutate!("infini-beta-head", heads.start + r % group, r % group);
            let beta = f64::from(self.beta.f32([0, 0, 0, head])[0]);
            // Each share from its own exponential: 1 − g cancels where g is close to 1.
            let beta = mutate!("infini-gate-inverted", beta, -beta);
            [of_memory[lane], of_local[lane]] = [-beta, beta].map(|x| (1.0 / (1.0 + x.exp())) as f32);
        }
        for (o, a) in o.chunks_exact_mut(width).zip(a.chunks_exact(width)) {
            for lane in (0..width).step_by(V::LANES) {
                let (memory, local) = (V::load(&of_memory[lane..]), V::load(&of_local[lane..]));
                V::load(&a[lane..]).mul(memory).add(V::load(&o[lane..]).mul(local)).store(&mut o[lane..]);
            }
        }
    }
}

/// `a = σ(x) m / (σ(x)·z)` for the first `vectors` of a panel of rows `x`, which become σ of the shifted rows; 0 where z is all 0.
pub(crate) struct Retrieve<'a> {
    pub x: &'a mut [f32],
    pub m: Rows<'a>,
    pub z: &'a [f32],
    pub vectors: usize,
    pub a: &'a mut [f32],
}

impl Body for Retrieve<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector, const MR: usize, const NR: usize>(mut self) {
        if self.z.iter().all(|z| *z == 0.0) {
            return self.a.fill(0.0);
        }
        let (d, width) = (self.z.len(), MR * V::LANES);
        for lane in (0..self.vectors * V::LANES).step_by(V::LANES) {
            // A row whose x are all ≤ 0 is shifted by their maximum, which multiplies σ by a number.
            let mut largest = V::splat(f32::NEG_INFINITY);
            for x in self.x.chunks_exact(width).take(d) {
                largest = largest.max(V::load(&x[lane..]));
            }
            let shift = mutate!("infini-unshifted", largest.min(V::splat(0.0)), V::splat(0.0));
            for x in self.x.chunks_exact_mut(width).take(d) {
                sigma(V::load(&x[lane..]).sub(shift)).store(&mut x[lane..]);
            }
        }
        if self.vectors == MR {
            self.products::<V, MR, MR, NR>(0);
        } else {
            (0..self.vectors).for_each(|j| self.products::<V, MR, 1, NR>(j));
        }
    }
}

impl Retrieve<'_> {
    /// All channels of `M` vectors from vector `first` on.
    #[inline(always)]
    fn products<V: Vector, const MR: usize, const M: usize, const NR: usize>(&mut self, first: usize) {
        let d = self.z.len();
        let x = Lanes { data: &self.x[first * V::LANES..], stride: MR * V::LANES };
        let mut den = zero::<V, M, 1>();
        accumulate(x, Rows { data: self.z, stride: 1 }.over_rows(), 0..d, &All, &mut den);
        let mut den = den[0];
        for den in &mut den {
            *den = mutate!("infini-epsilon", *den, den.add(V::splat(1e-6)));
        }
        let mut c = 0;
        while c + NR <= d {
            self.ratios::<V, MR, M, NR>(first, c, den);
            c += NR;
        }
        while c < d {
            self.ratios::<V, MR, M, 1>(first, c, den);
            c += 1;
        }
    }

    /// The same for channels `c .. c + N`.
    #[inline(always)]
    fn ratios<V: Vector, const MR: usize, const M: usize, const N: usize>(&mut self, first: usize, c: usize, den: [V; M]) {
        let (width, lanes) = (MR * V::LANES, first * V::LANES);
        let mut sum = zero::<V, M, N>();
        let x = Lanes { data: &self.x[lanes..], stride: width };
        accumulate(x, self.m.over_rows().skip(c), 0..self.z.len(), &All, &mut sum);
        for i in 0..N {
            for j in 0..M {
                sum[i][j].div(den[j]).store(&mut self.a[(c + i) * width + lanes + j * V::LANES..]);
            }
        }
    }
}
