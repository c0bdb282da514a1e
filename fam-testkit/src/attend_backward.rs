//! Cases of `attend_backward`: gradients of one joint softmax, given what the forward pass has saved.

use crate::attend::inputs;
use crate::case::Case;
use crate::check::Checker;
use crate::data::{Data, Role};
use crate::distribution::round;
use crate::gradient::{Collected, Output, Start};
use crate::gradient_bound::{self, AttendBounds};
use crate::guard::POISON;
use crate::harness::{Harness, Mem};
use crate::launch::{Loaded, LoadedSpans, Region, Stop, digest, plan};
use crate::rows::Inputs;
use crate::runner::{Passed, conclude};
use crate::tolerance::{Level, Limits};
use fam_core::{AttendBackward, Backend, Dtype, Result, RowsBackward};
use fam_ref::{Array, AttendUpstream, Attended};

/// Runs one case.
pub(crate) fn run<H: Harness + ?Sized>(h: &H, case: &Case, level: Level) -> Result<Passed, Stop> {
    let (limits, mut data) = (h.limits(), Data::new(case));
    let (checker, values) = right(h, case, &mut data, Start::Random, level, &limits)?;
    conclude(case, checker, digest(values.iter()))
}

/// Runs a case and holds it against the reference.
pub(crate) fn right<'a, H: Harness + ?Sized>(
    h: &H,
    case: &Case,
    data: &mut Data,
    start: Start,
    level: Level,
    limits: &'a Limits,
) -> Result<(Checker<'a>, Vec<Array<5>>), Stop> {
    let mut checker = Checker::new(level, case.shape.dtype(), case.out_dtype, limits);
    let bounds = bounds(case, data, &checker)?;
    let gradients = launch(h, case, data, &bounds, start, POISON)?;
    check(&gradients, &bounds, &mut checker);
    Ok((checker, gradients.iter().map(|gradient| gradient.values(case)).collect()))
}

/// Computes what the forward pass saves, rounded to its types, into `data`, and the gradients of that with their bounds.
pub(crate) fn bounds(case: &Case, data: &mut Data, checker: &Checker<'_>) -> Result<AttendBounds> {
    let inputs = inputs(case, data);
    let mut attended = fam_ref::attend(&inputs.args())?;
    let groups = [(&mut attended.rows, Role::O, Role::Lse), (&mut attended.mem_rows, Role::MemO, Role::MemLse)];
    for (rows, o, lse) in groups {
        let Some(rows) = rows else { continue };
        rows.o.data.iter_mut().for_each(|x| *x = round(*x, case.out_dtype));
        rows.lse.data.iter_mut().for_each(|x| *x = round(*x, Dtype::F32));
        let [n, i, r, heads] = rows.lse.shape;
        data.set(o, rows.o.clone());
        data.set(lse, Array { shape: [n, i, r, heads, 1], data: rows.lse.data.clone() });
    }
    of_saved(case, data, &inputs, &attended, checker)
}

/// The gradients of what the forward pass has saved.
fn of_saved(case: &Case, data: &Data, inputs: &Inputs, saved: &Attended, checker: &Checker<'_>) -> Result<AttendBounds> {
    let per_row = |role| {
        let Array { shape: [n, i, r, heads, _], data } = data.get(role).clone();
        case.gradients.d_lse.then_some(Array { shape: [n, i, r, heads], data })
    };
    let (d_lse, d_mem_lse) = (per_row(Role::DLse), per_row(Role::DMemLse));
    let upstream = AttendUpstream {
        d_o: case.rows.then(|| data.get(Role::DO)),
        d_lse: d_lse.as_ref().filter(|_| case.rows),
        d_mem_o: case.mem_rows.then(|| data.get(Role::DMemO)),
        d_mem_lse: d_mem_lse.as_ref().filter(|_| case.mem_rows),
    };
    gradient_bound::attend(&inputs.args(), saved, &upstream, &checker.bound)
}

/// The tensors of one group of rows.
struct Group<H: Harness + ?Sized> {
    q: Loaded<H>,
    o: Loaded<H>,
    lse: Loaded<H>,
    d_o: Loaded<H>,
    d_lse: Option<Loaded<H>>,
    d_q: Output<H>,
}

impl<H: Harness + ?Sized> Group<H> {
    fn new(h: &H, case: &Case, data: &Data, [q, o, lse, d_o, d_lse, d_q]: [Role; 6], fill: u8) -> Result<Self, Stop> {
        let input = |role| Loaded::input(h, case, data, role, fill);
        Ok(Group {
            q: input(q)?,
            o: input(o)?,
            lse: input(lse)?,
            d_o: input(d_o)?,
            d_lse: case.gradients.d_lse.then(|| input(d_lse)).transpose()?,
            d_q: Output::written(h, case, d_q)?,
        })
    }

