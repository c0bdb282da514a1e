//! Snapshot and restore: a stream goes on bit for bit, from any position, in any slot, in streams of another size.

use crate::fixture::{Feed, Layer, shapes};
use fam::{Dtype, Error, InfiniRule, Shape, Window};

const FEED: Feed = Feed(1);

/// At every block's boundary and at every token between; before and after the next memory is set.
#[test]
fn a_restored_stream_goes_on_bit_for_bit() {
    for shape in shapes() {
        for origin in [0, 6] {
            for cut in origin..origin + 22 {
                for entered in [false, true] {
                    let mut layer = Layer::new(&shape, 1);
                    layer.reset(0, origin).unwrap();
                    layer.run_to(0, FEED, cut, 3);
                    if entered {
                        layer.enter_block(0, FEED);
                    }
                    let snapshot = layer.snapshot(0);

                    // Slots of streams that were used before, one of them with a longer ring and shorter calls.
                    let mut same = Layer::new(&shape, 3);
                    let ring_rows = 7 * shape.block_len();
                    let mut longer =
                        Layer::of(shape.spec(1, 3).slots(2).ring_rows(ring_rows).build().unwrap(), Default::default());
                    same.run_to(2, Feed(2), 17, 4);
                    same.run_to(0, Feed(3), 5, 4);
                    longer.run_to(1, Feed(2), 9, 3);
                    let bystander = same.snapshot(0);

                    let what = format!("{shape:?} from {origin}, cut at {cut}");
                    let end = cut + 18;
                    layer.restore(0, &snapshot).unwrap();
                    same.restore(2, &snapshot).unwrap();
                    longer.restore(1, &snapshot).unwrap();
                    for (layer, slot) in [(&layer, 0), (&same, 2), (&longer, 1)] {
                        assert_eq!(layer.position(slot), cut);
                        assert_eq!(layer.snapshot(slot), snapshot, "{what}: a snapshot of what was restored");
                    }
                    let expected = {
                        // The stream that was never cut.
                        let mut layer = Layer::new(&shape, 1);
                        layer.reset(0, origin).unwrap();
                        layer.run_to(0, FEED, cut, 3);
                        layer.run_to(0, FEED, end, 3)
                    };
                    assert_eq!(layer.run_to(0, FEED, end, 3), expected, "{what}");
                    assert_eq!(same.run_to(2, FEED, end, 3), expected, "{what}, in another slot");
                    assert_eq!(longer.run_to(1, FEED, end, 3), expected, "{what}, in a longer ring");
                    assert_eq!(layer.snapshot(0), same.snapshot(2));
                    assert_eq!(layer.snapshot(0), longer.snapshot(1));
                    assert_eq!(same.snapshot(0), bystander);
                }
            }
        }
    }
}

/// The snapshot of a stream that was rolled back, copied or never committed holds none of that.
#[test]
fn a_snapshot_is_the_stream_and_nothing_else() {
    for shape in shapes() {
        let [mut plain, mut eventful] = [(); 2].map(|()| Layer::new(&shape, 2));
        plain.run_to(0, FEED, 14, 4);
        eventful.run_to(1, Feed(2), 19, 4);
        eventful.copy_slot(1, 0).unwrap();
        eventful.reset(0, 0).unwrap();
        eventful.run_to(0, FEED, 13, 4);
        eventful.tokens(0, Feed(3), 2).unwrap();
        eventful.streams.rollback(0, 2).unwrap();
        eventful.try_tokens(0, Feed(4), 3).unwrap();
        eventful.tokens(0, FEED, 1).unwrap();
        assert_eq!(eventful.snapshot(0), plain.snapshot(0), "{shape:?}");
    }
}

#[test]
fn a_kept_memory_is_kept_across_a_restore() {
    let [mut layer, mut restored] = [(); 2].map(|()| Layer::new(&shapes()[0], 1));
    layer.run_to(0, FEED, 8, 4);
    layer.streams.keep_memory(&[0]).unwrap();
    restored.restore(0, &layer.snapshot(0)).unwrap();
    assert_eq!(restored.streams.memory_due(0), Ok(None));
    assert_eq!(restored.tokens(0, FEED, 4), layer.tokens(0, FEED, 4));
}

#[test]
fn memory_that_was_due_is_due_after_a_restore() {
    let [mut layer, mut restored] = [(); 2].map(|()| Layer::new(&shapes()[0], 1));
    layer.run_to(0, FEED, 8, 4);
    restored.restore(0, &layer.snapshot(0)).unwrap();
    assert_eq!(restored.tokens(0, FEED, 1), Err(Error::MemoryDue { slot: 0, block: 2 }));
}

/// Every field of the shape has its name in the error.
#[test]
fn a_snapshot_of_another_shape() {
    let base = || Shape::builder().heads(4).kv_heads(2).head_dim(8).block_len(4).window(Window::Blocks(2)).mem_len(3);
    let snapshot = {
        let mut layer = Layer::new(&base().build().unwrap(), 1);
        layer.run_to(0, FEED, 10, 4);
        layer.snapshot(0)
    };
    let others = [
        ("heads", base().heads(8)),
        ("kv_heads", base().kv_heads(4)),
        ("head_dim", base().head_dim(16)),
        ("block_len", base().block_len(8)),
        ("window kind", base().window(Window::Tokens(2))),
        ("window", base().window(Window::Blocks(3))),
        ("mem_len", base().mem_len(4)),
        ("dtype", base().dtype(Dtype::F16)),
        ("scale", base().scale(0.25)),
        ("infini rule", base().infini(InfiniRule::Linear)),
    ];
    for (field, shape) in others {
        let mut layer = Layer::new(&shape.build().unwrap(), 1);
        layer.run_to(0, FEED, 3, 4);
        let before = layer.snapshot(0);
        match layer.restore(0, &snapshot) {
            Err(Error::Malformed { what: "snapshot", reason }) => {
                assert!(reason.starts_with(&format!("{field} ")), "{field}: {reason}");
            }
            other => panic!("{field}: {other:?}"),
        }
        assert_eq!(layer.snapshot(0), before, "{field}");
    }
}
