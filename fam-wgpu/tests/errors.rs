//! What a caller gets who brings the wrong buffer, too many calls or too large a plan; and that calls which wait in one encoder, on ranges of one
//! buffer, do not meet.

mod common;

use common::rows::{self, BLOCK, KV, Q, Tensors, alone, encoder};
use fam_core::{
    Attend, Backend, Device, Dtype, Error, InfiniRule, Keys, Layout, Op, Plan, Rows, Shape, Span, Spans, View, ViewMut, Window,
};
use fam_wgpu::{Region, Wgpu};
use std::ops::Range;
use std::sync::LazyLock;

static DEVICE: LazyLock<Wgpu> = LazyLock::new(common::device);

fn invalid<X>(result: Result<X, Error>, name: &str) {
    match result.err() {
        Some(Error::Invalid { field, .. }) => assert_eq!(field, name),
        other => panic!("{name}: {other:?}"),
    }
}

#[test]
fn regions_of_buffers_that_do_not_fit() {
    let buffer = |size, usage| {
        DEVICE.device().create_buffer(&wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false })
    };
    invalid(Region::whole(&buffer(64, wgpu::BufferUsages::COPY_DST)), "buffer.usage");
    invalid(Region::whole(&buffer(66, wgpu::BufferUsages::STORAGE)), "buffer.size");
    let buffer = buffer(64, wgpu::BufferUsages::STORAGE);
    invalid(Region::new(&buffer, 0..65), "bytes");
    invalid(Region::new(&buffer, Range { start: 8, end: 4 }), "bytes");
    assert_eq!(Region::new(&buffer, 3..64).map(|r| r.range()), Ok(3..64));
}

#[test]
fn buffers_of_another_device() {
    let adapter = common::adapter();
    let [wgpu, other] = [(); 2].map(|()| pollster::block_on(adapter.open(None)).expect("a device"));
    let plan = rows::plan(&wgpu, Dtype::F32);
    let mut tensors = Tensors { k: Tensors::apart(&other, Dtype::F32).k, ..Tensors::apart(&wgpu, Dtype::F32) };
    let mut encoder = encoder(&wgpu);
    invalid(tensors.attend(&wgpu, &plan, &mut encoder, 0), "memory");
    // Nothing was encoded, and nothing is amiss with device or encoder.
    let mut own = Tensors::apart(&wgpu, Dtype::F32);
    own.attend(&wgpu, &plan, &mut encoder, 0).expect("encoded");
    wgpu.synchronize(&mut encoder).expect("done");
    assert_eq!(own.result(&wgpu), alone(&wgpu, &plan, 0));
}

/// Fills a buffer, all bytes beside the inputs 0xa5, with the tensors at `offsets` of it.
fn shared(dtype: Dtype, offsets: [u64; 4], size: u64) -> Tensors {
    let counts = [Q, KV, KV, Q];
    let mut all = vec![0xa5; size as usize];
    for (tensor, count) in counts[..3].iter().enumerate() {
        let numbers = rows::numbers(dtype, tensor, *count);
        all[offsets[tensor] as usize..][..numbers.len()].copy_from_slice(&numbers);
    }
    let mut whole = DEVICE.alloc(size).expect("memory");
    DEVICE.upload(&mut whole, 0, &all).expect("uploaded");
    let [q, k, v, o] = [0, 1, 2, 3].map(|tensor| {
        let bytes = (counts[tensor] * dtype.bytes()) as u64;
        Region::new(whole.buffer(), offsets[tensor]..offsets[tensor] + bytes).expect("a range")
    });
    Tensors { q, k, v, o }
}

