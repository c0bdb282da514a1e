//! Names the commit that the binary was built from; `unknown` outside a checkout of this workspace.
use std::path::Path;
use std::process::Command;

fn run(program: &str, args: &[&str]) -> Option<String> {
    let out = Command::new(program).args(args).output().ok().filter(|o| o.status.success())?;
    Some(String::from_utf8_lossy(&out.stdout).trim().to_string())
}

/// Whether git's top level is this workspace. A package unpacked inside another checkout would otherwise take that one's commit.
fn is_checkout() -> bool {
    let top_level = run("git", &["rev-parse", "--show-toplevel"]).and_then(|top| Path::new(&top).canonicalize().ok());
    // A build script runs in its package's folder.
    top_level.is_some() && top_level == Path::new("..").canonicalize().ok()
}

fn main() {
    let mut commit = None;
    if is_checkout() {
        commit = run("git", &["--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=12"]);
        // The commit moves with HEAD and with what HEAD names. Not watched is the index, which git itself rewrites when it likes: a build
        // after edits alone keeps the mark "dirty", or its absence, of the build before.
        for path in ["HEAD", "logs/HEAD"] {
            if let Some(path) = run("git", &["rev-parse", "--git-path", path]) {
                println!("cargo:rerun-if-changed={path}");
            }
        }
    }
    println!("cargo:rustc-env=FAM_COMMIT={}", commit.as_deref().unwrap_or("unknown"));
    let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".into());
    println!("cargo:rustc-env=FAM_RUSTC={}", run(&rustc, &["--version"]).as_deref().unwrap_or("rustc"));
}
