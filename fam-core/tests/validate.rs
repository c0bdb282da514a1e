//! Everything that is refused at the door, by name; and that nothing at the door panics, whatever the numbers.

mod common;

use common::*;
use fam_core::*;
use proptest::prelude::*;

#[test]
fn shapes_that_break_a_rule_name_the_field() {
    let refused = |b: ShapeBuilder| field(b.build().unwrap_err());
    assert_eq!(refused(shape().heads(0)), "heads");
    assert_eq!(refused(shape().kv_heads(0)), "kv_heads");
    assert_eq!(refused(shape().kv_heads(3)), "heads");
    assert_eq!(refused(shape().head_dim(0)), "head_dim");
    assert_eq!(refused(shape().block_len(0)), "block_len");
    assert_eq!(refused(shape().window(Window::Tokens(0))), "window");
    assert_eq!(refused(shape().scale(f32::NAN)), "scale");
    assert_eq!(refused(shape().scale(f32::INFINITY)), "scale");
    assert_eq!(refused(shape().dtype(Dtype::F16).kv_dtype(Dtype::F32)), "kv_dtype");
    assert_eq!(refused(shape().block_len(1 << 40)), "elements of one block's q");
    assert_eq!(refused(shape().mem_len(usize::MAX)), "elements of one set of memory rows");
    assert_eq!(refused(shape().head_dim(1 << 16).block_len(1)), "elements of one slot's m");
    shape().kv_dtype(Dtype::F32).build().unwrap();
}

#[test]
fn specs_that_break_a_rule_name_the_field() {
    let s = shape().build().unwrap();
    let refused = |b: SpecBuilder| field(b.build().unwrap_err());
    assert_eq!(refused(s.spec(1, 4).ring_rows(4)), "ring_rows");
    assert_eq!(refused(s.spec(1, 4).ring_rows(9)), "ring_rows");
    assert_eq!(refused(s.spec(1, 4).blocks(0)), "blocks");
    assert_eq!(refused(s.spec(1, 4).out_dtype(Dtype::F16)), "out_dtype");
    assert_eq!(refused(s.spec(usize::MAX, usize::MAX)), "slots or rows");
    assert_eq!(refused(s.spec(1 << 20, 1 << 20)), "elements of q");
    assert_eq!(refused(s.spec(1, 4).slots(1 << 28)), "elements of the key ring");
    assert_eq!(refused(s.spec(1, 4).slots(1 << 26).ops(&[Op::Attend])), "elements of the memory keys");
    for blocks in [usize::MAX, usize::MAX / 4, 1 << 30] {
        assert_eq!(refused(s.spec(1, 4).blocks(blocks).ops(&[Op::Attend])), "tokens of the blocks in a call");
    }
    let wide = shape().window(Window::Blocks(usize::MAX)).build().unwrap();
    assert_eq!(refused(wide.spec(1, 4)), "ring rows");
    assert_eq!(s.spec(1, 4).build().unwrap().ring_rows(), 8);
    let tokens = shape().window(Window::Tokens(6)).build().unwrap();
    assert_eq!(tokens.spec(1, 4).build().unwrap().ring_rows(), 12);
    assert_eq!(s.spec(0, 0).build().unwrap().blocks(), 1);
}

#[test]
fn a_span_at_the_end_of_all_positions_has_blocks_too() {
    for (start, len, blocks) in [(u64::MAX, 1, 1), (u64::MAX, u32::MAX, 1), (u64::MAX - 8, 8, 3), (7, 0, 0), (7, 1, 1), (7, 2, 2)]
    {
        assert_eq!(Span::new(0, start, len).blocks(4), blocks, "{start} + {len}");
    }
}

#[test]
fn spans_that_break_a_rule_name_the_field() {
    let s = shape().build().unwrap();
    let plan = plan(s.spec(2, 4).slots(3));
    let (k, v, mut ring) = (region(0), region(1 << 20), region(2 << 20));
    let layout = Layout::tokens(Dtype::F32, [2, 4, 2, 8]);
    let mut check = |spans: &[Span]| {
        let args = Append::new(Spans::Host(spans)).rows(View::new(&k, layout), View::new(&v, layout), &mut ring);
        args.validate(&plan, &region(9 << 20))
    };
    check(&[Span::new(0, 0, 4), Span::new(2, 5, 3)]).unwrap();
    check(&[]).unwrap();
    assert_eq!(field(check(&[Span::new(3, 0, 4)]).unwrap_err()), "span.slot");
    assert_eq!(field(check(&[Span::new(1, 0, 4), Span::new(1, 0, 4)]).unwrap_err()), "span.slot");
    assert_eq!(field(check(&[Span::new(0, 0, 4).with_mem_rows(4)]).unwrap_err()), "span.mem_rows");
    assert_eq!(field(check(&[Span::new(0, 3, 4).with_origin(4)]).unwrap_err()), "span.origin");
    assert!(field(check(&[Span::new(0, 0, 5)]).unwrap_err()).contains("rows"));
    assert!(field(check(&[Span::new(0, 1, 4)]).unwrap_err()).contains("blocks touched"));
    assert_eq!(field(check(&[Span::new(0, u64::MAX, 4)]).unwrap_err()), "span.start");
    assert_eq!(field(check(&[Span { reserved: 7, ..Span::new(0, 0, 4) }]).unwrap_err()), "span.reserved");
    assert!(field(check(&[Span::default(), Span::new(1, 0, 0), Span::new(2, 0, 0)]).unwrap_err()).contains("batch"));
}

