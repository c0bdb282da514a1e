//! Cases of `merge_backward`: gradients of two parts, some of them empty.

use crate::case::Case;
use crate::check::{Checker, Element, Rule};
use crate::data::Role;
use crate::distribution::{Source, round};
use crate::gradient_bound::{LEAST, Sum, products, within_f32};
use crate::guard::{POISON, Tensor, arrange};
use crate::harness::Harness;
use crate::launch::{Loaded, Region, Stop, digest, plan};
use crate::merge::{Part, draw, read, rows, settled};
use crate::rng::Rng;
use crate::runner::{Passed, conclude};
use crate::tolerance::{Level, U32};
use fam_core::{Backend, Dtype, MergeBackward, Partial, PartialGradients, Result};
use fam_ref::Array;

/// Names of the parts' gradients in reports.
const GRADIENTS: [[&str; 2]; 2] = [["d_o_a", "d_lse_a"], ["d_o_b", "d_lse_b"]];

/// What arrives: `d_o` `[N, nb, L, Hq, D]`, and `d_lse` `[.., Hq, 1]` where the loss depends on it.
struct Upstream {
    d_o: Array<5>,
    d_lse: Option<Array<5>>,
}

/// Runs one case.
pub(crate) fn run<H: Harness + ?Sized>(h: &H, case: &Case, level: Level) -> Result<Passed, Stop> {
    let sizes = case.sizes(if case.mem_rows { Role::MemO } else { Role::O });
    let (mut parts, mut upstream) = (draw(case, sizes), arriving(case, sizes));
    let got = launch(h, case, &mut parts, &mut upstream)?;
    let limits = h.limits();
    let mut checker = Checker::new(level, case.shape.dtype(), case.out_dtype, &limits);
    for [n, i, r] in rows(sizes) {
        (0..sizes[3]).try_for_each(|head| check(&mut checker, [n, i, r, head], &got, &parts, &upstream))?;
    }
    conclude(case, checker, digest(got.iter().flatten()))
}

fn arriving(case: &Case, sizes @ [n, i, r, heads, d]: [usize; 5]) -> Upstream {
    let (distribution, dtype) = (case.distribution.upstream(), case.out_dtype);
    let mut source = Source::new(distribution, case.shape.dtype(), [heads, d], 1.0, r, Rng::of(case.seed, "merge upstream"));
    let (mut d_o, mut d_lse) = (Array::zeros(sizes), Array::zeros([n, i, r, heads, 1]));
    let mut rng = Rng::of(case.seed, "merge d_lse");
    for [n, i, r] in rows(sizes) {
        for h in 0..heads {
            let row = d_o.row_mut(&[n, i, r, h]);
            source.value(r, h, row);
            row.iter_mut().for_each(|x| *x = round(*x * (1.0 - rng.unit() / 512.0), dtype));
            d_lse[[n, i, r, h, 0]] = round(rng.normal(), Dtype::F32);
        }
    }
    Upstream { d_o, d_lse: case.gradients.d_lse.then_some(d_lse) }
}

/// The gradients of both parts. Where the case's strides make rows share memory, the inputs become what is in it.
fn launch<H: Harness + ?Sized>(
    h: &H,
    case: &Case,
    parts: &mut [Part; 2],
    upstream: &mut Upstream,
) -> Result<[[Array<5>; 2]; 2], Stop> {
    let plan = plan(h, &case.spec()?)?;
    let sizes = parts[0].o.shape;
    let per_row = [sizes[0], sizes[1], sizes[2], sizes[3], 1];
    let mut rng = Rng::of(case.seed, "merge gradient layouts");
    let mut arranged = |dtype, shape, is_output| arrange(case.strides, dtype, shape, is_output, &mut rng);
    let mut input = |name, dtype, values: &mut Array<5>| {
        let layout = arranged(dtype, values.shape, false);
        Loaded::new(h, name, settled(values, Tensor::new(layout, POISON)))
    };
    let mut loaded = Vec::new();
    for (part, dtype) in parts.iter_mut().zip(case.part_dtypes) {
        loaded.push([input("a part's o", dtype, &mut part.o)?, input("a part's lse", Dtype::F32, &mut part.lse)?]);
    }
    let d_o = input("d_o", case.out_dtype, &mut upstream.d_o)?;
    let d_lse = upstream.d_lse.as_mut().map(|d_lse| input("d_lse", Dtype::F32, d_lse)).transpose()?;
    let mut outputs = Vec::new();
    for [d_o, d_lse] in GRADIENTS {
        let of_o = Loaded::output(h, d_o, arranged(case.out_dtype, sizes, true))?;
        outputs.push([of_o, Loaded::output(h, d_lse, arranged(Dtype::F32, per_row, true))?]);
    }
    let mut scratch = Region::scratch(h, &plan)?;
    h.run(&mut |queue| {
        let part = |i: usize| Partial { o: loaded[i][0].view(), lse: loaded[i][1].view() };
        let mut gradients = outputs.iter_mut().map(|[o, lse]| PartialGradients { d_o: o.view_mut(), d_lse: lse.view_mut() });
        let (Some(a), Some(b)) = (gradients.next(), gradients.next()) else { return Ok(()) };
        let mut args = MergeBackward::new([part(0), part(1)], d_o.view(), [a, b]);
        if let Some(d_lse) = &d_lse {
            args = args.d_lse(d_lse.view());
        }
        h.backend().merge_backward(&plan, queue, args, scratch.mem_mut())
    })?;
    loaded.iter().flatten().chain([&d_o]).chain(&d_lse).try_for_each(|input| input.check(h))?;
    scratch.check(h)?;
    let mut got = [(); 2].map(|()| [(); 2].map(|()| Array::zeros([0; 5])));
    for (got, outputs) in got.iter_mut().flatten().zip(outputs.into_iter().flatten()) {
        *got = read(h, outputs)?;
    }
    Ok(got)
}

