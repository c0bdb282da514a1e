//! Holding what a kernel returned against the reference, element by element.

use crate::rows::{Class, Read, Row};
use crate::tolerance::{Bound, Level, Limits, NanReach, Tolerance, tiny};
use fam_core::{Dtype, Shape, Span};
use std::fmt;

/// Names an element of a result: tensor, and index `[stream, block, row, head, channel]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Element {
    /// `o`, `lse`, `mem_o`, `mem_lse`, `m` or `z`.
    pub tensor: &'static str,
    /// `[n, i, r, h, c]`: i counts the call's blocks for memory rows and states, and is 0 for block rows.
    pub index: [usize; 5],
}

/// The largest share of its bound that any element's error took.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Worst {
    /// |error| / bound.
    pub ratio: f64,
    /// Where.
    pub at: Element,
}

/// An element that is wrong.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Wrong {
    /// Where.
    pub at: Element,
    /// What the kernel returned.
    pub got: f64,
    /// What the reference returned.
    pub expected: f64,
    /// The largest difference allowed; 0 where a class (NaN, ±inf, the zero of an empty row) or bits had to match.
    pub bound: f64,
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Wrong { at: Element { tensor, index: [n, i, r, h, c] }, got, expected, bound } = self;
        write!(f, "{tensor}[stream {n}, block {i}, row {r}, head {h}, channel {c}] = {got:e}, expected {expected:e}")?;
        if *bound > 0.0 {
            write!(f, ", off by {:e}: {:.3} of the bound {bound:e}", (got - expected).abs(), (got - expected).abs() / bound)?;
        }
        Ok(())
    }
}

/// Rounding errors of an output, each as a share of u·A_j, with u that of the output or of coarser probabilities: rounding that leans to one side breaks training long before it breaks a
/// bound. Means are taken case by case, since the elements of a case err together.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Bias {
    /// Elements.
    pub count: u64,
    /// Cases that had any.
    pub cases: u64,
    /// Σ over the cases of the mean error; signed, and outward (times the sign of the expected value: truncation leans that way only).
    means: [f64; 2],
    /// Σ over the cases of the squares of those.
    squares: [f64; 2],
}

impl Bias {
    /// Of one case's elements: how many, and the sums of their signed and outward errors.
    pub(crate) fn of_case(count: u64, sums: [f64; 2]) -> Self {
        if count == 0 {
            return Bias::default();
        }
        let means = sums.map(|sum| sum / count as f64);
        Bias { count, cases: 1, means, squares: means.map(|m| m * m) }
    }

    /// |mean error| as a share of u_out·A, of the signed and the outward error the larger one.
    pub fn share(&self) -> f64 {
        self.means[0].abs().max(self.means[1].abs()) / (self.cases as f64).max(1.0)
    }

    /// The share that is beyond doubt: less four standard errors of the mean over the cases.
    pub fn certain_share(&self) -> f64 {
        let cases = (self.cases as f64).max(1.0);
        let certain = |(sum, squares): (f64, f64)| {
            let mean = sum / cases;
            let variance = (squares / cases - mean * mean).max(0.0);
            mean.abs() - 4.0 * (variance / cases).sqrt()
        };
        self.means.into_iter().zip(self.squares).map(certain).fold(0.0, f64::max)
    }

    /// Adds other cases.
    pub fn add(&mut self, other: &Bias) {
        self.count += other.count;
        self.cases += other.cases;
        for i in 0..2 {
            self.means[i] += other.means[i];
            self.squares[i] += other.squares[i];
        }
    }
}

/// What one element is held to.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Rule {
    /// +0, to the bit.
    Zero,
    /// This very number, the sign of zero aside; NaN for NaN.
    Same,
    /// So far from the reference, class first.
    Near(Tolerance),
    /// NaN or an infinity.
    NotFinite,
    /// Nothing: the contract leaves it open.
    Any,
}

/// Elements compared so far: the one place where a number of a kernel is held against one of the reference.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Tally {
    /// Elements that could have been wrong, and were compared.
    pub compared: u64,
    /// Elements not judged: left open by the contract, or with a bound as large as anything that a faulty kernel would make of their terms.
    pub vacuous: u64,
    /// The largest share of its bound that an error took; `None` where nothing had a bound.
    pub worst: Option<Worst>,
    /// The first wrong element.
    pub wrong: Option<Wrong>,
}

impl Tally {
    /// One element against its bound, class (NaN, which infinity, finite) first.
    pub fn near(&mut self, at: Element, got: f64, expected: f64, tolerance: Tolerance) {
        let Tolerance { bound, magnitude } = tolerance;
        let is_same_class = if expected.is_nan() {
            got.is_nan()
        } else if expected.is_infinite() {
            got == expected
        } else {
            got.is_finite()
        };
        if !is_same_class {
            return self.fail(Wrong { at, got, expected, bound: 0.0 });
        }
        if !expected.is_finite() {
            self.compared += 1;
            return;
        }
        // What is made of nothing is 0, and nothing else is.
        let is_vacuous = magnitude > 0.0 && bound >= magnitude + expected.abs();
        *(if is_vacuous { &mut self.vacuous } else { &mut self.compared }) += 1;
        let error = (got - expected).abs();
        let ratio = if error == 0.0 { 0.0 } else { error / bound };
        if self.worst.is_none_or(|w| ratio > w.ratio) {
            self.worst = Some(Worst { ratio, at });
        }
        // A bound that is NaN or infinite could not be broken.
        if error > bound || !bound.is_finite() {
            self.wrong.get_or_insert(Wrong { at, got, expected, bound });
        }
    }

