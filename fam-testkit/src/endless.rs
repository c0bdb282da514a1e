//! A case's whole blocks as one endless stream: constant memory, results that repeat, and spot checks against the reference.

use crate::casefile::{CaseFile, Tensor};
use crate::harness::{Harness, Owned};
use crate::judge::{Reference, Verdict};
use crate::replay::{Layouts, Loaded, bytes, part};
use crate::rng::{Rng, hash};
use fam_core::{Backend, Device, Dtype, Error, Layout, Plan, Result, Rows, Step, StepInfini, Streams, View, ViewMut, Window};
use std::borrow::{Borrow, BorrowMut};
use std::collections::{BTreeMap, BTreeSet, HashMap, hash_map::Entry};

/// What an endless stream showed.
#[derive(Clone, Debug)]
pub struct Endless {
    /// Blocks processed, of each stream.
    pub blocks: u64,
    /// Blocks after which results must repeat bit for bit: the case's blocks times the ring's. `None` with a compressive memory, which
    /// never forgets.
    pub period: Option<u64>,
    /// Blocks compared with those one period before.
    pub repeated: u64,
    /// Blocks checked against the reference.
    pub checked: u64,
    /// Largest share of a bound that an error took there.
    pub worst: f64,
    /// The first thing that was wrong, in words. Without a block repeated or checked, nothing could be.
    pub wrong: Option<String>,
    /// Device memory that the streams' state takes.
    pub state_bytes: u64,
}

/// Runs `blocks` blocks of every stream of the case, looping its whole blocks (its starts are not looked at: the stream begins at 0), and
/// checks `samples` different random ones against the reference, or all if there are fewer. `progress` is told the blocks done. What the
/// check itself needs is allocated before the first block, so that memory which grows is the backend's.
///
/// # Errors
/// [`Error::Invalid`] for a case without a whole block; those of planning, of the ops and of the device.
pub fn endless<H: Harness + ?Sized>(
    h: &H,
    case: &CaseFile,
    blocks: u64,
    samples: u64,
    seed: u64,
    progress: &mut dyn FnMut(u64),
) -> Result<Endless>
where
    H::Backend: Clone,
{
    let (backend, shape) = (h.backend(), &case.shape);
    let (b, n) = (shape.block_len(), case.batch);
    let whole = case.lengths.iter().min().map_or(0, |&l| l / b as u64);
    if whole == 0 {
        return Err(Error::invalid("lengths", format!("{:?}", case.lengths), format!("at least a whole block of {b} tokens")));
    }
    let reach = match shape.window() {
        Window::Tokens(w) => w.saturating_sub(1).div_ceil(b),
        Window::Blocks(m) => m,
        other => return Err(Error::unsupported("window", format!("{other:?}"), "Blocks or Tokens")),
    } as u64;
    let plan = backend.plan(&shape.spec(n, b).build()?)?;
    let mut scratch = backend.alloc(plan.support().scratch_bytes)?;
    let mut streams = Streams::new(backend.clone(), &plan)?;
    let mut block = Block::new(h, case)?;
    let slots: Vec<u32> = (0..n as u32).collect();
    let period = case.infini.is_none().then(|| lcm(whole, (plan.spec().ring_rows() / b) as u64));
    let mut out =
        Endless { blocks, period, repeated: 0, checked: 0, worst: 0.0, wrong: None, state_bytes: streams.state_bytes() };
    let spots = spots(blocks, samples, seed);
    // A block sees as far back as the window reaches, or the stream.
    let first = |t: u64| t - reach.min(t);
    let window = |t: u64, state| window_case(case, first(t), (t - first(t)) as usize + 1, whole, state);
    // Without a compressive memory the problem is the same whenever the block comes round.
    let problem = |t: u64| (t.min(reach), t % whole);
    let mut references: HashMap<(u64, u64), (CaseFile, Reference)> = HashMap::new();
    for &t in spots.iter().filter(|_| case.infini.is_none()) {
        if let Entry::Vacant(new) = references.entry(problem(t)) {
            let sub = window(t, None);
            let reference = Reference::new(&sub)?;
            new.insert((sub, reference));
        }
    }
    // With one: its state where a spot's window begins.
    let starts: BTreeSet<u64> = spots.iter().filter(|_| case.infini.is_some()).map(|&t| first(t)).collect();
    let mut states: HashMap<u64, [Vec<u8>; 2]> = HashMap::new();
    // A hash of the results of each block of a period.
    let mut seen = vec![u64::MAX; period.unwrap_or(0).min(blocks.saturating_sub(reach)) as usize];

    for t in 0..blocks {
        if starts.contains(&t) {
            states.insert(t, state(h, &mut streams, n)?);
        }
        block.step(h, case, (&plan, &mut streams, &slots), (t % whole) as usize, &mut scratch)?;
        let results = block.results(h)?;
        if spots.contains(&t) {
            let verdict = match references.get(&problem(t)) {
                Some((sub, reference)) => judge(h, sub, reference, &results),
                None => {
                    let sub = window(t, states.get(&first(t)).cloned());
                    judge(h, &sub, &Reference::new(&sub)?, &results)
                }
            };
            out.worst = out.worst.max(verdict.worst_ratio());
            out.checked += u64::from(verdict.compared > 0);
            if let (Some((wrong, edges)), None) = (&verdict.wrong, &out.wrong) {
                out.wrong = Some(format!("block {t}: {wrong} ({edges})"));
            }
        }
        // Whose window begins here or before has been checked.
        states.retain(|&start, _| start + reach > t);
        if let Some(period) = period.filter(|_| t >= reach) {
            let now = hash(results.iter().flatten().map(|byte| u64::from(*byte)));
            let before = std::mem::replace(&mut seen[((t - reach) % period) as usize], now);
            if t - reach >= period {
                out.repeated += 1;
                if before != now && out.wrong.is_none() {
                    out.wrong = Some(format!("block {t} differs in a bit from block {}", t - period));
                }
            }
        }
        progress(t + 1);
    }
    Ok(out)
}

