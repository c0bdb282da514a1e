//! `fam run --tokens N`: the case's whole blocks as one endless stream.

use crate::backend::{Job, Machine};
use crate::report::Report;
use crate::run::grouped;
use crate::{Failure, Outcome};
use fam_testkit::{CaseFile, endless};
use serde_json::json;
use std::time::Instant;

/// Blocks checked against the reference.
const SAMPLES: u64 = 100;
/// Growth of the process that counts as flat: the allocator's own movements, far below what keys of the stream would take.
const FLAT_BYTES: u64 = 8 << 20;

pub struct Endless<'a> {
    pub name: &'a str,
    pub case: &'a CaseFile,
    pub tokens: u64,
    pub report: &'a Report,
}

impl Job for Endless<'_> {
    type Output = Outcome;

    fn run<H: Machine + Sync>(self, h: &H, reason: &str) -> Result<Outcome, Failure>
    where
        H::Backend: Clone,
    {
        let Endless { name, case, tokens, report } = self;
        let blocks = tokens.div_ceil(case.shape.block_len() as u64);
        report.line(format!("  backend   {} ({reason})", fam::Backend::name(h.backend())))?;
        let bar = report.progress(blocks, "blocks");
        let start = Instant::now();
        // The first tenth fills caches and buffers of the check itself.
        let mut resident = [None; 2];
        let found = endless(h, case, blocks, SAMPLES, 1, &mut |done| {
            if done.is_multiple_of(64) {
                bar.set_position(done);
            }
            if done == blocks / 10 + 1 {
                resident[0] = resident_bytes();
            }
        })?;
        resident[1] = resident_bytes();
        bar.finish_and_clear();
        let seconds = start.elapsed().as_secs_f64();
        let total = blocks * case.shape.block_len() as u64 * case.batch as u64;
        let growth = resident[0].zip(resident[1]).map(|(before, after)| after.saturating_sub(before));
        let is_compared = found.checked + found.repeated > 0;
        let is_flat = growth.is_none_or(|g| g <= FLAT_BYTES);

        report.line(format!(
            "  endless   {} tokens in {} blocks, {} tokens/s; state {} bytes from first to last",
            grouped(total),
            grouped(found.blocks),
            grouped((total as f64 / seconds) as u64),
            grouped(found.state_bytes)
        ))?;
        match growth {
            Some(growth) => {
                report.line(format!("  memory    the process grew by {} bytes after its first tenth", grouped(growth)))?;
            }
            None => report.line("  memory    this system does not tell the size of a process")?,
        }
        match found.period {
            Some(period) if found.repeated == 0 => {
                report.line(format!("  repeats   none yet: results repeat after {period} blocks, once the window is full"))?;
            }
            Some(period) => report.line(format!(
                "  repeats   {} blocks equal, bit for bit, those {period} blocks before",
                grouped(found.repeated)
            ))?,
            None => report.line("  repeats   none: a compressive memory never forgets")?,
        }
        report.line(format!("  checked   {} random blocks, worst error {:.3} of its bound", found.checked, found.worst))?;
        if let Some(wrong) = &found.wrong {
            report.line(format!("  WRONG     {wrong}"))?;
        }
        if !is_compared {
            let blocks = case.shape.block_len();
            report.line(format!("  NOTHING   was compared: the stream ends within its window; blocks are of {blocks} tokens"))?;
        }
        if !is_flat {
            report.line(format!("  WRONG     the process grew by more than {} bytes", grouped(FLAT_BYTES)))?;
        }
        report.record(
            "endless",
            json!({ "case": name, "tokens": total, "blocks": found.blocks, "seconds": seconds, "state_bytes": found.state_bytes,
                    "growth_bytes": growth, "period": found.period, "repeated": found.repeated, "checked": found.checked,
                    "worst": found.worst, "wrong": found.wrong, "flat": is_flat }),
        )?;
        Ok(if found.wrong.is_none() && is_flat && is_compared { Outcome::Right } else { Outcome::Wrong })
    }
}

/// Memory of this process that is in RAM, where the system tells.
fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}
