//! `fam perf`: speed, as a share of what this machine can do. Every case is checked before it is timed.

mod backward;
mod case;
mod check;
mod compare;
mod driver;
mod roof;
mod serve;

use crate::backend::{self, Job, Machine};
use crate::report::Report;
use crate::{Failure, Outcome};
use case::{CASES, PerfCase, Work};
use driver::{Prepared, prepare};
use fam::{Backend, Dtype};
use fam_testkit::Tally;
use indicatif::ProgressBar;
pub use roof::Probe;
use roof::Rates;
use serde_json::json;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Rounds of a case, each of the roof and then samples: a machine that slows down for a while slows both.
const ROUNDS: u32 = 8;

/// Speed, as a share of what this machine can do.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    backend: backend::Options,
    /// Only these cases: A to F, A-backward, B-backward; E-64, or with E all of a letter.
    #[arg(long, value_delimiter = ',')]
    case: Vec<String>,
    /// Element types.
    #[arg(long, value_delimiter = ',', default_value = "f32,f16,bf16")]
    dtype: Vec<Dtype>,
    /// Seconds of samples for each case and dtype (at least 8 samples).
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Measure nothing: compare the --json outputs of two runs.
    #[arg(long, num_args = 2, value_names = ["A.json", "B.json"],
          conflicts_with_all = ["backend", "threads", "case", "dtype", "seconds"])]
    compare: Option<Vec<PathBuf>>,
    /// With --json: write the cases to this folder, then take a sample whenever standard input asks for one (docs/json.md).
    #[arg(long, value_name = "FOLDER", conflicts_with_all = ["seconds", "compare"])]
    serve: Option<PathBuf>,
}

pub fn run(args: &Args, report: &Report) -> Result<Outcome, Failure> {
    if let Some([a, b]) = args.compare.as_deref() {
        return compare::compare(a, b, report);
    }
    if args.serve.is_some() && !report.is_json() {
        return Err("serve: answers are JSON, with --json".into());
    }
    if !(args.seconds > 0.0 && args.seconds <= 3600.0) {
        return Err(format!("seconds = {}: above 0, at most 3600", args.seconds).into());
    }
    if let Some(unknown) = args.case.iter().find(|name| !CASES.iter().any(|c| c.is_named(name))) {
        let names = CASES.map(|c| c.name).join(", ");
        return Err(format!("case = {unknown}: one of {names}, or a letter of them").into());
    }
    let is_chosen = |c: &&PerfCase| args.case.is_empty() || args.case.iter().any(|name| c.is_named(name));
    let mut chosen = Chosen::new();
    for case in CASES.iter().filter(is_chosen) {
        for (i, &dtype) in args.dtype.iter().enumerate() {
            if !args.dtype[..i].contains(&dtype) {
                chosen.push((*case, dtype));
            }
        }
    }
    backend::on(&args.backend, Measure { args, report, chosen })
}

/// Cases to measure, each in a dtype.
type Chosen = Vec<(PerfCase, Dtype)>;

struct Measure<'a> {
    args: &'a Args,
    report: &'a Report,
    chosen: Chosen,
}

impl Job for Measure<'_> {
    type Output = Outcome;

    fn run<H: Machine + Sync>(self, h: &H, reason: &str) -> Result<Outcome, Failure>
    where
        H::Backend: Clone,
    {
        let Measure { args, report, chosen } = self;
        let threads = args.backend.threads.map_or_else(crate::environment::threads, usize::from);
        let (probe, machine) = (h.probe(threads)?, h.machine());
        if let Some(folder) = &args.serve {
            return serve::serve(h, &chosen, &probe, threads, folder, report);
        }
        let Rates { flops, bf16_flops, exps, bytes } = probe.measure()?;
        report.line(format!("backend  {} ({reason}) on {machine}, threads: {threads}", h.backend().name()))?;
        report.line(format!(
            "roof     {:.1} GFLOP/s multiply and add, {:.1} of bf16, {:.2} G exponentials/s, {:.1} GB/s of memory:\n         \
             {}. Measured again beside every case.",
            flops / 1e9,
            bf16_flops / 1e9,
            exps / 1e9,
            bytes / 1e9,
            probe.subject()
        ))?;
        for (i, (case, _)) in chosen.iter().enumerate() {
            if i == 0 || chosen[i - 1].0.name != case.name {
                report.line(format!("{:8} {}", case.name, case.what))?;
            }
        }
        report.line(format!(
            "\n{:9} {:5} {:>10} {:>9} {:>8} {:>9} {:>8}",
            "case", "dtype", "median ms", "GFLOP/s", "GB/s", "roof ms", "share"
        ))?;
        let bar = report.progress(chosen.len() as u64, "cases");
        let mut outcome = Outcome::Right;
        for (case, dtype) in chosen {
            bar.set_message(format!("{} {dtype}: checking", case.name));
            let mut prepared = prepare(h, case, dtype)?;
            let (verdict, _) = prepared.check()?;
            let rounds = match verdict.wrong {
                Some(_) => {
                    outcome = Outcome::Wrong;
                    None
                }
                None => {
                    bar.set_message(format!("{} {dtype}: timing", case.name));
                    Some(time(&mut *prepared, &probe, args.seconds)?)
                }
            };
            say(Measured { case: &case, dtype, threads, kernel: prepared.kernel(), verdict, rounds }, report, &bar)?;
            bar.inc(1);
        }
        bar.finish_and_clear();
        Ok(outcome)
    }
}

