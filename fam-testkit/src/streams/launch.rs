//! One call of `set_memory` or `step` on tensors with traps.

use super::{INFINI_K, INFINI_Q, K, Life, Live, Q, Row, V};
use crate::case::Strides;
use crate::guard::{POISON, Tensor, arrange};
use crate::harness::{Harness, Mem};
use crate::launch::{Loaded, Stop};
use fam_core::{Dtype, Layout, Rows, Step, StepInfini};

/// One stream's part of a step: its slot, what is there, and how many tokens come.
pub(super) type Launch = (usize, Live, usize);

/// What the kernels returned for a step.
pub(super) struct Got {
    rows: [Tensor; 2],
    mem_rows: Option<[Tensor; 2]>,
}

impl Got {
    /// Token `t` of stream `n`.
    pub fn row(&self, n: usize, t: usize) -> Row {
        read(&self.rows, n, t..t + 1)
    }

    /// The memory rows of stream `n`.
    pub fn memory(&self, n: usize) -> Option<Row> {
        self.mem_rows.as_ref().map(|tensors| read(tensors, n, 0..tensors[0].layout.shape[2]))
    }
}

fn read([o, lse]: &[Tensor; 2], n: usize, rows: std::ops::Range<usize>) -> Row {
    let mut row = Row::default();
    for (tensor, out) in [(o, &mut row.o), (lse, &mut row.lse)] {
        let [_, _, _, heads, d] = tensor.layout.shape;
        for (r, head) in rows.clone().flat_map(|r| (0..heads).map(move |head| (r, head))) {
            let start = out.len();
            out.resize(start + d, 0.0);
            tensor.get([n, 0, r, head], &mut out[start..]);
        }
    }
    row
}

