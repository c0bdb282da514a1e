//! `fam perf --serve`: one party of a run in which programs take turns. A sample is taken when standard input asks for one, so that another
//! program decides whose turn it is (docs/json.md has the protocol; benches/peers is such a program).

use super::Chosen;
use super::case::PerfCase;
use super::driver::{Prepared, prepare};
use super::roof::Probe;
use crate::replace::Replacement;
use crate::report::Report;
use crate::{Failure, Outcome};
use fam::{Dtype, InfiniRule};
use fam_testkit::{Harness, write_outputs};
use serde_json::json;
use std::path::Path;
use std::time::Instant;

/// Prepares the cases, writes each with its checked results to `folder`, and takes samples until standard input ends.
pub fn serve<H: Harness + Sync>(
    h: &H,
    chosen: &Chosen,
    probe: &Probe,
    threads: usize,
    folder: &Path,
    report: &Report,
) -> Result<Outcome, Failure>
where
    H::Backend: Clone,
{
    std::fs::create_dir_all(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let mut all: Vec<(&str, Dtype, Box<dyn Prepared + '_>)> = Vec::new();
    for &(case, dtype) in chosen {
        let mut prepared = prepare(h, case, dtype)?;
        let (verdict, tensors) = prepared.check()?;
        if let Some(wrong) = verdict.wrong {
            report.record(
                "wrong",
                json!({ "case": case.name, "dtype": dtype.name(), "threads": threads, "wrong": wrong.to_string() }),
            )?;
            return Ok(Outcome::Wrong);
        }
        let path = folder.join(format!("{}_{dtype}.safetensors", case.name));
        let tensors = tensors.into_iter().map(|(name, tensor)| (name.to_string(), tensor)).collect();
        Replacement::new(&path)?.finish(&write_outputs(&tensors)?)?;
        let (work, PerfCase { heads, kv_heads, head_dim, block_len, window_blocks, mem_len, batch, history, rows, .. }) =
            (case.work(dtype), case);
        let rule = case.infini.map(|rule| if rule == InfiniRule::Linear { "linear" } else { "delta" });
        report.record(
            "prepared",
            json!({ "case": case.name, "what": case.what, "dtype": dtype.name(), "threads": threads, "kernel": prepared.kernel(),
                    "compared": verdict.compared, "worst": verdict.worst_ratio(), "path": path.display().to_string(), "calls": case.calls,
                    "flops": work.flops, "bf16_flops": work.bf16_flops, "exps": work.exps, "bytes": work.bytes,
                    "bound": if case.is_bound_by_memory() { "memory" } else { "arithmetic" }, "backward": case.is_backward, "rule": rule,
                    "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "block_len": block_len, "window_blocks": window_blocks,
                    "mem_len": mem_len, "batch": batch, "history": history, "rows": rows }),
        )?;
        all.push((case.name, dtype, prepared));
    }
    for line in std::io::stdin().lines() {
        let line = line.map_err(|e| format!("standard input: {e}"))?;
        if line == "roof" {
            report.record("roof", json!({ "threads": threads, "rates": probe.measure()? }))?;
            continue;
        }
        let asked = all.iter_mut().find(|(case, dtype, _)| line == format!("{case} {dtype}"));
        let (case, dtype, prepared) =
            asked.ok_or_else(|| format!("standard input: {line}: roof, or a case and a dtype that were prepared"))?;
        let (start, cpu) = (Instant::now(), cpu_seconds());
        prepared.sample()?;
        let (seconds, cpu) = (start.elapsed().as_secs_f64(), cpu_seconds().zip(cpu).map(|(end, start)| end - start));
        report.record("sample", json!({ "case": case, "dtype": dtype.name(), "seconds": seconds, "cpu_seconds": cpu }))?;
    }
    Ok(Outcome::Right)
}

/// What the threads of this process have spent on processors.
fn cpu_seconds() -> Option<f64> {
    #[cfg(unix)]
    {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        Some(time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9)
    }
    #[cfg(not(unix))]
    None
}
