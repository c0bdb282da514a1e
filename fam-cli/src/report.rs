//! What a command prints: lines for people, or JSON Lines for programs (docs/json.md), never both on standard output.

use crate::Failure;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use serde_json::{Value, json};
use std::io::Write;
use std::time::Duration;

/// Version of the JSON Lines; grows when a field changes its meaning or goes.
pub const JSON_VERSION: u32 = 1;

/// Where a command's output goes.
#[derive(Clone, Copy, Debug)]
pub struct Report {
    json: bool,
}

impl Report {
    /// Starts a report; in JSON its first line is the environment.
    pub fn new(json: bool, command: &str) -> Result<Self, Failure> {
        let report = Report { json };
        let environment = crate::environment::describe();
        report.record("start", json!({ "version": JSON_VERSION, "command": command, "environment": environment }))?;
        Ok(report)
    }

    /// Whether it is one for programs.
    pub fn is_json(&self) -> bool {
        self.json
    }

    /// A line for people; nothing in JSON.
    pub fn line(&self, text: impl AsRef<str>) -> Result<(), Failure> {
        if self.json { Ok(()) } else { write(text.as_ref()) }
    }

    /// A JSON line of the given type; nothing for people.
    pub fn record(&self, kind: &str, value: impl Serialize) -> Result<(), Failure> {
        if !self.json {
            return Ok(());
        }
        let mut line = json!({ "type": kind });
        if let (Value::Object(line), Ok(Value::Object(fields))) = (&mut line, serde_json::to_value(value)) {
            line.extend(fields);
        }
        write(&line.to_string())
    }

    /// A progress bar on standard error, over `total` steps; hidden in JSON and where standard error is no terminal.
    pub fn progress(&self, total: u64, what: &'static str) -> ProgressBar {
        let style = ProgressStyle::with_template("{prefix} [{bar:30}] {pos}/{len} {msg} (eta {eta})");
        let bar = if self.json { ProgressBar::hidden() } else { ProgressBar::new(total) };
        bar.set_prefix(what);
        style.map_or(bar.clone(), |style| bar.with_style(style.progress_chars("=> ")))
    }

    /// Does work whose length nobody knows, with a turning sign and the seconds that it has taken beside `what`; hidden as the bar is.
    pub fn busy<T>(&self, what: &str, work: impl FnOnce() -> T) -> T {
        let style = ProgressStyle::with_template("{spinner} {msg} ({elapsed})");
        let sign = if self.json { ProgressBar::hidden() } else { ProgressBar::new_spinner() };
        let sign = style.map_or(sign.clone(), |style| sign.with_style(style)).with_message(what.to_string());
        if !sign.is_hidden() {
            sign.enable_steady_tick(Duration::from_millis(100));
        }
        let done = work();
        sign.finish_and_clear();
        done
    }
}

/// A seed in JSON: its 64 bits do not fit the numbers of many readers.
pub fn seed(seed: u64) -> String {
    format!("{seed:#018x}")
}

fn write(line: &str) -> Result<(), Failure> {
    match writeln!(std::io::stdout(), "{line}") {
        // A closed pipe ends the reading, not the work.
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(format!("standard output: {error}").into()),
        _ => Ok(()),
    }
}
