//! Streams: slots of key ring, memory and position for one layer. A convenience: every method is a thin composition of the ops.

mod buffers;
mod slot;

use crate::{Append, Device, Error, Layout, Op, Plan, Result, Rows, Shape, Span, Spans, View, ViewMut, mutate};
pub(crate) use buffers::Buffers;
pub(crate) use slot::{Slot, Staged};
use std::borrow::BorrowMut;
use std::fmt;

/// The state of a fixed number of streams in **one** transformer layer: the key ring, the keys and values of the memory rows, for
/// Infini-attention m and z, and the positions.
///
/// One block of a stream: [`Streams::set_memory`] at the block's boundary, then [`Streams::step`] (the whole block, or token by token),
/// then [`Pending::commit`]. What turns `mem_o` into the next memory keys (W_o, feed-forward, norm, QKV) is the caller's.
///
/// Nothing is allocated after construction but by [`Streams::snapshot`] and [`Streams::restore`]. A lost device, where a method that changes
/// the streams meets it, poisons every slot.
pub struct Streams<B: Device> {
    pub(crate) backend: B,
    pub(crate) shape: Shape,
    pub(crate) buffers: Buffers<B>,
    pub(crate) slots: Vec<Slot>,
    ring_rows: usize,
    ring_bytes: u64,
    spans: Vec<Span>,
    changes: Vec<(u32, Slot)>,
}

impl<B: Device> fmt::Debug for Streams<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Streams").field("shape", &self.shape).field("slots", &self.slots).finish_non_exhaustive()
    }
}

/// Arguments of [`Streams::step`]. With neither `rows` nor `mem_rows` the tokens are only appended.
#[derive(Debug)]
#[non_exhaustive]
pub struct Step<'a, M: ?Sized> {
    /// The slot of each stream of the batch.
    pub slots: &'a [u32],
    /// Tokens of each stream. Default: as many as `k` has rows.
    pub lens: Option<&'a [u32]>,
    /// New keys, `[N, 1, L, Hkv, D]`.
    pub k: View<'a, M>,
    /// New values, as `k`.
    pub v: View<'a, M>,
    /// Block rows: the new tokens' queries and outputs.
    pub rows: Option<Rows<'a, M>>,
    /// Memory rows, `[N, 1, F, Hq, D]`: usually in the call that completes the block; they see the block's keys so far.
    pub mem_rows: Option<Rows<'a, M>>,
    /// Sink logits, `[Hq]` of f32.
    pub sink: Option<View<'a, M>>,
    /// What a shape with a compressive memory needs.
    pub infini: Option<StepInfini<'a, M>>,
}

/// Un-rotated queries and keys of the new tokens, and the gate, for Infini-attention.
#[derive(Debug)]
pub struct StepInfini<'a, M: ?Sized> {
    /// `[N, 1, L, Hq, D]`.
    pub q: View<'a, M>,
    /// `[N, 1, L, Hkv, D]`.
    pub k: View<'a, M>,
    /// `[Hq]` of f32.
    pub beta: View<'a, M>,
}

impl<'a, M: ?Sized> Step<'a, M> {
    /// New tokens of the streams in `slots`.
    pub fn new(slots: &'a [u32], k: View<'a, M>, v: View<'a, M>) -> Self {
        Step { slots, lens: None, k, v, rows: None, mem_rows: None, sink: None, infini: None }
    }

    /// Tokens of each stream, where they differ.
    #[must_use]
    pub fn lens(mut self, lens: &'a [u32]) -> Self {
        self.lens = Some(lens);
        self
    }

    /// Asks for the block rows.
    #[must_use]
    pub fn rows(mut self, rows: Rows<'a, M>) -> Self {
        self.rows = Some(rows);
        self
    }

    /// Asks for the memory rows.
    #[must_use]
    pub fn mem_rows(mut self, mem_rows: Rows<'a, M>) -> Self {
        self.mem_rows = Some(mem_rows);
        self
    }

    /// Adds sink logits.
    #[must_use]
    pub fn sink(mut self, sink: View<'a, M>) -> Self {
        self.sink = Some(sink);
        self
    }

    /// Adds un-rotated queries and keys, and the gate.
    #[must_use]
    pub fn infini(mut self, infini: StepInfini<'a, M>) -> Self {
        self.infini = Some(infini);
        self
    }
}

/// Work that is enqueued but not yet part of the streams' state. [`Pending::commit`] moves every slot; dropping it leaves each as it was.
#[derive(Debug)]
#[must_use = "a step takes effect only when it is committed; dropping it leaves the streams as they were"]
pub struct Pending<'s> {
    slots: &'s mut [Slot],
    changes: &'s [(u32, Slot)],
}

