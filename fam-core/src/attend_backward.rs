//! Arguments of `attend_backward`: the gradients of [`crate::Attend`].

use crate::attend::{linear, same_entries};
use crate::door::{Door, Expect};
use crate::span::Extent;
use crate::{Dtype, Error, MemKeys, Memory, Op, Plan, Result, Spans, Spec, View, ViewMut};

/// Gradients of a loss with respect to what [`crate::Attend`] reads, given those with respect to what it returned.
///
/// ```text
/// p_t     = exp(scale·q·k_t − lse)           d_logit_t = p_t (d_o·v_t − d_o·o + d_lse)
/// d_q     = scale Σ_t d_logit_t k_t          d_k_t    += scale d_logit_t q              d_v_t += p_t d_o
/// d_sink += exp(sink − lse) (d_lse − d_o·o)
/// ```
///
/// What belongs to one row of the call (`d_q`) is written. What rows share (`d_k`, `d_v`, those of the memory, `d_sink`) is f32 and **added
/// to**: a key collects from the rows of its own block and of later ones, from memory rows and from every query head of its group, in one
/// call or in many. The caller clears it first. Bytes of keys that no row of the call sees are not touched.
///
/// Keys come from linear caches, since a ring has forgotten. `o` is that of the attention alone: beside a compressive memory the one before
/// the gate ([`crate::Attend::o_local`]), for which the plan's out_dtype is f32. A key that was hidden by an infinity, which the forward pass
/// gives weight 0, is not finite here: hide keys by windows and origins. Gradients flow through window and memory keys alike; who detaches leaves `d_keys` or `d_mem` out.
#[derive(Debug)]
#[non_exhaustive]
pub struct AttendBackward<'a, M: ?Sized> {
    /// As in the forward call.
    pub spans: Spans<'a, M>,
    /// Block rows: `[N, 1, L, Hq, ..]`.
    pub rows: Option<RowsBackward<'a, M>>,
    /// Memory rows: `[N, nb, F, Hq, ..]`.
    pub mem_rows: Option<RowsBackward<'a, M>>,
    /// Keys of the tokens, `[slots, 1, T, Hkv, D]` in the shape's kv_dtype; position j of a stream is row `j − origin` of its slot.
    pub k: View<'a, M>,
    /// Values, as `k`.
    pub v: View<'a, M>,
    /// Keys and values of the memory rows; needed where a span has `mem_rows > 0`.
    pub mem: Option<MemKeys<'a, M>>,
    /// `[Hq]` of f32, as in the forward call.
    pub sink: Option<View<'a, M>>,
    /// Of `k` and `v`: `[slots, 1, T, Hkv, D]` of f32, added to.
    pub d_keys: Option<KeyGradients<'a, M>>,
    /// Of `mem`: `[slots, entries, F, Hkv, D]` of f32, with as many entries, added to.
    pub d_mem: Option<KeyGradients<'a, M>>,
    /// Of `sink`: `[Hq]` of f32, added to.
    pub d_sink: Option<ViewMut<'a, M>>,
}

/// One group of query rows, what the forward call returned for it, and its gradients.
#[derive(Debug)]
pub struct RowsBackward<'a, M: ?Sized> {
    /// Queries in the shape's dtype.
    pub q: View<'a, M>,
    /// Output of the forward call, in the plan's out_dtype.
    pub o: View<'a, M>,
    /// Log-sum-exp of the forward call, f32, the sink included.
    pub lse: View<'a, M>,
    /// Gradient with respect to `o`, in the plan's out_dtype.
    pub d_o: View<'a, M>,
    /// Gradient with respect to `lse`, f32; 0 where absent.
    pub d_lse: Option<View<'a, M>>,
    /// Gradient with respect to `q` in the plan's out_dtype, written; +0 for a row that sees no key.
    pub d_q: ViewMut<'a, M>,
}

/// Gradients with respect to keys and values, f32.
#[derive(Debug)]
pub struct KeyGradients<'a, M: ?Sized> {
    /// Of the keys.
    pub d_k: ViewMut<'a, M>,
    /// Of the values.
    pub d_v: ViewMut<'a, M>,
}

impl<'a, M: ?Sized> RowsBackward<'a, M> {
    /// A group of rows whose log-sum-exp the loss does not depend on.
    pub fn new(q: View<'a, M>, o: View<'a, M>, lse: View<'a, M>, d_o: View<'a, M>, d_q: ViewMut<'a, M>) -> Self {
        RowsBackward { q, o, lse, d_o, d_lse: None, d_q }
    }

    /// Sets the gradient with respect to the log-sum-exp.
    #[must_use]
    pub fn d_lse(mut self, d_lse: View<'a, M>) -> Self {
        self.d_lse = Some(d_lse);
        self
    }
}

impl<'a, M: Memory + ?Sized> AttendBackward<'a, M> {
    /// A backward pass without rows, and without gradients of what rows share; set those that are wanted.
    pub fn new(spans: Spans<'a, M>, k: View<'a, M>, v: View<'a, M>) -> Self {
        let (rows, mem_rows, mem, sink) = (None, None, None, None);
        AttendBackward { spans, rows, mem_rows, k, v, mem, sink, d_keys: None, d_mem: None, d_sink: None }
    }

