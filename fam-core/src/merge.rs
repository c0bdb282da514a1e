//! Arguments of `merge`: attention over two disjoint key sets becomes attention over their union.

use crate::backend::check_op;
use crate::view::{Expect, Named, check_bytes, check_overlap};
use crate::{Dtype, Error, Memory, Op, Plan, Result, View, ViewMut};

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
    /// [`Error::Invalid`], naming field, value and rule.
    pub fn validate(&self, plan: &impl Plan, scratch: &M) -> Result<()> {
        check_op(plan, Op::Merge)?;
        let spec = plan.spec();
        check_bytes("scratch", scratch, plan.support().scratch_bytes)?;
        let shape = spec.shape();
        let [batch, blocks, rows, ..] = self.o.layout.shape;
        let at_least = [batch, blocks, rows];
        let (heads, d) = (shape.heads(), shape.head_dim());
        crate::shape::elements("elements of o", &[batch, blocks, rows, heads, d])?;
        for (part, names) in [(&self.a, ["o_a", "lse_a"]), (&self.b, ["o_b", "lse_b"])] {
            let dtype = part.o.layout.dtype;
            if dtype != Dtype::F32 && dtype != shape.dtype() {
                return Err(Error::invalid(names[0], dtype, format!("dtype f32 or {}", shape.dtype())));
            }
            Expect { field: names[0], dtype, at_least, exactly: [heads, d] }.input(&part.o)?;
            Expect { field: names[1], dtype: Dtype::F32, at_least, exactly: [heads, 1] }.input(&part.lse)?;
        }
        Expect { field: "o", dtype: spec.out_dtype(), at_least, exactly: [heads, d] }.output(&self.o)?;
        if let Some(lse) = &self.lse {
            Expect { field: "lse", dtype: Dtype::F32, at_least, exactly: [heads, 1] }.output(lse)?;
        }
        fn named<'v, M: ?Sized>(name: &'static str, v: &'v View<'_, M>) -> Option<Named<'v, M>> {
            Some((name, v.mem, Some(&v.layout)))
        }
        check_overlap(
            &[Some(("o", &*self.o.mem, Some(&self.o.layout))), self.lse.as_ref().map(|l| ("lse", &*l.mem, Some(&l.layout)))],
            &[named("o_a", &self.a.o), named("lse_a", &self.a.lse), named("o_b", &self.b.o), named("lse_b", &self.b.lse)],
        )
    }
}