impl Pending<'_> {
    /// Moves the slots on. Cannot fail and does no device work, so an engine can run all its layers and then commit all.
    pub fn commit(self) {
        for &(slot, next) in self.changes {
            self.slots[slot as usize] = next;
        }
    }
}

impl<B: Device> Streams<B> {
    /// Allocates the state of `plan.spec().slots()` empty streams.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a plan without the ops that a step is made of; [`Error::OutOfMemory`], [`Error::LimitExceeded`] or
    /// [`Error::DeviceLost`] from the device.
    pub fn new(backend: B, plan: &B::Plan) -> Result<Self> {
        let spec = plan.spec();
        let slots = spec.slots();
        let write = spec.shape().infini().map(|_| Op::InfiniWrite);
        for op in [Op::Append, Op::Attend].into_iter().chain(write) {
            if !spec.ops().contains(&op) {
                return Err(Error::invalid(
                    "plan.ops",
                    format!("{:?}", spec.ops()),
                    format!("with {op}, which steps consist of"),
                ));
            }
        }
        Ok(Streams {
            buffers: Buffers::new(&backend, plan)?,
            backend,
            shape: *spec.shape(),
            slots: vec![Slot::default(); slots],
            ring_rows: spec.ring_rows(),
            ring_bytes: plan.support().ring_bytes,
            spans: Vec::with_capacity(slots),
            changes: Vec::with_capacity(slots),
        })
    }

    /// Bytes of device memory that the state takes: constant in the length of the streams.
    pub fn state_bytes(&self) -> u64 {
        self.buffers.bytes()
    }

    /// Tokens of the stream so far, from position 0: the position of the next token.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a slot out of range.
    pub fn position(&self, slot: u32) -> Result<u64> {
        Ok(self.slot(slot)?.position)
    }

    /// The block that needs [`Streams::set_memory`] or [`Streams::keep_memory`] before its first token, if any.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a slot out of range.
    pub fn memory_due(&self, slot: u32) -> Result<Option<u64>> {
        let state = self.slot(slot)?;
        Ok(state.memory(&self.shape, slot).is_err().then(|| self.shape.block(state.position)))
    }

    /// Enqueues the memory of the block that the slots enter next: `mem_k`, `mem_v` `[N, 1, rows <= F, Hkv, D]`; no rows say that the block
    /// has no memory. Takes effect with the commit of the block's first token; until then the memory of the block before stays whole.
    ///
    /// A frozen memory that moves, such as sinks that are rotated anew to stay in front of the window, is set at every block.
    ///
    /// # Errors
    /// [`Error::Invalid`] inside a block or for a shape without memory rows; those of [`crate::Backend::append`]; [`Error::Poisoned`].
    pub fn set_memory(
        &mut self,
        plan: &B::Plan,
        queue: &mut B::Queue<'_>,
        slots: &[u32],
        mem_k: View<'_, B::Mem>,
        mem_v: View<'_, B::Mem>,
        scratch: &mut B::Mem,
    ) -> Result<()> {
        self.check(plan, queue, slots)?;
        let Some(mem) = &mut self.buffers.mem else {
            return Err(Error::invalid("mem_len", 0, "set_memory needs a shape with memory rows"));
        };
        let (rows, most) = (mem_k.layout.shape[2], self.shape.mem_len());
        if rows > most {
            return Err(Error::invalid("mem_k", format!("{rows} rows"), format!("at most mem_len = {most}")));
        }
        self.spans.clear();
        for &slot in slots {
            let state = &self.slots[slot as usize];
            state.check_boundary(&self.shape)?;
            self.spans.push(Span {
                mem_rows: rows as u32,
                mem_entry: mutate!("streams-flip-before-write", state.mem_entry ^ 1, state.mem_entry),
                ..Span::new(slot, state.position, 0).with_origin(state.origin)
            });
        }
        let (to_k, to_v) = (ViewMut::new(mem.k.borrow_mut(), mem.layout), ViewMut::new(mem.v.borrow_mut(), mem.layout));
        let append = Append::new(Spans::Host(&self.spans)).mem_rows(mem_k, mem_v, to_k, to_v);
        append.validate(plan, scratch)?;
        // A refusal has enqueued nothing: what was staged before still stands.
        let done = self.backend.append(plan, queue, append, scratch);
        self.poison_if_lost(done)?;
        for &slot in slots {
            self.slots[slot as usize].staged = Staged::Set(rows as u32);
        }
        Ok(())
    }

