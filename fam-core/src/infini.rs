//! Arguments of `infini_read` and `infini_write`: the compressive memory of Infini-attention (arXiv 2404.07143, Eq. 5–11).

use crate::attend::same_entries;
use crate::backend::check_op;
use crate::view::{Expect, check_bytes, check_overlap};
use crate::{Dtype, Error, InfiniState, Keys, Memory, Op, Plan, Result, Spans, View, ViewMut};

/// Reads the compressive memory and gates it into the local attention:
/// a = σ(q) m / (σ(q)·z), o = g·a + (1−g)·o_local. The unfused form of [`crate::Attend::infini`].
#[derive(Debug)]
#[non_exhaustive]
pub struct InfiniRead<'a, M: ?Sized> {
    /// Which tokens, each stream's slot, and the entry of its state.
    pub spans: Spans<'a, M>,
    /// Un-rotated queries, memory and gate.
    pub state: InfiniState<'a, M>,
    /// The local attention's output, `[N, 1, L, Hq, D]` of f32.
    pub o_local: View<'a, M>,
    /// `[N, 1, L, Hq, D]` in the plan's out_dtype.
    pub o: ViewMut<'a, M>,
}

impl<'a, M: Memory + ?Sized> InfiniRead<'a, M> {
    /// All arguments.
    pub fn new(spans: Spans<'a, M>, state: InfiniState<'a, M>, o_local: View<'a, M>, o: ViewMut<'a, M>) -> Self {
        InfiniRead { spans, state, o_local, o }
    }

    /// Checks every argument and the call's scratch memory against the plan. Backends call this first; kernels then trust.
    ///
    /// # Errors
    /// [`Error::Invalid`] or [`Error::LimitExceeded`], naming field, value and rule.
    pub fn validate(&self, plan: &impl Plan, scratch: &M) -> Result<()> {
        check_op(plan, Op::InfiniRead)?;
        let spec = plan.spec();
        check_bytes("scratch", scratch, plan.support().scratch_bytes)?;
        let shape = spec.shape();
        let extent = self.spans.validate(spec)?;
        self.state.validate(spec, &extent)?;
        let at_least = [extent.batch, 1, extent.rows];
        let expect = Expect { field: "o_local", dtype: Dtype::F32, at_least, exactly: [shape.heads(), shape.head_dim()] };
        expect.input(&self.o_local)?;
        Expect { field: "o", dtype: spec.out_dtype(), ..expect }.output(&self.o)?;
        let [q, m, z, beta] = self.state.named();
        let o_local = Some(("o_local", self.o_local.mem, Some(&self.o_local.layout)));
        check_overlap(
            &[Some(("scratch", scratch, None)), Some(("o", &*self.o.mem, Some(&self.o.layout)))],
            &[q, m, z, beta, o_local, self.spans.named()],
        )
    }
}

/// Writes the whole segments (blocks) that the call's tokens complete: segment i of the call is read from entry
/// `(state_entry + i) mod entries` of `m`, `z` and written to the entry after it. A segment that began before the stream's origin
/// is passed over: its entry is copied.
#[derive(Debug)]
#[non_exhaustive]
pub struct InfiniWrite<'a, M: ?Sized> {
    /// Which tokens, each stream's slot, and the entry of its state.
    pub spans: Spans<'a, M>,
    /// Un-rotated keys, and values, of the segments: all tokens of each, also those of earlier calls.
    pub keys: Keys<'a, M>,
    /// `[slots, entries, D, Hkv, D]` of f32, at least one entry more than segments in the call.
    pub m: ViewMut<'a, M>,
    /// `[slots, entries, 1, Hkv, D]` of f32.
    pub z: ViewMut<'a, M>,
}

impl<'a, M: Memory + ?Sized> InfiniWrite<'a, M> {
    /// All arguments.
    pub fn new(spans: Spans<'a, M>, keys: Keys<'a, M>, m: ViewMut<'a, M>, z: ViewMut<'a, M>) -> Self {
        InfiniWrite { spans, keys, m, z }
    }

    /// Checks every argument and the call's scratch memory against the plan. Backends call this first; kernels then trust.
    ///
    /// # Errors
    /// [`Error::Invalid`] or [`Error::LimitExceeded`], naming field, value and rule.
    pub fn validate(&self, plan: &impl Plan, scratch: &M) -> Result<()> {
        check_op(plan, Op::InfiniWrite)?;
        let spec = plan.spec();
        check_bytes("scratch", scratch, plan.support().scratch_bytes)?;
        let shape = spec.shape();
        if shape.infini().is_none() {
            return Err(Error::invalid("infini", "infini_write", "the shape has no compressive memory"));
        }
        let extent = self.spans.validate(spec)?;
        self.keys.validate(plan, &extent)?;
        let (d, kv) = (shape.head_dim(), shape.kv_heads());
        let entries = extent.blocks + 1;
        Expect { field: "m", dtype: Dtype::F32, at_least: [extent.slots, entries, d], exactly: [kv, d] }.output(&self.m)?;
        Expect { field: "z", dtype: Dtype::F32, at_least: [extent.slots, entries, 1], exactly: [kv, d] }.output(&self.z)?;
        same_entries(&self.m.layout, &self.z.layout)?;
        let [k, v] = self.keys.named();
        check_overlap(
            &[
                Some(("scratch", scratch, None)),
                Some(("m", &*self.m.mem, Some(&self.m.layout))),
                Some(("z", &*self.z.mem, Some(&self.z.layout))),
            ],
            &[k, v, self.spans.named()],
        )
    }
}
