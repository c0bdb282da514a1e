//! The ops of the compressive memory against each other: cut, run and fused in other ways they have the same bits.

mod common;

use common::random;
use fam_core::{
    Attend, Backend, Dtype, Element, InfiniRead, InfiniRule, InfiniState, InfiniWrite, Keys, Layout, Plan, Rows, Shape, Span,
    Spans, View, ViewMut,
};
use fam_cpu::{Cpu, CpuPlan, Par};

const HEADS: usize = 4;
const KV: usize = 2;
const ENTRIES: usize = 6;
const SLOTS: usize = 3;

/// A stream of `len` tokens from `origin` on in slot 1, with the state of all its segments.
struct Stream<T> {
    d: usize,
    plan: CpuPlan,
    span: Span,
    q: Vec<T>,
    k: Vec<T>,
    v: Vec<T>,
    beta: Vec<f32>,
    m: Vec<f32>,
    z: Vec<f32>,
}

impl<T: Element> Stream<T> {
    fn new(rule: InfiniRule, d: usize, block_len: usize, len: usize, origin: u64, offset: f32) -> Self {
        let builder = Shape::builder().heads(HEADS).kv_heads(KV).head_dim(d).block_len(block_len).dtype(T::DTYPE);
        let shape = builder.infini(rule).build().unwrap();
        let spec = shape.spec(1, len).blocks(len / block_len + 2).slots(SLOTS).out_dtype(Dtype::F32).build().unwrap();
        let shifted = |seed, heads| {
            let x: Vec<T> = random(seed, len * heads * d);
            x.iter().map(|x| T::from_f32(4.0 * x.to_f32() + offset)).collect::<Vec<T>>()
        };
        let mut span = Span::new(1, origin, len as u32).with_origin(origin);
        span.state_entry = 4;
        Stream {
            d,
            plan: Cpu::new().unwrap().plan(&spec).unwrap(),
            span,
            q: shifted(1, HEADS),
            k: shifted(2, KV),
            v: random(3, len * KV * d),
            beta: vec![0.3, -2.0, 25.0, -25.0],
            m: vec![0.0; SLOTS * ENTRIES * KV * d * d],
            z: vec![0.0; SLOTS * ENTRIES * KV * d],
        }
    }

    fn scratch(&self) -> Vec<u8> {
        vec![0xff; self.plan.support().scratch_bytes as usize]
    }

    /// All rows of k or v, in slot 1 of a linear cache that is NaN elsewhere.
    fn cache(&self, data: &[T]) -> Vec<T> {
        let mut all = vec![T::from_f32(f32::NAN); SLOTS * data.len()];
        all[data.len()..][..data.len()].copy_from_slice(data);
        all
    }

    fn write(&mut self, spans: &[Span]) {
        let (k, v, mut scratch) = (self.cache(&self.k), self.cache(&self.v), self.scratch());
        let layout = Layout::packed(T::DTYPE, [SLOTS, 1, self.k.len() / (KV * self.d), KV, self.d]);
        for span in spans {
            let spans = [*span];
            let keys = Keys::Strided { k: View::of(&k, layout), v: View::of(&v, layout) };
            let m = ViewMut::of(&mut self.m, Layout::infini_m(SLOTS, ENTRIES, KV, self.d));
            let z = ViewMut::of(&mut self.z, Layout::infini_z(SLOTS, ENTRIES, KV, self.d));
            let write = InfiniWrite::new(Spans::Host(&spans), keys, m, z);
            Cpu::new().unwrap().infini_write(&self.plan, &mut Par::Serial, write, &mut scratch).unwrap();
        }
    }

