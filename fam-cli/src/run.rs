//! `fam run`: real activations, or a case file, through the kernels in three ways, checked.

use crate::backend::{self, Job, Machine};
use crate::replace::Replacement;
use crate::report::Report;
use crate::{Failure, Outcome, endless};
use fam::{Backend, Dtype, Streams, Window};
use fam_testkit::{CaseFile, Harness, Mode, Reference, Tensor, Verdict, replay, write_outputs};
use serde_json::json;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Two samples of a real language model's activations, with results computed elsewhere.
pub const SAMPLES: [(&str, &[u8]); 2] = [
    ("smollm2_l29_f32_small", include_bytes!("../samples/smollm2_l29_f32_small.safetensors")),
    ("smollm2_infini_l05_delta_f32", include_bytes!("../samples/smollm2_infini_l05_delta_f32.safetensors")),
];

/// Real activations through the kernels, checked; or a case file of yours.
#[derive(clap::Args)]
pub struct Args {
    /// A case file (safetensors). Default: the samples inside this program.
    case: Option<PathBuf>,
    #[command(flatten)]
    backend: backend::Options,
    /// Only this way: step, prefill or decode. Default: all three.
    #[arg(long, value_parser = mode)]
    mode: Option<Mode>,
    /// Round the inputs to f32, f16 or bf16 first.
    #[arg(long)]
    dtype: Option<Dtype>,
    /// Write the outputs (safetensors); needs a case file.
    #[arg(long, requires = "case", conflicts_with = "tokens")]
    output: Option<PathBuf>,
    /// Loop the case's whole blocks as one endless stream of so many tokens.
    #[arg(long, conflicts_with = "mode", value_parser = clap::value_parser!(u64).range(1..))]
    tokens: Option<u64>,
}

fn mode(name: &str) -> Result<Mode, String> {
    Mode::ALL.into_iter().find(|m| m.name() == name).ok_or_else(|| "one of step, prefill, decode".into())
}

pub fn run(args: &Args, report: &Report) -> Result<Outcome, Failure> {
    // A backend that is not there is the first thing to say.
    fam::select(args.backend.backend)?;
    if let (Some(case), Some(output)) = (&args.case, &args.output)
        && is_same_file(case, output)
    {
        return Err(format!("output = {}: another file than the case", output.display()).into());
    }
    let cases = match &args.case {
        None => SAMPLES.into_iter().map(|(name, bytes)| Ok((name.to_string(), CaseFile::read(bytes)?))).collect(),
        Some(path) => {
            Ok(vec![(path.display().to_string(), CaseFile::open(path).map_err(|e| format!("{}: {e}", path.display()))?)])
        }
    };
    let cases: Vec<_> = cases.map_err(|e: fam::Error| e.to_string())?;
    let mut all = Outcome::Right;
    for (i, (name, case)) in cases.into_iter().enumerate() {
        let case = match args.dtype {
            Some(dtype) if dtype != case.shape.dtype() => case.with_dtype(dtype)?,
            _ => case,
        };
        if i > 0 {
            report.line("")?;
        }
        describe(&name, &case, report)?;
        let outcome = match args.tokens {
            Some(tokens) => backend::on(&args.backend, endless::Endless { name: &name, case: &case, tokens, report })?,
            None => backend::on(&args.backend, Replays { name: &name, case: &case, args, report })?,
        };
        if let Outcome::Wrong = outcome {
            all = Outcome::Wrong;
        }
    }
    if args.case.is_none() && args.tokens.is_none() {
        report.line("\nNext:")?;
        report.line("  fam run --tokens 1000000       the same blocks as one endless stream, in constant memory")?;
        report.line("  fam run CASE.safetensors       activations of your own model (the format: docs/casefile.md)")?;
        report.line("  fam test --cases 10000         generated cases against the reference, on this machine")?;
        report.line("  fam info                       backends and kernels")?;
    }
    Ok(all)
}

/// Whether both paths lead to one file that exists.
fn is_same_file(a: &Path, b: &Path) -> bool {
    matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}

/// The case in words.
fn describe(name: &str, case: &CaseFile, report: &Report) -> Result<(), Failure> {
    let s = &case.shape;
    report.line(name)?;
    if !case.source.is_empty() {
        report.line(format!("  from      {}", case.source))?;
    }
    let window = match s.window() {
        Window::Blocks(1) => "a window of 1 block".into(),
        Window::Tokens(w) => format!("a window of {w} tokens"),
        Window::Blocks(m) => format!("a window of {m} blocks"),
        other => format!("{other:?}"),
    };
    let memory = match (&case.infini, s.mem_len()) {
        (Some(infini), _) => format!("a compressive memory ({:?} rule)", infini.rule).to_lowercase(),
        (None, 0) => "no memory rows".into(),
        (None, f) => format!("{f} memory rows"),
    };
    let streams = if case.batch == 1 { "1 stream".into() } else { format!("{} streams", case.batch) };
    report.line(format!(
        "  shape     {streams} of {} tokens, {} query heads on {} kv heads of {}, {}; blocks of {}, {window}, {memory}",
        case.tokens,
        s.heads(),
        s.kv_heads(),
        s.head_dim(),
        s.dtype(),
        s.block_len()
    ))
}

