//! What the tests share: a layer of streams, and the tensors that a caller feeds it.

use crate::faulty::{Faults, Faulty, cpu};
use fam::cpu::{CpuPlan, Par};
use fam::{
    Backend, Bytes, Device, Dtype, InfiniRule, Layout, Pending, Plan, Result, Rows, Shape, Spec, Step, StepInfini, Streams, View,
    ViewMut, Window, bf16, f16,
};
use std::borrow::{Borrow, BorrowMut};
use std::fmt;
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::ops::{Deref, Range};

/// Every kind of state that a slot can have.
pub fn shapes() -> Vec<Shape> {
    let base = || Shape::builder().heads(4).kv_heads(2).head_dim(8).block_len(4);
    [
        base().window(Window::Blocks(2)).mem_len(3),
        base().window(Window::Tokens(6)).mem_len(3).dtype(Dtype::F16),
        base().window(Window::Blocks(1)),
        base().infini(InfiniRule::Linear),
        base().window(Window::Blocks(1)).mem_len(2).infini(InfiniRule::Delta).dtype(Dtype::Bf16),
    ]
    .map(|shape| shape.build().unwrap())
    .to_vec()
}

/// A snapshot, or outputs: compared byte for byte, printed in a few words.
#[derive(Clone, PartialEq)]
pub struct Blob(pub Vec<u8>);

impl Deref for Blob {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Blob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes {:#018x}", self.len(), BuildHasherDefault::<DefaultHasher>::default().hash_one(&self.0))
    }
}

/// One layer: its plan, its streams, and scratch memory.
pub struct Layer {
    pub plan: CpuPlan,
    pub streams: Streams<Faulty>,
    pub scratch: Bytes,
    pub faults: Faults,
}

impl Layer {
    /// As many slots as streams in a call, and the shortest ring.
    pub fn new(shape: &Shape, slots: usize) -> Self {
        Layer::of(shape.spec(slots, shape.block_len()).build().unwrap(), Faults::default())
    }

    pub fn of(spec: Spec, faults: Faults) -> Self {
        let backend = Faulty::new(faults.clone());
        let plan = backend.plan(&spec).unwrap();
        let scratch = backend.alloc(plan.support().scratch_bytes).unwrap();
        Layer { streams: Streams::new(backend, &plan).unwrap(), plan, scratch, faults }
    }

    pub fn shape(&self) -> Shape {
        *self.plan.spec().shape()
    }

    pub fn position(&self, slot: u32) -> u64 {
        self.streams.position(slot).unwrap()
    }

    /// Sets the first `rows` memory rows that `feed` has for the block which the slot enters next.
    pub fn set_memory(&mut self, slot: u32, feed: Feed, rows: usize) -> Result<()> {
        let block = self.shape().block(self.position(slot));
        self.set_memory_of(block, slot, feed, rows)
    }

    /// Sets the first `rows` memory rows that `feed` has for `block`.
    pub fn set_memory_of(&mut self, block: u64, slot: u32, feed: Feed, rows: usize) -> Result<()> {
        let (shape, first) = (self.shape(), block.wrapping_mul(100) >> 1);
        let [k, v] = [Kind::MemK, Kind::MemV].map(|kind| feed.rows(kind, first..first + rows as u64, &shape));
        let scratch = self.scratch.borrow_mut();
        self.streams.set_memory(&self.plan, &mut Par::Serial, &[slot], k.view(), v.view(), scratch)
    }

    /// At a block's boundary of a layer with memory rows: sets them, fewer for the first block.
    pub fn enter_block(&mut self, slot: u32, feed: Feed) {
        let (shape, position) = (self.shape(), self.position(slot));
        if shape.mem_len() > 0 && position.is_multiple_of(shape.block_len() as u64) {
            let rows = if position == 0 { 1 } else { shape.mem_len() };
            self.set_memory(slot, feed, rows).unwrap();
        }
    }

