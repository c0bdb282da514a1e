//! `fam test --isolate`: checks in child processes, so that a crash or a hang is one failed check and the run goes on.

use super::{Args, Tally};
use crate::Failure;
use crate::report::Report;
use fam_testkit::{Harness, Outcome, Passed};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::JoinHandle;
use std::time::Duration;

/// Lines of a dead child's standard error that its failure quotes.
const LAST_WORDS: usize = 4;

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
    for found in args.checks() {
        let Some((number, check)) = found else {
            say(json!({ "searching": true }));
            continue;
        };
        if number < from {
            continue;
        }
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
    let bar = report.progress(args.count(), "checks");
    let hang = Duration::from_secs_f64(args.hang);
    let mut tally = Tally::new(args.clone());
    let mut failure: Option<String> = None;
    let (sender, results) = channel();
    std::thread::scope(|scope| {
        for worker in 0..workers {
            let sender = sender.clone();
            scope.spawn(move || {
                let mut from = Some(0);
                while let Some(start) = from {
                    let mut done = |check, outcome| drop(sender.send(Ok((check, outcome))));
                    match command(args, worker, workers, start).and_then(|command| watch(command, hang, &mut done)) {
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
                let mut count = || tally.count(report, &started.description, &started.check, &outcome);
                let counted = if matches!(outcome, Outcome::Failed(_)) { bar.suspend(count) } else { count() };
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

/// The child that runs a worker's share of the shard's checks, from check `from` on.
fn command(args: &Args, worker: u64, workers: u64, from: u64) -> Result<Command, Failure> {
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
    if args.gradients {
        command.arg("--gradients");
    }
    if args.stat {
        command.arg("--stat");
    }
    Ok(command)
}

/// Runs one child. Where it dies or hangs, the check in flight has failed and the next number is returned.
fn watch(mut command: Command, hang: Duration, done: &mut dyn FnMut(Started, Outcome)) -> Result<Option<u64>, Failure> {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let (lines, last_words) = (lines(&mut child)?, last_words(&mut child)?);
    let mut in_flight: Option<Started> = None;
    let death = loop {
        match lines.recv_timeout(hang) {
            Ok(event) => {
                let text = |key: &str| event[key].as_str().unwrap_or_default().to_string();
                if let Some(number) = event["start"].as_u64() {
                    in_flight = Some(Started { number, check: text("check"), description: text("description") });
                } else if event["done"].is_u64()
                    && let Some(started) = in_flight.take()
                {
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
                break format!("hung for {} s", hang.as_secs_f64());
            }
            Err(RecvTimeoutError::Disconnected) => break format!("the process died: {}", child.wait()?),
        }
    };
    let last_words = last_words.join().unwrap_or_default();
    let death = if last_words.is_empty() { death } else { format!("{death}: {last_words}") };
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

/// The end of what the child says on standard error, in one line. Read as it comes: a full pipe would stop the child.
fn last_words(child: &mut Child) -> Result<JoinHandle<String>, Failure> {
    let err = child.stderr.take().ok_or("a child without standard error")?;
    Ok(std::thread::spawn(move || {
        let mut last = VecDeque::new();
        for line in BufReader::new(err).lines().map_while(Result::ok).filter(|line| !line.trim().is_empty()) {
            last.push_back(line);
            if last.len() > LAST_WORDS {
                last.pop_front();
            }
        }
        Vec::from(last).join("; ")
    }))
}

#[cfg(all(test, unix))]
mod tests {
    use super::{Started, watch};
    use fam_testkit::Outcome;
    use std::process::Command;
    use std::time::{Duration, Instant};

    const HANG: Duration = Duration::from_millis(500);

    type Outcomes = Vec<(String, Outcome)>;

    /// What `watch` says of a child that runs this script: the outcomes of its checks, and how it ended.
    fn watched(script: &str) -> (Outcomes, Result<Option<u64>, String>) {
        let mut shell = Command::new("sh");
        shell.args(["-c", script]);
        let mut outcomes = Vec::new();
        let end = watch(shell, HANG, &mut |Started { check, .. }, outcome| outcomes.push((check, outcome)));
        (outcomes, end.map_err(|error| error.to_string()))
    }

    const FIRST: &str = r#"echo '{"start":3,"check":"a"}'; echo '{"done":3,"result":"skipped","text":"no ring"}';"#;
    const SECOND: &str = r#"echo '{"start":5,"check":"b"}';"#;

    #[test]
    fn a_child_that_ends_in_peace_has_done_its_checks() {
        let (outcomes, end) = watched(FIRST);
        assert_eq!((outcomes, end), (vec![("a".into(), Outcome::Skipped("no ring".into()))], Ok(None)));
    }

    #[test]
    fn a_crash_is_one_failed_check_and_quotes_the_last_words() {
        let (outcomes, end) = watched(&format!("{FIRST} {SECOND} echo lost >&2; echo 'stack overflow' >&2; kill -ABRT $$"));
        assert_eq!(end, Ok(Some(6)), "the run goes on behind the check in flight");
        let [(_, Outcome::Skipped(_)), (name, Outcome::Failed(why))] = &outcomes[..] else { panic!("{outcomes:?}") };
        assert_eq!(name, "b");
        assert!(why.contains("the process died: signal: 6") && why.ends_with(": lost; stack overflow"), "{why}");
    }

    #[test]
    fn a_hang_is_one_failed_check_and_the_child_is_killed() {
        let start = Instant::now();
        let (outcomes, end) = watched(&format!("{FIRST} {SECOND} exec sleep 60"));
        assert!(start.elapsed() < Duration::from_secs(30), "{:?}", start.elapsed());
        assert_eq!(end, Ok(Some(6)));
        assert_eq!(outcomes[1], ("b".into(), Outcome::Failed("hung for 0.5 s".into())));
    }

    #[test]
    fn a_child_that_searches_does_not_hang() {
        let beat = r#"sleep 0.3; echo '{"searching":true}';"#;
        let (outcomes, end) = watched(&format!("{beat} {beat} {beat} {FIRST}"));
        assert_eq!((outcomes.len(), end), (1, Ok(None)));
    }

    #[test]
    fn a_death_outside_a_check_ends_the_run_in_one_line() {
        let (outcomes, end) = watched(&format!("{FIRST} echo 'fam: no such backend' >&2; exit 2"));
        assert_eq!(outcomes.len(), 1);
        let error = end.unwrap_err();
        assert!(error.contains("outside a check") && error.ends_with(": fam: no such backend"), "{error}");
    }
}
