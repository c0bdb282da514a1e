//! Arguments of `infini_read_backward` and `infini_write_backward`: the gradients of [`crate::InfiniRead`] and [`crate::InfiniWrite`].

use crate::attend::{check_infini, linear, same_entries};
use crate::door::{Door, Expect};
use crate::infini::states;
use crate::{Dtype, InfiniState, KeyGradients, Memory, Op, Plan, Result, Spans, View, ViewMut};

/// Gradients of a loss with respect to what [`crate::InfiniRead`] reads, given that with respect to its `o`.
///
/// ```text
/// a = s m / (s·z), s = σ(q), g = sigmoid(β)      d_a = g d_o                d_o_local = (1 − g) d_o
/// d_beta += g (1 − g) d_o·(a − o_local)          d_m_ij += s_i d_a_j / (s·z)       d_z_i −= s_i (d_a·a) / (s·z)
/// d_s_i   = (Σ_j m_ij d_a_j − z_i (d_a·a)) / (s·z)                                 d_q   = σ'(q) d_s
/// ```
///
/// `d_q` and `d_o_local`, which belong to one row, are written; `d_m`, `d_z` and `d_beta`, which rows share, are added to. A row whose z is
/// all 0 passes nothing to q, m and z. σ'(0) is 1, that of the exponential.
#[derive(Debug)]
#[non_exhaustive]
pub struct InfiniReadBackward<'a, M: ?Sized> {
    /// As in the forward call.
    pub spans: Spans<'a, M>,
    /// As in the forward call.
    pub state: InfiniState<'a, M>,
    /// The local attention's output, `[N, 1, L, Hq, D]` of f32.
    pub o_local: View<'a, M>,
    /// Gradient with respect to `o`, `[N, 1, L, Hq, D]` in the plan's out_dtype.
    pub d_o: View<'a, M>,
    /// Of `infini_q`: `[N, 1, L, Hq, D]` in the plan's out_dtype, written.
    pub d_q: ViewMut<'a, M>,
    /// Of `o_local`: `[N, 1, L, Hq, D]` of f32, written.
    pub d_o_local: ViewMut<'a, M>,
    /// Of the entries of m and z that were read, f32, added to.
    pub d_state: Option<StateGradients<'a, M>>,
    /// Of `beta`: `[Hq]` of f32, added to.
    pub d_beta: Option<ViewMut<'a, M>>,
}

/// Gradients with respect to the compressive memory, f32, with as many entries as the memory has.
#[derive(Debug)]
pub struct StateGradients<'a, M: ?Sized> {
    /// `[slots, entries, D, Hkv, D]`.
    pub d_m: ViewMut<'a, M>,
    /// `[slots, entries, 1, Hkv, D]`.
    pub d_z: ViewMut<'a, M>,
}

impl<'a, M: Memory + ?Sized> InfiniReadBackward<'a, M> {
    /// A backward pass without gradients of what rows share.
    pub fn new(
        spans: Spans<'a, M>,
        state: InfiniState<'a, M>,
        o_local: View<'a, M>,
        d_o: View<'a, M>,
        d_q: ViewMut<'a, M>,
        d_o_local: ViewMut<'a, M>,
    ) -> Self {
        InfiniReadBackward { spans, state, o_local, d_o, d_q, d_o_local, d_state: None, d_beta: None }
    }

    /// Asks for the gradients of the entries that were read.
    #[must_use]
    pub fn d_state(mut self, d_m: ViewMut<'a, M>, d_z: ViewMut<'a, M>) -> Self {
        self.d_state = Some(StateGradients { d_m, d_z });
        self
    }

    /// Asks for the gradient of the gate's β.
    #[must_use]
    pub fn d_beta(mut self, d_beta: ViewMut<'a, M>) -> Self {
        self.d_beta = Some(d_beta);
        self
    }

    /// Checks every argument and the call's scratch memory against the plan. Backends call this first; kernels then trust.
    ///
    /// # Errors
    /// [`crate::Error::Invalid`] or [`crate::Error::LimitExceeded`], naming field, value and rule.
    pub fn validate(&self, plan: &impl Plan, scratch: &M) -> Result<()> {
        let mut door = Door::open(plan, Op::InfiniReadBackward, scratch)?;
        let spec = plan.spec();
        let shape = spec.shape();
        let extent = door.spans(&self.spans, spec)?;
        self.state.validate(&mut door, shape, &extent)?;
        let at_least = [extent.batch, 1, extent.rows];
        let exactly = [shape.heads(), shape.head_dim()];
        let expect = Expect { field: "d_infini_q", dtype: spec.out_dtype(), at_least, exactly };
        door.input(expect.named("o_local").dtype(Dtype::F32), &self.o_local)?;
        door.input(expect.named("d_o"), &self.d_o)?;
        door.output(expect, &self.d_q)?;
        door.output(expect.named("d_o_local").dtype(Dtype::F32), &self.d_o_local)?;
        if let Some(StateGradients { d_m, d_z }) = &self.d_state {
            let [m, z] = states(shape, extent.slots, extent.blocks.max(1), ["d_m", "d_z"]);
            door.output(m, d_m)?;
            door.output(z, d_z)?;
            same_entries("d_m", &self.state.m.layout, &d_m.layout)?;
            same_entries("d_z", &self.state.m.layout, &d_z.layout)?;
        }
        if let Some(d_beta) = &self.d_beta {
            door.output(Expect::per_head("d_beta", shape.heads()), d_beta)?;
        }
        door.close()
    }
}

