//! `fam test`: the conformance suite, inside this one program, so that a copied file verifies a machine that has no Rust.

mod fixed;
mod isolate;
mod tally;

use crate::backend::{self, Job};
use crate::report::Report;
use crate::{Failure, Outcome};
use fam::{Dtype, Op};
use fam_testkit::{Budget, Case, Event, Filter, Harness, Level, SuiteOptions, case_seed, run_case, run_suite};
use serde_json::json;
use std::collections::BTreeSet;
use tally::Tally;

/// The conformance suite: generated cases against the reference, and the properties of the contract.
#[derive(clap::Args, Clone)]
pub struct Args {
    #[command(flatten)]
    pub backend: backend::Options,
    /// Only cases of this op.
    #[arg(long, value_parser = op)]
    op: Option<Op>,
    /// Only cases with inputs of this dtype.
    #[arg(long)]
    dtype: Option<Dtype>,
    /// Only cases whose line contains this text (see --list).
    #[arg(long, default_value = "")]
    filter: String,
    /// Generated cases.
    #[arg(long, default_value_t = 10_000, conflicts_with = "seconds")]
    cases: u64,
    /// Generate cases for so long instead.
    #[arg(long)]
    seconds: Option<f64>,
    /// Decides every case.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Hold results to the tighter, statistical bound. It is calibrated for fixed seeds and can be passed by bad luck elsewhere.
    #[arg(long)]
    stat: bool,
    /// Only cases i, i + n, i + 2n, …: i/n.
    #[arg(long, default_value = "0/1", value_parser = shard)]
    shard: (u64, u64),
    /// Run cases in child processes: a crash, or a hang of 60 s, is one failed case.
    #[arg(long, conflicts_with = "seconds")]
    isolate: bool,
    /// Name the cases instead of running them.
    #[arg(long)]
    list: bool,
    /// Run the one generated case, the properties and the stream of this seed, as a failure prints it.
    #[arg(long)]
    replay: Option<u64>,
    /// Start at this case, and report each case as a line of JSON: a child of --isolate.
    #[arg(long, hide = true)]
    child_from: Option<u64>,
}

fn op(name: &str) -> Result<Op, String> {
    Op::ALL.into_iter().find(|o| o.name() == name).ok_or_else(|| format!("one of {}", Op::ALL.map(Op::name).join(", ")))
}

fn shard(text: &str) -> Result<(u64, u64), String> {
    let parts = text.split_once('/').and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
    parts.filter(|(i, n)| i < n).ok_or_else(|| "i/n with i below n".into())
}

impl Args {
    fn suite(&self, threads: usize) -> SuiteOptions {
        SuiteOptions {
            seed: self.seed,
            budget: self.seconds.map_or(Budget::Cases(self.cases), Budget::Seconds),
            filter: self.case_filter(),
            shard: self.shard,
            level: self.level(),
            threads,
            ..SuiteOptions::default()
        }
    }

    fn case_filter(&self) -> Filter {
        Filter { ops: self.op.into_iter().collect(), dtypes: self.dtype.into_iter().collect(), text: self.filter.clone() }
    }

    fn level(&self) -> Level {
        if self.stat { Level::Stat } else { Level::Hard }
    }

    /// No filter leaves out a part of the suite.
    fn is_whole(&self) -> bool {
        self.op.is_none() && self.dtype.is_none() && self.filter.is_empty()
    }

    /// Numbers of the suite's cases, in this shard.
    fn indices(&self) -> impl Iterator<Item = u64> + use<> {
        let (i, n) = self.shard;
        (i..self.cases).step_by(n as usize)
    }
}

pub fn run(args: &Args, report: &Report) -> Result<Outcome, Failure> {
    if args.list {
        for index in args.indices() {
            if let Some(case) = Case::generate(case_seed(args.seed, index), &args.case_filter()) {
                report.line(case.to_string());
                report.record("case", json!({ "index": index, "seed": case.seed, "case": case.to_string() }));
            }
        }
        return Ok(Outcome::Right);
    }
    if args.isolate {
        let tally = isolate::run(args, report)?;
        return Ok(tally.conclude(report));
    }
    backend::on(&args.backend, Suite { args, report })
}

struct Suite<'a> {
    args: &'a Args,
    report: &'a Report,
}

impl Job for Suite<'_> {
    type Output = Outcome;

    fn run<H: Harness + Sync>(self, h: &H, reason: &str) -> Result<Outcome, Failure>
    where
        H::Backend: Clone,
    {
        let Suite { args, report } = self;
        if let Some(from) = args.child_from {
            isolate::child(h, args, from);
            return Ok(Outcome::Right);
        }
        report.line(format!("backend {} ({reason})", fam::Backend::name(h.backend())));
        let mut tally = Tally::default();
        if let Some(seed) = args.replay {
            let case = Case::from_seed(seed);
            report.line(case.to_string());
            tally.add(report, &case.to_string(), seed, &run_case(h, &case, args.level()));
            fixed::of_seed(h, seed, report, &mut tally);
            return Ok(tally.conclude(report));
        }
        if args.is_whole() {
            fixed::run(h, args, report, &mut tally)?;
        }
        generated(h, args, report, &mut tally);
        Ok(tally.conclude(report))
    }
}

/// The generated cases.
fn generated<H: Harness + Sync>(h: &H, args: &Args, report: &Report, tally: &mut Tally) {
    // A crash takes this process with it: the seeds of the cases in flight are on disk before each launch.
    let seeds = std::env::temp_dir().join(format!("fam-test-{}.seeds", std::process::id()));
    let mut in_flight = BTreeSet::new();
    let total = args.seconds.map_or(args.indices().count() as u64, |s| s as u64);
    let bar = report.progress(total, if args.seconds.is_some() { "seconds" } else { "cases" });
    let started = std::time::Instant::now();
    let suite = run_suite(h, &args.suite(crate::environment::threads()), &mut |event| match event {
        Event::Start { case, .. } => {
            in_flight.insert(case.seed);
            let text: String = in_flight.iter().map(|seed| format!("fam test --replay {seed}\n")).collect();
            // Without the file a crash is harder to find again, and nothing else.
            let _ = std::fs::write(&seeds, text);
        }
        Event::Done { case, outcome, .. } => {
            in_flight.remove(&case.seed);
            tally.add(report, &case.to_string(), case.seed, outcome);
            if args.seconds.is_some() {
                bar.set_position(started.elapsed().as_secs());
            } else {
                bar.inc(1);
            }
        }
    });
    bar.finish_and_clear();
    let _ = std::fs::remove_file(&seeds);
    report.line(suite.coverage.to_string());
    if let Some((worst, case)) = &suite.worst {
        report.line(format!("worst error {:.3} of its bound, in {case}", worst.ratio));
    }
    for (dtype, bias) in &suite.bias {
        report.line(format!("bias of {dtype} outputs: {:.4} of u·mean(A), over {} elements", bias.share(), bias.count));
    }
    if let Some((dtype, share)) = suite.biased() {
        tally.fail(report, "rounding bias", &format!("{dtype} outputs lean to one side by {share:.3} of u·mean(A)"));
    }
    report.record(
        "suite",
        json!({ "seed": args.seed, "digest": format!("{:016x}", suite.digest), "worst": suite.worst.map(|(w, _)| w.ratio) }),
    );
}
