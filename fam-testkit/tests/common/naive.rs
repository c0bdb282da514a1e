//! The backward ops in f32, as their formulas read: proof that the bounds hold for a right kernel, in several orders of summation, and that
//! they catch a wrong one.

use fam_core::{
    AttendBackward, Backend, Error, HostMemory, InfiniReadBackward, InfiniRule, InfiniWriteBackward, KernelId, KeyGradients,
    Layout, MergeBackward, Op, Plan, Result, RowsBackward, Shape, Span, Spec, StateGradients, Support, View, ViewMut, Window,
    bf16, f16,
};
use fam_testkit::{Harness, Queue};

/// How sums are added up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// One after the other.
    Forward,
    /// The last one first.
    Backward,
    /// Halves of halves.
    Pairs,
}

/// The backward ops; with a mutant, wrong ones.
#[derive(Clone, Copy, Debug)]
pub struct Naive {
    pub order: Order,
    pub mutant: Option<&'static str>,
}

/// Deliberate errors, by op.
pub const MUTANTS: [&str; 39] = [
    "attend-d_q-scale",
    "attend-d_k-scale",
    "attend-delta",
    "attend-delta-sign",
    "attend-d_lse",
    "attend-sink-in-p",
    "attend-sink-in-d_sink",
    "attend-d_sink-d_lse",
    "attend-gqa",
    "attend-mem-one-group",
    "attend-keys-one-group",
    "attend-written",
    "attend-d_sink-written",
    "attend-window-early",
    "attend-window-late",
    "attend-causal-early",
    "attend-causal-late",
    "attend-entry",
    "attend-slot",
    "attend-origin",
    "attend-mem-rows",
    "attend-lse-log2",
    "attend-d_v-d_logit",
    "attend-16-bit-delta",
    "read-slope-at-0",
    "read-z-0",
    "read-gate",
    "read-d_o_local",
    "read-d_z",
    "read-d_z-sign",
    "read-entry",
    "read-d_beta-o_local",
    "write-order",
    "write-passed-over",
    "write-delta-read",
    "write-d_z",
    "write-slope",
    "merge-weights",
    "merge-empty",
];

impl Naive {
    fn is(&self, mutant: &str) -> bool {
        self.mutant == Some(mutant)
    }

    fn sum(&self, terms: &[f32]) -> f32 {
        match self.order {
            Order::Forward => terms.iter().fold(0.0, |sum, x| sum + x),
            Order::Backward => terms.iter().rev().fold(0.0, |sum, x| sum + x),
            Order::Pairs if terms.len() > 2 => {
                let (a, b) = terms.split_at(terms.len() / 2);
                self.sum(a) + self.sum(b)
            }
            Order::Pairs => terms.iter().sum::<f32>() + 0.0,
        }
    }

    fn dot(&self, a: &[f32], b: &[f32]) -> f32 {
        self.sum(&a.iter().zip(b).map(|(a, b)| a * b).collect::<Vec<_>>())
    }
}

fn input(view: &View<'_, [u8]>, at: [usize; 4]) -> Vec<f32> {
    load(view.mem, &view.layout, at)
}

fn load(mem: &[u8], layout: &Layout, at: [usize; 4]) -> Vec<f32> {
    let (size, first) = (layout.dtype.bytes(), layout.at(at));
    let element = |c: usize| {
        let raw = &mem[(first + c) * size..][..size];
        match layout.dtype {
            fam_core::Dtype::F16 => bytemuck::pod_read_unaligned::<f16>(raw).to_f32(),
            fam_core::Dtype::Bf16 => bytemuck::pod_read_unaligned::<bf16>(raw).to_f32(),
            _ => bytemuck::pod_read_unaligned(raw),
        }
    };
    (0..layout.shape[4]).map(element).collect()
}

fn store(view: &mut ViewMut<'_, [u8]>, at: [usize; 4], values: &[f32]) {
    let (size, first) = (view.layout.dtype.bytes(), view.layout.at(at));
    for (c, &x) in values.iter().enumerate() {
        let raw = &mut view.mem[(first + c) * size..][..size];
        match view.layout.dtype {
            fam_core::Dtype::F16 => raw.copy_from_slice(bytemuck::bytes_of(&f16::from_f32(x))),
            fam_core::Dtype::Bf16 => raw.copy_from_slice(bytemuck::bytes_of(&bf16::from_f32(x))),
            _ => raw.copy_from_slice(bytemuck::bytes_of(&x)),
        }
    }
}

fn add(view: &mut ViewMut<'_, [u8]>, at: [usize; 4], values: &[f32], is_written: bool) {
    let old = load(view.mem, &view.layout, at);
    let sums: Vec<f32> = old.iter().zip(values).map(|(old, x)| if is_written { *x } else { old + x }).collect();
    store(view, at, &sums);
}

