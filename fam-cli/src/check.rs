//! `fam check`: anybody's output file against the case that it answers.

use crate::report::Report;
use crate::{Failure, Outcome};
use fam_testkit::{CaseFile, Limits, Reference, read_file, read_outputs};
use serde_json::json;
use std::path::PathBuf;

/// Judges an output file, of any implementation, with the error bound of its case.
#[derive(clap::Args)]
pub struct Args {
    /// The case file.
    case: PathBuf,
    /// A safetensors file with any of o, lse, mem_o, mem_lse, m, z.
    output: PathBuf,
}

pub fn run(args: &Args, report: &Report) -> Result<Outcome, Failure> {
    let of = |path: &std::path::Path, error: fam::Error| format!("{}: {error}", path.display());
    let case = CaseFile::open(&args.case).map_err(|e| of(&args.case, e))?;
    let outputs = read_file(&args.output).and_then(|bytes| read_outputs(&bytes, &case)).map_err(|e| of(&args.output, e))?;
    // Nothing is known of the kernel but its results.
    let reference = report.busy("reference", || Reference::new(&case))?;
    let verdict = report.busy("judging", || reference.judge(&case, &outputs, &Limits::any_kernel()));
    for (name, worst) in &verdict.worst {
        report.line(format!("{name:8} worst error {:.3} of its bound", worst.ratio))?;
        report.record("output", json!({ "name": name, "worst": worst.ratio }))?;
    }
    report.record(
        "verdict",
        json!({ "right": verdict.wrong.is_none() && verdict.compared > 0, "compared": verdict.compared, "vacuous": verdict.vacuous,
                "wrong": verdict.wrong.as_ref().map(|(wrong, edges)| format!("{wrong} ({edges})")) }),
    )?;
    if verdict.vacuous > 0 {
        report.line(format!("{} values are not judged (docs/math.md, What is not judged)", verdict.vacuous))?;
    }
    match verdict.wrong {
        None if verdict.compared == 0 => {
            report.line("not right: nothing was compared")?;
            Ok(Outcome::Wrong)
        }
        None => {
            report.line(format!("right: {} values within the bound", verdict.compared))?;
            Ok(Outcome::Right)
        }
        Some((wrong, edges)) => {
            report.line(format!("wrong: {wrong}"))?;
            report.line(format!("       it lies on: {edges}"))?;
            Ok(Outcome::Wrong)
        }
    }
}
