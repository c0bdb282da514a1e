//! docs/json.md names every type and field that the program writes.

use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

type Fields = BTreeMap<String, BTreeSet<String>>;

/// Words of a table's cell that stand in backticks.
fn quoted(cell: &str) -> impl Iterator<Item = String> {
    cell.split('`').skip(1).step_by(2).map(str::to_string)
}

/// Types and fields of the tables: the first cell names a type, or is empty for one more line of the type above it.
fn documented() -> Fields {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/json.md");
    let text = std::fs::read_to_string(path).expect("docs/json.md");
    let mut fields = Fields::new();
    let mut kind = String::new();
    for line in text.lines().filter(|line| line.starts_with("| ")) {
        let cells: Vec<&str> = line.split('|').collect();
        if let Some(named) = quoted(cells[1]).next() {
            kind = named;
        }
        let named = quoted(cells[2]);
        // Headings quote nothing.
        if !kind.is_empty() {
            fields.entry(kind.clone()).or_default().extend(named);
        }
    }
    fields
}

/// The lines that `fam --json` writes.
fn lines(args: &[&str]) -> Vec<Value> {
    answers(args, "")
}

/// The same, with something on standard input.
fn answers(args: &[&str], input: &str) -> Vec<Value> {
    let mut fam = Command::new(env!("CARGO_BIN_EXE_fam"));
    let fam = fam.arg("--json").args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut fam = fam.spawn().expect("the program runs");
    // A command that reads nothing may have ended.
    let _ = fam.stdin.take().expect("a pipe").write_all(input.as_bytes());
    let out = fam.wait_with_output().expect("the program ends");
    let text = String::from_utf8(out.stdout).expect("UTF-8");
    text.lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect()
}

#[test]
fn every_field_is_documented_and_every_type_appears() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = |name: &str| folder.path().join(name).to_str().expect("UTF-8").to_string();
    let (case, output, perf) = (path("case"), path("output"), path("perf.json"));
    let mut all = Vec::new();
    all.extend(lines(&["info"]));
    all.extend(lines(&["case", "--seed", "5", "--out", &case]));
    all.extend(lines(&["run", &case, "--output", &output]));
    all.extend(lines(&["check", &case, &output]));
    all.extend(lines(&["run", "--tokens", "1000"]));
    all.extend(lines(&["test", "--cases", "40"]));
    all.extend(lines(&["test", "--cases", "1", "--list"]));
    let measured = lines(&["perf", "--case", "A", "--dtype", "f32", "--seconds", "0.01"]);
    std::fs::write(&perf, measured.iter().map(|line| format!("{line}\n")).collect::<String>()).expect("written");
    all.extend(measured);
    all.extend(lines(&["perf", "--compare", &perf, &perf]));
    all.extend(answers(&["perf", "--case", "A", "--dtype", "f32", "--serve", &path("served")], "A f32\n"));

    let documented = documented();
    let mut seen = BTreeSet::new();
    for line in &all {
        let object = line.as_object().expect("an object");
        let kind = object["type"].as_str().expect("a type");
        let fields = documented.get(kind).unwrap_or_else(|| panic!("{kind} is not in docs/json.md"));
        for field in object.keys().filter(|field| *field != "type") {
            assert!(fields.contains(field), "{field} of {kind} is not in docs/json.md");
        }
        if let Some(seed) = object.get("seed") {
            let digits = seed.as_str().and_then(|seed| seed.strip_prefix("0x")).expect("a seed in hexadecimal");
            assert!(u64::from_str_radix(digits, 16).is_ok(), "{seed}");
        }
        seen.insert(kind.to_string());
    }
    // What only failures write.
    seen.extend(["failed".into(), "wrong".into()]);
    let absent: Vec<_> = documented.keys().filter(|kind| !seen.contains(*kind)).collect();
    assert!(absent.is_empty(), "in docs/json.md, and never written: {absent:?}");
}

#[test]
fn samples_are_taken_when_asked_for() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let serve = [
        "perf",
        "--case",
        "F-delta,A-backward",
        "--dtype",
        "bf16",
        "--threads",
        "1",
        "--serve",
        folder.path().to_str().expect("UTF-8"),
    ];
    let all = answers(&serve, "A-backward bf16\nroof\nF-delta bf16\nA f32\nF-delta bf16\n");
    let types: Vec<_> = all.iter().map(|line| line["type"].as_str().expect("a type")).collect();
    // A in f32 was not prepared: the program stops there.
    assert_eq!(types, ["start", "prepared", "prepared", "sample", "roof", "sample"]);
    assert_eq!((&all[1]["case"], &all[3]["case"], &all[5]["case"]), (&"F-delta".into(), &"A-backward".into(), &"F-delta".into()));
    for sample in [&all[3], &all[5]] {
        let [seconds, cpu] = ["seconds", "cpu_seconds"].map(|field| sample[field].as_f64().expect("a number"));
        // One thread; the clocks of processes and of the wall may differ by a tick.
        assert!(seconds > 0.0 && cpu > 0.0 && cpu <= seconds + 0.02, "{sample}");
    }
    assert!(all[4]["rates"]["flops"].as_f64().expect("a number") > 0.0);
    for (prepared, results) in [(&all[1], ["o", "m", "beta"]), (&all[2], ["d_q", "d_mem_v", "d_o"])] {
        let bytes = std::fs::read(prepared["path"].as_str().expect("a path")).expect("written");
        let file = safetensors::SafeTensors::deserialize(&bytes).expect("a file of tensors");
        for name in results {
            let tensor = file.tensor(name).expect("there");
            assert!(tensor.data().iter().any(|byte| *byte != 0), "{name}");
        }
    }
}