/// `samples` different blocks, or all.
fn spots(blocks: u64, samples: u64, seed: u64) -> BTreeSet<u64> {
    if samples >= blocks {
        return (0..blocks).collect();
    }
    let mut rng = Rng::of(seed, "endless");
    let mut spots = BTreeSet::new();
    while (spots.len() as u64) < samples {
        spots.insert(rng.below(blocks as usize) as u64);
    }
    spots
}

/// The results of a window's last block against its reference.
fn judge<H: Harness + ?Sized>(h: &H, sub: &CaseFile, reference: &Reference, results: &[Vec<u8>; 2]) -> Verdict {
    reference.judge_from(sub.tokens - sub.shape.block_len(), sub, &last_block(sub, results), &h.limits())
}

/// The case's inputs, and outputs of one block.
struct Block<H: Harness + ?Sized> {
    inputs: Loaded<H>,
    o: (Owned<H>, Layout),
    mem_o: Option<(Owned<H>, Layout)>,
}

impl<H: Harness + ?Sized> Block<H> {
    fn new(h: &H, case: &CaseFile) -> Result<Self> {
        let (s, n) = (&case.shape, case.batch);
        let output = |shape| {
            let layout = Layout::packed(s.dtype(), shape);
            Ok::<_, Error>((h.backend().alloc(bytes(&layout))?, layout))
        };
        let mem_o = case.mem_q.as_ref().map(|_| output([n, 1, s.mem_len(), s.heads(), s.head_dim()])).transpose()?;
        Ok(Block { inputs: Loaded::new(h, case)?, o: output([n, 1, s.block_len(), s.heads(), s.head_dim()])?, mem_o })
    }

    /// One step of all streams over the case's block `i`.
    fn step(
        &mut self,
        h: &H,
        case: &CaseFile,
        (plan, streams, slots): (&<H::Backend as Backend>::Plan, &mut Streams<H::Backend>, &[u32]),
        i: usize,
        scratch: &mut Owned<H>,
    ) -> Result<()> {
        let (layouts, b) = (Layouts::new(case), case.shape.block_len());
        let all = 0..case.batch;
        let Block { inputs, o, mem_o } = self;
        let Loaded { q, k, v, mem_q, mem, sink, infini, .. } = &*inputs;
        h.run(&mut |queue| {
            let cut = |layout| part(layout, &all, 0, Some(i * b..(i + 1) * b));
            let rows = |layout| part(layout, &all, i, None);
            match mem {
                Some((k, k_layout, v, v_layout)) => {
                    let (k, v) = (View::new(k.borrow(), rows(*k_layout)), View::new(v.borrow(), rows(*v_layout)));
                    streams.set_memory(plan, queue, slots, k, v, scratch.borrow_mut())?;
                }
                None => streams.keep_memory(slots)?,
            }
            let (kv, q_view) = (cut(layouts.kv), View::new(q.borrow(), cut(layouts.q)));
            let mut step = Step::new(slots, View::new(k.borrow(), kv), View::new(v.borrow(), kv));
            step = step.rows(Rows::new(q_view, ViewMut::new(o.0.borrow_mut(), o.1)));
            if let (Some((q, layout)), Some((o, o_layout))) = (mem_q, &mut *mem_o) {
                let q = View::new(q.borrow(), rows(*layout));
                step = step.mem_rows(Rows::new(q, ViewMut::new(o.borrow_mut(), *o_layout)));
            }
            if let Some(sink) = sink {
                step = step.sink(View::new(sink.borrow(), layouts.per_head));
            }
            if let Some((infini_q, infini_k, beta)) = infini {
                let q = infini_q.as_ref().map_or(q_view, |q| View::new(q.borrow(), cut(layouts.q)));
                let k = View::new(infini_k.as_ref().unwrap_or(k).borrow(), kv);
                step = step.infini(StepInfini { q, k, beta: View::new(beta.borrow(), layouts.per_head) });
            }
            streams.step(plan, queue, step, scratch.borrow_mut())?.commit();
            Ok(())
        })
    }

