//! Cases of `merge`: two parts with log-sum-exps from equal to far apart, and parts without keys.

use crate::case::{Case, Strides};
use crate::check::{Checker, Element, Rule};
use crate::data::Role;
use crate::distribution::{Distribution, Source, exp2, round};
use crate::guard::{POISON, Tensor, arrange};
use crate::harness::Harness;
use crate::launch::{Loaded, Region, Stop, digest, plan};
use crate::rng::Rng;
use crate::runner::{Passed, conclude};
use crate::tolerance::{Level, Tolerance, merged_lse};
use fam_core::{Backend, Dtype, Merge, Partial, Result};
use fam_ref::Array;

/// One part, or a merge of two: `o` `[N, nb, L, Hq, D]` and `lse` `[N, nb, L, Hq, 1]`.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    pub o: Array<5>,
    pub lse: Array<5>,
}

/// Runs one case.
pub(crate) fn run<H: Harness + ?Sized>(h: &H, case: &Case, level: Level) -> Result<Passed, Stop> {
    // Block rows of the case's calls, or their memory rows.
    let sizes = case.sizes(if case.mem_rows { Role::MemO } else { Role::O });
    let mut parts = draw(case, sizes);
    let (got_o, got_lse) = launch(h, case, &mut parts)?;

    let limits = h.limits();
    let mut checker = Checker::new(level, case.shape.dtype(), case.out_dtype, &limits);
    let [a, b] = &parts;
    for [n, i, r] in rows(sizes) {
        for head in 0..sizes[3] {
            let at = [n, i, r, head];
            let got_lse = got_lse.as_ref().map(|l| l.row(&at)[0]);
            check_row(&mut checker, at, got_o.row(&at), got_lse, [a, b].map(|p| (p.o.row(&at), p.lse.row(&at)[0])))?;
        }
    }
    conclude(case, checker, digest(std::iter::once(&got_o).chain(&got_lse)))
}

/// Merges two parts of the same sizes. Where the case's strides make rows share memory, the parts become what is in it.
pub(crate) fn launch<H: Harness + ?Sized>(
    h: &H,
    case: &Case,
    parts: &mut [Part; 2],
) -> Result<(Array<5>, Option<Array<5>>), Stop> {
    let plan = plan(h, &case.spec()?)?;
    let sizes = parts[0].o.shape;
    let per_row = [sizes[0], sizes[1], sizes[2], sizes[3], 1];
    let mut rng = Rng::of(case.seed, "merge layouts");
    let mut arranged = |dtype, shape, is_output| arrange(case.strides, dtype, shape, is_output, &mut rng);
    let mut loaded = Vec::new();
    for (part, dtype) in parts.iter_mut().zip(case.part_dtypes) {
        let o = settled(&mut part.o, Tensor::new(arranged(dtype, sizes, false), POISON));
        let lse = settled(&mut part.lse, Tensor::new(arranged(Dtype::F32, per_row, false), POISON));
        loaded.push([Loaded::new(h, "a part's o", o)?, Loaded::new(h, "a part's lse", lse)?]);
    }
    let mut o = Loaded::output(h, "o", arranged(case.out_dtype, sizes, true))?;
    let mut lse = case.lse.then(|| Loaded::output(h, "lse", arranged(Dtype::F32, per_row, true))).transpose()?;
    let mut scratch = Region::scratch(h, &plan)?;
    h.run(&mut |queue| {
        let part = |i: usize| Partial { o: loaded[i][0].view(), lse: loaded[i][1].view() };
        let mut args = Merge::new(part(0), part(1), o.view_mut());
        if let Some(lse) = &mut lse {
            args = args.lse(lse.view_mut());
        }
        h.backend().merge(&plan, queue, args, scratch.mem_mut())
    })?;
    loaded.iter().flatten().try_for_each(|input| input.check(h))?;
    scratch.check(h)?;
    Ok((read(h, o)?, lse.map(|lse| read(h, lse)).transpose()?))
}

fn check_row(
    checker: &mut Checker<'_>,
    [n, i, r, h]: [usize; 4],
    got: &[f64],
    got_lse: Option<f64>,
    parts: [(&[f64], f64); 2],
) -> Result<()> {
    let [(o_a, lse_a), (o_b, lse_b)] = parts;
    let (expected, lse) = fam_ref::merge(o_a, lse_a, o_b, lse_b)?;
    let is_empty = |lse: f64| lse == f64::NEG_INFINITY;
    let difference = if is_empty(lse_a) || is_empty(lse_b) { 0.0 } else { (lse_a - lse_b).abs() };
    // An empty part's o is not looked at.
    let weigh = |o: f64, part: f64| if is_empty(part) { [0.0, 0.0] } else { [(part - lse).exp(), o] };
    for (c, &got) in got.iter().enumerate() {
        let at = Element { tensor: "o", index: [n, i, r, h, c] };
        let [a, b] = [weigh(o_a[c], lse_a), weigh(o_b[c], lse_b)];
        let rule = if is_empty(lse) {
            Rule::Zero
        } else {
            let magnitude = a[0] * a[1].abs() + b[0] * b[1].abs();
            Rule::Near(Tolerance { bound: checker.bound.merged(expected[c], a, b, difference), magnitude })
        };
        checker.element(at, got, expected[c], rule, false, None);
    }
    if let Some(got) = got_lse {
        let tolerance = Tolerance { bound: merged_lse(lse), magnitude: lse.abs() + 1.0 };
        checker.element(Element { tensor: "lse", index: [n, i, r, h, 0] }, got, lse, Rule::Near(tolerance), false, None);
    }
    Ok(())
}

