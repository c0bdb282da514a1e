//! Proof of the net: every deliberate error in the shipped code is caught by one run of a fixed seed, and the code itself raises no alarm.
//!
//! ```text
//! RUSTFLAGS="--cfg fam_mutants" cargo test --release -p fam-testkit --test mutants
//! ```
//!
//! `FAM_MUTANTS=text` runs only those whose name contains the text.
#![cfg(fam_mutants)]

mod common;

use common::CpuHarness;
use fam_core::mutants::select;
use fam_testkit::{Budget, Harness, Level, Outcome, PROPERTIES, SuiteOptions, run_property, run_streams, run_suite};
use std::collections::BTreeMap;

/// Errors in `fam_core::Streams`.
const STREAMS: [&str; 4] =
    ["streams-stale-ring-row", "streams-flip-before-write", "streams-reset-keeps-m", "infini-rotated-keys"];
/// Cases of a run; each property, and the random life of streams, takes part with `SEEDS` more.
const CASES: u64 = 9_000;
const SEEDS: u64 = 40;

/// What the run finds first, and after how many cases. The ops of the pass that `name` is an error in come first.
fn first_alarm(h: &CpuHarness, name: &str) -> Option<(u64, String)> {
    let is_backward = name.contains("backward");
    for gradients in [is_backward, !is_backward] {
        let budget = Budget::Cases(CASES);
        let options =
            SuiteOptions { gradients, budget, level: Level::Stat, threads: 2, max_failures: 1, ..SuiteOptions::default() };
        let report = run_suite(h, &options, &mut |_| {});
        if let Some((index, failure)) = report.failed.first_key_value() {
            return Some((*index, format!("{}: {}", failure.case, failure.what)));
        }
        if let Some((dtype, share)) = report.biased() {
            return Some((CASES, format!("bias of {dtype} outputs: {share}")));
        }
    }
    let problems =
        (0..SEEDS).flat_map(|seed| PROPERTIES.map(Some).into_iter().chain([None]).map(move |property| (property, seed)));
    problems.enumerate().find_map(|(i, (property, seed))| {
        let (name, outcome) = match property {
            Some(property) => (property.to_string(), run_property(h, property, seed)),
            None => ("streams".into(), run_streams(h, seed)),
        };
        match outcome {
            Outcome::Failed(what) => Some((CASES + i as u64, format!("{name}, seed {seed}: {what}"))),
            _ => None,
        }
    })
}

/// One test: the selected mutant is global.
#[test]
fn every_mutant_is_caught() {
    std::panic::set_hook(Box::new(|_| {}));
    // Planned for so many threads that most cases of few rows share their keys among tasks.
    let h = CpuHarness::serial_planned_for(8);
    select(None);
    let alarm = first_alarm(&h, "");
    assert!(alarm.is_none(), "the code itself: {alarm:?}");

    let mut missed = Vec::new();
    let mut counts: BTreeMap<&str, u32> = BTreeMap::new();
    // The products of pairs run at one level alone.
    let runs = |name: &str| !name.contains("pair") || !h.backend().isa().pairs().is_empty();
    let wanted = |name: &&str| runs(name) && std::env::var("FAM_MUTANTS").map_or(true, |text| name.contains(&text));
    for name in fam_cpu::MUTANTS.iter().copied().chain(STREAMS).filter(wanted) {
        select(Some(name));
        match first_alarm(&h, name) {
            Some((cases, what)) => {
                println!("{name}: case {cases}: {}", what.chars().take(300).collect::<String>());
                *counts.entry(name.split('-').next().unwrap()).or_default() += 1;
            }
            None => missed.push(name),
        }
    }
    select(None);
    let _ = std::panic::take_hook();
    println!("caught {counts:?}");
    assert!(missed.is_empty(), "not caught: {missed:?}");
    if std::env::var_os("FAM_MUTANTS").is_some() {
        return;
    }
    for (op, least) in [("attend", 18), ("infini", 6), ("merge", 3), ("streams", 3)] {
        assert!(counts.get(op).is_some_and(|&n| n >= least), "{op}: {counts:?}, at least {least}");
    }
}