    fn rows(&mut self) -> RowsBackward<'_, Mem<H>> {
        let Group { q, o, lse, d_o, d_lse, d_q } = self;
        let rows = RowsBackward::new(q.view(), o.view(), lse.view(), d_o.view(), d_q.view_mut());
        match d_lse {
            Some(d_lse) => rows.d_lse(d_lse.view()),
            None => rows,
        }
    }

    fn check(&self, h: &H) -> Result<(), Stop> {
        [&self.q, &self.o, &self.lse, &self.d_o].into_iter().chain(&self.d_lse).try_for_each(|input| input.check(h))
    }
}

/// Runs the case on `data`, with `fill` in every byte that the call may not see.
pub(crate) fn launch<H: Harness + ?Sized>(
    h: &H,
    case: &Case,
    data: &Data,
    bounds: &AttendBounds,
    start: Start,
    fill: u8,
) -> Result<Vec<Collected>, Stop> {
    let plan = plan(h, &case.spec()?)?;
    let input = |role| Loaded::input(h, case, data, role, fill);
    let (k, v) = (input(Role::K)?, input(Role::V)?);
    let spans = LoadedSpans::new(h, case)?;
    let has_mem = case.shape.mem_len() > 0;
    let mem = has_mem.then(|| Ok::<_, Stop>([input(Role::MemK)?, input(Role::MemV)?])).transpose()?;
    let sink = case.sink.then(|| input(Role::Sink)).transpose()?;
    let group = |is_present: bool, roles| is_present.then(|| Group::new(h, case, data, roles, fill)).transpose();
    let mut rows = group(case.rows, [Role::Q, Role::O, Role::Lse, Role::DO, Role::DLse, Role::DQ])?;
    let mem_roles = [Role::MemQ, Role::MemO, Role::MemLse, Role::DMemO, Role::DMemLse, Role::DMemQ];
    let mut mem_rows = group(case.mem_rows, mem_roles)?;
    let pair = |[k, v]: [Role; 2], [of_k, of_v]: &[_; 2]| {
        Ok::<_, Stop>([Output::added(h, case, k, of_k, start)?, Output::added(h, case, v, of_v, start)?])
    };
    let wants = case.gradients;
    let mut d_keys = wants.keys.then(|| pair([Role::DK, Role::DV], &bounds.d_keys)).transpose()?;
    let d_mem = bounds.d_mem.as_ref().filter(|_| has_mem && wants.mem);
    let mut d_mem = d_mem.map(|of_mem| pair([Role::DMemK, Role::DMemV], of_mem)).transpose()?;
    let d_sink = bounds.d_sink.as_ref().filter(|_| wants.sink);
    let mut d_sink = d_sink.map(|of_sink| Output::added(h, case, Role::DSink, of_sink, start)).transpose()?;
    let mut scratch = Region::scratch(h, &plan)?;

    h.run(&mut |queue| {
        let mut args = AttendBackward::new(spans.spans(), k.view(), v.view());
        (args.rows, args.mem_rows) = (rows.as_mut().map(Group::rows), mem_rows.as_mut().map(Group::rows));
        if let Some([k, v]) = &mem {
            args = args.mem(k.view(), v.view());
        }
        if let Some(sink) = &sink {
            args = args.sink(sink.view());
        }
        if let Some([d_k, d_v]) = &mut d_keys {
            args = args.d_keys(d_k.view_mut(), d_v.view_mut());
        }
        if let Some([d_k, d_v]) = &mut d_mem {
            args = args.d_mem(d_k.view_mut(), d_v.view_mut());
        }
        if let Some(d_sink) = &mut d_sink {
            args = args.d_sink(d_sink.view_mut());
        }
        h.backend().attend_backward(&plan, queue, args, scratch.mem_mut())
    })?;

    spans.check(h)?;
    scratch.check(h)?;
    [&k, &v].into_iter().chain(mem.iter().flatten()).chain(&sink).try_for_each(|input| input.check(h))?;
    [&rows, &mem_rows].into_iter().flatten().try_for_each(|group| group.check(h))?;
    let outputs = [rows, mem_rows].into_iter().flatten().map(|group| group.d_q);
    let shared = d_keys.into_iter().chain(d_mem).flatten().chain(d_sink);
    outputs.chain(shared).map(|output| output.finish(h)).collect()
}

/// Holds a kernel's gradients against the reference's.
pub(crate) fn check(gradients: &[Collected], bounds: &AttendBounds, checker: &mut Checker<'_>) {
    let AttendBounds { d_q, d_mem_q, d_keys: [d_k, d_v], d_mem, d_sink } = bounds;
    let [d_mem_k, d_mem_v] = d_mem.as_ref().map_or([None; 2], |[k, v]| [Some(k), Some(v)]);
    for gradient in gradients {
        let bound = match gradient.role() {
            Role::DQ => d_q.as_ref(),
            Role::DMemQ => d_mem_q.as_ref(),
            Role::DK => Some(d_k),
            Role::DV => Some(d_v),
            Role::DMemK => d_mem_k,
            Role::DMemV => d_mem_v,
            _ => d_sink.as_ref(),
        };
        bound.into_iter().for_each(|bound| gradient.check(checker, bound, checker.bound.level));
    }
}
