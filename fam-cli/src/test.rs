//! `fam test`: the conformance suite, inside this one program, so that a copied file verifies a machine that has no Rust.

mod check;
mod isolate;
mod tally;

use crate::backend::{self, Job, Machine};
use crate::report::Report;
use crate::{Failure, Outcome};
pub use check::seed;
use check::{Check, Table};
use fam::{Dtype, Op};
use fam_testkit::{Filter, Harness, Level};
use serde_json::json;
use std::collections::BTreeSet;
use std::sync::Mutex;
use std::time::{Duration, Instant};
use tally::Tally;

/// The conformance suite: generated cases against the reference, and the properties of the contract.
#[derive(clap::Args, Clone)]
pub struct Args {
    #[command(flatten)]
    pub backend: backend::Options,
    /// Only generated cases of this op.
    #[arg(long, value_parser = op)]
    op: Option<Op>,
    /// Only generated cases of the backward ops, which are one in five otherwise.
    #[arg(long)]
    gradients: bool,
    /// Only generated cases with inputs of this dtype.
    #[arg(long)]
    dtype: Option<Dtype>,
    /// Only generated cases whose line contains this text (see --list).
    #[arg(long, default_value = "")]
    filter: String,
    /// Generated cases that pass the filters. Without a filter the suite has, beside them, recorded activations, refused calls, and for
    /// every ten cases a property and the life of some streams.
    #[arg(long, default_value_t = 10_000, conflicts_with = "seconds")]
    cases: u64,
    /// Go on for so many seconds instead.
    #[arg(long, value_parser = seconds)]
    seconds: Option<f64>,
    /// Decides every check; decimal, or 0x and hexadecimal.
    #[arg(long, default_value = "1", value_parser = check::seed)]
    seed: u64,
    /// Hold results to the tighter, statistical bound. It is calibrated for fixed seeds and can be passed by bad luck elsewhere.
    #[arg(long)]
    stat: bool,
    /// Only every n-th check, from number i (counted from 0) on: i/n.
    #[arg(long, default_value = "0/1", value_parser = shard)]
    shard: (u64, u64),
    /// Run the checks in child processes: a crash, or a hang, is one failed check.
    #[arg(long, conflicts_with_all = ["seconds", "list", "replay"])]
    isolate: bool,
    /// With --isolate: a check that takes longer hangs.
    #[arg(long, default_value = "60", value_name = "SECONDS", value_parser = seconds)]
    hang: f64,
    /// Name the checks instead of running them.
    #[arg(long, conflicts_with_all = ["seconds", "replay"])]
    list: bool,
    /// Run one check, by the name that a failure prints.
    #[arg(long)]
    replay: Option<Check>,
    /// Start at this check, and report each as a line of JSON: a child of --isolate.
    #[arg(long, hide = true)]
    child_from: Option<u64>,
}

fn op(name: &str) -> Result<Op, String> {
    Op::ALL.into_iter().find(|o| o.name() == name).ok_or_else(|| format!("one of {}", Op::ALL.map(Op::name).join(", ")))
}

fn seconds(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|s| *s > 0.0 && *s <= 1e6).ok_or_else(|| "a number above 0, at most 1000000".into())
}

fn shard(text: &str) -> Result<(u64, u64), String> {
    let parts = text.split_once('/').and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
    parts.filter(|(i, n)| i < n).ok_or_else(|| "i/n with i below n".into())
}

impl Args {
    fn level(&self) -> Level {
        if self.stat { Level::Stat } else { Level::Hard }
    }

    fn filter(&self) -> Filter {
        Filter { ops: self.op.into_iter().collect(), dtypes: self.dtype.into_iter().collect(), text: self.filter.clone() }
    }

    /// Whose cases are generated: those of all ops, or of the kind that was asked for.
    fn table(&self) -> Table {
        match self.op {
            Some(op) if Op::FORWARD.contains(&op) && !self.gradients => Table::Forward,
            None if !self.gradients => Table::All,
            _ => Table::Gradients,
        }
    }

    /// The checks of this shard with their numbers in the suite; `None` where the search for the next one goes on.
    fn checks(&self) -> impl Iterator<Item = Option<(u64, Check)>> + use<> {
        let cases = self.seconds.is_none().then_some(self.cases);
        let (i, n) = self.shard;
        let mut numbers = 0..;
        check::suite(self.seed, cases, self.filter(), self.table()).filter_map(move |check| match check {
            None => Some(None),
            Some(check) => numbers.next().filter(|number| number % n == i).map(|number| Some((number, check))),
        })
    }

    /// How many checks this shard has, unless the filter leaves fewer cases than were asked for.
    fn count(&self) -> u64 {
        let (i, n) = self.shard;
        check::count(self.cases, &self.filter(), self.table()).saturating_sub(i).div_ceil(n)
    }