#[test]
fn all_tensors_in_one_buffer_and_two_calls_in_one_encoder() {
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let plan = rows::plan(&DEVICE, dtype);
        let size = dtype.bytes() as u64;
        // Elements apart by one: no offset is a multiple of 256, those of bf16 are in the middle of words.
        let mut offset = 0;
        let offsets = [Q, KV, KV, Q].map(|count| {
            let at = offset + size;
            offset = at + count as u64 * size;
            at
        });
        assert!(offsets.iter().all(|offset| offset % 256 != 0));
        let whole = (offset + 64).next_multiple_of(4);
        let [mut first, mut second] = [shared(dtype, offsets, whole), shared(dtype, offsets, whole)];
        let mut encoder = encoder(&DEVICE);
        first.attend(&DEVICE, &plan, &mut encoder, 0).expect("encoded");
        second.attend(&DEVICE, &plan, &mut encoder, 2 * BLOCK).expect("encoded");
        DEVICE.synchronize(&mut encoder).expect("done");
        let expected = [0, 2 * BLOCK].map(|start| alone(&DEVICE, &plan, start));
        assert_ne!(expected[0], expected[1]);
        for (tensors, expected) in [first, second].iter().zip(&expected) {
            assert_eq!(&tensors.result(&DEVICE), expected, "{dtype}");
            // Neighbours in the same words are as they were.
            let all = Region::whole(tensors.o.buffer()).expect("a storage buffer");
            let mut bytes = vec![0; whole as usize];
            DEVICE.download(&all, 0, &mut bytes).expect("downloaded");
            let Range { start, end } = tensors.o.range();
            let around = [&bytes[start as usize - size as usize..start as usize], &bytes[end as usize..]];
            assert!(around.iter().all(|bytes| bytes.iter().all(|&byte| byte == 0xa5)), "{dtype}: {around:?}");
        }
    }
}

#[test]
fn offsets_that_no_element_can_have() {
    let plan = rows::plan(&DEVICE, Dtype::Bf16);
    let own = || Tensors::apart(&DEVICE, Dtype::Bf16);
    let odd = |region: &Region| {
        let buffer = DEVICE.alloc(region.range().end + 4).expect("memory");
        Region::new(buffer.buffer(), 1..region.range().end + 1).expect("a range")
    };
    for (name, mut tensors) in [
        ("q", Tensors { q: odd(&own().q), ..own() }),
        ("k", Tensors { k: odd(&own().k), ..own() }),
        ("v", Tensors { v: odd(&own().v), ..own() }),
        ("o", Tensors { o: odd(&own().o), ..own() }),
    ] {
        match tensors.attend(&DEVICE, &plan, &mut encoder(&DEVICE), 0) {
            Err(Error::Invalid { field, .. }) => assert!(field.starts_with(name), "{field} for {name}"),
            other => panic!("{name}: {other:?}"),
        }
    }
}

#[test]
fn device_spans_between_words() {
    let plan = rows::plan(&DEVICE, Dtype::F32);
    let Tensors { q, k, v, mut o } = Tensors::apart(&DEVICE, Dtype::F32);
    let [rows, kv] =
        [[1, BLOCK, rows::HEADS, rows::D], [1, rows::TOKENS, 1, rows::D]].map(|sizes| Layout::tokens(Dtype::F32, sizes));
    let spans = Region::new(DEVICE.alloc(64).expect("memory").buffer(), 2..42).expect("a range");
    let keys = Keys::Strided { k: View::new(&k, kv), v: View::new(&v, kv) };
    let args = Attend::new(Spans::Device { mem: &spans, batch: 1 }, keys);
    let args = args.rows(Rows::new(View::new(&q, rows), ViewMut::new(&mut o, rows)));
    let mut scratch = DEVICE.alloc(plan.support().scratch_bytes).expect("memory");
    invalid(DEVICE.attend(&plan, &mut encoder(&DEVICE), args, &mut scratch), "spans");
}

/// An axis of stride 0 can have more entries than shaders count.
#[test]
fn more_entries_than_words_count() {
    let shape = Shape::builder().heads(1).kv_heads(1).head_dim(8).block_len(4).window(Window::Blocks(1)).mem_len(2);
    let plan =
        DEVICE.plan(&shape.build().expect("a shape").spec(1, 4).ops(&[Op::Attend]).build().expect("a spec")).expect("a plan");
    let [q, k, mut o] = [4 * 8, 4 * 8, 4 * 8].map(|n| DEVICE.alloc(4 * n).expect("memory"));
    let rows = Layout::tokens(Dtype::F32, [1, 4, 1, 8]);
    let mut memory = Layout::packed(Dtype::F32, [1, 1, 2, 1, 8]);
    (memory.shape[1], memory.stride[1]) = (1 << 32, 0);
    let span = [Span::new(0, 0, 4).with_mem_rows(2)];
    let view = |layout| View::new(&k, layout);
    let args = Attend::new(Spans::Host(&span), Keys::Strided { k: view(rows), v: view(rows) });
    let args = args.rows(Rows::new(View::new(&q, rows), ViewMut::new(&mut o, rows))).mem(view(memory), view(memory));
    let mut scratch = DEVICE.alloc(plan.support().scratch_bytes).expect("memory");
    match DEVICE.attend(&plan, &mut encoder(&DEVICE), args, &mut scratch) {
        Err(Error::LimitExceeded { requested, max, .. }) => assert_eq!((requested, max), (1 << 32, u64::from(u32::MAX))),
        other => panic!("{other:?}"),
    }
}

