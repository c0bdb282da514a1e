//! Memory, commit, rollback, copy, reset.

use crate::fixture::{Blob, Call, Feed, Layer, random, shapes};
use fam::{Error, Shape, Window};

/// A layer with window and memory rows.
fn layer() -> Layer {
    Layer::new(&shapes()[0], 2)
}

const FEED: Feed = Feed(1);

#[test]
fn a_block_after_the_first_needs_its_memory() {
    let mut layer = layer();
    assert_eq!(layer.streams.memory_due(0), Ok(None), "a stream may start without a memory");
    for block in 0..4 {
        layer.tokens(0, FEED, 1).unwrap();
        assert_eq!(layer.streams.memory_due(0), Ok(None), "inside a block");
        layer.tokens(0, FEED, 3).unwrap();

        let before = layer.snapshot(0);
        let due = block + 1;
        assert_eq!(layer.streams.memory_due(0), Ok(Some(due)));
        assert_eq!(layer.tokens(0, FEED, 1), Err(Error::MemoryDue { slot: 0, block: due }));
        assert_eq!(layer.snapshot(0), before);
        match block % 2 {
            0 => layer.set_memory(0, FEED, 3).unwrap(),
            _ => layer.streams.keep_memory(&[0]).unwrap(),
        }
        assert_eq!(layer.streams.memory_due(0), Ok(None));
    }
}

#[test]
fn only_the_due_slot_of_a_batch_is_named() {
    let mut layer = layer();
    layer.run_to(1, FEED, 4, 4);
    let mut call = Call::new(&layer, &[(0, FEED, 2), (1, FEED, 2)]);
    let before = layer.snapshots();
    assert_eq!(layer.enqueue(&mut call).unwrap_err(), Error::MemoryDue { slot: 1, block: 1 });
    assert_eq!(layer.snapshots(), before);
}

#[test]
fn no_memory_rows_no_memory_due() {
    let mut layer = Layer::new(&shapes()[2], 1);
    layer.run_to(0, FEED, 24, 3);
    assert_eq!(layer.streams.memory_due(0), Ok(None));
}

#[test]
fn a_kept_memory_serves_again() {
    let [mut kept, mut set_again] = [layer(), layer()];
    for layer in [&mut kept, &mut set_again] {
        layer.set_memory(0, FEED, 3).unwrap();
        layer.tokens(0, FEED, 4).unwrap();
    }
    // What was set and not used yet gives way to what is kept.
    kept.set_memory(0, Feed(2), 3).unwrap();
    kept.streams.keep_memory(&[0]).unwrap();
    set_again.set_memory_of(0, 0, FEED, 3).unwrap();
    assert_eq!(kept.tokens(0, FEED, 4), set_again.tokens(0, FEED, 4));
    assert_eq!(kept.snapshot(0), set_again.snapshot(0));
}

#[test]
fn a_block_may_have_no_memory() {
    // The same layer without memory rows: what a stream sees before its first memory, and after its last.
    let shape = Shape::builder().heads(4).kv_heads(2).head_dim(8).block_len(4).window(Window::Blocks(2)).build().unwrap();
    let [mut kept, mut none, mut without] = [layer(), layer(), Layer::new(&shape, 2)];
    for block in 0..6 {
        for layer in [&mut kept, &mut none] {
            match block {
                2 => layer.set_memory(0, FEED, 3).unwrap(),
                3 => layer.set_memory(0, FEED, 0).unwrap(),
                _ => {}
            }
        }
        if ![2, 3].contains(&block) {
            kept.streams.keep_memory(&[0]).unwrap();
            none.set_memory(0, FEED, 0).unwrap();
        }
        let [kept_o, none_o, without_o] = [&mut kept, &mut none, &mut without].map(|layer| layer.tokens(0, FEED, 4).unwrap());
        assert_eq!(kept_o, none_o, "block {block}");
        // o and lse; memory rows are in the other two alone.
        assert_eq!(kept_o[..without_o.len()] == without_o[..], block != 2, "block {block}");
        assert_eq!(kept.snapshot(0), none.snapshot(0), "block {block}");
    }
}

