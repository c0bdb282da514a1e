//! What is refused, and how.

mod common;

use common::{Stream, shape};
use fam_core::{
    Append, Attend, Backend, Device, Dtype, Error, InfiniRule, InfiniState, KernelId, Keys, Layout, Op, Plan, ReadRing, Rows,
    Shape, Span, Spans, View, ViewMut, Window, f16,
};
use fam_cpu::{Cpu, Isa, Par, Pool};
use std::borrow::{Borrow, BorrowMut};

/// The field that an error names.
fn field<T: std::fmt::Debug>(result: Result<T, Error>) -> &'static str {
    match result.unwrap_err() {
        Error::Invalid { field, .. } => field,
        Error::Unsupported { what, .. } | Error::LimitExceeded { what, .. } => what,
        other => panic!("{other}"),
    }
}

#[test]
fn plans_say_what_they_are() {
    let cpu = Cpu::new().unwrap().with_isa(Isa::Scalar).unwrap().with_threads(2);
    let small = shape([4, 2], 256, 16, Window::Blocks(1), 2, Dtype::Bf16);
    let plan = cpu.plan(&small.spec(1, 16).slots(3).build().unwrap()).unwrap();
    let id = plan.support().kernel(Op::Attend).unwrap();
    assert_eq!(id, KernelId { backend: "cpu", op: Op::Attend, dtype: Dtype::Bf16, variant: "scalar" });
    assert_eq!((id.to_string().as_str(), plan.support().phases(Op::Attend)), ("cpu-attend-bf16-scalar", 2));
    assert_eq!(plan.support().ring_bytes, 3 * 2 * 2 * 32 * 256 * 2);
    assert_eq!(plan.support().kernel(Op::Merge), None);

    let wide = Shape::builder().head_dim(257).build().unwrap().spec(1, 1).build().unwrap();
    assert_eq!(cpu.plan(&wide).unwrap_err(), Error::LimitExceeded { what: "head_dim", requested: 257, max: 256 });
    assert_eq!(field("avx9000".parse::<Isa>()), "isa");
    assert_eq!(field(Pool::new(0)), "threads");
}

#[test]
fn slices_must_exist() {
    let stream = Stream::<f32>::new(shape([1, 1], 8, 4, Window::Blocks(0), 0, Dtype::F32), 4, 0);
    let cpu = Cpu::new().unwrap();
    let plan = cpu.plan(&stream.shape.spec(1, 4).build().unwrap()).unwrap();
    let mut scratch = vec![0; plan.support().scratch_bytes as usize];
    let (spans, mut o) = ([Span::new(0, 0, 4)], vec![7.0f32; 32]);
    let x = View::tokens(&stream.k, [1, 4, 1, 8]);
    for (ith, nth, phase, named) in [(0, 0, 0, "slice.nth"), (2, 2, 0, "slice.ith"), (0, 1, 2, "slice.phase")] {
        let mut queue = Par::Slice { ith, nth, phase };
        let rows = Rows::new(x, ViewMut::tokens(&mut o, [1, 4, 1, 8]));
        let attend = Attend::new(Spans::Host(&spans), Keys::Strided { k: x, v: x }).rows(rows);
        assert_eq!(field(cpu.attend(&plan, &mut queue, attend, &mut scratch)), named);
        assert_eq!(field(cpu.clear(&mut queue, &mut scratch, 0..1)), named);
    }
    assert!(o.iter().all(|o| *o == 7.0));
}

#[test]
fn misaligned_elements_are_named() {
    let builder = Shape::builder().head_dim(8).block_len(4).mem_len(2).dtype(Dtype::F16).infini(InfiniRule::Linear);
    let shape = builder.build().unwrap();
    let cpu = Cpu::new().unwrap();
    let plan = cpu.plan(&shape.spec(1, 4).build().unwrap()).unwrap();
    let mut scratch = vec![0; plan.support().scratch_bytes as usize];
    let spans = [Span::new(0, 0, 4)];
    let spans = Spans::Host(&spans);
    let fields = ["q", "o", "lse", "k", "v", "mem_k", "mem_v", "sink", "infini_q", "m", "z", "beta"];
    let mut bytes: Vec<Vec<u64>> = fields.iter().map(|_| common::aligned(4096)).collect();
    for wrong in ["nothing"].iter().chain(&fields) {
        let mut mems: Vec<&mut [u8]> = bytes
            .iter_mut()
            .zip(fields)
            .map(|(bytes, field)| &mut bytemuck::cast_slice_mut(bytes)[usize::from(field == *wrong)..])
            .collect();
        let (outputs, inputs) = mems.split_at_mut(3);
        let [q, o, lse] = outputs else { unreachable!() };
        let layout = |blocks, rows, last, dtype| Layout::packed(dtype, [1, blocks, rows, 1, last]);
        let view = |i: usize, layout| View::new(&*inputs[i - 3], layout);
        let tokens = layout(1, 4, 8, Dtype::F16);
        let memory = layout(1, 2, 8, Dtype::F16);
        let state = InfiniState {
            q: view(8, tokens),
            m: view(9, Layout::infini_m(1, 1, 1, 8)),
            z: view(10, Layout::infini_z(1, 1, 1, 8)),
            beta: view(11, Layout::per_head(1)),
        };
        let rows = Rows::new(View::new(&**q, tokens), ViewMut::new(&mut **o, tokens))
            .lse(ViewMut::new(&mut **lse, layout(1, 4, 1, Dtype::F32)));
        let attend = Attend::new(spans, Keys::Strided { k: view(3, tokens), v: view(4, tokens) })
            .rows(rows)
            .mem(view(5, memory), view(6, memory))
            .sink(view(7, Layout::per_head(1)))
            .infini(state);
        let result = cpu.attend(&plan, &mut Par::Serial, attend, &mut scratch);
        if *wrong == "nothing" { result.unwrap() } else { assert_eq!(field(result), *wrong) }
    }
    let mut ring = common::aligned(plan.support().ring_bytes as usize + 8);
    let new = vec![f16::ONE; 32];
    let new = View::tokens(&new, [1, 4, 1, 8]);
    let append = Append::new(spans).rows(new, new, &mut bytemuck::cast_slice_mut(&mut ring)[1..]);
    assert_eq!(field(cpu.append(&plan, &mut Par::Serial, append, &mut scratch)), "ring");
}

