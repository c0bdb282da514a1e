//! Output blocks of the documents come from the real program, and code blocks from the files that they name.
//!
//! Figures differ between machines and runs: in output, and only there, every number is masked before the comparison.
//! `UPDATE_README=1 cargo test --release -p fam-cli --test readme` writes the blocks anew.

use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn fam(args: &[&str]) -> String {
    let out = Command::new(env!("CARGO_BIN_EXE_fam")).args(args).env_remove("FAM_ISA").output().expect("the program runs");
    assert!(out.status.success(), "fam {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).expect("UTF-8")
}

/// Numbers, the name of the processor and what a machine lacks differ between machines.
fn masked(text: &str) -> String {
    let mut out = String::new();
    for line in text.lines() {
        let line = match line.find("cpu   ") {
            Some(_) => "cpu   …",
            None => line.split_once(" (auto: ").map_or(line, |(backend, _)| backend).trim_end(),
        };
        let mut in_number = false;
        for c in line.chars() {
            let is_digit = c.is_ascii_digit() || (in_number && (c == ',' || c == '.'));
            if is_digit && !in_number {
                out.push('#');
            }
            if !is_digit {
                out.push(c);
            }
            in_number = is_digit;
        }
        out.push('\n');
    }
    out
}

/// A marked block of a document: what follows the marker line, between fences or up to the next blank line.
struct Block {
    document: &'static str,
    marker: String,
    fence: Option<&'static str>,
    text: String,
    /// What of the text must agree.
    compared: fn(&str) -> String,
}

fn output(command: &str, fence: Option<&'static str>) -> Block {
    let args: Vec<&str> = command.split(' ').skip(1).collect();
    let marker = format!("<!-- output of: {command} -->");
    Block { document: "README.md", marker, fence, text: fam(&args), compared: masked }
}

fn file(document: &'static str, path: &str, fence: &'static str) -> Block {
    let text = std::fs::read_to_string(root().join(path)).expect(path);
    Block { document, marker: format!("<!-- file: {path} -->"), fence: Some(fence), text, compared: str::to_string }
}

fn blocks() -> Vec<Block> {
    vec![
        output("fam run", Some("```text")),
        output("fam info --markdown", None),
        file("README.md", "examples/readme.rs", "```rust"),
        file("README.md", "examples/python/check_your_kernel.py", "```python"),
        file("docs/casefile.md", "examples/python/case_file.py", "```python"),
    ]
}

/// The document with a block's text in place, and the text that stood there.
fn replace(document: &str, block: &Block) -> (String, String) {
    let Block { marker, text, .. } = block;
    let start = document.find(marker).unwrap_or_else(|| panic!("{} has no {marker}", block.document)) + marker.len();
    let (open, close) = match block.fence {
        Some(fence) => (format!("\n{fence}\n"), "```\n"),
        None => ("\n".to_string(), "\n"),
    };
    let rest = &document[start..];
    let body = rest.strip_prefix(open.as_str()).unwrap_or_else(|| panic!("{marker} is not followed by {open:?}"));
    let end = body.find(&format!("\n{close}")).map_or(0, |end| end + 1);
    let (old, after) = if body.starts_with(close) { ("", body) } else { body.split_at(end) };
    (format!("{}{open}{text}{after}", &document[..start]), old.to_string())
}

#[test]
fn blocks_are_the_real_output_and_the_real_files() {
    let update = std::env::var_os("UPDATE_README").is_some();
    for block in blocks() {
        let path = root().join(block.document);
        let document = std::fs::read_to_string(&path).expect(block.document);
        let (updated, old) = replace(&document, &block);
        if update {
            std::fs::write(&path, updated).expect("a document that is writable");
        } else {
            let Block { marker, compared, .. } = &block;
            assert_eq!(compared(&old), compared(&block.text), "{marker}: refresh with UPDATE_README=1 (see CONTRIBUTING.md)");
        }
    }
}
