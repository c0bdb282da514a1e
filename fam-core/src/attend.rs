//! Arguments of `attend`: one joint softmax over window, memory and the current block.

use crate::door::{Door, Expect};
use crate::infini::states;
use crate::span::Extent;
use crate::{Dtype, Error, Layout, Memory, Op, Plan, Result, Shape, Spans, Spec, View, ViewMut};

/// Block rows over window, memory keys and their own block, and memory rows over memory keys and the block, in one launch.
/// Either row group may be absent (TransformerFAM, Alg. 2; without memory rows and keys Alg. 1).
#[derive(Debug)]
#[non_exhaustive]
pub struct Attend<'a, M: ?Sized> {
    /// Which tokens, and each stream's slot. Also names the blocks where `rows` is absent.
    pub spans: Spans<'a, M>,
    /// Block rows: `q`, `o` `[N, 1, L, Hq, D]`, `lse` `[N, 1, L, Hq, 1]`.
    pub rows: Option<Rows<'a, M>>,
    /// Memory rows: `q`, `o` `[N, nb, F, Hq, D]`, `lse` `[N, nb, F, Hq, 1]`. All F of them, whatever `span.mem_rows`.
    pub mem_rows: Option<Rows<'a, M>>,
    /// Keys and values of the tokens, those of this call included.
    pub keys: Keys<'a, M>,
    /// Keys and values of the memory rows; needed where a span has `mem_rows > 0`.
    pub mem: Option<MemKeys<'a, M>>,
    /// `[Hq]` of f32: a logit per query head that joins every row's denominator and carries a zero value.
    pub sink: Option<View<'a, M>>,
    /// The compressive memory, read and gated into `rows` in the same launch.
    pub infini: Option<InfiniState<'a, M>>,
    /// `[N, 1, L, Hq, D]` of f32: the block rows' output before the gate, for the backward pass. Only beside `infini`.
    pub o_local: Option<ViewMut<'a, M>>,
}

/// One group of query rows with its outputs.
#[derive(Debug)]
pub struct Rows<'a, M: ?Sized> {
    /// Queries in the shape's dtype.
    pub q: View<'a, M>,
    /// Output in the plan's out_dtype.
    pub o: ViewMut<'a, M>,
    /// Natural logarithm of the softmax denominator, f32, the sink included; −inf for an empty row.
    pub lse: Option<ViewMut<'a, M>>,
}

impl<'a, M: ?Sized> Rows<'a, M> {
    /// Queries and output.
    pub fn new(q: View<'a, M>, o: ViewMut<'a, M>) -> Self {
        Rows { q, o, lse: None }
    }

    /// The same rows, borrowed for less long.
    pub fn reborrow(&mut self) -> Rows<'_, M> {
        Rows { q: self.q, o: self.o.reborrow(), lse: self.lse.as_mut().map(ViewMut::reborrow) }
    }

    /// Asks for the log-sum-exp too.
    #[must_use]
    pub fn lse(mut self, lse: ViewMut<'a, M>) -> Self {
        self.lse = Some(lse);
        self
    }
}

/// Where keys and values of tokens come from.
#[derive(Debug)]
#[non_exhaustive]
pub enum Keys<'a, M: ?Sized> {
    /// Linear caches `[slots, 1, T, Hkv, D]` in the shape's dtype; position j of a stream is row `j − origin` of its slot.
    Strided {
        /// Keys.
        k: View<'a, M>,
        /// Values.
        v: View<'a, M>,
    },
    /// The key ring that `append` fills, in the backend's own layout.
    Ring(&'a M),
}

impl<M: ?Sized> Clone for Keys<'_, M> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<M: ?Sized> Copy for Keys<'_, M> {}

impl<M: Memory + ?Sized> Keys<'_, M> {
    pub(crate) fn validate<'v>(&'v self, door: &mut Door<'v, M>, plan: &impl Plan, extent: &Extent) -> Result<()> {
        match self {
            Keys::Strided { k, v } => linear(door, plan.spec().shape(), extent, k, v),
            Keys::Ring(ring) => door.ring(*ring, plan),
        }
    }
}

