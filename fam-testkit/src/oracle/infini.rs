//! A whole stream through the compressive memory and back: rows read what earlier segments wrote, so gradients flow from later reads
//! through the state into earlier segments.

use super::{Named, Stored, add, store};
use crate::casefile::{CaseFile, InfiniCase, Tensor};
use crate::judge::{tokens, whole_segments};
use fam_core::{InfiniRule, Result};
use fam_ref::{Array, gate, gate_backward, infini_retrieve, infini_retrieve_backward, infini_write, infini_write_backward};
use std::ops::Range;

/// The forward pass, with the state that every block read.
pub(super) struct Infini {
    rule: InfiniRule,
    q: Array<4>,
    k: Array<4>,
    v: Array<4>,
    beta: Vec<f64>,
    group: usize,
    /// Rows of every block of each stream's call, and whether they are a whole segment.
    blocks: Vec<Vec<(Range<usize>, bool)>>,
    /// m `[N, Hkv, D, D]` and z `[N, Hkv, D]` before block 0, 1, …, and after the last.
    states: Vec<(Array<4>, Array<3>)>,
    /// What the rows read, `[N, L, Hq, D]`.
    a: Array<4>,
}

/// Gradients with respect to what an op "infini" has beside attend.
pub(super) struct Gradients {
    /// `[N, 1, L, Hq, D]`.
    pub d_o_local: Array<5>,
    pub d_v: Array<4>,
    d_q: Array<4>,
    d_k: Array<4>,
    d_beta: Vec<f64>,
    d_m: Array<4>,
    d_z: Array<3>,
}

impl Infini {
    pub fn new(case: &CaseFile, infini: &InfiniCase, q: &Array<4>, k: &Array<4>, v: &Array<4>) -> Result<Self> {
        let (s, batch) = (&case.shape, case.batch);
        let (kv_heads, d, b) = (s.kv_heads(), s.head_dim(), s.block_len() as u64);
        let given = |t: &Option<Tensor>, len: usize| t.as_ref().map_or_else(|| vec![0.0; len], Tensor::values);
        let (m_shape, z_shape) = ([batch, kv_heads, d, d], [batch, kv_heads, d]);
        let m = Array::new(m_shape, given(&infini.m0, m_shape.iter().product()))?;
        let z = Array::new(z_shape, given(&infini.z0, z_shape.iter().product()))?;
        let blocks = (0..batch).map(|n| {
            let (start, len) = (case.start[n], case.lengths[n]);
            let whole: Vec<usize> = whole_segments(case, n).map(|(i, _)| i).collect();
            let edge = |i: u64| ((start / b + i) * b).clamp(start, start + len) - start;
            (0..(case.blocks() as u64)).map(|i| (edge(i) as usize..edge(i + 1) as usize, whole.contains(&(i as usize)))).collect()
        });
        let mut out = Infini {
            rule: infini.rule,
            q: infini.q.as_ref().map_or_else(|| q.clone(), tokens),
            k: infini.k.as_ref().map_or_else(|| k.clone(), tokens),
            v: v.clone(),
            beta: infini.beta.values(),
            group: s.group(),
            blocks: blocks.collect(),
            states: vec![(m, z)],
            a: Array::zeros(q.shape),
        };
        for i in 0..case.blocks() {
            let (m, z) = out.states[i].clone();
            let mut next = (m.clone(), z.clone());
            for n in 0..batch {
                let (rows, is_whole) = out.blocks[n][i].clone();
                for (t, h) in rows.clone().flat_map(|t| (0..s.heads()).map(move |h| (t, h))) {
                    let kv = [n, h / out.group];
                    let read = infini_retrieve(out.q.row(&[n, t, h]), m.row(&kv), z.row(&kv))?;
                    out.a.row_mut(&[n, t, h]).copy_from_slice(&read.a);
                }
                for h in (0..kv_heads).filter(|_| is_whole) {
                    let [keys, values] = [&out.k, &out.v].map(|x| segment(x, n, rows.clone(), h));
                    let written = infini_write(out.rule, &keys, &values, m.row(&[n, h]), z.row(&[n, h]))?;
                    next.0.row_mut(&[n, h]).copy_from_slice(&written.m);
                    next.1.row_mut(&[n, h]).copy_from_slice(&written.z);
                }
            }
            out.states.push(next);
        }
        Ok(out)
    }

    /// m after the last whole segment.
    pub fn m(&self) -> &Array<4> {
        &self.states[self.states.len() - 1].0
    }

