//! Streams under random events: steps of any length, dropped and committed, rollbacks, copies, snapshots, resets, bad calls; and at the
//! end every row that was committed against the reference.

mod check;

use crate::casefile::Tensor;
use crate::harness::{Harness, Owned};
use crate::rng::Rng;
use crate::runner::Outcome;
use fam_core::{
    Backend, Device, Dtype, Error, InfiniRule, Layout, Plan, Rows, Shape, Step, StepInfini, Streams, View, ViewMut, Window,
};
use std::borrow::{Borrow, BorrowMut};
use std::collections::BTreeMap;

type PlanOf<H> = <<H as Harness>::Backend as Backend>::Plan;

/// Runs the random life of a few streams that `seed` decides.
pub fn run_streams<H: Harness + ?Sized>(h: &H, seed: u64) -> Outcome
where
    H::Backend: Clone,
{
    match Life::new(h, seed).and_then(|mut life| life.run()) {
        Ok(()) => Outcome::Passed(Default::default()),
        Err(Stop::Skipped(reason)) => Outcome::Skipped(reason),
        Err(Stop::Failed(what)) => Outcome::Failed(format!("streams of seed {seed}: {what}")),
    }
}

enum Stop {
    Skipped(String),
    Failed(String),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        match error {
            Error::Unsupported { .. } => Stop::Skipped(error.to_string()),
            _ => Stop::Failed(error.to_string()),
        }
    }
}

/// One stream's data, and what the kernels returned for it.
struct Stream {
    origin: u64,
    /// Tokens, all there will ever be.
    len: usize,
    /// Values by token: q, k, v, un-rotated q, k.
    rows: [Vec<f64>; 5],
    /// Values by block: mem_q, mem_k, mem_v.
    mem: [Vec<f64>; 3],
    /// Committed outputs by token.
    o: BTreeMap<usize, Vec<f64>>,
    /// The memory that served a block: whose block's values, and how many rows.
    served: BTreeMap<u64, (u64, usize)>,
    /// Memory rows of a block, and the tokens that it had when they were computed.
    mem_o: BTreeMap<u64, (usize, Vec<f64>)>,
}

/// A slot of the streams: whose stream, and the memory that was last set for it.
#[derive(Clone, Copy)]
struct Live {
    stream: usize,
    done: usize,
    staged: Option<(u64, usize)>,
}

struct Life<'h, H: Harness + ?Sized> {
    h: &'h H,
    rng: Rng,
    shape: Shape,
    plan: PlanOf<H>,
    scratch: Owned<H>,
    streams: Streams<H::Backend>,
    data: Vec<Stream>,
    slots: Vec<Option<Live>>,
    sink: Option<Vec<f64>>,
    beta: Vec<f64>,
}

const Q: usize = 0;
const K: usize = 1;
const V: usize = 2;
const INFINI_Q: usize = 3;
const INFINI_K: usize = 4;

