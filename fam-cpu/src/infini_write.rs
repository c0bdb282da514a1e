//! Writing whole segments into the compressive memory (Infini-attention, Eq. 8 and 9; contract section 3).
//!
//! ```text
//! linear: m' = m + σ(k)ᵀ v        delta: m' = m + σ(k)ᵀ (v − σ(k) m / (σ(k)·z))        z' = z + Σ_t σ(k_t)
//! ```
//!
//! A task is one stream and one kv head; it goes through the call's segments in order, each reading the entry that the one before has
//! written. What a segment adds is summed apart and added to m once, so that a large m loses nothing to the number of its keys.

use crate::CpuPlan;
use crate::convert::widen;
use crate::infini_read::Retrieve;
use crate::memory::{Cache, Elements, HeadRows};
use crate::pack::{self, Rows};
use crate::parallel::output::{Output, Owner};
use crate::parallel::{Grid, Par, Task, run};
use crate::product::{Lanes, Product};
use crate::span::SpanSource;
use crate::tile::{BLOCK_N, MAX_WIDTH, Tile, carve};
use crate::vector::{Body, Vector, sigma};
use fam_core::{InfiniRule, InfiniWrite, Plan, Result, Shape, mutate};

/// Sizes of a worker's buffers: what is added to m and to z, the old m and z, a tile of σ(k) and of v, and for delta panels of σ(k) and of
/// a and the buffer for transposing.
pub(crate) fn scratch(tile: Tile) -> [usize; 9] {
    let (dp, keys, panel) = (tile.dp, BLOCK_N * tile.dp, MAX_WIDTH * tile.dp);
    [dp * dp, dp, dp * dp, dp, keys, keys, panel, panel, pack::stage(dp)]
}

/// [`fam_core::Backend::infini_write`].
pub(crate) fn infini_write(plan: &CpuPlan, par: &Par<'_>, args: InfiniWrite<'_, [u8]>, scratch: &mut [u8]) -> Result<()> {
    args.validate(plan, scratch)?;
    let spec = plan.spec();
    let shape = spec.shape();
    let spans = SpanSource::new(args.spans, spec, Some(&args.keys), false);
    let kernel = Kernel {
        shape,
        tile: plan.tile,
        keys: Cache::tokens(&args.keys, spec)?,
        m: Output::new(args.m, Owner::Slot),
        z: Output::new(args.z, Owner::Slot),
    };
    let grid = Grid {
        streams: spans.batch(),
        groups: shape.kv_heads(),
        tiles: 1,
        spans: Some(spans),
        writes_slots: Some(|s| s.len > 0),
    };
    run(par, &grid, scratch, plan.share, &|task, scratch| plan.isa.run(Segments { kernel: &kernel, task, scratch }))
}

/// What all tasks share.
struct Kernel<'a> {
    shape: &'a Shape,
    tile: Tile,
    keys: Cache<'a>,
    m: Output<'a>,
    z: Output<'a>,
}

/// A task on its worker: the segments of one stream and head.
struct Segments<'a, 's> {
    kernel: &'a Kernel<'a>,
    task: &'s mut Task,
    scratch: &'s mut [f32],
}

impl Body for Segments<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector, const MR: usize, const NR: usize>(self) {
        let Segments { kernel, task, scratch } = self;
        if !task.owns_slot() {
            return;
        }
        let (span, kv_head) = (task.span(), task.group());
        let (block_len, d, dp) = (kernel.shape.block_len(), kernel.shape.head_dim(), kernel.tile.dp);
        let slot = span.slot as usize;
        let entries = kernel.m.layout().shape[1] as u64;
        let entry = |i: usize| ((u64::from(span.state_entry) + i as u64) % entries) as usize;
        for i in 0..span.blocks(block_len) {
            let first = (span.start / block_len as u64 + i as u64) * block_len as u64;
            let end = first + block_len as u64;
            if mutate!("infini-partial-segment", end > span.end(), false) {
                return;
            }
            let [add_m, add_z, m, z, b @ ..] = carve(scratch, self::scratch(kernel.tile));
            add_m.fill(0.0);
            add_z.fill(0.0);
            for (c, m) in m.chunks_exact_mut(dp).take(d).enumerate() {
                widen::<V>(Elements::F32(kernel.m.row(task, [slot, entry(i), c, kv_head])), m);
            }
            widen::<V>(Elements::F32(kernel.z.row(task, [slot, entry(i), 0, kv_head])), z);
            // A segment that began before the stream is passed over.
            if mutate!("infini-before-origin", first >= span.origin, true) {
                let rows = kernel.keys.rows([slot, 0, kv_head]);
                let (from, to) = (first.max(span.origin) - span.origin, end.min(span.end()) - span.origin);
                kernel.segment::<V>(rows, from..to, (m, z), (add_m, add_z), b);
            }
            for (c, (m, add)) in m.chunks_exact_mut(dp).zip(add_m.chunks_exact(dp)).take(d).enumerate() {
                sum::<V>(m, add);
                kernel.m.write::<V>(task, [slot, entry(i + 1), c, kv_head], &m[..d]);
            }
            sum::<V>(z, mutate!("infini-z-stale", &add_z[..], &add_z[..0]));
            kernel.z.write::<V>(task, [slot, entry(i + 1), 0, kv_head], &z[..d]);
        }
    }
}

