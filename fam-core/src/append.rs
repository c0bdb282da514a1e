//! Arguments of `append`: new keys and values enter the cached tensors.

use crate::attend::same_entries;
use crate::door::{Door, Expect};
use crate::span::Extent;
use crate::{Memory, Op, Plan, Result, Spans, View, ViewMut};

/// Copies (converts, packs) new keys and values to where `attend` reads them. Either group may be absent.
#[derive(Debug)]
#[non_exhaustive]
pub struct Append<'a, M: ?Sized> {
    /// Which tokens, and each stream's slot.
    pub spans: Spans<'a, M>,
    /// The tokens' keys and values, into the key ring: position j goes to row `(j − origin) mod C` of the slot.
    pub rows: Option<AppendRows<'a, M>>,
    /// Keys and values of memory rows: `span.mem_rows` rows for each block that the span touches (at least one), into entry
    /// `(mem_entry + i) mod entries` of the slot.
    pub mem_rows: Option<AppendMem<'a, M>>,
}

/// Source and destination of new tokens.
#[derive(Debug)]
pub struct AppendRows<'a, M: ?Sized> {
    /// `[N, 1, L, Hkv, D]` in the shape's dtype.
    pub k: View<'a, M>,
    /// As `k`.
    pub v: View<'a, M>,
    /// The key ring, in the backend's own layout: [`crate::Support::ring_bytes`] bytes.
    pub ring: &'a mut M,
}

/// Source and destination of new memory rows.
#[derive(Debug)]
pub struct AppendMem<'a, M: ?Sized> {
    /// `[N, nb, F, Hkv, D]` in the shape's dtype.
    pub k: View<'a, M>,
    /// As `k`.
    pub v: View<'a, M>,
    /// `[slots, entries, F, Hkv, D]` in the shape's kv_dtype.
    pub to_k: ViewMut<'a, M>,
    /// As `to_k`, with as many entries.
    pub to_v: ViewMut<'a, M>,
}

impl<'a, M: Memory + ?Sized> Append<'a, M> {
    /// An append of nothing; set `rows`, `mem_rows` or both.
    pub fn new(spans: Spans<'a, M>) -> Self {
        Append { spans, rows: None, mem_rows: None }
    }

    /// Adds the tokens' keys and values.
    #[must_use]
    pub fn rows(mut self, k: View<'a, M>, v: View<'a, M>, ring: &'a mut M) -> Self {
        self.rows = Some(AppendRows { k, v, ring });
        self
    }

    /// Adds keys and values of memory rows.
    #[must_use]
    pub fn mem_rows(mut self, k: View<'a, M>, v: View<'a, M>, to_k: ViewMut<'a, M>, to_v: ViewMut<'a, M>) -> Self {
        self.mem_rows = Some(AppendMem { k, v, to_k, to_v });
        self
    }

    /// Checks every argument and the call's scratch memory against the plan. Backends call this first; kernels then trust.
    ///
    /// # Errors
    /// [`crate::Error::Invalid`] or [`crate::Error::LimitExceeded`], naming field, value and rule.
    pub fn validate(&self, plan: &impl Plan, scratch: &M) -> Result<()> {
        let mut door = Door::open(plan, Op::Append, scratch)?;
        let spec = plan.spec();
        let shape = spec.shape();
        let Extent { batch, rows, blocks, slots, .. } = door.spans(&self.spans, spec)?;
        let exactly = [shape.kv_heads(), shape.head_dim()];
        if let Some(AppendRows { k, v, ring }) = &self.rows {
            let expect = Expect { field: "k", dtype: shape.dtype(), at_least: [batch, 1, rows], exactly };
            door.input(expect, k)?;
            door.input(expect.named("v"), v)?;
            door.ring_mut(ring, plan)?;
        }
        if let Some(AppendMem { k, v, to_k, to_v }) = &self.mem_rows {
            let mem_len = self.spans.mem_rows(spec);
            let expect = Expect { field: "mem_k", dtype: shape.dtype(), at_least: [batch, blocks.max(1), mem_len], exactly };
            door.input(expect, k)?;
            door.input(expect.named("mem_v"), v)?;
            let expect = Expect { field: "to_k", dtype: shape.kv_dtype(), at_least: [slots, blocks.max(1), mem_len], exactly };
            door.output(expect, to_k)?;
            door.output(expect.named("to_v"), to_v)?;
            same_entries("to_v", &to_k.layout, &to_v.layout)?;
        }
        door.close()
    }
}

/// Copies cached keys and values out of a ring: the inverse of [`Append::rows`], for snapshots.
#[derive(Debug)]
#[non_exhaustive]
pub struct ReadRing<'a, M: ?Sized> {
    /// Which tokens, and each stream's slot. All of them are in the ring.
    pub spans: Spans<'a, M>,
    /// The key ring, in the backend's own layout.
    pub ring: &'a M,
    /// `[N, 1, L, Hkv, D]` in the shape's kv_dtype.
    pub k: ViewMut<'a, M>,
    /// As `k`.
    pub v: ViewMut<'a, M>,
}

impl<'a, M: Memory + ?Sized> ReadRing<'a, M> {
    /// All arguments.
    pub fn new(spans: Spans<'a, M>, ring: &'a M, k: ViewMut<'a, M>, v: ViewMut<'a, M>) -> Self {
        ReadRing { spans, ring, k, v }
    }

    /// Checks every argument against the plan.
    ///
    /// # Errors
    /// [`crate::Error::Invalid`] or [`crate::Error::LimitExceeded`], naming field, value and rule.
    pub fn validate(&self, plan: &impl Plan) -> Result<()> {
        let spec = plan.spec();
        let shape = spec.shape();
        let mut door = Door::new();
        let Extent { batch, rows, .. } = door.spans(&self.spans, spec)?;
        door.ring(self.ring, plan)?;
        let exactly = [shape.kv_heads(), shape.head_dim()];
        let expect = Expect { field: "k", dtype: shape.kv_dtype(), at_least: [batch, 1, rows], exactly };
        door.output(expect, &self.k)?;
        door.output(expect.named("v"), &self.v)?;
        door.close()
    }
}
