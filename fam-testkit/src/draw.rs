//! How a case is drawn from its seed. The order of draws is part of the format: append draws, never reorder them, or old seeds no
//! longer replay.

use crate::case::{Case, Gradients, KeySource, Strides, Style};
use crate::distribution::{self, Distribution, exp2};
use crate::rng::Rng;
use fam_core::{Dtype, InfiniRule, Op, Shape, Span, Window};

/// Numbers at, before and after the edges of tiles of 16, 32, 64 and 128, and primes between.
const LENGTHS: [u32; 21] = [0, 1, 2, 3, 5, 7, 13, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 97, 127, 128, 129];
pub(crate) const TOKEN_WINDOWS: [usize; 18] = [1, 2, 3, 7, 13, 15, 16, 17, 31, 32, 33, 61, 63, 64, 65, 127, 128, 129];
pub(crate) const BLOCK_WINDOWS: [usize; 12] = [0, 0, 1, 1, 1, 2, 2, 3, 5, 15, 16, 17];
pub(crate) const BLOCK_LENS: [usize; 19] = [1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97, 127, 128, 129];
pub(crate) const HEAD_DIMS: [usize; 14] = [1, 2, 7, 8, 16, 31, 59, 64, 80, 96, 111, 128, 192, 256];
pub(crate) const MEM_LENS: [usize; 6] = [0, 1, 2, 7, 16, 64];
/// Groups up to one that is larger than the row tile of any kernel.
pub(crate) const HEADS: [(usize, usize); 7] = [(1, 1), (4, 1), (8, 2), (6, 3), (9, 3), (17, 1), (72, 1)];

pub(crate) fn start(seed: u64) -> Rng {
    Rng::of(seed, "case")
}

pub(crate) fn op_and_dtype(rng: &mut Rng) -> (Op, Dtype) {
    let op = match rng.below(20) {
        0..12 => Op::Attend,
        12..14 => Op::Append,
        14..16 => Op::InfiniRead,
        16..18 => Op::InfiniWrite,
        _ => Op::Merge,
    };
    // Half in f32, since 16-bit outputs hide small errors.
    (op, rng.pick(&[Dtype::F32, Dtype::F32, Dtype::F16, Dtype::Bf16]))
}

pub(crate) fn gradient_start(seed: u64) -> Rng {
    Rng::of(seed, "gradient case")
}

pub(crate) fn gradient_op_and_dtype(rng: &mut Rng) -> (Op, Dtype) {
    let op = match rng.below(20) {
        0..11 => Op::AttendBackward,
        11..14 => Op::InfiniReadBackward,
        14..17 => Op::InfiniWriteBackward,
        _ => Op::MergeBackward,
    };
    (op, rng.pick(&[Dtype::F32, Dtype::F32, Dtype::F16, Dtype::Bf16]))
}

/// The case of a seed.
pub(crate) fn case(seed: u64) -> Case {
    let mut rng = start(seed);
    let (op, dtype) = op_and_dtype(&mut rng);
    drawn(seed, op, dtype, &mut rng)
}

/// The case of a seed among those of the backward ops: a table beside the other, with generators of its own.
pub(crate) fn gradient(seed: u64) -> Case {
    let mut rng = gradient_start(seed);
    let (op, dtype) = gradient_op_and_dtype(&mut rng);
    drawn(seed, op, dtype, &mut rng)
}

/// Attempts until one is cheap enough, with a limit that rises so that there is an end.
fn drawn(seed: u64, op: Op, dtype: Dtype, rng: &mut Rng) -> Case {
    let distribution = rng.pick(&Distribution::of(op));
    // Mostly small, so that many shapes are seen; one in sixty large.
    let mut limit = match rng.below(60) {
        0 => 1e7,
        1..20 => 1e6,
        _ => 2.5e5,
    };
    let is_dense = op == Op::Attend && rng.chance(11, 20);
    loop {
        if let Some(case) = attempt(seed, op, dtype, distribution, is_dense, rng)
            && case.work() as f64 <= limit
        {
            return case;
        }
        limit *= 1.1;
    }
}