impl<'h, H: Harness + ?Sized> Life<'h, H>
where
    H::Backend: Clone,
{
    fn new(h: &'h H, seed: u64) -> Result<Self, Stop> {
        let mut rng = Rng::of(seed, "streams");
        let (heads, kv_heads) = rng.pick(&[(1, 1), (4, 1), (6, 3), (2, 2)]);
        let block_len = rng.pick(&[1, 2, 5, 8, 17]);
        let window = if rng.chance(1, 4) { Window::Tokens(1 + rng.below(3 * block_len)) } else { Window::Blocks(rng.below(4)) };
        let infini = rng.chance(1, 4).then(|| rng.pick(&[InfiniRule::Linear, InfiniRule::Delta]));
        // With a compressive memory a whole stream is one problem, which cannot say how many memory rows a block had.
        let mem_len = if infini.is_some() { 0 } else { rng.pick(&[0, 1, 3, 7]) };
        let mut shape = Shape::builder().heads(heads).kv_heads(kv_heads).head_dim(rng.pick(&[1, 4, 8, 31, 64]));
        shape = shape.block_len(block_len).window(window).mem_len(mem_len).dtype(rng.pick(&Dtype::ALL));
        if let Some(rule) = infini {
            shape = shape.infini(rule);
        }
        let shape = shape.build()?;
        let slots = 1 + rng.below(4);
        let plan = h.backend().plan(&shape.spec(slots, block_len).build()?)?;
        let numbers = |rng: &mut Rng| (0..heads).map(|_| f64::from(rng.normal() as f32)).collect();
        Ok(Life {
            scratch: h.poisoned(plan.support().scratch_bytes)?,
            streams: Streams::new(h.backend().clone(), &plan)?,
            data: Vec::new(),
            slots: vec![None; slots],
            sink: rng.chance(1, 4).then(|| numbers(&mut rng)),
            beta: numbers(&mut rng),
            h,
            rng,
            shape,
            plan,
        })
    }

    fn run(&mut self) -> Result<(), Stop> {
        for _ in 0..self.rng.between(8, 40) {
            let slot = self.rng.below(self.slots.len());
            match (self.slots[slot], self.rng.below(20)) {
                (None, _) => self.begin(slot)?,
                (Some(live), 0) => self.rollback(slot, live)?,
                (Some(live), 1) => self.copy(slot, live)?,
                (Some(live), 2) => self.restore(slot, live)?,
                (Some(live), 3) => self.bad_calls(slot, live)?,
                _ => self.step()?,
            }
        }
        (0..self.data.len()).try_for_each(|stream| self.check(stream))
    }

    fn width(&self, tensor: usize) -> usize {
        let heads = if matches!(tensor, Q | INFINI_Q) { self.shape.heads() } else { self.shape.kv_heads() };
        heads * self.shape.head_dim()
    }

    /// A fresh stream in a slot, whatever was there before.
    fn begin(&mut self, slot: usize) -> Result<(), Stop> {
        let b = self.shape.block_len();
        let origin = self.rng.pick(&[0, 0, b as u64, 3, 1_000_003]);
        let len = 1 + self.rng.below(5 * b);
        let blocks = len / b + 2;
        let dtype = self.shape.dtype();
        let mut values = |count: usize| {
            Tensor::from_values(dtype, vec![count], (0..count).map(|_| self.rng.normal()).collect::<Vec<_>>()).values()
        };
        let (q, kv) = (self.shape.heads() * self.shape.head_dim(), self.shape.kv_heads() * self.shape.head_dim());
        let f = self.shape.mem_len();
        let rows = [q, kv, kv, q, kv].map(|width| values(len * width));
        let mem = [q, kv, kv].map(|width| values(blocks * f * width));
        let (o, served, mem_o) = Default::default();
        self.data.push(Stream { origin, len, rows, mem, o, served, mem_o });
        let streams = &mut self.streams;
        self.h.run(&mut |queue| streams.reset(queue, slot as u32, origin))?;
        self.slots[slot] = Some(Live { stream: self.data.len() - 1, done: 0, staged: None });
        Ok(())
    }

    fn position(&self, live: &Live) -> u64 {
        self.data[live.stream].origin + live.done as u64
    }

    fn is_at_boundary(&self, live: &Live) -> bool {
        live.done == 0 || self.position(live).is_multiple_of(self.shape.block_len() as u64)
    }

    /// New tokens for some slots in random order, committed or dropped.
    fn step(&mut self) -> Result<(), Stop> {
        let mut chosen: Vec<usize> = (0..self.slots.len()).filter(|&s| self.slots[s].is_some()).collect();
        self.rng.shuffle(&mut chosen);
        chosen.truncate(1 + self.rng.below(chosen.len()));
        let mut batch = Vec::new();
        for slot in chosen {
            let Some(live) = self.slots[slot] else { continue };
            if live.done == self.data[live.stream].len {
                // The stream has ended: its slot is free for another.
                self.begin(slot)?;
                continue;
            }
            let live = self.memory(slot, live)?;
            let b = self.shape.block_len();
            let room = b - (self.position(&live) % b as u64) as usize;
            let most = room.min(self.data[live.stream].len - live.done);
            let len = self.rng.pick(&[0, 1, 1 + most / 2, most, most]).min(most);
            batch.push((slot, live, len));
        }
        if batch.is_empty() {
            return Ok(());
        }
        let with_mem = self.shape.mem_len() > 0 && self.rng.chance(2, 3);
        let commit = self.rng.chance(4, 5);
        let (o, mem_o) = self.launch(&batch, with_mem, commit)?;
        if !commit {
            for (slot, live, _) in &batch {
                if self.streams.position(*slot as u32)? != self.position(live) {
                    return Err(Stop::Failed(format!("slot {slot} moved without a commit")));
                }
            }
            return Ok(());
        }
        let (width, f) = (self.width(Q), self.shape.mem_len());
        let longest = batch.iter().map(|(.., len)| *len).max().unwrap_or(0);
        for (n, &(slot, live, len)) in batch.iter().enumerate() {
            if len == 0 {
                continue;
            }
            let block = self.shape.block(self.position(&live));
            let stream = &mut self.data[live.stream];
            for t in 0..len {
                stream.o.insert(live.done + t, o[(n * longest + t) * width..][..width].to_vec());
            }
            let before = stream.served.range(..=block).next_back().map(|(_, served)| *served);
            let served = live.staged.or(before).unwrap_or((block, 0));
            stream.served.insert(block, served);
            if with_mem {
                stream.mem_o.insert(block, (live.done + len, mem_o[n * f * width..][..f * width].to_vec()));
            }
            self.slots[slot] = Some(Live { done: live.done + len, staged: None, ..live });
        }
        Ok(())
    }

    /// Sets or keeps the memory of the block that the slot enters, where it is due, and sometimes where it is not.
    fn memory(&mut self, slot: usize, mut live: Live) -> Result<Live, Stop> {
        let is_due = self.streams.memory_due(slot as u32)?.is_some();
        if self.shape.mem_len() == 0 || !self.is_at_boundary(&live) || (!is_due && self.rng.chance(1, 3)) {
            return Ok(live);
        }
        let block = self.shape.block(self.position(&live));
        let stream = &self.data[live.stream];
        let before = stream.served.range(..block).next_back().map(|(_, served)| *served);
        if let (Some(before), true) = (before, live.staged.is_none() && self.rng.chance(1, 3)) {
            // What a rolled back block was served by is no longer the current memory's predecessor.
            if !stream.served.contains_key(&block) {
                self.streams.keep_memory(&[slot as u32])?;
                live.staged = Some(before);
                self.slots[slot] = Some(live);
                return Ok(live);
            }
        }
        let f = self.shape.mem_len();
        let rows = if self.rng.chance(3, 4) { f } else { self.rng.below(f + 1) };
        let kv = self.width(K);
        let first = (block - self.shape.block(stream.origin)) as usize * f * kv;
        let [k, v] = [1, 2].map(|i| self.upload(&stream.mem[i][first..first + rows * kv]));
        let (k, v) = (k?, v?);
        let layout = Layout::packed(self.shape.dtype(), [1, 1, rows, self.shape.kv_heads(), self.shape.head_dim()]);
        let Life { h, streams, plan, scratch, .. } = self;
        h.run(&mut |queue| {
            let (k, v) = (View::new(k.borrow(), layout), View::new(v.borrow(), layout));
            streams.set_memory(plan, queue, &[slot as u32], k, v, scratch.borrow_mut())
        })?;
        live.staged = Some((block, rows));
        self.slots[slot] = Some(live);
        Ok(live)
    }

    fn upload(&self, values: &[f64]) -> Result<Owned<H>, Stop> {
        let tensor = Tensor::from_values(self.shape.dtype(), vec![values.len()], values.iter().copied());
        Ok(self.h.upload(&tensor.data)?)
    }

    fn upload_f32(&self, values: &[f64]) -> Result<Owned<H>, Stop> {
        Ok(self.h.upload(&Tensor::from_values(Dtype::F32, vec![values.len()], values.iter().copied()).data)?)
    }

    /// One call of `step`; the values of `o` and `mem_o`.
    fn launch(&mut self, batch: &[(usize, Live, usize)], with_mem: bool, commit: bool) -> Result<(Vec<f64>, Vec<f64>), Stop> {
        let s = self.shape;
        let longest = batch.iter().map(|(.., len)| *len).max().unwrap_or(0);
        let (n, f, dtype) = (batch.len(), s.mem_len(), s.dtype());
        // Rows past a stream's length are NaN.
        let gather = |tensor: usize| {
            let width = self.width(tensor);
            let mut values = vec![f64::NAN; n * longest * width];
            for (i, (_, live, len)) in batch.iter().enumerate() {
                let from = &self.data[live.stream].rows[tensor][live.done * width..][..len * width];
                values[i * longest * width..][..len * width].copy_from_slice(from);
            }
            self.upload(&values)
        };
        let [q, k, v, infini_q, infini_k] = [Q, K, V, INFINI_Q, INFINI_K].map(gather);
        let (q, k, v, infini_q, infini_k) = (q?, k?, v?, infini_q?, infini_k?);
        let mut mem_q = Vec::new();
        for (_, live, _) in batch {
            let stream = &self.data[live.stream];
            let (block, width) = (s.block(self.position(live)) - s.block(stream.origin), f * self.width(Q));
            mem_q.extend_from_slice(&stream.mem[0][block as usize * width..][..width]);
        }
        let mem_q = self.upload(&mem_q)?;
        let sink = self.sink.as_ref().map(|values| self.upload_f32(values)).transpose()?;
        let beta = self.upload_f32(&self.beta)?;
        let q_layout = Layout::tokens(dtype, [n, longest, s.heads(), s.head_dim()]);
        let kv_layout = Layout::tokens(dtype, [n, longest, s.kv_heads(), s.head_dim()]);
        let mem_layout = Layout::packed(dtype, [n, 1, f, s.heads(), s.head_dim()]);
        let bytes = |layout: &Layout| layout.end_bytes().unwrap_or(0);
        let mut o = self.h.poisoned(bytes(&q_layout))?;
        let mut mem_o = self.h.poisoned(bytes(&mem_layout))?;
        let slots: Vec<u32> = batch.iter().map(|(slot, ..)| *slot as u32).collect();
        let lens: Vec<u32> = batch.iter().map(|(.., len)| *len as u32).collect();

        let Life { h, streams, plan, scratch, .. } = self;
        h.run(&mut |queue| {
            let mut step = Step::new(&slots, View::new(k.borrow(), kv_layout), View::new(v.borrow(), kv_layout)).lens(&lens);
            step = step.rows(Rows::new(View::new(q.borrow(), q_layout), ViewMut::new(o.borrow_mut(), q_layout)));
            if with_mem {
                let rows = Rows::new(View::new(mem_q.borrow(), mem_layout), ViewMut::new(mem_o.borrow_mut(), mem_layout));
                step = step.mem_rows(rows);
            }
            if let Some(sink) = &sink {
                step = step.sink(View::new(sink.borrow(), Layout::per_head(s.heads())));
            }
            if s.infini().is_some() {
                let (q, k) = (View::new(infini_q.borrow(), q_layout), View::new(infini_k.borrow(), kv_layout));
                step = step.infini(StepInfini { q, k, beta: View::new(beta.borrow(), Layout::per_head(s.heads())) });
            }
            let pending = streams.step(plan, queue, step, scratch.borrow_mut())?;
            if commit {
                pending.commit();
            }
            Ok(())
        })?;
        let values = |owned: &Owned<H>, layout: &Layout| {
            let data = h.download(owned, bytes(layout) as usize)?;
            Ok::<_, Error>(Tensor { dtype, shape: layout.shape.to_vec(), data }.values())
        };
        Ok((values(&o, &q_layout)?, values(&mem_o, &mem_layout)?))
    }

    fn rollback(&mut self, slot: usize, live: Live) -> Result<(), Stop> {
        let b = self.shape.block_len() as u64;
        let in_block = ((self.position(&live) % b) as usize).min(live.done);
        let tokens = self.rng.below(in_block + 1);
        self.streams.rollback(slot as u32, tokens as u64)?;
        self.slots[slot] = Some(Live { done: live.done - tokens, ..live });
        let stream = &mut self.data[live.stream];
        stream.o.retain(|&t, _| t < live.done - tokens);
        stream.mem_o.retain(|_, (had, _)| *had <= live.done - tokens);
        Ok(())
    }

    /// The stream goes on in another slot; its old slot is free.
    fn copy(&mut self, slot: usize, live: Live) -> Result<(), Stop> {
        let to = self.rng.below(self.slots.len());
        if to != slot && self.slots[to].is_none_or(|other| other.done == self.data[other.stream].len) {
            let streams = &mut self.streams;
            self.h.run(&mut |queue| streams.copy_slot(queue, slot as u32, to as u32))?;
            self.slots[to] = Some(live);
            self.slots[slot] = None;
        }
        Ok(())
    }

    /// Snapshot, then restore: in place of a lost slot, or in all new streams.
    fn restore(&mut self, slot: usize, live: Live) -> Result<(), Stop> {
        let everywhere = self.rng.chance(1, 3);
        let Life { h, streams, plan, scratch, slots, .. } = self;
        let mut fresh = everywhere.then(|| Streams::new(h.backend().clone(), plan)).transpose()?;
        h.run(&mut |queue| {
            let moved: Vec<usize> = match fresh {
                None => vec![slot],
                Some(_) => (0..slots.len()).filter(|&s| slots[s].is_some()).collect(),
            };
            for slot in moved {
                let snapshot = streams.snapshot(plan, queue, slot as u32)?;
                let target = match &mut fresh {
                    Some(fresh) => fresh,
                    None => {
                        streams.poison(slot as u32)?;
                        &mut *streams
                    }
                };
                target.restore(plan, queue, slot as u32, &snapshot, scratch.borrow_mut())?;
                if target.snapshot(plan, queue, slot as u32)? != snapshot {
                    return Err(Error::malformed("snapshot", "differs after a restore"));
                }
            }
            Ok(())
        })?;
        if let Some(fresh) = fresh {
            *streams = fresh;
        }
        self.slots[slot] = Some(live);
        Ok(())
    }

    /// Calls that must be refused and change nothing.
    fn bad_calls(&mut self, slot: usize, live: Live) -> Result<(), Stop> {
        let s = self.shape;
        let b = s.block_len();
        let room = b - (self.position(&live) % b as u64) as usize;
        let (at_boundary, beyond) = (self.is_at_boundary(&live), self.slots.len() as u32);
        let row = |count: usize| Layout::tokens(s.dtype(), [2, count, s.kv_heads(), s.head_dim()]);
        let Life { h, streams, plan, scratch, .. } = self;
        let zeros = h.backend().alloc(row(b + 1).end_bytes().unwrap_or(0))?;
        let mut accepted = None;
        h.run(&mut |queue| {
            let before = streams.snapshot(plan, queue, slot as u32)?;
            let slot = slot as u32;
            let tries: [(&str, &[u32], usize); 4] = [
                ("a slot twice", &[slot, slot], 1),
                ("a slot out of range", &[beyond], 1),
                ("tokens past the block", &[slot], room + 1),
                ("fewer keys than tokens", &[slot], 0),
            ];
            for (what, slots, tokens) in tries {
                let view = View::new(zeros.borrow(), row(tokens.min(b + 1)));
                let lens = vec![tokens.max(1) as u32; slots.len()];
                let step = Step::new(slots, view, view).lens(&lens);
                if streams.step(plan, queue, step, scratch.borrow_mut()).is_ok() {
                    accepted = Some(what);
                }
            }
            if !at_boundary && streams.keep_memory(&[slot]).is_ok() {
                accepted = Some("keep_memory inside a block");
            }
            if streams.rollback(slot, b as u64 + 1).is_ok() {
                accepted = Some("a rollback past the block");
            }
            if streams.restore(plan, queue, slot, &before[..before.len() - 1], scratch.borrow_mut()).is_ok() {
                accepted = Some("a snapshot that is cut off");
            }
            if streams.snapshot(plan, queue, slot)? != before {
                accepted = Some("(a refused call changed the slot)");
            }
            Ok(())
        })?;
        accepted.map_or(Ok(()), |what| Err(Stop::Failed(format!("accepted: {what}"))))
    }
}
