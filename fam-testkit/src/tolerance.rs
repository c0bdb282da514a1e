//! The bound that a result is held to: derived from the problem, not chosen.
//!
//! Per row, with logits s_t and weights p_t of the reference: A_j = Σ p_t |v_tj|, S = |scale|·max_t Σ_c |q_c k_tc|, n visible keys in
//! `tiles` tiles, D channels, a sink of magnitude Z (0 without one); u the unit roundoff of a type; P16 = 1 where probabilities are rounded to 16 bits before P·V.
//!
//! ```text
//! HARD_j = u_out|o_j| + P16·1.01·u_P·A_j + u32·A_j·(2S(D+4) + 2Z + n + 3·tiles + 12) + tiny
//! STAT_j = u_out|o_j| + P16·1.01·u_P·A_j + u32·A_j·(2S(√D+4) + 2Z + 4√n + 12) + tiny
//! LSE    = u32·(|lse| + 2S(D+4) + 2Z + n + 8)
//! tiny   = half the least positive number of the output's type, and gradual underflow inside the kernel:
//!          2⁻¹⁵⁰·(n + 3·tiles) of products and rescales in f32, and of probabilities
//!          2⁻²⁵·max|v|·(n, or √n in STAT) where they are f16, 2⁻¹⁵⁰·max|v|·n in f32
//! flush  = A_j·(exp(2f) − 1) + 2⁻¹²⁶·(1 + n + n·max|v|), in LSE f, where products take subnormal numbers for 0:
//!          f is what that may take from a logit
//! ```
//!
//! Where the logits of a row are exact in f32 in any order, S is at most 40. docs/math.md derives each bound. A kernel with another source of error declares it as a [`Term`].

use crate::distribution::exp2;
use crate::finite::magnitude;
use fam_core::{Dtype, Shape};
use fam_ref::Written;

/// u of f32.
pub(crate) const U32: f64 = 1.0 / 16_777_216.0;

/// How strict a comparison is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Level {
    /// Holds for any order of operations: for any input.
    #[default]
    Hard,
    /// Errors that add like random ones: for suites of a fixed seed.
    Stat,
}

/// What the error of one output element is bounded by.
#[derive(Clone, Copy, Debug)]
pub struct Condition {
    /// The reference's output.
    pub o: f64,
    /// A_j.
    pub a: f64,
    /// S.
    pub s: f64,
    /// Z: the sink's magnitude; 0 without one, and for a sink of −inf, which is none. A given logit, it only loses in the difference
    /// from the maximum.
    pub sink: f64,
    /// Visible keys.
    pub n: f64,
    /// Key tiles.
    pub tiles: f64,
    /// D.
    pub d: f64,
    /// max |v| over the visible keys; over the finite values where there are others.
    pub v_max: f64,
    /// f: what a logit may lose where products take subnormal numbers for 0 ([`lost_to_flush`]); 0 with other kernels.
    pub flushed: f64,
}

/// A source of error of one backend beside those that the bound names, e.g. a fast exponential.
#[derive(Clone, Copy, Debug)]
pub struct Term {
    /// Printed with results.
    pub name: &'static str,
    /// Its share of the bound.
    pub bound: fn(&Condition) -> f64,
}

/// How far a NaN or an infinity in a visible key or value may spread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NanReach {
    /// To the rows that see the key.
    #[default]
    Rows,
    /// To the rows whose tiles load the key: that see a key of its tile, or share a tile of rows (of at most 128) with one that does.
    Tiles,
    /// Rows that see it, or are not finite themselves, are unspecified, beside that.
    Unspecified,
}