pub(crate) fn rows([batch, blocks, rows, ..]: [usize; 5]) -> impl Iterator<Item = [usize; 3]> {
    (0..batch).flat_map(move |n| (0..blocks).flat_map(move |i| (0..rows).map(move |r| [n, i, r])))
}

/// Puts the values into the tensor; where rows share memory, the values become what is there.
pub(crate) fn settled(values: &mut Array<5>, mut tensor: Tensor) -> Tensor {
    let shape = values.shape;
    for [n, i, r] in rows(shape) {
        (0..shape[3]).for_each(|h| tensor.put([n, i, r, h], values.row(&[n, i, r, h])));
    }
    for [n, i, r] in rows(shape) {
        (0..shape[3]).for_each(|h| tensor.get([n, i, r, h], values.row_mut(&[n, i, r, h])));
    }
    tensor
}

pub(crate) fn read<H: Harness + ?Sized>(h: &H, loaded: Loaded<H>) -> Result<Array<5>, Stop> {
    let shape = loaded.host.layout.shape;
    let tensor = loaded.finish(h, rows(shape))?;
    let mut values = Array::zeros(shape);
    for [n, i, r] in rows(shape) {
        (0..shape[3]).for_each(|h| tensor.get([n, i, r, h], values.row_mut(&[n, i, r, h])));
    }
    Ok(values)
}

pub(crate) fn draw(case: &Case, sizes: [usize; 5]) -> [Part; 2] {
    let dtype = case.shape.dtype();
    let mut rng = Rng::of(case.seed, "merge");
    let mut source = Source::new(case.distribution, dtype, [sizes[3], sizes[4]], 1.0, sizes[2], Rng::of(case.seed, "parts"));
    let mut parts = case.part_dtypes.map(|part_dtype| {
        let mut o = Array::zeros(sizes);
        for [n, i, r] in rows(sizes) {
            for h in 0..sizes[3] {
                let row = o.row_mut(&[n, i, r, h]);
                source.value(r, h, row);
                if part_dtype != dtype {
                    // An f32 part uses its digits; its range stays that of the output.
                    row.iter_mut().for_each(|x| *x = round(*x * (1.0 - rng.unit() / 512.0), part_dtype));
                }
            }
        }
        Part { o, lse: Array::zeros([sizes[0], sizes[1], sizes[2], sizes[3], 1]) }
    });
    let [a, b] = &mut parts;
    for [n, i, r] in rows(sizes) {
        for h in 0..sizes[3] {
            let at = [n, i, r, h];
            let (lse_a, lse_b) = pair(case.distribution, &mut rng);
            (a.lse.row_mut(&at)[0], b.lse.row_mut(&at)[0]) = (lse_a as f32 as f64, lse_b as f32 as f64);
            let empty = rng.below(16);
            for (part, bit) in [(&mut *a, 1), (&mut *b, 2)] {
                if empty < 4 && empty & bit != 0 {
                    part.lse.row_mut(&at)[0] = f64::NEG_INFINITY;
                    // Of an empty part nothing but that is seen; unless another row shares the memory.
                    if case.strides != Strides::Broadcast {
                        part.o.row_mut(&at).fill(f64::NAN);
                    }
                }
            }
            if case.distribution == Distribution::NonFinite && rng.chance(1, 8) {
                let (part, c) = (if rng.chance(1, 2) { &mut *a } else { &mut *b }, rng.below(sizes[4]));
                match rng.below(4) {
                    // Beside an empty part nothing is weighed.
                    0 if case.strides != Strides::Broadcast && (empty >= 4 || empty == 0) => part.lse.row_mut(&at)[0] = f64::NAN,
                    _ => part.o.row_mut(&at)[c] = rng.pick(&[f64::NAN, f64::INFINITY, f64::NEG_INFINITY]),
                }
            }
        }
    }
    parts
}

/// The log-sum-exps of the two parts of one row.
fn pair(distribution: Distribution, rng: &mut Rng) -> (f64, f64) {
    let center = match distribution {
        Distribution::Logit1e5 => 1e5 * rng.normal(),
        Distribution::Logit1e6 => 1e6 * rng.normal(),
        Distribution::EqualHuge => 133_120.0,
        Distribution::Offset => -2000.0,
        Distribution::Adversary => rng.sign() * (88.0 + rng.below(3) as f64),
        Distribution::Exponents => rng.sign() * exp2(rng.between(-20, 20)),
        _ => 4.0 * rng.normal(),
    };
    let apart = match distribution {
        Distribution::EqualMaxima | Distribution::EqualHuge => 0.0,
        Distribution::Sharp => 30.0 * rng.normal(),
        Distribution::Logit1e5 | Distribution::Logit1e6 | Distribution::Spikes => 100.0 * rng.normal(),
        // Far enough apart that the smaller weight underflows.
        Distribution::Adversary => rng.sign() * 90.0,
        // A weight of an infinity must not underflow to 0.
        _ => 2.0 * rng.normal(),
    };
    (center, center + apart)
}
