//! Cases of `infini_read`: the compressive memory gated into a local attention that was computed elsewhere.

use crate::attend::Reads;
use crate::case::Case;
use crate::check::{Checker, Element};
use crate::data::{Data, Role};
use crate::guard::POISON;
use crate::harness::Harness;
use crate::launch::{Loaded, LoadedSpans, Region, Stop, digest, plan};
use crate::runner::{Passed, conclude};
use crate::tolerance::Level;
use fam_core::{Backend, InfiniRead, InfiniState};

/// Runs one case.
pub(crate) fn run<H: Harness + ?Sized>(h: &H, case: &Case, level: Level) -> Result<Passed, Stop> {
    let data = Data::new(case);
    let plan = plan(h, &case.spec()?)?;
    let input = |role| Loaded::input(h, case, &data, role, POISON);
    let (q, m, z, beta) = (input(Role::InfiniQ)?, input(Role::M)?, input(Role::Z)?, input(Role::Beta)?);
    let o_local = input(Role::OLocal)?;
    let mut o = Loaded::result(h, case, Role::O)?;
    let spans = LoadedSpans::new(h, case)?;
    let mut scratch = Region::scratch(h, &plan)?;
    h.run(&mut |queue| {
        let state = InfiniState { q: q.view(), m: m.view(), z: z.view(), beta: beta.view() };
        let args = InfiniRead::new(spans.spans(), state, o_local.view(), o.view_mut());
        h.backend().infini_read(&plan, queue, args, scratch.mem_mut())
    })?;
    [&q, &m, &z, &beta, &o_local].into_iter().try_for_each(|input| input.check(h))?;
    spans.check(h)?;
    scratch.check(h)?;
    let got = o.values(h, case, Role::O)?;

    let limits = h.limits();
    let mut checker = Checker::new(level, case.shape.dtype(), case.out_dtype, &limits);
    let reads = Reads::new(case, &data);
    for place in case.places(Role::O) {
        let [n, _, r] = place.value;
        for head in 0..case.shape.heads() {
            let at = [n, 0, r, head];
            let (read, local) = (reads.row(at, &limits)?, data.get(Role::OLocal).row(&at));
            for (c, &got) in got.row(&at).iter().enumerate() {
                let (expected, rule) = read.gate(c, &checker.bound, [local[c], 0.0], local[c].abs());
                checker.element(Element { tensor: "o", index: [n, 0, r, head, c] }, got, expected, rule, read.may_be_nan, None);
            }
        }
    }
    conclude(case, checker, digest([&got].into_iter()))
}