    /// Enqueues a call; its outputs are in `call`.
    pub fn enqueue<'s>(&'s mut self, call: &mut Call) -> Result<Pending<'s>> {
        self.streams.step(&self.plan, &mut Par::Serial, call.step(), self.scratch.borrow_mut())
    }

    /// The next `len` tokens of one stream, inside a block; the outputs' bytes. Not committed.
    pub fn try_tokens(&mut self, slot: u32, feed: Feed, len: u32) -> Result<Blob> {
        let mut call = Call::new(self, &[(slot, feed, len)]);
        drop(self.enqueue(&mut call)?);
        Ok(call.outputs(0))
    }

    /// The next `len` tokens of one stream, inside a block, committed; the outputs' bytes.
    pub fn tokens(&mut self, slot: u32, feed: Feed, len: u32) -> Result<Blob> {
        let mut call = Call::new(self, &[(slot, feed, len)]);
        self.enqueue(&mut call)?.commit();
        Ok(call.outputs(0))
    }

    /// Goes on to `position`, in steps of at most `most` tokens, with a memory for every block; the outputs' bytes.
    pub fn run_to(&mut self, slot: u32, feed: Feed, position: u64, most: u64) -> Blob {
        let block_len = self.shape().block_len() as u64;
        let mut outputs = Vec::new();
        while self.position(slot) < position {
            self.enter_block(slot, feed);
            let at = self.position(slot);
            let len = most.min(block_len - at % block_len).min(position - at);
            outputs.extend_from_slice(&self.tokens(slot, feed, len as u32).unwrap());
        }
        Blob(outputs)
    }

    pub fn snapshot(&self, slot: u32) -> Blob {
        self.streams.snapshot(&self.plan, &mut Par::Serial, slot).map(Blob).unwrap()
    }

    pub fn snapshots(&self) -> Vec<Blob> {
        (0..self.plan.spec().slots() as u32).map(|slot| self.snapshot(slot)).collect()
    }

    pub fn restore(&mut self, slot: u32, snapshot: &[u8]) -> Result<()> {
        self.streams.restore(&self.plan, &mut Par::Serial, slot, snapshot, self.scratch.borrow_mut())
    }

    pub fn reset(&mut self, slot: u32, origin: u64) -> Result<()> {
        self.streams.reset(&mut Par::Serial, slot, origin)
    }

    pub fn copy_slot(&mut self, from: u32, to: u32) -> Result<()> {
        self.streams.copy_slot(&mut Par::Serial, from, to)
    }

    /// m and z of a slot, as bytes.
    pub fn infini_state(&mut self, slot: u32) -> Blob {
        let state = self.streams.infini_state(slot).unwrap();
        let bytes = |t: ViewMut<'_, [u8]>| {
            let first = t.layout.offset * 4;
            t.mem[first..first + 4 * t.layout.elements().unwrap() as usize].to_vec()
        };
        Blob(state.map(bytes).concat())
    }
}

/// What a caller knows of one stream: every tensor, at every position, a function of the seed.
#[derive(Clone, Copy)]
pub struct Feed(pub u64);

#[derive(Clone, Copy)]
enum Kind {
    Q,
    K,
    V,
    MemQ,
    MemK,
    MemV,
    InfiniQ,
    InfiniK,
}

impl Kind {
    fn heads(self, shape: &Shape) -> usize {
        match self {
            Kind::Q | Kind::MemQ | Kind::InfiniQ => shape.heads(),
            Kind::K | Kind::V | Kind::MemK | Kind::MemV | Kind::InfiniK => shape.kv_heads(),
        }
    }
}

impl Feed {
    /// Rows `[1, 1, rows, heads, D]` in the shape's dtype.
    fn rows(self, kind: Kind, rows: Range<u64>, shape: &Shape) -> Tensor {
        let heads = kind.heads(shape);
        let [len, width] = [(rows.end - rows.start) as usize, heads * shape.head_dim()];
        let values: Vec<f32> =
            rows.flat_map(|row| (0..width as u64).map(move |c| uniform([self.0, kind as u64, row, c]))).collect();
        Tensor::new(Layout::tokens(shape.dtype(), [1, len, heads, shape.head_dim()]), &values)
    }
}

/// A pure function of `key`, in [-2, 2).
pub fn uniform(key: [u64; 4]) -> f32 {
    (random(key) >> 40) as f32 / (1 << 22) as f32 - 2.0
}

/// 64 bits that are a pure function of `key` (SplitMix64's finalizer over a running sum).
pub fn random(key: [u64; 4]) -> u64 {
    key.into_iter().fold(0, |state: u64, k| {
        let z = (state ^ k).wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    })
}

/// Memory and the tensor in it.
pub struct Tensor {
    mem: Bytes,
    layout: Layout,
}

impl Tensor {
    /// `values` in the layout's dtype; the rest, where there are fewer, is NaN.
    pub fn new(layout: Layout, values: &[f32]) -> Self {
        let mut tensor = Tensor { mem: cpu().alloc(layout.end_bytes().unwrap()).unwrap(), layout };
        let (bytes, element) = (BorrowMut::<[u8]>::borrow_mut(&mut tensor.mem), layout.dtype.bytes());
        bytes.fill(0xff);
        for (to, &value) in bytes.chunks_exact_mut(element).zip(values) {
            match layout.dtype {
                Dtype::F32 => to.copy_from_slice(&value.to_le_bytes()),
                Dtype::F16 => to.copy_from_slice(&f16::from_f32(value).to_le_bytes()),
                Dtype::Bf16 => to.copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
                other => panic!("no test tensors of {other}"),
            }
        }
        tensor
    }

