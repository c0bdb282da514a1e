//! The device's part of all streams of a layer: memory, and the ops over it.

use super::Step;
use crate::{
    Append, Attend, Device, InfiniState, InfiniWrite, Keys, Layout, Memory, Plan, Result, Rows, Spans, View, ViewMut, mutate,
};
use std::borrow::{Borrow, BorrowMut};

/// Every buffer is slot-major, so that a slot is one page of it.
pub(crate) struct Buffers<B: Device> {
    pub ring: B::Owned,
    pub mem: Option<MemBuffers<B::Owned>>,
    pub infini: Option<InfiniBuffers<B::Owned>>,
}

/// Keys and values of the memory rows, packed `[slots, 2, F, Hkv, D]`: the current entry and the next.
pub(crate) struct MemBuffers<O> {
    pub k: O,
    pub v: O,
    pub layout: Layout,
}

/// The compressive memory, current entry and next, and a ring of un-rotated keys from which a completed segment is written.
pub(crate) struct InfiniBuffers<O> {
    pub ring: O,
    pub m: O,
    pub m_layout: Layout,
    pub z: O,
    pub z_layout: Layout,
}

impl<O> InfiniBuffers<O> {
    /// The write of a step: nothing for streams whose segment is not complete yet.
    fn write<'a, M: ?Sized + Memory>(&'a mut self, spans: Spans<'a, M>) -> InfiniWrite<'a, M>
    where
        O: BorrowMut<M>,
    {
        let (m, z) = (ViewMut::new(self.m.borrow_mut(), self.m_layout), ViewMut::new(self.z.borrow_mut(), self.z_layout));
        InfiniWrite::new(spans, Keys::Ring(self.ring.borrow()), m, z)
    }
}

impl<B: Device> Buffers<B> {
    pub fn new(backend: &B, plan: &B::Plan) -> Result<Self> {
        let spec = plan.spec();
        let shape = spec.shape();
        let (slots, kv, d) = (spec.slots(), shape.kv_heads(), shape.head_dim());
        let ring = || backend.alloc(plan.support().ring_bytes);
        let tensor = |layout: &Layout| backend.alloc(layout.end_bytes().unwrap_or(u64::MAX));
        let mem = match shape.mem_len() {
            0 => None,
            f => {
                let layout = Layout::packed(shape.kv_dtype(), [slots, 2, f, kv, d]);
                Some(MemBuffers { k: tensor(&layout)?, v: tensor(&layout)?, layout })
            }
        };
        let infini = match shape.infini() {
            None => None,
            Some(_) => {
                let (m_layout, z_layout) = (Layout::infini_m(slots, 2, kv, d), Layout::infini_z(slots, 2, kv, d));
                Some(InfiniBuffers { ring: ring()?, m: tensor(&m_layout)?, m_layout, z: tensor(&z_layout)?, z_layout })
            }
        };
        Ok(Buffers { ring: ring()?, mem, infini })
    }

    /// Sizes in bytes, all buffers together.
    pub fn bytes(&self) -> u64 {
        self.all().into_iter().flatten().map(|o| o.borrow().bytes()).sum()
    }

    fn all(&self) -> [Option<&B::Owned>; 6] {
        let (mem, infini) = (self.mem.as_ref(), self.infini.as_ref());
        [
            Some(&self.ring),
            mem.map(|m| &m.k),
            mem.map(|m| &m.v),
            infini.map(|i| &i.ring),
            infini.map(|i| &i.m),
            infini.map(|i| &i.z),
        ]
    }

    fn all_mut(&mut self) -> [Option<&mut B::Owned>; 6] {
        let [mem_k, mem_v] = match &mut self.mem {
            Some(m) => [Some(&mut m.k), Some(&mut m.v)],
            None => [None, None],
        };
        let [ring, m, z] = match &mut self.infini {
            Some(i) => [Some(&mut i.ring), Some(&mut i.m), Some(&mut i.z)],
            None => [None, None, None],
        };
        [Some(&mut self.ring), mem_k, mem_v, ring, m, z]
    }

