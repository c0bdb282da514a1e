//! Exit codes and one-line errors: 0 right, 1 wrong, 2 bad input.

use fam_testkit::{CaseFile, Tensor};
use safetensors::tensor::TensorView;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

fn fam(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_fam")).args(args).output().expect("the program runs")
}

fn sample() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("samples/smollm2_l29_f32_small.safetensors")
}

/// Exit code 2 and one line on standard error that holds every one of `words`.
fn refused(args: &[&str], words: &[&str]) {
    let out = fam(args);
    let text = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(2), "{args:?}: {text}");
    assert_eq!(text.lines().count(), 1, "{args:?}: {text}");
    for word in words {
        assert!(text.contains(word), "{args:?}: {word:?} is not in {text:?}");
    }
}

/// A tensor of zeros: name, dtype and shape.
type Zeros<'a> = (&'a str, &'a str, &'a [u64]);

/// A safetensors file with a hand-made header, so that it can lie; its data are zeros, at most `most` bytes of them.
fn file(path: &Path, tensors: &[Zeros], metadata: &[(&str, &str)], most: usize) {
    let mut entries: Vec<String> = Vec::new();
    let metadata: Vec<String> = metadata.iter().map(|(k, v)| format!("{k:?}:{v:?}")).collect();
    entries.push(format!("\"__metadata__\":{{{}}}", metadata.join(",")));
    let mut offset = 0u64;
    for (name, dtype, shape) in tensors {
        let width = match *dtype {
            "I64" => 8,
            "F16" | "BF16" => 2,
            _ => 4,
        };
        let size = shape.iter().try_fold(width, |n: u64, s| n.checked_mul(*s)).unwrap_or(0);
        let end = offset.saturating_add(size);
        entries.push(format!("{name:?}:{{\"dtype\":{dtype:?},\"shape\":{shape:?},\"data_offsets\":[{offset},{end}]}}"));
        offset = end;
    }
    let header = format!("{{{}}}", entries.join(","));
    let mut data = (header.len() as u64).to_le_bytes().to_vec();
    data.extend_from_slice(header.as_bytes());
    data.resize(data.len() + (offset as usize).min(most), 0);
    std::fs::write(path, data).expect("a temporary file");
}

const ATTEND: [(&str, &str); 4] = [("format", "1"), ("op", "attend"), ("block_len", "2"), ("window_blocks", "1")];
const Q: Zeros = ("q", "F32", &[1, 4, 2, 8]);
const K: Zeros = ("k", "F32", &[1, 4, 1, 8]);
const V: Zeros = ("v", "F32", &[1, 4, 1, 8]);