/// Terms of a gradient that rows share, added up when all are there: `[row][head][channel]`.
struct Collector {
    heads: usize,
    d: usize,
    terms: std::collections::BTreeMap<([usize; 3], usize), Vec<Vec<f32>>>,
}

impl Collector {
    fn new(heads: usize, d: usize) -> Self {
        Collector { heads, d, terms: std::collections::BTreeMap::new() }
    }

    fn add(&mut self, at: [usize; 3], head: usize, values: impl Iterator<Item = f32>) {
        let d = self.d;
        let sums = self.terms.entry((at, head.min(self.heads - 1))).or_insert_with(|| vec![Vec::new(); d]);
        sums.iter_mut().zip(values).for_each(|(terms, x)| terms.push(x));
    }

    fn finish(self, naive: &Naive, to: &mut ViewMut<'_, [u8]>, is_written: bool) {
        for (([n, i, r], head), channels) in self.terms {
            let sums: Vec<f32> = channels.iter().map(|terms| naive.sum(terms)).collect();
            add(to, [n, i, r, head], &sums, is_written);
        }
    }
}

/// The gradients of `attend` while they collect.
struct Keys {
    k: Collector,
    v: Collector,
}

impl Naive {
    fn window(&self, span: &Span, position: u64, shape: &Shape) -> u64 {
        let first = span.window_first(position, shape);
        let (b, moved) = (shape.block_len() as u64, matches!(shape.window(), Window::Blocks(_)));
        match self.mutant {
            Some("attend-window-early") => first.saturating_sub(if moved { b } else { 1 }).max(span.origin),
            Some("attend-window-late") => (first + if moved { b } else { 1 }).min(position),
            _ => first,
        }
    }

    fn attend(&self, plan: &(Spec, Support), args: AttendBackward<'_, [u8]>) {
        let (spec, shape) = (&plan.0, plan.0.shape());
        let collectors = || Keys {
            k: Collector::new(shape.kv_heads(), shape.head_dim()),
            v: Collector::new(shape.kv_heads(), shape.head_dim()),
        };
        let (mut tokens, mut memory, mut sinks) = (collectors(), collectors(), Collector::new(shape.heads(), 1));
        let AttendBackward { spans, mut rows, mut mem_rows, k, v, mem, sink, d_keys, d_mem, d_sink, .. } = args;
        for n in 0..spans.batch() {
            let mut span = spans.get(n, spec);
            span.mem_rows = if mem.is_some() { span.mem_rows } else { 0 };
            if span.slot as usize >= k.layout.shape[0] || span.end() - span.origin > k.layout.shape[2] as u64 {
                continue;
            }
            let b = shape.block_len();
            let block = |position: u64| (shape.block(position) - shape.block(span.start)) as usize;
            let of_rows = rows.iter().flat_map(|_| 0..span.len as usize).map(|r| {
                let position = span.start + r as u64;
                let end = match self.mutant {
                    Some("attend-causal-early") => position.max(self.window(&span, position, shape)),
                    Some("attend-causal-late") => (position + 2).min(span.end()),
                    _ => position + 1,
                };
                ([n, 0, r], block(position), self.window(&span, position, shape)..end)
            });
            let of_mem: Vec<_> = mem_rows
                .iter()
                .flat_map(|_| 0..span.blocks(b))
                .flat_map(|i| (0..shape.mem_len()).map(move |r| (i, r)))
                .map(|(i, r)| ([n, i, r], i, span.block_keys(i, b)))
                .collect();
            let of_rows: Vec<_> = of_rows.collect();
            for (is_memory, places) in [(false, of_rows), (true, of_mem)] {
                let Some(group) = (if is_memory { &mut mem_rows } else { &mut rows }) else { continue };
                for ([n, i, r], block, positions) in places {
                    for h in 0..shape.heads() {
                        let kv = if self.is("attend-gqa") { h % shape.kv_heads() } else { h / shape.group() };
                        let mem_entry = |entries: usize| {
                            let i = if self.is("attend-entry") { block + 1 } else { block };
                            (span.mem_entry as usize + i) % entries
                        };
                        let slot = if self.is("attend-slot") { 0 } else { span.slot as usize };
                        let origin = if self.is("attend-origin") { span.origin + 1 } else { span.origin };
                        let row_of = |p: u64| p.saturating_sub(origin) as usize;
                        let mut seen = Vec::new();
                        if let Some(mem) = &mem {
                            let count = span.mem_rows as usize;
                            let count = if self.is("attend-mem-rows") { count.saturating_sub(1) } else { count };
                            let at = |f: usize| [slot, mem_entry(mem.k.layout.shape[1]), f, kv];
                            seen.extend((0..count).map(|f| (true, at(f), input(&mem.k, at(f)), input(&mem.v, at(f)))));
                        }
                        let tokens_at = positions.clone().map(|p| [slot, 0, row_of(p), kv]);
                        seen.extend(tokens_at.map(|at| (false, at, input(&k, at), input(&v, at))));
                        let sink = sink.as_ref().map(|sink| input(sink, [0, 0, 0, h])[0]);
                        let wants =
                            [!is_memory || !self.is("attend-keys-one-group"), is_memory || !self.is("attend-mem-one-group")];
                        self.row(shape, group, [n, i, r, h], &seen, sink, wants, [&mut tokens, &mut memory], &mut sinks);
                    }
                }
            }
        }
        let is_written = self.is("attend-written");
        if let Some(KeyGradients { mut d_k, mut d_v }) = d_keys {
            tokens.k.finish(self, &mut d_k, is_written);
            tokens.v.finish(self, &mut d_v, is_written);
        }
        if let Some(KeyGradients { mut d_k, mut d_v }) = d_mem {
            memory.k.finish(self, &mut d_k, is_written);
            memory.v.finish(self, &mut d_v, is_written);
        }
        if let Some(mut d_sink) = d_sink {
            sinks.finish(self, &mut d_sink, self.is("attend-d_sink-written"));
        }
    }