#[test]
fn memory_is_exchanged_at_boundaries_alone() {
    let mut layer = layer();
    layer.tokens(0, FEED, 3).unwrap();
    let before = layer.snapshot(0);
    for refused in [layer.set_memory(0, FEED, 3), layer.streams.keep_memory(&[0])] {
        assert!(matches!(refused, Err(Error::Invalid { field: "position", .. })), "{refused:?}");
    }
    assert_eq!(layer.snapshot(0), before);
    layer.tokens(0, FEED, 1).unwrap();
    layer.set_memory(0, FEED, 3).unwrap();
}

#[test]
fn the_last_memory_set_is_the_one_that_serves() {
    let [mut once, mut twice] = [layer(), layer()];
    for layer in [&mut once, &mut twice] {
        layer.run_to(0, FEED, 8, 4);
    }
    twice.set_memory(0, Feed(2), 3).unwrap();
    twice.streams.keep_memory(&[0]).unwrap();
    for layer in [&mut once, &mut twice] {
        layer.set_memory(0, FEED, 2).unwrap();
    }
    assert_eq!(once.snapshot(0), twice.snapshot(0));
    assert_eq!(once.tokens(0, FEED, 4), twice.tokens(0, FEED, 4));
}

#[test]
fn a_dropped_step_leaves_every_bit_and_can_be_repeated() {
    for shape in shapes() {
        let mut layer = Layer::new(&shape, 2);
        let bystander = Feed(2);
        layer.run_to(1, bystander, 7, 4);
        for position in 0..30 {
            layer.enter_block(0, FEED);
            let before = layer.snapshots();
            let most = 4 - position as u32 % 4;
            let mut dropped = Blob(Vec::new());
            for len in 1..=most {
                dropped = layer.try_tokens(0, FEED, len).unwrap();
                assert_eq!(layer.snapshots(), before, "{shape:?}, {len} tokens at {position}");
            }
            // Other tokens in the meantime, dropped too.
            layer.try_tokens(0, Feed(3), most).unwrap();
            layer.try_tokens(1, Feed(3), 1).unwrap();
            assert_eq!(layer.try_tokens(0, FEED, most), Ok(dropped), "{shape:?} at {position}");
            layer.tokens(0, FEED, 1).unwrap();
        }
    }
}

#[test]
fn a_memory_set_waits_for_the_commit() {
    let mut layer = layer();
    layer.run_to(0, FEED, 8, 4);
    // Kept, then nothing done: what a later set_memory must not disturb until its block's first commit.
    layer.streams.keep_memory(&[0]).unwrap();
    let with_old = layer.try_tokens(0, FEED, 4).unwrap();
    layer.set_memory(0, FEED, 3).unwrap();
    let before = layer.snapshot(0);
    let with_new = layer.try_tokens(0, FEED, 4).unwrap();
    assert_ne!(with_new, with_old);
    assert_eq!(layer.snapshot(0), before);
    layer.streams.keep_memory(&[0]).unwrap();
    assert_eq!(layer.try_tokens(0, FEED, 4), Ok(with_old), "the memory of the block before is whole");
    layer.set_memory(0, FEED, 3).unwrap();
    assert_eq!(layer.snapshot(0), before);
    assert_eq!(layer.tokens(0, FEED, 4), Ok(with_new));
}

