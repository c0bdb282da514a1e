//! Cases of `infini_write`: whole segments enter the compressive memory, each checked from the backend's own state before it.

use crate::case::Case;
use crate::check::{Checker, Element, Rule};
use crate::data::{Data, Place, Role};
use crate::guard::{POISON, Tensor};
use crate::harness::Harness;
use crate::launch::{Loaded, LoadedKeys, LoadedSpans, Region, Stop, digest, plan};
use crate::runner::{Passed, conclude};
use crate::tolerance::{Level, infini_write};
use fam_core::{Backend, InfiniRule, InfiniWrite, Result};
use fam_ref::Array;

/// Runs one case.
pub(crate) fn run<H: Harness + ?Sized>(h: &H, case: &Case, level: Level) -> Result<Passed, Stop> {
    let data = Data::new(case);
    let plan = plan(h, &case.spec()?)?;
    let keys = LoadedKeys::new(h, case, &data, &plan, POISON)?;
    let mut m = Loaded::new(h, "m", before(case, &data, Role::M))?;
    let mut z = Loaded::new(h, "z", before(case, &data, Role::Z))?;
    let spans = LoadedSpans::new(h, case)?;
    let mut scratch = Region::scratch(h, &plan)?;
    h.run(&mut |queue| {
        let args = InfiniWrite::new(spans.spans(), keys.keys(), m.view_mut(), z.view_mut());
        h.backend().infini_write(&plan, queue, args, scratch.mem_mut())
    })?;
    keys.check(h)?;
    spans.check(h)?;
    scratch.check(h)?;
    // Only the entries after completed segments are outputs; all others, poison included, keep their bits.
    let m = m.finish(h, written(case, case.shape.head_dim()).into_iter())?;
    let z = z.finish(h, written(case, 1).into_iter())?;

    let limits = h.limits();
    let mut checker = Checker::new(level, case.shape.dtype(), case.out_dtype, &limits);
    for n in 0..case.batch() {
        for i in 0..completed(case, n) {
            for head in 0..case.shape.kv_heads() {
                segment(case, &data, &mut checker, (&m, &z), [n, i, head])?;
            }
        }
    }
    let entries = |tensor: &Tensor, rows: usize| {
        let [_, _, _, heads, d] = tensor.layout.shape;
        let written = written(case, rows);
        let mut values = Array::zeros([1, 1, written.len(), heads, d]);
        for (row, [n, i, r]) in written.into_iter().enumerate() {
            for head in 0..heads {
                tensor.get([n, i, r, head], values.row_mut(&[0, 0, row, head]));
            }
        }
        values
    };
    conclude(case, checker, digest([entries(&m, case.shape.head_dim()), entries(&z, 1)].iter()))
}

/// Blocks of stream `n` that the call completes.
fn completed(case: &Case, n: usize) -> usize {
    let (span, b) = (&case.spans[n], case.shape.block_len() as u64);
    if span.len == 0 { 0 } else { (span.end() / b - span.start / b) as usize }
}

fn entry(case: &Case, n: usize, i: usize) -> usize {
    (case.spans[n].state_entry as usize + i) % case.state_entries
}

/// Rows of `m` or `z` that the call writes.
fn written(case: &Case, rows: usize) -> Vec<[usize; 3]> {
    (0..case.batch())
        .flat_map(|n| (0..completed(case, n)).map(move |i| (n, i)))
        .flat_map(|(n, i)| (0..rows).map(move |r| [case.spans[n].slot as usize, entry(case, n, i + 1), r]))
        .collect()
}

/// The state before the call: each stream's current entry, and poison in all others.
fn before(case: &Case, data: &Data, role: Role) -> Tensor {
    let mut tensor = Tensor::new(case.layout(role), POISON);
    let values = data.get(role);
    for Place { value: [n, i, r], tensor: [tn, ti, tr] } in case.places(role) {
        if i == 0 {
            for head in 0..case.shape.kv_heads() {
                tensor.put([tn, ti, tr, head], values.row(&[n, i, r, head]));
            }
        }
    }
    tensor
}

/// One segment of one stream and head, from the backend's own entry before it.
fn segment(
    case: &Case,
    data: &Data,
    checker: &mut Checker<'_>,
    (m, z): (&Tensor, &Tensor),
    [n, i, head]: [usize; 3],
) -> Result<()> {
    let (span, d, b) = (&case.spans[n], case.shape.head_dim(), case.shape.block_len() as u64);
    let slot = span.slot as usize;
    let read = |entry: usize| {
        let (mut of_m, mut of_z) = (vec![0.0; d * d], vec![0.0; d]);
        for (r, row) in of_m.chunks_exact_mut(d).enumerate() {
            m.get([slot, entry, r, head], row);
        }
        z.get([slot, entry, 0, head], &mut of_z);
        (of_m, of_z)
    };
    let ((m0, z0), (m1, z1)) = (read(entry(case, n, i)), read(entry(case, n, i + 1)));
    let at_m = |x: usize| Element { tensor: "m", index: [n, i, x / d, head, x % d] };
    let at_z = |x: usize| Element { tensor: "z", index: [n, i, 0, head, x] };

    let first = (span.start / b + i as u64) * b;
    if first < span.origin {
        // Never whole: passed over, its entry copied.
        m1.iter().zip(&m0).enumerate().for_each(|(x, (got, was))| checker.tally.exactly(at_m(x), *got, *was));
        z1.iter().zip(&z0).enumerate().for_each(|(x, (got, was))| checker.tally.exactly(at_z(x), *got, *was));
        return Ok(());
    }
    let rows = |role| -> Vec<&[f64]> {
        let row = (first - case.first_key(span)) as usize;
        (row..row + b as usize).map(|r| data.get(role).row(&[n, 0, r, head])).collect()
    };
    let rule = case.shape.infini().unwrap_or(InfiniRule::Linear);
    let expected = fam_ref::infini_write(rule, &rows(Role::K), &rows(Role::V), &m0, &z0)?;
    let [of_m, of_z] = infini_write(b as usize, &expected, checker.bound.flushed_result());
    for x in 0..d * d {
        checker.element(at_m(x), m1[x], expected.m[x], Rule::Near(of_m[x]), false, None);
    }
    for x in 0..d {
        checker.element(at_z(x), z1[x], expected.z[x], Rule::Near(of_z[x]), false, None);
    }
    Ok(())
}
