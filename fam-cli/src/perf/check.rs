//! A case's last call held against the f64 reference, every value of it: a wrong result has no time.

use super::case::PerfCase;
use super::driver::{Driver, Tensors};
use fam::{Dtype, Result, Shape, Span};
use fam_ref::Array;
use fam_testkit::{
    Bound, Condition, Element, Harness, Level, Limits, Tally, Tensor, Tolerance, infini_read_bound, infini_write_bounds,
};
use std::ops::Range;

/// Holds the last call of a sample, before which m and z were `before`, against the reference; also gives its tensors.
pub fn check<H: Harness>(driver: &mut Driver<'_, H>, before: Option<[Tensor; 2]>, limits: Limits) -> Result<(Tally, Tensors)>
where
    H::Backend: Clone,
{
    let call = Call::last(driver, before, limits)?;
    let verdict = each_kv_head(call.case.kv_heads, |kv_head, tally| {
        call.rows(kv_head, tally)?;
        call.state(kv_head, tally)
    })?;
    Ok((verdict, call.tensors()))
}

/// Checks all kv heads, on all threads.
pub fn each_kv_head(kv_heads: usize, check: impl Fn(usize, &mut Tally) -> Result<()> + Sync) -> Result<Tally> {
    let threads = crate::environment::threads();
    let part = |i: usize| {
        let mut tally = Tally::default();
        (i * kv_heads / threads..(i + 1) * kv_heads / threads).try_for_each(|kv_head| check(kv_head, &mut tally))?;
        Ok::<_, fam::Error>(tally)
    };
    let part = &part;
    let mut tally = Tally::default();
    std::thread::scope(|scope| {
        let parts: Vec<_> = (0..threads).map(|i| scope.spawn(move || part(i))).collect();
        // The first kv heads first, so that the first wrong value is the same on any number of threads.
        for part in parts {
            tally.add(&part.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
        }
        Ok(tally)
    })
}

/// What the reference needs of a call for one kv head: a layer of that one kv head and its group of query heads.
pub struct Head {
    pub shape: Shape,
    pub spans: Vec<Span>,
    pub q: Array<4>,
    /// Where the call has memory rows.
    pub mem_q: Option<Array<5>>,
    pub kv: [Array<4>; 2],
    pub mem: [Array<5>; 2],
}

impl Head {
    /// Of queries, keys and memory of all heads, each `[N, rows, heads, D]`.
    pub fn new(
        case: &PerfCase,
        layer: &Shape,
        kv_head: usize,
        q: &[Array<4>; 2],
        kv: &[Array<4>; 2],
        mem: &[Array<4>; 2],
    ) -> Result<Self> {
        let PerfCase { head_dim: d, batch, history, rows, mem_len, .. } = *case;
        let group = layer.group();
        let (own, heads) = (kv_head..kv_head + 1, kv_head * group..(kv_head + 1) * group);
        let shape = Shape::builder().heads(group).kv_heads(1).head_dim(d).block_len(case.block_len);
        let shape = shape.window(layer.window()).mem_len(mem_len).scale(layer.scale()).build()?;
        let spans = (0..batch).map(|n| Span::new(n as u32, history as u64, rows as u32).with_mem_rows(mem_len as u32)).collect();
        let mem_q = (case.is_block() && mem_len > 0).then(|| one_block(heads_of(&q[1], heads.clone())));
        let mem = mem.each_ref().map(|a| one_block(heads_of(a, own.clone())));
        Ok(Head { shape, spans, q: heads_of(&q[0], heads), mem_q, kv: kv.each_ref().map(|a| heads_of(a, own.clone())), mem })
    }

    pub fn args(&self) -> fam_ref::Attend<'_> {
        let Head { shape, spans, q, mem_q, kv: [k, v], mem: [mem_k, mem_v] } = self;
        let (mem_k, mem_v) = (Some(mem_k), Some(mem_v));
        fam_ref::Attend { shape, spans, q: Some(q), mem_q: mem_q.as_ref(), k, v, mem_k, mem_v, sink: None }
    }
}

/// The last call of a sample: what went in, and what came out.
struct Call {
    case: PerfCase,
    shape: Shape,
    limits: Limits,
    /// Queries, block rows and memory rows: `[N, rows, Hq, D]`, `[N, F, Hq, D]`.
    q: [Array<4>; 2],
    o: [Array<4>; 2],
    /// Keys and values of the tokens in the order of their positions: `[N, history + rows, Hkv, D]`.
    kv: [Array<4>; 2],
    mem: [Array<4>; 2],
    beta: Vec<f64>,
    /// m and z before the call, and after it.
    state: Option<[[Vec<f64>; 2]; 2]>,
}

impl Call {
    fn last<H: Harness>(driver: &mut Driver<'_, H>, before: Option<[Tensor; 2]>, limits: Limits) -> Result<Self>
    where
        H::Backend: Clone,
    {
        let (case, inputs) = (driver.case, &driver.inputs);
        // A block was committed, a token was taken back.
        let start = driver.position()? as usize - if case.is_block() { case.rows } else { 0 };
        let tokens: Vec<usize> = (start - case.history..start + case.rows).map(|p| p % inputs.k.shape[1]).collect();
        let all = 0..case.kv_heads;
        let beta = inputs.beta.values();
        let kv = [&inputs.k, &inputs.v].map(|t| cut(&array(t), &tokens, all.clone()));
        let (q, mem) = ([&inputs.q, &inputs.mem_q].map(array), [&inputs.mem_k, &inputs.mem_v].map(array));
        let o = driver.outputs()?.each_ref().map(array);
        let values = |state: [Tensor; 2]| state.each_ref().map(Tensor::values);
        let state = before.zip(driver.state()?).map(|(before, after)| [values(before), values(after)]);
        Ok(Call { case, shape: driver.shape, limits, q, o, kv, mem, beta, state })
    }

    /// All in f32, which holds the values of every dtype.
    fn tensors(&self) -> Tensors {
        let ([q, mem_q], [o, mem_o], [k, v], [mem_k, mem_v]) = (&self.q, &self.o, &self.kv, &self.mem);
        let named =
            [("q", q), ("k", k), ("v", v), ("o", o), ("mem_q", mem_q), ("mem_k", mem_k), ("mem_v", mem_v), ("mem_o", mem_o)];
        let mut tensors: Tensors = named.map(|(name, array)| (name, f32s(&array.shape, &array.data))).into();
        if let Some([[m, z], [new_m, new_z]]) = &self.state {
            let [kv_heads, d] = [self.case.kv_heads, self.case.head_dim];
            let [of_m, of_z] = [&[kv_heads, d, d][..], &[kv_heads, d]];
            let beta = ("beta", f32s(&[self.case.heads], &self.beta));
            let state =
                [("m", f32s(of_m, m)), ("z", f32s(of_z, z)), ("new_m", f32s(of_m, new_m)), ("new_z", f32s(of_z, new_z)), beta];
            tensors.extend(state);
        }
        tensors
    }

    /// `o` and `mem_o` of the query heads that read `kv_head`.
    fn rows(&self, kv_head: usize, tally: &mut Tally) -> Result<()> {
        let (d, group) = (self.case.head_dim, self.shape.group());
        let heads = kv_head * group..(kv_head + 1) * group;
        let head = Head::new(&self.case, &self.shape, kv_head, &self.q, &self.kv, &self.mem)?;
        let attended = fam_ref::attend(&head.args())?;

        let dtype = self.shape.dtype();
        let bound = Bound::new(Level::Hard, dtype, dtype, &self.limits);
        for (name, rows, got) in [("o", attended.rows, &self.o[0]), ("mem_o", attended.mem_rows, &self.o[1])] {
            let Some(rows) = rows else { continue };
            let [batch, _, count, ..] = rows.o.shape;
            let bound = bound.of_rows(self.limits.is_few(&self.shape, name == "mem_o", count));
            for (n, r, h) in (0..batch * count * group).map(|i| (i / (count * group), i / group % count, i % group)) {
                let row = [n, 0, r, h];
                let tiles = (rows.n[row] / self.limits.key_tile as f64).ceil();
                let (o, a) = (rows.o.row(&row), rows.a.row(&row));
                let (s, keys, v_max) = (rows.s[row], rows.n[row], rows.v_max[row]);
                let condition =
                    |c: usize| Condition { o: o[c], a: a[c], s, sink: 0.0, n: keys, tiles, d: d as f64, v_max, flushed: 0.0 };
                let got = got.row(&[n, r, heads.start + h]);
                let read = self.state.as_ref().map(|[before, _]| {
                    let [m, z] = of_head(before, kv_head, d);
                    fam_ref::infini_retrieve(head.q.row(&[n, r, h]), m, z)
                });
                let read = read.transpose()?;
                let beta = self.beta[heads.start + h];
                let [of_memory, of_local] = [beta, -beta].map(fam_ref::gate);
                for c in 0..d {
                    let (expected, bound, magnitude) = match &read {
                        None => (o[c], bound.o(&condition(c)), a[c]),
                        Some(read) => {
                            let memory = [read.a[c], infini_read_bound(d, read.magnitude[c], read.a[c])];
                            let local = [o[c], bound.o_f32(&condition(c))];
                            let bound = bound.gated([of_memory, of_local], memory, local);
                            let magnitude = of_memory * read.magnitude[c] + of_local * a[c];
                            (of_memory * read.a[c] + of_local * o[c], bound, magnitude)
                        }
                    };
                    let at = Element { tensor: name, index: [n, 0, r, heads.start + h, c] };
                    tally.near(at, got[c], expected, Tolerance { bound, magnitude });
                }
            }
        }
        Ok(())
    }

    /// m and z that the call has written, from those that it has read.
    fn state(&self, kv_head: usize, tally: &mut Tally) -> Result<()> {
        let (Some([before, after]), Some(rule)) = (&self.state, self.case.infini) else { return Ok(()) };
        let PerfCase { head_dim: d, history, rows, .. } = self.case;
        let [m, z] = of_head(before, kv_head, d);
        let [got_m, got_z] = of_head(after, kv_head, d);
        let [k, v] = self.kv.each_ref().map(|a| {
            let rows = (history..history + rows).map(|t| a.row(&[0, t, kv_head]));
            rows.collect::<Vec<_>>()
        });
        let written = fam_ref::infini_write(rule, &k, &v, m, z)?;
        // Normal numbers: nothing is subnormal.
        let [of_m, of_z] = infini_write_bounds(rows, &written, 0.0);
        for (x, ((got, expected), of)) in got_m.iter().zip(&written.m).zip(of_m).enumerate() {
            tally.near(Element { tensor: "m", index: [0, 0, x / d, kv_head, x % d] }, *got, *expected, of);
        }
        for (c, ((got, expected), of)) in got_z.iter().zip(&written.z).zip(of_z).enumerate() {
            tally.near(Element { tensor: "z", index: [0, 0, 0, kv_head, c] }, *got, *expected, of);
        }
        Ok(())
    }
}

/// A tensor `[N, .., H, D]` in f64, the axes between as one.
pub fn array(tensor: &Tensor) -> Array<4> {
    let [n, between @ .., h, d] = tensor.shape.as_slice() else { unreachable!("tensors have heads") };
    Array { shape: [*n, between.iter().product(), *h, *d], data: tensor.values() }
}

/// Numbers in f32.
pub fn f32s(shape: &[usize], values: &[f64]) -> Tensor {
    Tensor::from_values(Dtype::F32, shape.to_vec(), values.iter().copied())
}

/// All rows of the given heads.
pub fn heads_of(from: &Array<4>, heads: Range<usize>) -> Array<4> {
    cut(from, &(0..from.shape[1]).collect::<Vec<_>>(), heads)
}

/// `[N, rows, H, D]` as the rows of one block, `[N, 1, rows, H, D]`.
pub fn one_block(Array { shape: [n, rows, h, d], data }: Array<4>) -> Array<5> {
    Array { shape: [n, 1, rows, h, d], data }
}

/// The given rows and heads.
fn cut(from: &Array<4>, rows: &[usize], heads: Range<usize>) -> Array<4> {
    let [batch, .., d] = from.shape;
    let mut data = Vec::with_capacity(batch * rows.len() * heads.len() * d);
    for n in 0..batch {
        for &row in rows {
            data.extend_from_slice(&from.row(&[n, row])[heads.start * d..heads.end * d]);
        }
    }
    Array { shape: [batch, rows.len(), heads.len(), d], data }
}

/// m `[D, D]` and z `[D]` of one kv head.
fn of_head([m, z]: &[Vec<f64>; 2], kv_head: usize, d: usize) -> [&[f64]; 2] {
    [&m[kv_head * d * d..][..d * d], &z[kv_head * d..][..d]]
}
