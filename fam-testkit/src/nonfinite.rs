//! NaN and infinities at random places of one tensor ([`crate::Distribution::NonFinite`]).
//!
//! One kind a case, so that IEEE arithmetic in any order gives one answer: of logits −inf is a weight of 0, +inf and NaN make the row
//! NaN; of values an infinity stays one, unless another of the other sign is seen too.

use crate::case::Case;
use crate::data::{Data, Role};
use crate::distribution::round;
use crate::rng::Rng;
use fam_core::Op;

/// Puts a few non-finite values into the data of a case.
pub(crate) fn spoil(case: &Case, data: &mut Data) {
    let mut rng = Rng::of(case.seed, "non-finite");
    let kinds = [f64::NAN, f64::NAN, f64::INFINITY, f64::NEG_INFINITY];
    match case.op {
        Op::Attend if rng.chance(1, 4) => hide_keys(case, data, &mut rng),
        // Infinities in σ would leave the order of sums to decide.
        Op::Attend if case.fused && rng.chance(1, 4) => {
            let role = rng.pick(&[Role::InfiniQ, Role::M, Role::Z, Role::Beta]);
            scatter(case, data, role, &[f64::NAN], &mut rng);
        }
        Op::Attend if case.sink && rng.chance(1, 4) => scatter(case, data, Role::Sink, &[f64::NAN], &mut rng),
        Op::Attend => {
            let role = rng.pick(&[Role::Q, Role::MemQ, Role::K, Role::V, Role::MemK, Role::MemV]);
            scatter(case, data, role, &kinds, &mut rng);
        }
        // What a NaN or an infinity reaches is unspecified.
        Op::AttendBackward => {
            let role =
                rng.pick(&[Role::Q, Role::MemQ, Role::K, Role::V, Role::MemK, Role::MemV, Role::DO, Role::DMemO, Role::DLse]);
            scatter(case, data, role, &kinds, &mut rng);
        }
        Op::InfiniReadBackward => {
            let role = rng.pick(&[Role::OLocal, Role::InfiniQ, Role::M, Role::Z, Role::Beta, Role::DO]);
            scatter(case, data, role, &kinds, &mut rng);
        }
        Op::InfiniRead => {
            let role = rng.pick(&[Role::OLocal, Role::InfiniQ, Role::M, Role::Z, Role::Beta]);
            scatter(case, data, role, if role == Role::OLocal { &kinds } else { &[f64::NAN] }, &mut rng);
        }
        Op::InfiniWrite | Op::InfiniWriteBackward => {
            let role = rng.pick(&[Role::V, Role::K, Role::M, Role::Z]);
            scatter(case, data, role, if role == Role::V { &kinds } else { &[f64::NAN] }, &mut rng);
        }
        Op::Append => {
            for role in [Role::K, Role::V, Role::MemK, Role::MemV] {
                scatter(case, data, role, &kinds, &mut rng);
            }
        }
        _ => {}
    }
}

/// At one to four places of rows that the call sees.
fn scatter(case: &Case, data: &mut Data, role: Role, kinds: &[f64], rng: &mut Rng) {
    let (places, values) = (case.places(role), data.get_mut(role));
    let [.., heads, d] = values.shape;
    if places.is_empty() {
        return;
    }
    let (count, kind) = (1 + rng.below(4), rng.pick(kinds));
    for _ in 0..count {
        let [n, i, r] = rng.pick(&places).value;
        values.row_mut(&[n, i, r, rng.below(heads)])[rng.below(d)] = kind;
    }
}

/// A run of keys whose logit is −inf for every query: rows that see only those are empty.
fn hide_keys(case: &Case, data: &mut Data, rng: &mut Rng) {
    let [.., d] = data.get(Role::K).shape;
    let c = rng.below(d);
    for role in [Role::Q, Role::MemQ] {
        data.get_mut(role).data.iter_mut().skip(c).step_by(d).for_each(|q| *q = round(q.abs() + 0.5, case.shape.dtype()));
    }
    let hide_memory = rng.chance(2, 3);
    if hide_memory {
        data.get_mut(Role::MemK).data.iter_mut().skip(c).step_by(d).for_each(|k| *k = f64::NEG_INFINITY);
    }
    let [batch, _, rows, heads, _] = data.get(Role::K).shape;
    let hidden = if rng.chance(1, 2) { rows } else { rng.below(rows + 1) };
    for n in 0..batch {
        for r in 0..hidden {
            for h in 0..heads {
                data.get_mut(Role::K).row_mut(&[n, 0, r, h])[c] = f64::NEG_INFINITY;
            }
        }
    }
}
