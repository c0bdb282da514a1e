//! Arguments of `merge`: attention over two disjoint key sets becomes attention over their union.

use crate::door::{Door, Expect};
use crate::{Dtype, Layout, Memory, Op, Plan, Result, Spec, View, ViewMut};

/// o = (e^lse_a·o_a + e^lse_b·o_b) / (e^lse_a + e^lse_b), lse = ln(e^lse_a + e^lse_b). An lse of −inf means "no keys"; two of them
/// give o = +0, lse = −inf. A sink belongs to exactly one part.
#[derive(Debug)]
#[non_exhaustive]
pub struct Merge<'a, M: ?Sized> {
    /// One part.
    pub a: Partial<'a, M>,
    /// The other part.
    pub b: Partial<'a, M>,
    /// `[N, nb, L, Hq, D]` in the plan's out_dtype. Its sizes are the call's.
    pub o: ViewMut<'a, M>,
    /// `[N, nb, L, Hq, 1]` of f32.
    pub lse: Option<ViewMut<'a, M>>,
}

/// Attention over a part of the keys.
#[derive(Debug)]
pub struct Partial<'a, M: ?Sized> {
    /// `[N, nb, L, Hq, D]` in f32 or the shape's dtype.
    pub o: View<'a, M>,
    /// `[N, nb, L, Hq, 1]` of f32.
    pub lse: View<'a, M>,
}

impl<'a, M: Memory + ?Sized> Merge<'a, M> {
    /// Merges `a` and `b` into `o`.
    pub fn new(a: Partial<'a, M>, b: Partial<'a, M>, o: ViewMut<'a, M>) -> Self {
        Merge { a, b, o, lse: None }
    }

    /// Asks for the log-sum-exp of the union too.
    #[must_use]
    pub fn lse(mut self, lse: ViewMut<'a, M>) -> Self {
        self.lse = Some(lse);
        self
    }

    /// Checks every argument and the call's scratch memory against the plan. Backends call this first; kernels then trust.
    ///
    /// # Errors
    /// [`crate::Error::Invalid`], naming field, value and rule.
    pub fn validate(&self, plan: &impl Plan, scratch: &M) -> Result<()> {
        let mut door = Door::open(plan, Op::Merge, scratch)?;
        let spec = plan.spec();
        let expect = whole(spec, "o", &self.o.layout)?;
        self.a.validate(&mut door, expect, spec.shape().dtype(), ["o_a", "lse_a"])?;
        self.b.validate(&mut door, expect, spec.shape().dtype(), ["o_b", "lse_b"])?;
        door.output(expect, &self.o)?;
        if let Some(lse) = &self.lse {
            door.output(expect.per_row("lse"), lse)?;
        }
        door.close()
    }
}

/// What is expected of all tensors of a call whose sizes `layout` gives.
pub(crate) fn whole(spec: &Spec, field: &'static str, layout: &Layout) -> Result<Expect> {
    let [batch, blocks, rows, ..] = layout.shape;
    let (heads, d) = (spec.shape().heads(), spec.shape().head_dim());
    crate::shape::elements("elements of o", &[batch, blocks, rows, heads, d])?;
    Ok(Expect { field, dtype: spec.out_dtype(), at_least: [batch, blocks, rows], exactly: [heads, d] })
}

impl<M: Memory + ?Sized> Partial<'_, M> {
    pub(crate) fn validate<'v>(
        &'v self,
        door: &mut Door<'v, M>,
        expect: Expect,
        dtype: Dtype,
        [o, lse]: [&'static str; 2],
    ) -> Result<()> {
        door.input(expect.named(o).wide(dtype, &self.o)?, &self.o)?;
        door.input(expect.per_row(lse), &self.lse)
    }
}
