//! The traps go off: a backend that computes nothing but writes where it may only read, and backends that do not serve what they are
//! asked, at plan time or too late.

use fam_core::{
    Append, Attend, Backend, Device, Error, InfiniRead, InfiniWrite, KernelId, Keys, Memory, Merge, Op, Plan, Result, Spans,
    Spec, Support,
};
use fam_testkit::{
    Case, CaseFile, Harness, Level, Mode, Outcome, PROPERTIES, case_seed, invalid_calls, run_case, run_file, run_property,
    run_streams,
};
use std::cell::Cell;

/// Memory that may be written through any borrow, as a device's may.
struct Shared(Vec<Cell<u8>>);

impl Memory for Shared {
    fn bytes(&self) -> u64 {
        self.0.len() as u64
    }
}

/// What the backend does wrong.
#[derive(Clone, Copy, PartialEq)]
enum Wrong {
    /// Flips the first byte of the named argument of an op; with a minus before the name, the last.
    Writes(&'static str),
    /// Does not serve the spec, and says so when it plans.
    Unserved,
    /// Does not serve the op, and says so when it is called.
    Late,
}

#[derive(Clone)]
struct Scribbler(Wrong);

struct ScribblerPlan(Spec, Support);

impl Plan for ScribblerPlan {
    fn spec(&self) -> &Spec {
        &self.0
    }
    fn support(&self) -> &Support {
        &self.1
    }
}

impl Scribbler {
    /// The op: all that it was given to read.
    fn op(&self, arguments: &[(&'static str, &Shared)]) -> Result<()> {
        let wrong = match self.0 {
            Wrong::Writes(wrong) => wrong,
            _ => return Err(Error::unsupported("op", "this one", "none")),
        };
        for (name, mem) in arguments {
            let byte = if wrong == *name {
                mem.0.first()
            } else if wrong.strip_prefix('-') == Some(name) {
                mem.0.last()
            } else {
                None
            };
            byte.into_iter().for_each(|byte| byte.set(!byte.get()));
        }
        Ok(())
    }
}

fn spans<'a>(spans: &Spans<'a, Shared>) -> Option<(&'static str, &'a Shared)> {
    if let Spans::Device { mem, .. } = spans { Some(("spans", mem)) } else { None }
}

fn keys<'a>(keys: &Keys<'a, Shared>) -> Vec<(&'static str, &'a Shared)> {
    match keys {
        Keys::Strided { k, v } => vec![("k", k.mem), ("v", v.mem)],
        Keys::Ring(ring) => vec![("ring", ring)],
        _ => Vec::new(),
    }
}

impl Backend for Scribbler {
    type Mem = Shared;
    type Queue<'q> = ();
    type Plan = ScribblerPlan;

    fn name(&self) -> &'static str {
        "scribbler"
    }
    fn support(&self, spec: &Spec) -> Result<Support> {
        let kernel = |&op| (KernelId { backend: "scribbler", op, dtype: spec.shape().dtype(), variant: "none" }, 1);
        Ok(Support::new(spec.ops().iter().map(kernel).collect()).scratch_bytes(100).ring_bytes(64 * spec.slots() as u64))
    }
    fn plan(&self, spec: &Spec) -> Result<ScribblerPlan> {
        match self.0 {
            Wrong::Unserved => Err(Error::unsupported("dtype", spec.shape().dtype(), "none")),
            _ => Ok(ScribblerPlan(spec.clone(), self.support(spec)?)),
        }
    }
    fn append(&self, _: &ScribblerPlan, _: &mut (), args: Append<'_, Shared>, _: &mut Shared) -> Result<()> {
        let rows = args.rows.iter().flat_map(|r| [("append's k", r.k.mem), ("append's v", r.v.mem)]);
        self.op(&rows.collect::<Vec<_>>())
    }
    fn attend(&self, _: &ScribblerPlan, _: &mut (), args: Attend<'_, Shared>, scratch: &mut Shared) -> Result<()> {
        let mut all = keys(&args.keys);
        all.extend(spans(&args.spans));
        all.extend(args.rows.iter().map(|rows| ("q", rows.q.mem)));
        all.extend(args.mem_rows.iter().map(|rows| ("mem_q", rows.q.mem)));
        all.extend(args.mem.iter().flat_map(|mem| [("mem_k", mem.k.mem), ("mem_v", mem.v.mem)]));
        all.extend(args.sink.iter().map(|sink| ("sink", sink.mem)));
        all.extend(
            args.infini.iter().flat_map(|i| [("infini_q", i.q.mem), ("m", i.m.mem), ("z", i.z.mem), ("beta", i.beta.mem)]),
        );
        all.push(("scratch", scratch));
        self.op(&all)
    }
    fn infini_read(&self, _: &ScribblerPlan, _: &mut (), args: InfiniRead<'_, Shared>, _: &mut Shared) -> Result<()> {
        let i = &args.state;
        let state = [("infini_q", i.q.mem), ("m", i.m.mem), ("z", i.z.mem), ("beta", i.beta.mem), ("o_local", args.o_local.mem)];
        self.op(&state.into_iter().chain(spans(&args.spans)).collect::<Vec<_>>())
    }
    fn infini_write(&self, _: &ScribblerPlan, _: &mut (), args: InfiniWrite<'_, Shared>, _: &mut Shared) -> Result<()> {
        self.op(&keys(&args.keys))
    }
    fn merge(&self, _: &ScribblerPlan, _: &mut (), args: Merge<'_, Shared>, _: &mut Shared) -> Result<()> {
        self.op(&[("a part's o", args.b.o.mem), ("a part's lse", args.a.lse.mem)])
    }
}