    pub fn view(&self) -> View<'_, [u8]> {
        View::new(self.mem.borrow(), self.layout)
    }

    fn view_mut(&mut self) -> ViewMut<'_, [u8]> {
        ViewMut::new(self.mem.borrow_mut(), self.layout)
    }

    /// The first `rows` rows of stream `n`, packed.
    fn bytes(&self, n: usize, rows: usize) -> &[u8] {
        let (stride, element) = (self.layout.stride, self.layout.dtype.bytes());
        let first = n * stride[0] * element;
        &Borrow::<[u8]>::borrow(&self.mem)[first..][..rows * stride[2] * element]
    }
}

/// One call of `step`: its inputs, and its outputs afterwards.
pub struct Call {
    pub slots: Vec<u32>,
    pub lens: Vec<u32>,
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    mem_q: Option<Tensor>,
    infini: Option<[Tensor; 3]>,
    sink: Tensor,
    o: Tensor,
    lse: Tensor,
    mem_o: Option<Tensor>,
}

impl Call {
    /// The next tokens of some streams: slot, feed and number of each.
    pub fn new(layer: &Layer, streams: &[(u32, Feed, u32)]) -> Self {
        let shape = layer.shape();
        let most = streams.iter().map(|s| s.2).max().unwrap_or(0) as usize;
        let (batch, heads, d) = (streams.len(), shape.heads(), shape.head_dim());
        // Streams above each other, each from its own position; rows past a stream's length are NaN.
        let stack = |kind: Kind| {
            let heads = kind.heads(&shape);
            let tokens = if matches!(kind, Kind::MemQ) { shape.mem_len() } else { most };
            let mut stacked = Tensor::new(Layout::tokens(shape.dtype(), [batch, tokens, heads, d]), &[]);
            for (n, &(slot, feed, len)) in streams.iter().enumerate() {
                let first = layer.streams.position(slot).unwrap_or(0);
                let len = if matches!(kind, Kind::MemQ) { shape.mem_len() as u64 } else { len.into() };
                let rows = feed.rows(kind, first..first + len, &shape);
                let at = n * stacked.layout.stride[0] * stacked.layout.dtype.bytes();
                let (from, to): (&[u8], &mut [u8]) = (rows.mem.borrow(), stacked.mem.borrow_mut());
                to[at..at + from.len()].copy_from_slice(from);
            }
            stacked
        };
        let per_head = |kind| -> Vec<f32> { (0..heads as u64).map(|h| uniform([0, 99, kind, h])).collect() };
        let output = |rows| Tensor::new(Layout::tokens(layer.plan.spec().out_dtype(), [batch, rows, heads, d]), &[]);
        Call {
            slots: streams.iter().map(|s| s.0).collect(),
            lens: streams.iter().map(|s| s.2).collect(),
            q: stack(Kind::Q),
            k: stack(Kind::K),
            v: stack(Kind::V),
            mem_q: (shape.mem_len() > 0).then(|| stack(Kind::MemQ)),
            infini: shape.infini().map(|_| {
                let beta = Tensor::new(Layout::per_head(heads), &per_head(0));
                [stack(Kind::InfiniQ), stack(Kind::InfiniK), beta]
            }),
            sink: Tensor::new(Layout::per_head(heads), &per_head(1)),
            o: output(most),
            lse: Tensor::new(Layout::tokens(Dtype::F32, [batch, most, heads, 1]), &[]),
            mem_o: (shape.mem_len() > 0).then(|| output(shape.mem_len())),
        }
    }

    pub fn step(&mut self) -> Step<'_, [u8]> {
        let rows = Rows::new(self.q.view(), self.o.view_mut()).lse(self.lse.view_mut());
        let mut step = Step::new(&self.slots, self.k.view(), self.v.view()).lens(&self.lens).rows(rows).sink(self.sink.view());
        if let (Some(mem_q), Some(mem_o)) = (&self.mem_q, &mut self.mem_o) {
            step = step.mem_rows(Rows::new(mem_q.view(), mem_o.view_mut()));
        }
        if let Some([q, k, beta]) = &self.infini {
            step = step.infini(StepInfini { q: q.view(), k: k.view(), beta: beta.view() });
        }
        step
    }

    /// Bytes of o, lse and mem_o of stream `n`.
    pub fn outputs(&self, n: usize) -> Blob {
        let rows = self.lens[n] as usize;
        let mem_o = self.mem_o.as_ref().filter(|_| rows > 0).map_or(&[][..], |t| t.bytes(n, t.layout.shape[2]));
        Blob([self.o.bytes(n, rows), self.lse.bytes(n, rows), mem_o].concat())
    }
}
