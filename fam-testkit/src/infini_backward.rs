//! Cases of `infini_read_backward`, and of `infini_write_backward`, whose segments are each checked from the backend's own gradient of what
//! they wrote.

use crate::case::Case;
use crate::check::Checker;
use crate::data::{Data, Role};
use crate::gradient::{Collected, Output, Start, old};
use crate::gradient_bound::infini::{self, ReadBounds, Segment, WriteBounds};
use crate::guard::{POISON, Tensor};
use crate::harness::Harness;
use crate::launch::{Loaded, LoadedSpans, Region, Stop, digest, plan};
use crate::runner::{Passed, conclude};
use crate::tolerance::Level;
use fam_core::{Backend, InfiniReadBackward, InfiniState, InfiniWriteBackward, Result};
use fam_ref::Array;

/// Runs one case of `infini_read_backward`.
pub(crate) fn read<H: Harness + ?Sized>(h: &H, case: &Case, level: Level) -> Result<Passed, Stop> {
    let (limits, data) = (h.limits(), Data::new(case));
    let mut checker = Checker::new(level, case.shape.dtype(), case.out_dtype, &limits);
    let bounds = infini::read(case, &data)?;
    let gradients = launch_read(h, case, &data, &bounds, Start::Random)?;
    for gradient in &gradients {
        let bound = match gradient.role() {
            Role::DInfiniQ => &bounds.d_q,
            Role::DOLocal => &bounds.d_o_local,
            Role::DM => &bounds.d_m,
            Role::DZ => &bounds.d_z,
            _ => &bounds.d_beta,
        };
        gradient.check(&mut checker, bound, Level::Hard);
    }
    let values: Vec<Array<5>> = gradients.iter().map(|gradient| gradient.values(case)).collect();
    conclude(case, checker, digest(values.iter()))
}

/// Runs the read's backward pass on `data`.
pub(crate) fn launch_read<H: Harness + ?Sized>(
    h: &H,
    case: &Case,
    data: &Data,
    bounds: &ReadBounds,
    start: Start,
) -> Result<Vec<Collected>, Stop> {
    let plan = plan(h, &case.spec()?)?;
    let input = |role| Loaded::input(h, case, data, role, POISON);
    let (q, m, z, beta) = (input(Role::InfiniQ)?, input(Role::M)?, input(Role::Z)?, input(Role::Beta)?);
    let (o_local, d_o) = (input(Role::OLocal)?, input(Role::DO)?);
    let mut d_q = Output::written(h, case, Role::DInfiniQ)?;
    let mut d_o_local = Output::written(h, case, Role::DOLocal)?;
    let added = |role, bound| Output::added(h, case, role, bound, start);
    let state = || Ok::<_, Stop>([added(Role::DM, &bounds.d_m)?, added(Role::DZ, &bounds.d_z)?]);
    let mut d_state = case.gradients.state.then(state).transpose()?;
    let mut d_beta = case.gradients.beta.then(|| added(Role::DBeta, &bounds.d_beta)).transpose()?;
    let spans = LoadedSpans::new(h, case)?;
    let mut scratch = Region::scratch(h, &plan)?;
    h.run(&mut |queue| {
        let state = InfiniState { q: q.view(), m: m.view(), z: z.view(), beta: beta.view() };
        let (d_q, d_o_local) = (d_q.view_mut(), d_o_local.view_mut());
        let mut args = InfiniReadBackward::new(spans.spans(), state, o_local.view(), d_o.view(), d_q, d_o_local);
        if let Some([d_m, d_z]) = &mut d_state {
            args = args.d_state(d_m.view_mut(), d_z.view_mut());
        }
        if let Some(d_beta) = &mut d_beta {
            args = args.d_beta(d_beta.view_mut());
        }
        h.backend().infini_read_backward(&plan, queue, args, scratch.mem_mut())
    })?;
    [&q, &m, &z, &beta, &o_local, &d_o].into_iter().try_for_each(|input| input.check(h))?;
    spans.check(h)?;
    scratch.check(h)?;
    let outputs = [d_q, d_o_local].into_iter().chain(d_state.into_iter().flatten()).chain(d_beta);
    outputs.map(|output| output.finish(h)).collect()
}

/// Runs one case of `infini_write_backward`.
pub(crate) fn write<H: Harness + ?Sized>(h: &H, case: &Case, level: Level) -> Result<Passed, Stop> {
    let (limits, data) = (h.limits(), Data::new(case));
    let mut checker = Checker::new(level, case.shape.dtype(), case.out_dtype, &limits);
    let [d_keys, d_state] = launch_write(h, case, &data)?;
    let [d_m, d_z] = &d_state[..] else { return Err(Stop::Failed("no gradients of the state".into())) };
    let bounds = bounds(case, &data, [d_m.tensor(), d_z.tensor()])?;
    for gradient in d_keys.iter().chain(&d_state) {
        let bound = match gradient.role() {
            Role::DK => &bounds.d_keys[0],
            Role::DV => &bounds.d_keys[1],
            Role::DM => &bounds.d_m,
            _ => &bounds.d_z,
        };
        gradient.check(&mut checker, bound, Level::Hard);
    }
    let values: Vec<Array<5>> = d_keys.iter().chain(&d_state).map(|gradient| gradient.values(case)).collect();
    conclude(case, checker, digest(values.iter()))
}

