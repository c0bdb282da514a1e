//! What a figure depends on: machine, system, compiler and commit.

use serde_json::{Value, json};

/// Version, commit, compiler, system and processor.
pub fn describe() -> Value {
    json!({
        "fam": env!("CARGO_PKG_VERSION"),
        "commit": env!("FAM_COMMIT"),
        "rustc": env!("FAM_RUSTC"),
        "profile": if cfg!(debug_assertions) { "debug" } else { "release" },
        "os": std::env::consts::OS,
        "arch": std::env::consts::ARCH,
        "cpu": cpu_model(),
        "threads": threads(),
    })
}

/// The processor's name as the system gives it.
pub fn cpu_model() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|l| l.strip_prefix("model name")?.split_once(':').map(|(_, n)| n.trim().to_string()));
    name.unwrap_or_else(|| format!("{} processor", std::env::consts::ARCH))
}

/// Threads that the system lets this process use.
pub fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}
