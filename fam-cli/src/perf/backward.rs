//! A case of the backward pass: `attend_backward` over linear caches, given what `attend` has returned, and its check.

use super::case::PerfCase;
use super::check::{Head, array, each_kv_head, f32s, heads_of, one_block};
use super::driver::{Held, Inputs, Prepared, Tensors, tensor};
use fam::{
    Attend, AttendBackward, Backend, Device, Dtype, Keys, Layout, Op, Plan, Result, Rows, RowsBackward, Shape, Span, Spans,
};
use fam_ref::{Array, AttendGradients, AttendUpstream, Attended};
use fam_testkit::{Element, Harness, Mem, Owned, Tally, Tensor, Tolerance, tiny};
use std::borrow::BorrowMut;

/// Block rows or memory rows: queries, what `attend` returns for them, the loss's gradients with respect to that and to the queries.
struct Group<H: Harness> {
    q: Held<H>,
    o: Held<H>,
    lse: Held<H>,
    d_o: Held<H>,
    d_q: Held<H>,
}

impl<H: Harness> Group<H> {
    fn new(h: &H, q: &Tensor, d_o: &Tensor, layout: Layout) -> Result<Self> {
        let [n, blocks, rows, heads, _] = layout.shape;
        let output = |layout| Held::output(h, layout);
        let lse = output(Layout::packed(Dtype::F32, [n, blocks, rows, heads, 1]))?;
        let [q, d_o] = [Held::input(h, &q.data, layout)?, Held::input(h, &d_o.data, layout)?];
        Ok(Group { q, o: output(layout)?, lse, d_o, d_q: output(layout)? })
    }

    fn forward(&mut self) -> Rows<'_, Mem<H>> {
        Rows::new(self.q.view(), self.o.view_mut()).lse(self.lse.view_mut())
    }

    fn backward(&mut self) -> RowsBackward<'_, Mem<H>> {
        let Group { q, o, lse, d_o, d_q } = self;
        RowsBackward::new(q.view(), o.view(), lse.view(), d_o.view(), d_q.view_mut())
    }
}

/// A case ready to run. Gradients of keys and values collect from sample to sample, as they do over the calls of a training step.
pub struct Backward<'h, H: Harness> {
    h: &'h H,
    case: PerfCase,
    shape: Shape,
    spans: Vec<Span>,
    plan: <H::Backend as Backend>::Plan,
    scratch: Owned<H>,
    inputs: Inputs,
    d_o: [Tensor; 2],
    groups: [Group<H>; 2],
    kv: [Held<H>; 2],
    mem: [Held<H>; 2],
    d_keys: [Held<H>; 2],
    d_mem: [Held<H>; 2],
}

