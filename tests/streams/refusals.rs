//! Calls that are refused at the door: a typed error that names the field, and not a bit of any slot changed.

use crate::faulty::cpu;
use crate::fixture::{Call, Feed, Layer, shapes};
use fam::cpu::Par;
use fam::{Backend, Device, Error, InfiniRule, Layout, Op, Plan, Shape, Step, Streams, View, Window};
use std::borrow::{Borrow, BorrowMut};

const FEED: Feed = Feed(1);

/// Two streams, one inside a block.
fn layer(shape: &Shape) -> Layer {
    let mut layer = Layer::new(shape, 2);
    layer.run_to(0, FEED, 8, 4);
    layer.enter_block(0, FEED);
    layer.run_to(1, Feed(2), 5, 4);
    layer
}

/// Asserts that `call` is refused for `field` and changes nothing.
#[track_caller]
fn refused<T: std::fmt::Debug>(layer: &mut Layer, field: &str, call: impl FnOnce(&mut Layer) -> fam::Result<T>) {
    let before = layer.snapshots();
    match call(layer) {
        Err(Error::Invalid { field: named, .. }) => assert_eq!(named, field),
        other => panic!("expected a refusal that names {field}, got {other:?}"),
    }
    assert_eq!(layer.snapshots(), before);
}

#[test]
fn slots_out_of_range() {
    for shape in shapes() {
        let layer = &mut layer(&shape);
        for slot in [2, u32::MAX] {
            refused(layer, "slot", |l| l.tokens(slot, FEED, 1));
            refused(layer, "slot", |l| l.streams.keep_memory(&[0, slot]));
            refused(layer, "slot", |l| l.streams.rollback(slot, 0));
            refused(layer, "slot", |l| l.copy_slot(0, slot));
            refused(layer, "slot", |l| l.copy_slot(slot, 0));
            refused(layer, "slot", |l| l.reset(slot, 0));
            refused(layer, "slot", |l| l.streams.poison(slot));
            refused(layer, "slot", |l| l.streams.position(slot));
            refused(layer, "slot", |l| l.streams.memory_due(slot));
            refused(layer, "slot", |l| l.streams.infini_state(slot).map(drop));
            refused(layer, "slot", |l| l.streams.snapshot(&l.plan, &mut Par::Serial, slot));
            let snapshot = layer.snapshot(0);
            refused(layer, "slot", |l| l.restore(slot, &snapshot));
        }
    }
}

#[test]
fn a_slot_twice() {
    for shape in shapes() {
        let layer = &mut layer(&shape);
        let mut call = Call::new(layer, &[(1, FEED, 1), (1, FEED, 1)]);
        refused(layer, "slots", |l| l.enqueue(&mut call).map(drop));
    }
}

#[test]
fn past_the_end_of_the_block() {
    for shape in shapes() {
        // A plan for longer calls: a step of Streams stays inside a block nevertheless.
        let spec = shape.spec(2, 16).slots(2).build().unwrap();
        let mut layer = Layer::of(spec, Default::default());
        layer.run_to(1, Feed(2), 5, 4);
        for (slot, len) in [(0, 5), (0, 16), (1, 4)] {
            refused(&mut layer, "len", |l| l.tokens(slot, FEED, len));
        }
        assert!(layer.tokens(0, FEED, 4).is_ok() && layer.tokens(1, FEED, 3).is_ok());
    }
}

#[test]
fn lengths_for_other_streams() {
    let layer = &mut layer(&shapes()[0]);
    let mut call = Call::new(layer, &[(0, FEED, 1), (1, Feed(2), 1)]);
    call.lens.pop();
    refused(layer, "lens", |l| l.enqueue(&mut call).map(drop));
    call.lens = vec![1, 1, 1];
    refused(layer, "lens", |l| l.enqueue(&mut call).map(drop));
    // More tokens than the tensors have.
    call.lens = vec![1, 2];
    refused(layer, "k", |l| l.enqueue(&mut call).map(drop));
}

#[test]
fn more_streams_than_planned() {
    let shape = shapes()[0];
    let mut layer = Layer::of(shape.spec(1, 4).slots(2).build().unwrap(), Default::default());
    let mut call = Call::new(&layer, &[(0, FEED, 1), (1, FEED, 1)]);
    let before = layer.snapshots();
    let error = layer.enqueue(&mut call).map(drop).unwrap_err();
    assert!(matches!(error, Error::LimitExceeded { requested: 2, max: 1, .. }), "{error}");
    assert_eq!(layer.snapshots(), before);
}