#[test]
fn views_that_break_a_rule_name_the_field() {
    let s = shape().build().unwrap();
    let plan = plan(s.spec(1, 4));
    let spans = [Span::new(0, 0, 4).with_mem_rows(3)];
    let good = Layout::tokens(Dtype::F32, [1, 4, 4, 8]);
    let kv = Layout::tokens(Dtype::F32, [1, 4, 2, 8]);
    let mem = Layout::packed(Dtype::F32, [1, 1, 3, 2, 8]);
    let check = |q: Layout, o: Layout, at: u64, k: Layout, mem: Option<Layout>, lse: Option<Layout>| {
        let (qm, km, mm) = (region(0), region(1 << 20), region(2 << 20));
        let (mut om, mut lm) = (region(at), region(4 << 20));
        let mut rows = Rows::new(View::new(&qm, q), ViewMut::new(&mut om, o));
        rows.lse = lse.map(|l| ViewMut::new(&mut lm, l));
        let keys = Keys::Strided { k: View::new(&km, k), v: View::new(&km, k) };
        let mut args = Attend::new(Spans::Host(&spans), keys).rows(rows);
        if let Some(mem) = mem {
            args = args.mem(View::new(&mm, mem), View::new(&mm, mem));
        }
        args.validate(&plan, &region(9 << 20)).map_err(field)
    };
    let free = 3 << 20;
    check(good, good, free, kv, Some(mem), None).unwrap();
    // Inputs may repeat, outputs may not.
    check(good.with_stride([0; 4]), good, free, kv, Some(mem), None).unwrap();
    assert_eq!(check(good, good.with_stride([0; 4]), free, kv, Some(mem), None), Err("o".into()));
    assert_eq!(check(good, good.with_stride([128, 128, 32, 7]), free, kv, Some(mem), None), Err("o".into()));
    // Heads outermost, as (batch, heads, tokens, dim) callers have them.
    check(good, good.with_stride([128, 128, 8, 32]), free, kv, Some(mem), None).unwrap();
    let short = Layout::tokens(Dtype::F32, [1, 3, 4, 8]);
    assert_eq!(check(short, good, free, kv, Some(mem), None), Err("q".into()));
    assert_eq!(check(Layout { dtype: Dtype::F16, ..good }, good, free, kv, Some(mem), None), Err("q".into()));
    assert_eq!(check(good.with_offset(1 << 18), good, free, kv, Some(mem), None), Err("q".into()));
    assert_eq!(check(good.with_offset(usize::MAX), good, free, kv, Some(mem), None), Err("q".into()));
    assert_eq!(check(good, good, free, Layout::tokens(Dtype::F32, [1, 3, 2, 8]), Some(mem), None), Err("k".into()));
    assert_eq!(check(good, good, free, kv, None, None), Err("mem".into()));
    assert_eq!(check(good, good, free, kv, Some(Layout::packed(Dtype::F32, [1, 1, 2, 2, 8])), None), Err("mem_k".into()));
    assert_eq!(check(good, good, free, kv, Some(mem), Some(Layout::tokens(Dtype::F16, [1, 4, 4, 1]))), Err("lse".into()));
    // The output starts inside q, and just behind it.
    assert_eq!(check(good, good, 511, kv, Some(mem), None), Err("o".into()));
    check(good, good, 512, kv, Some(mem), None).unwrap();
}