/// One attempt; `None` where the draws contradict each other.
fn attempt(seed: u64, op: Op, dtype: Dtype, distribution: Distribution, is_dense: bool, rng: &mut Rng) -> Option<Case> {
    let shape = shape(op, dtype, distribution, is_dense, rng)?;
    let batch = if is_dense { rng.pick(&[1, 1, 2, 5]) } else { rng.pick(&[0, 1, 1, 1, 2, 2, 2, 5]) };
    let style = rng.pick(&Style::ALL);
    // A ring has forgotten what a backward pass needs.
    let is_backward = Op::BACKWARD.contains(&op);
    let is_ring = !is_backward && (is_dense || op == Op::Append || rng.chance(1, 2));
    let keys = if is_ring { KeySource::Ring } else { KeySource::Linear };
    let slots = batch + rng.pick(&[0, 0, 1, 3]);
    let mut order: Vec<u32> = (0..slots as u32).collect();
    rng.shuffle(&mut order);
    let spans: Vec<Span> = (0..batch).map(|n| span(&shape, style, keys, is_dense, order[n], rng)).collect();

    let blocks = spans.iter().map(|s| s.blocks(shape.block_len())).max().unwrap_or(0);
    let len = spans.iter().map(|s| s.len as usize).max().unwrap_or(0);
    let plan_rows = len + rng.pick(&[0, 0, 1, 8]);
    let mut case = Case {
        seed,
        op,
        distribution,
        shape,
        out_dtype: if rng.chance(1, 4) { Dtype::F32 } else { dtype },
        style,
        spans,
        device_spans: rng.chance(1, 10),
        plan_rows,
        plan_blocks: blocks.max(1) + rng.pick(&[0, 0, 0, 1]),
        slots,
        ring_spare: rng.pick(&[0, 0, 1, 3]),
        keys,
        stale: if rng.chance(1, 2) { rng.below(2 * shape.block_len() + 40) } else { 0 },
        mem_entries: rng.pick(&[1, blocks.max(1), blocks.max(1), blocks + 1, blocks + 3]),
        state_entries: blocks.max(1) + rng.pick(&[1, 1, 2, 4]),
        rows: true,
        mem_rows: shape.mem_len() > 0,
        lse: rng.chance(3, 4),
        // A sink would carry denormal values out of what f32 holds.
        sink: matches!(op, Op::Attend | Op::AttendBackward) && rng.chance(1, 4) && distribution != Distribution::Denormals,
        fused: op == Op::Attend && shape.infini().is_some(),
        o_local: Rng::of(seed, "o_local").chance(1, 2),
        gradients: gradients(seed),
        part_dtypes: [rng.pick(&[dtype, Dtype::F32]), rng.pick(&[dtype, Dtype::F32])],
        strides: rng.pick(&[Strides::Packed, Strides::HeadsMajor, Strides::Padded, Strides::Padded, Strides::Broadcast]),
    };
    match rng.below(40) {
        0..8 if case.mem_rows => case.rows = false,
        8..16 => case.mem_rows = false,
        39 => (case.rows, case.mem_rows) = (false, false),
        _ => {}
    }
    if case.device_spans {
        // A kernel that reads its spans itself may write as many blocks as the plan serves.
        case.state_entries = case.state_entries.max(case.plan_blocks + 1);
        if op == Op::Append {
            case.mem_entries = case.mem_entries.max(case.plan_blocks);
        }
    }
    for span in &mut case.spans {
        span.mem_rows = if rng.chance(2, 3) { shape.mem_len() as u32 } else { rng.below(shape.mem_len() + 1) as u32 };
        span.mem_entry = rng.below(4 * case.mem_entries) as u32;
        span.state_entry = rng.below(4 * case.state_entries) as u32;
    }
    if case.device_spans {
        rest(&mut case);
    }
    if case.keys == KeySource::Ring {
        far(&mut case);
    }
    (!is_dense || case.is_dense()).then_some(case)
}

/// Of a generator of its own: it was appended.
fn gradients(seed: u64) -> Gradients {
    let mut rng = Rng::of(seed, "gradients");
    let d_lse = rng.chance(1, 2);
    let [keys, mem, sink, state, beta] = [(); 5].map(|()| rng.chance(5, 6));
    Gradients { d_lse, keys, mem, sink, state, beta }
}

