//! Few rows of a stream: alone or as a draft, beside other streams, from any cache, with any tile, their bits are the same. That they are right is
//! the conformance suite's to show.

use bytemuck::cast_slice;
use fam_core::{Append, Attend, Backend, Device, Dtype, Keys, Layout, Op, Plan, Rows, Shape, Span, Spans, View, ViewMut, Window};
use fam_wgpu::{FEW_ROWS, Region, Wgpu};

/// Query and kv heads: four tokens are as many rows as are few.
const HEADS: [usize; 2] = [8, 2];
const BLOCK: usize = 100;
const MEM_LEN: usize = 3;
/// Tokens of a stream, the last of them amid a block, and how many there are in a draft.
const KEYS: usize = 1_390;
const DRAFT: usize = 4;

/// Tokens of a call: stream 0 has the draft or a part of it, stream 1 what is beside it.
#[derive(Clone, Copy)]
struct Call {
    from: usize,
    len: usize,
    beside: usize,
    is_ring: bool,
    on_device: bool,
}

fn open(limits: Option<wgpu::Limits>) -> Wgpu {
    let adapters = pollster::block_on(fam_wgpu::adapters());
    let adapter = adapters.first().expect("an adapter: on Debian, apt-get install mesa-vulkan-drivers");
    pollster::block_on(adapter.open(limits)).expect("a device")
}

/// Numbers from -1 to 1, in a type whose bits are the first of an f32's.
fn random(seed: u32, count: usize, dtype: Dtype) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        (state as i32 as f32 / 2_147_483_648.0).to_le_bytes()
    };
    (0..count).flat_map(|_| next().into_iter().skip(4 - dtype.bytes())).collect()
}

fn upload(wgpu: &Wgpu, bytes: &[u8]) -> Region {
    let mut region = wgpu.alloc(bytes.len() as u64).expect("memory");
    wgpu.upload(&mut region, 0, bytes).expect("an upload");
    region
}

