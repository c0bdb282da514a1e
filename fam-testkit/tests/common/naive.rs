//! The backward ops in f32, as their formulas read: proof that the bounds hold for a right kernel, in several orders of summation, and that
//! they catch a wrong one.

#[path = "naive_infini.rs"]
mod infini;

use fam_core::{
    AttendBackward, Backend, Error, HostMemory, InfiniReadBackward, InfiniWriteBackward, KernelId, KeyGradients, Layout,
    MergeBackward, Op, Plan, Result, RowsBackward, Shape, Span, Spec, Support, View, ViewMut, Window, bf16, f16,
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

impl Naive {
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
