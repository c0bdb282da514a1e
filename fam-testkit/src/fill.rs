//! The values of a case's tensors: rows of its distribution, gates, sinks, and compressive memories.

use crate::case::{Case, Strides};
use crate::data::Role::{self, Beta, DLse, DMemLse, DMemO, DO, InfiniQ, K, M, MemK, MemQ, MemV, OLocal, Q, V};
use crate::distribution::{Distribution, Source, round};
use crate::rng::Rng;
use fam_core::{Dtype, Op};
use fam_ref::Array;

/// Fills one tensor row by row. Tensors draw from generators of their own, so that one never depends on another's size.
pub(crate) fn fill(case: &Case, role: Role, distribution: Distribution) -> Array<5> {
    let s = &case.shape;
    let [n, i, rows, heads, d] = case.sizes(role);
    let mut values = Array::zeros([n, i, rows, heads, d]);
    // q and k share the family's structure (direction, exponents), which the first draws decide; values then differ by tensor.
    let keys = case.sizes(K)[2];
    let family = if matches!(role, InfiniQ) { "infini" } else { "family" };
    let mut source =
        Source::new(distribution, s.dtype(), [s.heads(), s.head_dim()], case.scale(), keys, Rng::of(case.seed, family));
    source.reseed(Rng::of(case.seed, role.name()));
    let mut rng = Rng::of(case.seed, role.name());
    // A sink of −inf is none.
    let mut absent = Rng::of(case.seed, "absent sinks");
    let mut below = Rng::of(case.seed, "rows below zero");
    for n in 0..n {
        for i in 0..i {
            for r in 0..rows {
                for h in 0..heads {
                    let row = values.row_mut(&[n, i, r, h]);
                    match role {
                        InfiniQ => {
                            source.query(row);
                            sink_below_zero(row, f64::NEG_INFINITY, s.dtype(), &mut below);
                        }
                        K if matches!(case.op, Op::InfiniWrite | Op::InfiniWriteBackward) => {
                            source.key(r, h, row);
                            // The domain of σ that the bounds hold in.
                            sink_below_zero(row, -80.0, s.dtype(), &mut below);
                        }
                        Q | MemQ => source.query(row),
                        K | MemK => source.key(r, h, row),
                        V | MemV => source.value(r, h, row),
                        // f32 digits, in the range of the output.
                        OLocal => {
                            source.value(r, h, row);
                            row.iter_mut().for_each(|x| *x = round(*x * (1.0 - rng.unit() / 512.0), Dtype::F32));
                        }
                        DO | DMemO => {
                            source.value(r, h, row);
                            row.iter_mut().for_each(|x| *x = round(*x * (1.0 - rng.unit() / 512.0), case.out_dtype));
                        }
                        DLse | DMemLse => row[0] = rng.normal() as f32 as f64,
                        Beta => row[0] = beta(&mut rng),
                        _ if absent.chance(1, 8) => row[0] = f64::NEG_INFINITY,
                        _ => row[0] = sink(distribution, &mut rng),
                    }
                }
            }
        }
    }
    values
}

/// Moves one row in eight down until all of it is at or below 0, and raises what is below `least`: without a shift by the largest, σ is
/// so small there that products with it are lost.
fn sink_below_zero(row: &mut [f64], least: f64, dtype: Dtype, rng: &mut Rng) {
    if rng.chance(1, 8) {
        let below = rng.pick(&[0.0, 3.0, 30.0, 70.0, 100.0, 200.0]);
        row.iter_mut().for_each(|x| *x = round(-x.abs() - below, dtype));
    }
    row.iter_mut().for_each(|x| *x = x.max(least));
}

/// A gate's logit: mostly open or shut by some share, now and then as far as f32 tells, and beyond.
fn beta(rng: &mut Rng) -> f64 {
    let usual = rng.pick(&[0.5, 1.0, 4.0]) * rng.normal();
    let far = rng.sign() * rng.pick(&[12.0, 17.0, 30.0, 90.0, 100.0]);
    (if rng.chance(1, 6) { far } else { usual }) as f32 as f64
}

/// A sink's logit: among those of keys, far above or below them, and a quarter of the largest that there is.
fn sink(distribution: Distribution, rng: &mut Rng) -> f64 {
    let usual = 4.0 * rng.normal();
    let far = rng.sign() * rng.pick(&[20.0, 80.0, 95.0, 200.0, 1e4, f64::from(f32::MAX) / 4.0]);
    // No weight may underflow beside an infinite value.
    let may_be_far = distribution != Distribution::NonFinite;
    (if rng.chance(1, 6) && may_be_far { far } else { usual }) as f32 as f64
}

/// What the compressive memory of one head is like.
#[derive(Clone, Copy, PartialEq)]
enum State {
    /// As it starts.
    Zero,
    /// A few tokens have been written to it.
    Usual,
    /// Of tokens whose keys were far below 0.
    Faint,
    /// After a long stream.
    Large,
    /// The same number everywhere.
    Constant,
}

/// A compressive memory: head by head another.
pub(crate) fn state(case: &Case, role: Role) -> Array<5> {
    let [n, i, rows, heads, d] = case.sizes(role);
    let mut values = Array::zeros([n, i, rows, heads, d]);
    let mut kinds = Rng::of(case.seed, "state");
    let mut rng = Rng::of(case.seed, role.name());
    // Where entries share memory, m of one entry may meet z of another: their ratio must be an output still.
    let kind = match case.strides {
        Strides::Broadcast => &[State::Zero, State::Usual, State::Usual, State::Usual][..],
        _ => &[State::Zero, State::Zero, State::Usual, State::Usual, State::Usual, State::Faint, State::Large, State::Constant],
    };
    for n in 0..n {
        for i in 0..i {
            for h in 0..heads {
                let kind = kinds.pick(kind);
                for r in 0..rows {
                    for x in values.row_mut(&[n, i, r, h]) {
                        let usual = if role == M { 3.0 * rng.normal() } else { 0.1 + 9.0 * rng.unit() };
                        let value = match kind {
                            State::Zero => 0.0,
                            State::Usual => usual,
                            State::Faint => 1e-20 * usual,
                            State::Large => 3e5 * usual,
                            State::Constant => {
                                if role == M {
                                    -1.5
                                } else {
                                    2.0
                                }
                            }
                        };
                        *x = value as f32 as f64;
                    }
                }
            }
        }
    }
    values
}
