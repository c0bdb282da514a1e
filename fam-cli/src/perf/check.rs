//! A case's last call held against the f64 reference, every value of it: a wrong result has no time.

use super::case::PerfCase;
use super::driver::Driver;
use fam::{Result, Shape, Span};
use fam_ref::Array;
use fam_testkit::{
    Bound, Condition, Element, Harness, Level, Limits, Tally, Tensor, Tolerance, infini_read_bound, infini_write_bounds,
};
use std::ops::Range;

/// Runs one sample and checks its last call, on all threads.
pub fn check<H: Harness>(h: &H, driver: &mut Driver<'_, H>) -> Result<Tally>
where
    H::Backend: Clone,
{
    let before = driver.state()?;
    driver.sample()?;
    let call = &Call::last(driver, before, h.limits())?;
    let threads = crate::environment::threads();
    // The first kv heads first, so that the first wrong value is the same on any number of threads.
    let heads = call.case.kv_heads;
    let mut tally = Tally::default();
    std::thread::scope(|scope| {
        let part = |i: usize| i * heads / threads..(i + 1) * heads / threads;
        let parts: Vec<_> = (0..threads).map(|i| scope.spawn(move || call.heads(part(i)))).collect();
        for part in parts {
            tally.add(&part.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
        }
        Ok(tally)
    })
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

    fn heads(&self, kv_heads: Range<usize>) -> Result<Tally> {
        let mut tally = Tally::default();
        for kv_head in kv_heads {
            self.rows(kv_head, &mut tally)?;
            self.state(kv_head, &mut tally)?;
        }
        Ok(tally)
    }

    /// `o` and `mem_o` of the query heads that read `kv_head`.
    fn rows(&self, kv_head: usize, tally: &mut Tally) -> Result<()> {
        let PerfCase { head_dim: d, batch, history, rows, mem_len, .. } = self.case;
        let group = self.shape.group();
        let (own, heads) = (kv_head..kv_head + 1, kv_head * group..(kv_head + 1) * group);
        // The same layer with one kv head.
        let shape = Shape::builder().heads(group).kv_heads(1).head_dim(d).block_len(self.case.block_len);
        let shape = shape.window(self.shape.window()).mem_len(mem_len).scale(self.shape.scale()).build()?;
        let spans: Vec<_> =
            (0..batch).map(|n| Span::new(n as u32, history as u64, rows as u32).with_mem_rows(mem_len as u32)).collect();
        let every = |a: &Array<4>, heads: &Range<usize>| cut(a, &(0..a.shape[1]).collect::<Vec<_>>(), heads.clone());
        let memory =
            |a: &Array<4>, heads: &Range<usize>| Array { shape: [batch, 1, mem_len, heads.len(), d], data: every(a, heads).data };
        let ([q, mem_q], [k, v], [mem_k, mem_v]) = (&self.q, &self.kv, &self.mem);
        let (q, mem_q) = (every(q, &heads), memory(mem_q, &heads));
        let attended = fam_ref::attend(&fam_ref::Attend {
            shape: &shape,
            spans: &spans,
            q: Some(&q),
            mem_q: (self.case.is_block() && mem_len > 0).then_some(&mem_q),
            k: &every(k, &own),
            v: &every(v, &own),
            mem_k: Some(&memory(mem_k, &own)),
            mem_v: Some(&memory(mem_v, &own)),
            sink: None,
        })?;

        let dtype = self.shape.dtype();
        let bound = Bound::new(Level::Hard, dtype, dtype, &self.limits);
        for (name, rows, got) in [("o", attended.rows, &self.o[0]), ("mem_o", attended.mem_rows, &self.o[1])] {
            let Some(rows) = rows else { continue };
            let [batch, _, count, ..] = rows.o.shape;
            for (n, r, h) in (0..batch * count * group).map(|i| (i / (count * group), i / group % count, i % group)) {
                let row = [n, 0, r, h];
                let tiles = (rows.n[row] / self.limits.key_tile as f64).ceil();
                let (o, a) = (rows.o.row(&row), rows.a.row(&row));
                let (s, keys, v_max) = (rows.s[row], rows.n[row], rows.v_max[row]);
                let condition = |c: usize| Condition { o: o[c], a: a[c], s, sink: 0.0, n: keys, tiles, d: d as f64, v_max };
                let got = got.row(&[n, r, heads.start + h]);
                let read = self.state.as_ref().map(|[before, _]| {
                    let [m, z] = of_head(before, kv_head, d);
                    fam_ref::infini_retrieve(q.row(&[n, r, h]), m, z)
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
        let [of_m, of_z] = infini_write_bounds(rows, &written);
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
fn array(tensor: &Tensor) -> Array<4> {
    let [n, between @ .., h, d] = tensor.shape.as_slice() else { unreachable!("tensors have heads") };
    Array { shape: [*n, between.iter().product(), *h, *d], data: tensor.values() }
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
