//! Properties of gradients: which streams share a call changes no bit; what is asked in several calls adds up.

use super::{conclude, same_bits};
use crate::attend_backward::{bounds, check, launch};
use crate::case::{Case, Strides};
use crate::check::{Checker, Tally};
use crate::data::{Data, Role};
use crate::distribution::Distribution;
use crate::gradient::{Collected, Start};
use crate::gradient_bound::AttendBounds;
use crate::guard::POISON;
use crate::harness::Harness;
use crate::launch::Stop;
use crate::rng::{Rng, case_seed};
use crate::runner::Passed;
use crate::tolerance::Level;
use fam_core::{Dtype, Op, Span};
use fam_ref::Array;

/// The first generated case of `attend_backward` after `seed` that suits a property: finite, without rows that share memory, all gradients
/// asked for.
fn suitable(seed: u64, is_suitable: impl Fn(&Case) -> bool) -> Case {
    let cases = (0..).map(|i| Case::gradient(case_seed(seed, i)));
    let plain = cases.filter(|c| c.op == Op::AttendBackward && c.distribution != Distribution::NonFinite && !c.is_empty());
    let mut case = plain.filter(|c| is_suitable(c)).map(|case| Case {
        strides: if case.strides == Strides::Broadcast { Strides::Padded } else { case.strides },
        device_spans: false,
        mem_entries: case.mem_entries.max(case.blocks()),
        ..case
    });
    let mut case = case.next().expect("there is no end of cases");
    (case.gradients.keys, case.gradients.mem, case.gradients.sink) = (true, true, true);
    case
}

/// The gradients of a case from zeros on, and what they are held to.
fn gradients<H: Harness + ?Sized>(h: &H, case: &Case, data: &mut Data) -> Result<(Vec<Collected>, AttendBounds), Stop> {
    let limits = h.limits();
    let checker = Checker::new(Level::Hard, case.shape.dtype(), case.out_dtype, &limits);
    let bounds = bounds(case, data, &checker)?;
    let gradients = launch(h, case, data, &bounds, Start::Cleared, POISON)?;
    Ok((gradients, bounds))
}

/// Bitwise: order of streams and slots, solo or in a batch. `d_sink`, which all streams share, is another sum then.
pub(super) fn order<H: Harness + ?Sized>(h: &H, seed: u64) -> Result<Passed, Stop> {
    let base = suitable(seed, |c| c.batch() > 1);
    let mut data = Data::new(&base);
    let (whole, _) = gradients(h, &base, &mut data)?;
    let mut order: Vec<usize> = (0..base.batch()).collect();
    let mut slots: Vec<u32> = (0..base.slots as u32).collect();
    let mut rng = Rng::of(seed, "order of gradients");
    rng.shuffle(&mut order);
    rng.shuffle(&mut slots);
    let alone = (0..base.batch()).map(|n| vec![n]);
    for order in std::iter::once(order.clone()).chain(alone) {
        let spans = order.iter().map(|&n| Span { slot: slots[n], ..base.spans[n] }).collect();
        let case = Case { spans, ..base.clone() };
        let (other, _) = gradients(h, &case, &mut data.streams(&order))?;
        let own = |gradient: &&Collected| gradient.role() != Role::DSink;
        for (a, b) in whole.iter().filter(own).zip(other.iter().filter(own)) {
            let (role, a, b) = (a.role(), a.values(&base), b.values(&case));
            for (m, &n) in order.iter().enumerate() {
                // A shorter batch has shorter arrays: the rows that both have.
                if a.row(&[n]).iter().zip(b.row(&[m])).any(|(x, y)| x.to_bits() != y.to_bits()) {
                    let what = format!("{base}: {} of stream {n} differs in order {order:?}, slots {slots:?}", role.name());
                    return Err(Stop::Failed(what));
                }
            }
        }
    }
    Ok(Passed::default())
}

