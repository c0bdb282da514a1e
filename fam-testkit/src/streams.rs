//! Streams under random events: steps of any length, dropped and committed, rollbacks, copies, snapshots, resets, bad calls; and at the
//! end every row that was committed, and the compressive memory, against the reference.

mod check;
mod launch;
mod refusals;

use crate::case::Strides;
use crate::casefile::Tensor;
use crate::harness::Harness;
use crate::launch::{PlanOf, Region, Stop, plan};
use crate::replay;
use crate::rng::Rng;
use crate::runner::{Outcome, Passed, caught};
use fam_core::{Dtype, Error, InfiniRule, Shape, Streams, Window};
use launch::Launch;
use std::collections::BTreeMap;

/// Runs the random life of a few streams that `seed` decides.
pub fn run_streams<H: Harness + ?Sized>(h: &H, seed: u64) -> Outcome
where
    H::Backend: Clone,
{
    caught(|| {
        let life = Life::new(h, seed).and_then(|mut life| life.run());
        life.map(|()| Passed::default()).map_err(|stop| match stop {
            Stop::Failed(what) => Stop::Failed(format!("streams of seed {seed}: {what}")),
            other => other,
        })
    })
}

/// What the kernels returned for one row: `o` and its log-sum-exp, by head.
#[derive(Clone, Default)]
struct Row {
    o: Vec<f64>,
    lse: Vec<f64>,
}

