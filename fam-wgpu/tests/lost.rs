//! A device that is lost in the middle of a stream: one typed error, the same for all that comes after; and the stream goes on elsewhere from
//! its last snapshot.

mod common;

use fam_core::{
    Backend, Device, Dtype, Error, InfiniRule, Layout, Plan, Result, Rows, Shape, Step, StepInfini, Streams, View, ViewMut,
    Window,
};
use fam_testkit::Rng;
use fam_wgpu::{Adapter, Region, Wgpu, WgpuPlan};

const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const D: usize = 32;
const BLOCK: usize = 8;
const MEM: usize = 3;

/// The streams of a layer on a device of their own.
struct Layer {
    wgpu: Wgpu,
    plan: WgpuPlan,
    streams: Streams<Wgpu>,
    scratch: Region,
}

impl Layer {
    fn new(adapter: &Adapter) -> Result<Self> {
        let wgpu = pollster::block_on(adapter.open(None))?;
        let shape =
            Shape::builder().heads(HEADS).kv_heads(KV_HEADS).head_dim(D).block_len(BLOCK).window(Window::Blocks(2)).mem_len(MEM);
        let plan = wgpu.plan(&shape.infini(InfiniRule::Delta).build()?.spec(1, BLOCK).slots(2).build()?)?;
        let streams = Streams::new(wgpu.clone(), &plan)?;
        let scratch = wgpu.alloc(plan.support().scratch_bytes)?;
        Ok(Layer { wgpu, plan, streams, scratch })
    }

    fn encoder(&self) -> wgpu::CommandEncoder {
        self.wgpu.device().create_command_encoder(&Default::default())
    }

    /// Normal numbers of block `block`.
    fn numbers(&self, block: u64, name: &str, sizes: [usize; 4]) -> Result<(Region, Layout)> {
        let mut rng = Rng::of(block, name);
        let bytes: Vec<u8> = (0..sizes.iter().product()).flat_map(|_| (rng.normal() as f32).to_le_bytes()).collect();
        let mut region = self.wgpu.alloc(bytes.len() as u64)?;
        self.wgpu.upload(&mut region, 0, &bytes)?;
        Ok((region, Layout::tokens(Dtype::F32, sizes)))
    }

    /// What the next block is made of, and where its results go.
    fn tensors(&self) -> Result<Tensors> {
        let block = self.streams.position(0)? / BLOCK as u64;
        let (q, kv) = ([1, BLOCK, HEADS, D], [1, BLOCK, KV_HEADS, D]);
        let (mem_q, mem_kv) = ([1, MEM, HEADS, D], [1, MEM, KV_HEADS, D]);
        let named = [("q", q), ("k", kv), ("v", kv), ("mem_q", mem_q), ("mem_k", mem_kv), ("mem_v", mem_kv)];
        let mut inputs = Vec::new();
        for (name, sizes) in named {
            inputs.push(self.numbers(block, name, sizes)?);
        }
        let (beta, _) = self.numbers(block, "beta", [1, 1, HEADS, 1])?;
        let [o, mem_o] = [self.numbers(0, "o", q)?.0, self.numbers(0, "mem_o", mem_q)?.0];
        Ok(Tensors { inputs, beta, o, mem_o })
    }

    /// Enqueues a block, and commits it.
    fn enqueue(&mut self, encoder: &mut wgpu::CommandEncoder, tensors: &mut Tensors) -> Result<()> {
        let Layer { plan, streams, scratch, .. } = self;
        let Tensors { inputs, beta, o, mem_o } = tensors;
        let [q, k, v, mem_q, mem_k, mem_v] = std::array::from_fn(|i| View::new(&inputs[i].0, inputs[i].1));
        streams.set_memory(plan, encoder, &[0], mem_k, mem_v, scratch)?;
        let step = Step::new(&[0], k, v)
            .rows(Rows::new(q, ViewMut::new(o, q.layout)))
            .mem_rows(Rows::new(mem_q, ViewMut::new(mem_o, mem_q.layout)))
            .infini(StepInfini { q, k, beta: View::new(beta, Layout::per_head(HEADS)) });
        streams.step(plan, encoder, step, scratch)?.commit();
        Ok(())
    }

    /// Runs the next block. The bytes of o and mem_o.
    fn block(&mut self) -> Result<Vec<u8>> {
        let (mut tensors, mut encoder) = (self.tensors()?, self.encoder());
        self.enqueue(&mut encoder, &mut tensors)?;
        self.wgpu.synchronize(&mut encoder)?;
        let mut out = vec![0; 4 * HEADS * D * (BLOCK + MEM)];
        let (of_rows, of_mem) = out.split_at_mut(4 * HEADS * D * BLOCK);
        self.wgpu.download(&tensors.o, 0, of_rows)?;
        self.wgpu.download(&tensors.mem_o, 0, of_mem)?;
        Ok(out)
    }

    fn snapshot(&mut self) -> Result<Vec<u8>> {
        let mut encoder = self.encoder();
        self.streams.snapshot(&self.plan, &mut encoder, 0)
    }