/// Bits of `o` and `lse` of stream 0's tokens.
fn run(wgpu: &Wgpu, dtype: Dtype, d: usize, window: Window, call: Call) -> Vec<Vec<u32>> {
    let [h, kv] = HEADS;
    let shape = Shape::builder().heads(h).kv_heads(kv).head_dim(d).block_len(BLOCK).window(window).mem_len(MEM_LEN).dtype(dtype);
    let batch = 1 + usize::from(call.beside > 0);
    let rows = if call.is_ring { BLOCK } else { call.len.max(call.beside) };
    let ops: &[Op] = if call.is_ring { &[Op::Append, Op::Attend] } else { &[Op::Attend] };
    let spec = shape.build().expect("a shape").spec(2, rows).blocks(2).slots(2).out_dtype(Dtype::F32).ops(ops);
    let spec = spec.build().expect("a spec");
    let plan = wgpu.plan(&spec).expect("a plan");
    let mut scratch = wgpu.alloc(plan.support().scratch_bytes).expect("scratch memory");
    let row = h * d;
    let (k, v) = (upload(wgpu, &random(1, 2 * KEYS * kv * d, dtype)), upload(wgpu, &random(2, 2 * KEYS * kv * d, dtype)));
    let cached = |first: usize, rows| {
        let layout = Layout::packed(dtype, [2, 1, KEYS, kv, d]).with_offset(first * kv * d);
        Layout { shape: [2, 1, rows, kv, d], ..layout }
    };
    let mut ring = wgpu.alloc(plan.support().ring_bytes).expect("a ring");
    let mut encoder = wgpu.device().create_command_encoder(&Default::default());
    for first in (0..if call.is_ring { KEYS } else { 0 }).step_by(BLOCK) {
        let len = BLOCK.min(KEYS - first);
        let spans = [0, 1].map(|n| Span::new(n, first as u64, len as u32));
        let args = Append::new(Spans::Host(&spans));
        let args = args.rows(View::new(&k, cached(first, len)), View::new(&v, cached(first, len)), &mut ring);
        wgpu.append(&plan, &mut encoder, args, &mut scratch).expect("append");
    }
    let first = KEYS - DRAFT + call.from;
    let mem = upload(wgpu, &random(3, 2 * MEM_LEN * kv * d, dtype));
    let mem_layout = Layout::packed(dtype, [2, 1, MEM_LEN, kv, d]);
    // Stream 0's queries are those of its positions.
    let most = call.len.max(call.beside);
    let size = dtype.bytes();
    let mut q = random(4, DRAFT * row, dtype)[call.from * row * size..][..call.len * row * size].to_vec();
    q.resize(most * row * size, 0);
    q.extend(random(5, (batch - 1) * most * row, dtype));
    let q = upload(wgpu, &q);
    let (mut o, mut lse) = (upload(wgpu, &vec![0; 4 * batch * most * row]), upload(wgpu, &vec![0; 4 * batch * most * h]));
    let spans = [(0, first, call.len), (1, KEYS - call.beside, call.beside)];
    let spans = spans.map(|(n, start, len)| Span::new(n, start as u64, len as u32).with_mem_rows(MEM_LEN as u32));
    let on_device = upload(wgpu, cast_slice(&spans.map(words)));
    let spans = match call.on_device {
        true => Spans::Device { mem: &on_device, batch },
        false => Spans::Host(&spans[..batch]),
    };
    let keys = match call.is_ring {
        true => Keys::Ring(&ring),
        false => Keys::Strided { k: View::new(&k, cached(0, KEYS)), v: View::new(&v, cached(0, KEYS)) },
    };
    let outputs = |columns| Layout::tokens(Dtype::F32, [batch, most, h, columns]);
    let rows = Rows::new(View::new(&q, Layout::tokens(dtype, [batch, most, h, d])), ViewMut::new(&mut o, outputs(d)));
    let args = Attend::new(spans, keys).rows(rows.lse(ViewMut::new(&mut lse, outputs(1))));
    let args = args.mem(View::new(&mem, mem_layout), View::new(&mem, mem_layout));
    wgpu.attend(&plan, &mut encoder, args, &mut scratch).expect("attend");
    wgpu.synchronize(&mut encoder).expect("its end");
    let (mut of, mut of_lse) = (vec![0u32; call.len * row], vec![0u32; call.len * h]);
    wgpu.download(&o, 0, bytemuck::cast_slice_mut(&mut of)).expect("o");
    wgpu.download(&lse, 0, bytemuck::cast_slice_mut(&mut of_lse)).expect("lse");
    of.chunks(row).zip(of_lse.chunks(h)).map(|(o, lse)| [o, lse].concat()).collect()
}

/// A span as it lies in device memory.
fn words(span: Span) -> [u32; 10] {
    let [start, origin] = [span.start, span.origin].map(|x| [x as u32, (x >> 32) as u32]);
    [start[0], start[1], origin[0], origin[1], span.len, span.slot, span.mem_rows, span.mem_entry, span.state_entry, 0]
}

#[test]
fn bits_do_not_depend_on_the_call() {
    assert_eq!(DRAFT * HEADS[0] / HEADS[1], FEW_ROWS);
    let wide = open(None);
    let narrow = open(Some(wgpu::Limits::default()));
    let draft = Call { from: 0, len: DRAFT, beside: 0, is_ring: false, on_device: false };
    for (dtype, d, window) in
        [(Dtype::F32, 64, Window::Blocks(9)), (Dtype::Bf16, 31, Window::Blocks(1 << 40)), (Dtype::Bf16, 128, Window::Tokens(700))]
    {
        let bits = run(&wide, dtype, d, window, draft);
        assert!(
            bits.iter().all(|row| row.iter().all(|bits| f32::from_bits(*bits).is_finite() && *bits != 0)),
            "every element is written"
        );
        let same = |wgpu, what: &str, call: Call| {
            let other = run(wgpu, dtype, d, window, call);
            assert!(other == bits[call.from..][..call.len], "{what}: {dtype} {d} {window:?}");
        };
        for from in [0, DRAFT - 1] {
            same(&wide, "alone", Call { from, len: 1, ..draft });
        }
        same(&wide, "beside few rows", Call { beside: 1, ..draft });
        same(&wide, "beside more rows", Call { beside: 40, ..draft });
        same(&wide, "spans of the device", Call { beside: 40, on_device: true, ..draft });
        same(&narrow, "with the least limits", draft);
        if window != Window::Blocks(1 << 40) {
            same(&wide, "from a ring", Call { is_ring: true, ..draft });
        }
    }
}