#[test]
fn bytes_move_within_bounds() {
    let (cpu, queue) = (Cpu::new().unwrap(), &mut Par::Serial);
    let mut owned = cpu.alloc(10).unwrap();
    let mem: &mut [u8] = owned.borrow_mut();
    assert_eq!((mem.len(), mem.as_ptr().align_offset(64)), (10, 0));
    cpu.upload(mem, 2, &[1, 2, 3]).unwrap();
    cpu.copy_within(queue, mem, 2..5, 6).unwrap();
    cpu.clear(queue, mem, 3..4).unwrap();
    let mut back = [9; 10];
    cpu.download(mem, 0, &mut back).unwrap();
    assert_eq!(back, [0, 0, 1, 0, 3, 0, 1, 2, 3, 0]);
    cpu.synchronize(queue).unwrap();

    assert_eq!(field(cpu.upload(mem, 8, &[0; 3])), "upload");
    assert_eq!(field(cpu.upload(mem, u64::MAX, &[0; 3])), "upload");
    assert_eq!(field(cpu.download(mem, 11, &mut [])), "download");
    assert_eq!(field(cpu.clear(queue, mem, 5..11)), "clear");
    #[allow(clippy::reversed_empty_ranges)]
    let reversed = 5..4;
    assert_eq!(field(cpu.clear(queue, mem, reversed)), "clear");
    assert_eq!(field(cpu.copy_within(queue, mem, 0..11, 0)), "copy_within.from");
    assert_eq!(field(cpu.copy_within(queue, mem, 0..5, 6)), "copy_within.to");
    assert_eq!(field(cpu.copy_within(queue, mem, 0..5, 4)), "copy_within.to");
    assert_eq!(Borrow::<[u8]>::borrow(&owned), back);
    for hostile in [u64::MAX, u64::MAX - 100, i64::MAX as u64] {
        assert_eq!(cpu.alloc(hostile).unwrap_err(), Error::OutOfMemory { requested: hostile });
    }
    assert!(Borrow::<[u8]>::borrow(&cpu.alloc(0).unwrap()).is_empty());
}

#[test]
fn the_ring_can_be_read_back() {
    let stream = Stream::<f16>::new(shape([2, 2], 3, 4, Window::Blocks(1), 0, Dtype::F16), 11, 6);
    let cpu = Cpu::new().unwrap();
    let plan = cpu.plan(&stream.shape.spec(1, 11).blocks(4).slots(3).build().unwrap()).unwrap();
    let mut scratch = vec![0; plan.support().scratch_bytes as usize];
    let mut ring = cpu.alloc(plan.support().ring_bytes).unwrap();
    let spans = [stream.span()];
    let sizes = [1, 11, 2, 3];
    let rows = |data| View::tokens(data, sizes);
    let append = Append::new(Spans::Host(&spans)).rows(rows(&stream.k), rows(&stream.v), ring.borrow_mut());
    cpu.append(&plan, &mut Par::Serial, append, &mut scratch).unwrap();
    let (mut k, mut v) = (stream.v.clone(), stream.k.clone());
    let read = |k: ViewMut<'_, [u8]>, v: ViewMut<'_, [u8]>| {
        cpu.read_ring(&plan, &mut Par::Serial, ReadRing::new(Spans::Host(&spans), ring.borrow(), k, v))
    };
    read(ViewMut::tokens(&mut k, sizes), ViewMut::tokens(&mut v, sizes)).unwrap();
    assert!((&k, &v) == (&stream.k, &stream.v));
    assert_eq!(field(read(ViewMut::tokens(&mut k[..60], [1, 10, 2, 3]), ViewMut::tokens(&mut v, sizes))), "k");
    assert_eq!(field(read(ViewMut::tokens(&mut k, sizes), ViewMut::tokens(&mut v[..65], sizes))), "v");
    let mut wide = vec![0f32; 66];
    assert_eq!(field(read(ViewMut::tokens(&mut wide, sizes), ViewMut::tokens(&mut v, sizes))), "k");
}