/// What a backend states of itself, beside [`fam_core::Support`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Limits {
    /// Elements of the largest tensor that fits; larger cases are skipped.
    pub max_elements: u64,
    /// BLOCK_N: keys that are added up before the running maximum is looked at again. `usize::MAX`: as many as there are.
    pub key_tile: usize,
    /// The dtypes whose kernels round probabilities to that dtype before P·V, but for rows that are few.
    pub p16: &'static [Dtype],
    /// The dtypes whose backward kernels round probabilities, and gradients of logits, to that dtype before a product.
    pub p16_backward: &'static [Dtype],
    /// The dtypes in which attention's products take operands, and sums, that are subnormal in f32 for 0, but for rows that are few.
    pub flushes: &'static [Dtype],
    /// Most block rows of a block in a call (tokens times query heads of a group), and most memory rows of a block (times these heads), that
    /// are few: whose probabilities and products are f32 in every dtype, in the forward pass.
    pub few_rows: [usize; 2],
    /// How far NaN spreads.
    pub nan: NanReach,
    /// Further errors.
    pub terms: &'static [Term],
}

impl Default for Limits {
    /// The strictest: any size, one tile for all keys of a block, probabilities in f32, NaN confined to the rows that see it, no further
    /// error. A kernel with smaller tiles states them, for the roundings of its rescales.
    fn default() -> Self {
        Limits {
            max_elements: u64::MAX,
            key_tile: usize::MAX,
            p16: &[],
            p16_backward: &[],
            flushes: &[],
            few_rows: [0; 2],
            nan: NanReach::Rows,
            terms: &[],
        }
    }
}

impl Limits {
    /// Those of a kernel of which nothing is known: it may look at the maximum after every key, round probabilities to 16 bits with 16-bit
    /// inputs and take subnormal numbers for 0, and have NaN anywhere in its tiles.
    pub fn any_kernel() -> Self {
        let p16 = &[Dtype::F16, Dtype::Bf16];
        Limits { key_tile: 1, p16, p16_backward: p16, flushes: &Dtype::ALL, nan: NanReach::Tiles, ..Limits::default() }
    }

    /// Whether the rows of so many tokens of one block in a call, or of so many of its memory rows, are few.
    pub fn is_few(&self, shape: &Shape, is_memory: bool, tokens: usize) -> bool {
        tokens * shape.group() <= self.few_rows[usize::from(is_memory)]
    }

    /// Whether `key_tile` is the size of a kernel's tile, and not the one or the other extreme.
    pub(crate) fn is_tile_stated(&self) -> bool {
        (2..usize::MAX).contains(&self.key_tile)
    }

    /// Sets the largest tensor.
    #[must_use]
    pub fn max_elements(mut self, elements: u64) -> Self {
        self.max_elements = elements;
        self
    }
    /// Sets BLOCK_N.
    #[must_use]
    pub fn key_tile(mut self, keys: usize) -> Self {
        self.key_tile = keys.max(1);
        self
    }
    /// Declares 16-bit probabilities.
    #[must_use]
    pub fn p16(mut self, dtypes: &'static [Dtype]) -> Self {
        self.p16 = dtypes;
        self
    }
    /// Declares 16-bit probabilities and gradients of logits in backward kernels.
    #[must_use]
    pub fn p16_backward(mut self, dtypes: &'static [Dtype]) -> Self {
        self.p16_backward = dtypes;
        self
    }
    /// Declares that subnormal numbers count as 0.
    #[must_use]
    pub fn flushes(mut self, dtypes: &'static [Dtype]) -> Self {
        self.flushes = dtypes;
        self
    }
    /// Declares up to how many block rows, and memory rows, are computed in f32.
    #[must_use]
    pub fn few_rows(mut self, most: [usize; 2]) -> Self {
        self.few_rows = most;
        self
    }
    /// Declares how far NaN spreads.
    #[must_use]
    pub fn nan(mut self, nan: NanReach) -> Self {
        self.nan = nan;
        self
    }
    /// Declares further errors.
    #[must_use]
    pub fn terms(mut self, terms: &'static [Term]) -> Self {
        self.terms = terms;
        self
    }
}

/// The bounds of one dtype, output type and level.
#[derive(Clone, Copy, Debug)]
pub struct Bound<'a> {
    /// HARD or STAT.
    pub level: Level,
    /// Type of the output.
    pub out_dtype: Dtype,
    /// Type that probabilities are rounded to, if any.
    pub p16: Option<Dtype>,
    /// Type that backward kernels round probabilities and gradients of logits to, if any.
    pub p16_backward: Option<Dtype>,
    /// Whether products take subnormal numbers for 0.
    pub flushes: bool,
    /// The backend's further errors.
    pub terms: &'a [Term],
}