    /// Bytes of `o` and `mem_o`.
    fn results(&self, h: &H) -> Result<[Vec<u8>; 2]> {
        let o = h.download(&self.o.0, bytes(&self.o.1) as usize)?;
        let mem_o = self.mem_o.as_ref().map(|(owned, layout)| h.download(owned, bytes(layout) as usize));
        Ok([o, mem_o.transpose()?.unwrap_or_default()])
    }
}

/// m and z of all streams.
fn state<H: Harness + ?Sized>(h: &H, streams: &mut Streams<H::Backend>, batch: usize) -> Result<[Vec<u8>; 2]> {
    let mut out = [Vec::new(), Vec::new()];
    for n in 0..batch as u32 {
        for (view, out) in streams.infini_state(n)?.into_iter().zip(&mut out) {
            let start = out.len();
            out.resize(start + 4 * view.layout.elements().unwrap_or(0) as usize, 0);
            h.backend().download(view.mem, 4 * view.layout.offset as u64, &mut out[start..])?;
        }
    }
    Ok(out)
}

/// `count` blocks of the endless stream from block `first` on, as a case of its own that starts at 0.
fn window_case(case: &CaseFile, first: u64, count: usize, whole: u64, state: Option<[Vec<u8>; 2]>) -> CaseFile {
    let (b, n) = (case.shape.block_len(), case.batch);
    // Copies `unit`-sized pieces of the blocks; `per` pieces to a block and stream, `stride` of them to a stream.
    let gather = |t: &Tensor, shape: Vec<usize>, per: usize, stride: usize| {
        let unit = t.data.len() / (t.shape[0] * t.shape[1]);
        let shared = [t.shape[0] == 1 && n > 1, t.shape[1] == 1 && stride > 1];
        let mut data = Vec::new();
        for stream in 0..n {
            for i in 0..count {
                let block = ((first + i as u64) % whole) as usize;
                let row = if shared[1] { 0 } else { block * per };
                let start = ((if shared[0] { 0 } else { stream * t.shape[1] }) + row) * unit;
                data.extend_from_slice(&t.data[start..start + per * unit]);
            }
        }
        Tensor { dtype: t.dtype, shape, data }
    };
    let tokens = |t: &Tensor| gather(t, vec![n, count * b, t.shape[2], t.shape[3]], b, case.tokens);
    let memory = |t: &Tensor| gather(t, vec![n, count, t.shape[2], t.shape[3], t.shape[4]], 1, case.blocks());
    let mut sub = CaseFile {
        tokens: count * b,
        lengths: vec![(count * b) as u64; n],
        start: vec![0; n],
        q: tokens(&case.q),
        k: tokens(&case.k),
        v: tokens(&case.v),
        mem_q: case.mem_q.as_ref().map(memory),
        mem: case.mem.as_ref().map(|(k, v)| (memory(k), memory(v))),
        expected: BTreeMap::new(),
        ..case.clone()
    };
    if let (Some(infini), Some([m, z])) = (&mut sub.infini, state) {
        infini.q = infini.q.as_ref().map(tokens);
        infini.k = infini.k.as_ref().map(tokens);
        let (kv, d) = (case.shape.kv_heads(), case.shape.head_dim());
        infini.m0 = Some(Tensor { dtype: Dtype::F32, shape: vec![n, kv, d, d], data: m });
        infini.z0 = Some(Tensor { dtype: Dtype::F32, shape: vec![n, kv, d], data: z });
    }
    sub
}

/// Outputs of a window's case, of which only the last block is filled in.
fn last_block(sub: &CaseFile, [o, mem_o]: &[Vec<u8>; 2]) -> BTreeMap<String, Tensor> {
    let mut outputs = BTreeMap::new();
    for (name, last) in [("o", o), ("mem_o", mem_o)] {
        if last.is_empty() {
            continue;
        }
        let (dtype, shape) = (sub.shape.dtype(), sub.output_shape(name));
        let mut data = vec![0; shape.iter().product::<usize>() * dtype.bytes()];
        let (all, part) = (data.len() / sub.batch, last.len() / sub.batch);
        for n in 0..sub.batch {
            data[(n + 1) * all - part..(n + 1) * all].copy_from_slice(&last[n * part..(n + 1) * part]);
        }
        outputs.insert(name.to_string(), Tensor { dtype, shape, data });
    }
    outputs
}

fn lcm(a: u64, b: u64) -> u64 {
    let (mut x, mut y) = (a, b);
    while y > 0 {
        (x, y) = (y, x % y);
    }
    a / x * b
}