    /// Lets the memory of the block before serve the next block too: frozen memory. After a block without memory the next has none either.
    ///
    /// # Errors
    /// [`Error::Invalid`] inside a block, for a slot out of range, or where the stream's first block has a memory: there is none before;
    /// [`Error::Poisoned`].
    pub fn keep_memory(&mut self, slots: &[u32]) -> Result<()> {
        for &slot in slots {
            let state = self.live_slot(slot)?;
            state.check_boundary(&self.shape)?;
            let is_first = self.shape.block(state.position) == self.shape.block(state.origin);
            if let (true, Staged::Set(rows)) = (is_first, state.staged) {
                return Err(Error::invalid(
                    "memory",
                    format!("{rows} rows set"),
                    "no block before the stream's first has one to keep",
                ));
            }
        }
        for &slot in slots {
            self.slots[slot as usize].staged = Staged::Kept;
        }
        Ok(())
    }

    /// Enqueues new tokens of some streams, all inside the block that each stream is in: a whole block, or a part of it (decode).
    ///
    /// # Errors
    /// [`Error::MemoryDue`] for a block whose memory was neither set nor kept; [`Error::Poisoned`]; [`Error::Invalid`] for tokens past the
    /// block's end; those of the ops. Errors found before anything is enqueued leave every slot bit for bit as it was.
    pub fn step<'s>(
        &'s mut self,
        plan: &B::Plan,
        queue: &mut B::Queue<'_>,
        step: Step<'_, B::Mem>,
        scratch: &mut B::Mem,
    ) -> Result<Pending<'s>> {
        self.check(plan, queue, step.slots)?;
        self.advance(&step)?;
        let spans = Spans::Host(&self.spans);
        let done = self.buffers.step(&self.backend, plan, queue, spans, step, scratch);
        self.poison_if_lost(done)?;
        Ok(Pending { slots: &mut self.slots, changes: &self.changes })
    }

    /// Forgets the last `tokens` tokens, all of the current block (speculative decoding). Back at the block's first token all is as before
    /// it: the memory that was set or kept for the block still is, and can be exchanged.
    ///
    /// # Errors
    /// [`Error::Invalid`] past the block's first token, or for a slot out of range; [`Error::Poisoned`].
    pub fn rollback(&mut self, slot: u32, tokens: u64) -> Result<()> {
        let most = self.live_slot(slot)?.tokens_in_block(&self.shape);
        if tokens > most {
            return Err(Error::invalid("tokens", tokens, format!("at most {most}: the tokens of the current block")));
        }
        self.slots[slot as usize].position -= tokens;
        Ok(())
    }

    /// Enqueues a copy of stream `from` over stream `to` (shared prefixes), on the device.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a slot out of range; [`Error::Poisoned`] where `from` is; those of the device, which poison `to`.
    pub fn copy_slot(&mut self, queue: &mut B::Queue<'_>, from: u32, to: u32) -> Result<()> {
        self.backend.check_queue(queue)?;
        let state = *self.live_slot(from)?;
        self.slot(to)?;
        if from != to {
            self.slots[to as usize].poisoned = true;
            let done = self.buffers.copy_slot(&self.backend, queue, self.slots.len() as u64, from, to);
            self.poison_if_lost(done)?;
            self.slots[to as usize] = state;
        }
        Ok(())
    }

    /// Makes the slot a fresh stream whose first token has position `origin` (usually 0). Enqueues the clearing of m and z.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a slot out of range; [`Error::LimitExceeded`] for an origin beyond half of `u64`; those of the device, which
    /// poison the slot.
    pub fn reset(&mut self, queue: &mut B::Queue<'_>, slot: u32, origin: u64) -> Result<()> {
        self.backend.check_queue(queue)?;
        self.slot(slot)?;
        if origin > u64::MAX / 2 {
            return Err(Error::LimitExceeded { what: "origin", requested: origin, max: u64::MAX / 2 });
        }
        self.slots[slot as usize].poisoned = true;
        let done = self.buffers.clear_state(&self.backend, queue, self.slots.len() as u64, slot);
        self.poison_if_lost(done)?;
        let first = mutate!("streams-stale-ring-row", origin, origin.saturating_sub(1));
        self.slots[slot as usize] = Slot { origin: first, position: origin, ..Slot::default() };
        Ok(())
    }

    /// Declares the slot's state lost. What [`Streams::set_memory`], [`Streams::step`], [`Streams::copy_slot`], [`Streams::reset`] and
    /// [`Streams::restore`] enqueue takes effect on the device later, and only the caller knows where that never happened: where an encoder
    /// was dropped, say. The slot is refused from then on, until restored or reset. A lost device is noticed, and does this to every slot.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a slot out of range.
    pub fn poison(&mut self, slot: u32) -> Result<()> {
        self.slot(slot)?;
        self.slots[slot as usize].poisoned = true;
        Ok(())
    }

    /// The compressive memory of a slot as its next segment reads it: m `[1, 1, D, Hkv, D]` and z `[1, 1, 1, Hkv, D]`, packed by kv head. For
    /// inspection, and to start a stream from a given state.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a slot out of range or a shape without a compressive memory; [`Error::Poisoned`].
    pub fn infini_state(&mut self, slot: u32) -> Result<[ViewMut<'_, B::Mem>; 2]> {
        let entry = self.live_slot(slot)?.state_entry as usize;
        let Some(i) = &mut self.buffers.infini else {
            return Err(Error::invalid("infini", "absent", "the shape has no compressive memory"));
        };
        let at = |mut layout: Layout| {
            layout.offset = slot as usize * layout.stride[0] + entry * layout.stride[1];
            (layout.shape[0], layout.shape[1]) = (1, 1);
            layout
        };
        Ok([ViewMut::new(i.m.borrow_mut(), at(i.m_layout)), ViewMut::new(i.z.borrow_mut(), at(i.z_layout))])
    }

    /// Fills `spans` and `changes` from the step's slots and lengths.
    fn advance(&mut self, step: &Step<'_, B::Mem>) -> Result<()> {
        match (self.shape.infini(), &step.infini) {
            (Some(_), None) => {
                return Err(Error::invalid("infini", "absent", "a shape with a compressive memory needs un-rotated q and k"));
            }
            (None, Some(_)) => return Err(Error::invalid("infini", "present", "the shape has no compressive memory")),
            _ => {}
        }
        if let Some(lens) = step.lens
            && lens.len() != step.slots.len()
        {
            let rule = format!("one for each of {} slots", step.slots.len());
            return Err(Error::invalid("lens", format!("{} values", lens.len()), rule));
        }
        let all = u32::try_from(step.k.layout.shape[2]).unwrap_or(u32::MAX);
        self.spans.clear();
        self.changes.clear();
        for (n, &slot) in step.slots.iter().enumerate() {
            let len = step.lens.map_or(all, |lens| lens[n]);
            let (span, next) = self.slots[slot as usize].advance(&self.shape, slot, len)?;
            self.spans.push(span);
            self.changes.push((slot, next));
        }
        Ok(())
    }

    /// Checks that the plan fits this state, the queue, and the slots: in range, none twice, none poisoned.
    fn check(&self, plan: &B::Plan, queue: &B::Queue<'_>, slots: &[u32]) -> Result<()> {
        self.check_plan(plan)?;
        self.backend.check_queue(queue)?;
        for (n, &slot) in slots.iter().enumerate() {
            self.live_slot(slot)?;
            if slots[..n].contains(&slot) {
                return Err(Error::invalid("slots", slot, "no slot twice in a call"));
            }
        }
        Ok(())
    }

    pub(crate) fn check_plan(&self, plan: &B::Plan) -> Result<()> {
        let spec = plan.spec();
        let have = (spec.shape(), spec.slots(), spec.ring_rows());
        if have != (&self.shape, self.slots.len(), self.ring_rows) || plan.support().ring_bytes != self.ring_bytes {
            let rule = "the shape, slots and ring_rows that the streams were made with";
            return Err(Error::invalid("plan", format!("{have:?}"), rule));
        }
        Ok(())
    }

    pub(crate) fn slot(&self, slot: u32) -> Result<&Slot> {
        let slots = self.slots.len();
        self.slots.get(slot as usize).ok_or_else(|| Error::invalid("slot", slot, format!("below {slots}, the number of slots")))
    }

    pub(crate) fn live_slot(&self, slot: u32) -> Result<&Slot> {
        match self.slot(slot)? {
            state if state.poisoned => Err(Error::Poisoned { slot }),
            state => Ok(state),
        }
    }

    /// A lost device takes every slot with it.
    pub(crate) fn poison_if_lost<T>(&mut self, done: Result<T>) -> Result<T> {
        if let Err(Error::DeviceLost { .. }) = done {
            self.slots.iter_mut().for_each(|s| s.poisoned = true);
        }
        done
    }
}
