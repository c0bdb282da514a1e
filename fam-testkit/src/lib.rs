//! Conformance tests for attention backends, ours or a third party's: hand [`run_suite`] a [`Harness`] and every op of the contract
//! ([`fam_core`]) is held against the f64 reference ([`fam_ref`]), byte by byte and number by number.
//!
//! | page | what |
//! |---|---|
//! | [`Harness`] | what a backend under test provides: itself, and how to run work on a queue |
//! | [`Case`], [`Filter`], [`Distribution`] | the test table: every case a pure function of one printed `u64` seed |
//! | [`run_case`], [`run_suite`], [`Report`], [`Coverage`] | running it, on several threads, with the seed told before each launch |
//! | [`Level`], [`Bound`], [`Limits`], [`Tally`] | the bounds, derived from each row's own conditioning, what a backend declares, and the one comparison |
//! | [`PROPERTIES`], [`Property`], [`run_property`] | the contract's section 7: what must agree bit for bit, and what within the bound |
//! | [`run_streams`] | [`fam_core::Streams`] under random events: steps, drops, rollbacks, copies, snapshots, resets, bad calls |
//! | [`invalid_calls`] | calls that must be refused, with nothing written |
//! | [`CaseFile`], [`replay`], [`run_file`], [`Reference`] | case files: recorded tensors replayed in three [`Mode`]s, and anybody's output file judged |
//! | [`case_file`] | a generated case as a file with expected outputs |
//!
//! Inputs lie in buffers whose every other byte is NaN ([`POISON`]), outputs in buffers whose every other byte is a canary
//! ([`CANARY`]); class (NaN, ±inf, the exact zero of an empty row) is compared before numbers, numbers with a bound that is
//! computed for each element. A case that fails prints its seed: [`Case::from_seed`] and [`run_case`] replay it.

#![forbid(unsafe_code)]

mod append;
mod attend;
mod attend_backward;
mod case;
mod casefile;
mod check;
mod coverage;
mod data;
mod distribution;
mod draw;
mod endless;
mod fill;
mod finite;
mod generate;
mod gradient;
mod gradient_bound;
mod guard;
mod harness;
mod infini_backward;
mod infini_read;
mod infini_write;
mod invalid;
mod judge;
mod launch;
mod merge;
mod merge_backward;
mod nonfinite;
mod oracle;
mod properties;
mod replay;
mod rng;
mod rows;
mod runner;
mod streams;
mod tolerance;
mod wild;

pub use case::{Case, Filter, Gradients, KeySource, Strides, Style};
pub use casefile::{CaseFile, InfiniCase, OUTPUTS, Tensor, read_file, read_outputs, write_outputs};
pub use check::{Bias, Element, Tally, Worst, Wrong, edges};
pub use coverage::Coverage;
pub use distribution::Distribution;
pub use endless::{Endless, endless};
pub use generate::case_file;
pub use guard::{CANARY, POISON};
pub use harness::{Harness, Mem, Owned, Queue};
pub use invalid::invalid_calls;
pub use judge::{Reference, Verdict};
pub use oracle::{attention_oracle, layer_oracle, merge_oracle};
pub use properties::{PROPERTIES, Property, run_property};
pub use replay::{Mode, replay, run_file};
pub use rng::{Rng, case_seed};
pub use runner::{BIAS_CASES, BIAS_SHARE, Budget, Event, Failure, Outcome, Passed, Report, SuiteOptions, run_case, run_suite};
pub use streams::run_streams;
pub use tolerance::{
    Bound, Condition, Level, Limits, NanReach, Term, Tolerance, infini_read as infini_read_bound,
    infini_write as infini_write_bounds, lost_to_flush, merged_lse, tiny,
};