    #[allow(clippy::too_many_arguments, clippy::type_complexity)]
    fn row(
        &self,
        shape: &Shape,
        group: &mut RowsBackward<'_, [u8]>,
        at @ [_, _, _, h]: [usize; 4],
        seen: &[(bool, [usize; 4], Vec<f32>, Vec<f32>)],
        sink: Option<f32>,
        [wants_tokens, wants_memory]: [bool; 2],
        [tokens, memory]: [&mut Keys; 2],
        sinks: &mut Collector,
    ) {
        let [q, o, d_o] = [&group.q, &group.o, &group.d_o].map(|view| input(view, at));
        let mut lse = input(&group.lse, at)[0];
        let d_lse = group.d_lse.as_ref().map_or(0.0, |d_lse| input(d_lse, at)[0]);
        let d_lse = if self.is("attend-d_lse") { 0.0 } else { d_lse };
        let scale = shape.scale();
        if lse == f32::NEG_INFINITY {
            return store(&mut group.d_q, at, &vec![0.0; q.len()]);
        }
        if self.is("attend-lse-log2") {
            lse *= std::f32::consts::LOG2_E;
        }
        if let (true, Some(sink)) = (self.is("attend-sink-in-p"), sink) {
            lse = lse + (-(sink - lse).exp()).ln_1p();
        }
        let mut delta = self.dot(&d_o, &o);
        match self.mutant {
            Some("attend-delta") => delta = 0.0,
            Some("attend-delta-sign") => delta = -delta,
            Some("attend-16-bit-delta") => delta = bf16::from_f32(delta).to_f32(),
            _ => {}
        }
        if let Some(sink) = sink {
            let d_lse = if self.is("attend-d_sink-d_lse") { 0.0 } else { d_lse };
            let p = if self.is("attend-sink-in-d_sink") { 1.0 } else { (sink - lse).exp() };
            sinks.add([0, 0, 0], h, std::iter::once(p * (d_lse - delta)));
        }
        let mut d_q = vec![Vec::new(); q.len()];
        for (is_memory, [n, i, r, kv], k, v) in seen {
            let p = (scale * self.dot(&q, k) - lse).exp();
            let d_logit = p * (self.dot(&d_o, v) - delta + d_lse);
            let through = if self.is("attend-d_v-d_logit") { d_logit } else { p };
            let (to, wanted) = if *is_memory { (&mut *memory, wants_memory) } else { (&mut *tokens, wants_tokens) };
            if wanted {
                let of_k = if self.is("attend-d_k-scale") { d_logit } else { scale * d_logit };
                to.k.add([*n, *i, *r], *kv, q.iter().map(|q| of_k * q));
                to.v.add([*n, *i, *r], *kv, d_o.iter().map(|d_o| through * d_o));
            }
            d_q.iter_mut().zip(k).for_each(|(terms, k)| terms.push(d_logit * k));
        }
        let scale = if self.is("attend-d_q-scale") { 1.0 } else { scale };
        let d_q: Vec<f32> = d_q.iter().map(|terms| if terms.is_empty() { 0.0 } else { scale * self.sum(terms) }).collect();
        store(&mut group.d_q, at, &d_q);
    }
}

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

    fn read(&self, plan: &(Spec, Support), args: InfiniReadBackward<'_, [u8]>) {
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

    fn write(&self, plan: &(Spec, Support), args: InfiniWriteBackward<'_, [u8]>) {
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

    fn merge(&self, args: MergeBackward<'_, [u8]>) {
        let MergeBackward { a, b, d_o, d_lse, mut d_a, mut d_b, .. } = args;
        let [batch, blocks, rows, heads, _] = d_o.layout.shape;
        for x in 0..batch * blocks * rows * heads {
            let at = [x / (blocks * rows * heads), x / (rows * heads) % blocks, x / heads % rows, x % heads];
            let (o_a, o_b, d_o) = (input(&a.o, at), input(&b.o, at), input(&d_o, at));
            let [lse_a, lse_b] = [&a.lse, &b.lse].map(|lse| input(lse, at)[0]);
            let d_lse = d_lse.as_ref().map_or(0.0, |d_lse| input(d_lse, at)[0]);
            let is_empty = |lse: f32| lse == f32::NEG_INFINITY && !self.is("merge-empty");
            let most = lse_a.max(lse_b);
            let weight = |lse: f32| if is_empty(lse) { 0.0 } else { (lse - most).exp() };
            let (w_a, w_b) = (weight(lse_a), weight(lse_b));
            let [p_a, p_b] = if self.is("merge-weights") { [w_a, w_b] } else { [w_a / (w_a + w_b), w_b / (w_a + w_b)] };
            let apart: Vec<f32> = o_a.iter().zip(&o_b).map(|(a, b)| a - b).collect();
            for (part, lse, p, other, sign) in [(&mut d_a, lse_a, p_a, p_b, 1.0), (&mut d_b, lse_b, p_b, p_a, -1.0)] {
                if is_empty(lse) {
                    store(&mut part.d_o, at, &vec![0.0; d_o.len()]);
                    store(&mut part.d_lse, at, &[0.0]);
                    continue;
                }
                let through = if other > 0.0 { other * sign * self.dot(&d_o, &apart) } else { 0.0 };
                store(&mut part.d_o, at, &d_o.iter().map(|x| p * x).collect::<Vec<_>>());
                store(&mut part.d_lse, at, &[p * (through + d_lse)]);
            }
        }
    }
}

impl Backend for Naive {
    type Mem = [u8];
    type Queue<'q> = ();
    type Plan = (Spec, Support);

    fn name(&self) -> &'static str {
        "naive"
    }

    fn support(&self, spec: &Spec) -> Result<Support> {
        let dtype = spec.shape().dtype();
        let kernel = |&op: &Op| match Op::BACKWARD.contains(&op) {
            true => Ok((KernelId { backend: self.name(), op, dtype, variant: "f32" }, 1)),
            false => Err(Error::unsupported("op", op, "backward ops")),
        };
        Ok(Support::new(spec.ops().iter().map(kernel).collect::<Result<_>>()?))
    }

    fn plan(&self, spec: &Spec) -> Result<Self::Plan> {
        Ok((spec.clone(), self.support(spec)?))
    }

    fn attend_backward(&self, plan: &Self::Plan, _: &mut (), args: AttendBackward<'_, [u8]>, scratch: &mut [u8]) -> Result<()> {
        args.validate(plan, scratch)?;
        self.attend(plan, args);
        Ok(())
    }

    fn infini_read_backward(
        &self,
        plan: &Self::Plan,
        _: &mut (),
        args: InfiniReadBackward<'_, [u8]>,
        scratch: &mut [u8],
    ) -> Result<()> {
        args.validate(plan, scratch)?;
        self.read(plan, args);
        Ok(())
    }

    fn infini_write_backward(
        &self,
        plan: &Self::Plan,
        _: &mut (),
        args: InfiniWriteBackward<'_, [u8]>,
        scratch: &mut [u8],
    ) -> Result<()> {
        args.validate(plan, scratch)?;
        self.write(plan, args);
        Ok(())
    }

    fn merge_backward(&self, plan: &Self::Plan, _: &mut (), args: MergeBackward<'_, [u8]>, scratch: &mut [u8]) -> Result<()> {
        args.validate(plan, scratch)?;
        debug_assert!(plan.spec().ops().contains(&Op::MergeBackward));
        self.merge(args);
        Ok(())
    }
}

impl HostMemory for Naive {}

impl Harness for Naive {
    type Backend = Naive;

    fn backend(&self) -> &Naive {
        self
    }

    fn run(&self, work: &mut dyn FnMut(&mut Queue<'_, Self>) -> Result<()>) -> Result<()> {
        work(&mut ())
    }
}