#[test]
fn memories_that_do_not_fit() {
    let layer = &mut layer(&shapes()[0]);
    refused(layer, "mem_k", |l| l.set_memory(0, FEED, 4));
    refused(layer, "position", |l| l.set_memory(1, FEED, 3));
    let without = &mut self::layer(&shapes()[2]);
    refused(without, "mem_len", |l| l.set_memory(0, FEED, 0));
}

#[test]
fn compressive_memory_given_or_missing() {
    let [mut with, mut without] = [layer(&shapes()[3]), layer(&shapes()[2])];
    let mut call = Call::new(&with, &[(0, FEED, 1)]);
    refused(&mut with, "infini", |l| {
        let Step { slots, k, v, .. } = call.step();
        l.streams.step(&l.plan, &mut Par::Serial, Step::new(slots, k, v), l.scratch.borrow_mut()).map(drop)
    });
    let mut call = Call::new(&with, &[(0, FEED, 1)]);
    refused(&mut without, "infini", |l| l.enqueue(&mut call).map(drop));
    refused(&mut without, "infini", |l| l.streams.infini_state(0).map(drop));
}

/// A queue that leaves a part of every op out would leave a part of the state behind.
#[test]
fn a_slice_of_a_step() {
    for shape in shapes() {
        let mut layer = Layer::new(&shape, 2);
        layer.run_to(0, FEED, 8, 4);
        layer.enter_block(0, FEED);
        let saved = layer.snapshot(0);
        let half = || Par::Slice { ith: 0, nth: 2, phase: 0 };
        refused(&mut layer, "slice.nth", |l| {
            let mut call = Call::new(l, &[(0, FEED, 1)]);
            l.streams.step(&l.plan, &mut half(), call.step(), l.scratch.borrow_mut()).map(drop)
        });
        refused(&mut layer, "slice.nth", |l| l.streams.copy_slot(&mut half(), 0, 1));
        refused(&mut layer, "slice.nth", |l| l.streams.reset(&mut half(), 0, 0));
        refused(&mut layer, "slice.nth", |l| l.streams.snapshot(&l.plan, &mut half(), 0).map(drop));
        refused(&mut layer, "slice.nth", |l| l.streams.restore(&l.plan, &mut half(), 1, &saved, l.scratch.borrow_mut()));
        if shape.mem_len() > 0 {
            let owned = cpu().alloc(1 << 10).unwrap();
            let mem = View::new(owned.borrow(), Layout::tokens(shape.dtype(), [1, 1, shape.kv_heads(), shape.head_dim()]));
            refused(&mut layer, "slice.nth", |l| {
                l.streams.set_memory(&l.plan, &mut half(), &[0], mem, mem, l.scratch.borrow_mut())
            });
        }
        // The whole is a slice too.
        let mut call = Call::new(&layer, &[(0, FEED, 1)]);
        let mut whole = Par::Slice { ith: 0, nth: 1, phase: 0 };
        layer.streams.step(&layer.plan, &mut whole, call.step(), layer.scratch.borrow_mut()).unwrap().commit();
    }
}

/// Without a step's ops there is nothing that streams could do.
#[test]
fn a_plan_without_a_steps_ops() {
    for (shape, ops) in
        [(0, vec![Op::Attend]), (0, vec![Op::Append, Op::Merge]), (3, vec![Op::Append, Op::Attend, Op::InfiniRead])]
    {
        let plan = cpu().plan(&shapes()[shape].spec(1, 4).ops(&ops).build().unwrap()).unwrap();
        let streams = Streams::new(cpu(), &plan);
        assert!(matches!(streams, Err(Error::Invalid { field: "plan.ops", .. })), "{streams:?}");
    }
}

