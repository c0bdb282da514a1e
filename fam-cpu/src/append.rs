//! New keys and values enter the cached tensors, and leave the ring again for a snapshot (contract section 2, "The key ring").
//!
//! A task is one stream and a tile of its tokens, in all heads: tokens are read in the order in which they usually lie. Rows are copied as they
//! are: kv_dtype is the shape's dtype.

use crate::CpuPlan;
use crate::memory::{Cache, Elements, Input, ring_layout};
use crate::parallel::output::{Output, Owner};
use crate::parallel::{Grid, Par, check_whole, run};
use crate::span::SpanSource;
use fam_core::{Append, AppendMem, AppendRows, Keys, Plan, ReadRing, Result, ViewMut};

/// Tokens in a tile.
const ROWS: usize = 64;

/// [`fam_core::Backend::append`].
pub(crate) fn append(plan: &CpuPlan, par: &Par<'_>, args: Append<'_, [u8]>, scratch: &mut [u8]) -> Result<()> {
    args.validate(plan, scratch)?;
    let spec = plan.spec();
    let (block_len, ring_rows) = (spec.shape().block_len(), spec.ring_rows() as u64);
    let spans = SpanSource::new(args.spans, spec, None, args.mem_rows.is_some());
    let rows = match args.rows {
        Some(AppendRows { k, v, ring }) => {
            let owner = Owner::Ring { rows: ROWS, capacity: spec.ring_rows() };
            let ring = Output::new(ViewMut::new(ring, ring_layout(spec)), owner);
            Some((Input::new(&k), Input::new(&v), ring))
        }
        None => None,
    };
    let mem_rows = match args.mem_rows {
        Some(AppendMem { k, v, to_k, to_v }) => {
            let (to_k, to_v) = (Output::new(to_k, Owner::First), Output::new(to_v, Owner::First));
            Some((Input::new(&k), Input::new(&v), to_k, to_v))
        }
        None => None,
    };
    let kv_heads = spec.shape().kv_heads();
    let grid = Grid {
        streams: spans.batch(),
        groups: 1,
        tiles: rows.as_ref().map_or(0, |_| spans.max_rows()).div_ceil(ROWS).max(1),
        spans: Some(spans),
        writes_slots: Some(|s| s.len > 0 || s.mem_rows > 0),
    };
    run(par, &grid, scratch, 0, &|task, _| {
        if !task.owns_slot() {
            return;
        }
        let (n, span) = (task.n(), task.span());
        let slot = span.slot as usize;
        if let Some((k, v, ring)) = &rows {
            let first = task.tile() * ROWS;
            for row in first..(first + ROWS).min(span.len as usize) {
                let to = ((span.start - span.origin + row as u64) % ring_rows) as usize;
                for (half, from) in [k, v].into_iter().enumerate() {
                    for head in 0..kv_heads {
                        ring.copy(task, [slot, half, to, head], from.row([n, 0, row, head]));
                    }
                }
            }
        }
        if let (Some((k, v, to_k, to_v)), 0) = (&mem_rows, task.tile()) {
            for i in 0..span.blocks(block_len).max(1) {
                let entry = |to: &Output<'_>| ((u64::from(span.mem_entry) + i as u64) % to.layout().shape[1] as u64) as usize;
                for (f, head) in (0..span.mem_rows as usize).flat_map(|f| (0..kv_heads).map(move |head| (f, head))) {
                    to_k.copy(task, [slot, entry(to_k), f, head], k.row([n, i, f, head]));
                    to_v.copy(task, [slot, entry(to_v), f, head], v.row([n, i, f, head]));
                }
            }
        }
    })
}

/// [`fam_core::Device::read_ring`]: on one thread, since snapshots are rare.
pub(crate) fn read_ring(plan: &CpuPlan, par: &Par<'_>, args: ReadRing<'_, [u8]>) -> Result<()> {
    args.validate(plan)?;
    check_whole(par)?;
    let (spec, keys) = (plan.spec(), Keys::Ring(args.ring));
    let spans = SpanSource::new(args.spans, spec, Some(&keys), false);
    let ReadRing { k, v, .. } = args;
    let cache = Cache::tokens(&keys, spec)?;
    for (n, span) in (0..spans.batch()).map(|n| (n, spans.get(n))) {
        for head in 0..spec.shape().kv_heads() {
            let (from_k, from_v) = cache.rows([span.slot as usize, 0, head]);
            for row in 0..span.len as usize {
                let index = span.start - span.origin + row as u64;
                copy(from_k.get(index), &mut *k.mem, k.layout.at([n, 0, row, head]));
                copy(from_v.get(index), &mut *v.mem, v.layout.at([n, 0, row, head]));
            }
        }
    }
    Ok(())
}

/// Copies a row to element `first` of `to`.
fn copy(from: Elements<'_>, to: &mut [u8], first: usize) {
    let bytes = from.bytes();
    to[first * (bytes.len() / from.len())..][..bytes.len()].copy_from_slice(bytes);
}
