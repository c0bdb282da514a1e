//! Outputs of the backward ops: gradients that are written, and gradients that are added to what is there.

use crate::case::Case;
use crate::check::{Checker, Element, Rule};
use crate::data::{Place, Role};
use crate::distribution::round;
use crate::gradient_bound::{Gradient, Sum};
use crate::guard::{CANARY, Tensor};
use crate::harness::{Harness, Mem};
use crate::launch::{Loaded, Stop};
use crate::rng::Rng;
use crate::tolerance::Level;
use fam_core::{Dtype, ViewMut};
use fam_ref::Array;
use std::collections::BTreeMap;

/// What gradients hold that are added to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Start {
    /// Zeros.
    Cleared,
    /// Numbers of the size of what is added, drawn from the case's seed.
    Random,
}

/// Each row of the tensor that the call changes, and the rows of the values that it collects.
type Rows = BTreeMap<[usize; 3], Vec<[usize; 3]>>;

/// A gradient before the call.
pub(crate) struct Output<H: Harness + ?Sized> {
    role: Role,
    rows: Rows,
    loaded: Loaded<H>,
    before: Option<Tensor>,
}

/// A gradient after the call.
#[derive(Clone, Debug)]
pub(crate) struct Collected {
    role: Role,
    rows: Rows,
    before: Option<Tensor>,
    after: Tensor,
}

impl<H: Harness + ?Sized> Output<H> {
    /// A gradient that belongs to one row of the call: written, poison before.
    pub fn written(h: &H, case: &Case, role: Role) -> Result<Self, Stop> {
        let rows = rows(case, role, |_| true);
        Ok(Output { role, rows, loaded: Loaded::result(h, case, role)?, before: None })
    }

    /// A gradient that rows share: added to. Rows to which nothing contributes keep their bits.
    pub fn added(h: &H, case: &Case, role: Role, gradient: &Gradient, start: Start) -> Result<Self, Stop> {
        let heads = gradient.value.shape[3];
        let rows = rows(case, role, |[n, i, r]| (0..heads).any(|h| gradient.sums([n, i, r, h]).iter().any(|s| s.terms > 0.0)));
        let mut before = old(case, role, start);
        if start == Start::Random {
            let mut rng = Rng::of(case.seed, ["sizes of ", role.name()].concat().as_str());
            for (&[tn, ti, tr], places) in &rows {
                for head in 0..heads {
                    let mut row = vec![0.0; gradient.value.shape[4]];
                    before.get([tn, ti, tr, head], &mut row);
                    for (c, x) in row.iter_mut().enumerate() {
                        let sum = total(gradient, places, head, c).1;
                        let size = if sum.magnitude > 0.0 && sum.magnitude < 1e30 { sum.magnitude } else { 1.0 };
                        *x = round(*x * size * rng.pick(&[1.0, 0.1]), Dtype::F32);
                    }
                    before.put([tn, ti, tr, head], &row);
                }
            }
        }
        let loaded = Loaded::new(h, role.name(), before.clone())?;
        Ok(Output { role, rows, loaded, before: Some(before) })
    }

    pub fn view_mut(&mut self) -> ViewMut<'_, Mem<H>> {
        self.loaded.view_mut()
    }

    /// Downloads the gradient; fails if a byte outside its rows has changed.
    pub fn finish(self, h: &H) -> Result<Collected, Stop> {
        let Output { role, rows, loaded, before } = self;
        let after = loaded.finish(h, rows.keys().copied())?;
        Ok(Collected { role, rows, before, after })
    }
}

/// A gradient's tensor before it is added to: every element of it finite, everything between a canary.
pub(crate) fn old(case: &Case, role: Role, start: Start) -> Tensor {
    let mut tensor = Tensor::new(case.layout(role), CANARY);
    let [batch, blocks, rows, heads, d] = tensor.layout.shape;
    let mut rng = Rng::of(case.seed, ["old ", role.name()].concat().as_str());
    for [n, i, r, h] in indices([batch, blocks, rows, heads]) {
        let values: Vec<f64> = (0..d).map(|_| if start == Start::Random { rng.normal() } else { 0.0 }).collect();
        tensor.put([n, i, r, h], &values);
    }
    tensor
}

