//! A case on a device: its streams brought to their place, and one sample of its calls.

use super::backward::Backward;
use super::case::PerfCase;
use super::check;
use fam::{Backend, Device, Dtype, Error, Layout, Plan, Result, Rows, Shape, Step, StepInfini, Streams, View, ViewMut};
use fam_testkit::{Harness, Mem, Owned, Queue, Rng, Tally, Tensor};
use std::borrow::{Borrow, BorrowMut};
use std::collections::BTreeMap;

/// Decode goes round streams whose keys and values together take at least so many bytes, several times the last cache of most machines; half of
/// it, or a quarter, where a device has no ring that large.
const ROTATED_BYTES: usize = 256 << 20;

/// A case on a device, ready to run.
pub trait Prepared {
    /// The kernel that attends, or goes back.
    fn kernel(&self) -> String;

    /// One sample: what is timed.
    fn sample(&mut self) -> Result<()>;

    /// Runs one sample and holds its last call against the f64 reference, every value of it. Also gives that call's tensors.
    fn check(&mut self) -> Result<(Tally, Tensors)>;
}

/// What went into a call and what came out, by name.
pub type Tensors = BTreeMap<&'static str, Tensor>;

/// Allocates a case and brings it to its place.
pub fn prepare<'h, H: Harness + Sync>(h: &'h H, case: PerfCase, dtype: Dtype) -> Result<Box<dyn Prepared + 'h>>
where
    H::Backend: Clone,
{
    Ok(if case.is_backward { Box::new(Backward::new(h, case, dtype)?) } else { Box::new(Driver::new(h, case, dtype)?) })
}

/// A case's tensors, random and rounded to its dtype. The token at position p of a stream has the keys of token p mod T, and every call
/// the same queries and the same memory.
pub struct Inputs {
    /// `[N, rows, Hq, D]`; also without rotary positions.
    pub q: Tensor,
    /// `[N, T, Hkv, D]`, T = history + rows; also without rotary positions.
    pub k: Tensor,
    /// As `k`.
    pub v: Tensor,
    /// `[N, 1, F, Hq, D]`.
    pub mem_q: Tensor,
    /// `[N, 1, F, Hkv, D]`.
    pub mem_k: Tensor,
    /// As `mem_k`.
    pub mem_v: Tensor,
    /// `[Hq]` of f32.
    pub beta: Tensor,
}

impl Inputs {
    pub fn new(case: &PerfCase, dtype: Dtype) -> Self {
        let PerfCase { heads, kv_heads, head_dim: d, batch, rows, mem_len, .. } = *case;
        let keys = [batch, case.history + rows, kv_heads, d];
        Inputs {
            q: tensor("q", dtype, &[batch, rows, heads, d]),
            k: tensor("k", dtype, &keys),
            v: tensor("v", dtype, &keys),
            mem_q: tensor("mem_q", dtype, &[batch, 1, mem_len, heads, d]),
            mem_k: tensor("mem_k", dtype, &[batch, 1, mem_len, kv_heads, d]),
            mem_v: tensor("mem_v", dtype, &[batch, 1, mem_len, kv_heads, d]),
            beta: tensor("beta", Dtype::F32, &[heads]),
        }
    }
}

/// Normal random numbers that the name decides.
pub fn tensor(name: &str, dtype: Dtype, shape: &[usize]) -> Tensor {
    let mut rng = Rng::of(1, name);
    let values: Vec<f64> = (0..shape.iter().product()).map(|_| rng.normal()).collect();
    Tensor::from_values(dtype, shape.to_vec(), values)
}

/// A tensor in device memory.
pub struct Held<H: Harness> {
    mem: Owned<H>,
    layout: Layout,
}

impl<H: Harness> Held<H> {
    pub fn input(h: &H, data: &[u8], layout: Layout) -> Result<Self> {
        Ok(Held { mem: h.upload(data)?, layout })
    }

    /// Zeros.
    pub fn output(h: &H, layout: Layout) -> Result<Self> {
        Ok(Held { mem: h.backend().alloc(layout.end_bytes().unwrap_or(u64::MAX))?, layout })
    }

