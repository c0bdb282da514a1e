//! In a foreign engine: its own device and queue, all tensors in ONE of its buffers, and two steps of a stream in its own encoder.
//!
//! ```sh
//! cargo run --release --features wgpu --example embed_wgpu
//! ```
//!
//! The engine keeps linear caches, as most do; fam brings the kernel and nothing else. The stream's first block is attended, then the second,
//! which sees the first: both are encoded before anything runs, and submitted once.

use fam::wgpu::{Region, Wgpu, wgpu};
use fam::{Attend, Backend, Dtype, Keys, Layout, Op, Plan, Rows, Shape, Span, Spans, View, ViewMut, Window};

const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 64;
const BLOCK: usize = 16;
const TOKENS: usize = 2 * BLOCK;

/// What an engine has before it meets fam: a device and a queue of its own.
async fn engine() -> Result<(wgpu::Device, wgpu::Queue), Box<dyn std::error::Error>> {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle());
    let adapter = instance.request_adapter(&Default::default()).await?;
    Ok(adapter.request_device(&Default::default()).await?)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (device, queue) = pollster::block_on(engine())?;

    // Once: the shaders of a layer, in error scopes, on the engine's device.
    let wgpu = Wgpu::new(&device, &queue)?;
    let shape = Shape::builder().heads(HEADS).kv_heads(KV_HEADS).head_dim(HEAD_DIM).block_len(BLOCK).window(Window::Blocks(1));
    let plan = wgpu.plan(&shape.build()?.spec(1, BLOCK).ops(&[Op::Attend]).build()?)?;

    // The engine's allocator hands out ranges wherever there is room: none needs to be a multiple of 256.
    let (q, kv) =
        (Layout::tokens(Dtype::F32, [1, TOKENS, HEADS, HEAD_DIM]), Layout::tokens(Dtype::F32, [1, TOKENS, KV_HEADS, HEAD_DIM]));
    let mut end = 0;
    let mut range = |bytes: u64| {
        let start = end + 20;
        end = start + bytes;
        start..end
    };
    let bytes = |layout: &Layout| layout.end_bytes().unwrap_or(0);
    let [at_q, at_k, at_v, at_o, at_scratch] =
        [bytes(&q), bytes(&kv), bytes(&kv), bytes(&q), plan.support().scratch_bytes].map(&mut range);
    let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
    let descriptor = wgpu::BufferDescriptor { label: None, size: end.next_multiple_of(4), usage, mapped_at_creation: false };
    let buffer = device.create_buffer(&descriptor);
    // Equal queries and keys: a token weighs all that it sees alike. Values are positions.
    queue.write_buffer(&buffer, at_q.start, as_bytes(&vec![0.5; TOKENS * HEADS * HEAD_DIM]).as_slice());
    queue.write_buffer(&buffer, at_k.start, as_bytes(&vec![0.25; TOKENS * KV_HEADS * HEAD_DIM]).as_slice());
    let positions: Vec<f32> = (0..TOKENS * KV_HEADS * HEAD_DIM).map(|i| (i / (KV_HEADS * HEAD_DIM)) as f32).collect();
    queue.write_buffer(&buffer, at_v.start, &as_bytes(&positions));

    // Two steps in the engine's encoder. Borrows end here, the work does not: wgpu counts references.
    let region = |range| Region::new(&buffer, range);
    let (regions, mut to, mut scratch) =
        ([region(at_q)?, region(at_k)?, region(at_v)?], region(at_o.clone())?, region(at_scratch)?);
    let [from_q, from_k, from_v] = &regions;
    let mut encoder = device.create_command_encoder(&Default::default());
    for start in [0, BLOCK] {
        let rows = q.rows(start, BLOCK)?;
        let spans = [Span::new(0, start as u64, BLOCK as u32)];
        let keys = Keys::Strided { k: View::new(from_k, kv), v: View::new(from_v, kv) };
        let args = Attend::new(Spans::Host(&spans), keys).rows(Rows::new(View::new(from_q, rows), ViewMut::new(&mut to, rows)));
        wgpu.attend(&plan, &mut encoder, args, &mut scratch)?;
    }

    // The engine submits when it likes, and reads its own buffer.
    let size = bytes(&q);
    let descriptor = wgpu::BufferDescriptor {
        label: None,
        size,
        usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
        mapped_at_creation: false,
    };
    let staging = device.create_buffer(&descriptor);
    encoder.copy_buffer_to_buffer(&buffer, at_o.start, &staging, 0, size);
    queue.submit([encoder.finish()]);
    staging.map_async(wgpu::MapMode::Read, .., |mapped| mapped.expect("a buffer that can be mapped"));
    device.poll(wgpu::PollType::wait_indefinitely())?;
    let results: Vec<f32> =
        staging.get_mapped_range(..)?.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();

    // Token t sees tokens 0 ..= t: the mean of their positions.
    for (i, o) in results.iter().enumerate() {
        let token = i / (HEADS * HEAD_DIM);
        assert!((o - token as f32 / 2.0).abs() <= 1e-5, "token {token}: {o}");
    }
    let info = device.adapter_info();
    println!(
        "{} attended {TOKENS} tokens in two steps of one encoder, on {}",
        plan.support().kernel(Op::Attend).ok_or("planned")?,
        info.name
    );
    Ok(())
}

fn as_bytes(numbers: &[f32]) -> Vec<u8> {
    numbers.iter().flat_map(|x| x.to_le_bytes()).collect()
}