#[test]
fn bad_case_files_are_refused_in_one_line() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("case.safetensors");
    let name = path.to_str().expect("UTF-8");
    let check = |tensors: &[Zeros], metadata: &[(&str, &str)], words: &[&str]| {
        file(&path, tensors, metadata, 1024);
        refused(&["run", name], words);
    };
    let with = |name: &'static str, value: &'static str| {
        let others = ATTEND.into_iter().filter(|(key, _)| *key != name);
        others.chain([(name, value)].into_iter().filter(|(_, v)| !v.is_empty())).collect::<Vec<_>>()
    };
    // 10¹² tokens, with and without bytes; products that overflow.
    check(&[("q", "F32", &[1, 1_000_000_000_000, 2, 8]), K, V], &ATTEND, &["q", "1000000000000", "at most"]);
    check(&[("q", "F32", &[0, 1_000_000_000_000, 2, 8]), K, V], &ATTEND, &["q", "1000000000000", "at most"]);
    check(&[("q", "F32", &[1 << 40, 1 << 40, 2, 8]), K, V], &ATTEND, &["q", "at most"]);
    // Ranks, sizes, dtypes.
    check(&[("q", "F32", &[4, 2, 8]), K, V], &ATTEND, &["q", "[4, 2, 8]", "4 axes"]);
    check(&[Q, ("k", "F32", &[1, 3, 1, 8]), V], &ATTEND, &["k", "[1, 3, 1, 8]", "[1, 4, 1, 8]"]);
    check(&[Q, ("k", "F16", &[1, 4, 1, 8]), V], &ATTEND, &["k", "F16", "F32"]);
    check(&[Q, ("k", "F64", &[1, 4, 1, 8]), V], &ATTEND, &["k", "F64", "one of"]);
    check(&[("q", "F32", &[1, 4, 3, 8]), ("k", "F32", &[1, 4, 2, 8]), V], &ATTEND, &["heads", "3", "multiple"]);
    check(&[("q", "F32", &[1, 4, 0, 8]), K, V], &ATTEND, &["heads", "0", "at least 1"]);
    // Tensors missing, unknown, alone.
    check(&[K, V], &ATTEND, &["q", "absent"]);
    check(&[Q, K], &ATTEND, &["v", "absent"]);
    check(&[Q, K, V, ("qq", "F32", &[1])], &ATTEND, &["qq", "x_"]);
    check(&[Q, K, V, ("beta", "F32", &[2])], &ATTEND, &["beta", "attend"]);
    check(&[Q, K, V, ("mem_k", "F32", &[1, 2, 1, 1, 8])], &ATTEND, &["mem_v", "absent"]);
    check(&[Q, K, V, K], &ATTEND, &["k", "twice"]);
    check(&[Q, K, V, ("lengths", "F32", &[1])], &ATTEND, &["lengths", "I64"]);
    // Metadata.
    check(&[Q, K, V], &with("format", "2"), &["format", "2"]);
    check(&[Q, K, V], &with("op", "softmax"), &["op", "softmax", "attend"]);
    check(&[Q, K, V], &with("block_len", "0"), &["block_len", "0", "at least 1"]);
    check(&[Q, K, V], &with("block_len", "two"), &["block_len", "two", "number"]);
    check(&[Q, K, V], &with("block_len", ""), &["block_len", "absent"]);
    check(&[Q, K, V], &with("window_blocks", ""), &["window_blocks", "absent"]);
    check(&[Q, K, V], &with("window_tokens", "3"), &["window_tokens", "exactly one"]);
    check(&[Q, K, V], &with("window_blocks", "18446744073709551615"), &["ring rows", "at most"]);
    check(&[Q, K, V], &with("scale", "NaN"), &["scale", "NaN", "finite"]);
    check(&[Q, K, V], &with("scale", "inf"), &["scale", "inf", "finite"]);
    check(&[Q, K, V], &with("scale", "1e300"), &["scale", "finite"]);
    check(&[Q, K, V], &with("op", "infini"), &["rule", "absent"]);
    // Bytes that are not there, no file at all, no safetensors at all.
    file(&path, &[Q, K, V], &ATTEND, 10);
    refused(&["run", name], &["data_offsets", "inside the file"]);
    std::fs::write(&path, [255; 64]).expect("a temporary file");
    refused(&["run", name], &["header length", "at most"]);
    std::fs::write(&path, b"{}").expect("a temporary file");
    refused(&["run", name], &["2 bytes"]);
    refused(&["run", folder.path().join("none").to_str().expect("UTF-8")], &["none"]);
}

#[test]
fn backends_are_never_replaced() {
    refused(&["run", "--backend", "cuda"], &["cuda", "unavailable"]);
    refused(&["test", "--backend", "cuda"], &["cuda", "unavailable"]);
    let out = Command::new(env!("CARGO_BIN_EXE_fam")).args(["run"]).env("FAM_ISA", "abacus").output().expect("the program runs");
    assert_eq!(out.status.code(), Some(2));
}

/// Vulkan's loader is told of drivers that are not there.
#[cfg(target_os = "linux")]
#[test]
fn a_machine_without_adapters() {
    let fam = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fam"));
        command.args(args).env_remove("VK_ADD_DRIVER_FILES");
        let out =
            ["VK_DRIVER_FILES", "VK_ICD_FILENAMES"].iter().fold(&mut command, |c, name| c.env(name, "/nonexistent")).output();
        let out = out.expect("the program runs");
        let [stdout, stderr] = [out.stdout, out.stderr].map(|text| String::from_utf8(text).expect("UTF-8"));
        (out.status.code(), stdout, stderr)
    };
    let (code, stdout, stderr) = fam(&["info"]);
    assert_eq!((code, stderr.as_str()), (Some(0), ""));
    assert!(stdout.contains("backend wgpu is unavailable: no adapter found"), "{stdout}");
    for command in ["run", "test", "perf"] {
        let (code, _, stderr) = fam(&[command, "--backend", "wgpu"]);
        assert_eq!((code, stderr.lines().count()), (Some(2), 1), "{command}: {stderr}");
        assert!(stderr.contains("backend wgpu is unavailable: no adapter found"), "{command}: {stderr}");
    }
    // Nobody has asked for it.
    let (code, stdout, stderr) = fam(&["run", sample().to_str().expect("UTF-8")]);
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stdout.contains("no wgpu (no adapter found"), "{stdout}");
}