#[test]
fn tokens_rolled_back_never_were() {
    for shape in shapes() {
        let [mut straight, mut astray] = [(); 2].map(|()| Layer::new(&shape, 1));
        for block in 0..6u64 {
            for layer in [&mut straight, &mut astray] {
                layer.run_to(0, FEED, 4 * block, 4);
                layer.enter_block(0, FEED);
            }
            let entered = straight.snapshot(0);
            straight.tokens(0, FEED, 1).unwrap();
            astray.tokens(0, FEED, 1).unwrap();
            // Speculation inside the block: up to its last token but one.
            astray.tokens(0, Feed(2), 2).unwrap();
            astray.streams.rollback(0, 2).unwrap();
            assert_eq!(astray.snapshot(0), straight.snapshot(0), "{shape:?}, block {block}");
            // To the block's first token: all is as it was before.
            astray.streams.rollback(0, 1).unwrap();
            assert_eq!(astray.snapshot(0), entered);
            astray.tokens(0, FEED, 1).unwrap();
            assert_eq!(astray.tokens(0, FEED, 3), straight.tokens(0, FEED, 3), "{shape:?}, block {block}");
            assert_eq!(astray.snapshot(0), straight.snapshot(0), "{shape:?}, block {block}");
        }
    }
}

/// Speculation with one memory, taken back; then another memory, also where a snapshot was taken in the midst of it.
#[test]
fn a_memory_tried_and_taken_back_gives_way_to_another() {
    type Choice = fn(&mut Layer);
    const CHOICES: [Choice; 3] = [
        |layer| layer.streams.keep_memory(&[0]).unwrap(),
        |layer| layer.set_memory(0, FEED, 2).unwrap(),
        |layer| layer.set_memory(0, Feed(3), 1).unwrap(),
    ];
    for shape in shapes().into_iter().filter(|shape| shape.mem_len() > 0) {
        for (block, i, j) in (0..3).flat_map(|block| (0..9).map(move |i| (block, i / 3, i % 3))) {
            let (tried, chosen) = (CHOICES[i], CHOICES[j]);
            if block == 0 && i > 0 && j == 0 {
                // There is no memory before the first block's.
                let mut layer = Layer::new(&shape, 1);
                tried(&mut layer);
                let before = layer.snapshot(0);
                let kept = layer.streams.keep_memory(&[0]);
                assert!(matches!(kept, Err(Error::Invalid { field: "memory", .. })), "{kept:?}");
                assert_eq!(layer.snapshot(0), before);
                continue;
            }
            let [mut straight, mut astray, mut restored] = [(); 3].map(|()| Layer::new(&shape, 1));
            for layer in [&mut straight, &mut astray] {
                layer.run_to(0, FEED, 4 * block, 4);
            }
            chosen(&mut straight);
            tried(&mut astray);
            astray.tokens(0, Feed(2), 3).unwrap();
            restored.restore(0, &astray.snapshot(0)).unwrap();
            let outputs = straight.tokens(0, FEED, 4).unwrap();
            for layer in [&mut astray, &mut restored] {
                layer.streams.rollback(0, 3).unwrap();
                chosen(layer);
                assert_eq!(layer.tokens(0, FEED, 4), Ok(outputs.clone()), "{shape:?}, block {block}");
                assert_eq!(layer.snapshot(0), straight.snapshot(0), "{shape:?}, block {block}");
            }
        }
    }
}

#[test]
fn rollback_stays_inside_the_block() {
    let mut layer = layer();
    layer.run_to(0, FEED, 11, 4);
    let before = layer.snapshot(0);
    assert!(matches!(layer.streams.rollback(0, 4), Err(Error::Invalid { field: "tokens", .. })));
    assert!(matches!(layer.streams.rollback(0, u64::MAX), Err(Error::Invalid { field: "tokens", .. })));
    assert_eq!(layer.snapshot(0), before);
    layer.streams.rollback(0, 3).unwrap();
    assert_eq!(layer.position(0), 8);
    assert!(layer.streams.rollback(0, 1).is_err());
    assert_eq!(layer.streams.rollback(0, 0), Ok(()));
}

#[test]
fn a_completed_block_is_not_rolled_back() {
    let mut layer = Layer::new(&shapes()[4], 1);
    layer.run_to(0, FEED, 8, 4);
    assert!(matches!(layer.streams.rollback(0, 1), Err(Error::Invalid { field: "tokens", .. })));
}