/// One stream's data, and what the kernels returned for it.
#[derive(Clone)]
struct Stream {
    origin: u64,
    /// Tokens, all there will ever be.
    len: usize,
    /// Values by token: q, k, v, un-rotated q, k.
    rows: [Vec<f64>; 5],
    /// Values by block: mem_q, mem_k, mem_v.
    mem: [Vec<f64>; 3],
    /// Committed outputs by token.
    o: BTreeMap<usize, Row>,
    /// The memory that served a block: whose block's values, and how many rows.
    served: BTreeMap<u64, (u64, usize)>,
    /// Memory rows of a block, one after the other, and the tokens that it had when they were computed.
    mem_o: BTreeMap<u64, (usize, Row)>,
    /// Tokens in whole blocks that it shares with the stream that it was copied from, which shows them.
    shared: usize,
    /// m and z when the stream left its slot.
    state: Option<[Vec<u8>; 2]>,
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
    scratch: Region<H>,
    strides: Strides,
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
        let mem_len = rng.pick(&[0, 1, 3, 7]);
        let mut shape = Shape::builder().heads(heads).kv_heads(kv_heads).head_dim(rng.pick(&[1, 4, 8, 31, 64]));
        shape = shape.block_len(block_len).window(window).mem_len(mem_len).dtype(rng.pick(&Dtype::ALL));
        if let Some(rule) = infini {
            shape = shape.infini(rule);
        }
        let shape = shape.build()?;
        let slots = 1 + rng.below(4);
        let plan = plan(h, &shape.spec(slots, block_len).build()?)?;
        let numbers = |rng: &mut Rng| (0..heads).map(|_| f64::from(rng.normal() as f32)).collect();
        Ok(Life {
            scratch: Region::scratch(h, &plan)?,
            strides: rng.pick(&[Strides::Packed, Strides::HeadsMajor, Strides::Padded, Strides::Broadcast]),
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
        (0..self.slots.len()).try_for_each(|slot| self.retire(slot))?;
        (0..self.data.len()).try_for_each(|stream| self.check(stream))
    }

    /// Takes the stream out of a slot, and down what its compressive memory holds.
    fn retire(&mut self, slot: usize) -> Result<(), Stop> {
        if let (Some(live), Some(_)) = (self.slots[slot].take(), self.shape.infini()) {
            let mut state = [Vec::new(), Vec::new()];
            for (view, out) in self.streams.infini_state(slot as u32)?.into_iter().zip(&mut state) {
                let elements = view.layout.elements().unwrap_or(0) as usize;
                replay::download(self.h, view.mem, view.layout.offset, elements, out)?;
            }
            self.data[live.stream].state = Some(state);
        }
        Ok(())
    }

    /// `count` normal values of the shape's dtype.
    fn normal(&mut self, count: usize) -> Vec<f64> {
        let values: Vec<f64> = (0..count).map(|_| self.rng.normal()).collect();
        Tensor::from_values(self.shape.dtype(), vec![count], values).values()
    }

    fn snapshot(&mut self, slot: usize) -> Result<Vec<u8>, Stop> {
        let Life { h, streams, plan, .. } = self;
        let mut snapshot = Vec::new();
        h.run(&mut |queue| {
            snapshot = streams.snapshot(plan, queue, slot as u32)?;
            Ok(())
        })?;
        Ok(snapshot)
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
        let (q, kv) = (self.shape.heads() * self.shape.head_dim(), self.shape.kv_heads() * self.shape.head_dim());
        let f = self.shape.mem_len();
        let rows = [q, kv, kv, q, kv].map(|width| self.normal(len * width));
        let mem = [q, kv, kv].map(|width| self.normal(blocks * f * width));
        let (o, served, mem_o) = Default::default();
        self.retire(slot)?;
        self.data.push(Stream { origin, len, rows, mem, o, served, mem_o, shared: 0, state: None });
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
        let before = if commit { Vec::new() } else { self.snapshots(&batch)? };
        let got = self.launch(&batch, with_mem, commit)?;
        if !commit {
            return match self.snapshots(&batch)? == before {
                true => Ok(()),
                false => Err(Stop::Failed("a step that was dropped changed a slot".into())),
            };
        }
        for (n, &(slot, live, len)) in batch.iter().enumerate() {
            if len == 0 {
                continue;
            }
            let block = self.shape.block(self.position(&live));
            let stream = &mut self.data[live.stream];
            for t in 0..len {
                stream.o.insert(live.done + t, got.row(n, t));
            }
            let before = stream.served.range(..=block).next_back().map(|(_, served)| *served);
            let served = live.staged.or(before).unwrap_or((block, 0));
            stream.served.insert(block, served);
            if let Some(rows) = got.memory(n) {
                stream.mem_o.insert(block, (live.done + len, rows));
            }
            self.slots[slot] = Some(Live { done: live.done + len, staged: None, ..live });
        }
        Ok(())
    }

    fn snapshots(&mut self, batch: &[Launch]) -> Result<Vec<Vec<u8>>, Stop> {
        batch.iter().map(|(slot, ..)| self.snapshot(*slot)).collect()
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
        if let (Some(before), true) = (before, self.rng.chance(1, 3)) {
            self.streams.keep_memory(&[slot as u32])?;
            live.staged = Some(before);
            self.slots[slot] = Some(live);
            return Ok(live);
        }
        let f = self.shape.mem_len();
        let rows = if self.rng.chance(3, 4) { f } else { self.rng.below(f + 1) };
        self.set_memory(slot, &live, rows)?;
        live.staged = Some((block, rows));
        self.slots[slot] = Some(live);
        Ok(live)
    }

    fn rollback(&mut self, slot: usize, live: Live) -> Result<(), Stop> {
        let b = self.shape.block_len() as u64;
        let in_block = ((self.position(&live) % b) as usize).min(live.done);
        let tokens = if self.rng.chance(1, 2) { in_block } else { self.rng.below(in_block + 1) };
        self.streams.rollback(slot as u32, tokens as u64)?;
        let mut rolled = Live { done: live.done - tokens, ..live };
        let block = self.shape.block(self.position(&rolled));
        let stream = &mut self.data[live.stream];
        stream.o.retain(|&t, _| t < rolled.done);
        stream.mem_o.retain(|_, (had, _)| *had <= rolled.done);
        if tokens > 0 && tokens == in_block {
            // As if the block had never been entered: its memory is staged again, and may yet be exchanged.
            rolled.staged = stream.served.remove(&block);
        }
        self.slots[slot] = Some(rolled);
        Ok(())
    }

    /// Two streams of one past: both go on, each with a future of its own.
    fn copy(&mut self, slot: usize, live: Live) -> Result<(), Stop> {
        let to = self.rng.below(self.slots.len());
        if to == slot {
            return Ok(());
        }
        self.retire(to)?;
        let before = self.snapshot(slot)?;
        let streams = &mut self.streams;
        self.h.run(&mut |queue| streams.copy_slot(queue, slot as u32, to as u32))?;
        if self.snapshot(slot)? != before || self.snapshot(to)? != before {
            return Err(Stop::Failed(format!("slots {slot} and {to} are not what {slot} was before the copy")));
        }
        let shared = live.done.saturating_sub((self.position(&live) % self.shape.block_len() as u64) as usize);
        let mut fork = Stream { shared, state: None, ..self.data[live.stream].clone() };
        for tensor in [Q, K, V, INFINI_Q, INFINI_K] {
            let from = live.done * self.width(tensor);
            let new = self.normal(fork.rows[tensor].len() - from);
            fork.rows[tensor].splice(from.., new);
        }
        // The current block's memory is there already.
        let entered = (self.shape.block(self.position(&live)) - self.shape.block(fork.origin)) as usize + 1;
        for (tensor, width) in [Q, K, V].map(|tensor| self.width(tensor)).into_iter().enumerate() {
            let from = entered * self.shape.mem_len() * width;
            let new = self.normal(fork.mem[tensor].len() - from);
            fork.mem[tensor].splice(from.., new);
        }
        self.data.push(fork);
        self.slots[to] = Some(Live { stream: self.data.len() - 1, ..live });
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
                target.restore(plan, queue, slot as u32, &snapshot, scratch.mem_mut())?;
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
}
