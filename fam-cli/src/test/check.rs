//! What the suite runs: one numbered list of checks, so that children, shards, lists and replays all mean the same.

use crate::run::SAMPLES;
use fam_testkit::{
    Case, CaseFile, Filter, Harness, Level, Mode, Outcome, PROPERTIES, Passed, Property, Reference, case_seed, invalid_calls,
    replay, run_case, run_property, run_streams,
};
use std::fmt;

/// Of so many generated cases, one more check is a property, and one the life of some streams.
const SHARE: u64 = 10;

/// One check. Its text is what replays it: `case:0x…`, `property-Splits:0x…`, `streams:0x…`, `sample:…:step`, `refusals`.
#[derive(Clone, Debug)]
pub enum Check {
    /// Real activations, against the reference and results computed elsewhere.
    Sample(usize, Mode),
    /// Calls that must be refused, with nothing written.
    Refusals,
    /// A property of the contract.
    Property(Property, u64),
    /// Streams under random events.
    Streams(u64),
    /// A generated case of one op.
    Case(Box<Case>),
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Check::Sample(i, mode) => write!(f, "sample:{}:{mode}", SAMPLES[*i].0),
            Check::Refusals => f.write_str("refusals"),
            Check::Property(property, seed) => write!(f, "property-{property:?}:{seed:#018x}"),
            Check::Streams(seed) => write!(f, "streams:{seed:#018x}"),
            Check::Case(case) => write!(f, "case:{:#018x}", case.seed),
        }
    }
}

/// A seed in decimal or, with 0x, in hexadecimal.
pub fn seed(text: &str) -> Result<u64, String> {
    let parsed = text.strip_prefix("0x").map_or_else(|| text.parse(), |hex| u64::from_str_radix(hex, 16));
    parsed.map_err(|_| "an integer of 64 bits, decimal or 0x…".into())
}

impl std::str::FromStr for Check {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let rule = || "what a failure prints: case:0x…, property-Splits:0x…, streams:0x…, sample:…:step or refusals".to_string();
        if text == "refusals" {
            return Ok(Check::Refusals);
        }
        if let Some(sample) = text.strip_prefix("sample:") {
            let found = samples().find(|check| check.to_string() == format!("sample:{sample}"));
            return found.ok_or_else(rule);
        }
        let (kind, number) = text.split_once(':').ok_or_else(rule)?;
        let seed = seed(number)?;
        match kind {
            "case" => Ok(Check::Case(Box::new(Case::from_seed(seed)))),
            "streams" => Ok(Check::Streams(seed)),
            _ => {
                let found = PROPERTIES.into_iter().find(|p| format!("property-{p:?}") == kind);
                found.map(|property| Check::Property(property, seed)).ok_or_else(rule)
            }
        }
    }
}

fn samples() -> impl Iterator<Item = Check> {
    (0..SAMPLES.len()).flat_map(|i| Mode::ALL.map(|mode| Check::Sample(i, mode)))
}

/// The suite of a seed: `cases` generated cases that pass the filter (without an end: `None`), and without a filter everything else.
pub fn suite(seed: u64, cases: Option<u64>, filter: Filter) -> impl Iterator<Item = Check> {
    let is_whole = filter.ops.is_empty() && filter.dtypes.is_empty() && filter.text.is_empty();
    let fixed = samples().chain([Check::Refusals]).filter(move |_| is_whole);
    // A filter that nothing passes must end too.
    let tries = cases.map_or(u64::MAX, |cases| cases.saturating_mul(1000));
    let generated = (0..tries).filter_map(move |i| Case::generate(case_seed(seed, i), &filter));
    let generated = generated.take(cases.map_or(usize::MAX, |cases| cases as usize)).enumerate().flat_map(move |(i, case)| {
        let number = i as u64 / SHARE;
        let extra = (is_whole && (i as u64).is_multiple_of(SHARE)).then(|| {
            let (property, seed) = (PROPERTIES[number as usize % PROPERTIES.len()], case_seed(seed, number));
            [Check::Property(property, seed), Check::Streams(seed)]
        });
        extra.into_iter().flatten().chain([Check::Case(Box::new(case))])
    });
    fixed.chain(generated)
}

impl Check {
    /// The check in one line.
    pub fn describe(&self) -> String {
        match self {
            Check::Case(case) => case.to_string(),
            Check::Property(property, seed) => format!("{seed:#018x} property {property}"),
            Check::Streams(seed) => format!("{seed:#018x} streams under random events"),
            Check::Sample(i, mode) => format!("recorded activations {}, {mode}", SAMPLES[*i].0),
            Check::Refusals => "calls that must be refused".into(),
        }
    }

    pub fn run<H: Harness>(&self, h: &H, level: Level) -> Outcome
    where
        H::Backend: Clone,
    {
        match self {
            Check::Case(case) => run_case(h, case, level),
            Check::Property(property, seed) => run_property(h, *property, *seed),
            Check::Streams(seed) => run_streams(h, *seed),
            Check::Refusals => {
                let wrong = invalid_calls(h).into_iter().find(|(_, outcome)| matches!(outcome, Outcome::Failed(_)));
                wrong
                    .map_or(Outcome::Passed(Passed::default()), |(name, outcome)| Outcome::Failed(format!("{name}: {outcome:?}")))
            }
            Check::Sample(i, mode) => sample(h, SAMPLES[*i].1, *mode),
        }
    }
}

fn sample<H: Harness>(h: &H, bytes: &[u8], mode: Mode) -> Outcome
where
    H::Backend: Clone,
{
    let judged = CaseFile::read(bytes).and_then(|case| {
        let outputs = replay(h, &case, mode)?;
        Ok(Reference::new(&case)?.judge(&case, &outputs, &h.limits()).wrong)
    });
    match judged {
        Err(fam::Error::Unsupported { what, got, .. }) => Outcome::Skipped(format!("{what} = {got}")),
        Err(error) => Outcome::Failed(error.to_string()),
        Ok(None) => Outcome::Passed(Passed::default()),
        Ok(Some((wrong, edges))) => Outcome::Failed(format!("{wrong} ({edges})")),
    }
}

#[cfg(test)]
mod tests {
    use super::{Check, suite};
    use fam_testkit::Filter;

    #[test]
    fn every_check_is_found_again_by_its_name() {
        let checks: Vec<Check> = suite(3, Some(200), Filter::default()).collect();
        assert_eq!(checks.len(), 6 + 1 + 200 + 2 * 20);
        for check in checks {
            let again: Check = check.to_string().parse().expect("a name");
            assert_eq!(again.describe(), check.describe());
        }
        for broken in ["", "case", "case:", "case:0x", "property-None:1", "sample:none:step", "dream:1"] {
            assert!(broken.parse::<Check>().is_err(), "{broken}");
        }
    }

    #[test]
    fn a_filter_leaves_its_cases_only() {
        let filter = Filter { text: "bf16".into(), ..Filter::default() };
        let checks: Vec<Check> = suite(1, Some(25), filter).collect();
        assert_eq!(checks.len(), 25);
        assert!(checks.iter().all(|c| matches!(c, Check::Case(case) if case.to_string().contains("bf16"))));
        let nothing = Filter { text: "no case has this".into(), ..Filter::default() };
        assert_eq!(suite(1, Some(3), nothing).count(), 0);
    }
}
