//! Counting outcomes, and saying the failed ones at once.

use super::Args;
use super::check::Check;
use crate::report::Report;
use crate::{Failure, Outcome};
use fam_testkit::Outcome as CheckOutcome;
use serde_json::json;
use std::collections::BTreeMap;

pub struct Tally {
    args: Args,
    passed: u64,
    failed: u64,
    /// Counts by reason.
    skipped: BTreeMap<String, u64>,
    /// Coverage, bias and worst errors of generated cases.
    generated: fam_testkit::Report,
}

impl Tally {
    pub fn new(args: Args) -> Self {
        Tally { args, passed: 0, failed: 0, skipped: BTreeMap::new(), generated: fam_testkit::Report::default() }
    }

    /// Counts a check.
    pub fn add(&mut self, report: &Report, check: &Check, outcome: &CheckOutcome) -> Result<(), Failure> {
        if let Check::Case(case) = check {
            self.generated.add(case.seed, case, outcome);
        }
        self.count(report, &check.describe(), &check.to_string(), outcome)
    }

    /// Counts a check of a child process, by description and name.
    pub fn count(&mut self, report: &Report, what: &str, check: &str, outcome: &CheckOutcome) -> Result<(), Failure> {
        match outcome {
            CheckOutcome::Passed(_) => self.passed += 1,
            CheckOutcome::Skipped(reason) => *self.skipped.entry(reason.clone()).or_default() += 1,
            CheckOutcome::Failed(why) => {
                let replay = self.args.replay_command(check);
                self.fail(report, what, why, Some(&replay))?;
            }
        }
        Ok(())
    }

    fn fail(&mut self, report: &Report, what: &str, why: &str, replay: Option<&str>) -> Result<(), Failure> {
        self.failed += 1;
        report.line(format!("failed: {what}\n  {why}"))?;
        if let Some(replay) = replay {
            report.line(format!("  replay: {replay}"))?;
        }
        report.record("failed", json!({ "check": what, "why": why, "replay": replay }))
    }

    /// Says what the generated cases covered, their worst error and their bias; a bias is a failure.
    pub fn statistics(&mut self, report: &Report) -> Result<(), Failure> {
        let generated = std::mem::take(&mut self.generated);
        if generated.executed() == 0 {
            return Ok(());
        }
        report.line(generated.coverage.to_string())?;
        for (op, dtype, distribution, cases) in generated.coverage.inputs() {
            let input = json!({ "op": op, "dtype": dtype, "distribution": distribution.name(), "cases": cases });
            report.record("coverage", input)?;
        }
        for (op, axis, value, count) in generated.coverage.axes() {
            report.record("axis", json!({ "op": op, "axis": axis, "value": value, "count": count }))?;
        }
        let (compared, vacuous) = (generated.compared, generated.vacuous);
        report.line(format!("{compared} elements compared; {vacuous} not judged (docs/math.md, What is not judged)"))?;
        if let Some((worst, case)) = &generated.worst {
            report.line(format!("worst error {:.3} of its bound, in {case}", worst.ratio))?;
        }
        for (dtype, bias) in &generated.bias {
            report.line(format!("bias of {dtype} outputs: {:.4} of u·A, over {} elements", bias.share(), bias.count))?;
        }
        if let Some((dtype, share)) = generated.biased() {
            self.fail(report, "rounding bias", &format!("{dtype} outputs lean to one side by {share:.3} of u·A"), None)?;
        }
        let (digest, worst) = (format!("{:016x}", generated.digest), generated.worst.map(|(w, _)| w.ratio));
        let bias: BTreeMap<_, _> = generated.bias.iter().map(|(dtype, bias)| (*dtype, bias.share())).collect();
        let seed = crate::report::seed(self.args.seed);
        report.record(
            "suite",
            json!({ "seed": seed, "digest": digest, "compared": compared, "vacuous": vacuous, "worst": worst, "bias": bias }),
        )
    }

    /// Says the sums. Wrong where anything failed, or nothing ran.
    pub fn conclude(self, report: &Report) -> Result<Outcome, Failure> {
        let Tally { passed, failed, skipped, .. } = self;
        for (reason, count) in &skipped {
            report.line(format!("skipped {count}: {reason}"))?;
        }
        let count: u64 = skipped.values().sum();
        report.record("result", json!({ "passed": passed, "failed": failed, "skipped": count, "reasons": skipped }))?;
        if passed + failed == 0 {
            report.line("nothing was executed")?;
        }
        report.line(format!("{passed} passed, {failed} failed, {count} skipped"))?;
        Ok(if failed == 0 && passed > 0 { Outcome::Right } else { Outcome::Wrong })
    }
}
