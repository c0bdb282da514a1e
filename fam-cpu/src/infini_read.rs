//! Reading the compressive memory (Infini-attention, Eq. 6 and 10; contract section 3), fused into `attend` or on its own.
//!
//! ```text
//! a = σ(q) m / (σ(q)·z), 0 where z is all 0        o = g·a + (1 − g)·o_local, g = sigmoid(β_h)
//! ```
//!
//! a does not change when σ(q) is multiplied by a number. So a row whose q are all ≤ 0, where σ = exp, is shifted by its maximum first:
//! its largest σ becomes 1 and the denominator cannot underflow.

use crate::memory::Input;
use crate::pack::{self, Convert, with_element};
use crate::parallel::output::{Output, Owner};
use crate::parallel::{Grid, Par, run};
use crate::product::accumulate;
use crate::span::SpanSource;
use crate::tile::{BLOCK_N, Tile, carve};
use crate::vector::{Vector, scalar::Scalar, sigma};
use crate::{CpuPlan, Isa};
use fam_core::{InfiniRead, InfiniState, Plan, Result, Span, mutate};
use std::ops::Range;

/// Sizes of a worker's buffers: σ(q), packed m, a, and o.
pub(crate) fn scratch(tile: Tile) -> [usize; 4] {
    let Tile { rows, dp, .. } = tile;
    [rows * dp, BLOCK_N * dp, rows * dp, rows * dp]
}

/// [`fam_core::Backend::infini_read`].
pub(crate) fn infini_read(plan: &CpuPlan, par: &Par<'_>, args: InfiniRead<'_, [u8]>, scratch: &mut [u8]) -> Result<()> {
    args.validate(plan, scratch)?;
    with_element!(plan, T => typed::<T>(plan, par, args, scratch))
}

fn typed<T: Convert>(plan: &CpuPlan, par: &Par<'_>, args: InfiniRead<'_, [u8]>, scratch: &mut [u8]) -> Result<()> {
    let (spec, tile) = (plan.spec(), plan.tile);
    let shape = spec.shape();
    let spans = SpanSource::new(args.spans, spec, None, false);
    let tiles = spans.max_rows().div_ceil(tile.tokens);
    let state = State::<T>::new(&args.state);
    let o_local = Input::<f32>::new(&args.o_local);
    let o = Output::new(args.o, Owner::Tile { heads: shape.group(), rows: tile.tokens, tiles, first: 0 });
    let grid = Grid { streams: spans.batch(), groups: shape.kv_heads(), tiles, spans: Some(spans), writes_slots: false };
    run(par, &grid, scratch, plan.share, &|task, scratch| {
        let [q, m, a, acc] = carve(scratch, self::scratch(tile));
        let (n, group, span) = (task.n(), shape.group(), task.span());
        let heads = task.group() * group..(task.group() + 1) * group;
        let end = ((task.tile() + 1) * tile.tokens).min(span.len as usize);
        let mut first = task.tile() * tile.tokens;
        while first < end {
            // Rows of one block read one state.
            let position = span.start + first as u64;
            let i = (shape.block(position) - shape.block(span.start)) as usize;
            let in_block = shape.block_len() - (position % shape.block_len() as u64) as usize;
            let tokens = (end - first).min(in_block);
            let at = |r: usize| [n, 0, first + r / group, heads.start + r % group];
            let acc = &mut acc[..tokens * group * tile.dp];
            for (r, acc) in acc.chunks_exact_mut(tile.dp).enumerate() {
                pack::row(o_local.row(at(r)), acc, 0.0);
            }
            match plan.isa {
                Isa::Scalar => {
                    state.gate_rows::<Scalar, 4, 1>(
                        &span,
                        i,
                        heads.clone(),
                        |r| state.q.row(at(r)),
                        [&mut *q, &mut *m, &mut *a],
                        acc,
                    );
                }
            }
            for (r, acc) in acc.chunks_exact(tile.dp).enumerate() {
                o.write(task, at(r), &acc[..shape.head_dim()]);
            }
            first += tokens;
        }
    })
}

/// The compressive memory as the kernels read it.
pub(crate) struct State<'a, T> {
    pub q: Input<'a, T>,
    m: Input<'a, f32>,
    z: Input<'a, f32>,
    beta: Input<'a, f32>,
}

impl<'a, T: Convert> State<'a, T> {
    pub fn new(args: &InfiniState<'a, [u8]>) -> Self {
        State { q: Input::new(&args.q), m: Input::new(&args.m), z: Input::new(&args.z), beta: Input::new(&args.beta) }
    }