    /// An element that has been counted, against another expected result.
    fn stored(&mut self, at: Element, got: f64, expected: f64, bound: f64) {
        let is_same = got == expected || (got.is_nan() && expected.is_nan());
        // False where one of them is not finite.
        let is_near = (got - expected).abs() <= bound;
        if !is_same && !is_near {
            self.wrong.get_or_insert(Wrong { at, got, expected, bound });
        }
    }

    /// One element that must be this very number, the sign of zero aside; NaN for NaN.
    pub fn exactly(&mut self, at: Element, got: f64, expected: f64) {
        if got != expected && !(got.is_nan() && expected.is_nan()) {
            return self.fail(Wrong { at, got, expected, bound: 0.0 });
        }
        self.compared += 1;
    }

    /// Adds what was compared after this; the first wrong element stays the first.
    pub fn add(&mut self, later: &Tally) {
        self.compared += later.compared;
        self.vacuous += later.vacuous;
        self.worst = match (self.worst, later.worst) {
            (Some(a), Some(b)) => Some(if b.ratio > a.ratio { b } else { a }),
            (a, b) => a.or(b),
        };
        self.wrong = self.wrong.or(later.wrong);
    }

    /// The largest share of a bound; 0 where nothing had one.
    pub fn worst_ratio(&self) -> f64 {
        self.worst.map_or(0.0, |w| w.ratio)
    }

    /// An element of the wrong class, or the wrong bits.
    fn fail(&mut self, wrong: Wrong) {
        self.compared += 1;
        self.wrong.get_or_insert(wrong);
    }

    /// One element by its rule.
    pub(crate) fn element(&mut self, at: Element, got: f64, expected: f64, rule: Rule) {
        match rule {
            Rule::Zero if got.to_bits() != 0 => self.fail(Wrong { at, got, expected: 0.0, bound: 0.0 }),
            Rule::NotFinite if got.is_finite() => self.fail(Wrong { at, got, expected, bound: 0.0 }),
            Rule::Zero | Rule::NotFinite => self.compared += 1,
            Rule::Same => self.exactly(at, got, expected),
            Rule::Near(tolerance) => self.near(at, got, expected, tolerance),
            Rule::Any => self.vacuous += 1,
        }
    }
}

/// The verdict on one result so far.
#[derive(Clone, Debug)]
pub(crate) struct Checker<'a> {
    pub bound: Bound<'a>,
    pub tally: Tally,
    /// Elements whose rounding was looked at, and the sums of their errors: signed, and outward.
    rounding: (u64, [f64; 2]),
    pub limits: &'a Limits,
}

impl<'a> Checker<'a> {
    /// Checks outputs of `out_dtype` from inputs of `dtype`.
    pub fn new(level: Level, dtype: Dtype, out_dtype: Dtype, limits: &'a Limits) -> Self {
        let bound = Bound::new(level, dtype, out_dtype, limits);
        Checker { bound, tally: Tally::default(), rounding: (0, [0.0; 2]), limits }
    }

    /// The bias of this case's outputs.
    pub fn bias(&self) -> Bias {
        Bias::of_case(self.rounding.0, self.rounding.1)
    }

    /// One element by its rule, or by none where the kernel declares that NaN may spread to it. `stored`: an expected result in f32 beside
    /// the reference's, which allows for half an ulp more.
    pub fn element(&mut self, at: Element, got: f64, expected: f64, rule: Rule, may_be_nan: bool, stored: Option<f64>) {
        let is_open = self.limits.nan == NanReach::Unspecified && !expected.is_finite();
        let rule = if is_open || (may_be_nan && got.is_nan()) { Rule::Any } else { rule };
        self.tally.element(at, got, expected, rule);
        let bound = match rule {
            Rule::Near(Tolerance { bound, .. }) => bound,
            Rule::Same | Rule::Zero => 0.0,
            Rule::NotFinite | Rule::Any => return,
        };
        if let Some(stored) = stored {
            self.tally.stored(at, got, stored, bound + stored.abs() * Dtype::F32.unit_roundoff());
        }
    }

    /// A row of `o`, with what was read where the compressive memory is gated in; `stored` as in [`Checker::element`].
    pub fn row(&mut self, tensor: &'static str, row: &Row<'_>, read: Option<&Read>, got: &[f64], stored: Option<&[f64]>) {
        let [n, i, r, h] = row.index;
        let may_be_nan = row.may_be_nan || read.is_some_and(|read| read.may_be_nan);
        for (c, &got) in got.iter().enumerate() {
            let at = Element { tensor, index: [n, i, r, h, c] };
            let (expected, rule) = row.element(c, &self.bound, read);
            self.element(at, got, expected, rule, may_be_nan, stored.map(|stored| stored[c]));
        }
    }