/// Checks linear caches.
pub(crate) fn linear<'v, M: Memory + ?Sized>(
    door: &mut Door<'v, M>,
    shape: &Shape,
    extent: &Extent,
    k: &'v View<'_, M>,
    v: &'v View<'_, M>,
) -> Result<()> {
    let rows = usize::try_from(extent.keys.unwrap_or(0))
        .map_err(|_| Error::invalid("k", "linear cache", "more keys than memory can hold: use a ring or a later origin"))?;
    let at_least = [extent.slots, 1, rows];
    let expect = Expect { field: "k", dtype: shape.kv_dtype(), at_least, exactly: [shape.kv_heads(), shape.head_dim()] };
    door.input(expect, k)?;
    // Where only the kernel knows the positions, it looks at k alone to stay inside both.
    let rows = if extent.keys.is_none() { k.layout.shape[2] } else { rows };
    door.input(Expect { field: "v", at_least: [extent.slots, 1, rows], ..expect }, v)
}

/// Keys and values of memory rows, `[slots, entries, F, Hkv, D]` in the shape's kv_dtype; see [`crate::Span::mem_entry`].
#[derive(Debug)]
pub struct MemKeys<'a, M: ?Sized> {
    /// Keys.
    pub k: View<'a, M>,
    /// Values.
    pub v: View<'a, M>,
}

/// The compressive memory as a reader sees it.
#[derive(Debug)]
pub struct InfiniState<'a, M: ?Sized> {
    /// Queries without rotary positions, `[N, 1, L, Hq, D]` in the shape's dtype.
    pub q: View<'a, M>,
    /// `[slots, entries, D, Hkv, D]` of f32 ([`crate::Layout::infini_m`]); see [`crate::Span::state_entry`].
    pub m: View<'a, M>,
    /// `[slots, entries, 1, Hkv, D]` of f32.
    pub z: View<'a, M>,
    /// `[Hq]` of f32: the gate is g = sigmoid(β), on the memory branch.
    pub beta: View<'a, M>,
}

impl<M: Memory + ?Sized> MemKeys<'_, M> {
    /// Checks the memory keys of a call, or that it needs none.
    pub(crate) fn validate<'v>(
        mem: &'v Option<Self>,
        door: &mut Door<'v, M>,
        spans: &Spans<'_, M>,
        spec: &Spec,
        extent: &Extent,
    ) -> Result<()> {
        let Some(MemKeys { k, v }) = mem else {
            return match spans.has_mem_rows() {
                true => Err(Error::invalid("mem", "absent", "needed where a span has mem_rows > 0")),
                false => Ok(()),
            };
        };
        let shape = spec.shape();
        let at_least = [extent.slots, extent.blocks.min(1), spans.mem_rows(spec)];
        let expect = Expect { field: "mem_k", dtype: shape.kv_dtype(), at_least, exactly: [shape.kv_heads(), shape.head_dim()] };
        door.input(expect, k)?;
        door.input(expect.named("mem_v"), v)?;
        same_entries("mem_v", &k.layout, &v.layout)
    }
}

impl<M: Memory + ?Sized> InfiniState<'_, M> {
    pub(crate) fn validate<'v>(&'v self, door: &mut Door<'v, M>, shape: &Shape, extent: &Extent) -> Result<()> {
        check_infini(shape)?;
        let &Extent { batch, rows, blocks, slots, .. } = extent;
        let exactly = [shape.heads(), shape.head_dim()];
        door.input(Expect { field: "infini_q", dtype: shape.dtype(), at_least: [batch, 1, rows], exactly }, &self.q)?;
        let [m, z] = states(shape, slots, blocks.max(1), ["m", "z"]);
        door.input(m, &self.m)?;
        door.input(z, &self.z)?;
        same_entries("z", &self.m.layout, &self.z.layout)?;
        door.input(Expect::per_head("beta", shape.heads()), &self.beta)
    }
}

/// Refuses a compressive memory that the shape lacks.
pub(crate) fn check_infini(shape: &Shape) -> Result<()> {
    match shape.infini() {
        Some(_) => Ok(()),
        None => Err(Error::invalid("infini", "present", "the shape has no compressive memory")),
    }
}

/// Tensors whose entries one number of the span counts have as many of them.
pub(crate) fn same_entries(field: &'static str, one: &Layout, other: &Layout) -> Result<()> {
    if one.shape[1] != other.shape[1] {
        let rule = format!("{} entries, as its partner has", one.shape[1]);
        return Err(Error::invalid(field, format!("{} entries", other.shape[1]), rule));
    }
    Ok(())
}

