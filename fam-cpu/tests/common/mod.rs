//! A stream of tokens, run through the ops in several ways.
#![allow(dead_code)]

pub mod gradients;

use fam_core::{
    Append, Attend, Backend, Dtype, Element, Keys, Layout, Op, Plan, Rows, Shape, Span, Spans, View, ViewMut, Window,
};
use fam_cpu::{Cpu, Isa, Par};

/// Numbers in −1 .. 1 from a seed (SplitMix64).
pub fn random<T: Element>(seed: u64, len: usize) -> Vec<T> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        T::from_f32(((z ^ (z >> 31)) >> 40) as f32 / (1 << 23) as f32 - 1.0)
    };
    (0..len).map(|_| next()).collect()
}

/// One stream of `len` tokens from `origin` on, with memory rows for each of its blocks.
pub struct Stream<T> {
    pub shape: Shape,
    pub len: usize,
    pub origin: u64,
    pub slots: usize,
    pub slot: u32,
    pub q: Vec<T>,
    pub k: Vec<T>,
    pub v: Vec<T>,
    pub mem_q: Vec<T>,
    pub mem_k: Vec<T>,
    pub mem_v: Vec<T>,
    pub sink: Option<Vec<f32>>,
}

/// Outputs of a stream: `o`, `lse`, `mem_o`, `mem_lse`.
#[derive(Clone, Debug, PartialEq)]
pub struct Outputs {
    pub o: Vec<f32>,
    pub lse: Vec<f32>,
    pub mem_o: Vec<f32>,
    pub mem_lse: Vec<f32>,
}

impl Outputs {
    pub fn bits(&self) -> Vec<u32> {
        [&self.o, &self.lse, &self.mem_o, &self.mem_lse].iter().flat_map(|x| x.iter().map(|x| x.to_bits())).collect()
    }
}

impl<T: Element> Stream<T> {
    pub fn new(shape: Shape, len: usize, origin: u64) -> Self {
        let (h, kv, d, f) = (shape.heads(), shape.kv_heads(), shape.head_dim(), shape.mem_len());
        let nb = Span::new(0, origin, len as u32).blocks(shape.block_len());
        Stream {
            shape,
            len,
            origin,
            slots: 3,
            slot: 2,
            q: random(1, len * h * d),
            k: random(2, len * kv * d),
            v: random(3, len * kv * d),
            mem_q: random(4, nb * f * h * d),
            mem_k: random(5, nb * f * kv * d),
            mem_v: random(6, nb * f * kv * d),
            sink: None,
        }
    }

    pub fn blocks(&self) -> usize {
        self.span().blocks(self.shape.block_len())
    }

    pub fn span(&self) -> Span {
        Span::new(self.slot, self.origin, self.len as u32).with_origin(self.origin).with_mem_rows(self.shape.mem_len() as u32)
    }

    /// All of the stream in one call over linear caches.
    pub fn prefill(&self, cpu: &Cpu, par: &mut Par<'_>) -> Outputs {
        self.calls(cpu, par, &[self.span()], false)
    }

    /// Calls of `len` tokens at most, cut at block boundaries, through the ring. Memory rows run in calls that complete their block.
    pub fn stepwise(&self, cpu: &Cpu, par: &mut Par<'_>, len: usize) -> Outputs {
        self.calls(cpu, par, &self.steps(len), true)
    }

    /// The spans of those calls.
    pub fn steps(&self, len: usize) -> Vec<Span> {
        let (b, mut spans, mut at) = (self.shape.block_len() as u64, vec![], self.origin);
        let end = self.origin + self.len as u64;
        while at < end {
            let next = (at + len as u64).min((at / b + 1) * b).min(end);
            let mut span = self.span();
            (span.start, span.len) = (at, (next - at) as u32);
            span.mem_entry = (at / b - self.origin / b) as u32;
            spans.push(span);
            at = next;
        }
        spans
    }

