//! Gradients of a merge (contract section 8).
//!
//! ```text
//! p_x = w_x / (w_a + w_b)        d_o_x = p_x d_o        d_lse_a = p_a (p_b d_o·(o_a − o_b) + d_lse)
//! ```
//!
//! o_a − o is p_b (o_a − o_b), so that the o of the union is not needed.

use crate::CpuPlan;
use crate::convert::widen;
use crate::memory::Input;
use crate::merge::{Part, ROWS};
use crate::pack::padded;
use crate::parallel::output::{Output, Owner};
use crate::parallel::{Grid, Par, run};
use crate::softmax::Softmax;
use crate::tile::MAX_HEAD_DIM;
use crate::vector::scalar::Scalar;
use fam_core::{MergeBackward, Result, mutate};

/// [`fam_core::Backend::merge_backward`].
pub(crate) fn merge_backward(plan: &CpuPlan, par: &Par<'_>, args: MergeBackward<'_, [u8]>, scratch: &mut [u8]) -> Result<()> {
    args.validate(plan, scratch)?;
    let [batch, blocks, rows, heads, d] = args.d_o.layout.shape;
    let tiles = rows.div_ceil(ROWS);
    let owner = Owner::Tile { heads: 1, rows: ROWS, tiles, first: 0 };
    let parts = [Part::new(&args.a), Part::new(&args.b)];
    let (d_o, d_lse) = (Input::new(&args.d_o), args.d_lse.as_ref().map(Input::new));
    let gradients = [args.d_a, args.d_b].map(|part| (Output::new(part.d_o, owner), Output::new(part.d_lse, owner)));
    let grid = Grid { streams: batch, groups: heads, tiles: blocks.saturating_mul(tiles), spans: None, writes_slots: None };
    run(par, &grid, scratch, 0, &|task, _| {
        let (block, first) = (task.tile() / tiles, task.tile() % tiles * ROWS);
        for token in first..(first + ROWS).min(rows) {
            let at = [task.n(), block, token, task.group()];
            let [a, b] = [0, 1].map(|i| Softmax::one(parts[i].lse.f32(at)[0]));
            let (union, weights) = a.merge(b);
            // Two empty parts have no sum to be shares of.
            let p = weights.map(|w| if w == 0.0 { 0.0 } else { w / union.row_sum });
            let [mut upstream, mut o] = [[0.0; MAX_HEAD_DIM]; 2];
            widen::<Scalar>(d_o.row(at), &mut upstream[..padded(d)]);
            let upstream = &mut upstream[..d];
            // d_o·(o_a − o_b); beside a part of weight 0, which may hold NaN, nothing is shared.
            let apart = if p[0] == 0.0 || p[1] == 0.0 {
                0.0
            } else {
                let mut o_b = [0.0; MAX_HEAD_DIM];
                widen::<Scalar>(parts[0].o.row(at), &mut o[..padded(d)]);
                widen::<Scalar>(parts[1].o.row(at), &mut o_b[..padded(d)]);
                upstream.iter().zip(o[..d].iter().zip(&o_b)).fold(0.0, |sum, (d_o, (a, b))| sum + d_o * (a - b))
            };
            let d_lse = d_lse.as_ref().map_or(0.0, |d_lse| d_lse.f32(at)[0]);
            for (i, (d_o_of_part, d_lse_of_part)) in gradients.iter().enumerate() {
                let between = mutate!("merge-backward-other", p[1 - i], 1.0) * [apart, -apart][i];
                let through_lse = mutate!("merge-backward-lse", d_lse, 0.0);
                d_lse_of_part.write::<Scalar>(task, at, &[if p[i] == 0.0 { 0.0 } else { p[i] * (between + through_lse) }]);
                // An empty part gets +0, whatever the sign of d_o.
                o[..d].iter_mut().zip(&*upstream).for_each(|(o, d_o)| *o = if p[i] == 0.0 { 0.0 } else { p[i] * d_o });
                d_o_of_part.write::<Scalar>(task, at, &o[..d]);
            }
        }
    })
}
