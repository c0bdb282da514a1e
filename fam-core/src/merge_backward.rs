//! Arguments of `merge_backward`: the gradients of [`crate::Merge`].

use crate::door::Door;
use crate::merge::whole;
use crate::{Memory, Op, Partial, Plan, Result, View, ViewMut};

/// Gradients of a loss with respect to the parts of a [`crate::Merge`], given those with respect to its `o` and `lse`.
///
/// ```text
/// p_a = e^lse_a / (e^lse_a + e^lse_b)        d_o_a = p_a d_o        d_lse_a = p_a (p_b d_o·(o_a − o_b) + d_lse)
/// ```
///
/// Both are written; an empty part (lse = −inf) gets +0.
#[derive(Debug)]
#[non_exhaustive]
pub struct MergeBackward<'a, M: ?Sized> {
    /// One part, as in the forward call.
    pub a: Partial<'a, M>,
    /// The other part.
    pub b: Partial<'a, M>,
    /// Gradient with respect to `o`, `[N, nb, L, Hq, D]` in the plan's out_dtype. Its sizes are the call's.
    pub d_o: View<'a, M>,
    /// Gradient with respect to `lse`, `[N, nb, L, Hq, 1]` of f32; 0 where absent.
    pub d_lse: Option<View<'a, M>>,
    /// Gradients of part `a`.
    pub d_a: PartialGradients<'a, M>,
    /// Gradients of part `b`.
    pub d_b: PartialGradients<'a, M>,
}

/// Gradients with respect to one part.
#[derive(Debug)]
pub struct PartialGradients<'a, M: ?Sized> {
    /// `[N, nb, L, Hq, D]` in the plan's out_dtype.
    pub d_o: ViewMut<'a, M>,
    /// `[N, nb, L, Hq, 1]` of f32.
    pub d_lse: ViewMut<'a, M>,
}

impl<'a, M: Memory + ?Sized> MergeBackward<'a, M> {
    /// Gradients of `a` and `b` into `d_a` and `d_b`, for a loss that does not depend on the `lse` of the union.
    pub fn new([a, b]: [Partial<'a, M>; 2], d_o: View<'a, M>, [d_a, d_b]: [PartialGradients<'a, M>; 2]) -> Self {
        MergeBackward { a, b, d_o, d_lse: None, d_a, d_b }
    }

    /// Sets the gradient with respect to the log-sum-exp of the union.
    #[must_use]
    pub fn d_lse(mut self, d_lse: View<'a, M>) -> Self {
        self.d_lse = Some(d_lse);
        self
    }

    /// Checks every argument and the call's scratch memory against the plan. Backends call this first; kernels then trust.
    ///
    /// # Errors
    /// [`crate::Error::Invalid`], naming field, value and rule.
    pub fn validate(&self, plan: &impl Plan, scratch: &M) -> Result<()> {
        let mut door = Door::open(plan, Op::MergeBackward, scratch)?;
        let spec = plan.spec();
        let dtype = spec.shape().dtype();
        let expect = whole(spec, "d_o", &self.d_o.layout)?;
        self.a.validate(&mut door, expect, dtype, ["o_a", "lse_a"])?;
        self.b.validate(&mut door, expect, dtype, ["o_b", "lse_b"])?;
        door.input(expect, &self.d_o)?;
        if let Some(d_lse) = &self.d_lse {
            door.input(expect.per_row("d_lse"), d_lse)?;
        }
        for (gradients, [d_o, d_lse]) in [(&self.d_a, ["d_o_a", "d_lse_a"]), (&self.d_b, ["d_o_b", "d_lse_b"])] {
            door.output(expect.named(d_o), &gradients.d_o)?;
            door.output(expect.per_row(d_lse), &gradients.d_lse)?;
        }
        door.close()
    }
}
