//! Arguments of `attend`: one joint softmax over window, memory and the current block.

use crate::backend::check_op;
use crate::span::Extent;
use crate::view::{Expect, Named, check_bytes, check_overlap, check_ring};
use crate::{Dtype, Error, Memory, Op, Plan, Result, Spans, Spec, View, ViewMut};

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

impl<'a, M: Memory + ?Sized> Keys<'a, M> {
    pub(crate) fn validate(&self, plan: &impl Plan, extent: &Extent) -> Result<()> {
        let shape = plan.spec().shape();
        match self {
            Keys::Strided { k, v } => {
                let rows = usize::try_from(extent.keys.unwrap_or(0)).map_err(|_| {
                    Error::invalid("k", "linear cache", "more keys than memory can hold: use a ring or a later origin")
                })?;
                let at_least = [extent.slots, 1, rows];
                let exactly = [shape.kv_heads(), shape.head_dim()];
                let expect = Expect { field: "k", dtype: shape.kv_dtype(), at_least, exactly };
                expect.input(k)?;
                // Where only the kernel knows the positions, it looks at k alone to stay inside both.
                let rows = if extent.keys.is_none() { k.layout.shape[2] } else { rows };
                Expect { field: "v", at_least: [extent.slots, 1, rows], ..expect }.input(v)
            }
            Keys::Ring(_) if plan.spec().ring_rows() == 0 => {
                Err(Error::invalid("keys", "a ring", "linear caches: the plan was made without append, and so without a ring"))
            }
            Keys::Ring(ring) => check_ring(*ring, plan),
        }
    }

    /// The views, named, for overlap checks.
    pub(crate) fn named(&self) -> [Option<Named<'_, M>>; 2] {
        match self {
            Keys::Strided { k, v } => [Some(("k", k.mem, Some(&k.layout))), Some(("v", v.mem, Some(&v.layout)))],
            Keys::Ring(ring) => [Some(("ring", ring, None)), None],
        }
    }
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

impl<M: Memory + ?Sized> InfiniState<'_, M> {
    pub(crate) fn validate(&self, spec: &Spec, extent: &Extent) -> Result<()> {
        let shape = spec.shape();
        if shape.infini().is_none() {
            return Err(Error::invalid("infini", "present", "the shape has no compressive memory"));
        }
        let (d, kv) = (shape.head_dim(), shape.kv_heads());
        let &Extent { batch, rows, blocks, slots, .. } = extent;
        let q = Expect { field: "infini_q", dtype: shape.dtype(), at_least: [batch, 1, rows], exactly: [shape.heads(), d] };
        q.input(&self.q)?;
        let entries = blocks.max(1);
        Expect { field: "m", dtype: Dtype::F32, at_least: [slots, entries, d], exactly: [kv, d] }.input(&self.m)?;
        Expect { field: "z", dtype: Dtype::F32, at_least: [slots, entries, 1], exactly: [kv, d] }.input(&self.z)?;
        same_entries(&self.m.layout, &self.z.layout)?;
        per_head("beta", &self.beta, shape.heads())
    }

    pub(crate) fn named(&self) -> [Option<Named<'_, M>>; 4] {
        [("infini_q", &self.q), ("m", &self.m), ("z", &self.z), ("beta", &self.beta)]
            .map(|(name, v)| Some((name, v.mem, Some(&v.layout))))
    }
}

/// `m` and `z` count their entries alike, since one `state_entry` serves both.
pub(crate) fn same_entries(m: &crate::Layout, z: &crate::Layout) -> Result<()> {
    if m.shape[1] != z.shape[1] {
        return Err(Error::invalid("z", format!("{} entries", z.shape[1]), format!("as many as m: {}", m.shape[1])));
    }
    Ok(())
}

pub(crate) fn per_head<M: Memory + ?Sized>(field: &'static str, view: &View<'_, M>, heads: usize) -> Result<()> {
    Expect { field, dtype: Dtype::F32, at_least: [1, 1, 1], exactly: [heads, 1] }.input(view)
}

