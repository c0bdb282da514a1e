//! Counting outcomes, and saying the failed ones at once.

use crate::Outcome;
use crate::report::Report;
use fam_testkit::Outcome as CaseOutcome;
use serde_json::json;
use std::collections::BTreeMap;

#[derive(Debug, Default)]
pub struct Tally {
    passed: u64,
    failed: u64,
    /// Counts by reason.
    skipped: BTreeMap<String, u64>,
}

impl Tally {
    /// Counts a generated case.
    pub fn add(&mut self, report: &Report, case: &str, seed: u64, outcome: &CaseOutcome) {
        match outcome {
            CaseOutcome::Passed(_) => self.passed += 1,
            CaseOutcome::Skipped(reason) => *self.skipped.entry(reason.clone()).or_default() += 1,
            CaseOutcome::Failed(what) => self.fail(report, &format!("{case}\n  seed {seed}"), what),
        }
    }

    /// Counts a check that was right.
    pub fn pass(&mut self) {
        self.passed += 1;
    }

    /// Counts a check that the backend does not serve.
    pub fn skip(&mut self, reason: impl Into<String>) {
        *self.skipped.entry(reason.into()).or_default() += 1;
    }

    /// Counts and says a failure.
    pub fn fail(&mut self, report: &Report, case: &str, what: &str) {
        self.failed += 1;
        report.line(format!("failed: {case}\n  {what}"));
        report.record("failed", json!({ "case": case, "what": what }));
    }

    /// Says the sums. Wrong where anything failed, or nothing ran.
    pub fn conclude(self, report: &Report) -> Outcome {
        let Tally { passed, failed, skipped } = self;
        for (reason, count) in &skipped {
            report.line(format!("skipped {count}: {reason}"));
        }
        let count: u64 = skipped.values().sum();
        report.record("result", json!({ "passed": passed, "failed": failed, "skipped": count, "reasons": skipped }));
        if passed + failed == 0 {
            report.line("nothing was executed");
        }
        report.line(format!("{passed} passed, {failed} failed, {count} skipped"));
        if failed == 0 && passed > 0 { Outcome::Right } else { Outcome::Wrong }
    }
}