impl<'a, M: Memory + ?Sized> Attend<'a, M> {
    /// An attend without rows; set `rows`, `mem_rows` or both.
    pub fn new(spans: Spans<'a, M>, keys: Keys<'a, M>) -> Self {
        Attend { spans, rows: None, mem_rows: None, keys, mem: None, sink: None, infini: None, o_local: None }
    }

    /// Sets the block rows.
    #[must_use]
    pub fn rows(mut self, rows: Rows<'a, M>) -> Self {
        self.rows = Some(rows);
        self
    }

    /// Sets the memory rows: the memory self-update. Without them the memory is frozen.
    #[must_use]
    pub fn mem_rows(mut self, mem_rows: Rows<'a, M>) -> Self {
        self.mem_rows = Some(mem_rows);
        self
    }

    /// Sets keys and values of the memory rows.
    #[must_use]
    pub fn mem(mut self, k: View<'a, M>, v: View<'a, M>) -> Self {
        self.mem = Some(MemKeys { k, v });
        self
    }

    /// Sets the sink logits.
    #[must_use]
    pub fn sink(mut self, sink: View<'a, M>) -> Self {
        self.sink = Some(sink);
        self
    }

    /// Fuses the read of the compressive memory.
    #[must_use]
    pub fn infini(mut self, infini: InfiniState<'a, M>) -> Self {
        self.infini = Some(infini);
        self
    }

    /// Asks for the output before the gate too.
    #[must_use]
    pub fn o_local(mut self, o_local: ViewMut<'a, M>) -> Self {
        self.o_local = Some(o_local);
        self
    }

    /// Checks every argument and the call's scratch memory against the plan. Backends call this first; kernels then trust.
    ///
    /// # Errors
    /// [`Error::Invalid`] or [`Error::LimitExceeded`], naming field, value and rule.
    pub fn validate(&self, plan: &impl Plan, scratch: &M) -> Result<()> {
        let mut door = Door::open(plan, Op::Attend, scratch)?;
        let spec = plan.spec();
        let shape = spec.shape();
        let extent = door.spans(&self.spans, spec)?;
        let Extent { batch, rows, blocks, .. } = extent;
        if let Some(r) = &self.rows {
            r.validate(&mut door, spec, [batch, 1, rows], ["q", "o", "lse"])?;
        }
        if let Some(r) = &self.mem_rows {
            r.validate(&mut door, spec, [batch, blocks, shape.mem_len()], ["mem_q", "mem_o", "mem_lse"])?;
        }
        self.keys.validate(&mut door, plan, &extent)?;
        MemKeys::validate(&self.mem, &mut door, &self.spans, spec, &extent)?;
        if let Some(sink) = &self.sink {
            door.input(Expect::per_head("sink", shape.heads()), sink)?;
        }
        if let Some(infini) = &self.infini {
            infini.validate(&mut door, shape, &extent)?;
        }
        if let Some(o_local) = &self.o_local {
            if self.infini.is_none() || self.rows.is_none() {
                return Err(Error::invalid("o_local", "present", "needs rows and infini: elsewhere o is not gated"));
            }
            let exactly = [shape.heads(), shape.head_dim()];
            door.output(Expect { field: "o_local", dtype: Dtype::F32, at_least: [batch, 1, rows], exactly }, o_local)?;
        }
        door.close()
    }
}

impl<M: Memory + ?Sized> Rows<'_, M> {
    fn validate<'v>(
        &'v self,
        door: &mut Door<'v, M>,
        spec: &Spec,
        at_least: [usize; 3],
        [q, o, lse]: [&'static str; 3],
    ) -> Result<()> {
        let shape = spec.shape();
        let expect = Expect { field: q, dtype: shape.dtype(), at_least, exactly: [shape.heads(), shape.head_dim()] };
        door.input(expect, &self.q)?;
        door.output(expect.named(o).dtype(spec.out_dtype()), &self.o)?;
        match &self.lse {
            Some(view) => door.output(expect.per_row(lse), view),
            None => Ok(()),
        }
    }
}

impl<M: Memory + ?Sized> Spans<'_, M> {
    /// The most memory rows that any span names; F where only the kernel knows.
    pub(crate) fn mem_rows(&self, spec: &Spec) -> usize {
        match self {
            Spans::Host(spans) => spans.iter().map(|s| s.mem_rows as usize).max().unwrap_or(0),
            Spans::Device { .. } => spec.shape().mem_len(),
        }
    }

    fn has_mem_rows(&self) -> bool {
        matches!(self, Spans::Host(spans) if spans.iter().any(|s| s.mem_rows > 0))
    }
}
