//! Properties of whole streams, over generated case files: 1, 2, 8.

use crate::case::{Case, Filter};
use crate::casefile::{CaseFile, Tensor};
use crate::generate::case_file;
use crate::harness::Harness;
use crate::launch::{Stop, plan};
use crate::replay::{Layouts, Loaded, Mode, part, planned, right};
use crate::rng::case_seed;
use crate::runner::Passed;
use fam_core::{Device, Dtype, Layout, Op, Plan, Rows, Step, StepInfini, Streams, View, ViewMut, Window};
use std::borrow::{Borrow, BorrowMut};

/// The first generated file after `seed` that suits a property.
pub(super) fn suitable(seed: u64, ops: &[Op], is_suitable: impl Fn(&CaseFile) -> bool) -> Result<CaseFile, Stop> {
    let filter = Filter { ops: ops.to_vec(), ..Filter::default() };
    for i in 0.. {
        let Some(case) = Case::generate(case_seed(seed, i), &filter) else { continue };
        if let Some(file) = case_file(&case)?
            && is_suitable(&file)
        {
            return Ok(file);
        }
    }
    Err(Stop::Failed("there is no end of cases".into()))
}

/// 1: what a dense mask over the whole sequence gives becomes what the steps are held to.
pub(super) fn dense_mask<H: Harness + ?Sized>(h: &H, seed: u64) -> Result<Passed, Stop>
where
    H::Backend: Clone,
{
    let mut file = suitable(seed, &[Op::Attend], |f| f.infini.is_none() && f.blocks() > 1)?;
    let o = Tensor::from_values(Dtype::F32, file.output_shape("o"), dense(&file));
    file.expected.insert("o".into(), o);
    right(h, &file, Mode::Step)
}

/// Softmax over all keys, hidden ones at −inf; the mask is written as the contract words it, not as any kernel computes it.
pub(super) fn dense(file: &CaseFile) -> Vec<f64> {
    let s = &file.shape;
    let (heads, kv_heads, d, b) = (s.heads(), s.kv_heads(), s.head_dim(), s.block_len() as i128);
    let (q, k, v) = (file.q.values(), file.k.values(), file.v.values());
    let mem = file.mem.as_ref().map(|(k, v)| (k.values(), v.values(), k.shape.clone()));
    let sinks = file.sink.as_ref().map(Tensor::values);
    let mut o = vec![0.0; q.len()];
    for n in 0..file.batch {
        let start = i128::from(file.start[n]);
        for t in 0..file.lengths[n] as usize {
            let i = start + t as i128;
            for h in 0..heads {
                let at = ((n * file.tokens + t) * heads + h) * d;
                let query = &q[at..at + d];
                let mut keys: Vec<(f64, &[f64])> = Vec::new();
                let mut see = |k: &[f64], v| {
                    let dot: f64 = query.iter().zip(k).map(|(q, k)| q * k).sum();
                    keys.push((dot * f64::from(s.scale()), v));
                };
                for u in 0..file.lengths[n] as usize {
                    let j = start + u as i128;
                    let is_visible = j <= i
                        && match s.window() {
                            Window::Tokens(w) => j > i - w as i128,
                            Window::Blocks(m) => j / b >= i / b - m as i128,
                            _ => false,
                        };
                    if is_visible {
                        let row = ((n * file.tokens + u) * kv_heads + h / s.group()) * d;
                        see(&k[row..row + d], &v[row..row + d]);
                    }
                }
                if let Some((mem_k, mem_v, shape)) = &mem {
                    let block = (i / b - start / b) as usize;
                    for f in 0..shape[2] {
                        let row = (n.min(shape[0] - 1) * shape[1] + block.min(shape[1] - 1)) * shape[2] + f;
                        let row = (row * kv_heads + h / s.group()) * d;
                        see(&mem_k[row..row + d], &mem_v[row..row + d]);
                    }
                }
                let sink = sinks.as_ref().map_or(f64::NEG_INFINITY, |s| s[h]);
                let max = keys.iter().map(|(logit, _)| *logit).fold(sink, f64::max);
                let sum: f64 = keys.iter().map(|(logit, _)| (logit - max).exp()).sum::<f64>() + (sink - max).exp();
                for (logit, v) in keys {
                    let p = (logit - max).exp() / sum;
                    o[at..at + d].iter_mut().zip(v).for_each(|(o, v)| *o += p * v);
                }
            }
        }
    }
    o
}

/// 2: each mode is right, by one reference.
pub(super) fn modes<H: Harness + ?Sized>(h: &H, seed: u64) -> Result<Passed, Stop>
where
    H::Backend: Clone,
{
    let file = suitable(seed, &[Op::Attend, Op::InfiniRead], |f| f.blocks() > 1)?;
    right(h, &file, Mode::Step)?;
    right(h, &file, Mode::Decode)?;
    right(h, &file, Mode::Prefill)
}

