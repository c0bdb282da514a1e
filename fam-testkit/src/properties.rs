//! The contract's section 7: what must hold between calls, whatever the numbers are. Bitwise ones are compared bit for bit.

mod attend;
mod gradients;
mod infini;
mod splits;
mod streams;

use crate::case::{Case, KeySource, Strides};
use crate::check::Tally;
use crate::distribution::Distribution;
use crate::harness::Harness;
use crate::launch::Stop;
use crate::rng::case_seed;
use crate::runner::{Outcome, Passed, caught};
use fam_core::{Op, Window};
use fam_ref::Array;
use std::fmt;

/// A property of the contract, by its number there. 10 is the reference layer's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Property {
    /// 1: block by block equals the dense mask over the whole sequence.
    DenseMask,
    /// 2: step, prefill and decode agree.
    Modes,
    /// 3: both row groups in one call equal two calls.
    RowGroups,
    /// 4: without memory rows it is block sliding window attention.
    NoMemory,
    /// 5, bitwise: memory rows ignore the window, a block row ignores later keys of its block.
    Unseen,
    /// 6: any split of the keys, merged.
    Splits,
    /// 7, bitwise: order of streams and slots, solo or in a batch.
    Order,
    /// 8, bitwise: a stream split at a block boundary, with snapshot and restore between.
    Boundary,
    /// 9, bitwise: whatever unseen bytes hold, and repeats.
    Poison,
    /// 11: the linear rule is normalised linear attention over earlier segments.
    LinearAttention,
    /// 11: the linear rule's state does not depend on the length of segments.
    SegmentLength,
    /// 11: constant values read back (linear); what is already stored leaves m unchanged when written again (delta).
    ReadBack,
    /// 12: with a sink, o is o without it times sigmoid(lse without it − sink).
    Sink,
    /// 7 of gradients, bitwise: order of streams and slots, solo or in a batch.
    GradientOrder,
    /// 3 of gradients: what both row groups add in one call, they add in two.
    GradientRowGroups,
    /// 2 of gradients: what a prefill adds, its blocks add one by one.
    GradientBlocks,
}

use Property::*;

/// Every property that a backend is held to.
pub const PROPERTIES: [Property; 16] = [
    DenseMask,
    Modes,
    RowGroups,
    NoMemory,
    Unseen,
    Splits,
    Order,
    Boundary,
    Poison,
    LinearAttention,
    SegmentLength,
    ReadBack,
    Sink,
    GradientOrder,
    GradientRowGroups,
    GradientBlocks,
];

impl Property {
    /// Its number in the contract.
    pub fn number(self) -> u32 {
        match self {
            DenseMask => 1,
            Modes | GradientBlocks => 2,
            RowGroups | GradientRowGroups => 3,
            NoMemory => 4,
            Unseen => 5,
            Splits => 6,
            Order | GradientOrder => 7,
            Boundary => 8,
            Poison => 9,
            LinearAttention | SegmentLength | ReadBack => 11,
            Sink => 12,
        }
    }

    /// What it says.
    pub fn statement(self) -> &'static str {
        match self {
            DenseMask => "block by block = the dense mask over the whole sequence",
            Modes => "step = prefill = decode",
            RowGroups => "both row groups in one call = two calls",
            NoMemory => "F = 0 is block sliding window attention",
            Unseen => "memory rows ignore the window, block rows ignore later keys (bitwise)",
            Splits => "any split of the keys, merged",
            Order => "order of streams and slots, solo or in a batch (bitwise)",
            Boundary => "a stream split at a block boundary, by snapshot and restore (bitwise)",
            Poison => "whatever unseen bytes hold, and repeats (bitwise)",
            LinearAttention => "linear rule = normalised linear attention over earlier segments",
            SegmentLength => "the linear rule's state does not depend on the length of segments",
            ReadBack => "constant values read back (linear); writing what is stored changes nothing (delta)",
            GradientOrder => "gradients: order of streams and slots, solo or in a batch (bitwise)",
            GradientRowGroups => "gradients: both row groups in one call = two calls",
            GradientBlocks => "gradients: a whole prefill = its blocks, one by one",
            Sink => "o with a sink = o without · sigmoid(lse without − sink)",
        }
    }
}