impl Kernel<'_> {
    /// Sums what the keys `range` (row numbers) of a segment add to `m` and `z`.
    #[inline(always)]
    fn segment<V: Vector>(
        &self,
        (k_rows, v_rows): (HeadRows<'_>, HeadRows<'_>),
        range: std::ops::Range<u64>,
        (m, z): (&[f32], &[f32]),
        (add_m, add_z): (&mut [f32], &mut [f32]),
        [s, v, x, a, stage]: [&mut [f32]; 5],
    ) {
        let (d, dp, width) = (self.shape.head_dim(), self.tile.dp, V::MR * V::LANES);
        let is_delta = mutate!("infini-delta-ignored", self.shape.infini() == Some(InfiniRule::Delta), false);
        for first in range.clone().step_by(BLOCK_N) {
            let count = BLOCK_N.min((range.end - first) as usize);
            let (s, v) = (&mut s[..count * dp], &mut v[..count * dp]);
            for (t, (s, v)) in (first..).zip(s.chunks_exact_mut(dp).zip(v.chunks_exact_mut(dp))) {
                widen::<V>(k_rows.get(t), s);
                widen::<V>(v_rows.get(t), v);
            }
            if is_delta {
                for (s, v) in s.chunks(width * dp).zip(v.chunks_mut(width * dp)) {
                    let (count, x, a) = (s.len() / dp, &mut x[..width * dp], &mut a[..width * dp]);
                    pack::panel::<V, f32>(s.chunks_exact(dp).map(Elements::F32), count, 1.0, x);
                    let m = Rows { data: m, stride: dp };
                    V::run(Retrieve { x, m, z: &z[..d], vectors: count.div_ceil(V::LANES), a });
                    for (t, v) in (0..count).step_by(V::LANES).zip(v.chunks_mut(V::LANES * dp)) {
                        pack::unpack::<V>(a, t, stage);
                        subtract::<V>(v, stage);
                    }
                }
            }
            // The ratio above may shift σ(k); what is written may not.
            for k in s.chunks_exact_mut(V::LANES) {
                let y = sigma(V::load(k));
                mutate!("infini-expm1", y, y.sub(V::splat(1.0)).add(V::splat(1.0))).store(k);
            }
            s.chunks_exact(dp).for_each(|s| sum::<V>(add_z, s));
            let b = Rows { data: &*s, stride: dp }.over_rows();
            V::run(Product {
                x: Lanes { data: v, stride: dp },
                b,
                count: d,
                lanes: dp,
                factors: count,
                out: &mut *add_m,
                adds: true,
            });
        }
    }
}

/// `to += add`, element by element.
#[inline(always)]
fn sum<V: Vector>(to: &mut [f32], add: &[f32]) {
    for (to, add) in to.chunks_exact_mut(V::LANES).zip(add.chunks_exact(V::LANES)) {
        V::load(to).add(V::load(add)).store(to);
    }
}

/// `from -= what`, element by element of `from`.
#[inline(always)]
fn subtract<V: Vector>(from: &mut [f32], what: &[f32]) {
    for (from, what) in from.chunks_exact_mut(V::LANES).zip(what.chunks_exact(V::LANES)) {
        V::load(from).sub(V::load(what)).store(from);
    }
}