/// Samples of a case in seconds, and what the machine could do right before them.
struct Round {
    rates: Rates,
    samples: Vec<f64>,
}

impl Round {
    /// Seconds of one sample under the roof.
    fn roof(&self, case: &PerfCase, work: &Work) -> f64 {
        match case.is_bound_by_memory() {
            true => work.bytes / self.rates.bytes,
            false => work.flops / self.rates.flops + work.bf16_flops / self.rates.bf16_flops + work.exps / self.rates.exps,
        }
    }
}

fn time(prepared: &mut dyn Prepared, probe: &Probe, seconds: f64) -> fam::Result<Vec<Round>> {
    let part = Duration::from_secs_f64(seconds) / ROUNDS;
    let round = |_| {
        let mut round = Round { rates: probe.measure()?, samples: Vec::new() };
        // The probe has emptied the caches.
        prepared.sample()?;
        let first = Instant::now();
        loop {
            let start = Instant::now();
            prepared.sample()?;
            round.samples.push(start.elapsed().as_secs_f64());
            if first.elapsed() >= part {
                return Ok(round);
            }
        }
    };
    (0..ROUNDS).map(round).collect()
}

/// What a case has shown.
struct Measured<'a> {
    case: &'a PerfCase,
    dtype: Dtype,
    threads: usize,
    kernel: String,
    verdict: Tally,
    /// `None` of a wrong result, which has no time.
    rounds: Option<Vec<Round>>,
}

fn say(measured: Measured<'_>, report: &Report, bar: &ProgressBar) -> Result<(), Failure> {
    let Measured { case, dtype, threads, kernel, verdict, rounds } = measured;
    let Some(rounds) = rounds else {
        let wrong = verdict.wrong.map_or_else(String::new, |wrong| wrong.to_string());
        bar.suspend(|| report.line(format!("{:9} {:5} WRONG, so not timed: {wrong}", case.name, dtype.name())))?;
        report.record("wrong", json!({ "case": case.name, "dtype": dtype.name(), "threads": threads, "wrong": wrong }))?;
        return Ok(());
    };
    let work = case.work(dtype);
    let of_rounds = |value: &dyn Fn(&Round) -> f64| median(&rounds.iter().map(value).collect::<Vec<_>>());
    let roof = of_rounds(&|round| round.roof(case, &work));
    let share = of_rounds(&|round| round.roof(case, &work) / median(&round.samples));
    let samples: Vec<f64> = rounds.iter().flat_map(|round| round.samples.iter().copied()).collect();
    let rates: Vec<Rates> = rounds.iter().map(|round| round.rates).collect();
    let median = median(&samples);
    let gb_per_s = case.is_bound_by_memory().then(|| format!("{:.1}", work.bytes / median / 1e9));
    bar.suspend(|| {
        report.line(format!(
            "{:9} {:5} {:10.3} {:9.1} {:>8} {:9.3} {:6.0} %",
            case.name,
            dtype.name(),
            median * 1e3,
            (work.flops + work.bf16_flops) / median / 1e9,
            gb_per_s.unwrap_or_default(),
            roof * 1e3,
            100.0 * share
        ))
    })?;
    report.record(
        "roof",
        json!({ "case": case.name, "dtype": dtype.name(), "threads": threads, "rates": rates, "seconds": roof }),
    )?;
    report.record(
        "perf",
        json!({ "case": case.name, "what": case.what, "dtype": dtype.name(), "threads": threads, "kernel": kernel,
                "compared": verdict.compared, "worst": verdict.worst_ratio(), "calls": case.calls, "flops": work.flops, "bf16_flops": work.bf16_flops, "exps": work.exps,
                "bytes": work.bytes, "samples": samples, "median": median, "share": share }),
    )
}

/// The middle sample, or the mean of the two in the middle. `samples` is not empty.
fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 }
}