    /// Enqueues a copy of page `from` over page `to`, of every buffer.
    pub fn copy_slot(&mut self, backend: &B, queue: &mut B::Queue<'_>, slots: u64, from: u32, to: u32) -> Result<()> {
        for owned in self.all_mut().into_iter().flatten() {
            let mem: &mut B::Mem = owned.borrow_mut();
            let page = mem.bytes() / slots;
            let start = u64::from(from) * page;
            backend.copy_within(queue, mem, start..start + page, u64::from(to) * page)?;
        }
        Ok(())
    }

    /// Enqueues m = z = 0 for one slot.
    pub fn clear_state(&mut self, backend: &B, queue: &mut B::Queue<'_>, slots: u64, slot: u32) -> Result<()> {
        let Some(i) = mutate!("streams-reset-keeps-m", &mut self.infini, &mut None::<InfiniBuffers<B::Owned>>) else {
            return Ok(());
        };
        for owned in [&mut i.m, &mut i.z] {
            let mem: &mut B::Mem = owned.borrow_mut();
            let page = mem.bytes() / slots;
            let start = u64::from(slot) * page;
            backend.clear(queue, mem, start..start + page)?;
        }
        Ok(())
    }

    /// Checks every op of a step before the first is enqueued, then enqueues them.
    pub fn step(
        &mut self,
        backend: &B,
        plan: &B::Plan,
        queue: &mut B::Queue<'_>,
        spans: Spans<'_, B::Mem>,
        mut step: Step<'_, B::Mem>,
        scratch: &mut B::Mem,
    ) -> Result<()> {
        Append::new(spans).rows(step.k, step.v, self.ring.borrow_mut()).validate(plan, scratch)?;
        if let (Some(i), Some(u)) = (&mut self.infini, &step.infini) {
            Append::new(spans).rows(u.k, step.v, i.ring.borrow_mut()).validate(plan, scratch)?;
        }
        self.attend(spans, &mut step).validate(plan, scratch)?;
        if let Some(i) = &mut self.infini {
            i.write(spans).validate(plan, scratch)?;
        }

        backend.append(plan, queue, Append::new(spans).rows(step.k, step.v, self.ring.borrow_mut()), scratch)?;
        if step.rows.is_some() || step.mem_rows.is_some() {
            backend.attend(plan, queue, self.attend(spans, &mut step), scratch)?;
        }
        if let (Some(i), Some(u)) = (&mut self.infini, &step.infini) {
            let k = mutate!("infini-rotated-keys", u.k, step.k);
            backend.append(plan, queue, Append::new(spans).rows(k, step.v, i.ring.borrow_mut()), scratch)?;
            backend.infini_write(plan, queue, i.write(spans), scratch)?;
        }
        Ok(())
    }

    /// The attend of a step.
    fn attend<'a>(&'a self, spans: Spans<'a, B::Mem>, step: &'a mut Step<'_, B::Mem>) -> Attend<'a, B::Mem> {
        let mut args = Attend::new(spans, Keys::Ring(self.ring.borrow()));
        args.rows = step.rows.as_mut().map(Rows::reborrow);
        args.mem_rows = step.mem_rows.as_mut().map(Rows::reborrow);
        args.sink = step.sink;
        if let Some(mem) = &self.mem {
            args = args.mem(View::new(mem.k.borrow(), mem.layout), View::new(mem.v.borrow(), mem.layout));
        }
        if let (Some(i), Some(u)) = (&self.infini, &step.infini) {
            let (m, z) = (View::new(i.m.borrow(), i.m_layout), View::new(i.z.borrow(), i.z_layout));
            args = args.infini(InfiniState { q: u.q, m, z, beta: u.beta });
        }
        args
    }
}
