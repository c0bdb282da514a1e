//! `attend` as a custom op of candle.

use crate::pack::Packing;
use crate::threads::queue;
use crate::view::{self, Argument, Number, with_number};
use crate::wrap;
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use fam::cpu::{Cpu, CpuPlan};
use fam::{Attend, Backend, Dtype, Keys, Plan, Rows, Span, Spans, ViewMut};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

/// Attention with a memory on packed rows ([`Packing`]).
pub trait Attends {
    /// One joint softmax for each row. q is (N, Hq, rows, D) with `tokens` block rows in front, k and v are (N, Hkv, rows, D); stream n of
    /// the batch has span and slot n. Rows past a span's length come back as 0.
    ///
    /// # Errors
    /// For shapes, strides or spans that break a rule of fam's contract.
    fn attend(&self, spans: &[Span], tokens: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Attended>;
}

/// What the two groups of rows get.
#[derive(Clone, Debug)]
pub struct Attended {
    /// Block rows, (N, Hq, tokens, D).
    pub o: Tensor,
    /// Memory rows, (N, Hq, nb·F, D), block after block; no rows where q has none.
    pub mem_o: Tensor,
}

/// A plan of fam on the CPU and its scratch memory. One serves all layers of a model and clones cheaply; calls take turns.
#[derive(Clone)]
pub struct Attention {
    inner: Arc<Inner>,
}

struct Inner {
    cpu: Cpu,
    plan: CpuPlan,
    scratch: Mutex<Vec<u8>>,
}

impl fmt::Debug for Attention {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attention").field("plan", &self.inner.plan).finish_non_exhaustive()
    }
}

impl Attention {
    /// For calls of at most `batch` streams and `rows` tokens a stream, which start at a block or stay inside one, and their way back.
    ///
    /// # Errors
    /// Where the sizes pass a limit of fam.
    pub fn new(shape: &fam::Shape, batch: usize, rows: usize) -> Result<Self> {
        let cpu = Cpu::new().map_err(wrap)?.with_threads(rayon::current_num_threads());
        let spec = shape.spec(batch, rows).ops(&[fam::Op::Append, fam::Op::Attend, fam::Op::AttendBackward]).build();
        let plan = spec.and_then(|spec| cpu.plan(&spec)).map_err(wrap)?;
        let scratch = Mutex::new(vec![0; plan.support().scratch_bytes as usize]);
        Ok(Attention { inner: Arc::new(Inner { cpu, plan, scratch }) })
    }

    /// Sizes of the layer.
    pub fn shape(&self) -> &fam::Shape {
        self.inner.plan.spec().shape()
    }

    pub(crate) fn cpu(&self) -> Cpu {
        self.inner.cpu
    }

    pub(crate) fn plan(&self) -> &CpuPlan {
        &self.inner.plan
    }

    /// Runs `work` with the scratch memory, whose contents no call relies on: a panic elsewhere leaves it fit for use.
    pub(crate) fn with_scratch<T>(&self, work: impl FnOnce(&mut [u8]) -> T) -> T {
        work(&mut self.inner.scratch.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Attends for Attention {
    fn attend(&self, spans: &[Span], tokens: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Attended> {
        let packing = Packing::new(self.shape(), spans, tokens, [q, k, v])?;
        let lse = Mutex::default();
        let flat = q.apply_op3(k, v, Op { attention: self.clone(), spans: spans.to_vec(), packing, lse })?;
        let (heads, d) = (self.shape().heads(), self.shape().head_dim());
        let group = |first, rows| {
            let group = flat.narrow(0, first, packing.batch * rows * heads * d)?;
            group.reshape((packing.batch, rows, heads, d))?.transpose(1, 2)
        };
        let block_rows = packing.batch * packing.tokens * heads * d;
        Ok(Attended { o: group(0, packing.tokens)?, mem_o: group(block_rows, packing.mem_rows())? })
    }
}

/// One call, as candle's graph keeps it for the way back.
pub(crate) struct Op {
    pub attention: Attention,
    pub spans: Vec<Span>,
    pub packing: Packing,
    /// What the way back needs beside the output: the log-sum-exp of all block rows, then of all memory rows.
    pub lse: Mutex<Vec<f32>>,
}

impl Op {
    /// All block rows, then all memory rows, each `[batch, rows, heads, dim]`: the two outputs of one launch lie in memory of their own, and
    /// each is ready to be projected.
    fn forward<T: Number>(&self, q: Argument, k: Argument, v: Argument) -> Result<(CpuStorage, Shape)> {
        let Packing { batch, tokens, blocks, mem_q, keys, mem_k } = self.packing;
        let shape = self.attention.shape();
        let (heads, d, dtype) = (shape.heads(), shape.head_dim(), shape.dtype());
        let mut out = vec![T::from_f64(0.0); batch * (tokens + blocks * mem_q) * heads * d];
        let (o, mem_o) = out.split_at_mut(batch * tokens * heads * d);
        let mut saved = vec![f32::NEG_INFINITY; batch * (tokens + blocks * mem_q) * heads];
        let (lse, mem_lse) = saved.split_at_mut(batch * tokens * heads);

        let linear = Keys::Strided { k: view::rows::<T>(k, 0, keys)?, v: view::rows::<T>(v, 0, keys)? };
        let mut args = Attend::new(Spans::Host(&self.spans), linear);
        if tokens > 0 {
            let o = ViewMut::tokens(o, [batch, tokens, heads, d]);
            let lse = ViewMut::tokens(lse, [batch, tokens, heads, 1]);
            args = args.rows(Rows::new(view::rows::<T>(q, 0, tokens)?, o).lse(lse));
        }
        if mem_q > 0 {
            let mem_o = ViewMut::of(mem_o, fam::Layout::packed(dtype, [batch, blocks, mem_q, heads, d]));
            let mem_lse = ViewMut::of(mem_lse, fam::Layout::packed(Dtype::F32, [batch, blocks, mem_q, heads, 1]));
            args = args.mem_rows(Rows::new(view::memory::<T>(q, tokens, blocks, mem_q)?, mem_o).lse(mem_lse));
        }
        if mem_k > 0 {
            args = args.mem(view::memory::<T>(k, keys, blocks, mem_k)?, view::memory::<T>(v, keys, blocks, mem_k)?);
        }
        let Inner { cpu, plan, .. } = &*self.attention.inner;
        self.attention.with_scratch(|scratch| cpu.attend(plan, &mut queue(), args, scratch)).map_err(wrap)?;
        *self.lse.lock().unwrap_or_else(PoisonError::into_inner) = saved;
        let len = out.len();
        Ok((T::to_cpu_storage_owned(out), Shape::from(len)))
    }
}

impl CustomOp3 for Op {
    fn name(&self) -> &'static str {
        "fam-attend"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let [q, k, v] = [(q, q_layout), (k, k_layout), (v, v_layout)];
        with_number!(self.attention.shape().dtype(), T, self.forward::<T>(q, k, v))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        out: &Tensor,
        d_out: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [d_q, d_k, d_v] = with_number!(self.attention.shape().dtype(), T, self.backward::<T>([q, k, v], out, d_out)?);
        Ok((Some(d_q), Some(d_k), Some(d_v)))
    }
}
