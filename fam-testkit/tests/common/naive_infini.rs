//! The compressive memory's part of the naive implementation.

use super::{Collector, Naive, add, input, load, store};
use fam_core::{InfiniReadBackward, InfiniRule, InfiniWriteBackward, KeyGradients, Spec, StateGradients, Support};

fn sigma(x: f32) -> f32 {
    if x > 0.0 { x + 1.0 } else { x.exp() }
}

fn gate(beta: f32) -> f32 {
    // Not 1 / (1 + exp(−β)) where that overflows.
    if beta >= 0.0 { 1.0 / (1.0 + (-beta).exp()) } else { beta.exp() / (1.0 + beta.exp()) }
}

/// A read, differentiated.
struct Read {
    a: Vec<f32>,
    d_q: Vec<f32>,
    d_m: Vec<f32>,
    d_z: Vec<f32>,
}

impl Naive {
    fn slope(&self, x: f32, s: f32) -> f32 {
        match self.mutant {
            Some("read-slope-at-0") if x == 0.0 => 0.0,
            _ if x > 0.0 => 1.0,
            _ => s,
        }
    }

    fn retrieve(&self, q: &[f32], m: &[f32], z: &[f32], d_a: impl FnOnce(&[f32]) -> Vec<f32>) -> Read {
        let d = q.len();
        let zeros = || vec![0.0; d];
        if z.iter().all(|z| *z == 0.0) && !self.is("read-z-0") {
            d_a(&zeros());
            return Read { a: zeros(), d_q: zeros(), d_m: vec![0.0; d * d], d_z: zeros() };
        }
        let shift = q.iter().copied().fold(f32::NEG_INFINITY, f32::max).min(0.0);
        let s: Vec<f32> = q.iter().map(|x| if shift < 0.0 { (x - shift).exp() } else { sigma(*x) }).collect();
        let den = self.dot(&s, z);
        let a: Vec<f32> = (0..d).map(|j| self.sum(&(0..d).map(|i| s[i] * m[i * d + j]).collect::<Vec<_>>()) / den).collect();
        let d_a = d_a(&a);
        let all = self.dot(&d_a, &a);
        let through_z = if self.is("read-d_z") { 0.0 } else { all };
        let d_s: Vec<f32> = (0..d).map(|i| (self.dot(&m[i * d..][..d], &d_a) - z[i] * through_z) / den).collect();
        let d_q = (0..d).map(|i| self.slope(q[i], s[i]) * d_s[i]).collect();
        let d_m = (0..d * d).map(|x| s[x / d] / den * d_a[x % d]).collect();
        let sign = if self.is("read-d_z-sign") { 1.0 } else { -1.0 };
        let d_z = s.iter().map(|s| sign * (s / den * all)).collect();
        Read { a, d_q, d_m, d_z }
    }

    pub(super) fn read(&self, plan: &(Spec, Support), args: InfiniReadBackward<'_, [u8]>) {
        let (spec, shape) = (&plan.0, plan.0.shape());
        let d = shape.head_dim();
        let InfiniReadBackward { spans, state, o_local, d_o, mut d_q, mut d_o_local, d_state, d_beta, .. } = args;
        let entries = state.m.layout.shape[1];
        let [mut ms, mut zs] = [(); 2].map(|()| Collector::new(shape.kv_heads(), d));
        let mut betas = Collector::new(shape.heads(), 1);
        for n in 0..spans.batch() {
            let span = spans.get(n, spec);
            if span.slot as usize >= state.m.layout.shape[0] {
                continue;
            }
            for (r, h) in (0..span.len as usize).flat_map(|r| (0..shape.heads()).map(move |h| (r, h))) {
                let (at, kv) = ([n, 0, r, h], h / shape.group());
                let block = (shape.block(span.start + r as u64) - shape.block(span.start)) as usize;
                let block = if self.is("read-entry") { 0 } else { block };
                let (slot, entry) = (span.slot as usize, (span.state_entry as usize + block) % entries);
                let m: Vec<f32> = (0..d).flat_map(|r| input(&state.m, [slot, entry, r, kv])).collect();
                let z = input(&state.z, [slot, entry, 0, kv]);
                let (q, o_local, d_o) = (input(&state.q, at), input(&o_local, at), input(&d_o, at));
                let beta = input(&state.beta, [0, 0, 0, h])[0];
                let (g, rest) = (gate(beta), gate(-beta));
                let into = if self.is("read-gate") { 1.0 } else { g };
                let read = self.retrieve(&q, &m, &z, |_| d_o.iter().map(|x| into * x).collect());
                let rest_or_mutant = if self.is("read-d_o_local") { g } else { rest };
                store(&mut d_o_local, at, &d_o.iter().map(|x| rest_or_mutant * x).collect::<Vec<_>>());
                store(&mut d_q, at, &read.d_q);
                for (r, row) in read.d_m.chunks_exact(d).enumerate() {
                    ms.add([slot, entry, r], kv, row.iter().copied());
                }
                zs.add([slot, entry, 0], kv, read.d_z.into_iter());
                let local = if self.is("read-d_beta-o_local") { 0.0 } else { 1.0 };
                let difference: Vec<f32> = read.a.iter().zip(&o_local).map(|(a, o)| a - local * o).collect();
                betas.add([0, 0, 0], h, std::iter::once(g * rest * self.dot(&d_o, &difference)));
            }
        }
        if let Some(StateGradients { mut d_m, mut d_z }) = d_state {
            ms.finish(self, &mut d_m, false);
            zs.finish(self, &mut d_z, false);
        }
        if let Some(mut d_beta) = d_beta {
            betas.finish(self, &mut d_beta, false);
        }
    }