#[test]
fn heads_in_front_of_rows_name_the_same_elements() {
    // Memory (batch 2, heads 3, rows 9, dim 4) inside a larger tensor: 5 tokens, then 2 blocks of 2 memory rows.
    let (offset, [sb, sh, sr]) = (9, [500, 100, 6]);
    let packed = Layout::heads_first(Dtype::F16, [2, 3, 9, 4], [sb, sh, sr]).with_offset(offset);
    let (tokens, memory) = (packed.rows(0, 5).unwrap(), packed.rows(5, 4).unwrap().blocks_of(2).unwrap());
    assert_eq!((tokens.shape, memory.shape), ([2, 1, 5, 3, 4], [2, 2, 2, 3, 4]));
    for (n, h) in (0..2).flat_map(|n| (0..3).map(move |h| (n, h))) {
        let element = |row: usize| offset + n * sb + h * sh + row * sr;
        (0..5).for_each(|row| assert_eq!(tokens.at([n, 0, row, h]), element(row)));
        (0..4).for_each(|row| assert_eq!(memory.at([n, row / 2, row % 2, h]), element(5 + row)));
    }
    // The last element of all is that of the last memory row.
    let last = (offset + sb + 2 * sh + 8 * sr + 3) as u64;
    assert_eq!([packed, memory].map(|l| l.end_bytes()), [Some(2 * (last + 1)); 2]);
    // No rows are some, too: a call without tokens has no blocks.
    assert_eq!(packed.rows(9, 0).unwrap().blocks_of(3).unwrap().shape, [2, 0, 3, 3, 4]);

    for (first, count) in [(0, 10), (10, 0), (5, 5), (usize::MAX, 2)] {
        assert_eq!(packed.rows(first, count).map_err(field), Err("rows".into()), "{first} + {count}");
    }
    for rows in [0, 2, 10] {
        assert_eq!(packed.blocks_of(rows).map_err(field), Err("rows".into()), "blocks of {rows}");
    }
    assert_eq!(memory.blocks_of(1).map_err(field), Err("blocks".into()));
}

#[test]
fn scratch_and_device_spans_are_checked_like_tensors() {
    let s = shape().build().unwrap();
    let spec = s.spec(1, 4).build().unwrap();
    let plan = TestPlan(spec, Support::new(vec![]).ring_bytes(64).scratch_bytes(4096));
    let kv = Layout::tokens(Dtype::F32, [1, 4, 2, 8]);
    let check = |scratch: Region, spans: Region| {
        let (k, v, mut ring) = (region(0), region(1 << 20), region(2 << 20));
        let args = Append::new(Spans::Device { mem: &spans, batch: 1 });
        args.rows(View::new(&k, kv), View::new(&v, kv), &mut ring).validate(&plan, &scratch).map_err(field)
    };
    check(region(3 << 20), region(4 << 20)).unwrap();
    assert_eq!(check(Region { first: 3 << 20, bytes: 4095 }, region(4 << 20)), Err("scratch".into()));
    assert_eq!(check(region(0), region(4 << 20)), Err("scratch".into()));
    assert_eq!(check(region(3 << 20), region(2 << 20)), Err("ring".into()));
    assert_eq!(check(region(3 << 20), Region { first: 4 << 20, bytes: 39 }), Err("spans".into()));
}

#[test]
fn a_plan_serves_its_own_ops_and_no_ring_without_append() {
    let wide = shape().window(Window::Blocks(usize::MAX)).build().unwrap();
    let plan = plan(wide.spec(1, 4).ops(&[Op::Attend]));
    assert_eq!(plan.spec().ring_rows(), 0);
    let (k, v, mut ring, scratch) = (region(0), region(1 << 20), region(2 << 20), region(9 << 20));
    let kv = Layout::tokens(Dtype::F32, [1, 4, 2, 8]);
    let spans = [Span::new(0, 0, 4)];
    let linear = Keys::Strided { k: View::new(&k, kv), v: View::new(&v, kv) };
    Attend::new(Spans::Host(&spans), linear).validate(&plan, &scratch).unwrap();
    let from_ring = Attend::new(Spans::Host(&spans), Keys::Ring(&ring)).validate(&plan, &scratch);
    assert_eq!(from_ring.map_err(field), Err("keys".into()));
    let append = Append::new(Spans::Host(&spans)).rows(View::new(&k, kv), View::new(&v, kv), &mut ring);
    assert_eq!(append.validate(&plan, &scratch).map_err(field), Err("op of this plan".into()));
}