/// Leaves a stream without tokens, as a captured graph meets it whose batch is larger than what is left to do.
fn rest(case: &mut Case) {
    let mut rng = Rng::of(case.seed, "rest");
    let n = rng.below(case.batch());
    if case.batch() > 1 && rng.chance(1, 3) {
        (case.spans[n].len, case.spans[n].mem_rows) = (0, 0);
    }
}

/// Moves some streams on to where numbers of 16, 32 and 48 bits, and positions altogether, end; the place in the block stays.
fn far(case: &mut Case) {
    let mut rng = Rng::of(case.seed, "far");
    let (b, ring_rows) = (case.shape.block_len() as u64, case.ring_rows());
    for span in &mut case.spans {
        if !rng.chance(1, 5) {
            continue;
        }
        let around = |place: u64, rng: &mut Rng| place - ring_rows as u64 + rng.below(2 * ring_rows) as u64;
        let target = match rng.below(5) {
            0 => around(1 << 16, &mut rng),
            1 => around(1 << 32, &mut rng),
            2 => (1 << 33) + rng.below(100_000) as u64,
            3 => (1 << 48) + rng.below(100_000) as u64,
            // No position is past the last.
            _ => u64::MAX / 2 - u64::from(span.len) - rng.below(3) as u64,
        };
        span.origin = span.origin.min(3 * b - 1);
        span.start = target / b * b + span.start % b;
        if span.start > target {
            span.start -= b;
        }
    }
}

fn shape(op: Op, dtype: Dtype, distribution: Distribution, is_dense: bool, rng: &mut Rng) -> Option<Shape> {
    let (heads, kv_heads) = rng.pick(if is_dense { &HEADS[1..] } else { &HEADS });
    let window = match rng.below(4) {
        0 => Window::Tokens(rng.pick(&TOKEN_WINDOWS)),
        _ => Window::Blocks(rng.pick(&BLOCK_WINDOWS)),
    };
    let builder = Shape::builder()
        .heads(heads)
        .kv_heads(kv_heads)
        .head_dim(rng.pick(&HEAD_DIMS))
        .block_len(rng.pick(&BLOCK_LENS))
        .window(window)
        .mem_len(rng.pick(if is_dense { &MEM_LENS[1..] } else { &MEM_LENS }))
        .dtype(dtype);
    let builder = match scale(distribution, dtype, rng) {
        Some(scale) => builder.scale(scale),
        None => builder,
    };
    let needs_infini = matches!(op, Op::InfiniRead | Op::InfiniWrite | Op::InfiniReadBackward | Op::InfiniWriteBackward);
    let builder = if needs_infini || (op == Op::Attend && rng.chance(3, 20)) {
        builder.infini(rng.pick(&[InfiniRule::Linear, InfiniRule::Delta]))
    } else {
        builder
    };
    builder.build().ok()
}

/// `None`: the default, 1/√D.
fn scale(distribution: Distribution, dtype: Dtype, rng: &mut Rng) -> Option<f32> {
    let exact = rng.pick(&[1.0, 0.5, 0.25, 0.125]);
    // Weights that a scale folded into 16 bits would lose, and logits as far out as f32 reaches.
    let (tiny, extreme) = (rng.pick(&[1e-30, -1e-30, 1e-6]), exp2(rng.pick(&[-10, 20, 100])) as f32);
    let (is_default, any) = (rng.chance(2, 3), rng.pick(&[exact, exact, 0.3, -0.2, 0.0, tiny]));
    let is_extreme = rng.chance(1, 4);
    match distribution {
        // Times the lowest value, any other scale would leave f32.
        Distribution::Adversary => Some(1.0),
        Distribution::F32Limit => Some(distribution::limit_scale(dtype) as f32),
        // q carries the inverse of the scale.
        Distribution::EqualHuge if is_extreme => Some(exp2(rng.pick(&[-10, 10])) as f32),
        d if d.has_exact_logits() && is_extreme => Some(extreme),
        d if d.has_exact_logits() => Some(exact),
        // Finite logits stay small, so that no weight underflows beside an infinite value.
        Distribution::NonFinite => None,
        _ => (!is_default).then_some(any),
    }
}

