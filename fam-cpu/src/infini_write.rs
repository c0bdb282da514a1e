//! Writing whole segments into the compressive memory (Infini-attention, Eq. 8 and 9; contract section 3).
//!
//! ```text
//! linear: m' = m + σ(k)ᵀ v        delta: m' = m + σ(k)ᵀ (v − σ(k) m / (σ(k)·z))        z' = z + Σ_t σ(k_t)
//! ```
//!
//! A task is one stream and one kv head; it goes through the call's segments in order, each reading the entry that the one before has
//! written. What a segment adds is summed apart and added to m once, so that a large m loses nothing to the number of its keys.

use crate::infini_read::{retrieve, sigma_rows};
use crate::memory::{Cache, HeadRows};
use crate::pack::{self, Convert, with_element};
use crate::parallel::output::{Output, Owner};
use crate::parallel::{Grid, Par, Task, run};
use crate::product::accumulate;
use crate::span::SpanSource;
use crate::tile::{BLOCK_N, Tile, carve};
use crate::vector::{Vector, scalar::Scalar};
use crate::{CpuPlan, Isa};
use fam_core::{InfiniRule, InfiniWrite, Plan, Result, Shape, mutate};

/// Sizes of a worker's buffers: what is added to m and to z, the old m and z, a tile of k, of σ(k) transposed, of v and of a, and packed m.
pub(crate) fn scratch(tile: Tile) -> [usize; 9] {
    let dp = tile.dp;
    let keys = BLOCK_N * dp;
    [dp * dp, dp, dp * dp, dp, keys, keys, keys, keys, keys]
}

/// [`fam_core::Backend::infini_write`].
pub(crate) fn infini_write(plan: &CpuPlan, par: &Par<'_>, args: InfiniWrite<'_, [u8]>, scratch: &mut [u8]) -> Result<()> {
    args.validate(plan, scratch)?;
    with_element!(plan, T => typed::<T>(plan, par, args, scratch))
}

fn typed<T: Convert>(plan: &CpuPlan, par: &Par<'_>, args: InfiniWrite<'_, [u8]>, scratch: &mut [u8]) -> Result<()> {
    let spec = plan.spec();
    let shape = spec.shape();
    let spans = SpanSource::new(args.spans, spec, Some(&args.keys), false);
    let kernel = Kernel {
        shape,
        tile: plan.tile,
        keys: Cache::<T>::tokens(&args.keys, spec)?,
        m: Output::new(args.m, Owner::Slot),
        z: Output::new(args.z, Owner::Slot),
    };
    let grid = Grid { streams: spans.batch(), groups: shape.kv_heads(), tiles: 1, spans: Some(spans), writes_slots: true };
    run(par, &grid, scratch, plan.share, &|task, scratch| match plan.isa {
        Isa::Scalar => kernel.task::<Scalar, 4, 1>(task, scratch),
    })
}

/// What all tasks share.
struct Kernel<'a, T> {
    shape: &'a Shape,
    tile: Tile,
    keys: Cache<'a, T>,
    m: Output<'a>,
    z: Output<'a>,
}