impl<'a> Bound<'a> {
    /// The bounds for outputs of `out_dtype` from inputs of `dtype`.
    pub fn new(level: Level, dtype: Dtype, out_dtype: Dtype, limits: &'a Limits) -> Self {
        let rounds = |dtypes: &[Dtype]| dtypes.contains(&dtype).then_some(dtype);
        let (p16, p16_backward) = (rounds(limits.p16), rounds(limits.p16_backward));
        Bound { level, out_dtype, p16, p16_backward, flushes: limits.flushes.contains(&dtype), terms: limits.terms }
    }

    /// The bounds of rows that are few, or are not ([`Limits::few_rows`]).
    pub fn of_rows(&self, are_few: bool) -> Self {
        if are_few { Bound { p16: None, flushes: false, ..*self } } else { *self }
    }

    /// Of an element of `o`, as it is stored.
    pub fn o(&self, c: &Condition) -> f64 {
        self.out_dtype.unit_roundoff() * c.o.abs() + self.o_f32(c) + tiny(self.out_dtype)
    }

    /// Of an element of the f32 accumulator that `o` is rounded from.
    pub fn o_f32(&self, c: &Condition) -> f64 {
        let Condition { a, s, sink, n, tiles, d, flushed, .. } = *c;
        let v_max = magnitude(c.v_max);
        let (terms, keys) = match self.level {
            Level::Hard => (2.0 * s * (d + 4.0) + 2.0 * sink + n + 3.0 * tiles + 12.0, n),
            Level::Stat => (2.0 * s * (d.sqrt() + 4.0) + 2.0 * sink + 4.0 * n.sqrt() + 12.0, n.sqrt()),
        };
        let p16 = match self.p16 {
            // f32 probabilities underflow gradually. Only a row whose sink outweighs all of its keys can tell.
            None => exp2(-150) * n * v_max,
            Some(Dtype::F16) => 1.01 * Dtype::F16.unit_roundoff() * a + exp2(-25) * keys * v_max,
            Some(p) => 1.01 * p.unit_roundoff() * a,
        };
        // A product or a rescale whose result is subnormal rounds by up to half of the least subnormal.
        let underflow = exp2(-150) * (n + 3.0 * tiles);
        // Logits that have lost something; and of P·V a value, each probability, and the sum after each key. Beyond 1 the bound says nothing.
        let flush = if self.flushes { a * (2.0 * flushed.min(1.0)).exp_m1() + exp2(-126) * (1.0 + n + n * v_max) } else { 0.0 };
        p16 + flush + underflow + U32 * a * terms + self.terms.iter().map(|t| (t.bound)(c)).sum::<f64>()
    }

    /// Of the log-sum-exp `lse`.
    pub fn lse(&self, lse: f64, c: &Condition) -> f64 {
        U32 * (lse.abs() + 2.0 * c.s * (c.d + 4.0) + 2.0 * c.sink + c.n + 8.0) + c.flushed
    }

    /// Of the gated output: shares `g` of memory and local attention, whose parts have errors of `a_error` and `o_error` in f32.
    pub fn gated(&self, g: [f64; 2], [a, a_error]: [f64; 2], [o, o_error]: [f64; 2]) -> f64 {
        let [g_a, g_o] = g;
        let out = g_a * a + g_o * o;
        let parts = g_a * a_error + g_o * o_error;
        let gate = U32 * 10.0 * (g_a * a.abs() + g_o * o.abs());
        // A share below the least normal number has few digits, and none where exp(|β|) overflows first.
        let small = |g: f64, x: f64| if g < exp2(-126) { (g + exp2(-149)) * x.abs() } else { 0.0 };
        // Either product may be subnormal, and where that is flushed their sum too.
        let lost = small(g_a, a) + small(g_o, o);
        let underflow = lost + exp2(-149) + 3.0 * self.flushed_result();
        // What is rounded is the sum without what it has lost, which may be the larger part of it.
        parts + gate + self.out_dtype.unit_roundoff() * (out.abs() + lost) + underflow + tiny(self.out_dtype)
    }

