//! Running cases: one, or a suite of them on several threads.

use crate::case::{Case, Filter};
use crate::check::{Bias, Checker, Tally, Worst, edges};
use crate::coverage::Coverage;
use crate::data::Data;
use crate::guard::POISON;
use crate::harness::Harness;
use crate::launch::{Stop, digest};
use crate::rng::case_seed;
use crate::tolerance::Level;
use crate::{append, attend, attend_backward, infini_backward, infini_read, infini_write, merge, merge_backward};
use fam_core::{Backend, InfiniRule, Op, Shape};
use std::collections::BTreeMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// What became of a case.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// Right.
    Passed(Passed),
    /// Wrong: what, and where.
    Failed(String),
    /// Not served by the backend, which said so when the plan was made.
    Skipped(String),
}

/// Figures of a case that passed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Passed {
    /// Elements that could have been wrong, held against the reference.
    pub compared: u64,
    /// Elements not judged ([`crate::Tally::vacuous`]).
    pub vacuous: u64,
    /// The largest share of its bound that any element's error took; `None` where everything was compared bit for bit.
    pub worst: Option<Worst>,
    /// Rounding errors of `o`, for [`Report::bias`].
    pub bias: Bias,
    /// A hash of the results' bits: equal on every thread count.
    pub digest: u64,
}

/// Runs one case: builds its tensors with traps, runs the op, checks every byte and every number.
pub fn run_case<H: Harness + ?Sized>(h: &H, case: &Case, level: Level) -> Outcome {
    caught(|| match case.op {
        Op::Attend => run_attend(h, case, level),
        Op::Append => append::run(h, case),
        Op::InfiniRead => infini_read::run(h, case, level),
        Op::InfiniWrite => infini_write::run(h, case, level),
        Op::Merge => merge::run(h, case, level),
        backward => {
            serves_gradients(h)?;
            match backward {
                Op::AttendBackward => attend_backward::run(h, case, level),
                Op::InfiniReadBackward => infini_backward::read(h, case, level),
                Op::InfiniWriteBackward => infini_backward::write(h, case, level),
                Op::MergeBackward => merge_backward::run(h, case, level),
                other => Err(Stop::Skipped(format!("no cases for {other}"))),
            }
        }
    })
}

/// Stops with the backend's own reason where it has no backward op at all: one reason for all of their cases.
fn serves_gradients<H: Harness + ?Sized>(h: &H) -> Result<(), Stop> {
    let shape = Shape::builder().head_dim(8).infini(InfiniRule::Linear).build()?;
    let support = |op| h.backend().support(&shape.spec(1, 1).ops(&[op]).build()?);
    let mut refusals = Op::BACKWARD.map(support).into_iter();
    match refusals.next() {
        Some(Err(reason)) if refusals.all(|support| support.is_err()) => Err(Stop::Skipped(reason.to_string())),
        _ => Ok(()),
    }
}

/// An outcome of what may stop or panic.
pub(crate) fn caught(run: impl FnOnce() -> Result<Passed, Stop>) -> Outcome {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(passed)) => Outcome::Passed(passed),
        Ok(Err(Stop::Skipped(reason))) => Outcome::Skipped(reason),
        Ok(Err(Stop::Refused(error))) => Outcome::Failed(error.to_string()),
        Ok(Err(Stop::Failed(what))) => Outcome::Failed(what),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
            Outcome::Failed(format!("panicked: {}", text.unwrap_or("no message")))
        }
    }
}

fn run_attend<H: Harness + ?Sized>(h: &H, case: &Case, level: Level) -> Result<Passed, Stop> {
    let data = Data::new(case);
    let outputs = attend::launch(h, case, &data, POISON)?;
    let limits = h.limits();
    let checker = attend::check(case, &data, &outputs, level, &limits)?;
    conclude(case, checker, digest(outputs.arrays()))
}

