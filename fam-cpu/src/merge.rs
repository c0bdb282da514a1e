//! Attention over two disjoint key sets becomes attention over their union (contract section 4).
//!
//! ```text
//! w_x = exp(lse_x − max)        o = (w_a·o_a + w_b·o_b) / (w_a + w_b)        lse = max + ln(w_a + w_b)
//! ```

use crate::CpuPlan;
use crate::convert::widen;
use crate::memory::Input;
use crate::pack::padded;
use crate::parallel::output::{Output, Owner};
use crate::parallel::{Grid, Par, run};
use crate::softmax::Softmax;
use crate::tile::MAX_HEAD_DIM;
use crate::vector::scalar::Scalar;
use fam_core::{Merge, Partial, Result, mutate};

/// Rows of one entry and head in a task: some tens of KiB, enough to make up for drawing its number.
pub(crate) const ROWS: usize = 64;

/// [`fam_core::Backend::merge`].
pub(crate) fn merge(plan: &CpuPlan, par: &Par<'_>, args: Merge<'_, [u8]>, scratch: &mut [u8]) -> Result<()> {
    args.validate(plan, scratch)?;
    let [batch, blocks, rows, heads, d] = args.o.layout.shape;
    let tiles = rows.div_ceil(ROWS);
    let owner = Owner::Tile { heads: 1, rows: ROWS, tiles, first: 0 };
    let parts = [Part::new(&args.a), Part::new(&args.b)];
    let o = Output::new(args.o, owner);
    let lse = args.lse.map(|lse| Output::new(lse, owner));
    let grid = Grid { streams: batch, groups: heads, tiles: blocks.saturating_mul(tiles), spans: None, writes_slots: None };
    run(par, &grid, scratch, 0, &|task, _| {
        let (block, first) = (task.tile() / tiles, task.tile() % tiles * ROWS);
        for token in first..(first + ROWS).min(rows) {
            let at = [task.n(), block, token, task.group()];
            let [a, b] = [0, 1].map(|i| Softmax::one(parts[i].lse.f32(at)[0]));
            let (union, [weight_a, weight_b]) = a.merge(b);
            let weights = mutate!("merge-swapped", [weight_a, weight_b], [weight_b, weight_a]);
            let (mut sum, mut of_part) = ([0.0; MAX_HEAD_DIM], [0.0; MAX_HEAD_DIM]);
            for (part, weight) in parts.iter().zip(weights) {
                // A part of weight 0 may hold NaN.
                if weight != 0.0 {
                    widen::<Scalar>(part.o.row(at), &mut of_part[..padded(d)]);
                    sum.iter_mut().zip(&of_part[..d]).for_each(|(sum, o)| *sum += weight * o);
                }
            }
            match union.is_empty() {
                true => sum.fill(0.0),
                false => sum.iter_mut().for_each(|sum| *sum /= union.row_sum),
            }
            o.write::<Scalar>(task, at, &sum[..d]);
            if let Some(lse) = &lse {
                lse.write::<Scalar>(task, at, &[mutate!("merge-lse", union.lse(), union.row_max)]);
            }
        }
    })
}

/// One part as kernels read it.
pub(crate) struct Part<'a> {
    pub o: Input<'a>,
    pub lse: Input<'a>,
}

impl<'a> Part<'a> {
    pub fn new(part: &Partial<'a, [u8]>) -> Self {
        Part { o: Input::new(&part.o), lse: Input::new(&part.lse) }
    }
}