/// One row of both parts against the reference.
fn check(
    checker: &mut Checker<'_>,
    at @ [n, i, r, h]: [usize; 4],
    got: &[[Array<5>; 2]; 2],
    parts: &[Part; 2],
    upstream: &Upstream,
) -> Result<()> {
    let [(o_a, lse_a), (o_b, lse_b)] = [0, 1].map(|i| (parts[i].o.row(&at), parts[i].lse.row(&at)[0]));
    let (d_o, d_lse) = (upstream.d_o.row(&at), upstream.d_lse.as_ref().map_or(0.0, |d_lse| d_lse.row(&at)[0]));
    let expected = fam_ref::merge_backward(o_a, lse_a, o_b, lse_b, d_o, d_lse)?;
    let is_empty = |lse: f64| lse == f64::NEG_INFINITY;
    // An empty part's o is not looked at, nor anything of two empty parts.
    let is_finite = |o: &[f64], lse: f64| is_empty(lse) || (lse.is_finite() && o.iter().all(|x| x.is_finite()));
    let is_finite = is_finite(o_a, lse_a) && is_finite(o_b, lse_b);
    let (_, lse) = fam_ref::merge(o_a, lse_a, o_b, lse_b)?;
    let weight = |part: f64| if is_empty(part) { 0.0 } else { (part - lse).exp() };
    let [p_a, p_b] = [lse_a, lse_b].map(weight);
    let difference = if is_empty(lse_a) || is_empty(lse_b) { 0.0 } else { (lse_a - lse_b).abs() };
    let level = Level::Hard;
    // d_o·(o_a − o_b), weighed with the other part's p; 0 beside an empty part.
    let apart: f64 = match p_a * p_b > 0.0 {
        true => o_a.iter().zip(o_b).zip(d_o).map(|((a, b), d_o)| (d_o * (a - b)).abs()).sum(),
        false => 0.0,
    };
    for (part, (p, other)) in [(p_a, p_b), (p_b, p_a)].into_iter().enumerate() {
        // As in a merge: the smaller weight has the error, and the division moves weight by the product of both.
        let shift = U32 * ((3.0 * difference + 6.0) * p * other + 4.0 * p) + LEAST;
        let other_shift = U32 * ((3.0 * difference + 6.0) * p * other + 4.0 * other) + LEAST;
        let lse_of_part = [lse_a, lse_b][part];
        let rule = |sum: Sum, dtype: Dtype, expected: f64| match is_empty(lse_of_part) {
            true => Rule::Zero,
            false if !is_finite => Rule::Any,
            false => sum.rule(level, dtype, 0.0, expected),
        };
        for (c, d_o) in d_o.iter().enumerate() {
            let mut sum = Sum::default();
            sum.add(p * d_o.abs(), 0.0, shift * d_o.abs());
            let (got, expected) = (got[part][0].row(&at)[c], expected[part].d_o[c]);
            let element = Element { tensor: GRADIENTS[part][0], index: [n, i, r, h, c] };
            checker.element(element, got, expected, rule(sum, checker.bound.out_dtype, expected), false, None);
        }
        let inner = other * apart + d_lse.abs();
        let inner_error = U32 * products(level, d_o.len()) * inner + other_shift * apart + LEAST * products(level, d_o.len());
        let mut sum = Sum::default();
        sum.add(p * inner, apart, within_f32(apart, (p + shift) * inner_error + shift * inner + LEAST));
        let (got, expected) = (got[part][1].row(&at)[0], expected[part].d_lse);
        let element = Element { tensor: GRADIENTS[part][1], index: [n, i, r, h, 0] };
        checker.element(element, got, expected, rule(sum, Dtype::F32, expected), false, None);
    }
    Ok(())
}