impl fmt::Display for Property {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.number(), self.statement())
    }
}

/// Tests a property on one random problem, a pure function of `seed`.
pub fn run_property<H: Harness + ?Sized>(h: &H, property: Property, seed: u64) -> Outcome
where
    H::Backend: Clone,
{
    caught(|| match property {
        DenseMask => streams::dense_mask(h, seed),
        Modes => streams::modes(h, seed),
        RowGroups => attend::row_groups(h, seed),
        NoMemory => attend::no_memory(h, seed),
        Unseen => attend::unseen(h, seed),
        Splits => splits::splits(h, seed),
        Order => attend::order(h, seed),
        Boundary => streams::boundary(h, seed),
        Poison => attend::poison(h, seed),
        LinearAttention => infini::linear_attention(h, seed),
        SegmentLength => infini::segment_length(h, seed),
        ReadBack => infini::read_back(h, seed),
        Sink => splits::sink(h, seed),
        GradientOrder => gradients::order(h, seed),
        GradientRowGroups => gradients::row_groups(h, seed),
        GradientBlocks => gradients::blocks(h, seed),
    })
}

/// The first generated attend case after `seed` that suits a property: finite, without rows that share memory.
fn suitable(seed: u64, is_suitable: impl Fn(&Case) -> bool) -> Case {
    let cases = (0..).map(|i| Case::from_seed(case_seed(seed, i)));
    let plain = cases.filter(|c| c.op == Op::Attend && c.distribution != Distribution::NonFinite && !c.is_empty());
    let case = plain.filter(|c| is_suitable(c)).map(|case| Case {
        strides: if case.strides == Strides::Broadcast { Strides::Padded } else { case.strides },
        device_spans: false,
        mem_entries: case.mem_entries.max(case.blocks()),
        lse: true,
        ..case
    });
    case.into_iter().next().expect("there is no end of cases")
}

/// Longer than any span reaches back.
fn with_window(case: &Case, window: Window) -> Result<Case, Stop> {
    let s = &case.shape;
    let builder = fam_core::Shape::builder()
        .heads(s.heads())
        .kv_heads(s.kv_heads())
        .head_dim(s.head_dim())
        .block_len(s.block_len())
        .window(window)
        .mem_len(s.mem_len())
        .dtype(s.dtype())
        .scale(s.scale());
    let shape = s.infini().map_or(builder.clone(), |rule| builder.infini(rule)).build()?;
    Ok(Case { shape, keys: KeySource::Linear, stale: 0, ..case.clone() })
}

/// Fails at the first bit in which two results differ.
fn same_bits<'a>(what: &str, a: impl Iterator<Item = &'a Array<5>>, b: impl Iterator<Item = &'a Array<5>>) -> Result<(), Stop> {
    for (a, b) in a.zip(b) {
        if a.shape != b.shape {
            return Err(Stop::Failed(format!("{what}: shapes {:?} and {:?}", a.shape, b.shape)));
        }
        for (at, (x, y)) in a.data.iter().zip(&b.data).enumerate() {
            if x.to_bits() != y.to_bits() && !(x.is_nan() && y.is_nan()) {
                return Err(Stop::Failed(format!("{what}: {x:e} and {y:e} at element {at} of {:?}", a.shape)));
            }
        }
    }
    Ok(())
}

/// Passed with the worst share of a bound, or failed with the first element beyond.
fn conclude(case: &Case, tally: Tally) -> Result<Passed, Stop> {
    match tally.wrong {
        None => Ok(Passed { compared: tally.compared, vacuous: tally.vacuous, worst: tally.worst, ..Passed::default() }),
        Some(wrong) => Err(Stop::Failed(format!("{case}: {wrong}"))),
    }
}