#[test]
fn compressive_memory_needs_its_shape_and_an_entry_more_than_segments() {
    let s = shape().infini(InfiniRule::Delta).build().unwrap();
    let with = plan(s.spec(1, 4));
    let without = plan(shape().build().unwrap().spec(1, 4).ops(&[Op::Append, Op::InfiniWrite]));
    let spans = [Span::new(0, 0, 4)];
    let check = |plan: &TestPlan, entries: usize| {
        let (mut m, mut z, k) = (region(0), region(1 << 20), region(2 << 20));
        let kv = Layout::tokens(Dtype::F32, [1, 4, 2, 8]);
        let keys = Keys::Strided { k: View::new(&k, kv), v: View::new(&k, kv) };
        let m = ViewMut::new(&mut m, Layout::infini_m(1, entries, 2, 8));
        let z = ViewMut::new(&mut z, Layout::infini_z(1, entries, 2, 8));
        InfiniWrite::new(Spans::Host(&spans), keys, m, z).validate(plan, &region(9 << 20)).map_err(field)
    };
    check(&with, 2).unwrap();
    assert_eq!(check(&with, 1), Err("m".into()));
    assert_eq!(check(&without, 2), Err("infini".into()));
}

proptest! {
    /// Extreme numbers give an answer or an error, never a panic.
    #[test]
    fn extreme_sizes_do_not_panic(
        sizes in prop::array::uniform5(prop_oneof![0usize..4, any::<usize>()]),
        stride in prop::array::uniform4(prop_oneof![0usize..64, any::<usize>()]),
        offset in prop_oneof![0usize..64, any::<usize>()],
        start in any::<u64>(), origin in any::<u64>(), len in any::<u32>(),
    ) {
        let layout = Layout { offset, ..Layout::packed(Dtype::F16, sizes).with_stride(stride) };
        let _ = (layout.elements(), layout.end_bytes());
        let _ = (Layout::infini_m(sizes[0], sizes[1], sizes[2], sizes[3]), Layout::tokens(Dtype::F32, [sizes[0]; 4]));
        let _ = layout.rows(sizes[1], sizes[3]).and_then(|l| l.blocks_of(sizes[4])).map(|l| l.end_bytes());
        let heads_first = Layout::heads_first(Dtype::F32, [sizes[0], sizes[1], sizes[2], sizes[3]], [stride[0], stride[1], stride[2]]);
        let _ = heads_first.blocks_of(sizes[4]).and_then(|l| l.rows(offset, sizes[3])).map(|l| l.end_bytes());
        let span = Span::new(1, start, len).with_origin(origin);
        let _ = (span.end(), span.blocks(sizes[0]), span.block_keys(sizes[1], sizes[2]));
        let s = shape().build().unwrap();
        let _ = (span.first_key(&s), span.clamped(&s.spec(3, 4).build().unwrap()));
        let b = Shape::builder().heads(sizes[0]).kv_heads(sizes[1]).head_dim(sizes[2]).block_len(sizes[3]).mem_len(sizes[4]);
        for window in [Window::Blocks(stride[0]), Window::Tokens(stride[1])] {
            if let Ok(shape) = b.clone().window(window).build() {
                let _ = shape.spec(stride[2], stride[3]).blocks(offset).build();
                let _ = (span.first_key(&shape), span.window_first(start, &shape));
            }
        }
        let plan = plan(s.spec(2, 4));
        let (k, v, mut ring) = (region(0), region(1 << 20), region(2 << 20));
        let args = Append::new(Spans::Host(std::slice::from_ref(&span)));
        let _ = args.rows(View::new(&k, layout), View::new(&v, layout), &mut ring).validate(&plan, &region(9 << 20));
    }

    /// A layout that an output may have never names one byte twice.
    #[test]
    fn accepted_outputs_do_not_repeat(stride in prop::array::uniform4(0usize..40), rows in 1usize..4, heads in 1usize..3) {
        let s = Shape::builder().heads(heads).head_dim(3).block_len(4).build().unwrap();
        let plan = plan(s.spec(2, 4).ops(&[Op::Merge]));
        let layout = Layout::tokens(Dtype::F32, [2, rows, heads, 3]).with_stride(stride);
        let (a, l, mut o) = (region(0), region(1 << 20), region(2 << 20));
        let packed = Layout::tokens(Dtype::F32, [2, rows, heads, 3]);
        let lse = Layout::tokens(Dtype::F32, [2, rows, heads, 1]);
        let part = || Partial { o: View::new(&a, packed), lse: View::new(&l, lse) };
        if Merge::new(part(), part(), ViewMut::new(&mut o, layout)).validate(&plan, &region(9 << 20)).is_ok() {
            let mut seen = std::collections::HashSet::new();
            for (n, r, h, d) in (0..2).flat_map(|n| (0..rows).flat_map(move |r| (0..heads).flat_map(move |h| (0..3).map(move |d| (n, r, h, d))))) {
                prop_assert!(seen.insert(layout.at([n, 0, r, h]) + d));
            }
        }
    }
}