    pub fn view(&self) -> View<'_, Mem<H>> {
        View::new(self.mem.borrow(), self.layout)
    }

    pub fn view_mut(&mut self) -> ViewMut<'_, Mem<H>> {
        ViewMut::new(self.mem.borrow_mut(), self.layout)
    }

    /// Rows `first .. first + count` of a tensor of tokens.
    fn rows(&self, first: usize, count: usize) -> View<'_, Mem<H>> {
        let mut layout = self.layout.with_offset(first * self.layout.stride[2]);
        layout.shape[2] = count;
        View::new(self.mem.borrow(), layout)
    }

    /// `[N, i, rows, H, D]`.
    pub fn download(&self, h: &H) -> Result<Tensor> {
        let mut data = vec![0; self.layout.end_bytes().unwrap_or(u64::MAX) as usize];
        h.backend().download(self.mem.borrow(), 0, &mut data)?;
        Ok(Tensor { dtype: self.layout.dtype, shape: self.layout.shape.to_vec(), data })
    }
}

/// The device's copy of [`Inputs`], and outputs.
struct Buffers<H: Harness> {
    q: Held<H>,
    k: Held<H>,
    v: Held<H>,
    mem_q: Held<H>,
    mem_k: Held<H>,
    mem_v: Held<H>,
    beta: Held<H>,
    o: Held<H>,
    mem_o: Held<H>,
}

/// A case ready to run.
pub struct Driver<'h, H: Harness>
where
    H::Backend: Clone,
{
    h: &'h H,
    pub case: PerfCase,
    pub shape: Shape,
    pub inputs: Inputs,
    plan: <H::Backend as Backend>::Plan,
    streams: Streams<H::Backend>,
    scratch: Owned<H>,
    buffers: Buffers<H>,
    /// The slots of each group of N streams, and the group whose turn it is.
    groups: Vec<Vec<u32>>,
    turn: usize,
}