/// Gradients of a loss with respect to what [`crate::InfiniWrite`] reads. Segment i of the call takes the gradient of what it wrote from entry
/// `(state_entry + i + 1) mod entries` of `d_m`, `d_z` and adds that of what it read to the entry before, the last segment first.
///
/// ```text
/// m' = m + Σ_t s_tᵀ u_t, z' = z + Σ_t s_t, s = σ(k)         u = v (linear), u = v − s m / (s·z) (delta)
/// d_u_t = s_t d_m'        d_v += d_u        d_s_ti = Σ_j d_m'_ij u_tj + d_z'_i        d_k += σ'(k) d_s        d_m += d_m'        d_z += d_z'
/// ```
///
/// With delta, as [`InfiniReadBackward`] has it, −d_u is the gradient of what was read. A segment that began before the stream's origin only
/// passes `d_m`, `d_z` on.
#[derive(Debug)]
#[non_exhaustive]
pub struct InfiniWriteBackward<'a, M: ?Sized> {
    /// As in the forward call.
    pub spans: Spans<'a, M>,
    /// Un-rotated keys, `[slots, 1, T, Hkv, D]` in the shape's kv_dtype: linear, for a ring has forgotten.
    pub k: View<'a, M>,
    /// Values, as `k`.
    pub v: View<'a, M>,
    /// The states that the segments read, in the entries that they read: `[slots, entries, D, Hkv, D]` of f32.
    pub m: View<'a, M>,
    /// `[slots, entries, 1, Hkv, D]` of f32.
    pub z: View<'a, M>,
    /// Gradients with respect to the states: read where a segment wrote, added to where it read. At least one entry more than segments.
    pub d_state: StateGradients<'a, M>,
    /// Of `k` and `v`: `[slots, 1, T, Hkv, D]` of f32, added to.
    pub d_keys: Option<KeyGradients<'a, M>>,
}

impl<'a, M: Memory + ?Sized> InfiniWriteBackward<'a, M> {
    /// A backward pass that stops at the keys.
    pub fn new(spans: Spans<'a, M>, [k, v]: [View<'a, M>; 2], [m, z]: [View<'a, M>; 2], [d_m, d_z]: [ViewMut<'a, M>; 2]) -> Self {
        InfiniWriteBackward { spans, k, v, m, z, d_state: StateGradients { d_m, d_z }, d_keys: None }
    }

    /// Asks for the gradients of keys and values.
    #[must_use]
    pub fn d_keys(mut self, d_k: ViewMut<'a, M>, d_v: ViewMut<'a, M>) -> Self {
        self.d_keys = Some(KeyGradients { d_k, d_v });
        self
    }

    /// Checks every argument and the call's scratch memory against the plan. Backends call this first; kernels then trust.
    ///
    /// # Errors
    /// [`crate::Error::Invalid`] or [`crate::Error::LimitExceeded`], naming field, value and rule.
    pub fn validate(&self, plan: &impl Plan, scratch: &M) -> Result<()> {
        let mut door = Door::open(plan, Op::InfiniWriteBackward, scratch)?;
        let spec = plan.spec();
        let shape = spec.shape();
        check_infini(shape)?;
        let extent = door.spans(&self.spans, spec)?;
        linear(&mut door, shape, &extent, &self.k, &self.v)?;
        let entries = extent.blocks + 1;
        let [m, z] = states(shape, extent.slots, entries, ["m", "z"]);
        door.input(m, &self.m)?;
        door.input(z, &self.z)?;
        same_entries("z", &self.m.layout, &self.z.layout)?;
        let StateGradients { d_m, d_z } = &self.d_state;
        door.output(m.named("d_m"), d_m)?;
        door.output(z.named("d_z"), d_z)?;
        same_entries("d_m", &self.m.layout, &d_m.layout)?;
        same_entries("d_z", &self.m.layout, &d_z.layout)?;
        if let Some(d_keys) = &self.d_keys {
            // A kernel that reads its spans itself looks at k alone to stay inside.
            let rows = extent.keys.map_or(self.k.layout.shape[2], |rows| rows as usize);
            let exactly = [shape.kv_heads(), shape.head_dim()];
            let d_k = Expect { field: "d_k", dtype: Dtype::F32, at_least: [extent.slots, 1, rows], exactly };
            d_keys.validate(&mut door, d_k, "d_v")?;
        }
        door.close()
    }
}