    /// The command that runs one check again.
    fn replay_command(&self, check: &str) -> String {
        let backend = self.backend.backend.name();
        format!("fam test --backend {backend}{} --replay {check}", if self.stat { " --stat" } else { "" })
    }
}

pub fn run(args: &Args, report: &Report) -> Result<Outcome, Failure> {
    // A backend that is not there is the first thing to say.
    fam::select(args.backend.backend)?;
    if args.replay.is_none() && args.child_from.is_none() {
        // A filter that nothing passes is bad input rather than a suite of nothing.
        let search = || check::suite(args.seed, Some(1), args.filter(), args.table()).any(|check| check.is_some());
        let found = report.busy("searching", search);
        if !found {
            let Filter { ops, dtypes, text } = args.filter();
            return Err(format!("no case of {} matches: ops {ops:?}, dtypes {dtypes:?}, text {text:?}", check::TRIES).into());
        }
    }
    if args.list {
        for (number, check) in args.checks().flatten() {
            report.line(format!("{check}  {}", check.describe()))?;
            report.record("check", json!({ "number": number, "check": check.to_string(), "description": check.describe() }))?;
        }
        return Ok(Outcome::Right);
    }
    if args.isolate {
        return isolate::run(args, report)?.conclude(report);
    }
    backend::on(&args.backend, Suite { args, report })
}

struct Suite<'a> {
    args: &'a Args,
    report: &'a Report,
}

impl Job for Suite<'_> {
    type Output = Outcome;

    fn run<H: Machine + Sync>(self, h: &H, reason: &str) -> Result<Outcome, Failure>
    where
        H::Backend: Clone,
    {
        let Suite { args, report } = self;
        if let Some(from) = args.child_from {
            isolate::child(h, args, from);
            return Ok(Outcome::Right);
        }
        report.line(format!("backend {} ({reason})", fam::Backend::name(h.backend())))?;
        let mut tally = Tally::new(args.clone());
        if let Some(check) = &args.replay {
            report.line(check.describe())?;
            let outcome = report.busy("running", || check.run(h, args.level()));
            tally.add(report, check, &outcome)?;
            return tally.conclude(report);
        }
        side_by_side(h, args, report, &mut tally)?;
        tally.statistics(report)?;
        tally.conclude(report)
    }
}

/// Runs the checks on several threads. A crash takes this process with it: the names of the checks in flight are on disk before each launch.
fn side_by_side<H: Harness + Sync>(h: &H, args: &Args, report: &Report, tally: &mut Tally) -> Result<(), Failure>
where
    H::Backend: Clone,
{
    let in_flight_file = std::env::temp_dir().join(format!("fam-test-{}.in-flight", std::process::id()));
    report.line(format!("checks in flight, should this crash: {}", in_flight_file.display()))?;
    let end = args.seconds.map(|s| Instant::now() + Duration::from_secs_f64(s));
    // Along the seconds, or along the checks.
    let (start, mut done) = (Instant::now(), 0u64);
    let bar = match args.seconds {
        Some(seconds) => report.progress(seconds.ceil() as u64, "seconds"),
        None => report.progress(args.count(), "checks"),
    };
    let mut step = || {
        done += 1;
        match args.seconds {
            Some(_) => {
                bar.set_position(start.elapsed().as_secs());
                bar.set_message(format!("{done} checks"));
            }
            None => bar.inc(1),
        }
    };
    let state = Mutex::new((args.checks(), BTreeSet::new(), tally, &mut step, None));
    let worker = || {
        loop {
            let check = {
                let (checks, in_flight, .., failure) = &mut *state.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                if failure.is_some() || end.is_some_and(|end| Instant::now() >= end) {
                    return;
                }
                let check = match checks.next() {
                    None => return,
                    // The search goes on, after a look at the clock.
                    Some(None) => continue,
                    Some(Some((_, check))) => check,
                };
                in_flight.insert(check.to_string());
                let text: String = in_flight.iter().map(|check| format!("{}\n", args.replay_command(check))).collect();
                // Without the file a crash is harder to find again, and nothing else.
                let _ = std::fs::write(&in_flight_file, text);
                check
            };
            let outcome = check.run(h, args.level());
            let (_, in_flight, tally, step, failure) = &mut *state.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            in_flight.remove(&check.to_string());
            let mut add = || tally.add(report, &check, &outcome);
            // Only a failure is said at once, and not into the bar.
            let added = if matches!(outcome, fam_testkit::Outcome::Failed(_)) { bar.suspend(add) } else { add() };
            if let Err(error) = added {
                // Not the failure itself, which may not cross threads.
                *failure = Some(error.to_string());
            }
            step();
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..crate::environment::threads() {
            scope.spawn(worker);
        }
        worker();
    });
    bar.finish_and_clear();
    let _ = std::fs::remove_file(&in_flight_file);
    let (.., failure) = state.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
    failure.map_or(Ok(()), |error| Err(error.into()))
}