/// Passed with its figures, or failed with the first wrong element and the edges that it lies on.
pub(crate) fn conclude(case: &Case, checker: Checker<'_>, digest: u64) -> Result<Passed, Stop> {
    match checker.tally.wrong {
        None => {
            let Tally { compared, vacuous, worst, .. } = checker.tally;
            Ok(Passed { compared, vacuous, worst, bias: checker.bias(), digest })
        }
        Some(wrong) => {
            let at = edges(&case.shape, &case.spans[wrong.at.index[0]], &wrong.at, checker.limits);
            Err(Stop::Failed(format!("{wrong} ({at}; level {})", checker.bound.level)))
        }
    }
}

/// How long a suite runs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Budget {
    /// This many cases, before the filter.
    Cases(u64),
    /// Until the time is over.
    Seconds(f64),
}

/// What a suite runs.
#[derive(Clone, Debug, PartialEq)]
pub struct SuiteOptions {
    /// Cases of the backward ops instead of those of the forward ops.
    pub gradients: bool,
    /// Decides every case.
    pub seed: u64,
    /// How many.
    pub budget: Budget,
    /// Which of them.
    pub filter: Filter,
    /// Only cases whose number is i modulo n.
    pub shard: (u64, u64),
    /// The bound: STAT holds on seeds that it was calibrated on, HARD anywhere.
    pub level: Level,
    /// Threads that run cases side by side.
    pub threads: usize,
    /// Stops after this many failures.
    pub max_failures: usize,
}

impl Default for SuiteOptions {
    /// 1,000 cases of the forward ops of seed 1 on one thread, no filter, HARD.
    fn default() -> Self {
        SuiteOptions {
            gradients: false,
            seed: 1,
            budget: Budget::Cases(1000),
            filter: Filter::default(),
            shard: (0, 1),
            level: Level::Hard,
            threads: 1,
            max_failures: 100,
        }
    }
}

/// What a suite tells while it runs.
#[derive(Debug)]
pub enum Event<'a> {
    /// Before the launch: whatever happens next, this seed replays it.
    Start {
        /// Number of the case in the suite.
        index: u64,
        /// The case.
        case: &'a Case,
    },
    /// After it.
    Done {
        /// Number of the case in the suite.
        index: u64,
        /// The case.
        case: &'a Case,
        /// What became of it.
        outcome: &'a Outcome,
    },
}

/// The outcome of a suite.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Cases that were right.
    pub passed: u64,
    /// Cases that were wrong, by number.
    pub failed: BTreeMap<u64, Failure>,
    /// Cases not served, counted by reason.
    pub skipped: BTreeMap<String, u64>,
    /// The largest share of a bound, and the case it was found in.
    pub worst: Option<(Worst, String)>,
    /// Elements of generated cases that were held against the reference, and those that were not judged.
    pub compared: u64,
    /// See [`Report::compared`].
    pub vacuous: u64,
    /// Rounding bias by output type.
    pub bias: BTreeMap<&'static str, Bias>,
    /// What the executed cases covered.
    pub coverage: Coverage,
    /// A hash of all results' bits, by number of the case and therefore independent of threads.
    pub digest: u64,
}

/// One wrong case.
#[derive(Clone, Debug, PartialEq)]
pub struct Failure {
    /// What replays it.
    pub seed: u64,
    /// The case in one line.
    pub case: String,
    /// What was wrong.
    pub what: String,
}

/// The largest share of u_out·A that the mean rounding error of an output type may take, beyond doubt.
pub const BIAS_SHARE: f64 = 0.05;
/// Cases below which a mean says nothing.
pub const BIAS_CASES: u64 = 100;

impl Report {
    /// Cases that were run.
    pub fn executed(&self) -> u64 {
        self.passed + self.failed.len() as u64
    }

    /// Nothing failed, something ran, and no output type's rounding leans to one side.
    pub fn is_ok(&self) -> bool {
        self.failed.is_empty() && self.passed > 0 && self.biased().is_none()
    }

