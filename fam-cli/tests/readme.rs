//! The README's output blocks come from the real program, and its code blocks from the files that they name.
//!
//! Figures differ between machines and runs: every number is masked before the comparison. `UPDATE_README=1 cargo test --release -p fam-cli
//! --test readme` writes the blocks anew.

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

/// Numbers, and the name of the processor, differ between machines.
fn masked(text: &str) -> String {
    let mut out = String::new();
    for line in text.lines() {
        let line = match line.find("cpu   ") {
            Some(_) => "cpu   …",
            None => line.trim_end(),
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

/// A marked block of the README: what follows the marker line, between fences or up to the next blank line.
struct Block {
    marker: String,
    fence: Option<&'static str>,
    text: String,
}

fn blocks() -> Vec<Block> {
    let file = |path: &str| std::fs::read_to_string(root().join(path)).expect(path);
    let block = |marker: &str, fence, text| Block { marker: format!("<!-- {marker} -->"), fence, text };
    vec![
        block("output of: fam run", Some("```text"), fam(&["run"])),
        block("output of: fam info --markdown", None, fam(&["info", "--markdown"])),
        block("file: examples/readme.rs", Some("```rust"), file("examples/readme.rs")),
        block("file: examples/python/check_your_kernel.py", Some("```python"), file("examples/python/check_your_kernel.py")),
    ]
}

/// The README with a block's text in place, and the text that stood there.
fn replace(readme: &str, block: &Block) -> (String, String) {
    let start = readme.find(&block.marker).unwrap_or_else(|| panic!("README.md has no {}", block.marker)) + block.marker.len();
    let (open, close) = match block.fence {
        Some(fence) => (format!("\n{fence}\n"), "```\n"),
        None => ("\n".to_string(), "\n"),
    };
    let rest = &readme[start..];
    let body = rest.strip_prefix(open.as_str()).unwrap_or_else(|| panic!("{} is not followed by {open:?}", block.marker));
    let end = body.find(&format!("\n{close}")).map_or(0, |end| end + 1);
    let (old, after) = if body.starts_with(close) { ("", body) } else { body.split_at(end) };
    (format!("{}{open}{}{after}", &readme[..start], block.text), old.to_string())
}

#[test]
fn blocks_are_the_real_output() {
    let path = root().join("README.md");
    let mut readme = std::fs::read_to_string(&path).expect("README.md");
    let update = std::env::var_os("UPDATE_README").is_some();
    for block in blocks() {
        let (updated, old) = replace(&readme, &block);
        if update {
            readme = updated;
        } else {
            assert_eq!(masked(&old), masked(&block.text), "{}: refresh with UPDATE_README=1 (see CONTRIBUTING.md)", block.marker);
        }
    }
    if update {
        std::fs::write(&path, readme).expect("README.md is writable");
    }
}