/// Where a block of a stream runs: in turn in four slots of two `Streams`.
fn turn<S>(pair: &mut [S; 2], block: usize) -> (&mut S, u32) {
    (&mut pair[block % 2], (block / 2 % 2) as u32)
}

/// 8, bitwise: every block in another slot of another `Streams` than the block before, by snapshot and restore. The file's streams use
/// the same slots one after the other: a slot that was reset is a fresh one.
pub(super) fn boundary<H: Harness + ?Sized>(h: &H, seed: u64) -> Result<Passed, Stop>
where
    H::Backend: Clone,
{
    let op = if seed.is_multiple_of(2) { Op::Attend } else { Op::InfiniRead };
    let mut file = suitable(seed, &[op], |f| f.batch > 1 && f.blocks() > 1)?;
    file.infini.iter_mut().for_each(|i| (i.m0, i.z0) = (None, None));
    let file = file;
    let (backend, s, layouts) = (h.backend(), &file.shape, Layouts::new(&file));
    let (b, size) = (s.block_len(), s.dtype().bytes());
    let whole = planned(h, &file, Mode::Step)?;
    let plan = plan(h, &s.spec(1, b.min(file.tokens)).slots(2).build()?)?;
    let mut scratch = backend.alloc(plan.support().scratch_bytes)?;
    let mut pair = [Streams::new(backend.clone(), &plan)?, Streams::new(backend.clone(), &plan)?];
    let loaded = Loaded::new(h, &file)?;
    for n in 0..file.batch {
        h.run(&mut |queue| pair[0].reset(queue, 0, file.start[n]))?;
        let into = (file.start[n] % b as u64) as usize;
        let length = file.lengths[n] as usize;
        let mut first = 0;
        while first < length {
            let block = (into + first) / b;
            let tokens = first..((block + 1) * b - into).min(length);
            let (streams, slot) = turn(&mut pair, block);
            let one = n..n + 1;
            let shape = [1, 1, tokens.len(), s.heads(), s.head_dim()];
            let o_layout = Layout::packed(s.dtype(), shape);
            let mut o = backend.alloc(o_layout.end_bytes().unwrap_or(0))?;
            let mut snapshot = Vec::new();
            h.run(&mut |queue| {
                let Loaded { q, k, v, mem, sink, infini, .. } = &loaded;
                match mem {
                    Some((k, k_layout, v, v_layout)) => {
                        let k = View::new(k.borrow(), part(*k_layout, &one, block, None));
                        let v = View::new(v.borrow(), part(*v_layout, &one, block, None));
                        streams.set_memory(&plan, queue, &[slot], k, v, scratch.borrow_mut())?;
                    }
                    None => streams.keep_memory(&[slot])?,
                }
                let cut = |layout| part(layout, &one, 0, Some(tokens.clone()));
                let (kv, q_view) = (cut(layouts.kv), View::new(q.borrow(), cut(layouts.q)));
                let slots = [slot];
                let mut step = Step::new(&slots, View::new(k.borrow(), kv), View::new(v.borrow(), kv));
                step = step.rows(Rows::new(q_view, ViewMut::new(o.borrow_mut(), o_layout)));
                if let Some(sink) = sink {
                    step = step.sink(View::new(sink.borrow(), layouts.per_head));
                }
                if let Some((infini_q, infini_k, beta)) = infini {
                    let q = infini_q.as_ref().map_or(q_view, |q| View::new(q.borrow(), cut(layouts.q)));
                    let k = View::new(infini_k.as_ref().unwrap_or(k).borrow(), kv);
                    step = step.infini(StepInfini { q, k, beta: View::new(beta.borrow(), layouts.per_head) });
                }
                streams.step(&plan, queue, step, scratch.borrow_mut())?.commit();
                snapshot = streams.snapshot(&plan, queue, slot)?;
                Ok(())
            })?;
            let got = h.download(&o, o_layout.end_bytes().unwrap_or(0) as usize)?;
            let row = s.heads() * s.head_dim() * size;
            let at = (n * file.tokens + first) * row;
            if got != whole["o"].data[at..at + tokens.len() * row] {
                return Err(Stop::Failed(format!(
                    "{}: stream {n}, block {block} differs after snapshot and restore",
                    file.source
                )));
            }
            let (next, slot) = turn(&mut pair, block + 1);
            h.run(&mut |queue| next.restore(&plan, queue, slot, &snapshot, scratch.borrow_mut()))?;
            first = tokens.end;
        }
    }
    Ok(Passed::default())
}