#[test]
fn a_test_that_ran_nothing_is_a_failure() {
    let out = fam(&["test", "--cases", "1", "--filter", "bf16", "--shard", "1/2"]);
    assert_eq!(out.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&out.stdout).contains("nothing was executed"));
}

#[test]
fn a_filter_that_no_case_passes_is_refused_and_ends() {
    let start = Instant::now();
    for more in [&[][..], &["--seconds", "1"], &["--cases", "100000"], &["--isolate"], &["--list"]] {
        refused(&[&["test", "--filter", "no case has this"], more].concat(), &["no case", "1000000", "no case has this"]);
    }
    // Five searches of some seconds each; without a bound the second would never end.
    assert!(start.elapsed() < Duration::from_secs(300), "{:?}", start.elapsed());
}

#[test]
fn bad_arguments_are_refused_in_one_line() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let sample = sample();
    let (case, nowhere) = (sample.to_str().expect("UTF-8"), folder.path().join("none/o.safetensors"));
    refused(&["run", "--bogus"], &["--bogus"]);
    refused(&["run", "--mode", "x"], &["mode", "x", "step"]);
    refused(&["run", "--threads", "0"], &["threads", "0"]);
    refused(&["run", "--threads", "100000"], &["threads", "100000"]);
    refused(&["run", "--tokens", "0"], &["tokens", "0"]);
    refused(&["run", "--tokens", "9", "--mode", "step"], &["tokens", "mode"]);
    refused(&["run", case, "--tokens", "9", "--output", "o"], &["tokens", "output"]);
    refused(&["run", case, "--output", nowhere.to_str().expect("UTF-8")], &["none"]);
    refused(&["test", "--seconds", "nan"], &["seconds", "nan"]);
    refused(&["test", "--shard", "4/4"], &["shard", "4/4"]);
    refused(&["test", "--isolate", "--replay", "refusals"], &["isolate", "replay"]);
    refused(&["test", "--replay", "dream:1"], &["replay", "dream:1"]);
    refused(&["test", "--hang", "0"], &["hang", "0"]);
    refused(&["check", case, case], &["smollm2", "output"]);
    // Names and values that clap says on lines of their own.
    refused(&["run", "--output", "o"], &["required", "<CASE>", "Usage: fam run"]);
    refused(&["case", "--op", "foo"], &["--op", "foo", "attend, infini"]);
    refused(&["test", "--isolate", "--backend", "cuda"], &["cuda", "unavailable"]);
    refused(&["case", "--op", "layer", "--out", "o"], &["op", "layer", "--gradients"]);
}

#[test]
fn no_arguments_ask_for_help() {
    let out = fam(&[]);
    assert_eq!(out.status.code(), Some(2));
    let text = String::from_utf8_lossy(&out.stderr);
    assert!(text.contains("Usage: fam") && text.contains("Judges an output file"), "{text}");
}

#[test]
fn an_output_takes_the_place_of_a_file_whole_or_not_at_all() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = |name: &str| folder.path().join(name).to_str().expect("UTF-8").to_string();
    let (case, output) = (path("case"), path("output"));
    std::fs::copy(sample(), &case).expect("a copy");
    // The case itself, also by another name of it.
    let same = folder.path().join(".").join("case");
    refused(&["run", &case, "--output", same.to_str().expect("UTF-8")], &["output", "another file"]);
    assert_eq!(std::fs::read(&case).expect("the case"), std::fs::read(sample()).expect("the sample"));
    refused(&["run", &case, "--output", folder.path().to_str().expect("UTF-8")], &["not a regular file"]);

    // A replay that fails, since no kernel serves heads so wide, leaves what was there, and nothing beside it.
    std::fs::write(&output, "older").expect("written");
    let wide = path("wide");
    let tensors = [("q", "F32", &[1, 4, 2, 512][..]), ("k", "F32", &[1, 4, 1, 512]), ("v", "F32", &[1, 4, 1, 512])];
    file(Path::new(&wide), &tensors, &ATTEND, usize::MAX);
    refused(&["run", &wide, "--output", &output], &["head_dim", "512"]);
    assert_eq!(std::fs::read(&output).expect("the older output"), b"older");
    std::fs::remove_file(&wide).expect("removed");

    assert_eq!(fam(&["run", &case, "--mode", "prefill", "--output", &output]).status.code(), Some(0));
    assert_eq!(fam(&["check", &case, &output]).status.code(), Some(0));
    let names: Vec<_> = std::fs::read_dir(folder.path()).expect("a folder").map(|e| e.expect("an entry").file_name()).collect();
    assert_eq!(names.len(), 2, "{names:?}");
}

