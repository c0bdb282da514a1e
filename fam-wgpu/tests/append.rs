//! What an append writes where spans are the device's, which nobody has checked; and that it is encoded whole or not at all.

mod common;

use bytemuck::cast_slice;
use common::device;
use fam_core::{Append, Backend, Device, Dtype, Error, Layout, Op, Plan, Result, Shape, Span, Spans, View, ViewMut};
use fam_wgpu::{Region, Wgpu, WgpuPlan};

const HEAD_DIM: usize = 5;
const TOKENS: usize = 3;
const MEM_LEN: usize = 2;
const SLOTS: usize = 4;
const ENTRIES: usize = 2;

/// Memory of an append of up to three streams; each element of the new rows has a number of its own.
struct Tensors {
    wgpu: Wgpu,
    plan: WgpuPlan,
    new: Region,
    ring: Region,
    mem: [Region; 2],
    scratch: Region,
}

impl Tensors {
    fn new(wgpu: &Wgpu) -> Self {
        let shape = Shape::builder().heads(1).kv_heads(1).head_dim(HEAD_DIM).block_len(4).mem_len(MEM_LEN).build();
        let spec = shape.and_then(|shape| shape.spec(3, TOKENS).slots(SLOTS).ops(&[Op::Append]).build()).expect("a spec");
        let plan = wgpu.plan(&spec).expect("a plan");
        let alloc = |bytes| wgpu.alloc(bytes).expect("memory");
        let numbers: Vec<f32> = (1..=3 * TOKENS * HEAD_DIM).map(|x| x as f32).collect();
        let mut new = alloc(4 * numbers.len() as u64);
        wgpu.upload(&mut new, 0, cast_slice(&numbers)).expect("uploaded");
        let mem = [(); 2].map(|()| alloc(4 * (SLOTS * ENTRIES * MEM_LEN * HEAD_DIM) as u64));
        let (ring, scratch) = (alloc(plan.support().ring_bytes), alloc(plan.support().scratch_bytes));
        Tensors { wgpu: wgpu.clone(), plan, new, ring, mem, scratch }
    }

    fn encoder(&self) -> wgpu::CommandEncoder {
        self.wgpu.device().create_command_encoder(&Default::default())
    }

    fn append(&mut self, encoder: &mut wgpu::CommandEncoder, spans: Spans<'_, Region>, with_memory: bool) -> Result<()> {
        let Tensors { wgpu, plan, new, ring, mem: [to_k, to_v], scratch } = self;
        let batch = spans.batch();
        let rows = View::new(&*new, Layout::tokens(Dtype::F32, [batch, TOKENS, 1, HEAD_DIM]));
        let mut args = Append::new(spans).rows(rows, rows, ring);
        if with_memory {
            let new = View::new(&*new, Layout::packed(Dtype::F32, [batch, 1, MEM_LEN, 1, HEAD_DIM]));
            let entries = Layout::packed(Dtype::F32, [SLOTS, ENTRIES, MEM_LEN, 1, HEAD_DIM]);
            args = args.mem_rows(new, new, ViewMut::new(to_k, entries), ViewMut::new(to_v, entries));
        }
        wgpu.append(plan, encoder, args, scratch)
    }

    /// Bits of ring and memory after the encoder's work.
    fn written(&self, mut encoder: wgpu::CommandEncoder) -> [Vec<u32>; 3] {
        self.wgpu.synchronize(&mut encoder).expect("done");
        [&self.ring, &self.mem[0], &self.mem[1]].map(|region| {
            let mut bits = vec![0; (region.range().end / 4) as usize];
            self.wgpu.download(region, 0, bytemuck::cast_slice_mut(&mut bits)).expect("downloaded");
            bits
        })
    }
}

fn span(slot: u32) -> Span {
    Span::new(slot, 0, TOKENS as u32).with_mem_rows(MEM_LEN as u32)
}

#[test]
fn the_first_stream_has_a_slot_that_is_named_twice_and_no_stream_one_that_is_not_there() {
    let wgpu = device();
    let mut checked = Tensors::new(&wgpu);
    let mut encoder = checked.encoder();
    checked.append(&mut encoder, Spans::Host(&[span(2)]), true).expect("encoded");
    let expected = checked.written(encoder);
    assert!(expected.iter().all(|bits| bits.iter().any(|&bits| bits != 0)), "all is written to");

    for others in [[2, 2], [2, SLOTS as u32], [u32::MAX, 2]] {
        let words = [2, others[0], others[1]].map(|slot| [0, 0, 0, 0, TOKENS as u32, slot, MEM_LEN as u32, 0, 0, 0u32]);
        let mut mem = wgpu.alloc(4 * words.as_flattened().len() as u64).expect("memory");
        wgpu.upload(&mut mem, 0, cast_slice(words.as_flattened())).expect("uploaded");
        let mut tensors = Tensors::new(&wgpu);
        let mut encoder = tensors.encoder();
        tensors.append(&mut encoder, Spans::Device { mem: &mem, batch: 3 }, true).expect("encoded");
        assert!(tensors.written(encoder) == expected, "slots 2, {others:?}");
    }
}

#[test]
fn tokens_and_memory_rows_are_encoded_together_or_not_at_all() {
    let mut tensors = Tensors::new(&device());
    // All blocks but one wait in this encoder; a call with memory rows takes two.
    let mut full = tensors.encoder();
    let max = loop {
        match tensors.append(&mut full, Spans::Host(&[span(1)]), false) {
            Ok(()) => {}
            Err(Error::LimitExceeded { max, .. }) => break max,
            Err(other) => panic!("{other}"),
        }
    };
    drop(full);
    let mut waiting = tensors.encoder();
    for _ in 1..max {
        tensors.append(&mut waiting, Spans::Host(&[span(1)]), false).expect("a block for each");
    }
    let mut last = tensors.encoder();
    let refused = tensors.append(&mut last, Spans::Host(&[span(2)]), true);
    assert!(matches!(refused, Err(Error::LimitExceeded { .. })), "{refused:?}");
    tensors.append(&mut last, Spans::Host(&[span(3)]), false).expect("the one block is free still");
    drop(waiting);
    let [ring, k, v] = tensors.written(last);
    assert_eq!(ring.iter().filter(|&&bits| bits != 0).count(), 2 * TOKENS * HEAD_DIM, "of slot 3 alone");
    assert!(k.iter().chain(&v).all(|&bits| bits == 0), "no memory rows");
}