impl<H: Harness + ?Sized> Life<'_, H>
where
    H::Backend: Clone,
{
    fn arrange(&mut self, dtype: Dtype, shape: [usize; 5], is_output: bool) -> Layout {
        // Streams of one call have nothing in common.
        let strides = if self.strides == Strides::Broadcast { Strides::Padded } else { self.strides };
        arrange(strides, dtype, shape, is_output, &mut self.rng)
    }

    /// Rows of stream `n` of a batch, one after the other in `values(n)`; NaN everywhere else.
    fn input(
        &mut self,
        name: &'static str,
        shape: [usize; 5],
        values: impl Fn(&Self, usize) -> Vec<f64>,
    ) -> Result<Loaded<H>, Stop> {
        let layout = self.arrange(self.shape.dtype(), shape, false);
        let mut tensor = Tensor::new(layout, POISON);
        for n in 0..shape[0] {
            for (x, row) in values(self, n).chunks_exact(shape[4]).enumerate() {
                tensor.put([n, 0, x / shape[3], x % shape[3]], row);
            }
        }
        Loaded::new(self.h, name, tensor)
    }

    fn group(&mut self, names: [&'static str; 2], [n, rows]: [usize; 2]) -> Result<[Loaded<H>; 2], Stop> {
        let (heads, d) = (self.shape.heads(), self.shape.head_dim());
        let o = self.arrange(self.shape.dtype(), [n, 1, rows, heads, d], true);
        let lse = self.arrange(Dtype::F32, [n, 1, rows, heads, 1], true);
        Ok([Loaded::output(self.h, names[0], o)?, Loaded::output(self.h, names[1], lse)?])
    }

    fn per_head(&self, name: &'static str, values: &[f64]) -> Result<Loaded<H>, Stop> {
        let mut tensor = Tensor::new(Layout::per_head(values.len()), POISON);
        values.iter().enumerate().for_each(|(head, value)| tensor.put([0, 0, 0, head], &[*value]));
        Loaded::new(self.h, name, tensor)
    }

    /// Sets the first `rows` memory rows of the block that the slot enters.
    pub(super) fn set_memory(&mut self, slot: usize, live: &Live, rows: usize) -> Result<(), Stop> {
        let s = self.shape;
        let block = (s.block(self.position(live)) - s.block(self.data[live.stream].origin)) as usize;
        let width = s.kv_heads() * s.head_dim();
        let first = block * s.mem_len() * width;
        let mut input = |name, i: usize| {
            let shape = [1, 1, rows, s.kv_heads(), s.head_dim()];
            self.input(name, shape, |life, _| life.data[live.stream].mem[i][first..first + rows * width].to_vec())
        };
        let (k, v) = (input("mem_k", 1)?, input("mem_v", 2)?);
        let Life { h, streams, plan, scratch, .. } = self;
        h.run(&mut |queue| streams.set_memory(plan, queue, &[slot as u32], k.view(), v.view(), scratch.mem_mut()))?;
        [k, v].iter().try_for_each(|input| input.check(self.h))?;
        self.scratch.check(self.h)
    }

    /// One call of `step`.
    pub(super) fn launch(&mut self, batch: &[Launch], with_mem: bool, commit: bool) -> Result<Got, Stop> {
        let s = self.shape;
        let (n, f, d) = (batch.len(), s.mem_len(), s.head_dim());
        let longest = batch.iter().map(|(.., len)| *len).max().unwrap_or(0);
        let mut tokens = |name, tensor: usize| {
            let width = self.width(tensor);
            self.input(name, [n, 1, longest, width / d, d], |life, n| {
                let (_, live, len) = &batch[n];
                life.data[live.stream].rows[tensor][live.done * width..][..len * width].to_vec()
            })
        };
        let (q, k, v) = (tokens("q", Q)?, tokens("k", K)?, tokens("v", V)?);
        let (infini_q, infini_k) = (tokens("infini_q", INFINI_Q)?, tokens("infini_k", INFINI_K)?);
        let mem_q = self.input("mem_q", [n, 1, f, s.heads(), d], |life, n| {
            let stream = &life.data[batch[n].1.stream];
            let (block, width) = (s.block(life.position(&batch[n].1)) - s.block(stream.origin), f * life.width(Q));
            stream.mem[0][block as usize * width..][..width].to_vec()
        })?;
        let sink = self.sink.as_ref().map(|sink| self.per_head("sink", sink)).transpose()?;
        let beta = self.per_head("beta", &self.beta)?;
        let mut rows = self.group(["o", "lse"], [n, longest])?;
        let mut mem_rows = if with_mem { Some(self.group(["mem_o", "mem_lse"], [n, f])?) } else { None };
        let slots: Vec<u32> = batch.iter().map(|(slot, ..)| *slot as u32).collect();
        let lens: Vec<u32> = batch.iter().map(|(.., len)| *len as u32).collect();

        let Life { h, streams, plan, scratch, .. } = self;
        h.run(&mut |queue| {
            let mut step = Step::new(&slots, k.view(), v.view()).lens(&lens);
            step = step.rows(as_rows(&q, &mut rows));
            if let Some(mem_rows) = &mut mem_rows {
                step = step.mem_rows(as_rows(&mem_q, mem_rows));
            }
            if let Some(sink) = &sink {
                step = step.sink(sink.view());
            }
            if s.infini().is_some() {
                step = step.infini(StepInfini { q: infini_q.view(), k: infini_k.view(), beta: beta.view() });
            }
            let pending = streams.step(plan, queue, step, scratch.mem_mut())?;
            if commit {
                pending.commit();
            }
            Ok(())
        })?;
        let inputs = [&q, &k, &v, &infini_q, &infini_k, &mem_q, &beta].into_iter().chain(&sink);
        inputs.into_iter().try_for_each(|input| input.check(self.h))?;
        self.scratch.check(self.h)?;
        // Nothing is written past a stream's length, nor for a stream without new tokens.
        let written = |is_memory: bool| {
            let rows = batch.iter().map(move |(.., len)| if is_memory && *len > 0 { f } else { *len });
            rows.enumerate().flat_map(|(n, rows)| (0..rows).map(move |r| [n, 0, r]))
        };
        let finish = |[o, lse]: [Loaded<H>; 2], is_memory| {
            Ok::<_, Stop>([o.finish(self.h, written(is_memory))?, lse.finish(self.h, written(is_memory))?])
        };
        Ok(Got { rows: finish(rows, false)?, mem_rows: mem_rows.map(|tensors| finish(tensors, true)).transpose()? })
    }
}

fn as_rows<'a, H: Harness + ?Sized>(q: &'a Loaded<H>, [o, lse]: &'a mut [Loaded<H>; 2]) -> Rows<'a, Mem<H>> {
    Rows::new(q.view(), o.view_mut()).lse(lse.view_mut())
}
