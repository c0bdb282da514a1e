//! Running a case file on a backend, in the three ways that the contract serves with one rule.

use crate::casefile::{CaseFile, InfiniCase, Tensor};
use crate::check::Worst;
use crate::harness::{Harness, Mem, Owned};
use crate::judge::Reference;
use crate::launch::{Stop, plan};
use crate::runner::{Outcome, Passed, caught};
use fam_core::{
    Attend, Backend, Device, Dtype, InfiniState, InfiniWrite, Keys, Layout, Op, Plan, Result, Rows, Span, Spans, Spec, Step,
    StepInfini, Streams, View, ViewMut,
};
use std::borrow::{Borrow, BorrowMut};
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

/// How a case is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Block by block through [`Streams`]: both row groups of a block in one call.
    Step,
    /// All rows of all blocks in one call of `attend`, over linear caches.
    Prefill,
    /// Token by token through [`Streams`]; memory rows in the call that completes a block, or the stream.
    Decode,
}

impl Mode {
    /// Every mode.
    pub const ALL: [Mode; 3] = [Mode::Step, Mode::Prefill, Mode::Decode];

    /// The name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Mode::Step => "step",
            Mode::Prefill => "prefill",
            Mode::Decode => "decode",
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A case's tensors in device memory, and its outputs.
pub(crate) struct Loaded<H: Harness + ?Sized> {
    pub q: Owned<H>,
    pub k: Owned<H>,
    pub v: Owned<H>,
    pub mem_q: Option<(Owned<H>, Layout)>,
    pub mem: Option<(Owned<H>, Layout, Owned<H>, Layout)>,
    pub sink: Option<Owned<H>>,
    /// Un-rotated q and k where they are not q and k, and beta.
    pub infini: Option<LoadedInfini<Owned<H>>>,
    /// Outputs by name, zeroed.
    outputs: Outputs<H>,
}

/// `infini_q`, `infini_k`, `beta`.
type LoadedInfini<T> = (Option<T>, Option<T>, T);

struct Outputs<H: Harness + ?Sized> {
    o: Owned<H>,
    lse: Owned<H>,
    mem_o: Owned<H>,
    mem_lse: Owned<H>,
}

/// Layouts of the case's packed tensors.
pub(crate) struct Layouts {
    pub q: Layout,
    pub kv: Layout,
    lse: Layout,
    mem_o: Layout,
    mem_lse: Layout,
    pub per_head: Layout,
}

impl Layouts {
    pub fn new(case: &CaseFile) -> Self {
        let s = &case.shape;
        let (n, l, nb, f, h, d) = (case.batch, case.tokens, case.blocks(), s.mem_len(), s.heads(), s.head_dim());
        Layouts {
            q: Layout::tokens(s.dtype(), [n, l, h, d]),
            kv: Layout::tokens(s.dtype(), [n, l, s.kv_heads(), d]),
            lse: Layout::tokens(Dtype::F32, [n, l, h, 1]),
            mem_o: Layout::packed(s.dtype(), [n, nb, f, h, d]),
            mem_lse: Layout::packed(Dtype::F32, [n, nb, f, h, 1]),
            per_head: Layout::per_head(h),
        }
    }
}

/// A part of a packed tensor: some streams, and tokens of `[batch, 1, tokens, ..]` or one block of `[batch, blocks, ..]`.
pub(crate) fn part(mut layout: Layout, streams: &Range<usize>, block: usize, tokens: Option<Range<usize>>) -> Layout {
    layout.offset += streams.start * layout.stride[0] + block * layout.stride[1];
    (layout.shape[0], layout.shape[1]) = (streams.len(), 1);
    if let Some(tokens) = tokens {
        layout.offset += tokens.start * layout.stride[2];
        layout.shape[2] = tokens.len();
    }
    layout
}

/// The layout of memory rows whose first two axes may be 1: shared by all streams, or all blocks.
fn shared(case: &CaseFile, tensor: &Tensor) -> Layout {
    let sizes: [usize; 5] = std::array::from_fn(|axis| tensor.shape[axis]);
    let mut layout = Layout::packed(tensor.dtype, sizes);
    for (axis, size) in [case.batch, case.blocks()].into_iter().enumerate() {
        if sizes[axis] == 1 {
            (layout.shape[axis], layout.stride[axis]) = (size, 0);
        }
    }
    layout
}

pub(crate) fn bytes(layout: &Layout) -> u64 {
    layout.end_bytes().unwrap_or(u64::MAX)
}

impl<H: Harness + ?Sized> Loaded<H> {
    /// Uploads the case.
    pub fn new(h: &H, case: &CaseFile) -> Result<Self> {
        let layouts = Layouts::new(case);
        let up = |t: &Tensor| h.upload(&t.data);
        let maybe = |t: &Option<Tensor>| t.as_ref().map(up).transpose();
        let alloc = |layout: &Layout| h.backend().alloc(bytes(layout));
        let infini = |i: &InfiniCase| Ok::<_, fam_core::Error>((maybe(&i.q)?, maybe(&i.k)?, up(&i.beta)?));
        Ok(Loaded {
            q: up(&case.q)?,
            k: up(&case.k)?,
            v: up(&case.v)?,
            mem_q: case.mem_q.as_ref().map(|t| Ok::<_, fam_core::Error>((up(t)?, shared(case, t)))).transpose()?,
            mem: match &case.mem {
                Some((k, v)) => Some((up(k)?, shared(case, k), up(v)?, shared(case, v))),
                None => None,
            },
            sink: maybe(&case.sink)?,
            infini: case.infini.as_ref().map(infini).transpose()?,
            outputs: Outputs {
                o: alloc(&layouts.q)?,
                lse: alloc(&layouts.lse)?,
                mem_o: alloc(&layouts.mem_o)?,
                mem_lse: alloc(&layouts.mem_lse)?,
            },
        })
    }
}

/// Runs the case and returns its outputs: `o` and `mem_o` in the case's dtype, the rest in f32. Rows past a stream's length are 0.
///
/// # Errors
/// Those of planning, of the ops and of the device.
pub fn replay<H: Harness + ?Sized>(h: &H, case: &CaseFile, mode: Mode) -> Result<BTreeMap<String, Tensor>>
where
    H::Backend: Clone,
{
    let mut loaded = Loaded::new(h, case)?;
    let state = match mode {
        _ if case.batch == 0 || case.tokens == 0 => None,
        Mode::Prefill => prefill(h, case, &mut loaded)?,
        Mode::Step | Mode::Decode => stream(h, case, &mut loaded, mode)?,
    };
    let mut outputs = BTreeMap::new();
    let mut output = |name: &str, dtype: Dtype, data: Vec<u8>| {
        outputs.insert(name.to_string(), Tensor { dtype, shape: case.output_shape(name), data });
    };
    let layouts = Layouts::new(case);
    let down = |owned: &Owned<H>, layout: &Layout| h.download(owned, bytes(layout) as usize);
    output("o", case.shape.dtype(), down(&loaded.outputs.o, &layouts.q)?);
    output("lse", Dtype::F32, down(&loaded.outputs.lse, &layouts.lse)?);
    if case.mem_q.is_some() {
        output("mem_o", case.shape.dtype(), down(&loaded.outputs.mem_o, &layouts.mem_o)?);
        output("mem_lse", Dtype::F32, down(&loaded.outputs.mem_lse, &layouts.mem_lse)?);
    }
    if let Some((m, z)) = state {
        output("m", Dtype::F32, m);
        output("z", Dtype::F32, z);
    }
    Ok(outputs)
}

/// What a backend must plan to run the case in a mode.
///
/// # Errors
/// None for a case that was read or generated.
pub(crate) fn spec(case: &CaseFile, mode: Mode) -> Result<Spec> {
    let shape = &case.shape;
    let block = shape.block_len().min(case.tokens);
    match mode {
        Mode::Prefill => {
            let ops: &[Op] = if case.infini.is_some() { &[Op::Attend, Op::InfiniWrite] } else { &[Op::Attend] };
            shape.spec(case.batch, case.tokens).blocks(case.blocks()).ops(ops).build()
        }
        Mode::Step => shape.spec(case.batch, block).build(),
        Mode::Decode => shape.spec(case.batch, block.min(1)).build(),
    }
}

/// Replays a case in a mode and holds the outputs against the reference, and against what the file expects. Skipped where the backend
/// serves no plan for it.
pub fn run_file<H: Harness + ?Sized>(h: &H, case: &CaseFile, mode: Mode) -> Outcome
where
    H::Backend: Clone,
{
    caught(|| right(h, case, mode))
}

pub(crate) fn right<H: Harness + ?Sized>(h: &H, case: &CaseFile, mode: Mode) -> Result<Passed, Stop>
where
    H::Backend: Clone,
{
    let outputs = planned(h, case, mode)?;
    let verdict = Reference::new(case)?.judge(case, &outputs, &h.limits());
    match verdict.wrong {
        Some((wrong, edges)) => Err(Stop::Failed(format!("{} as {mode}: {wrong} ({edges})", case.source))),
        None => {
            let larger = |a: Worst, b: Worst| if a.ratio < b.ratio { b } else { a };
            let (compared, vacuous) = (verdict.compared, verdict.vacuous);
            Ok(Passed { compared, vacuous, worst: verdict.worst.into_values().reduce(larger), ..Passed::default() })
        }
    }
}

/// [`replay`], skipped where the backend says when it plans that it does not serve the case.
pub(crate) fn planned<H: Harness + ?Sized>(h: &H, case: &CaseFile, mode: Mode) -> Result<BTreeMap<String, Tensor>, Stop>
where
    H::Backend: Clone,
{
    plan(h, &spec(case, mode)?)?;
    Ok(replay(h, case, mode)?)
}

/// Bytes of `m` and `z` of all streams.
type State = (Vec<u8>, Vec<u8>);

fn prefill<H: Harness + ?Sized>(h: &H, case: &CaseFile, loaded: &mut Loaded<H>) -> Result<Option<State>> {
    let (backend, shape, layouts) = (h.backend(), &case.shape, Layouts::new(case));
    let (nb, kv, d) = (case.blocks(), shape.kv_heads(), shape.head_dim());
    let plan = backend.plan(&spec(case, Mode::Prefill)?)?;
    let mut scratch = backend.alloc(plan.support().scratch_bytes)?;
    let spans: Vec<Span> = (0..case.batch)
        .map(|n| {
            let mem_rows = if case.mem.is_some() { shape.mem_len() } else { 0 };
            let span = Span::new(n as u32, case.start[n], case.lengths[n] as u32).with_origin(case.start[n]);
            span.with_mem_rows(mem_rows as u32)
        })
        .collect();
    let spans = Spans::Host(&spans);
    // One entry of m and z for each segment, and one for what comes after the last.
    let (m_layout, z_layout) = (Layout::infini_m(case.batch, nb + 1, kv, d), Layout::infini_z(case.batch, nb + 1, kv, d));
    let mut state = None;
    if let Some(infini) = &case.infini {
        let (mut m, mut z) = (backend.alloc(bytes(&m_layout))?, backend.alloc(bytes(&z_layout))?);
        for (owned, layout, initial) in [(&mut m, &m_layout, &infini.m0), (&mut z, &z_layout, &infini.z0)] {
            let Some(initial) = initial else { continue };
            for (n, entry) in initial.data.chunks_exact(initial.data.len() / case.batch).enumerate() {
                backend.upload(owned.borrow_mut(), (n * layout.stride[0] * 4) as u64, entry)?;
            }
        }
        state = Some((m, z));
    }

    h.run(&mut |queue| {
        let Loaded { q, k, v, mem_q, mem, sink, infini, outputs } = &mut *loaded;
        if let (Some((_, infini_k, _)), Some((m, z))) = (&*infini, &mut state) {
            let keys = infini_k.as_ref().unwrap_or(k);
            let keys = Keys::Strided { k: View::new(keys.borrow(), layouts.kv), v: View::new((*v).borrow(), layouts.kv) };
            let (m, z) = (ViewMut::new(m.borrow_mut(), m_layout), ViewMut::new(z.borrow_mut(), z_layout));
            backend.infini_write(&plan, queue, InfiniWrite::new(spans, keys, m, z), scratch.borrow_mut())?;
        }
        let q_view = View::new((*q).borrow(), layouts.q);
        let keys = Keys::Strided { k: View::new((*k).borrow(), layouts.kv), v: View::new((*v).borrow(), layouts.kv) };
        let rows = Rows::new(q_view, ViewMut::new(outputs.o.borrow_mut(), layouts.q));
        let mut args = Attend::new(spans, keys).rows(rows.lse(ViewMut::new(outputs.lse.borrow_mut(), layouts.lse)));
        if let Some((mem_q, layout)) = mem_q {
            let rows = Rows::new(View::new((*mem_q).borrow(), *layout), ViewMut::new(outputs.mem_o.borrow_mut(), layouts.mem_o));
            args = args.mem_rows(rows.lse(ViewMut::new(outputs.mem_lse.borrow_mut(), layouts.mem_lse)));
        }
        if let Some((k, k_layout, v, v_layout)) = mem {
            args = args.mem(View::new((*k).borrow(), *k_layout), View::new((*v).borrow(), *v_layout));
        }
        if let Some(sink) = sink {
            args = args.sink(View::new((*sink).borrow(), layouts.per_head));
        }
        if let (Some((infini_q, _, beta)), Some((m, z))) = (&*infini, &state) {
            let q = infini_q.as_ref().map_or(q_view, |q| View::new(q.borrow(), layouts.q));
            let (m, z) = (View::new(m.borrow(), m_layout), View::new(z.borrow(), z_layout));
            args = args.infini(InfiniState { q, m, z, beta: View::new(beta.borrow(), layouts.per_head) });
        }
        backend.attend(&plan, queue, args, scratch.borrow_mut())
    })?;

    let Some((m, z)) = state else { return Ok(None) };
    let mut bytes = (Vec::new(), Vec::new());
    for n in 0..case.batch {
        let b = shape.block_len() as u64;
        let written = ((case.start[n] + case.lengths[n]) / b - case.start[n] / b) as usize;
        for (owned, layout, out) in [(&m, &m_layout, &mut bytes.0), (&z, &z_layout, &mut bytes.1)] {
            let offset = n * layout.stride[0] + written * layout.stride[1];
            download(h, owned.borrow(), offset, layout.stride[1], out)?;
        }
    }
    Ok(Some(bytes))
}

/// Appends `elements` f32 from element `offset` on to `out`.
pub(crate) fn download<H: Harness + ?Sized>(
    h: &H,
    mem: &Mem<H>,
    offset: usize,
    elements: usize,
    out: &mut Vec<u8>,
) -> Result<()> {
    let start = out.len();
    out.resize(start + 4 * elements, 0);
    h.backend().download(mem, 4 * offset as u64, &mut out[start..])
}

/// Through [`Streams`]: a block in a call, or a token.
fn stream<H: Harness + ?Sized>(h: &H, case: &CaseFile, loaded: &mut Loaded<H>, mode: Mode) -> Result<Option<State>>
where
    H::Backend: Clone,
{
    let (backend, shape, layouts) = (h.backend(), &case.shape, Layouts::new(case));
    let b = shape.block_len();
    let most = if mode == Mode::Decode { 1 } else { b };
    let plan = backend.plan(&spec(case, mode)?)?;
    let mut scratch = backend.alloc(plan.support().scratch_bytes)?;
    let mut streams = Streams::new(backend.clone(), &plan)?;
    h.run(&mut |queue| (0..case.batch).try_for_each(|n| streams.reset(queue, n as u32, case.start[n])))?;
    if let Some(infini) = &case.infini {
        for n in 0..case.batch {
            let [m, z] = streams.infini_state(n as u32)?;
            for (view, initial) in [(m, &infini.m0), (z, &infini.z0)] {
                let Some(initial) = initial else { continue };
                let size = initial.data.len() / case.batch;
                backend.upload(view.mem, 4 * view.layout.offset as u64, &initial.data[n * size..(n + 1) * size])?;
            }
        }
    }

    // Streams that go in step share their calls; otherwise each goes alone.
    let in_step =
        (1..case.batch).all(|n| case.lengths[n] == case.lengths[0] && case.start[n] % b as u64 == case.start[0] % b as u64);
    let groups: Vec<Range<usize>> =
        if in_step { std::iter::once(0..case.batch).collect() } else { (0..case.batch).map(|n| n..n + 1).collect() };
    for group in groups {
        let slots: Vec<u32> = group.clone().map(|n| n as u32).collect();
        let (into, length) = ((case.start[group.start] % b as u64) as usize, case.lengths[group.start] as usize);
        let mut first = 0;
        while first < length {
            let (block, in_block) = ((into + first) / b, (into + first) % b);
            let tokens = first..(first + most.min(b - in_block)).min(length);
            let is_last = in_block + tokens.len() == b || tokens.end == length;
            h.run(&mut |queue| {
                let Loaded { q, k, v, mem_q, mem, sink, infini, outputs } = &mut *loaded;
                if first == 0 || in_block == 0 {
                    match mem {
                        Some((k, k_layout, v, v_layout)) => {
                            let k = View::new((*k).borrow(), part(*k_layout, &group, block, None));
                            let v = View::new((*v).borrow(), part(*v_layout, &group, block, None));
                            streams.set_memory(&plan, queue, &slots, k, v, scratch.borrow_mut())?;
                        }
                        None => streams.keep_memory(&slots)?,
                    }
                }
                let cut = |layout| part(layout, &group, 0, Some(tokens.clone()));
                let (kv, q_view) = (cut(layouts.kv), View::new((*q).borrow(), cut(layouts.q)));
                let mut step = Step::new(&slots, View::new((*k).borrow(), kv), View::new((*v).borrow(), kv));
                let rows = Rows::new(q_view, ViewMut::new(outputs.o.borrow_mut(), cut(layouts.q)));
                step = step.rows(rows.lse(ViewMut::new(outputs.lse.borrow_mut(), cut(layouts.lse))));
                if let (Some((mem_q, layout)), true) = (mem_q, is_last) {
                    let q = View::new((*mem_q).borrow(), part(*layout, &group, block, None));
                    let o = ViewMut::new(outputs.mem_o.borrow_mut(), part(layouts.mem_o, &group, block, None));
                    let lse = ViewMut::new(outputs.mem_lse.borrow_mut(), part(layouts.mem_lse, &group, block, None));
                    step = step.mem_rows(Rows::new(q, o).lse(lse));
                }
                if let Some(sink) = sink {
                    step = step.sink(View::new((*sink).borrow(), layouts.per_head));
                }
                if let Some((infini_q, infini_k, beta)) = &*infini {
                    let q = infini_q.as_ref().map_or(q_view, |q| View::new(q.borrow(), cut(layouts.q)));
                    let k = View::new(infini_k.as_ref().unwrap_or(k).borrow(), kv);
                    step = step.infini(StepInfini { q, k, beta: View::new(beta.borrow(), layouts.per_head) });
                }
                streams.step(&plan, queue, step, scratch.borrow_mut())?.commit();
                Ok(())
            })?;
            first = tokens.end;
        }
    }

    if case.infini.is_none() {
        return Ok(None);
    }
    let mut bytes = (Vec::new(), Vec::new());
    for n in 0..case.batch {
        let [m, z] = streams.infini_state(n as u32)?;
        for (view, out) in [(m, &mut bytes.0), (z, &mut bytes.1)] {
            let elements = view.layout.elements().unwrap_or(0) as usize;
            download(h, view.mem, view.layout.offset, elements, out)?;
        }
    }
    Ok(Some(bytes))
}
