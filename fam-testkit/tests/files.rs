//! Case files through the CPU backend: recorded activations and generated cases, in every mode.

mod common;

use common::CpuHarness;
use fam_core::Op;
use fam_testkit::{
    Case, CaseFile, Filter, Harness, Mode, Reference, case_file, case_seed, endless, read_outputs, replay, write_outputs,
};

/// Replays in every mode, each of which is right. (Which of them give the same bits is for the backend's own tests.) Returns the worst share of a
/// bound.
fn all_modes(name: &str, case: &CaseFile, h: &CpuHarness) -> f64 {
    let reference = Reference::new(case).unwrap();
    let mut worst = 0f64;
    for mode in Mode::ALL {
        let outputs = replay(h, case, mode).unwrap_or_else(|e| panic!("{name} {mode}: {e}"));
        let verdict = reference.judge(case, &outputs, &h.limits());
        assert!(verdict.wrong.is_none(), "{name} {mode}: {:?}", verdict.wrong);
        assert!(verdict.compared > 0, "{name} {mode}");
        worst = worst.max(verdict.worst_ratio());
    }
    worst
}

#[test]
fn recorded_activations() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../testdata");
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|f| f.unwrap().path()).collect();
    files.retain(|f| f.extension().is_some_and(|e| e == "safetensors"));
    assert!(files.len() >= 4, "{files:?}");
    for file in files {
        let case = CaseFile::open(&file).unwrap();
        assert!(!case.expected.is_empty());
        let worst = all_modes(&file.display().to_string(), &case, &CpuHarness::pool(2));
        println!("{}: worst {worst:.3} of a bound", file.display());
    }
}

#[test]
fn generated_files() {
    for op in [Op::Attend, Op::InfiniRead] {
        let filter = Filter { ops: vec![op], ..Filter::default() };
        let cases = (0..).filter_map(|i| Case::generate(case_seed(3, i), &filter));
        let files = cases.filter_map(|case| Some((case.to_string(), case_file(&case).unwrap()?)));
        for (name, file) in files.take(300) {
            let bytes = file.to_bytes().unwrap();
            assert_eq!(CaseFile::read(&bytes).unwrap_or_else(|e| panic!("{name}: {e}")), file, "{name}");
            all_modes(&name, &file, &CpuHarness::serial());
        }
    }
}

#[test]
fn outputs_round_trip_and_are_judged() {
    let case = CaseFile::open(concat!(env!("CARGO_MANIFEST_DIR"), "/../testdata/smollm2_l29_f32_small.safetensors")).unwrap();
    let outputs = replay(&CpuHarness::serial(), &case, Mode::Step).unwrap();
    let mut read = read_outputs(&write_outputs(&outputs).unwrap(), &case).unwrap();
    assert_eq!(read, outputs);
    // One element off by a thousandth is found, with its place.
    let o = read.get_mut("o").unwrap();
    let at = ((64 * 9) + 4) * 64 + 7;
    let value = f32::from_le_bytes(o.data[4 * at..4 * at + 4].try_into().unwrap());
    o.data[4 * at..4 * at + 4].copy_from_slice(&(value * 1.001 + 1e-3).to_le_bytes());
    let (wrong, edges) = Reference::new(&case).unwrap().judge(&case, &read, &fam_testkit::Limits::any_kernel()).wrong.unwrap();
    assert_eq!((wrong.at.tensor, wrong.at.index), ("o", [0, 0, 64, 4, 7]));
    assert!(edges.contains("first row of its block") && edges.contains("query head 1 of 3 of kv head 1"), "{edges}");
}

/// An endless stream checks as many different blocks as it was asked for, also those before the window is full.
#[test]
fn endless_streams() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../testdata/");
    for name in ["smollm2_l29_f32_small.safetensors", "smollm2_infini_l05_delta_f32.safetensors"] {
        let case = CaseFile::open(format!("{folder}{name}")).unwrap();
        for (blocks, samples, checked) in [(40, 30, 30), (40, 100, 40), (1, 1, 1)] {
            let found = endless(&CpuHarness::serial(), &case, blocks, samples, 1, &mut |_| {}).unwrap();
            assert_eq!((found.wrong, found.checked), (None, checked), "{name}");
            assert_eq!(found.period.is_none(), case.infini.is_some());
            assert!(found.period.is_none_or(|period| found.repeated >= (blocks - 1).saturating_sub(period)), "{name}");
        }
    }
}
