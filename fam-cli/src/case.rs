//! `fam case`: generated cases as files with their expected results.

use crate::report::Report;
use crate::{Failure, Outcome};
use fam::{Dtype, Op};
use fam_testkit::{Case, Filter, case_file, case_seed};
use serde_json::json;
use std::path::PathBuf;

/// Writes generated cases with their expected results.
#[derive(clap::Args)]
pub struct Args {
    /// attend, or infini: a stream with a compressive memory.
    #[arg(long, default_value = "attend", value_parser = ["attend", "infini"])]
    op: String,
    /// f32, f16 or bf16.
    #[arg(long, default_value = "f32")]
    dtype: Dtype,
    /// Decides every case.
    #[arg(long, default_value = "1", value_parser = crate::test::seed)]
    seed: u64,
    /// How many.
    #[arg(long, default_value_t = 1)]
    count: u64,
    /// The file; with --count above 1 a folder.
    #[arg(long)]
    out: PathBuf,
}

pub fn run(args: &Args, report: &Report) -> Result<Outcome, Failure> {
    if args.count == 0 {
        return Err("count = 0: at least 1".into());
    }
    if args.count > 1 {
        std::fs::create_dir_all(&args.out).map_err(|e| format!("{}: {e}", args.out.display()))?;
    }
    let op = if args.op == "infini" { Op::InfiniRead } else { Op::Attend };
    let filter = Filter { ops: vec![op], dtypes: vec![args.dtype], ..Filter::default() };
    let bar = report.progress(args.count, "cases");
    let mut written = 0;
    for index in 0.. {
        if written == args.count {
            break;
        }
        let Some(case) = Case::generate(case_seed(args.seed, index), &filter) else { continue };
        // Cases that a file cannot hold (one group of rows absent, say) are passed over.
        let Some(file) = case_file(&case)? else { continue };
        let name = format!("{}_{}_{:016x}.safetensors", args.op, args.dtype, case.seed);
        let path = if args.count > 1 { args.out.join(name) } else { args.out.clone() };
        std::fs::write(&path, file.to_bytes()?).map_err(|e| format!("{}: {e}", path.display()))?;
        bar.inc(1);
        report.line(format!("{}: {case}", path.display()))?;
        report.record(
            "case",
            json!({ "path": path.display().to_string(), "seed": crate::report::seed(case.seed), "case": case.to_string() }),
        )?;
        written += 1;
    }
    bar.finish_and_clear();
    Ok(Outcome::Right)
}
