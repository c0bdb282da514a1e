//! Holding what a kernel returned against the reference, element by element.

use crate::tolerance::{Bound, Condition, Level, Limits, NanReach, tiny};
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

/// Rounding errors of an output, each as a share of u_out·A_j: rounding that leans to one side breaks training long before it breaks a
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

/// The verdict on one result so far.
#[derive(Clone, Debug)]
pub(crate) struct Checker<'a> {
    pub bound: Bound<'a>,
    pub worst: Option<Worst>,
    pub wrong: Option<Wrong>,
    /// Elements whose rounding was looked at, and the sums of their errors: signed, and outward.
    rounding: (u64, [f64; 2]),
    pub limits: &'a Limits,
}

impl<'a> Checker<'a> {
    /// Checks outputs of `out_dtype` from inputs of `dtype`.
    pub fn new(level: Level, dtype: Dtype, out_dtype: Dtype, limits: &'a Limits) -> Self {
        let bound = Bound::new(level, dtype, out_dtype, limits);
        Checker { bound, worst: None, wrong: None, rounding: (0, [0.0; 2]), limits }
    }

    /// The bias of this case's outputs.
    pub fn bias(&self) -> Bias {
        Bias::of_case(self.rounding.0, self.rounding.1)
    }

    /// One element against its bound, class first. The first wrong one is kept.
    pub fn element(&mut self, at: Element, got: f64, expected: f64, bound: f64) {
        let is_same_class = if expected.is_nan() {
            got.is_nan()
        } else if expected.is_infinite() {
            got == expected
        } else {
            got.is_finite()
        };
        if !is_same_class {
            self.fail(Wrong { at, got, expected, bound: 0.0 });
        } else if expected.is_finite() {
            let error = (got - expected).abs();
            let ratio = if error == 0.0 { 0.0 } else { error / bound };
            if self.worst.is_none_or(|w| ratio > w.ratio) {
                self.worst = Some(Worst { ratio, at });
            }
            // A bound that is NaN or infinite could not be broken.
            if error > bound || !bound.is_finite() {
                self.fail(Wrong { at, got, expected, bound });
            }
        }
    }

    /// One element that must be this very number, the sign of zero aside; NaN for NaN.
    pub fn exactly(&mut self, at: Element, got: f64, expected: f64) {
        if got != expected && !(got.is_nan() && expected.is_nan()) {
            self.fail(Wrong { at, got, expected, bound: 0.0 });
        }
    }

    pub fn fail(&mut self, wrong: Wrong) {
        self.wrong.get_or_insert(wrong);
    }

    /// One row of attention with the conditioning `c` of each channel (its `o` and `a` are filled in here).
    pub fn row(&mut self, row: &RowCheck<'_>) {
        let RowCheck { tensor, index: [n, i, r, h], got, o, a, .. } = *row;
        let is_spread = row.sees_poisoned_tile && got.iter().any(|g| g.is_nan());
        if is_spread && self.limits.nan != NanReach::Rows {
            return;
        }
        if self.limits.nan == NanReach::Unspecified && o.iter().any(|o| !o.is_finite()) {
            return;
        }
        for (c, (&got, &expected)) in got.iter().zip(o).enumerate() {
            let at = Element { tensor, index: [n, i, r, h, c] };
            if row.is_empty {
                // +0, to the bit.
                if got.to_bits() != 0 {
                    self.fail(Wrong { at, got, expected: 0.0, bound: 0.0 });
                }
                continue;
            }
            if row.is_copy {
                self.exactly(at, got, expected);
                continue;
            }
            let condition = Condition { o: expected, a: a[c], ..row.condition };
            self.element(at, got, expected, self.bound.o(&condition));
            let unit = self.bound.out_dtype.unit_roundoff() * a[c];
            // Where logits are moderate and nothing underflows, what is left is rounding.
            let shows_rounding = row.counts_for_bias && row.condition.s <= 8.0 && unit > 64.0 * tiny(self.bound.out_dtype);
            if shows_rounding && expected.is_finite() && got.is_finite() {
                let error = (got - expected) / unit;
                self.rounding.0 += 1;
                self.rounding.1[0] += error;
                self.rounding.1[1] += error * expected.signum();
            }
        }
        self.lse(row);
    }

    /// The log-sum-exp of a row, where it was asked for.
    pub fn lse(&mut self, row: &RowCheck<'_>) {
        let [n, i, r, h] = row.index;
        let Some((got, expected)) = row.lse else { return };
        let at = Element { tensor: row.lse_tensor, index: [n, i, r, h, 0] };
        if expected.is_nan() {
            // A logit of +inf or NaN: unspecified beyond not being finite.
            if got.is_finite() {
                self.fail(Wrong { at, got, expected, bound: 0.0 });
            }
        } else {
            self.element(at, got, expected, self.bound.lse(expected, &row.condition));
        }
    }
}

/// One row of a result and of the reference.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowCheck<'a> {
    pub tensor: &'static str,
    pub lse_tensor: &'static str,
    pub index: [usize; 4],
    pub got: &'a [f64],
    pub o: &'a [f64],
    pub a: &'a [f64],
    /// Got and expected.
    pub lse: Option<(f64, f64)>,
    pub condition: Condition,
    /// No visible logit is above −inf: the zero is exact.
    pub is_empty: bool,
    /// One visible key and nothing else: its value, bit for bit.
    pub is_copy: bool,
    /// A key of the row's stream and kv head is not finite.
    pub sees_poisoned_tile: bool,
    pub counts_for_bias: bool,
}

/// The edges that an element lies on, in words: what a reader looks at first when a kernel is wrong there and nowhere else.
pub fn edges(shape: &Shape, span: &Span, at: &Element, key_tile: usize) -> String {
    let [n, i, r, h, _] = at.index;
    let b = shape.block_len() as u64;
    let mut edges = vec![format!("stream {n} (slot {})", span.slot)];
    let is_memory = at.tensor.starts_with("mem_");
    if matches!(at.tensor, "m" | "z") {
        edges.push(format!("state after block {}", span.start / b + i as u64));
    } else if is_memory {
        let keys = span.block_keys(i, shape.block_len());
        edges.push(format!("memory row {r} of block {}, keys {}..{}", span.start / b + i as u64, keys.start, keys.end));
        if keys.end - keys.start < b {
            edges.push("partial block".into());
        }
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
            (key_tile > 1 && r > 0 && r.is_multiple_of(key_tile), "first row of a tile"),
            (key_tile > 1 && (r + 1).is_multiple_of(key_tile), "last row of a tile"),
        ] {
            if is_there {
                edges.push(edge.into());
            }
        }
    }
    if shape.group() > 1 && !matches!(at.tensor, "m" | "z") {
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