    /// Gates the memory into `o`, rows of f32 of block `i`: row `r` is of head `heads[r mod group]`. `q(r)` are its queries. The
    /// buffers are for σ(q), a tile of m, and a.
    #[inline(always)]
    pub fn gate_rows<'q, V: Vector, const MR: usize, const NR: usize>(
        &self,
        span: &Span,
        i: usize,
        heads: Range<usize>,
        q: impl Fn(usize) -> &'q [T],
        [sigma_q, tile, a]: [&mut [f32]; 3],
        o: &mut [f32],
    ) where
        T: 'q,
    {
        let d = self.m.layout().shape[4];
        let dp = pack::padded(d);
        let group = heads.len();
        let i = mutate!("infini-next-state", i, i + 1);
        let entry = (u64::from(span.state_entry) + i as u64) % self.m.layout().shape[1] as u64;
        let (slot, entry, kv_head) = (span.slot as usize, entry as usize, heads.start / group);
        let rows = o.len() / dp;
        for (r, to) in sigma_q.chunks_exact_mut(dp).take(rows).enumerate() {
            // σ(−∞) = 0: a padded channel weighs nothing.
            pack::row(q(r), to, f32::NEG_INFINITY);
        }
        let (sigma_q, a) = (&mut sigma_q[..rows * dp], &mut a[..rows * dp]);
        let z = self.z.row([slot, entry, 0, kv_head]);
        retrieve::<V, MR, NR>(sigma_q, d, |c| self.m.row([slot, entry, c, kv_head]), z, tile, a);
        for (r, (o, a)) in o.chunks_exact_mut(dp).zip(a.chunks_exact(dp)).enumerate() {
            let head = mutate!("infini-beta-head", heads.start + r % group, r % group);
            let beta = f64::from(self.beta.row([0, 0, 0, head])[0]);
            // Each share from its own exponential: 1 − g cancels where g is close to 1.
            let beta = mutate!("infini-gate-inverted", beta, -beta);
            let [of_memory, of_local] = [-beta, beta].map(|x| V::splat((1.0 / (1.0 + x.exp())) as f32));
            for (o, a) in o.chunks_exact_mut(V::LANES).zip(a.chunks_exact(V::LANES)) {
                V::load(a).mul(of_memory).add(V::load(o).mul(of_local)).store(o);
            }
        }
    }
}

/// `a = σ(x) m / (σ(x)·z)` for rows `x`, `[rows][dp]` with padding of −∞, which become σ of the shifted rows; 0 where z is all 0. `m(c)`
/// is row c of m; `tile` is a buffer of `BLOCK_N` rows.
#[inline(always)]
pub(crate) fn retrieve<'m, V: Vector, const MR: usize, const NR: usize>(
    x: &mut [f32],
    d: usize,
    m: impl Fn(usize) -> &'m [f32],
    z: &[f32],
    tile: &mut [f32],
    a: &mut [f32],
) {
    let dp = pack::padded(d);
    a.fill(0.0);
    if z.iter().all(|z| *z == 0.0) {
        return;
    }
    for row in x.chunks_exact_mut(dp) {
        sigma_rows::<V>(row, true);
    }
    for first in (0..d).step_by(BLOCK_N) {
        let count = BLOCK_N.min(d - first);
        for (c, tile) in tile.chunks_exact_mut(dp).take(count).enumerate() {
            pack::row(m(first + c), tile, 0.0);
        }
        let mut r = 0;
        while (r + MR) * dp <= x.len() {
            accumulate::<V, MR, NR>(&x[r * dp + first..], dp, tile, 0..count, dp, &mut a[r * dp..]);
            r += MR;
        }
        while r * dp < x.len() {
            accumulate::<V, 1, 4>(&x[r * dp + first..], dp, tile, 0..count, dp, &mut a[r * dp..]);
            r += 1;
        }
    }
    for (x, a) in x.chunks_exact(dp).zip(a.chunks_exact_mut(dp)) {
        let den = mutate!("infini-epsilon", dot::<V>(x, z), dot::<V>(x, z) + 1e-6);
        for a in a.chunks_exact_mut(V::LANES) {
            V::load(a).div(V::splat(den)).store(a);
        }
    }
}

/// σ in place, of a padded row; `shifted` by its maximum where that is below 0, which multiplies σ by a number.
#[inline(always)]
pub(crate) fn sigma_rows<V: Vector>(row: &mut [f32], shifted: bool) {
    let mut largest = V::splat(f32::NEG_INFINITY);
    for x in row.chunks_exact(V::LANES) {
        largest = largest.max(V::load(x));
    }
    let shift = if mutate!("infini-unshifted", shifted, false) { largest.largest().min(0.0) } else { 0.0 };
    for x in row.chunks_exact_mut(V::LANES) {
        let y = sigma(V::load(x).sub(V::splat(shift)));
        mutate!("infini-expm1", y, y.sub(V::splat(1.0)).add(V::splat(1.0))).store(x);
    }
}

/// Σ x_c z_c over the channels of `z`.
#[inline(always)]
fn dot<V: Vector>(x: &[f32], z: &[f32]) -> f32 {
    let whole = z.len() / V::LANES * V::LANES;
    let mut sum = V::splat(0.0);
    for (x, z) in x.chunks_exact(V::LANES).zip(z[..whole].chunks_exact(V::LANES)) {
        sum = V::load(x).mul_add(V::load(z), sum);
    }
    x[whole..].iter().zip(&z[whole..]).fold(sum.sum(), |sum, (x, z)| sum + x * z)
}