    /// The log-sum-exp of a row; `stored` as in [`Checker::element`].
    pub fn lse(&mut self, tensor: &'static str, row: &Row<'_>, got: f64, stored: Option<f64>) {
        let [n, i, r, h] = row.index;
        let at = Element { tensor, index: [n, i, r, h, 0] };
        let (expected, rule) = row.lse(&self.bound);
        self.element(at, got, expected, rule, row.may_be_nan, stored);
    }

    /// Looks at how a row was rounded. Where logits are moderate and nothing underflows, what is left is rounding.
    pub fn rounding(&mut self, row: &Row<'_>, got: &[f64]) {
        if row.class != Class::Mean || row.condition.s > 8.0 {
            return;
        }
        let of_output = self.bound.out_dtype.unit_roundoff();
        let coarsest = self.bound.of_rows(row.is_few).p16.map_or(of_output, |p16| of_output.max(p16.unit_roundoff()));
        for ((&got, &expected), &a) in got.iter().zip(row.o).zip(row.a) {
            let unit = coarsest * a;
            if unit > 64.0 * tiny(self.bound.out_dtype) && expected.is_finite() && got.is_finite() {
                let error = (got - expected) / unit;
                self.rounding.0 += 1;
                self.rounding.1[0] += error;
                self.rounding.1[1] += error * expected.signum();
            }
        }
    }
}

/// Sizes of tiles in use: of rows, and of keys where a kernel does not say.
const TILES: [usize; 4] = [16, 32, 64, 128];

/// The edges that an element lies on, in words: what a reader looks at first when a kernel is wrong there and nowhere else. Edges of tiles
/// are those of the kernel's key tile where `limits` states it, and of every usual size otherwise.
pub fn edges(shape: &Shape, span: &Span, at: &Element, limits: &Limits) -> String {
    let [n, i, r, h, _] = at.index;
    let b = shape.block_len() as u64;
    let mut edges = vec![format!("stream {n} (slot {})", span.slot)];
    if matches!(at.tensor, "m" | "z") {
        edges.push(format!("state after block {}", span.start / b + i as u64));
        return edges.join(", ");
    }
    // Keys of the own block that the row sees.
    let seen = if at.tensor.starts_with("mem_") {
        let keys = span.block_keys(i, shape.block_len());
        edges.push(format!("memory row {r} of block {}, keys {}..{}", span.start / b + i as u64, keys.start, keys.end));
        if keys.end - keys.start < b {
            edges.push("partial block".into());
        }
        (keys.end - (span.start / b + i as u64) * b) as usize
    } else {
        let position = span.start + r as u64;
        let first = span.window_first(position, shape);
        let in_block = position % b;
        edges.push(format!("position {position}, row {in_block} of block {}", position / b));
        edges.push(format!("window from {first}"));
        for (is_there, edge) in [
            (r == 0, "first row of the call"),
            (r + 1 == span.len as usize, "last row of the call"),
            (in_block == 0, "first row of its block"),
            (in_block + 1 == b, "last row of its block"),
            (first == span.origin, "window cut by the origin"),
        ] {
            if is_there {
                edges.push(edge.into());
            }
        }
        in_block as usize + 1
    };
    let stated = [limits.key_tile];
    let key_tiles = if limits.is_tile_stated() { &stated[..] } else { &TILES };
    for (sizes, place, edge) in [
        (&TILES[..], r, "first row of a tile"),
        (&TILES, r + 1, "last row of a tile"),
        (key_tiles, seen.saturating_sub(1), "its last key the first of a tile"),
        (key_tiles, seen, "its last key the last of a tile"),
    ] {
        let there: Vec<_> = sizes.iter().filter(|size| place > 0 && place.is_multiple_of(**size)).map(usize::to_string).collect();
        if !there.is_empty() {
            edges.push(format!("{edge} of {}", there.join(", ")));
        }
    }
    if shape.group() > 1 {
        edges.push(format!("query head {} of {} of kv head {}", h % shape.group(), shape.group(), h / shape.group()));
    }
    edges.join(", ")
}

/// The level's name in reports.
impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Level::Hard => "hard",
            Level::Stat => "stat",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lean_is_told_from_noise() {
        let mut rng = crate::Rng::new(1);
        let (mut even, mut leaning) = (Bias::default(), Bias::default());
        for _ in 0..400 {
            let noise = 0.4 * rng.normal();
            even.add(&Bias::of_case(100, [100.0 * noise, 0.0]));
            leaning.add(&Bias::of_case(100, [0.0, 100.0 * (noise - 0.3)]));
        }
        assert!(even.certain_share() == 0.0 && leaning.certain_share() > 0.15 && leaning.share() < 0.4);
        assert_eq!(Bias::of_case(0, [0.0; 2]), Bias::default());
    }
}