impl<'h, H: Harness> Backward<'h, H> {
    /// Allocates the case and runs its forward pass.
    pub fn new(h: &'h H, case: PerfCase, dtype: Dtype) -> Result<Self> {
        let PerfCase { heads, kv_heads, head_dim: d, batch, history, rows, mem_len, .. } = case;
        let (backend, shape) = (h.backend(), case.shape(dtype)?);
        let spec = shape.spec(batch, rows).slots(batch).ops(&[Op::Attend, Op::AttendBackward]);
        let plan = backend.plan(&spec.build()?)?;
        let inputs = Inputs::new(&case, dtype);
        let d_o = [("d_o", &inputs.q), ("d_mem_o", &inputs.mem_q)].map(|(name, q)| tensor(name, dtype, &q.shape));
        let of_rows = Layout::tokens(dtype, [batch, rows, heads, d]);
        let of_mem_rows = Layout::packed(dtype, [batch, 1, mem_len, heads, d]);
        let of_keys = |dtype| Layout::tokens(dtype, [batch, history + rows, kv_heads, d]);
        let of_mem = |dtype| Layout::packed(dtype, [batch, 1, mem_len, kv_heads, d]);
        let pair = |[k, v]: [&Tensor; 2], layout| {
            Ok::<_, fam::Error>([Held::input(h, &k.data, layout)?, Held::input(h, &v.data, layout)?])
        };
        let zeros = |layout| Ok::<_, fam::Error>([Held::output(h, layout)?, Held::output(h, layout)?]);
        let span = |n| Span::new(n as u32, history as u64, rows as u32).with_mem_rows(mem_len as u32);
        let mut driver = Backward {
            spans: (0..batch).map(span).collect(),
            scratch: backend.alloc(plan.support().scratch_bytes)?,
            groups: [Group::new(h, &inputs.q, &d_o[0], of_rows)?, Group::new(h, &inputs.mem_q, &d_o[1], of_mem_rows)?],
            kv: pair([&inputs.k, &inputs.v], of_keys(dtype))?,
            mem: pair([&inputs.mem_k, &inputs.mem_v], of_mem(dtype))?,
            d_keys: zeros(of_keys(Dtype::F32))?,
            d_mem: zeros(of_mem(Dtype::F32))?,
            h,
            case,
            shape,
            plan,
            inputs,
            d_o,
        };
        h.run(&mut |queue| {
            let Backward { spans, plan, scratch, groups: [rows, mem_rows], kv: [k, v], mem: [mem_k, mem_v], .. } = &mut driver;
            let keys = Keys::Strided { k: k.view(), v: v.view() };
            let mut args = Attend::new(Spans::Host(spans), keys).rows(rows.forward());
            if mem_len > 0 {
                args = args.mem(mem_k.view(), mem_v.view()).mem_rows(mem_rows.forward());
            }
            backend.attend(plan, queue, args, scratch.borrow_mut())
        })?;
        Ok(driver)
    }
}

impl<H: Harness> Prepared for Backward<'_, H> {
    fn kernel(&self) -> String {
        self.plan.support().kernel(Op::AttendBackward).map_or_else(String::new, |id| id.to_string())
    }

    fn sample(&mut self) -> Result<()> {
        let h = self.h;
        let Backward { spans, plan, scratch, groups: [rows, mem_rows], kv: [k, v], mem: [mem_k, mem_v], d_keys, d_mem, .. } =
            self;
        let (has_memory, [d_k, d_v], [d_mem_k, d_mem_v]) = (self.case.mem_len > 0, d_keys, d_mem);
        h.run(&mut |queue| {
            let mut args = AttendBackward::new(Spans::Host(spans), k.view(), v.view());
            args = args.rows(rows.backward()).d_keys(d_k.view_mut(), d_v.view_mut());
            if has_memory {
                args = args.mem(mem_k.view(), mem_v.view()).mem_rows(mem_rows.backward());
                args = args.d_mem(d_mem_k.view_mut(), d_mem_v.view_mut());
            }
            h.backend().attend_backward(plan, queue, args, scratch.borrow_mut())
        })
    }

    /// Of a case that has run no sample yet: its gradients begin at 0.
    fn check(&mut self) -> Result<(Tally, Tensors)> {
        self.sample()?;
        let call = Call::first(self)?;
        let verdict = each_kv_head(self.case.kv_heads, |kv_head, tally| call.head(kv_head, tally))?;
        Ok((verdict, call.tensors()))
    }
}

/// The gradients, in the order in which everything here has them.
const GRADIENTS: [&str; 6] = ["d_q", "d_mem_q", "d_k", "d_v", "d_mem_k", "d_mem_v"];

/// The first sample: what went in, and what came out. Each `[N, rows, heads, ..]`, first of block rows, then of memory rows.
struct Call {
    case: PerfCase,
    shape: Shape,
    /// What the kernel rounds probabilities to.
    p16: Option<Dtype>,
    q: [Array<4>; 2],
    o: [Array<4>; 2],
    lse: [Array<4>; 2],
    d_o: [Array<4>; 2],
    kv: [Array<4>; 2],
    mem: [Array<4>; 2],
    gradients: [Array<4>; 6],
}