struct Replays<'a> {
    name: &'a str,
    case: &'a CaseFile,
    args: &'a Args,
    report: &'a Report,
}

impl Job for Replays<'_> {
    type Output = Outcome;

    fn run<H: Machine + Sync>(self, h: &H, reason: &str) -> Result<Outcome, Failure>
    where
        H::Backend: Clone,
    {
        let Replays { name, case, args, report } = self;
        report.line(format!("  backend   {} ({reason})", h.backend().name()))?;
        let output = args.output.as_deref().map(Replacement::new).transpose()?;
        let modes: Vec<Mode> = args.mode.map_or_else(|| Mode::ALL.to_vec(), |m| vec![m]);
        let reference = report.busy("reference", || Reference::new(case))?;
        let mut outcome = Outcome::Right;
        let mut first: Option<BTreeMap<String, Tensor>> = None;
        let mut agree = true;
        for mode in &modes {
            let (outputs, time) = report.busy(mode.name(), || {
                let start = Instant::now();
                replay(h, case, *mode).map(|outputs| (outputs, start.elapsed()))
            })?;
            let verdict = report.busy("judging", || reference.judge(case, &outputs, &h.limits()));
            if verdict.wrong.is_some() || verdict.compared == 0 {
                outcome = Outcome::Wrong;
            }
            say(name, case, *mode, &verdict, time, report)?;
            match &first {
                None => first = Some(outputs),
                Some(first) => agree &= *first == outputs,
            }
        }
        if modes.len() > 1 {
            let how = if agree { "agree bit for bit" } else { "agree within the bound, not bit for bit" };
            report.line(format!("  modes     {how}"))?;
            report.record("modes", json!({ "case": name, "bitwise": agree }))?;
        }
        state(h, name, case, report)?;
        if let (Some(path), Some(output), Some(outputs)) = (&args.output, output, &first) {
            output.finish(&write_outputs(outputs)?)?;
            report.line(format!("  written   {}", path.display()))?;
        }
        Ok(outcome)
    }
}

fn say(name: &str, case: &CaseFile, mode: Mode, verdict: &Verdict, time: Duration, report: &Report) -> Result<(), Failure> {
    let tokens: u64 = case.lengths.iter().sum();
    let rate = tokens as f64 / time.as_secs_f64();
    match &verdict.wrong {
        None if verdict.compared == 0 => report.line(format!("  {:9} NOTHING was compared", mode.name()))?,
        None => report.line(format!(
            "  {:9} right: {} values, worst error {:.3} of its bound; {} tokens/s",
            mode.name(),
            grouped(verdict.compared),
            verdict.worst_ratio(),
            grouped(rate as u64)
        ))?,
        Some((wrong, edges)) => report.line(format!("  {:9} WRONG: {wrong} ({edges})", mode.name()))?,
    }
    if verdict.vacuous > 0 {
        report
            .line(format!("            {} values are not judged (docs/math.md, What is not judged)", grouped(verdict.vacuous)))?;
    }
    let worst: BTreeMap<_, _> = verdict.worst.iter().map(|(name, w)| (*name, w.ratio)).collect();
    report.record(
        "replay",
        json!({ "case": name, "mode": mode.name(), "right": verdict.wrong.is_none() && verdict.compared > 0,
                "compared": verdict.compared, "vacuous": verdict.vacuous,
                "worst": worst, "seconds": time.as_secs_f64(), "tokens": tokens,
                "wrong": verdict.wrong.as_ref().map(|(w, edges)| format!("{w} ({edges})")) }),
    )
}

/// What a stream keeps, beside what a cache of all keys would.
fn state<H: Harness>(h: &H, name: &str, case: &CaseFile, report: &Report) -> Result<(), Failure>
where
    H::Backend: Clone,
{
    let s = &case.shape;
    let plan = h.backend().plan(&s.spec(1, s.block_len()).build()?)?;
    let state = Streams::new(h.backend().clone(), &plan)?.state_bytes();
    let cache = 2 * 1_000_000 * (s.kv_heads() * s.head_dim() * s.dtype().bytes()) as u64;
    report.line(format!(
        "  state     {} bytes a stream, whatever its length; a cache of 1,000,000 tokens: {}",
        grouped(state),
        grouped(cache)
    ))?;
    report.record("state", json!({ "case": name, "bytes": state, "cache_bytes_of_1000000_tokens": cache }))?;
    Ok(())
}

/// 1234567 as 1,234,567.
pub fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}