fn span(shape: &Shape, style: Style, keys: KeySource, is_dense: bool, slot: u32, rng: &mut Rng) -> Span {
    let b = shape.block_len() as u64;
    let reach = match shape.window() {
        Window::Tokens(w) => w as u64,
        Window::Blocks(m) => m as u64 * b,
        _ => 0,
    };
    let origin = match rng.below(10) {
        0..6 => 0,
        6 => rng.below(3 * b as usize) as u64,
        7 => b * rng.below(5) as u64,
        8 => (1 << 33) + rng.below(1000) as u64,
        _ => (1 << 40) / b * b,
    };
    // How far into the stream the call begins: anything up to a little past the window, or far enough to have gone round a ring.
    let mut into = match rng.below(3) {
        0 => 0,
        1 => rng.below((reach + 2 * b) as usize) as u64,
        _ => reach + rng.below(3 * b as usize + 8) as u64,
    };
    if keys == KeySource::Ring && (is_dense || rng.chance(1, 2)) {
        into += (reach + 4 * b) * rng.between(1, 3) as u64;
    }
    let mut start = origin + into;
    let to_block = |start: u64| if start.is_multiple_of(b) { start } else { (start / b + 1) * b };
    let len = match style {
        Style::Step => {
            start = to_block(start);
            if is_dense { 2 * b as u32 } else { b as u32 }
        }
        Style::Prefill => {
            start = if rng.chance(1, 2) { to_block(start) } else { start };
            rng.pick(&LENGTHS[1..]).max(if is_dense { b as u32 + 1 } else { 0 })
        }
        Style::Decode if is_dense => {
            start = to_block(start) - 1;
            2
        }
        Style::Decode => 1 + rng.below(3) as u32,
        Style::Ragged => rng.pick(&LENGTHS),
    };
    // A start moved back to the end of a block may not precede the stream.
    Span { start: start.max(origin), origin, len, slot, ..Span::default() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Coverage, case_seed};

    /// Every input family, and the hard corner often enough.
    #[test]
    fn coverage_of_ten_thousand_cases() {
        let mut coverage = Coverage::default();
        let (mut work, mut far) = (0, 0);
        for i in 0..10_000 {
            let case = Case::from_seed(case_seed(1, i));
            assert!(case.spec().is_ok(), "{case}: {:?}", case.spec());
            work += case.work();
            far += u64::from(case.is_far());
            coverage.add(&case);
        }
        assert!(far > 500, "{far}");
        println!("{coverage}\nmean work {}", work / 10_000);
        assert!(coverage.dense_share() >= 0.3, "{}", coverage.dense_share());
        assert!(coverage.gaps(&Op::FORWARD).is_empty(), "{:?}", coverage.gaps(&Op::FORWARD));
    }

    #[test]
    fn coverage_of_ten_thousand_gradients() {
        let mut coverage = Coverage::default();
        for i in 0..10_000 {
            let case = Case::gradient(case_seed(1, i));
            assert!(case.spec().is_ok(), "{case}: {:?}", case.spec());
            assert_eq!(case, Case::gradient(case.seed));
            coverage.add(&case);
        }
        assert!(coverage.gaps(&Op::BACKWARD).is_empty(), "{:?}", coverage.gaps(&Op::BACKWARD));
    }

    /// What a seed printed by an earlier version replays.
    #[test]
    fn old_seeds_draw_what_they_drew() {
        let lines = (0..2_000).map(|i| Case::from_seed(case_seed(7, i)).to_string().replace(" o_local", ""));
        let digest = crate::rng::hash(lines.flat_map(|line| line.into_bytes()).map(u64::from));
        assert_eq!(digest, 3_973_982_682_301_342_611);
    }

    #[test]
    fn a_seed_is_a_case() {
        for seed in 0..200 {
            assert_eq!(Case::from_seed(seed), Case::from_seed(seed));
        }
    }
}