    /// An output type whose rounding leans to one side, and by how much.
    pub fn biased(&self) -> Option<(&'static str, f64)> {
        let leans = |(dtype, bias): (&&'static str, &Bias)| {
            (bias.cases >= BIAS_CASES && bias.certain_share() > BIAS_SHARE).then_some((*dtype, bias.share()))
        };
        self.bias.iter().find_map(leans)
    }

    /// Counts a case; `index` is any number of its own.
    pub fn add(&mut self, index: u64, case: &Case, outcome: &Outcome) {
        match outcome {
            Outcome::Passed(passed) => {
                self.passed += 1;
                self.coverage.add(case);
                self.bias.entry(case.out_dtype.name()).or_default().add(&passed.bias);
                self.compared += passed.compared;
                self.vacuous += passed.vacuous;
                // A sum of mixed hashes does not depend on the order that cases end in.
                self.digest = self.digest.wrapping_add(crate::rng::Rng::new(passed.digest ^ index).next());
                if let Some(worst) = passed.worst
                    && self.worst.as_ref().is_none_or(|(w, _)| worst.ratio > w.ratio)
                {
                    self.worst = Some((worst, case.to_string()));
                }
            }
            Outcome::Failed(what) => {
                self.coverage.add(case);
                self.failed.insert(index, Failure { seed: case.seed, case: case.to_string(), what: what.clone() });
            }
            Outcome::Skipped(reason) => *self.skipped.entry(reason.clone()).or_default() += 1,
        }
    }
}

/// Runs a suite. `progress` is told of every case before it is launched and after; it is called from one thread at a time.
pub fn run_suite<H: Harness + Sync + ?Sized>(
    h: &H,
    options: &SuiteOptions,
    progress: &mut (dyn FnMut(Event<'_>) + Send),
) -> Report {
    let state = Mutex::new((0u64, Report::default(), progress));
    let started = Instant::now();
    let (shard, shards) = (options.shard.0, options.shard.1.max(1));
    let worker = || {
        loop {
            let (index, case) = {
                let (next, report, progress) = &mut *state.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                let is_over = match options.budget {
                    Budget::Cases(cases) => *next >= cases,
                    Budget::Seconds(seconds) => started.elapsed() >= Duration::from_secs_f64(seconds.clamp(0.0, 1e9)),
                };
                if is_over || report.failed.len() >= options.max_failures {
                    return;
                }
                let index = *next;
                *next += 1;
                if index % shards != shard % shards {
                    continue;
                }
                let generate = if options.gradients { Case::generate_gradient } else { Case::generate };
                let Some(case) = generate(case_seed(options.seed, index), &options.filter) else { continue };
                progress(Event::Start { index, case: &case });
                (index, case)
            };
            let outcome = run_case(h, &case, options.level);
            let (_, report, progress) = &mut *state.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            report.add(index, &case, &outcome);
            progress(Event::Done { index, case: &case, outcome: &outcome });
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..options.threads {
            scope.spawn(worker);
        }
        worker();
    });
    state.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()).1
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let skipped: u64 = self.skipped.values().sum();
        writeln!(f, "{} passed, {} failed, {skipped} skipped", self.passed, self.failed.len())?;
        for failure in self.failed.values() {
            writeln!(f, "failed: {}\n  {}", failure.case, failure.what)?;
        }
        for (reason, count) in &self.skipped {
            writeln!(f, "skipped {count}: {reason}")?;
        }
        writeln!(f, "{} elements compared, {} not judged", self.compared, self.vacuous)?;
        if let Some((worst, case)) = &self.worst {
            writeln!(f, "worst {:.3} of its bound, {} {:?}, in {case}", worst.ratio, worst.at.tensor, worst.at.index)?;
        }
        for (dtype, bias) in &self.bias {
            writeln!(
                f,
                "bias of {dtype} outputs: {:.4} of u·A over {} elements of {} cases",
                bias.share(),
                bias.count,
                bias.cases
            )?;
        }
        Ok(())
    }
}