    /// What any result of f32 arithmetic may lose where it takes subnormal numbers for 0. A kernel that rounds probabilities to 16 bits does so in
    /// its dot products alone, which merge and gate have none of.
    pub(crate) fn flushed_result(&self) -> f64 {
        if self.flushes && self.p16.is_none() { exp2(-126) } else { 0.0 }
    }

    /// Of a merge of two parts with weights w, whose lse are `difference` apart.
    ///
    /// The larger part's weight before the division is exp(0), exactly; the smaller one's has the error of the difference's rounding and of
    /// exp. Through the division that moves weight between the parts, by w_a·w_b times it.
    pub fn merged(&self, o: f64, [w_a, o_a]: [f64; 2], [w_b, o_b]: [f64; 2], difference: f64) -> f64 {
        let sums = 8.0 * (w_a * o_a.abs() + w_b * o_b.abs());
        let weights = (3.0 * difference + 6.0) * w_a * w_b * (o_a.abs() + o_b.abs());
        // The smaller weight may be subnormal, and each product.
        let underflow = exp2(-148) * (o_a.abs() + o_b.abs()) + exp2(-149);
        // Where that is flushed, so are they, and the sum.
        let flush = self.flushed_result() * (3.0 + o_a.abs() + o_b.abs());
        U32 * (sums + weights) + underflow + flush + self.out_dtype.unit_roundoff() * o.abs() + tiny(self.out_dtype)
    }
}

/// What the logit of `q` and `k` may lose where products take subnormal numbers for 0: its terms that have such a factor, and of every
/// term the sum behind it.
pub fn lost_to_flush(q: &[f64], k: &[f64], scale: f64) -> f64 {
    let least = f64::from(f32::MIN_POSITIVE);
    let terms = q.iter().zip(k).filter(|(q, k)| q.abs() < least || k.abs() < least);
    scale.abs() * (terms.map(|(q, k)| magnitude(q * k)).sum::<f64>() + least * q.len() as f64)
}

/// How far an element may be from the reference, and what it was made of.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerance {
    /// The largest error of a right kernel.
    pub bound: f64,
    /// Σ |terms| of the sum that the element is, e.g. A_j. A bound of magnitude + |expected| judges nothing.
    pub magnitude: f64,
}

/// Of the log-sum-exp of a merge.
pub fn merged_lse(lse: f64) -> f64 {
    U32 * (lse.abs() + 8.0)
}

/// Of an element of σ(q)·m / σ(q)·z: `magnitude` is Σ_c s_c|m_cj| / den.
pub fn infini_read(d: usize, magnitude: f64, a: f64) -> f64 {
    U32 * (2.0 * d as f64 + 12.0) * (magnitude + a.abs())
}

/// Of the elements of m' and z' after a segment of n tokens that was summed apart and added to the old state once. Where σ(k) is subnormal
/// it has an absolute error, of at most 2⁻¹⁴⁹, and each product may underflow. `lost`: what any result may lose beside that, where arithmetic takes
/// subnormal numbers for 0.
pub fn infini_write(n: usize, written: &Written, lost: f64) -> [Vec<Tolerance>; 2] {
    let (n, d) = (n as f64, written.z.len());
    let m = (0..d * d).map(|at| {
        let [m, s_v, s_read, s_diff] = [written.m[at].abs(), written.s_v[at], written.s_read[at], written.s_diff[at]];
        let sum = U32 * ((n + 8.0) * s_v + m);
        // 0 with the linear rule.
        let delta = infini_read(d, s_read, 0.0) + U32 * (n + 9.0) * s_diff;
        let underflow = (exp2(-149) + lost) * (n + written.diff[at % d]) + lost * (n + 1.0);
        Tolerance { bound: sum + delta + underflow, magnitude: m + s_v + s_read }
    });
    let z = written.z.iter().zip(&written.s_sum).map(|(z, s_sum)| {
        let bound = U32 * ((n + 6.0) * s_sum + z) + exp2(-149) * n + lost * (2.0 * n + 1.0);
        Tolerance { bound, magnitude: z + s_sum }
    });
    [m.collect(), z.collect()]
}