/// Runs the write's backward pass on `data`: gradients of keys, where they are asked for, and of the state.
fn launch_write<H: Harness + ?Sized>(h: &H, case: &Case, data: &Data) -> Result<[Vec<Collected>; 2], Stop> {
    let plan = plan(h, &case.spec()?)?;
    let input = |role| Loaded::input(h, case, data, role, POISON);
    let (k, v, m, z) = (input(Role::K)?, input(Role::V)?, input(Role::M)?, input(Role::Z)?);
    // What arrives at the last segment, and the size of what the others will get.
    let arriving = [Role::DM, Role::DZ].map(|role| old(case, role, Start::Random));
    let sizes = bounds(case, data, [&arriving[0], &arriving[1]])?;
    let added = |role, bound| Output::added(h, case, role, bound, Start::Random);
    let (mut d_m, mut d_z) = (added(Role::DM, &sizes.d_m)?, added(Role::DZ, &sizes.d_z)?);
    let [of_k, of_v] = &sizes.d_keys;
    let keys = || Ok::<_, Stop>([added(Role::DK, of_k)?, added(Role::DV, of_v)?]);
    let mut d_keys = case.gradients.keys.then(keys).transpose()?;
    let spans = LoadedSpans::new(h, case)?;
    let mut scratch = Region::scratch(h, &plan)?;
    h.run(&mut |queue| {
        let (kv, state, d_state) = ([k.view(), v.view()], [m.view(), z.view()], [d_m.view_mut(), d_z.view_mut()]);
        let mut args = InfiniWriteBackward::new(spans.spans(), kv, state, d_state);
        if let Some([d_k, d_v]) = &mut d_keys {
            args = args.d_keys(d_k.view_mut(), d_v.view_mut());
        }
        h.backend().infini_write_backward(&plan, queue, args, scratch.mem_mut())
    })?;
    [&k, &v, &m, &z].into_iter().try_for_each(|input| input.check(h))?;
    spans.check(h)?;
    scratch.check(h)?;
    let d_keys = d_keys.into_iter().flatten().map(|output| output.finish(h)).collect::<Result<_, Stop>>()?;
    Ok([d_keys, vec![d_m.finish(h)?, d_z.finish(h)?]])
}

/// What each segment adds, given the gradients of the states that they wrote.
fn bounds(case: &Case, data: &Data, [d_m, d_z]: [&Tensor; 2]) -> Result<WriteBounds> {
    let (d, b) = (case.shape.head_dim(), case.shape.block_len() as u64);
    let mut bounds = WriteBounds::new(case);
    for (n, span) in case.spans.iter().enumerate().filter(|(_, span)| span.len > 0) {
        let completed = (span.end() / b - span.start / b) as usize;
        // What one segment of a stream and head reads may reach all gradients of that stream and head.
        let of_head = |head: usize| {
            let all = [Role::K, Role::V, Role::M, Role::Z].map(|role| data.get(role));
            let rows = all.into_iter().flat_map(|values| {
                let [_, blocks, rows, ..] = values.shape;
                (0..blocks * rows).map(move |at| values.row(&[n, at / rows, at % rows, head]))
            });
            rows.flatten().all(|x| x.is_finite())
        };
        let is_finite: Vec<bool> = (0..case.shape.kv_heads()).map(of_head).collect();
        for (i, head) in (0..completed).flat_map(|i| (0..case.shape.kv_heads()).map(move |head| (i, head))) {
            let written = (span.state_entry as usize + i + 1) % case.state_entries;
            let (mut of_m, mut of_z) = (vec![0.0; d * d], vec![0.0; d]);
            for (r, row) in of_m.chunks_exact_mut(d).enumerate() {
                d_m.get([span.slot as usize, written, r, head], row);
            }
            d_z.get([span.slot as usize, written, 0, head], &mut of_z);
            let m: Vec<f64> = (0..d).flat_map(|r| data.get(Role::M).row(&[n, i, r, head])).copied().collect();
            let first = (span.start / b + i as u64) * b;
            let segment = Segment {
                at: [n, i, head],
                first: (first >= span.origin).then(|| (first - case.first_key(span)) as usize),
                m: &m,
                z: data.get(Role::Z).row(&[n, i, 0, head]),
                d_m: &of_m,
                d_z: &of_z,
                is_finite: is_finite[head],
            };
            bounds.segment(case, data, &segment)?;
        }
    }
    Ok(bounds)
}
