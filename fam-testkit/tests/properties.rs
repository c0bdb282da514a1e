//! The contract's section 7 on the CPU backend.

mod common;

use common::CpuHarness;
use fam_testkit::{Outcome, PROPERTIES, run_property};

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