#[test]
fn rollback_ends_at_the_origin() {
    let mut layer = layer();
    layer.reset(0, 6).unwrap();
    layer.tokens(0, FEED, 1).unwrap();
    assert!(layer.streams.rollback(0, 2).is_err());
    layer.streams.rollback(0, 1).unwrap();
    assert_eq!(layer.position(0), 6);
}

#[test]
fn a_copy_goes_on_like_its_original() {
    for shape in shapes() {
        for position in 0..=13 {
            let mut layer = Layer::new(&shape, 3);
            let (other, third) = (Feed(2), Feed(3));
            layer.run_to(1, other, 9, 3);
            layer.run_to(2, third, 5, 2);
            layer.run_to(0, FEED, position, 3);
            // A memory that was set and not used yet is copied too.
            layer.enter_block(0, FEED);
            let [original, _, bystander] = <[Blob; 3]>::try_from(layer.snapshots()).unwrap();

            layer.copy_slot(0, 1).unwrap();
            assert_eq!(layer.snapshots(), [original.clone(), original.clone(), bystander.clone()], "{shape:?} at {position}");
            let copied = layer.run_to(1, FEED, 26, 4);
            assert_eq!(layer.snapshot(0), original, "the original does not move with its copy");
            assert_eq!(layer.run_to(0, FEED, 26, 4), copied, "{shape:?} at {position}");
            assert_eq!(layer.snapshot(2), bystander);
        }
    }
}

#[test]
fn a_copy_of_itself_is_nothing() {
    let mut layer = layer();
    layer.run_to(0, FEED, 6, 4);
    let before = layer.snapshots();
    layer.copy_slot(0, 0).unwrap();
    assert_eq!(layer.snapshots(), before);
}

#[test]
fn a_reset_slot_equals_a_fresh_one() {
    for shape in shapes() {
        for origin in [0, 4, 7] {
            let [mut fresh, mut used] = [(); 2].map(|()| Layer::new(&shape, 2));
            used.run_to(0, Feed(2), 23, 3);
            used.run_to(1, Feed(3), 11, 4);
            let bystander = used.snapshot(1);
            if origin == 4 {
                // With the next memory set, or a memory kept.
                used.run_to(0, Feed(2), 24, 3);
                used.enter_block(0, Feed(2));
            }
            used.reset(0, origin).unwrap();
            fresh.reset(0, origin).unwrap();
            assert_eq!(used.snapshot(0), fresh.snapshot(0), "{shape:?} from {origin}");
            if shape.infini().is_some() {
                assert!(used.infini_state(0).iter().all(|&byte| byte == 0));
            }
            let again = used.run_to(0, FEED, 30, 3);
            assert_eq!(again, fresh.run_to(0, FEED, 30, 3), "{shape:?} from {origin}");
            assert_eq!(used.snapshot(0), fresh.snapshot(0), "{shape:?} from {origin}");
            if shape.infini().is_some() {
                assert_eq!(used.infini_state(0), fresh.infini_state(0));
            }
            assert_eq!(used.snapshot(1), bystander);
        }
        // Constructed is reset at 0.
        let fresh = Layer::new(&shape, 1).snapshot(0);
        let mut layer = Layer::new(&shape, 1);
        layer.reset(0, 0).unwrap();
        assert_eq!(layer.snapshot(0), fresh);
    }
}

#[test]
fn positions_far_out() {
    for shape in shapes() {
        let mut layer = Layer::new(&shape, 1);
        let origin = u64::MAX / 4 + 3;
        layer.reset(0, origin).unwrap();
        layer.run_to(0, FEED, origin + 30, 4);
        assert_eq!(layer.position(0), origin + 30);
    }
    let mut layer = layer();
    let before = layer.snapshot(0);
    assert!(matches!(layer.reset(0, u64::MAX), Err(Error::LimitExceeded { what: "origin", .. })));
    assert_eq!(layer.snapshot(0), before);
}

