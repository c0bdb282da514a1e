//! The same call has the same bits however often it is made, and a stream stays within the bound however long it is.

mod common;

use common::{Gpu, adapter, device};
use fam_core::Op;
use fam_testkit::{
    Case, CaseFile, Distribution, Filter, Harness, Level, Outcome, Strides, case_file, case_seed, endless, run_case,
};

/// The first finite cases of an op that fill more than a tile and are quickly judged.
fn cases(op: Op, count: usize) -> Vec<Case> {
    let filter = Filter { ops: vec![op], ..Filter::default() };
    let cases = (0..).filter_map(|i| Case::generate(case_seed(7, i), &filter));
    let plain = cases.filter(|c| c.distribution != Distribution::NonFinite && c.shape.head_dim() >= 16 && c.len() > 16);
    plain.filter(|c| (50_000..500_000).contains(&c.work())).take(count).collect()
}

/// Of all that a case leaves.
fn digest(gpu: &Gpu, case: &Case) -> u64 {
    match run_case(gpu, case, Level::Hard) {
        Outcome::Passed(passed) => passed.digest,
        other => panic!("{case}: {other:?}"),
    }
}

/// A maximum is one number, whichever way threads share it.
#[test]
fn the_same_bits_without_the_features_of_the_device() {
    let plain = pollster::block_on(adapter().open(Some(adapter().limits()))).expect("a device");
    let [all, plain] = [device(), plain].map(Gpu);
    assert!(!plain.0.variant().0.contains('-'), "{:?}", plain.0.variant());
    for case in cases(Op::Attend, 10) {
        assert_eq!(digest(&all, &case), digest(&plain, &case), "{case}");
    }
}

/// Rows that are read as vectors of four channels, and rows that lie so that they are not: many of a block, and few.
#[test]
fn the_same_bits_wherever_rows_begin() {
    let gpu = Gpu(device());
    let filter = Filter { ops: vec![Op::Attend], ..Filter::default() };
    let few = (0..).filter_map(|i| Case::generate(case_seed(8, i), &filter));
    let few = few.filter(|c| c.distribution != Distribution::NonFinite && c.len() <= 2 && c.work() < 500_000);
    let in_fours = |case: &Case| case.shape.head_dim().is_multiple_of(4);
    for case in cases(Op::Attend, 30).into_iter().filter(in_fours).take(6).chain(few.filter(in_fours).take(6)) {
        let [packed, padded] = [Strides::Packed, Strides::Padded].map(|strides| {
            let mut case = case.clone();
            case.strides = strides;
            digest(&gpu, &case)
        });
        assert_eq!(packed, padded, "{case}");
    }
}

#[test]
fn the_same_bits_250_times() {
    let gpu = Gpu(device());
    let digest = |case: &Case| digest(&gpu, case);
    let ops = [(Op::Attend, 3), (Op::InfiniRead, 1), (Op::InfiniWrite, 1), (Op::Merge, 1)];
    for case in ops.into_iter().flat_map(|(op, count)| cases(op, count)) {
        let first = digest(&case);
        for repeat in 1..250 {
            assert_eq!(digest(&case), first, "repeat {repeat} of {case}");
        }
    }
}

/// Every block of the stream is judged from the state that the backend itself had before it.
fn stream(gpu: &impl Harness<Backend = fam_wgpu::Wgpu>, case: &CaseFile, what: &str) {
    let shown = endless(gpu, case, 1000, 1000, 1, &mut |_| ()).expect("a stream");
    println!("{what}: worst {} of its bound", shown.worst);
    assert_eq!((shown.checked, &shown.wrong), (1000, &None), "{what}");
    assert!(shown.worst > 0.0 && shown.worst <= 1.0, "{what}: {}", shown.worst);
    assert_eq!(shown.repeated > 0, case.infini.is_none(), "{what}");
}

#[test]
fn a_thousand_steps_each_within_the_bound() {
    let gpu = Gpu(device());
    // Of each kind the first generated problem with two whole blocks, and memory rows or a compressive memory.
    for is_infini in [false, true] {
        let mut files = (0..).map(|i| Case::from_seed(case_seed(11, i))).filter(|c| {
            let s = &c.shape;
            let is_small = s.head_dim() >= 16 && s.head_dim() <= 64 && (5..=40).contains(&s.block_len()) && c.batch() <= 2;
            c.op == Op::Attend
                && c.distribution == Distribution::Normal
                && is_small
                && c.shape.infini().is_some() == is_infini
                && (is_infini || s.mem_len() > 0)
        });
        let whole = |file: &CaseFile| file.lengths.iter().all(|&tokens| tokens >= 2 * file.shape.block_len() as u64);
        let file = files.find_map(|case| case_file(&case).expect("a case").filter(whole)).expect("there is no end of cases");
        stream(&gpu, &file, &file.source);
    }
}