    fn state(&self) -> InfiniState<'_, [u8]> {
        InfiniState {
            q: View::tokens(&self.q, [1, self.span.len as usize, HEADS, self.d]),
            m: View::of(&self.m, Layout::infini_m(SLOTS, ENTRIES, KV, self.d)),
            z: View::of(&self.z, Layout::infini_z(SLOTS, ENTRIES, KV, self.d)),
            beta: View::of(&self.beta, Layout::per_head(HEADS)),
        }
    }

    /// Reads with `o_local`; and attends with the read fused, or without.
    fn read(&self, o_local: &[f32]) -> Vec<f32> {
        let (mut o, tokens) = (vec![7.0f32; o_local.len()], [1, self.span.len as usize, HEADS, self.d]);
        let (spans, local) = ([self.span], View::tokens(o_local, tokens));
        let read = InfiniRead::new(Spans::Host(&spans), self.state(), local, ViewMut::tokens(&mut o, tokens));
        Cpu::new().unwrap().infini_read(&self.plan, &mut Par::Serial, read, &mut self.scratch()).unwrap();
        o
    }

    fn attend(&self, fused: bool) -> Vec<f32> {
        let (mut o, tokens) = (vec![7.0f32; self.q.len()], [1, self.span.len as usize, HEADS, self.d]);
        let (k, v, spans) = (self.cache(&self.k), self.cache(&self.v), [self.span]);
        let layout = Layout::packed(T::DTYPE, [SLOTS, 1, tokens[1], KV, self.d]);
        let keys = Keys::Strided { k: View::of(&k, layout), v: View::of(&v, layout) };
        let rows = Rows::new(View::tokens(&self.q, tokens), ViewMut::tokens(&mut o, tokens));
        let mut attend = Attend::new(Spans::Host(&spans), keys).rows(rows);
        if fused {
            attend = attend.infini(self.state());
        }
        Cpu::new().unwrap().attend(&self.plan, &mut Par::Serial, attend, &mut self.scratch()).unwrap();
        o
    }

    fn entry(&self, i: usize) -> usize {
        (self.span.state_entry as usize + i) % ENTRIES
    }

    /// m, z of entry `e` of the stream's slot and `head`, and where they lie.
    fn state_of(&self, e: usize, head: usize) -> (&[f32], &[f32]) {
        let (at, d) = ((ENTRIES + e) * KV + head, self.d);
        (&self.m[at * d * d..][..d * d], &self.z[at * d..][..d])
    }
}

/// (head_dim, block_len, tokens, origin, offset of q and k).
const CASES: [(usize, usize, usize, u64, f32); 5] =
    [(1, 3, 10, 0, 0.0), (16, 70, 300, 0, 0.0), (33, 8, 30, 3, 1.0), (64, 64, 192, 64, -30.0), (130, 5, 17, 0, 0.0)];

/// One call, or a call for each token; the read fused, or on its own.
fn ways_agree<T: Element>() {
    for (rule, (d, block_len, len, origin, offset)) in
        [InfiniRule::Linear, InfiniRule::Delta].into_iter().flat_map(|rule| CASES.map(|case| (rule, case)))
    {
        let mut s = Stream::<T>::new(rule, d, block_len, len, origin, offset);
        s.write(&[s.span]);
        let whole = (s.m.clone(), s.z.clone());
        s.m.fill(0.0);
        s.z.fill(0.0);
        let steps: Vec<Span> = (origin..origin + len as u64)
            .map(|at| {
                let mut span = Span::new(1, at, 1).with_origin(origin);
                span.state_entry = s.entry((at / block_len as u64 - origin / block_len as u64) as usize) as u32;
                span
            })
            .collect();
        s.write(&steps);
        assert!(whole == (s.m.clone(), s.z.clone()), "one call and many differ");

        for (i, head) in (0..s.span.blocks(block_len)).flat_map(|i| (0..KV).map(move |head| (i, head))) {
            let block = (origin / block_len as u64 + i as u64) * block_len as u64;
            let (before, after) = (s.state_of(s.entry(i), head), s.state_of(s.entry(i + 1), head));
            if block + block_len as u64 > s.span.end() {
                assert!(after.0.iter().all(|m| *m == 0.0), "a partial segment was written");
            } else if block < origin {
                assert_eq!(after, before, "a segment that was never whole is passed over");
            } else {
                assert_ne!(after, before);
            }
        }
        assert!(s.read(&s.attend(false)) == s.attend(true), "fused and unfused differ");
    }
}

#[test]
fn ways_of_writing_and_reading_have_the_same_bits() {
    each_dtype!(ways_agree);
}

#[test]
fn an_empty_memory_reads_as_zero() {
    let mut s = Stream::<f32>::new(InfiniRule::Linear, 8, 4, 4, 0, 0.0);
    s.m.fill(f32::NAN);
    let o = s.read(&vec![1.0; s.q.len()]);
    for (i, o) in o.iter().enumerate() {
        let beta = f64::from(s.beta[i / 8 % HEADS]);
        assert_eq!(*o, (1.0 / (1.0 + beta.exp())) as f32);
    }
}