impl<'a, M: Memory + ?Sized> Attend<'a, M> {
    /// An attend without rows; set `rows`, `mem_rows` or both.
    pub fn new(spans: Spans<'a, M>, keys: Keys<'a, M>) -> Self {
        Attend { spans, rows: None, mem_rows: None, keys, mem: None, sink: None, infini: None }
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

    /// Checks every argument and the call's scratch memory against the plan. Backends call this first; kernels then trust.
    ///
    /// # Errors
    /// [`Error::Invalid`] or [`Error::LimitExceeded`], naming field, value and rule.
    pub fn validate(&self, plan: &impl Plan, scratch: &M) -> Result<()> {
        check_op(plan, Op::Attend)?;
        let spec = plan.spec();
        check_bytes("scratch", scratch, plan.support().scratch_bytes)?;
        let shape = spec.shape();
        let extent = self.spans.validate(spec)?;
        let Extent { batch, rows, blocks, slots, .. } = extent;
        let (heads, d) = (shape.heads(), shape.head_dim());
        if let Some(r) = &self.rows {
            r.validate(spec, [batch, 1, rows], ["q", "o", "lse"])?;
        }
        if let Some(r) = &self.mem_rows {
            r.validate(spec, [batch, blocks, shape.mem_len()], ["mem_q", "mem_o", "mem_lse"])?;
        }
        self.keys.validate(plan, &extent)?;
        match &self.mem {
            Some(MemKeys { k, v }) => {
                let at_least = [slots, blocks.min(1), self.spans.mem_rows(spec)];
                let exactly = [shape.kv_heads(), d];
                let expect = Expect { field: "mem_k", dtype: shape.kv_dtype(), at_least, exactly };
                expect.input(k)?;
                Expect { field: "mem_v", ..expect }.input(v)?;
                if k.layout.shape[1] != v.layout.shape[1] {
                    return Err(Error::invalid("mem_v", format!("{} entries", v.layout.shape[1]), "as many as mem_k"));
                }
            }
            None if self.spans.has_mem_rows() => {
                return Err(Error::invalid("mem", "absent", "needed where a span has mem_rows > 0"));
            }
            None => {}
        }
        if let Some(sink) = &self.sink {
            per_head("sink", sink, heads)?;
        }
        if let Some(infini) = &self.infini {
            infini.validate(spec, &extent)?;
        }
        let [k, v] = self.keys.named();
        let [iq, m, z, beta] = self.infini.as_ref().map_or([None; 4], |i| i.named());
        let (r, mr) = (self.rows.as_ref(), self.mem_rows.as_ref());
        check_overlap(
            &[
                Some(("scratch", scratch, None)),
                r.map(|r| ("o", &*r.o.mem, Some(&r.o.layout))),
                r.and_then(|r| r.lse.as_ref()).map(|l| ("lse", &*l.mem, Some(&l.layout))),
                mr.map(|r| ("mem_o", &*r.o.mem, Some(&r.o.layout))),
                mr.and_then(|r| r.lse.as_ref()).map(|l| ("mem_lse", &*l.mem, Some(&l.layout))),
            ],
            &[
                r.map(|r| ("q", r.q.mem, Some(&r.q.layout))),
                mr.map(|r| ("mem_q", r.q.mem, Some(&r.q.layout))),
                k,
                v,
                self.mem.as_ref().map(|m| ("mem_k", m.k.mem, Some(&m.k.layout))),
                self.mem.as_ref().map(|m| ("mem_v", m.v.mem, Some(&m.v.layout))),
                self.sink.as_ref().map(|s| ("sink", s.mem, Some(&s.layout))),
                iq,
                m,
                z,
                beta,
                self.spans.named(),
            ],
        )
    }
}

impl<M: Memory + ?Sized> Rows<'_, M> {
    fn validate(&self, spec: &Spec, at_least: [usize; 3], [q, o, lse]: [&'static str; 3]) -> Result<()> {
        let shape = spec.shape();
        let expect = Expect { field: q, dtype: shape.dtype(), at_least, exactly: [shape.heads(), shape.head_dim()] };
        expect.input(&self.q)?;
        Expect { field: o, dtype: spec.out_dtype(), ..expect }.output(&self.o)?;
        if let Some(view) = &self.lse {
            Expect { field: lse, dtype: Dtype::F32, at_least, exactly: [shape.heads(), 1] }.output(view)?;
        }
        Ok(())
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
