//! `fam`: run, test and measure attention with a memory.
//!
//! Exit codes: 0 right, 1 a wrong result, 2 bad input or an unavailable backend. Errors are one line on standard error.
#![forbid(unsafe_code)]

mod backend;
mod case;
mod check;
mod endless;
mod environment;
mod info;
mod perf;
mod replace;
mod report;
mod run;
mod test;

use clap::error::ErrorKind;
use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Attention kernels with a memory: TransformerFAM and Infini-attention.
#[derive(Parser)]
#[command(name = "fam", version = concat!(env!("CARGO_PKG_VERSION"), " (", env!("FAM_COMMIT"), ")"), propagate_version = true)]
struct Args {
    /// JSON Lines on standard output (docs/json.md).
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Backends, devices and kernels of this machine.
    Info(info::Args),
    /// Real activations through the kernels, checked; or a case file of yours.
    Run(run::Args),
    /// The conformance suite: generated cases against the reference, and the properties of the contract.
    Test(test::Args),
    /// Speed, as a share of what this machine can do.
    Perf(perf::Args),
    /// Writes generated cases with their expected results.
    Case(case::Args),
    /// Judges an output file, of any implementation, with the error bound of its case.
    Check(check::Args),
}

/// What a command found.
#[derive(Clone, Copy, Debug)]
pub enum Outcome {
    /// Every result is right.
    Right,
    /// A result is wrong, or nothing was tested.
    Wrong,
}

/// Why a command could not do its work.
pub type Failure = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    let done = match Args::try_parse() {
        Ok(args) => run(args),
        // Help and version are no errors, and no arguments at all ask for help.
        Err(error) if !error.use_stderr() || error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => error.exit(),
        Err(error) => Err(one_line(&error.to_string()).into()),
    };
    match done {
        Ok(Outcome::Right) => ExitCode::SUCCESS,
        Ok(Outcome::Wrong) => ExitCode::from(1),
        Err(failure) => {
            eprintln!("fam: {}", one_line(&failure.to_string()));
            ExitCode::from(2)
        }
    }
}

/// All lines of an error in one, without what every error of clap begins and ends with.
fn one_line(error: &str) -> String {
    let lines = error.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with("For more information"));
    let line = lines.collect::<Vec<_>>().join(" ");
    line.trim_start_matches("error: ").to_string()
}

fn run(args: Args) -> Result<Outcome, Failure> {
    let report = |command| report::Report::new(args.json, command);
    match args.command {
        Command::Info(a) => info::run(&a, &report("info")?),
        Command::Run(a) => run::run(&a, &report("run")?),
        Command::Test(a) => test::run(&a, &report("test")?),
        Command::Perf(a) => perf::run(&a, &report("perf")?),
        Command::Case(a) => case::run(&a, &report("case")?),
        Command::Check(a) => check::run(&a, &report("check")?),
    }
}