    /// z after the last whole segment.
    pub fn z(&self) -> &Array<3> {
        &self.states[self.states.len() - 1].1
    }

    /// g·a + (1 − g)·o_local; rows of tokens that do not exist stay 0.
    pub fn gated(&self, o_local: &Array<5>) -> Array<5> {
        let mut o = o_local.clone();
        let heads = self.beta.len();
        for (row, o) in o.data.chunks_mut(self.q.shape[3]).enumerate() {
            let beta = self.beta[row % heads];
            o.iter_mut().zip(&self.a.data[row * self.q.shape[3]..]).for_each(|(o, a)| *o = gate(beta) * a + gate(-beta) * *o);
        }
        o
    }

    /// Back from the last block to the first: `d_m`, `d_z` are what arrives at the state after it.
    pub fn backward(&self, o_local: &Array<5>, d_o: &Array<5>, mut d_m: Array<4>, mut d_z: Array<3>) -> Result<Gradients> {
        let [batch, _, heads, _] = self.q.shape;
        let kv_heads = self.k.shape[2];
        let [mut d_q, mut d_k, mut d_v] = [&self.q, &self.k, &self.v].map(|x| Array::zeros(x.shape));
        let mut d_o_local = Array::zeros(d_o.shape);
        let mut d_beta = vec![0.0; heads];
        let sum = |to: &mut [f64], x: &[f64]| to.iter_mut().zip(x).for_each(|(to, x)| *to += x);
        for (i, n) in (0..self.states.len() - 1).rev().flat_map(|i| (0..batch).map(move |n| (i, n))) {
            let ((m, z), (rows, is_whole)) = (&self.states[i], self.blocks[n][i].clone());
            // The segment was written after its rows had read.
            for h in (0..kv_heads).filter(|_| is_whole) {
                let [keys, values] = [&self.k, &self.v].map(|x| segment(x, n, rows.clone(), h));
                let at = [n, h];
                let state = (m.row(&at), z.row(&at));
                let back = infini_write_backward(self.rule, (&keys, &values), state, (d_m.row(&at), d_z.row(&at)))?;
                d_m.row_mut(&at).copy_from_slice(&back.d_m);
                d_z.row_mut(&at).copy_from_slice(&back.d_z);
                for (t, (of_k, of_v)) in rows.clone().zip(back.d_k.iter().zip(&back.d_v)) {
                    sum(d_k.row_mut(&[n, t, h]), of_k);
                    sum(d_v.row_mut(&[n, t, h]), of_v);
                }
            }
            for (t, h) in rows.flat_map(|t| (0..heads).map(move |h| (t, h))) {
                let (row, kv) = ([n, 0, t, h], [n, h / self.group]);
                let gated = gate_backward(self.beta[h], self.a.row(&[n, t, h]), o_local.row(&row), d_o.row(&row))?;
                let read = infini_retrieve_backward(self.q.row(&[n, t, h]), m.row(&kv), z.row(&kv), &gated.d_a)?;
                d_beta[h] += gated.d_beta;
                d_o_local.row_mut(&row).copy_from_slice(&gated.d_o_local);
                sum(d_q.row_mut(&[n, t, h]), &read.d_q);
                sum(d_m.row_mut(&kv), &read.d_m);
                sum(d_z.row_mut(&kv), &read.d_z);
            }
        }
        Ok(Gradients { d_o_local, d_v, d_q, d_k, d_beta, d_m, d_z })
    }
}

/// The rows of one segment and head.
fn segment(x: &Array<4>, n: usize, rows: Range<usize>, h: usize) -> Vec<&[f64]> {
    rows.map(|t| x.row(&[n, t, h])).collect()
}

impl Gradients {
    /// Puts them into a file; those of queries and keys that the case does not have apart join `d_q` and `d_k`.
    pub fn store(&self, file: &mut Named, infini: &InfiniCase, d_q: &mut Array<4>, d_k: &mut Array<4>) {
        for (name, is_apart, d, shared) in
            [("infini_q", infini.q.is_some(), &self.d_q, d_q), ("infini_k", infini.k.is_some(), &self.d_k, d_k)]
        {
            if is_apart { store(file, &format!("expected_d_{name}"), d) } else { add(shared, d) }
        }
        file.push(("expected_d_beta".into(), Stored::wide(&[self.d_beta.len()], &self.d_beta)));
        if infini.m0.is_some() {
            store(file, "expected_d_m0", &self.d_m);
        }
        if infini.z0.is_some() {
            store(file, "expected_d_z0", &self.d_z);
        }
    }
}
