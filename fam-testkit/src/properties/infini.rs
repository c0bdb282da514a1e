//! Properties of the compressive memory, over case files: 11.

use super::streams::{dense, suitable};
use crate::casefile::{CaseFile, Tensor};
use crate::harness::Harness;
use crate::launch::Stop;
use crate::replay::{Mode, right};
use crate::runner::Passed;
use fam_core::{Dtype, InfiniRule, Op, Shape, Window};
use std::collections::BTreeMap;

/// A file of op infini without a given state, each stream from position 0, with another rule and segment length.
fn plain(seed: u64, rule: InfiniRule, block_len: Option<usize>) -> Result<CaseFile, Stop> {
    let file = suitable(seed, &[Op::InfiniRead], |f| f.tokens >= 2 * f.shape.block_len())?;
    let s = &file.shape;
    let b = block_len.unwrap_or(s.block_len());
    let builder = Shape::builder().heads(s.heads()).kv_heads(s.kv_heads()).head_dim(s.head_dim()).block_len(b);
    let shape = builder.window(Window::Blocks(0)).dtype(s.dtype()).scale(s.scale()).infini(rule).build()?;
    let infini = file.infini.clone().map(|i| crate::casefile::InfiniCase { rule, m0: None, z0: None, ..i });
    let start = vec![0; file.batch];
    Ok(CaseFile { shape, start, mem_q: None, mem: None, infini, expected: BTreeMap::new(), ..file })
}

/// Σ over the keys `seen` of σ(k), and of σ(k)ᵀ v: z and m of one stream and kv head.
fn sums(file: &CaseFile, k: &[f64], v: &[f64], [n, h]: [usize; 2], seen: usize) -> (Vec<f64>, Vec<f64>) {
    let (kv_heads, d) = (file.shape.kv_heads(), file.shape.head_dim());
    let (mut m, mut z) = (vec![0.0; d * d], vec![0.0; d]);
    for t in 0..seen {
        let at = ((n * file.tokens + t) * kv_heads + h) * d;
        for i in 0..d {
            let s = fam_ref::sigma(k[at + i]);
            z[i] += s;
            (0..d).for_each(|j| m[i * d + j] += s * v[at + j]);
        }
    }
    (m, z)
}

/// Un-rotated q and k, and β.
fn un_rotated(file: &CaseFile) -> Result<[Vec<f64>; 3], Stop> {
    let infini = file.infini.as_ref().ok_or_else(|| Stop::Failed("no compressive memory".into()))?;
    let (q, k) = (infini.q.as_ref().unwrap_or(&file.q), infini.k.as_ref().unwrap_or(&file.k));
    Ok([q.values(), k.values(), infini.beta.values()])
}

/// Whole tokens: those in whole segments.
fn whole(file: &CaseFile, n: usize) -> usize {
    let b = file.shape.block_len();
    file.lengths[n] as usize / b * b
}

/// The explicit form: each row a mean of the values of all earlier segments, weighted with σ(q)·σ(k).
pub(super) fn linear_attention<H: Harness + ?Sized>(h: &H, seed: u64) -> Result<Passed, Stop>
where
    H::Backend: Clone,
{
    let mut file = plain(seed, InfiniRule::Linear, None)?;
    let [q, k, beta] = un_rotated(&file)?;
    let v = file.v.values();
    let s = file.shape;
    let (heads, kv_heads, d, b) = (s.heads(), s.kv_heads(), s.head_dim(), s.block_len());
    let mut o = dense(&file);
    for (n, t) in (0..file.batch).flat_map(|n| (0..file.lengths[n] as usize).map(move |t| (n, t))) {
        for (head, &beta) in beta.iter().enumerate() {
            let at = ((n * file.tokens + t) * heads + head) * d;
            // σ is homogeneous in exp(max) where all of q is below 0: shift by it, as any reader must.
            let shift = q[at..at + d].iter().copied().fold(f64::NEG_INFINITY, f64::max).min(0.0);
            let sigma: Vec<f64> = q[at..at + d].iter().map(|&x| fam_ref::sigma(x - shift)).collect();
            let (mut a, mut den) = (vec![0.0; d], 0.0);
            for u in 0..t / b * b {
                let row = ((n * file.tokens + u) * kv_heads + head / s.group()) * d;
                let w: f64 = sigma.iter().zip(&k[row..row + d]).map(|(s, &k)| s * fam_ref::sigma(k)).sum();
                den += w;
                a.iter_mut().zip(&v[row..row + d]).for_each(|(a, v)| *a += w * v);
            }
            let [of_memory, of_local] = [beta, -beta].map(fam_ref::gate);
            for (o, a) in o[at..at + d].iter_mut().zip(a) {
                *o = of_local * *o + if den > 0.0 { of_memory * a / den } else { 0.0 };
            }
        }
    }
    file.expected.insert("o".into(), Tensor::from_values(Dtype::F32, file.output_shape("o"), o));
    right(h, &file, Mode::Step)?;
    right(h, &file, Mode::Prefill)
}