impl Call {
    fn first<H: Harness>(driver: &Backward<'_, H>) -> Result<Self> {
        let Backward { h, case, shape, inputs, groups: [rows, mem_rows], d_keys: [d_k, d_v], d_mem: [d_mem_k, d_mem_v], .. } =
            driver;
        let host = |held: &Held<H>| Ok::<_, fam::Error>(array(&held.download(h)?));
        Ok(Call {
            case: *case,
            shape: *shape,
            p16: h.limits().p16_backward.contains(&shape.dtype()).then_some(shape.dtype()),
            q: [&inputs.q, &inputs.mem_q].map(array),
            o: [host(&rows.o)?, host(&mem_rows.o)?],
            lse: [host(&rows.lse)?, host(&mem_rows.lse)?],
            d_o: driver.d_o.each_ref().map(array),
            kv: [&inputs.k, &inputs.v].map(array),
            mem: [&inputs.mem_k, &inputs.mem_v].map(array),
            gradients: [host(&rows.d_q)?, host(&mem_rows.d_q)?, host(d_k)?, host(d_v)?, host(d_mem_k)?, host(d_mem_v)?],
        })
    }

    /// All in f32, which holds the values of every dtype.
    fn tensors(&self) -> Tensors {
        let ([q, mem_q], [d_o, d_mem_o], [k, v], [mem_k, mem_v]) = (&self.q, &self.d_o, &self.kv, &self.mem);
        let inputs = [("q", q), ("k", k), ("v", v), ("d_o", d_o)];
        let of_memory = [("mem_q", mem_q), ("mem_k", mem_k), ("mem_v", mem_v), ("d_mem_o", d_mem_o)];
        let all = inputs.into_iter().chain(of_memory).chain(GRADIENTS.into_iter().zip(&self.gradients));
        all.map(|(name, array)| (name, f32s(&array.shape, &array.data))).collect()
    }

    /// The gradients of one kv head against the reference's, given the very o and lse that the kernel was given.
    fn head(&self, kv_head: usize, tally: &mut Tally) -> Result<()> {
        let group = self.shape.group();
        let (own, heads) = (kv_head..kv_head + 1, kv_head * group..(kv_head + 1) * group);
        let head = Head::new(&self.case, &self.shape, kv_head, &self.q, &self.kv, &self.mem)?;
        let of_group = |arrays: &[Array<4>; 2]| arrays.each_ref().map(|a| one_block(heads_of(a, heads.clone())));
        let ([o, mem_o], [lse, mem_lse], [d_o, d_mem_o]) = (of_group(&self.o), of_group(&self.lse), of_group(&self.d_o));
        // Of the results of the forward pass only these two are read.
        let unread = Array::zeros([0; 4]);
        let saved = |o, lse: Array<5>| {
            let [n, blocks, count, heads, _] = lse.shape;
            let lse = Array { shape: [n, blocks, count, heads], data: lse.data };
            let [s, n, v_max] = [0; 3].map(|_| unread.clone());
            fam_ref::Rows { o, lse, a: Array::zeros([0; 5]), s, n, v_max }
        };
        let mem_rows = head.mem_q.is_some().then(|| saved(mem_o, mem_lse));
        let saved = Attended { rows: Some(saved(o, lse)), mem_rows };
        let d_mem_o = head.mem_q.as_ref().map(|_| &d_mem_o);
        let upstream = AttendUpstream { d_o: Some(&d_o), d_mem_o, ..AttendUpstream::default() };
        let gradients = fam_ref::attend_backward(&head.args(), &saved, &upstream)?;
        let errors = self.errors(&head, &saved, &upstream, &gradients);

        for (i, (expected, errors)) in in_order(&gradients).into_iter().zip(in_order(&errors)).enumerate() {
            let (Some(([_, rows, count, d], expected)), Some((_, errors))) = (expected, errors) else { continue };
            let (heads, dtype) = if i < 2 { (heads.clone(), self.shape.dtype()) } else { (own.clone(), Dtype::F32) };
            let got = heads_of(&self.gradients[i], heads.clone()).data;
            // A bound above all of them would judge none.
            let magnitude = expected.iter().fold(0.0f64, |most, x| most.max(x.abs()));
            for (x, ((got, expected), error)) in got.iter().zip(expected).zip(errors).enumerate() {
                let index = [x / (rows * count * d), 0, x / (count * d) % rows, heads.start + x / d % count, x % d];
                let bound = error + dtype.unit_roundoff() * expected.abs() + tiny(dtype);
                tally.near(Element { tensor: GRADIENTS[i], index }, *got, *expected, Tolerance { bound, magnitude });
            }
        }
        Ok(())
    }

