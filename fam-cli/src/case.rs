//! `fam case`: generated cases as files with their expected results.

use crate::replace::Replacement;
use crate::report::Report;
use crate::{Failure, Outcome};
use fam::{Dtype, Op};
use fam_testkit::{Case, Filter, attention_oracle, case_file, case_seed, layer_oracle, merge_oracle};
use serde_json::json;
use std::path::PathBuf;

/// Writes generated cases with their expected results.
#[derive(clap::Args)]
pub struct Args {
    /// attend, or infini: a stream with a compressive memory. With --gradients also merge, or layer: two layers of TransformerFAM.
    #[arg(long, default_value = "attend", value_parser = ["attend", "infini", "merge", "layer"])]
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
    /// Results in f64, and all gradients of a random loss: for implementations in other languages. `fam run` does not read these.
    #[arg(long)]
    gradients: bool,
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
    if matches!(args.op.as_str(), "merge" | "layer") && !args.gradients {
        return Err(format!("op = {}: only with --gradients; a case file is of op attend or infini", args.op).into());
    }
    let bar = report.progress(args.count, "cases");
    let mut seeds = (0..).map(|index| case_seed(args.seed, index));
    for _ in 0..args.count {
        let Some((seed, case, bytes)) = seeds.find_map(|seed| write(args, seed).transpose()).transpose()? else { break };
        let name = format!("{}_{}_{seed:016x}.safetensors", args.op, args.dtype);
        let path = if args.count > 1 { args.out.join(name) } else { args.out.clone() };
        Replacement::new(&path)?.finish(&bytes)?;
        bar.inc(1);
        report.line(format!("{}: {case}", path.display()))?;
        report.record("case", json!({ "path": path.display().to_string(), "seed": crate::report::seed(seed), "case": case }))?;
    }
    bar.finish_and_clear();
    Ok(Outcome::Right)
}

/// The case of a seed, in words and as a file. `None` for what a file cannot hold (one group of rows absent, say) or was not asked for.
fn write(args: &Args, seed: u64) -> Result<Option<(u64, String, Vec<u8>)>, fam::Error> {
    match args.op.as_str() {
        "merge" => return Ok(Some((seed, "merge".into(), merge_oracle(seed)?))),
        "layer" => return Ok(Some((seed, "layer".into(), layer_oracle(seed)?))),
        _ => {}
    }
    let is_infini = args.op == "infini";
    let op = if is_infini { Op::InfiniRead } else { Op::Attend };
    let filter = Filter { ops: vec![op], dtypes: vec![args.dtype], ..Filter::default() };
    let Some(case) = Case::generate(seed, &filter) else { return Ok(None) };
    // Gradients through logits this large are differences of numbers that f64 does not tell apart.
    if args.gradients && case.distribution.has_exact_logits() {
        return Ok(None);
    }
    let Some(file) = case_file(&case)?.filter(|file| file.infini.is_some() == is_infini) else { return Ok(None) };
    let bytes = if args.gradients { attention_oracle(&file, seed)? } else { file.to_bytes()? };
    Ok(Some((case.seed, case.to_string(), bytes)))
}
