//! Spans in device memory: read wherever they lie, and cut to what the call's views serve.

mod common;

use common::random;
use fam_core::{
    Append, Attend, Backend, InfiniRead, InfiniRule, InfiniState, InfiniWrite, Keys, Layout, Plan, Rows, Shape, Span, Spans,
    View, ViewMut, Window,
};
use fam_cpu::{Cpu, CpuPlan, Par, Pool};

const N: usize = 5;
const SLOTS: usize = 4;
const SIZES: [usize; 5] = [4, 2, 8, 3, 16]; // Hq, Hkv, D, F, B
const LEN: usize = 20;
const T: usize = 50;
const DTYPE: fam_core::Dtype = fam_core::Dtype::F32;

/// Everything that a call of every op may write.
#[derive(Clone, PartialEq)]
struct World {
    o: Vec<f32>,
    mem_o: Vec<f32>,
    ring: Vec<f32>,
    mem: [Vec<f32>; 2],
    m: Vec<f32>,
    z: Vec<f32>,
}

fn plan(cpu: &Cpu) -> CpuPlan {
    let [h, kv, d, f, b] = SIZES;
    let builder = Shape::builder().heads(h).kv_heads(kv).head_dim(d).block_len(b).window(Window::Blocks(1)).mem_len(f);
    let shape = builder.infini(InfiniRule::Linear).build().unwrap();
    cpu.plan(&shape.spec(N, LEN).blocks(2).slots(SLOTS).build().unwrap()).unwrap()
}

fn world(plan: &CpuPlan) -> World {
    let [h, kv, d, f, _] = SIZES;
    World {
        o: vec![7.0; N * LEN * h * d],
        mem_o: vec![7.0; N * 2 * f * h * d],
        ring: vec![0.25; plan.support().ring_bytes as usize / 4],
        mem: [0, 1].map(|i| random(i, SLOTS * 3 * f * kv * d)),
        m: vec![0.5; SLOTS * 3 * kv * d * d],
        z: vec![0.5; SLOTS * 3 * kv * d],
    }
}

/// Every op, over the ring and over linear caches.
fn run(plan: &CpuPlan, par: &mut Par<'_>, spans: Spans<'_, [u8]>, w: &mut World) {
    let [h, kv, d, f, _] = SIZES;
    let cpu = Cpu::new().unwrap();
    let mut scratch = vec![0; plan.support().scratch_bytes as usize];
    let x = random::<f32>(3, N * SLOTS * T * h * d);
    let tokens = |heads| Layout::tokens(DTYPE, [N, LEN, heads, d]);
    let (mem_rows, mem_cache) = (|heads| Layout::packed(DTYPE, [N, 2, f, heads, d]), Layout::packed(DTYPE, [SLOTS, 3, f, kv, d]));
    let (m, z) = (Layout::infini_m(SLOTS, 3, kv, d), Layout::infini_z(SLOTS, 3, kv, d));
    let cache = View::of(&x, Layout::packed(DTYPE, [SLOTS, 1, T, kv, d]));
    let linear = Keys::Strided { k: cache, v: cache };

    let [mem_k, mem_v] = &mut w.mem;
    let append = Append::new(spans)
        .rows(View::of(&x, tokens(kv)), View::of(&x, tokens(kv)), bytemuck::cast_slice_mut(&mut w.ring))
        .mem_rows(
            View::of(&x, mem_rows(kv)),
            View::of(&x, mem_rows(kv)),
            ViewMut::of(mem_k, mem_cache),
            ViewMut::of(mem_v, mem_cache),
        );
    cpu.append(plan, par, append, &mut scratch).unwrap();
    let ring = Keys::Ring(bytemuck::cast_slice(&w.ring));
    for keys in [ring, linear] {
        let write = InfiniWrite::new(spans, keys, ViewMut::of(&mut w.m, m), ViewMut::of(&mut w.z, z));
        cpu.infini_write(plan, par, write, &mut scratch).unwrap();
        let q = View::of(&x, tokens(h));
        let (state_m, state_z) = (w.m.clone(), w.z.clone());
        let beta = View::of(&x, Layout::per_head(h));
        let state = || InfiniState { q, m: View::of(&state_m, m), z: View::of(&state_z, z), beta };
        let attend = Attend::new(spans, keys)
            .rows(Rows::new(q, ViewMut::of(&mut w.o, tokens(h))))
            .mem_rows(Rows::new(View::of(&x, mem_rows(h)), ViewMut::of(&mut w.mem_o, mem_rows(h))))
            .mem(View::of(&w.mem[0], mem_cache), View::of(&w.mem[1], mem_cache))
            .infini(state());
        cpu.attend(plan, par, attend, &mut scratch).unwrap();
        let read = InfiniRead::new(spans, state(), q, ViewMut::of(&mut w.o, tokens(h)));
        cpu.infini_read(plan, par, read, &mut scratch).unwrap();
    }
}