    pub(super) fn write(&self, plan: &(Spec, Support), args: InfiniWriteBackward<'_, [u8]>) {
        let (spec, shape) = (&plan.0, plan.0.shape());
        let (d, b) = (shape.head_dim(), shape.block_len() as u64);
        let InfiniWriteBackward { spans, k, v, m, z, d_state: StateGradients { mut d_m, mut d_z }, mut d_keys, .. } = args;
        let entries = m.layout.shape[1];
        for n in 0..spans.batch() {
            let span = spans.get(n, spec);
            let is_outside = span.slot as usize >= k.layout.shape[0] || span.end() - span.origin > k.layout.shape[2] as u64;
            if span.len == 0 || is_outside {
                continue;
            }
            let completed = (span.end() / b - span.start / b) as usize;
            let segments: Vec<usize> =
                if self.is("write-order") { (0..completed).collect() } else { (0..completed).rev().collect() };
            for (i, kv) in segments.into_iter().flat_map(|i| (0..shape.kv_heads()).map(move |kv| (i, kv))) {
                let slot = span.slot as usize;
                let (read, written) = ((span.state_entry as usize + i) % entries, (span.state_entry as usize + i + 1) % entries);
                let upstream: Vec<Vec<f32>> = (0..d).map(|r| load(d_m.mem, &d_m.layout, [slot, written, r, kv])).collect();
                let upstream_z = load(d_z.mem, &d_z.layout, [slot, written, 0, kv]);
                let first = (span.start / b + i as u64) * b;
                if first < span.origin {
                    if !self.is("write-passed-over") {
                        upstream.iter().enumerate().for_each(|(r, row)| add(&mut d_m, [slot, read, r, kv], row, false));
                        add(&mut d_z, [slot, read, 0, kv], &upstream_z, false);
                    }
                    continue;
                }
                let old_m: Vec<f32> = (0..d).flat_map(|r| input(&m, [slot, read, r, kv])).collect();
                let old_z = input(&z, [slot, read, 0, kv]);
                let mut of_m: Vec<Vec<Vec<f32>>> = upstream.iter().map(|row| row.iter().map(|x| vec![*x]).collect()).collect();
                let mut of_z: Vec<Vec<f32>> = upstream_z.iter().map(|x| vec![*x]).collect();
                for position in first..first + b {
                    let at = [slot, 0, (position - span.origin) as usize, kv];
                    let (key, value) = (input(&k, at), input(&v, at));
                    let s: Vec<f32> = key.iter().map(|x| sigma(*x)).collect();
                    let d_u: Vec<f32> =
                        (0..d).map(|j| self.sum(&(0..d).map(|i| s[i] * upstream[i][j]).collect::<Vec<_>>())).collect();
                    let mut u = value;
                    let mut of_read = vec![0.0; d];
                    if shape.infini() == Some(InfiniRule::Delta) {
                        let back = self.retrieve(&key, &old_m, &old_z, |_| d_u.iter().map(|x| -x).collect());
                        u.iter_mut().zip(&back.a).for_each(|(u, a)| *u -= a);
                        if !self.is("write-delta-read") {
                            of_read = back.d_q;
                            for (i, row) in back.d_m.chunks_exact(d).enumerate() {
                                of_m[i].iter_mut().zip(row).for_each(|(terms, x)| terms.push(*x));
                            }
                            of_z.iter_mut().zip(&back.d_z).for_each(|(terms, x)| terms.push(*x));
                        }
                    }
                    if let Some(KeyGradients { d_k, d_v }) = &mut d_keys {
                        let of_key: Vec<f32> = (0..d)
                            .map(|i| {
                                let through_z = if self.is("write-d_z") { 0.0 } else { upstream_z[i] };
                                let slope = if self.is("write-slope") { 1.0 } else { self.slope(key[i], s[i]) };
                                slope * (self.dot(&upstream[i], &u) + through_z) + of_read[i]
                            })
                            .collect();
                        add(d_k, at, &of_key, false);
                        add(d_v, at, &d_u, false);
                    }
                }
                for (r, row) in of_m.iter().enumerate() {
                    let row: Vec<f32> = row.iter().map(|terms| self.sum(terms)).collect();
                    add(&mut d_m, [slot, read, r, kv], &row, false);
                }
                let of_z: Vec<f32> = of_z.iter().map(|terms| self.sum(terms)).collect();
                add(&mut d_z, [slot, read, 0, kv], &of_z, false);
            }
        }
    }
}