impl Device for Scribbler {
    type Owned = Shared;

    fn alloc(&self, bytes: u64) -> Result<Shared> {
        Ok(Shared(vec![Cell::new(0); bytes as usize]))
    }
    fn upload(&self, mem: &mut Shared, offset: u64, bytes: &[u8]) -> Result<()> {
        mem.0[offset as usize..].iter().zip(bytes).for_each(|(to, from)| to.set(*from));
        Ok(())
    }
    fn download(&self, mem: &Shared, offset: u64, bytes: &mut [u8]) -> Result<()> {
        mem.0[offset as usize..].iter().zip(bytes).for_each(|(from, to)| *to = from.get());
        Ok(())
    }
    fn synchronize(&self, _: &mut ()) -> Result<()> {
        Ok(())
    }
}

impl Harness for Scribbler {
    type Backend = Scribbler;

    fn backend(&self) -> &Scribbler {
        self
    }
    fn run(&self, work: &mut dyn FnMut(&mut ()) -> Result<()>) -> Result<()> {
        work(&mut ())
    }
}

/// What the runner says to the first cases of `op`.
fn verdicts(wrong: Wrong, op: Op) -> impl Iterator<Item = Outcome> {
    let cases = (0..3000).map(|i| Case::from_seed(case_seed(1, i))).filter(move |case| case.op == op && !case.is_empty());
    cases.map(move |case| run_case(&Scribbler(wrong), &case, Level::Hard))
}

#[test]
fn a_write_to_an_input_is_seen() {
    let attend = ["q", "mem_q", "k", "v", "ring", "mem_k", "mem_v", "sink", "infini_q", "m", "z", "beta", "spans"];
    let read = ["infini_q", "m", "z", "beta", "o_local", "spans"];
    let ops: [(Op, &[&'static str]); 5] = [
        (Op::Attend, &attend),
        (Op::InfiniRead, &read),
        (Op::InfiniWrite, &["k", "v", "ring"]),
        (Op::Merge, &["a part's o", "a part's lse"]),
        (Op::Append, &["append's k", "append's v"]),
    ];
    for (op, arguments) in ops {
        for &argument in arguments {
            let due = format!("{}: byte 0 of an input was written", argument.trim_start_matches("append's "));
            let seen = verdicts(Wrong::Writes(argument), op).any(|o| matches!(o, Outcome::Failed(what) if what == due));
            assert!(seen, "{op}: {argument}");
        }
    }
    for (argument, due) in [("-scratch", "scratch: byte 63 behind its 100 bytes"), ("-ring", "ring: byte 63 behind its ")] {
        let mut verdicts = verdicts(Wrong::Writes(argument), Op::Attend);
        assert!(verdicts.any(|o| matches!(o, Outcome::Failed(what) if what.starts_with(due))), "{argument}");
    }
}

/// What is not served is skipped if the plan says so, in every part of the suite, and wrong if an op does.
#[test]
fn only_a_plan_may_skip() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../testdata/smollm2_infini_l05_f32.safetensors");
    let file = CaseFile::open(file).unwrap();
    let outcomes = |wrong| {
        let h = Scribbler(wrong);
        let mut outcomes: Vec<(String, Outcome)> = Vec::new();
        for op in Op::FORWARD {
            outcomes.extend(verdicts(wrong, op).take(3).map(|outcome| (op.to_string(), outcome)));
        }
        for seed in 0..2 {
            outcomes.extend(PROPERTIES.map(|property| (property.to_string(), run_property(&h, property, seed))));
        }
        outcomes.extend((0..9).map(|seed| ("streams".to_string(), run_streams(&h, seed))));
        outcomes.extend(Mode::ALL.map(|mode| (mode.to_string(), run_file(&h, &file, mode))));
        outcomes.extend(invalid_calls(&h).into_iter().take(1).map(|(name, outcome)| (name.to_string(), outcome)));
        outcomes
    };
    for (name, outcome) in outcomes(Wrong::Unserved) {
        assert!(matches!(outcome, Outcome::Skipped(_)), "{name}: {outcome:?}");
    }
    for (name, outcome) in outcomes(Wrong::Late) {
        assert!(matches!(outcome, Outcome::Failed(_)), "{name}: {outcome:?}");
    }
}