    /// What rounding makes of each gradient before it is stored. For a row and a key, with S = scale·‖q‖‖k‖ and T = ‖d_o‖(‖v‖ + ‖o‖):
    ///
    /// ```text
    /// p = exp(s − lse)               relative error     e = expm1(u·((D+4) S + 2|lse| + 3|s − lse| + 8))
    /// d_logit = p (d_o·v − d_o·o)    error              p T (e + u·(D+8)), for |d_o·v| + |d_o·o| ≤ T
    /// sums of n terms x              error              Σ errors + u·(n+4)·Σ|x|
    /// ```
    ///
    /// A kernel that rounds p to 16 bits before a product, and so d_logit, loses 1.01 u16 of each beside that.
    fn errors(&self, head: &Head, saved: &Attended, upstream: &AttendUpstream<'_>, like: &AttendGradients) -> AttendGradients {
        const U: f64 = 1.0 / (1u64 << 24) as f64;
        let PerfCase { block_len, history, rows, mem_len, head_dim: d, .. } = self.case;
        let scale = f64::from(self.shape.scale());
        let most_terms = (history + rows + mem_len).max(self.shape.group() * (rows + mem_len));
        let sums = U * (most_terms + 4) as f64 + self.p16.map_or(0.0, |p16| 1.01 * p16.unit_roundoff());
        let mut errors = like.clone();
        let AttendGradients { d_q, d_mem_q, d_k, d_v, d_mem_k, d_mem_v, .. } = &mut errors;
        let of_mem = [&mut *d_mem_q, &mut *d_mem_k, &mut *d_mem_v].into_iter().flatten().map(|a| &mut a.data);
        let all = d_q.iter_mut().chain([&mut *d_k, &mut *d_v]).map(|a| &mut a.data).chain(of_mem);
        all.for_each(|data| data.fill(0.0));
        let (Some(d_mem_k), Some(d_mem_v)) = (d_mem_k, d_mem_v) else { return errors };

        let norms = |x: &[f64]| x.chunks_exact(d).map(norm).collect::<Vec<_>>();
        let ([k, v], [mem_k, mem_v]) = (&head.kv, &head.mem);
        let (of_kv, of_mem) = ([k, v].map(|x| norms(&x.data)), [mem_k, mem_v].map(|x| norms(&x.data)));
        let first = |position: usize| self.shape.window().first(position as u64, block_len) as usize;
        let groups = [(false, &saved.rows, upstream.d_o), (true, &saved.mem_rows, upstream.d_mem_o)];
        for (is_memory, saved, d_o) in groups {
            let (Some(saved), Some(d_o)) = (saved, d_o) else { continue };
            let [batch, _, count, heads, _] = saved.o.shape;
            for (n, r, h) in (0..batch * count * heads).map(|i| (i / (count * heads), i / heads % count, i % heads)) {
                let at = [n, 0, r, h];
                let (q, d_q, tokens) = match (is_memory, &head.mem_q, &mut *d_mem_q, &mut *d_q) {
                    (true, Some(q), Some(d_q), _) => (q.row(&at), d_q.row_mut(&at), history..history + rows),
                    (_, _, _, Some(d_q)) => {
                        (head.q.row(&[n, r, h]), d_q.row_mut(&[n, r, h]), first(history + r)..history + r + 1)
                    }
                    _ => continue,
                };
                let (d_o, lse) = (d_o.row(&at), saved.lse[at]);
                let [of_q, of_o, of_d_o] = [q, saved.o.row(&at), d_o].map(norm);
                let mut pass = |k: &[f64], [of_k, of_v]: [f64; 2], d_k: &mut [f64], d_v: &mut [f64]| {
                    let s = scale * k.iter().zip(q).map(|(k, q)| k * q).sum::<f64>();
                    let exponent = (d + 4) as f64 * scale * of_q * of_k + 2.0 * lse.abs() + 3.0 * (s - lse).abs() + 8.0;
                    let (p, e) = ((s - lse).exp(), (U * exponent).exp_m1());
                    let d_logit = p * of_d_o * (of_v + of_o) * (e + U * (d + 8) as f64 + sums);
                    for c in 0..d {
                        d_q[c] += scale * d_logit * k[c].abs();
                        d_k[c] += scale * d_logit * q[c].abs();
                        d_v[c] += p * (e + sums) * d_o[c].abs();
                    }
                };
                for i in 0..mem_len {
                    let (at, norms) = ([n, 0, i, 0], of_mem.each_ref().map(|norms| norms[n * mem_len + i]));
                    pass(mem_k.row(&at), norms, d_mem_k.row_mut(&at), d_mem_v.row_mut(&at));
                }
                for t in tokens {
                    let (at, norms) = ([n, t, 0], of_kv.each_ref().map(|norms| norms[n * (history + rows) + t]));
                    pass(k.row(&at), norms, d_k.row_mut(&at), d_v.row_mut(&at));
                }
            }
        }
        errors
    }
}