impl<'h, H: Harness> Driver<'h, H>
where
    H::Backend: Clone,
{
    /// Allocates the case and processes the tokens before its call.
    pub fn new(h: &'h H, case: PerfCase, dtype: Dtype) -> Result<Self> {
        let (backend, shape) = (h.backend(), case.shape(dtype)?);
        let mut groups = if case.is_bound_by_memory() { ROTATED_BYTES.div_ceil(case.work(dtype).bytes as usize) } else { 1 };
        let plan = loop {
            match backend.plan(&shape.spec(case.batch, case.block_len).slots(case.batch * groups).build()?) {
                // A ring may be no larger than a device lets a kernel reach.
                Err(Error::LimitExceeded { .. }) if groups > 1 => groups /= 2,
                plan => break plan?,
            }
        };
        let inputs = Inputs::new(&case, dtype);
        let tokens = |t: &Tensor| Held::input(h, &t.data, Layout::tokens(dtype, std::array::from_fn(|axis| t.shape[axis])));
        let memory = |t: &Tensor| Held::input(h, &t.data, Layout::packed(dtype, std::array::from_fn(|axis| t.shape[axis])));
        let (q, mem_q) = (tokens(&inputs.q)?, memory(&inputs.mem_q)?);
        let buffers = Buffers {
            o: Held::output(h, q.layout)?,
            mem_o: Held::output(h, mem_q.layout)?,
            q,
            mem_q,
            k: tokens(&inputs.k)?,
            v: tokens(&inputs.v)?,
            mem_k: memory(&inputs.mem_k)?,
            mem_v: memory(&inputs.mem_v)?,
            beta: Held::input(h, &inputs.beta.data, Layout::per_head(case.heads))?,
        };
        let slots = |group| (0..case.batch).map(|n| (group * case.batch + n) as u32).collect();
        let mut driver = Driver {
            streams: Streams::new(backend.clone(), &plan)?,
            scratch: backend.alloc(plan.support().scratch_bytes)?,
            groups: (0..groups).map(slots).collect(),
            turn: 0,
            h,
            case,
            shape,
            inputs,
            plan,
            buffers,
        };
        for _ in 0..groups {
            h.run(&mut |queue| {
                for first in (0..case.history).step_by(case.block_len) {
                    driver.call(queue, case.block_len.min(case.history - first), false)?;
                }
                Ok(())
            })?;
            driver.turn = (driver.turn + 1) % groups;
        }
        Ok(driver)
    }

    /// Position of the next token of the group whose turn it is.
    pub fn position(&self) -> Result<u64> {
        self.streams.position(self.groups[self.turn][0])
    }

    /// `rows` tokens more, with their block rows and what goes with them, or only their keys.
    fn call(&mut self, queue: &mut Queue<'_, H>, rows: usize, attends: bool) -> Result<()> {
        let PerfCase { block_len, history, .. } = self.case;
        let Self { case, inputs, plan, streams, scratch, buffers: b, groups, turn, .. } = self;
        let slots: &[u32] = &groups[*turn];
        let position = streams.position(slots[0])?;
        if case.mem_len > 0 && position.is_multiple_of(block_len as u64) {
            streams.set_memory(plan, queue, slots, b.mem_k.view(), b.mem_v.view(), scratch.borrow_mut())?;
        }
        let first = (position % inputs.k.shape[1] as u64) as usize;
        let (k, v) = (b.k.rows(first, rows), b.v.rows(first, rows));
        let mut step = Step::new(slots, k, v);
        if attends {
            step = step.rows(Rows::new(b.q.view(), b.o.view_mut()));
            if case.mem_len > 0 && case.is_block() {
                step = step.mem_rows(Rows::new(b.mem_q.view(), b.mem_o.view_mut()));
            }
        }
        if case.infini.is_some() {
            step = step.infini(StepInfini { q: b.q.view(), k, beta: b.beta.view() });
        }
        let pending = streams.step(plan, queue, step, scratch.borrow_mut())?;
        if case.is_block() || position < history as u64 {
            pending.commit();
        }
        Ok(())
    }

    /// `o` and `mem_o` of the last call.
    pub fn outputs(&self) -> Result<[Tensor; 2]> {
        let Buffers { o, mem_o, .. } = &self.buffers;
        Ok([o.download(self.h)?, mem_o.download(self.h)?])
    }

    /// The compressive memory of the first stream as the next call reads it: m `[Hkv, D, D]` and z `[Hkv, D]`; `None` without one.
    pub fn state(&mut self) -> Result<Option<[Tensor; 2]>> {
        if self.case.infini.is_none() {
            return Ok(None);
        }
        let [kv_heads, d] = [self.case.kv_heads, self.case.head_dim];
        let backend = self.h.backend();
        let [m, z] = self.streams.infini_state(self.groups[0][0])?;
        let host = |view: ViewMut<'_, _>, shape: Vec<usize>| {
            let mut data = vec![0; 4 * shape.iter().product::<usize>()];
            backend.download(view.mem, 4 * view.layout.offset as u64, &mut data)?;
            Ok::<_, fam::Error>(Tensor { dtype: Dtype::F32, shape, data })
        };
        Ok(Some([host(m, vec![kv_heads, d, d])?, host(z, vec![kv_heads, d])?]))
    }
}

impl<H: Harness> Prepared for Driver<'_, H>
where
    H::Backend: Clone,
{
    fn kernel(&self) -> String {
        self.plan.support().kernel(fam::Op::Attend).map_or_else(String::new, |id| id.to_string())
    }

    fn sample(&mut self) -> Result<()> {
        let PerfCase { rows, calls, .. } = self.case;
        self.h.run(&mut |queue| (0..calls).try_for_each(|_| self.call(queue, rows, true)))?;
        self.turn = (self.turn + 1) % self.groups.len();
        Ok(())
    }

    fn check(&mut self) -> Result<(Tally, Tensors)> {
        let (h, before) = (self.h, self.state()?);
        self.sample()?;
        check::check(self, before, h.limits())
    }
}
