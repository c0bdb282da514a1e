//! What the suite runs: one numbered list of checks, so that children, shards, lists and replays all mean the same.

use crate::run::SAMPLES;
use fam::Op;
use fam_testkit::{
    Case, CaseFile, Filter, Harness, Level, Mode, Outcome, PROPERTIES, Passed, Property, case_seed, invalid_calls, run_case,
    run_file, run_property, run_streams,
};
use std::fmt;

/// Of so many generated cases, one more check is a property, and one the life of some streams.
const SHARE: u64 = 10;
/// Of so many generated cases, one is of a backward op.
const GRADIENTS: u64 = 5;
/// A suite ends where so many cases in a row fail its filter: one that nothing passes must end too. Some seconds of searching.
pub const TRIES: u64 = 1_000_000;
/// A search says so often that it goes on.
const TRIES_AT_ONCE: u64 = 10_000;

/// One check. Its text is what replays it: `case:0x…`, `gradient:0x…`, `property-Splits:0x…`, `streams:0x…`, `sample:…:step`, `refusals`.
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
    /// A generated case of one op, of the forward or of the backward pass.
    Case(Box<Case>),
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Check::Sample(i, mode) => write!(f, "sample:{}:{mode}", SAMPLES[*i].0),
            Check::Refusals => f.write_str("refusals"),
            Check::Property(property, seed) => write!(f, "property-{property:?}:{seed:#018x}"),
            Check::Streams(seed) => write!(f, "streams:{seed:#018x}"),
            Check::Case(case) if Op::BACKWARD.contains(&case.op) => write!(f, "gradient:{:#018x}", case.seed),
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
        let rule = || {
            "what a failure prints: case:0x…, gradient:0x…, property-Splits:0x…, streams:0x…, sample:…:step or refusals"
                .to_string()
        };
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
            "gradient" => Ok(Check::Case(Box::new(Case::gradient(seed)))),
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

/// Which ops' cases are generated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    /// Of all ops: one in five of a backward one.
    All,
    /// Of the forward ops.
    Forward,
    /// Of the backward ops.
    Gradients,
}

impl Table {
    fn generate(self, seed: u64, number: u64, filter: &Filter) -> Option<Case> {
        let is_gradient = match self {
            Table::All => number % GRADIENTS == GRADIENTS - 1,
            Table::Forward => false,
            Table::Gradients => true,
        };
        let generate = if is_gradient { Case::generate_gradient } else { Case::generate };
        generate(case_seed(seed, number), filter)
    }
}

/// Generated cases that pass a filter.
struct Search {
    table: Table,
    seed: u64,
    filter: Filter,
    /// The next case to try.
    next: u64,
    /// Tries since the last case that passed.
    missed: u64,
    /// Cases still wanted.
    left: u64,
}

impl Iterator for Search {
    /// `None`: the search goes on. It comes back from time to time, so that whoever waits can look at a clock.
    type Item = Option<Case>;

    fn next(&mut self) -> Option<Option<Case>> {
        if self.left == 0 || self.missed >= TRIES {
            return None;
        }
        let tries = self.next..self.next + TRIES_AT_ONCE;
        for number in tries {
            self.next = number + 1;
            if let Some(case) = self.table.generate(self.seed, number, &self.filter) {
                (self.missed, self.left) = (0, self.left - 1);
                return Some(Some(case));
            }
            self.missed += 1;
        }
        Some(None)
    }
}

/// The suite of a seed: `cases` generated cases that pass the filter (without an end: `None`), and without a filter everything else.
/// An item is `None` where the search for the next case goes on.
pub fn suite(seed: u64, cases: Option<u64>, filter: Filter, table: Table) -> impl Iterator<Item = Option<Check>> {
    let is_whole = is_whole(&filter, table);
    let fixed = samples().chain([Check::Refusals]).filter(move |_| is_whole).map(Some);
    let search = Search { table, seed, filter, next: 0, missed: 0, left: cases.unwrap_or(u64::MAX) };
    let mut found = 0u64;
    let generated = search.flat_map(move |case| {
        let mut checks = Vec::new();
        if is_whole && found.is_multiple_of(SHARE) {
            let number = found / SHARE;
            let (property, seed) = (PROPERTIES[number as usize % PROPERTIES.len()], case_seed(seed, number));
            checks.extend([Some(Check::Property(property, seed)), Some(Check::Streams(seed))]);
        }
        found += u64::from(case.is_some());
        checks.push(case.map(|case| Check::Case(Box::new(case))));
        checks
    });
    fixed.chain(generated)
}

