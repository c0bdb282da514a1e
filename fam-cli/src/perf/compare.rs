//! `fam perf --compare`: two runs, case by case.

use super::median;
use crate::report::{JSON_VERSION, Report};
use crate::{Failure, Outcome};
use fam_testkit::Rng;
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// Two runs of the same program differ by so much on a machine that others use too: less is a tie, however narrow the interval.
const NOISE: f64 = 0.10;
/// Resamplings of the bootstrap.
const RESAMPLES: usize = 2000;

/// One case of a file.
#[derive(Deserialize)]
struct Timed {
    case: String,
    dtype: String,
    threads: usize,
    samples: Vec<f64>,
}

/// A file: what it was measured on, and the samples of each case, dtype and number of threads.
struct Run {
    environment: Value,
    cases: BTreeMap<(String, String, usize), Vec<f64>>,
}

pub fn compare(a: &Path, b: &Path, report: &Report) -> Result<Outcome, Failure> {
    let [a, b] = [read(a)?, read(b)?];
    for field in ["commit", "cpu", "rustc", "profile"] {
        let [of_a, of_b] = [&a, &b].map(|run| run.environment[field].as_str().unwrap_or("unknown"));
        let both = if of_a == of_b { of_a.to_string() } else { format!("{of_a}  →  {of_b}") };
        report.line(format!("{field:8} {both}"))?;
    }
    report.line(format!(
        "{:9} {:5} {:>7} {:>12} {:>12} {:>7}  95 % interval",
        "case", "dtype", "threads", "A ms", "B ms", "B / A"
    ))?;
    let mut compared = 0;
    for (key, of_a) in &a.cases {
        let Some(of_b) = b.cases.get(key) else { continue };
        compared += 1;
        let (case, dtype, threads) = key;
        let ratio = median(of_b) / median(of_a);
        let [low, high] = interval(of_a, of_b);
        let is_tie = (low..=high).contains(&1.0) || (ratio.max(1.0 / ratio) - 1.0) < NOISE;
        let verdict = match is_tie {
            true => "tie",
            false if ratio < 1.0 => "faster",
            false => "slower",
        };
        let [a_ms, b_ms] = [of_a, of_b].map(|samples| median(samples) * 1e3);
        report.line(format!(
            "{case:9} {dtype:5} {threads:7} {a_ms:12.4} {b_ms:12.4} {ratio:7.3}  {low:.3} .. {high:.3}  {verdict}"
        ))?;
        report.record(
            "compare",
            json!({ "case": case, "dtype": dtype, "threads": threads, "a_median": a_ms / 1e3, "b_median": b_ms / 1e3,
                    "ratio": ratio, "low": low, "high": high, "verdict": verdict }),
        )?;
    }
    for (name, run, other) in [("A", &a, &b), ("B", &b, &a)] {
        for (case, dtype, threads) in run.cases.keys().filter(|key| !other.cases.contains_key(*key)) {
            report.line(format!("{case:9} {dtype:5} {threads:7} only in {name}"))?;
        }
    }
    if compared == 0 {
        return Err("the two files have no case, dtype and number of threads in common".into());
    }
    Ok(Outcome::Right)
}

fn read(path: &Path) -> Result<Run, Failure> {
    let bad = |reason: String| format!("{}: {reason}", path.display());
    let text = std::fs::read_to_string(path).map_err(|e| bad(e.to_string()))?;
    Ok(parse(&text).map_err(bad)?)
}

fn parse(text: &str) -> Result<Run, String> {
    let mut run = Run { environment: Value::Null, cases: BTreeMap::new() };
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let bad = |reason: String| format!("line {}: {reason}", number + 1);
        let value: Value = serde_json::from_str(line).map_err(|e| bad(e.to_string()))?;
        match value["type"].as_str() {
            Some("start") if value["version"] != JSON_VERSION => {
                return Err(bad(format!("version = {}: {JSON_VERSION}", value["version"])));
            }
            Some("start") => run.environment = value["environment"].clone(),
            Some("perf") => {
                let timed: Timed = serde_json::from_value(value).map_err(|e| bad(e.to_string()))?;
                if timed.samples.is_empty() || timed.samples.iter().any(|s| !s.is_finite() || *s <= 0.0) {
                    return Err(bad("samples: at least one, each above 0".into()));
                }
                if run.cases.insert((timed.case, timed.dtype, timed.threads), timed.samples).is_some() {
                    return Err(bad("case: there twice".into()));
                }
            }
            Some(_) => {}
            None => return Err(bad("type = absent: a record of `fam perf --json`".into())),
        }
    }
    if run.environment.is_null() || run.cases.is_empty() {
        return Err("no start record or no perf record: write it with `fam perf --json`".into());
    }
    Ok(run)
}

/// Where 95 % of the ratios of medians lie when both runs' samples are drawn anew from themselves (percentile bootstrap).
fn interval(a: &[f64], b: &[f64]) -> [f64; 2] {
    let mut rng = Rng::new(1);
    let mut draw = |samples: &[f64]| {
        let drawn: Vec<f64> = samples.iter().map(|_| samples[rng.below(samples.len())]).collect();
        median(&drawn)
    };
    let mut ratios: Vec<f64> = (0..RESAMPLES).map(|_| draw(b) / draw(a)).collect();
    ratios.sort_by(f64::total_cmp);
    [ratios[RESAMPLES / 40], ratios[RESAMPLES - 1 - RESAMPLES / 40]]
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: &str = r#"{"type":"start","version":1,"environment":{"cpu":"x"}}"#;
    const PERF: &str = r#"{"type":"perf","case":"A","dtype":"f32","threads":2,"samples":[0.25,0.5],"later":1}"#;

    #[test]
    fn files() {
        let run = parse(&format!("{START}\n\n{{\"type\":\"roof\"}}\n{PERF}\n")).unwrap();
        assert_eq!(run.cases[&("A".into(), "f32".into(), 2)], [0.25, 0.5]);
        for (text, reason) in [
            (String::new(), "no start record"),
            (START.into(), "no perf record"),
            (PERF.into(), "no start record"),
            (format!("{START}\n{PERF}\n{PERF}"), "line 3: case: there twice"),
            (format!("{START}\n{PERF}").replace("0.25", "0"), "line 2: samples"),
            (format!("{START}\n{PERF}").replace("0.25", "\"a\""), "line 2: invalid type"),
            (format!("{START}\n{PERF}").replace("0.25,0.5", ""), "line 2: samples"),
            (START.replace("1", "2"), "line 1: version = 2"),
            ("{}".into(), "line 1: type = absent"),
            ("A 0.25".into(), "line 1: expected value"),
        ] {
            let error = parse(&text).err().unwrap();
            assert!(error.contains(reason), "{error} lacks {reason}");
        }
    }

    #[test]
    fn interval_holds_the_ratio() {
        let mut rng = Rng::new(7);
        let mut run = |scale: f64| -> Vec<f64> { (0..50).map(|_| scale * (1.0 + 0.05 * rng.unit())).collect() };
        let (a, b) = (run(1.0), run(2.0));
        let [low, high] = interval(&a, &b);
        assert!(low <= 2.0 && 2.0 <= high && high - low < 0.1, "{low} {high}");
        let [low, high] = interval(&a, &a);
        assert!(low <= 1.0 && 1.0 <= high);
    }
}