/// Both row groups in one call, and each in its own: the gradients that they share add up, the others have the same bits.
pub(super) fn row_groups<H: Harness + ?Sized>(h: &H, seed: u64) -> Result<Passed, Stop> {
    let both = suitable(seed, |c| c.rows && c.mem_rows);
    let mut data = Data::new(&both);
    let (whole, bounds) = gradients(h, &both, &mut data)?;
    let (rows, _) = gradients(h, &Case { mem_rows: false, ..both.clone() }, &mut data.clone())?;
    let (mem_rows, _) = gradients(h, &Case { rows: false, ..both.clone() }, &mut data)?;
    let of = |gradients: &[Collected], role| gradients.iter().find(|g| g.role() == role).map(|g| g.values(&both));
    for (part, role) in [(&rows, Role::DQ), (&mem_rows, Role::DMemQ)] {
        same_bits(&format!("{both}: {}", role.name()), of(&whole, role).iter(), of(part, role).iter())?;
    }
    sums_within(h, &both, &whole, &[(&both, rows), (&both, mem_rows)], &bounds)
}

/// A whole prefill, and the same tokens block by block: what each call adds to keys is in the end the same.
pub(super) fn blocks<H: Harness + ?Sized>(h: &H, seed: u64) -> Result<Passed, Stop> {
    let mut base = suitable(seed, |c| c.rows && c.batch() == 1 && c.blocks() > 1);
    base.mem_rows = false;
    let mut data = Data::new(&base);
    let (whole, bounds) = gradients(h, &base, &mut data)?;
    let (span, b) = (base.spans[0], base.shape.block_len() as u64);
    let mut parts = Vec::new();
    let cases: Vec<Case> = (0..base.blocks() as u64)
        .map(|i| {
            let start = ((span.start / b + i) * b).max(span.start);
            let end = ((span.start / b + i + 1) * b).min(span.end());
            let mem_entry = span.mem_entry + i as u32;
            Case { spans: vec![Span { start, len: (end - start) as u32, mem_entry, ..span }], ..base.clone() }
        })
        .collect();
    for (i, case) in cases.iter().enumerate() {
        let mut data = data.seen_by(&base, case);
        for role in [Role::Q, Role::DO, Role::DLse] {
            let row = (case.spans[0].start - span.start) as usize;
            data.set(role, rows(data.get(role), row..row + case.spans[0].len as usize));
        }
        for role in [Role::MemK, Role::MemV] {
            let [_, _, f, heads, d] = data.get(role).shape;
            let values = data.get(role).row(&[0, i]).to_vec();
            data.set(role, Array { shape: [1, 1, f, heads, d], data: values });
        }
        parts.push((case, gradients(h, case, &mut data)?.0));
    }
    sums_within(h, &base, &whole, &parts, &bounds)
}

/// The rows of a stream's tensor.
fn rows(values: &Array<5>, rows: std::ops::Range<usize>) -> Array<5> {
    let [_, _, _, heads, d] = values.shape;
    let data = rows.clone().flat_map(|r| values.row(&[0, 0, r])).copied().collect();
    Array { shape: [1, 1, rows.len(), heads, d], data }
}

/// Holds the sum of what several calls added against what one call did: both are within the bound of one.
fn sums_within<H: Harness + ?Sized>(
    h: &H,
    case: &Case,
    whole: &[Collected],
    parts: &[(&Case, Vec<Collected>)],
    bounds: &AttendBounds,
) -> Result<Passed, Stop> {
    let limits = h.limits();
    let mut checker = Checker::new(Level::Hard, case.shape.dtype(), Dtype::F32, &limits);
    let shared: Vec<Collected> = whole
        .iter()
        .filter(|gradient| !matches!(gradient.role(), Role::DQ | Role::DMemQ))
        .map(|gradient| {
            let of_parts = parts.iter().flat_map(|(_, part)| part).filter(|part| part.role() == gradient.role());
            gradient.replaced_by_sum(of_parts)
        })
        .collect();
    check(&shared, bounds, &mut checker);
    let tally: Tally = checker.tally;
    conclude(case, tally)
}
