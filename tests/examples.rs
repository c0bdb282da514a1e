//! Every example runs, says something, and finds its own claims true. The binaries are those that `cargo test` builds before it runs
//! any test; with `--test examples` alone, build them first: `cargo build --examples`.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Names in `examples/`: files, and directories with a `main.rs`.
fn names() -> Vec<String> {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let entries = std::fs::read_dir(examples).unwrap().map(|entry| entry.unwrap().path());
    let rust = entries.filter(|path| path.extension().is_some_and(|e| e == "rs") || path.join("main.rs").exists());
    let names = rust.map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned());
    // What needs a feature is built with it.
    names.filter(|name| cfg!(feature = "wgpu") || name != "embed_wgpu").collect()
}

fn run(name: &str, args: &[&str]) -> Output {
    // This binary is in `<profile>/deps`, the examples are in `<profile>/examples`.
    let profile: PathBuf = std::env::current_exe().unwrap().ancestors().nth(2).unwrap().into();
    let binary = profile.join("examples").join(name).with_extension(std::env::consts::EXE_EXTENSION);
    assert!(binary.exists(), "{} is missing: run cargo build --examples", binary.display());
    Command::new(binary).args(args).output().unwrap()
}

#[test]
fn every_example_runs() {
    let names = names();
    assert!(names.len() >= 7, "{names:?}");
    for name in names {
        let output = run(&name, &[]);
        assert!(output.status.success(), "{name}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
        assert!(!output.stdout.is_empty(), "{name} says nothing");
    }
}

#[test]
fn the_planted_bug_is_found() {
    let output = run("06_your_backend", &["bug"]);
    let report = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1), "{report}");
    // The case's seed, and the first wrong element.
    assert!(report.contains("failed: 0x") && report.contains("o[stream "), "{report}");
}