/// The bytes of `spans` at an odd address.
fn odd(spans: &[Span]) -> Vec<u8> {
    let bytes: &[u8] = bytemuck::cast_slice(spans);
    let mut odd = vec![0; bytes.len() + 8];
    let skip = odd.as_ptr().align_offset(8) + 1;
    odd.truncate(skip);
    odd.extend_from_slice(bytes);
    odd
}

fn device(bytes: &[u8]) -> Spans<'_, [u8]> {
    Spans::Device { mem: &bytes[bytes.len() - N * size_of::<Span>()..], batch: N }
}

#[test]
fn device_spans_do_what_host_spans_do() {
    let plan = plan(&Cpu::new().unwrap());
    let mut spans = [Span::default(); N];
    for (n, slot) in [3, 0, 2].into_iter().enumerate() {
        spans[n] = Span::new(slot, 12 + n as u64, [LEN, 1, 0][n] as u32).with_origin(3 * n as u64).with_mem_rows(2);
        (spans[n].mem_entry, spans[n].state_entry) = (n as u32 + 1, u32::MAX - n as u32);
    }
    let (mut host, mut dev) = (world(&plan), world(&plan));
    run(&plan, &mut Par::Serial, Spans::Host(&spans[..3]), &mut host);
    run(&plan, &mut Par::Serial, device(&odd(&spans)), &mut dev);
    assert!(host == dev);
}

#[test]
fn wild_spans_stay_in_bounds() {
    let plan = plan(&Cpu::new().unwrap());
    let pool = Pool::new(2).unwrap();
    let wild = [0, 1, 2, 15, 16, 31, 49, 50, 51, u64::from(u32::MAX), 1 << 40, u64::MAX / 2, u64::MAX / 2 + 1, u64::MAX];
    let mut seed = 0u64;
    let mut draw = || {
        seed += 1;
        let r = random::<f32>(seed, 1)[0].to_bits();
        wild[r as usize / 64 % wild.len()]
    };
    for round in 0..300 {
        let spans: [Span; N] = std::array::from_fn(|_| Span {
            start: draw(),
            origin: if round % 2 == 0 { 0 } else { draw() },
            len: draw() as u32,
            slot: draw() as u32,
            mem_rows: draw() as u32,
            mem_entry: draw() as u32,
            state_entry: draw() as u32,
            reserved: draw() as u32,
        });
        let (mut serial, mut pooled) = (world(&plan), world(&plan));
        run(&plan, &mut Par::Serial, device(&odd(&spans)), &mut serial);
        run(&plan, &mut Par::Pool(&pool), device(&odd(&spans)), &mut pooled);
        assert!(serial == pooled, "{spans:?}");
    }
}

/// Of two streams that name one slot the first has it.
#[test]
fn a_slot_named_twice_is_written_once() {
    let plan = plan(&Cpu::new().unwrap());
    let mut spans = [Span::default(); N];
    (spans[0], spans[1]) = (Span::new(1, 0, 16), Span::new(1, 0, 5));
    let (mut twice, mut once) = (world(&plan), world(&plan));
    run(&plan, &mut Par::Serial, device(&odd(&spans)), &mut twice);
    run(&plan, &mut Par::Serial, Spans::Host(&spans[..1]), &mut once);
    assert!((&twice.ring, &twice.m, &twice.z) == (&once.ring, &once.m, &once.z));
}