    fn calls(&self, cpu: &Cpu, par: &mut Par<'_>, spans: &[Span], ring: bool) -> Outputs {
        let s = &self.shape;
        let (h, kv, d, f, b) = (s.heads(), s.kv_heads(), s.head_dim(), s.mem_len(), s.block_len());
        let most = |f: &dyn Fn(&Span) -> usize| spans.iter().map(f).max().unwrap();
        let spec = s
            .spec(1, most(&|s| s.len as usize))
            .blocks(most(&|s| s.blocks(b)))
            .slots(self.slots)
            .out_dtype(Dtype::F32)
            .ops(&[Op::Append, Op::Attend])
            .build()
            .unwrap();
        let plan = cpu.plan(&spec).unwrap();
        let mut scratch = vec![0xff; plan.support().scratch_bytes as usize];
        let mut ring_bytes = aligned(plan.support().ring_bytes as usize);
        let ring_mem: &mut [u8] = bytemuck::cast_slice_mut(&mut ring_bytes);
        ring_mem.fill(0xff);

        // Linear caches and memory rows for all slots, those of the other slots NaN.
        let cached = |data: &[T], row: usize| {
            let mut all = vec![T::from_f32(f32::NAN); self.slots * row];
            all[self.slot as usize * row..][..row].copy_from_slice(data);
            all
        };
        let (k, v) = (cached(&self.k, self.len * kv * d), cached(&self.v, self.len * kv * d));
        let nb = self.blocks();
        let (mem_k, mem_v) = (cached(&self.mem_k, nb * f * kv * d), cached(&self.mem_v, nb * f * kv * d));
        let cache = |data, entries, rows| View::of::<T>(data, Layout::packed(T::DTYPE, [self.slots, entries, rows, kv, d]));

        let mut out = Outputs {
            o: vec![7.0; self.len * h * d],
            lse: vec![7.0; self.len * h],
            mem_o: vec![7.0; nb * f * h * d],
            mem_lse: vec![7.0; nb * f * h],
        };
        for span in spans {
            let (first, len) = ((span.start - self.origin) as usize, span.len as usize);
            let (i, blocks) = ((span.start / b as u64 - self.origin / b as u64) as usize, span.blocks(b));
            let one = [*span];
            let spans = Spans::Host(&one);
            if ring {
                let new = |data: &'_ [T]| data[first * kv * d..][..len * kv * d].to_vec();
                let (k, v) = (new(&self.k), new(&self.v));
                let append =
                    Append::new(spans).rows(View::tokens(&k, [1, len, kv, d]), View::tokens(&v, [1, len, kv, d]), ring_mem);
                cpu.append(&plan, par, append, &mut scratch).unwrap();
            }
            let keys = match ring {
                true => Keys::Ring(&*ring_mem),
                false => Keys::Strided { k: cache(&k, 1, self.len), v: cache(&v, 1, self.len) },
            };
            let rows = Rows::new(
                View::tokens(&self.q[first * h * d..], [1, len, h, d]),
                ViewMut::tokens(&mut out.o[first * h * d..], [1, len, h, d]),
            )
            .lse(ViewMut::tokens(&mut out.lse[first * h..], [1, len, h, 1]));
            let mut args = Attend::new(spans, keys).rows(rows).mem(cache(&mem_k, nb, f), cache(&mem_v, nb, f));
            let completes = !ring || (span.end()).is_multiple_of(b as u64) || first + len == self.len;
            if f > 0 && completes {
                let shape = |last| [1, blocks, f, h, last];
                let (from, from_lse) = (i * f * h * d, i * f * h);
                args = args.mem_rows(
                    Rows::new(
                        View::of(&self.mem_q[from..], Layout::packed(T::DTYPE, shape(d))),
                        ViewMut::of(&mut out.mem_o[from..], Layout::packed(Dtype::F32, shape(d))),
                    )
                    .lse(ViewMut::of(&mut out.mem_lse[from_lse..], Layout::packed(Dtype::F32, shape(1)))),
                );
            }
            if let Some(sink) = &self.sink {
                args = args.sink(View::of(sink, Layout::per_head(h)));
            }
            cpu.attend(&plan, par, args, &mut scratch).unwrap();
        }
        out
    }
}

/// Zeros aligned for every element type, at least `bytes` of them.
pub fn aligned(bytes: usize) -> Vec<u64> {
    vec![0; bytes.div_ceil(8)]
}

pub fn shape(heads: [usize; 2], d: usize, b: usize, window: Window, f: usize, dtype: Dtype) -> Shape {
    let [heads, kv_heads] = heads;
    let builder = Shape::builder().heads(heads).kv_heads(kv_heads).head_dim(d).block_len(b);
    builder.window(window).mem_len(f).dtype(dtype).build().unwrap()
}

/// The CPU at every level that this machine has.
pub fn levels() -> impl Iterator<Item = Cpu> {
    Isa::ALL.into_iter().filter_map(|isa| Cpu::new().unwrap().with_isa(isa).ok())
}

/// Calls `f` with a stream of each dtype's own type.
#[macro_export]
macro_rules! each_dtype {
    ($f:ident) => {
        $f::<f32>();
        $f::<fam_core::f16>();
        $f::<fam_core::bf16>();
    };
}