/// Sizes `[N, rows, heads, D]` and elements of [`GRADIENTS`], where there are such.
fn in_order<'a>(gradients: &'a AttendGradients) -> [Option<([usize; 4], &'a [f64])>; 6] {
    let AttendGradients { d_q, d_mem_q, d_k, d_v, d_mem_k, d_mem_v, .. } = gradients;
    let of_memory = |a: &'a Option<Array<5>>| a.as_ref().map(|a| ([a.shape[0], a.shape[2], a.shape[3], a.shape[4]], &*a.data));
    let of_tokens = |a: &'a Array<4>| Some((a.shape, &*a.data));
    let [d_mem_q, d_mem_k, d_mem_v] = [d_mem_q, d_mem_k, d_mem_v].map(of_memory);
    [d_q.as_ref().and_then(of_tokens), d_mem_q, of_tokens(d_k), of_tokens(d_v), d_mem_k, d_mem_v]
}

/// ‖x‖.
fn norm(x: &[f64]) -> f64 {
    x.iter().map(|x| x * x).sum::<f64>().sqrt()
}

#[cfg(test)]
mod tests {
    use super::super::case::CASES;
    use super::*;
    use fam::cpu::{Cpu, Par};
    use fam_testkit::{Limits, Queue};

    struct Serial(Cpu);

    impl Harness for Serial {
        type Backend = Cpu;

        fn backend(&self) -> &Cpu {
            &self.0
        }

        fn limits(&self) -> Limits {
            Limits::default().p16_backward(self.0.isa().pairs())
        }

        fn run(&self, work: &mut dyn FnMut(&mut Queue<'_, Self>) -> Result<()>) -> Result<()> {
            work(&mut Par::Serial)
        }
    }

    /// Each gradient in turn with one element off by a hundredth of the largest, or by a tenth where rounding to 16 bits may take a hundredth.
    #[test]
    fn a_wrong_gradient_is_named() {
        let h = Serial(Cpu::new().unwrap());
        let b = CASES.into_iter().find(|case| case.name == "B-backward").unwrap();
        let case =
            PerfCase { heads: 4, kv_heads: 2, head_dim: 24, block_len: 16, mem_len: 3, batch: 2, history: 32, rows: 16, ..b };
        for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            let mut driver = Backward::new(&h, case, dtype).unwrap();
            let (verdict, tensors) = driver.check().unwrap();
            assert_eq!(verdict.wrong, None, "{dtype}");
            assert_eq!((verdict.vacuous, tensors.len()), (0, 14));
            let mut call = Call::first(&driver).unwrap();
            let off = if call.p16.is_some() { 0.1 } else { 0.01 };
            for (i, name) in GRADIENTS.into_iter().enumerate() {
                let right = call.gradients[i].data.clone();
                let largest = right.iter().fold(0.0f64, |most, x| most.max(x.abs()));
                call.gradients[i].data[right.len() / 2] += off * largest;
                let verdict = each_kv_head(2, |kv_head, tally| call.head(kv_head, tally)).unwrap();
                assert_eq!(verdict.wrong.map(|wrong| wrong.at.tensor), Some(name), "{dtype}");
                call.gradients[i].data = right;
            }
        }
    }
}
