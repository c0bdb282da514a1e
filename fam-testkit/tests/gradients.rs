//! The gradient mode proves itself: a right implementation in f32 stays within the bounds, in any order of summation, and wrong ones do not.

#[path = "common/naive.rs"]
mod naive;

use fam_core::{Dtype, Op};
use fam_testkit::{Budget, Event, Filter, Level, Outcome, Report, SuiteOptions, run_suite};
use naive::{MUTANTS, Naive, Order};

fn suite(h: &Naive, op: Op, dtypes: &[Dtype], cases: u64, level: Level, max_failures: usize) -> Report {
    let filter = Filter { ops: vec![op], dtypes: dtypes.to_vec(), ..Filter::default() };
    let budget = Budget::Cases(cases);
    let options = SuiteOptions { gradients: true, budget, filter, level, max_failures, threads: 2, ..SuiteOptions::default() };
    run_suite(h, &options, &mut |event| {
        if let (None, Event::Done { case, outcome: Outcome::Failed(what), .. }) = (h.mutant, event) {
            println!("failed: {case}\n  {what}");
        }
    })
}

/// Cases of a run. With fewer, one large case decides what share is not judged.
fn cases(n: u64) -> u64 {
    std::env::var("FAM_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(n)
}

#[test]
fn a_right_implementation_is_within_the_bounds() {
    for op in Op::BACKWARD {
        // In f32 nothing is rounded but sums and products: the ratio says how close the bounds are.
        let runs = [
            (Order::Forward, Level::Hard, &[Dtype::F32][..]),
            (Order::Backward, Level::Hard, &[Dtype::F32]),
            (Order::Pairs, Level::Stat, &[Dtype::F32]),
            (Order::Pairs, Level::Hard, &[Dtype::F16, Dtype::Bf16]),
        ];
        for (order, level, dtypes) in runs {
            let report = suite(&Naive { order, mutant: None }, op, dtypes, cases(10_000), level, 20);
            println!("{op} {order:?} {level}: {report}");
            assert!(report.is_ok() && report.skipped.is_empty(), "{op} {order:?}:\n{report}");
            let worst = report.worst.as_ref().map_or(0.0, |(worst, _)| worst.ratio);
            assert!(worst > 0.05, "{op} {order:?}: worst {worst}, a bound that nothing comes near");
            assert!(report.vacuous * 8 < report.compared, "{op}: {} of {} are not judged", report.vacuous, report.compared);
        }
    }
}

#[test]
fn every_mutant_is_caught() {
    let mut missed = Vec::new();
    for name in MUTANTS {
        let op = match name.split('-').next() {
            Some("attend") => Op::AttendBackward,
            Some("read") => Op::InfiniReadBackward,
            Some("write") => Op::InfiniWriteBackward,
            _ => Op::MergeBackward,
        };
        let h = Naive { order: Order::Forward, mutant: Some(name) };
        let report = suite(&h, op, &[], cases(8_000), Level::Stat, 1);
        match report.failed.first_key_value() {
            Some((index, failure)) => println!("{name}: case {index}: {}", failure.what.chars().take(160).collect::<String>()),
            None => missed.push(name),
        }
    }
    assert!(missed.is_empty(), "not caught: {missed:?}");
}