    fn restore(&mut self, snapshot: &[u8]) -> Result<()> {
        let mut encoder = self.encoder();
        self.streams.restore(&self.plan, &mut encoder, 0, snapshot, &mut self.scratch)?;
        self.wgpu.synchronize(&mut encoder)
    }
}

/// Tensors of a block: q, k, v, mem_q, mem_k, mem_v; and the rest.
struct Tensors {
    inputs: Vec<(Region, Layout)>,
    beta: Region,
    o: Region,
    mem_o: Region,
}

#[test]
fn a_stream_outlives_its_device() {
    let adapter = common::adapter();
    let mut untroubled = Layer::new(&adapter).expect("a layer");
    let expected: Vec<_> = (0..12).map(|_| untroubled.block().expect("a block")).collect();

    let mut layer = Layer::new(&adapter).expect("a layer");
    for block in &expected[..5] {
        assert_eq!(&layer.block().expect("a block"), block);
    }
    let snapshot = layer.snapshot().expect("a snapshot");
    for block in &expected[5..7] {
        assert_eq!(&layer.block().expect("a block"), block);
    }

    // Encoded, and submitted when the device is gone.
    let mut late = layer.encoder();
    layer.streams.reset(&mut late, 1, 0).expect("enqueued");
    layer.wgpu.device().destroy();
    let lost = layer.wgpu.synchronize(&mut late).expect_err("the device is lost");
    assert!(matches!(lost, Error::DeviceLost { .. }), "{lost:?}");
    // Everything fails with the same error, and the first that would have changed the streams takes every slot with it.
    let plan = layer.plan.spec().clone();
    assert_eq!(layer.wgpu.plan(&plan).map(drop), Err(lost.clone()));
    assert_eq!(layer.wgpu.alloc(4).map(drop), Err(lost.clone()));
    assert_eq!(layer.wgpu.synchronize(&mut layer.encoder()), Err(lost.clone()));
    assert_eq!(layer.wgpu.download(&layer.scratch, 0, &mut [0; 4]), Err(lost.clone()));
    assert_eq!(layer.block().map(drop), Err(lost.clone()));
    let mut encoder = layer.encoder();
    assert_eq!(layer.streams.reset(&mut encoder, 1, 0), Err(lost));
    for slot in [0, 1] {
        assert_eq!(layer.streams.keep_memory(&[slot]), Err(Error::Poisoned { slot }));
    }

    let mut elsewhere = Layer::new(&adapter).expect("another device");
    elsewhere.restore(&snapshot).expect("restored");
    for (number, block) in expected.iter().enumerate().skip(5) {
        assert_eq!(&elsewhere.block().expect("a block"), block, "block {number}");
    }
    assert_eq!(elsewhere.snapshot(), untroubled.snapshot());
}

/// What reads from the device first says so, too: where bytes are mapped, and where words at the ends of an upload are.
#[test]
fn lost_before_a_download() {
    let adapter = common::adapter();
    for is_upload in [false, true] {
        let wgpu = pollster::block_on(adapter.open(None)).expect("a device");
        let mut region = wgpu.alloc(16).expect("memory");
        wgpu.device().destroy();
        let lost = match is_upload {
            false => wgpu.download(&region, 0, &mut [0; 16]),
            true => wgpu.upload(&mut region, 1, &[7; 2]),
        };
        assert!(matches!(lost, Err(Error::DeviceLost { .. })), "{lost:?}");
    }
}

/// The loss shows where the device is next asked for something: in an upload, or where work that was encoded since is submitted.
#[test]
fn lost_between_two_steps() {
    let adapter = common::adapter();
    for is_encoded in [false, true] {
        let mut layer = Layer::new(&adapter).expect("a layer");
        layer.block().expect("a block");
        let mut tensors = layer.tensors().expect("tensors");
        layer.wgpu.device().destroy();
        let lost = match is_encoded {
            false => layer.block().map(drop),
            true => {
                let mut encoder = layer.encoder();
                layer.enqueue(&mut encoder, &mut tensors).and_then(|()| layer.wgpu.synchronize(&mut encoder))
            }
        };
        let lost = lost.expect_err("the device is lost");
        assert!(matches!(lost, Error::DeviceLost { .. }), "{lost:?}");
        assert_eq!(layer.block().map(drop), Err(lost));
    }
}

/// A caller's own device tells nobody: the caller does.
#[test]
fn a_loss_that_the_caller_notes() {
    let adapter = common::adapter();
    let layer = Layer::new(&adapter).expect("a layer");
    let wgpu = Wgpu::new(layer.wgpu.device(), layer.wgpu.queue()).expect("a backend");
    wgpu.set_lost("unplugged");
    let lost = Err(Error::DeviceLost { reason: "unplugged".into() });
    assert_eq!(wgpu.plan(layer.plan.spec()).map(drop), lost);
    assert_eq!(wgpu.alloc(4).map(drop), lost);
    // The other backend on the same device knows nothing of it.
    assert!(layer.wgpu.alloc(4).is_ok());
}