fn indices([a, b, c, d]: [usize; 4]) -> impl Iterator<Item = [usize; 4]> {
    (0..a).flat_map(move |i| (0..b).flat_map(move |j| (0..c).flat_map(move |k| (0..d).map(move |l| [i, j, k, l]))))
}

fn rows(case: &Case, role: Role, contributes: impl Fn([usize; 3]) -> bool) -> Rows {
    let mut rows = Rows::new();
    for Place { value, tensor } in case.places(role) {
        if contributes(value) {
            rows.entry(tensor).or_default().push(value);
        }
    }
    rows
}

/// The gradient that the rows at `places` pass to one element of a tensor in which they share a row.
fn total(gradient: &Gradient, places: &[[usize; 3]], head: usize, c: usize) -> (f64, Sum) {
    let (mut value, mut sum) = (0.0, Sum::default());
    for &[n, i, r] in places {
        let at = [n, i, r, head];
        value += gradient.value.row(&at)[c];
        sum.join(&gradient.sums(at)[c]);
    }
    (value, sum)
}

impl Collected {
    /// Holds the gradient against the reference's: what was there and what was added to it.
    pub fn check(&self, checker: &mut Checker<'_>, gradient: &Gradient, level: Level) {
        let [.., heads, d] = self.after.layout.shape;
        let (mut got, mut before) = (vec![0.0; d], vec![0.0; d]);
        for (&[tn, ti, tr], places) in &self.rows {
            let [n, i, r] = places[0];
            // A key is named by its row in the cache.
            let r = if matches!(self.role.of(), Role::K | Role::V) { tr } else { r };
            for head in 0..heads {
                self.after.get([tn, ti, tr, head], &mut got);
                self.before.iter().for_each(|tensor| tensor.get([tn, ti, tr, head], &mut before));
                for (c, &got) in got.iter().enumerate() {
                    let (value, sum) = total(gradient, places, head, c);
                    let (old, expected) = (before[c], before[c] + value);
                    let rule = match &self.before {
                        None if sum.terms == 0.0 => Rule::Zero,
                        _ => sum.rule(level, self.after.layout.dtype, old, expected),
                    };
                    let at = Element { tensor: self.role.name(), index: [n, i, r, head, c] };
                    checker.element(at, got, expected, rule, false, None);
                }
            }
        }
    }

    /// The same gradient, had it been the sum of what `parts` added to zeros in calls of their own.
    pub fn replaced_by_sum<'a>(&self, parts: impl Iterator<Item = &'a Collected> + Clone) -> Collected {
        let mut sum = self.clone();
        let [.., heads, d] = self.after.layout.shape;
        let mut part_row = vec![0.0; d];
        for &at @ [n, i, r] in self.rows.keys() {
            for head in 0..heads {
                let mut row = vec![0.0; d];
                for part in parts.clone().filter(|part| part.rows.contains_key(&at)) {
                    part.after.get([n, i, r, head], &mut part_row);
                    row.iter_mut().zip(&part_row).for_each(|(sum, x)| *sum += x);
                }
                sum.after.put([n, i, r, head], &row);
            }
        }
        sum
    }

    /// The call's values; of rows that share memory, what all of them hold.
    pub fn values(&self, case: &Case) -> Array<5> {
        let mut values = Array::zeros(case.sizes(self.role));
        for (&[tn, ti, tr], places) in &self.rows {
            for &[n, i, r] in places {
                (0..values.shape[3]).for_each(|head| self.after.get([tn, ti, tr, head], values.row_mut(&[n, i, r, head])));
            }
        }
        values
    }

    /// All of it.
    pub fn tensor(&self) -> &Tensor {
        &self.after
    }

    /// Whose gradient.
    pub fn role(&self) -> Role {
        self.role
    }
}