impl<T: Convert> Kernel<'_, T> {
    /// The segments of one stream and head.
    #[inline(always)]
    fn task<V: Vector, const MR: usize, const NR: usize>(&self, task: &mut Task, scratch: &mut [f32]) {
        if !task.owns_slot() {
            return;
        }
        let (span, kv_head) = (task.span(), task.group());
        let (block_len, d, dp) = (self.shape.block_len(), self.shape.head_dim(), self.tile.dp);
        let slot = span.slot as usize;
        let entries = self.m.layout().shape[1] as u64;
        let entry = |i: usize| ((u64::from(span.state_entry) + i as u64) % entries) as usize;
        for i in 0..span.blocks(block_len) {
            let first = (span.start / block_len as u64 + i as u64) * block_len as u64;
            let end = first + block_len as u64;
            if mutate!("infini-partial-segment", end > span.end(), false) {
                return;
            }
            let [add_m, add_z, m, z, b @ ..] = carve(scratch, self::scratch(self.tile));
            add_m.fill(0.0);
            add_z.fill(0.0);
            for (c, m) in m.chunks_exact_mut(dp).take(d).enumerate() {
                pack::row::<f32>(self.m.row(task, [slot, entry(i), c, kv_head]), m, 0.0);
            }
            pack::row::<f32>(self.z.row(task, [slot, entry(i), 0, kv_head]), z, 0.0);
            // A segment that began before the stream is passed over.
            if mutate!("infini-before-origin", first >= span.origin, true) {
                let rows = self.keys.rows([slot, 0, kv_head]);
                let (from, to) = (first.max(span.origin) - span.origin, end.min(span.end()) - span.origin);
                self.segment::<V, MR, NR>(rows, from..to, (m, z), (add_m, add_z), b);
            }
            for (c, (m, add)) in m.chunks_exact_mut(dp).zip(add_m.chunks_exact(dp)).take(d).enumerate() {
                sum::<V>(m, add);
                self.m.write(task, [slot, entry(i + 1), c, kv_head], &m[..d]);
            }
            sum::<V>(z, mutate!("infini-z-stale", &add_z[..], &add_z[..0]));
            self.z.write(task, [slot, entry(i + 1), 0, kv_head], &z[..d]);
        }
    }

    /// Sums what the keys `range` (row numbers) of a segment add to `m` and `z`.
    #[inline(always)]
    fn segment<V: Vector, const MR: usize, const NR: usize>(
        &self,
        (k_rows, v_rows): (HeadRows<'_, T>, HeadRows<'_, T>),
        range: std::ops::Range<u64>,
        (m, z): (&[f32], &[f32]),
        (add_m, add_z): (&mut [f32], &mut [f32]),
        [k, s, v, a, tile]: [&mut [f32]; 5],
    ) {
        let (d, dp) = (self.shape.head_dim(), self.tile.dp);
        let is_delta = mutate!("infini-delta-ignored", self.shape.infini() == Some(InfiniRule::Delta), false);
        for first in range.clone().step_by(BLOCK_N) {
            let count = BLOCK_N.min((range.end - first) as usize);
            let (k, v) = (&mut k[..count * dp], &mut v[..count * dp]);
            let pack_k = |k: &mut [f32]| {
                for (t, k) in k.chunks_exact_mut(dp).enumerate() {
                    pack::row(k_rows.get(first + t as u64), k, f32::NEG_INFINITY);
                }
            };
            pack::values(&v_rows, first, 0..count, dp, v);
            if is_delta {
                pack_k(k);
                let a = &mut a[..count * dp];
                retrieve::<V, MR, NR>(k, d, |c| &m[c * dp..][..d], &z[..d], tile, a);
                for (v, a) in v.chunks_exact_mut(V::LANES).zip(a.chunks_exact(V::LANES)) {
                    V::load(v).sub(V::load(a)).store(v);
                }
            }
            // The ratio above may shift σ(k); what is written may not.
            pack_k(k);
            for (t, k) in k.chunks_exact_mut(dp).enumerate() {
                sigma_rows::<V>(k, false);
                sum::<V>(add_z, k);
                for (c, x) in k[..d].iter().enumerate() {
                    s[c * BLOCK_N + t] = *x;
                }
            }
            let mut c = 0;
            while c + MR <= d {
                accumulate::<V, MR, NR>(&s[c * BLOCK_N..], BLOCK_N, v, 0..count, dp, &mut add_m[c * dp..]);
                c += MR;
            }
            while c < d {
                accumulate::<V, 1, 4>(&s[c * BLOCK_N..], BLOCK_N, v, 0..count, dp, &mut add_m[c * dp..]);
                c += 1;
            }
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
