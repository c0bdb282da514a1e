//! Arguments of `infini_read` and `infini_write`: the compressive memory of Infini-attention (arXiv 2404.07143, Eq. 5–11).

use crate::attend::{check_infini, same_entries};
use crate::door::{Door, Expect};
use crate::{Dtype, InfiniState, Keys, Memory, Op, Plan, Result, Shape, Spans, View, ViewMut};

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
    /// [`crate::Error::Invalid`] or [`crate::Error::LimitExceeded`], naming field, value and rule.
    pub fn validate(&self, plan: &impl Plan, scratch: &M) -> Result<()> {
        let mut door = Door::open(plan, Op::InfiniRead, scratch)?;
        let spec = plan.spec();
        let shape = spec.shape();
        let extent = door.spans(&self.spans, spec)?;
        self.state.validate(&mut door, shape, &extent)?;
        let at_least = [extent.batch, 1, extent.rows];
        let expect = Expect { field: "o_local", dtype: Dtype::F32, at_least, exactly: [shape.heads(), shape.head_dim()] };
        door.input(expect, &self.o_local)?;
        door.output(expect.named("o").dtype(spec.out_dtype()), &self.o)?;
        door.close()
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
    /// [`crate::Error::Invalid`] or [`crate::Error::LimitExceeded`], naming field, value and rule.
    pub fn validate(&self, plan: &impl Plan, scratch: &M) -> Result<()> {
        let mut door = Door::open(plan, Op::InfiniWrite, scratch)?;
        let spec = plan.spec();
        let shape = spec.shape();
        check_infini(shape)?;
        let extent = door.spans(&self.spans, spec)?;
        self.keys.validate(&mut door, plan, &extent)?;
        let [m, z] = states(shape, extent.slots, extent.blocks + 1, ["m", "z"]);
        door.output(m, &self.m)?;
        door.output(z, &self.z)?;
        same_entries("z", &self.m.layout, &self.z.layout)?;
        door.close()
    }
}

/// m and z of so many slots and entries, or their gradients.
pub(crate) fn states(shape: &Shape, slots: usize, entries: usize, [m, z]: [&'static str; 2]) -> [Expect; 2] {
    let (d, exactly) = (shape.head_dim(), [shape.kv_heads(), shape.head_dim()]);
    [(m, d), (z, 1)].map(|(field, rows)| Expect { field, dtype: Dtype::F32, at_least: [slots, entries, rows], exactly })
}