    /// Sets the block rows.
    #[must_use]
    pub fn rows(mut self, rows: RowsBackward<'a, M>) -> Self {
        self.rows = Some(rows);
        self
    }

    /// Sets the memory rows.
    #[must_use]
    pub fn mem_rows(mut self, mem_rows: RowsBackward<'a, M>) -> Self {
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

    /// Asks for the gradients of the tokens' keys and values.
    #[must_use]
    pub fn d_keys(mut self, d_k: ViewMut<'a, M>, d_v: ViewMut<'a, M>) -> Self {
        self.d_keys = Some(KeyGradients { d_k, d_v });
        self
    }

    /// Asks for the gradients of the memory's keys and values.
    #[must_use]
    pub fn d_mem(mut self, d_k: ViewMut<'a, M>, d_v: ViewMut<'a, M>) -> Self {
        self.d_mem = Some(KeyGradients { d_k, d_v });
        self
    }

    /// Asks for the gradient of the sink logits.
    #[must_use]
    pub fn d_sink(mut self, d_sink: ViewMut<'a, M>) -> Self {
        self.d_sink = Some(d_sink);
        self
    }

    /// Checks every argument and the call's scratch memory against the plan. Backends call this first; kernels then trust.
    ///
    /// # Errors
    /// [`Error::Invalid`] or [`Error::LimitExceeded`], naming field, value and rule.
    pub fn validate(&self, plan: &impl Plan, scratch: &M) -> Result<()> {
        let mut door = Door::open(plan, Op::AttendBackward, scratch)?;
        let spec = plan.spec();
        let shape = spec.shape();
        let extent = door.spans(&self.spans, spec)?;
        let Extent { batch, rows, blocks, slots, .. } = extent;
        if let Some(r) = &self.rows {
            r.validate(&mut door, spec, [batch, 1, rows], ["q", "o", "lse", "d_o", "d_lse", "d_q"])?;
        }
        if let Some(r) = &self.mem_rows {
            let fields = ["mem_q", "mem_o", "mem_lse", "d_mem_o", "d_mem_lse", "d_mem_q"];
            r.validate(&mut door, spec, [batch, blocks, shape.mem_len()], fields)?;
        }
        linear(&mut door, shape, &extent, &self.k, &self.v)?;
        let exactly = [shape.kv_heads(), shape.head_dim()];
        if let Some(d_keys) = &self.d_keys {
            // A kernel that reads its spans itself looks at k alone to stay inside.
            let rows = extent.keys.map_or(self.k.layout.shape[2], |rows| rows as usize);
            d_keys.validate(&mut door, Expect { field: "d_k", dtype: Dtype::F32, at_least: [slots, 1, rows], exactly }, "d_v")?;
        }
        MemKeys::validate(&self.mem, &mut door, &self.spans, spec, &extent)?;
        if let Some(d_mem) = &self.d_mem {
            let Some(MemKeys { k, .. }) = &self.mem else {
                return Err(Error::invalid("d_mem", "present", "needs mem"));
            };
            let at_least = [slots, blocks.min(1), self.spans.mem_rows(spec)];
            d_mem.validate(&mut door, Expect { field: "d_mem_k", dtype: Dtype::F32, at_least, exactly }, "d_mem_v")?;
            same_entries("d_mem_k", &k.layout, &d_mem.d_k.layout)?;
            same_entries("d_mem_v", &k.layout, &d_mem.d_v.layout)?;
        }
        if let Some(sink) = &self.sink {
            door.input(Expect::per_head("sink", shape.heads()), sink)?;
        }
        if let Some(d_sink) = &self.d_sink {
            if self.sink.is_none() {
                return Err(Error::invalid("d_sink", "present", "needs sink"));
            }
            door.output(Expect::per_head("d_sink", shape.heads()), d_sink)?;
        }
        door.close()
    }
}

impl<M: Memory + ?Sized> RowsBackward<'_, M> {
    fn validate<'v>(
        &'v self,
        door: &mut Door<'v, M>,
        spec: &Spec,
        at_least: [usize; 3],
        [q, o, lse, d_o, d_lse, d_q]: [&'static str; 6],
    ) -> Result<()> {
        let shape = spec.shape();
        let expect = Expect { field: q, dtype: shape.dtype(), at_least, exactly: [shape.heads(), shape.head_dim()] };
        door.input(expect, &self.q)?;
        for (field, view) in [(o, &self.o), (d_o, &self.d_o)] {
            door.input(expect.named(field).dtype(spec.out_dtype()), view)?;
        }
        door.input(expect.per_row(lse), &self.lse)?;
        if let Some(view) = &self.d_lse {
            door.input(expect.per_row(d_lse), view)?;
        }
        door.output(expect.named(d_q).dtype(spec.out_dtype()), &self.d_q)
    }
}

impl<M: Memory + ?Sized> KeyGradients<'_, M> {
    pub(crate) fn validate<'v>(&'v self, door: &mut Door<'v, M>, d_k: Expect, d_v: &'static str) -> Result<()> {
        door.output(d_k, &self.d_k)?;
        door.output(d_k.named(d_v), &self.d_v)
    }
}