/// Nothing is written by a step that is refused, whichever of its tensors is at fault.
#[test]
fn misaligned_memory() {
    let layer = &mut layer(&shapes()[0]);
    let shape = layer.shape();
    let owned = cpu().alloc(1 << 10).unwrap();
    let odd = &Borrow::<[u8]>::borrow(&owned)[1..];
    let layout = Layout::tokens(shape.dtype(), [1, 3, shape.kv_heads(), shape.head_dim()]);
    for kept in [false, true] {
        if kept {
            layer.streams.keep_memory(&[0]).unwrap();
        }
        refused(layer, "mem_k", |l| {
            let (k, v) = (View::new(odd, layout), View::new(odd, layout));
            l.streams.set_memory(&l.plan, &mut Par::Serial, &[0], k, v, l.scratch.borrow_mut())
        });
    }
    refused(layer, "k", |l| {
        let step = Step::new(&[0], View::new(odd, layout), View::new(odd, layout));
        l.streams.step(&l.plan, &mut Par::Serial, step, l.scratch.borrow_mut()).map(drop)
    });
    // The last op of a step is at fault; what the first ones write is as it was.
    let mut layer = Layer::new(&shapes()[3], 1);
    let mut call = Call::new(&layer, &[(0, FEED, 3)]);
    let outputs = call.outputs(0);
    refused(&mut layer, "k", |l| {
        let mut step = call.step();
        step.infini.as_mut().unwrap().k = View::new(odd, step.k.layout);
        l.streams.step(&l.plan, &mut Par::Serial, step, l.scratch.borrow_mut()).map(drop)
    });
    assert_eq!(call.outputs(0), outputs);
}

#[test]
fn scratch_too_small() {
    let layer = &mut layer(&shapes()[0]);
    let mut call = Call::new(layer, &[(0, FEED, 1)]);
    refused(layer, "scratch", |l| l.streams.step(&l.plan, &mut Par::Serial, call.step(), &mut []).map(drop));
}

/// A plan serves streams of its own shape, slots and ring alone. Larger calls are no difference.
#[test]
fn a_plan_for_other_streams() {
    let shape = shapes()[0];
    let base = || Shape::builder().heads(4).kv_heads(2).head_dim(8).block_len(4).window(Window::Blocks(2)).mem_len(3);
    let others = [
        base().heads(2).build().unwrap().spec(2, 4),
        base().kv_heads(4).build().unwrap().spec(2, 4),
        base().window(Window::Blocks(1)).build().unwrap().spec(2, 4),
        base().mem_len(2).build().unwrap().spec(2, 4),
        base().scale(0.5).build().unwrap().spec(2, 4),
        base().infini(InfiniRule::Linear).build().unwrap().spec(2, 4),
        shape.spec(3, 4),
        shape.spec(2, 4).ring_rows(16),
        shape.spec(2, 8),
    ];
    let mut layer = layer(&shape);
    let own = layer.plan.clone();
    for other in others {
        layer.plan = cpu().plan(&other.build().unwrap()).unwrap();
        let mut call = Call::new(&layer, &[]);
        let refused = |error: fam::Result<()>| {
            assert!(matches!(error, Err(Error::Invalid { field: "plan", .. })), "{error:?} for {:?}", layer.plan.spec());
        };
        refused(layer.streams.step(&layer.plan, &mut Par::Serial, call.step(), layer.scratch.borrow_mut()).map(drop));
        refused(layer.streams.snapshot(&layer.plan, &mut Par::Serial, 0).map(drop));
        refused(layer.streams.restore(&layer.plan, &mut Par::Serial, 0, &[], layer.scratch.borrow_mut()));
    }
    layer.plan = own;
    let before = layer.snapshots();
    // Fewer tokens in a call, of fewer streams: the same streams.
    let small = shape.spec(1, 1).slots(2).build().unwrap();
    layer.plan = cpu().plan(&small).unwrap();
    assert_eq!(layer.snapshots(), before);
    layer.tokens(0, FEED, 1).unwrap();
}

/// A restore that cannot succeed says so before it touches the slot.
#[test]
fn a_restore_with_the_wrong_plan_or_scratch_changes_nothing() {
    for shape in shapes() {
        let mut layer = Layer::new(&shape, 2);
        layer.run_to(0, FEED, 3, 4);
        layer.run_to(1, Feed(2), 1, 4);
        let (saved, before) = (layer.snapshot(0), layer.snapshot(1));
        let Layer { plan, streams, scratch, .. } = &mut layer;
        let short = streams.restore(plan, &mut Par::Serial, 1, &saved, &mut []);
        assert!(plan.support().scratch_bytes == 0 || matches!(short, Err(Error::Invalid { field: "scratch", .. })), "{short:?}");
        let spec = shape.spec(2, 0).slots(2).ring_rows(plan.spec().ring_rows()).build().unwrap();
        let without_rows = cpu().plan(&spec).unwrap();
        let refused = streams.restore(&without_rows, &mut Par::Serial, 1, &saved, scratch.borrow_mut());
        assert!(matches!(refused, Err(Error::LimitExceeded { .. })), "{refused:?}");
        assert_eq!(layer.snapshot(1), before);
        layer.run_to(1, Feed(2), 2, 4);
    }
}