/// A safetensors file of zeros, written in full.
fn zeros(folder: &Path, name: &str, tensors: &[Zeros], metadata: &[(&str, &str)]) -> String {
    let path = folder.join(name);
    file(&path, tensors, metadata, usize::MAX);
    path.to_str().expect("UTF-8").to_string()
}

#[test]
fn comparing_nothing_is_not_right() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let here = folder.path();
    // Exit code and standard output hold what was found.
    let nothing = |args: &[&str], words: &str| {
        let out = fam(args);
        let text = String::from_utf8_lossy(&out.stdout);
        assert_eq!(out.status.code(), Some(1), "{args:?}: {text}");
        assert!(text.contains(words), "{args:?}: {words:?} is not in {text}");
    };
    let case = zeros(here, "case", &[Q, K, V], &ATTEND);
    let o: Zeros = ("o", "F32", &[1, 4, 2, 8]);
    assert_eq!(fam(&["check", &case, &zeros(here, "o", &[o], &[])]).status.code(), Some(0));
    // Outputs that nothing is compared with: alone, and beside one that is right.
    let m: Zeros = ("m", "F32", &[1, 1, 8, 8]);
    let mem_o: Zeros = ("mem_o", "F32", &[1, 2, 0, 2, 8]);
    refused(&["check", &case, &zeros(here, "m", &[m], &[])], &["m: an output of this case: o, lse"]);
    refused(&["check", &case, &zeros(here, "m", &[o, m], &[])], &["m: an output of this case: o, lse"]);
    refused(&["check", &case, &zeros(here, "mem_o", &[o, mem_o], &[])], &["mem_o: an output of this case: o, lse"]);
    // A stream without tokens.
    let mut empty = CaseFile::open(&case).expect("the case");
    empty.lengths = vec![0];
    let path = here.join("empty");
    std::fs::write(&path, empty.to_bytes().expect("bytes")).expect("written");
    let path = path.to_str().expect("UTF-8");
    nothing(&["check", path, &zeros(here, "o", &[o], &[])], "nothing was compared");
    nothing(&["run", path], "NOTHING was compared");
    // Logits around 1e30: no kernel's result could be told from any other.
    let sample = concat!(env!("CARGO_MANIFEST_DIR"), "/../testdata/smollm2_l29_f32_small.safetensors");
    let mut huge = CaseFile::open(sample).expect("the case");
    huge.q = Tensor::from_values(huge.q.dtype, huge.q.shape.clone(), huge.q.values().iter().map(|q| 1e30 * q));
    huge.expected.clear();
    let path = here.join("huge");
    std::fs::write(&path, huge.to_bytes().expect("bytes")).expect("written");
    let out = fam(&["run", path.to_str().expect("UTF-8"), "--mode", "prefill"]);
    assert!(String::from_utf8_lossy(&out.stdout).contains("values are not judged"), "{out:?}");
    // An endless stream is checked from its first block on.
    for (tokens, checked) in [("2", "checked   1 random blocks"), ("1000", "checked   100 random blocks")] {
        let out = fam(&["run", &case, "--tokens", tokens]);
        assert!(out.status.success() && String::from_utf8_lossy(&out.stdout).contains(checked), "{out:?}");
    }
}

/// Files with gradients are for others: what they hold is theirs to compare, and `run` says that it does not read them.
#[test]
fn gradients_are_written_for_every_op() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for (op, tensors) in [
        ("attend", &["expected_o", "d_lse", "expected_d_q", "expected_d_k", "expected_d_v"][..]),
        ("infini", &["expected_m", "d_z", "expected_d_infini_k", "expected_d_beta", "expected_d_m0"]),
        ("merge", &["expected_lse", "d_o", "expected_d_o_a", "expected_d_lse_b"]),
        ("layer", &["expected_y", "expected_memory", "expected_d_prompt", "expected_d_layers.1.w_down"]),
    ] {
        let path = folder.path().join(op);
        let path = path.to_str().expect("UTF-8");
        let made = fam(&["case", "--gradients", "--op", op, "--seed", "5", "--out", path]);
        assert_eq!(made.status.code(), Some(0), "{op}: {}", String::from_utf8_lossy(&made.stderr));
        let bytes = std::fs::read(path).expect("the file");
        let file = safetensors::SafeTensors::deserialize(&bytes).expect("a safetensors file");
        for name in tensors {
            let tensor = file.tensor(name).unwrap_or_else(|e| panic!("{op}: {name}: {e}"));
            assert_eq!(tensor.dtype(), safetensors::Dtype::F64, "{op}: {name}");
        }
        assert_eq!(fam(&["run", path]).status.code(), Some(2), "{op}");
    }
}