/// The state after a block is the same however its tokens came.
#[test]
fn state_does_not_depend_on_the_steps() {
    for shape in shapes() {
        let [mut blocks, mut tokens, mut ragged] = [(); 3].map(|()| Layer::new(&shape, 1));
        for block in 1..8 {
            blocks.run_to(0, FEED, 4 * block, 4);
            tokens.run_to(0, FEED, 4 * block, 1);
            ragged.run_to(0, FEED, 4 * block, 3);
            assert_eq!(blocks.snapshot(0), tokens.snapshot(0), "{shape:?}, block {block}");
            assert_eq!(blocks.snapshot(0), ragged.snapshot(0), "{shape:?}, block {block}");
        }
    }
}

/// Alone or in a batch, in any slot and in any order: the same bits. Streams of a batch have different lengths, 0 among them.
#[test]
fn a_stream_does_not_know_of_the_others() {
    for shape in shapes() {
        let mut batch = Layer::new(&shape, 4);
        let mut alone: Vec<Layer> = (0..4).map(|_| Layer::new(&shape, 1)).collect();
        for call in 0..40 {
            // Stream i lives in slot (i + 1) mod 4; the order in the call changes.
            let mut order = [0u32, 1, 2, 3];
            order.rotate_left(call % 4);
            order.swap(call % 3, 3);
            let calls = order.map(|stream| {
                let slot = (stream + 1) % 4;
                batch.enter_block(slot, Feed(stream.into()));
                let room = 4 - batch.position(slot) % 4;
                let len = random([call as u64, stream.into(), 7, 7]) % (room + 1);
                (slot, Feed(stream.into()), len as u32)
            });
            let mut together = Call::new(&batch, &calls);
            batch.enqueue(&mut together).unwrap().commit();
            for (n, (&stream, &(slot, feed, len))) in order.iter().zip(&calls).enumerate() {
                let solo = &mut alone[stream as usize];
                solo.enter_block(0, feed);
                let expected = if len == 0 { Blob(Vec::new()) } else { solo.tokens(0, feed, len).unwrap() };
                assert_eq!(together.outputs(n), expected, "{shape:?}: stream {stream} in call {call}");
                assert_eq!(batch.snapshot(slot), solo.snapshot(0));
            }
        }
    }
}

#[test]
fn nothing_to_do_is_fine() {
    for shape in shapes() {
        let mut layer = Layer::new(&shape, 2);
        layer.run_to(0, FEED, 6, 4);
        let before = layer.snapshots();
        let mut nobody = Call::new(&layer, &[]);
        layer.enqueue(&mut nobody).unwrap().commit();
        assert_eq!(layer.tokens(0, FEED, 0), Ok(Blob(Vec::new())));
        assert_eq!(layer.snapshots(), before);
    }
    let nobody = Layer::of(shapes()[0].spec(0, 4).build().unwrap(), Default::default());
    assert!(nobody.streams.position(0).is_err());
}

/// No byte of state is added as a stream goes on.
#[test]
fn state_is_constant() {
    for shape in shapes() {
        let mut layer = Layer::new(&shape, 1);
        let bytes = layer.streams.state_bytes();
        let mut longest = 0;
        for position in [16, 32, 400] {
            layer.run_to(0, FEED, position, 4);
            assert_eq!(layer.streams.state_bytes(), bytes);
            let snapshot = layer.snapshot(0).len();
            assert!(longest == 0 || snapshot == longest);
            longest = snapshot;
        }
    }
}

/// Without memory rows and with a window of blocks the attention of a block is that of its own tokens and the window's: a stream that
/// starts where the window does gives the same block.
#[test]
fn a_stream_forgets_what_left_the_window() {
    let shape = Shape::builder().heads(2).head_dim(8).block_len(4).window(Window::Blocks(2)).build().unwrap();
    let [mut whole, mut late] = [(); 2].map(|()| Layer::new(&shape, 1));
    whole.run_to(0, FEED, 20, 4);
    late.reset(0, 12).unwrap();
    late.run_to(0, FEED, 20, 4);
    assert_eq!(whole.tokens(0, FEED, 4), late.tokens(0, FEED, 4));
}
