//! `fam test --isolate`: checks in child processes, so that a crash or a hang is one failed check and the run goes on.

use super::{Args, Tally};
use crate::Failure;
use crate::report::Report;
use fam_testkit::{Harness, Outcome, Passed};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

/// A check that takes longer hangs.
const HANG: Duration = Duration::from_secs(60);

/// Runs the shard's checks from number `from` on, and reports each before and after its launch.
pub fn child<H: Harness>(h: &H, args: &Args, from: u64)
where
    H::Backend: Clone,
{
    let say = |value: Value| {
        let mut out = std::io::stdout().lock();
        // Flushed, since the next thing may be a crash. Without a reader there is nothing left to do.
        if writeln!(out, "{value}").and_then(|()| out.flush()).is_err() {
            std::process::exit(1);
        }
    };
    for (number, check) in args.checks().filter(|(number, _)| *number >= from) {
        say(json!({ "start": number, "check": check.to_string(), "description": check.describe() }));
        let (result, text) = match check.run(h, args.level()) {
            Outcome::Passed(_) => ("passed", String::new()),
            Outcome::Failed(what) => ("failed", what),
            Outcome::Skipped(reason) => ("skipped", reason),
        };
        say(json!({ "done": number, "result": result, "text": text }));
    }
}

/// Runs the suite in one child for each thread.
pub fn run(args: &Args, report: &Report) -> Result<Tally, Failure> {
    let workers = crate::environment::threads() as u64;
    let bar = report.progress(args.checks().count() as u64, "checks");
    let mut tally = Tally::new(args.clone());
    let mut failure: Option<String> = None;
    let (sender, results) = channel();
    std::thread::scope(|scope| {
        for worker in 0..workers {
            let sender = sender.clone();
            scope.spawn(move || {
                let mut from = Some(0);
                while let Some(start) = from {
                    match watch(args, worker, workers, start, &mut |check, outcome| drop(sender.send(Ok((check, outcome))))) {
                        Ok(next) => from = next,
                        Err(error) => {
                            drop(sender.send(Err(error.to_string())));
                            return;
                        }
                    }
                }
            });
        }
        drop(sender);
        for result in results {
            let counted = result.and_then(|(started, outcome): (Started, Outcome)| {
                let counted = tally.count(report, &started.description, &started.check, &outcome);
                counted.map_err(|error| error.to_string())
            });
            failure = failure.take().or(counted.err());
            bar.inc(1);
        }
    });
    bar.finish_and_clear();
    failure.map_or(Ok(tally), |error| Err(error.into()))
}

/// A check that a child has launched.
#[derive(Clone, Debug)]
struct Started {
    number: u64,
    check: String,
    description: String,
}

/// Runs one child from check `from` on. Where it dies or hangs, the check in flight has failed and the next number is returned.
fn watch(
    args: &Args,
    worker: u64,
    workers: u64,
    from: u64,
    done: &mut dyn FnMut(Started, Outcome),
) -> Result<Option<u64>, Failure> {
    let (i, n) = args.shard;
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["test", "--child-from", &from.to_string(), "--seed", &args.seed.to_string()]);
    command.args(["--cases", &args.cases.to_string(), "--filter", &args.filter]);
    // A shard of the shard.
    command.args(["--shard", &format!("{}/{}", i + n * worker, n * workers)]);
    command.args(["--backend", args.backend.backend.name()]);
    let threads = args.backend.threads.map(|t| t.to_string());
    for (flag, value) in
        [("--op", args.op.map(|o| o.name())), ("--dtype", args.dtype.map(|d| d.name())), ("--threads", threads.as_deref())]
    {
        command.args(value.map(|v| [flag, v]).into_iter().flatten());
    }
    if args.stat {
        command.arg("--stat");
    }
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let lines = lines(&mut child)?;
    let mut in_flight: Option<Started> = None;
    let death = loop {
        match lines.recv_timeout(HANG) {
            Ok(event) => {
                let text = |key: &str| event[key].as_str().unwrap_or_default().to_string();
                if let Some(number) = event["start"].as_u64() {
                    in_flight = Some(Started { number, check: text("check"), description: text("description") });
                } else if let Some(started) = in_flight.take() {
                    let outcome = match event["result"].as_str() {
                        Some("passed") => Outcome::Passed(Passed::default()),
                        Some("skipped") => Outcome::Skipped(text("text")),
                        _ => Outcome::Failed(text("text")),
                    };
                    done(started, outcome);
                }
            }
            Err(RecvTimeoutError::Timeout) => {
                child.kill()?;
                child.wait()?;
                break format!("hung for {} s", HANG.as_secs());
            }
            Err(RecvTimeoutError::Disconnected) => break format!("the process died: {}", child.wait()?),
        }
    };
    match in_flight {
        Some(started) => {
            let next = started.number + 1;
            done(started, Outcome::Failed(death));
            Ok(Some(next))
        }
        None if child.wait()?.success() => Ok(None),
        None => Err(format!("a child of --isolate ended outside a check: {death}").into()),
    }
}

/// The child's lines of JSON, read on a thread of their own so that waiting for one can time out.
fn lines(child: &mut Child) -> Result<Receiver<Value>, Failure> {
    let out = child.stdout.take().ok_or("a child without standard output")?;
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(out).lines().map_while(Result::ok) {
            let Ok(value) = serde_json::from_str(&line) else { continue };
            if sender.send(value).is_err() {
                return;
            }
        }
    });
    Ok(receiver)
}