/// Half the least positive number of `dtype`.
pub fn tiny(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F16 => exp2(-25),
        Dtype::Bf16 => exp2(-134),
        _ => exp2(-150),
    }
}

/// Key tiles that a row walks: every block that it sees, and the memory, starts a tile of its own.
pub(crate) fn tiles(keys: std::ops::Range<u64>, block_len: usize, mem_rows: usize, key_tile: usize) -> f64 {
    let b = block_len as u64;
    let mut tiles = mem_rows.div_ceil(key_tile);
    let mut first = keys.start;
    while first < keys.end {
        let next = (first / b + 1) * b;
        // A window may begin inside a tile.
        tiles += ((next.min(keys.end) - first) as usize).div_ceil(key_tile) + usize::from(!first.is_multiple_of(b));
        first = next;
    }
    tiles as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use fam_core::bf16;

    #[test]
    fn formulas() {
        let limits = Limits::default();
        let c = Condition { o: 0.5, a: 2.0, s: 3.0, sink: 0.0, n: 16.0, tiles: 2.0, d: 64.0, v_max: 4.0, flushed: 0.0 };
        let bound = Bound::new(Level::Hard, Dtype::F32, Dtype::F32, &limits);
        assert_eq!(bound.o(&c), U32 * 0.5 + U32 * 2.0 * (6.0 * 68.0 + 16.0 + 6.0 + 12.0) + exp2(-150) * (16.0 + 6.0 + 1.0));
        let only_sink = Condition { o: 0.0, a: 0.0, ..c };
        assert_eq!(bound.o(&only_sink), exp2(-150) * (16.0 * 4.0 + 16.0 + 6.0 + 1.0));
        let with_sink = Condition { sink: 5.0, ..c };
        approx(bound.o(&with_sink) - bound.o(&c), U32 * 2.0 * 10.0);
        approx(bound.lse(1.0, &with_sink) - bound.lse(1.0, &c), U32 * 10.0);
        let bound = Bound { level: Level::Stat, ..bound };
        assert_eq!(bound.o_f32(&c), U32 * 2.0 * (6.0 * 12.0 + 16.0 + 12.0));
        let p16 = Limits::default().p16(&[Dtype::F16]);
        let half = Bound::new(Level::Hard, Dtype::F16, Dtype::F32, &p16);
        let plain = Bound::new(Level::Hard, Dtype::F16, Dtype::F32, &limits);
        approx(half.o(&c) - plain.o(&c), 1.01 / 2048.0 * 2.0 + exp2(-25) * 16.0 * 4.0);
        let beside_nan = Condition { v_max: f64::NAN, ..c };
        assert!(half.o(&beside_nan).is_finite() && plain.o(&beside_nan).is_finite());
        assert_eq!(tiles(5..40, 16, 17, 16), 2.0 + 2.0 + 1.0 + 1.0);
    }

    /// Attention in f32 without a fault, where a sink leaves the keys so little that exp underflows: o is known to an absolute error only.
    #[test]
    fn a_right_kernel_needs_the_term_of_underflow() {
        let limits = Limits::default();
        let bound = Bound::new(Level::Hard, Dtype::F32, Dtype::F32, &limits);
        let mut needed = 0;
        for step in 0..400 {
            // One key of logit 0, v = 3000; the sink's logit is so far above that p lies around the least subnormal.
            let (sink, v) = (96.0 + step as f32 * 0.025, 3000f32);
            let p = (-sink).exp();
            let o = p * v / (1.0 + p);
            let exact = (-f64::from(sink)).exp();
            let expected = exact * f64::from(v) / (1.0 + exact);
            let c =
                Condition { o: expected, a: expected, sink: sink.into(), n: 1.0, tiles: 1.0, d: 1.0, v_max: v.into(), ..NOTHING };
            let error = (f64::from(o) - expected).abs();
            assert!(error <= bound.o(&c), "sink {sink}: {error:e} of {:e}", bound.o(&c));
            needed += usize::from(error > bound.o(&c) - exp2(-150) * c.n * c.v_max);
        }
        assert!(needed > 100, "without the term {needed} of 400 right results would be wrong");
    }

    const NOTHING: Condition =
        Condition { o: 0.0, a: 0.0, s: 0.0, sink: 0.0, n: 0.0, tiles: 0.0, d: 0.0, v_max: 0.0, flushed: 0.0 };

    /// Halves of the least subnormal round to even, here both to 0.
    #[test]
    fn a_right_gate_needs_the_term_of_underflow() {
        let limits = Limits::default();
        let bound = Bound::new(Level::Hard, Dtype::F32, Dtype::F32, &limits);
        let least = f32::from_bits(1);
        let (got, expected) = (f64::from(0.5 * least + 0.5 * least), f64::from(least));
        let error = (got - expected).abs();
        let allowed = bound.gated([0.5; 2], [expected, 0.0], [expected, 0.0]);
        assert!(error <= allowed && error > allowed - exp2(-149), "{error:e} of {allowed:e}");
    }

    /// Without the part of a share that is taken for 0 there is more to round than there was: here 0.004 against 0.001.
    #[test]
    fn a_right_gate_may_lose_the_part_of_a_subnormal_share() {
        let limits = Limits::default().flushes(&Dtype::ALL);
        let bound = Bound::new(Level::Hard, Dtype::Bf16, Dtype::Bf16, &limits);
        let (a, shares, o) = (-0.003_928, [1.0, exp2(-130)], 0.003 * exp2(130));
        let got = bf16::from_f64(a).to_f64();
        let allowed = bound.gated(shares, [a, 0.0], [o, 0.0]);
        let error = (got - (a + 0.003)).abs();
        let of_sum = Dtype::Bf16.unit_roundoff() * (a + 0.003).abs();
        assert!(error <= allowed && error > 0.003 + of_sum, "{error:e} of {allowed:e}");
    }

    /// A merge in f32 without a fault, at any distance: within the bound, which does not grow with a distance that has no weight.
    #[test]
    fn a_merge_is_held_to_what_its_smaller_weight_can_do() {
        let limits = Limits::default();
        let bound = Bound::new(Level::Hard, Dtype::F32, Dtype::F32, &limits);
        let mut rng = crate::Rng::new(3);
        let mut worst = 0f64;
        for _ in 0..20_000 {
            let (lse_a, lse_b) = ((30.0 * rng.normal()) as f32, (30.0 * rng.normal()) as f32);
            let (o_a, o_b) = (rng.normal() as f32, (100.0 * rng.normal()) as f32);
            let max = lse_a.max(lse_b);
            let (w_a, w_b) = ((lse_a - max).exp(), (lse_b - max).exp());
            let got = (w_a * o_a + w_b * o_b) / (w_a + w_b);
            let parts = [[o_a], [o_b]].map(|o| o.map(f64::from));
            let (expected, lse) = fam_ref::merge(&parts[0], lse_a.into(), &parts[1], lse_b.into()).unwrap();
            let weigh = |lse_x: f32, o: f32| [(f64::from(lse_x) - lse).exp(), o.into()];
            let difference = f64::from(lse_a - lse_b).abs();
            let allowed = bound.merged(expected[0], weigh(lse_a, o_a), weigh(lse_b, o_b), difference);
            worst = worst.max((f64::from(got) - expected[0]).abs() / allowed);
        }
        assert!(worst <= 1.0 && worst > 0.2, "{worst}");
        // 100 apart: nothing but the roundings of the larger part, which are not those of the distance.
        let apart = bound.merged(1.0, [1.0, 1.0], [(-100f64).exp(), 1.0], 100.0);
        assert!(apart < 10.0 * U32, "{apart:e}");
    }

    fn approx(a: f64, b: f64) {
        assert!((a - b).abs() < 1e-12, "{a} {b}");
    }
}