/// What an encoder would refuse at its end, with all that it holds.
#[test]
fn buffers_that_cannot_be_copied() {
    let descriptor =
        wgpu::BufferDescriptor { label: None, size: 64, usage: wgpu::BufferUsages::STORAGE, mapped_at_creation: false };
    let mut region = Region::whole(&DEVICE.device().create_buffer(&descriptor)).expect("a region");
    let mut encoder = encoder(&DEVICE);
    invalid(DEVICE.clear(&mut encoder, &mut region, 0..16), "clear");
    invalid(DEVICE.copy_within(&mut encoder, &mut region, 0..16, 32), "copy_within");
    DEVICE.synchronize(&mut encoder).expect("a whole encoder");
}

#[test]
fn calls_that_wait_in_an_encoder_are_limited_and_given_back() {
    let plan = rows::plan(&DEVICE, Dtype::F32);
    let mut tensors = Tensors::apart(&DEVICE, Dtype::F32);
    let mut fill = |encoder: &mut wgpu::CommandEncoder| {
        for calls in 0.. {
            match tensors.attend(&DEVICE, &plan, encoder, 0) {
                Ok(()) => {}
                Err(Error::LimitExceeded { requested, max, .. }) => {
                    assert_eq!((calls, requested), (max, max + 1));
                    return calls;
                }
                Err(other) => panic!("{other}"),
            }
        }
        unreachable!("a call for each number")
    };
    let mut dropped = encoder(&DEVICE);
    let most = fill(&mut dropped);
    assert!(most >= 64, "{most} calls");
    drop(dropped);
    // As many again, which are now submitted, and as many after those.
    let mut submitted = encoder(&DEVICE);
    assert_eq!(fill(&mut submitted), most);
    DEVICE.synchronize(&mut submitted).expect("done");
    assert_eq!(fill(&mut encoder(&DEVICE)), most);
    assert_eq!(alone(&DEVICE, &plan, 0).len(), 4 * Q);
}

/// A plan on a device with limits of a few MiB.
#[test]
fn plans_beyond_the_limits_of_a_device() {
    let limits = wgpu::Limits { max_storage_buffer_binding_size: 4 << 20, max_buffer_size: 8 << 20, ..common::least() };
    let small = pollster::block_on(common::adapter().open(Some(limits))).expect("a device");
    let shape = || Shape::builder().head_dim(64).block_len(128).window(Window::Blocks(1));
    let refused = |spec: fam_core::SpecBuilder, name: &str| {
        let spec = spec.build().expect("a spec");
        for refusal in [small.support(&spec).map(drop), small.plan(&spec).map(drop)] {
            match refusal {
                Err(Error::LimitExceeded { what, requested, max }) => {
                    assert!(what.contains(name) && requested > max, "{what}: {requested} of {max}");
                }
                other => panic!("{name}: {other:?}"),
            }
        }
        // Another device has room for it.
        DEVICE.support(&spec).expect("served where limits are larger");
    };
    let [plain, infini] = [shape(), shape().infini(InfiniRule::Linear)].map(|shape| shape.build().expect("a shape"));
    // 40 slots of 256 rows, keys and values, 64 channels of f32: 5 MiB.
    refused(plain.spec(1, 128).slots(40), "ring");
    refused(plain.spec(200, 128).slots(200).ops(&[Op::Merge]), "q");
    refused(infini.spec(1, 20_000).blocks(157).ops(&[Op::Attend]), "q");
    let wide = Shape::builder().head_dim(257).build().and_then(|shape| shape.spec(1, 1).build()).expect("a spec");
    assert!(matches!(DEVICE.plan(&wide), Err(Error::LimitExceeded { what: "head_dim", requested: 257, .. })));
}

#[test]
fn memory_beyond_the_device() {
    let max = DEVICE.device().limits().max_buffer_size;
    println!("at most {max} bytes");
    for bytes in [max.saturating_add(1), u64::MAX - 8, u64::MAX] {
        match DEVICE.alloc(bytes) {
            Err(Error::LimitExceeded { requested, .. } | Error::OutOfMemory { requested }) => assert_eq!(requested, bytes),
            other => panic!("{other:?}"),
        }
    }
}
