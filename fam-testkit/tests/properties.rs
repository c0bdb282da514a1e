//! The contract's section 7, and the life of streams, on the CPU backend.

mod common;

use common::CpuHarness;
use fam_testkit::{Outcome, PROPERTIES, run_property, run_streams};

#[test]
fn every_property() {
    let harnesses = [CpuHarness::serial(), CpuHarness::pool(3)];
    for property in PROPERTIES {
        let started = std::time::Instant::now();
        for seed in 0..60u64 {
            let h = &harnesses[seed as usize % 2];
            match run_property(h, property, seed) {
                Outcome::Passed(_) => {}
                other => panic!("property {property}, seed {seed}: {other:?}"),
            }
        }
        println!("{property}: {:.2} s", started.elapsed().as_secs_f64());
    }
}

#[test]
fn streams_under_random_events() {
    let harnesses = [CpuHarness::serial(), CpuHarness::pool(3)];
    let outcomes = (0..400u64).map(|seed| (seed, run_streams(&harnesses[seed as usize % 2], seed)));
    let wrong: Vec<_> = outcomes.filter(|(_, outcome)| !matches!(outcome, Outcome::Passed(_))).collect();
    assert!(wrong.is_empty(), "{} of 400: {wrong:#?}", wrong.len());
}