#[test]
fn isolated_shards_run_every_case_once() {
    let count = |args: &[&str]| {
        let out = fam(args);
        assert_eq!(out.status.code(), Some(0), "{}", String::from_utf8_lossy(&out.stdout));
        let text = String::from_utf8(out.stdout).expect("UTF-8");
        let last = text.lines().last().expect("a last line");
        last.split_whitespace().next().and_then(|n| n.parse::<u64>().ok()).expect("a count")
    };
    let all = ["test", "--cases", "120", "--seed", "9"];
    let whole = count(&all);
    assert!(whole > 0);
    assert_eq!(count(&[&all[..], &["--isolate"]].concat()), whole);
    assert_eq!((0..3).map(|i| count(&[&all[..], &["--shard", &format!("{i}/3")]].concat())).sum::<u64>(), whole);
}

#[test]
fn outputs_are_judged_and_the_first_wrong_element_is_named() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (sample, output) = (sample(), folder.path().join("o.safetensors"));
    let (case, out) = (sample.to_str().expect("UTF-8"), output.to_str().expect("UTF-8"));
    let run = fam(&["run", case, "--output", out, "--json"]);
    assert_eq!(run.status.code(), Some(0));
    for line in String::from_utf8(run.stdout).expect("UTF-8").lines() {
        let value: serde_json::Value = serde_json::from_str(line).expect("a line of JSON");
        assert!(value["type"].is_string());
    }
    assert_eq!(fam(&["check", case, out]).status.code(), Some(0));

    // One element of row 40, head 4, off by a thousandth.
    let file = CaseFile::open(&sample).expect("the sample");
    let bytes = std::fs::read(&output).expect("the output");
    let tensors = safetensors::SafeTensors::deserialize(&bytes).expect("safetensors");
    let mut o = tensors.tensor("o").expect("o").data().to_vec();
    let at = 4 * ((40 * file.shape.heads() + 4) * file.shape.head_dim() + 3);
    let value = f32::from_le_bytes(o[at..at + 4].try_into().expect("4 bytes"));
    o[at..at + 4].copy_from_slice(&(value + 1e-3).to_le_bytes());
    let view = TensorView::new(safetensors::Dtype::F32, vec![2, 154, 9, 64], &o).expect("a view");
    std::fs::write(&output, safetensors::serialize([("o", view)], None::<HashMap<String, String>>).expect("bytes"))
        .expect("written");
    let judged = fam(&["check", case, out]);
    assert_eq!(judged.status.code(), Some(1));
    let text = String::from_utf8_lossy(&judged.stdout).to_string();
    for word in ["row 40, head 4, channel 3", "row 8 of block 1", "query head 1 of 3 of kv head 1"] {
        assert!(text.contains(word), "{word:?} is not in {text}");
    }
}

#[test]
fn generated_cases_pass_in_every_mode() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for (op, dtype) in [("attend", "f32"), ("attend", "bf16"), ("infini", "f32"), ("infini", "f16")] {
        let out = folder.path().join(format!("{op}-{dtype}"));
        let path = out.to_str().expect("UTF-8");
        let made = fam(&["case", "--op", op, "--dtype", dtype, "--seed", "3", "--count", "12", "--out", path]);
        assert_eq!(made.status.code(), Some(0), "{}", String::from_utf8_lossy(&made.stderr));
        let files: Vec<_> = std::fs::read_dir(&out).expect("a folder").map(|e| e.expect("an entry").path()).collect();
        assert_eq!(files.len(), 12);
        for file in files {
            let run = fam(&["run", file.to_str().expect("UTF-8")]);
            assert_eq!(run.status.code(), Some(0), "{}: {}", file.display(), String::from_utf8_lossy(&run.stdout));
        }
    }
}