/// m and z after the last whole segment are plain sums over tokens, whatever the length of segments.
pub(super) fn segment_length<H: Harness + ?Sized>(h: &H, seed: u64) -> Result<Passed, Stop>
where
    H::Backend: Clone,
{
    let mut passed = Passed::default();
    let tokens = plain(seed, InfiniRule::Linear, None)?.tokens;
    for block_len in [1, 2, 7, 16, tokens] {
        let mut file = plain(seed, InfiniRule::Linear, Some(block_len))?;
        let [_, k, _] = un_rotated(&file)?;
        let v = file.v.values();
        let (mut m, mut z) = (Vec::new(), Vec::new());
        for (n, head) in (0..file.batch).flat_map(|n| (0..file.shape.kv_heads()).map(move |h| (n, h))) {
            let sums = sums(&file, &k, &v, [n, head], whole(&file, n));
            m.extend(sums.0);
            z.extend(sums.1);
        }
        file.expected.insert("m".into(), Tensor::from_values(Dtype::F32, file.output_shape("m"), m));
        file.expected.insert("z".into(), Tensor::from_values(Dtype::F32, file.output_shape("z"), z));
        passed = right(h, &file, Mode::Step)?;
    }
    Ok(passed)
}

/// One value row everywhere. Linear: from the second segment on it is what both branches give. Delta: with m = zᵀ v stored
/// beforehand, a segment finds its values stored, and m stays (once: z grows beside it).
pub(super) fn read_back<H: Harness + ?Sized>(h: &H, seed: u64) -> Result<Passed, Stop>
where
    H::Backend: Clone,
{
    let mut linear = plain(seed, InfiniRule::Linear, None)?;
    constant_values(&mut linear);
    let s = linear.shape;
    let (v, [_, _, beta]) = (linear.v.values(), un_rotated(&linear)?);
    let (heads, d) = (s.heads(), s.head_dim());
    let mut o = vec![0.0; linear.q.values().len()];
    for (n, t, head) in positions(&linear, heads) {
        let share = if t < s.block_len() { fam_ref::gate(-beta[head]) } else { 1.0 };
        let (at, row) = (((n * linear.tokens + t) * heads + head) * d, head / s.group() * d);
        (0..d).for_each(|c| o[at + c] = share * v[row + c]);
    }
    linear.sink = None;
    linear.expected.insert("o".into(), Tensor::from_values(Dtype::F32, linear.output_shape("o"), o));
    right(h, &linear, Mode::Step)?;

    let mut delta = plain(seed, InfiniRule::Delta, None)?;
    constant_values(&mut delta);
    delta.lengths.iter_mut().for_each(|l| *l = (*l).min(s.block_len() as u64));
    let (kv_heads, v) = (s.kv_heads(), delta.v.values());
    let z0: Vec<f64> = (0..delta.batch * kv_heads * d).map(|x| 1.0 + (x % 7) as f64 * 0.25).collect();
    let (row, head) = (|x: usize| x / d, |x: usize| x / (d * d) % kv_heads);
    let m0: Vec<f64> = (0..delta.batch * kv_heads * d * d).map(|x| z0[row(x)] * v[head(x) * d + x % d]).collect();
    let m0 = Tensor::from_values(Dtype::F32, delta.output_shape("m"), m0);
    let z0 = Tensor::from_values(Dtype::F32, delta.output_shape("z"), z0);
    delta.expected.insert("m".into(), m0.clone());
    delta.infini = delta.infini.map(|i| crate::casefile::InfiniCase { m0: Some(m0), z0: Some(z0), ..i });
    right(h, &delta, Mode::Step)
}

/// Every value row of a kv head becomes its first one.
fn constant_values(file: &mut CaseFile) {
    let row = file.shape.kv_heads() * file.shape.head_dim();
    let values = file.v.values();
    let constant = (0..values.len()).map(|x| values[x % row]);
    file.v = Tensor::from_values(file.v.dtype, file.v.shape.clone(), constant);
}

fn positions(file: &CaseFile, heads: usize) -> Vec<(usize, usize, usize)> {
    let rows = (0..file.batch).flat_map(|n| (0..file.lengths[n] as usize).map(move |t| (n, t)));
    rows.flat_map(|(n, t)| (0..heads).map(move |h| (n, t, h))).collect()
}
