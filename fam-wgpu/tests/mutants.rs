//! Proof of the net: every deliberate error in the shaders is caught by generated cases of a fixed seed, and the shaders raise no alarm.
//!
//! ```text
//! RUSTFLAGS="--cfg fam_mutants" CARGO_TARGET_DIR=target/mutants cargo test --release -p fam-wgpu --test mutants -- --nocapture
//! ```
//!
//! `FAM_MUTANTS=text` plants only those whose name contains the text.
#![cfg(fam_mutants)]

mod common;

use common::{Gpu, device};
use fam_core::Op;
use fam_core::mutants::select;
use fam_testkit::{Budget, Filter, Level, SuiteOptions, run_suite};
use fam_wgpu::MUTANTS;

/// Head dims of the cases, one of fourteen that the generator draws: one whose rows begin in the middle of a word, and one of whole vectors.
const HEAD_DIMS: [usize; 2] = [31, 64];
const CASES: u64 = 14_000;

/// The first generated case that fails, and how.
fn first_alarm(gpu: &Gpu, ops: &[Op]) -> Option<String> {
    HEAD_DIMS.into_iter().find_map(|d| {
        let filter = Filter { text: format!(" D={d} "), ops: ops.to_vec(), ..Filter::default() };
        let budget = Budget::Cases(CASES);
        let options = SuiteOptions { filter, budget, level: Level::Hard, threads: 2, max_failures: 1, ..SuiteOptions::default() };
        let report = run_suite(gpu, &options, &mut |_| ());
        report.failed.first_key_value().map(|(index, failure)| format!("check {index}, {}: {}", failure.case, failure.what))
    })
}

/// The ops that a mutant is an error in, or all.
fn ops(name: &str) -> &'static [Op] {
    match name.split('-').next() {
        Some("attend" | "few") => &[Op::Attend],
        Some("append") => &[Op::Append],
        Some("merge") => &[Op::Merge],
        _ => &Op::FORWARD,
    }
}

/// One test: the selected mutant is global.
#[test]
fn every_mutant_is_caught() {
    let gpu = Gpu(device());
    select(None);
    let alarm = first_alarm(&gpu, &Op::FORWARD);
    assert!(alarm.is_none(), "the shaders themselves: {alarm:?}");

    let part = std::env::var("FAM_MUTANTS").unwrap_or_default();
    let mut missed = Vec::new();
    for (name, ..) in MUTANTS.iter().filter(|(name, ..)| name.contains(&part)) {
        select(Some(name));
        match first_alarm(&gpu, ops(name)) {
            Some(what) => println!("{name}: {}", what.chars().take(200).collect::<String>()),
            None => missed.push(name),
        }
    }
    select(None);
    assert!(missed.is_empty(), "not caught: {missed:?}");
}