/// Whether the suite has more than generated cases.
fn is_whole(filter: &Filter, table: Table) -> bool {
    *filter == Filter::default() && table == Table::All
}

/// Checks of a suite of `cases` generated cases.
pub fn count(cases: u64, filter: &Filter, table: Table) -> u64 {
    let others = samples().count() as u64 + 1 + cases.div_ceil(SHARE).saturating_mul(2);
    if is_whole(filter, table) { cases.saturating_add(others) } else { cases }
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
            Check::Refusals => all(invalid_calls(h)),
            Check::Sample(i, mode) => sample(h, SAMPLES[*i].1, *mode),
        }
    }
}

/// Many outcomes as one: the first failure; skipped where all were, since then nothing was tested.
fn all(outcomes: Vec<(&'static str, Outcome)>) -> Outcome {
    let failed = outcomes.iter().find_map(|(name, outcome)| match outcome {
        Outcome::Failed(what) => Some(Outcome::Failed(format!("{name}: {what}"))),
        _ => None,
    });
    let passed = outcomes.iter().any(|(_, outcome)| matches!(outcome, Outcome::Passed(_)));
    failed.or_else(|| passed.then(|| Outcome::Passed(Passed::default()))).unwrap_or_else(|| {
        let skipped = outcomes.into_iter().map(|(_, outcome)| outcome).next();
        skipped.unwrap_or_else(|| Outcome::Skipped("no calls".into()))
    })
}

fn sample<H: Harness>(h: &H, bytes: &[u8], mode: Mode) -> Outcome
where
    H::Backend: Clone,
{
    match CaseFile::read(bytes) {
        Ok(case) => run_file(h, &case, mode),
        Err(error) => Outcome::Failed(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::{Check, Table, all, count, suite};
    use fam_testkit::{Filter, Outcome, Passed};

    #[test]
    fn every_check_is_found_again_by_its_name() {
        let checks: Vec<Check> = suite(3, Some(200), Filter::default(), Table::All).flatten().collect();
        assert_eq!(checks.len(), 6 + 1 + 200 + 2 * 20);
        for cases in [0, 1, 10, 11, 200] {
            let checks = suite(3, Some(cases), Filter::default(), Table::All).flatten().count();
            assert_eq!(count(cases, &Filter::default(), Table::All), checks as u64, "{cases}");
        }
        let gradients = checks.iter().filter(|check| check.to_string().starts_with("gradient:")).count();
        assert_eq!(gradients, 40);
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
        assert_eq!(count(25, &filter, Table::All), 25);
        let checks: Vec<Check> = suite(1, Some(25), filter, Table::All).flatten().collect();
        assert_eq!(checks.len(), 25);
        assert!(checks.iter().all(|c| matches!(c, Check::Case(case) if case.to_string().contains("bf16"))));
        let nothing = Filter { text: "no case has this".into(), ..Filter::default() };
        let backward = suite(1, Some(25), Filter::default(), Table::Gradients).flatten();
        assert!(backward.map(|check| check.to_string()).filter(|name| name.starts_with("gradient:")).count() == 25);
        // Without an end too, and with a word from time to time.
        let items: Vec<Option<Check>> = suite(1, None, nothing, Table::Forward).collect();
        assert!(items.len() >= 100 && items.iter().all(Option::is_none), "{}", items.len());
    }

    #[test]
    fn of_many_outcomes_all_skipped_is_skipped() {
        let passed = || Outcome::Passed(Passed::default());
        let skipped = || Outcome::Skipped("no ring".into());
        let failed = || Outcome::Failed("written".into());
        assert_eq!(all(vec![("a", skipped()), ("b", skipped())]), skipped());
        assert_eq!(all(vec![("a", skipped()), ("b", passed())]), passed());
        assert_eq!(all(vec![("a", passed()), ("b", failed()), ("c", skipped())]), Outcome::Failed("b: written".into()));
        assert!(matches!(all(Vec::new()), Outcome::Skipped(_)));
    }
}
