//! Cases of `infini_read`: the compressive memory gated into a local attention that was computed elsewhere.

use crate::attend::Reads;
use crate::case::Case;
use crate::check::{Checker, Element};
use crate::data::{Data, Role};
use crate::guard::POISON;
use crate::harness::Harness;
use crate::launch::{Loaded, LoadedSpans, Stop, digest, plan};
use crate::runner::{Passed, conclude};
use crate::tolerance::{Level, NanReach, infini_read};
use fam_core::{Backend, InfiniRead, InfiniState, Plan};
use std::borrow::BorrowMut;

/// Runs one case.
pub(crate) fn run<H: Harness + ?Sized>(h: &H, case: &Case, level: Level) -> Result<Passed, Stop> {
    let data = Data::new(case);
    let plan = plan(h, &case.spec()?)?;
    let input = |role| Loaded::input(h, case, &data, role, POISON);
    let (q, m, z, beta) = (input(Role::InfiniQ)?, input(Role::M)?, input(Role::Z)?, input(Role::Beta)?);
    let o_local = input(Role::OLocal)?;
    let mut o = Loaded::output(h, case.layout(Role::O))?;
    let spans = LoadedSpans::new(h, case)?;
    let mut scratch = h.poisoned(plan.support().scratch_bytes)?;
    h.run(&mut |queue| {
        let state = InfiniState { q: q.view(), m: m.view(), z: z.view(), beta: beta.view() };
        let args = InfiniRead::new(spans.spans(), state, o_local.view(), o.view_mut());
        h.backend().infini_read(&plan, queue, args, scratch.borrow_mut())
    })?;
    let got = o.values(h, case, Role::O, "o")?;

    let limits = h.limits();
    let mut checker = Checker::new(level, case.shape.dtype(), case.out_dtype, &limits);
    let reads = Reads::new(case, &data);
    let b = case.shape.block_len() as u64;
    for place in case.places(Role::O) {
        let [n, _, r] = place.value;
        let start = case.spans[n].start;
        let block = ((start + r as u64) / b - start / b) as usize;
        for head in 0..case.shape.heads() {
            let retrieved = reads.row([n, block, r, head])?;
            let g = fam_ref::gate(reads.beta[head]);
            let local = data.get(Role::OLocal).row(&[n, 0, r, head]);
            for (c, &got) in got.row(&[n, 0, r, head]).iter().enumerate() {
                let a = retrieved.a[c];
                let expected = g * a + (1.0 - g) * local[c];
                if !expected.is_finite() && limits.nan == NanReach::Unspecified {
                    continue;
                }
                let bound = checker.bound.gated(g, [a, infini_read(local.len(), retrieved.magnitude[c], a)], [local[c], 0.0]);
                checker.element(Element { tensor: "o", index: [n, 0, r, head, c] }, got, expected, bound);
            }
        }
    }
    conclude(case, checker, digest([&got].into_iter()))
}
