//! Work that fails: what a layer, its neighbours and its other slots look like afterwards.

use crate::faulty::{Fault, Faults};
use crate::fixture::{Blob, Call, Feed, Layer, shapes};
use fam::{Error, Result, Shape};

const FEED: Feed = Feed(1);

fn lost() -> Error {
    Error::DeviceLost { reason: "unplugged".into() }
}

fn refused() -> Error {
    Error::invalid("fault", "injected", "none")
}

/// Three layers on one device, at the same position.
fn stack(shape: &Shape, faults: &Faults) -> Vec<Layer> {
    let spec = shape.spec(2, shape.block_len()).build().unwrap();
    let mut layers: Vec<Layer> = (0..3).map(|_| Layer::of(spec.clone(), faults.clone())).collect();
    for (l, layer) in layers.iter_mut().enumerate() {
        layer.run_to(0, Feed(l as u64), 9, 4);
        layer.run_to(1, Feed(10 + l as u64), 6, 3);
    }
    layers
}

/// All layers, then commit all: the way of an engine. The outputs' bytes.
fn run(layers: &mut [Layer], len: u32) -> Result<Blob> {
    let mut calls: Vec<Call> = layers.iter().enumerate().map(|(l, layer)| Call::new(layer, &calls_of(l, len))).collect();
    let mut pending = Vec::new();
    for (layer, call) in layers.iter_mut().zip(&mut calls) {
        pending.push(layer.enqueue(call)?);
    }
    pending.into_iter().for_each(fam::Pending::commit);
    Ok(Blob(calls.iter().flat_map(|call| [call.outputs(0).0, call.outputs(1).0].concat()).collect()))
}

fn calls_of(l: usize, len: u32) -> [(u32, Feed, u32); 2] {
    [(0, Feed(l as u64), len), (1, Feed(10 + l as u64), 2)]
}

/// Every op of a step through three layers fails in turn, before its work or after it.
#[test]
fn a_failure_in_one_layer_leaves_all_as_they_were() {
    for shape in shapes() {
        let faults = Faults::default();
        let expected = run(&mut stack(&shape, &faults), 3).unwrap();
        let mut layers = stack(&shape, &faults);
        let before: Vec<_> = layers.iter().map(Layer::snapshots).collect();
        let mut failures = 0;
        for (after, works) in (0..).flat_map(|after| [(after, false), (after, true)]) {
            faults.plan(Fault { after, works, error: refused() });
            match run(&mut layers, 3) {
                Err(error) => assert_eq!(error, refused()),
                Ok(outputs) => {
                    assert!(faults.clear(), "a fault was swallowed");
                    assert_eq!(outputs, expected);
                    break;
                }
            }
            failures += 1;
            let now: Vec<_> = layers.iter().map(Layer::snapshots).collect();
            assert_eq!(now, before, "{shape:?}: op {after} failed");
        }
        // append and attend of three layers, and with a compressive memory its append and write.
        assert_eq!(failures, if shape.infini().is_some() { 24 } else { 12 });
    }
}

#[test]
fn the_device_lost_in_layer_1_poisons_that_layer_and_moves_none() {
    let faults = Faults::default();
    let mut layers = stack(&shapes()[0], &faults);
    let before: Vec<_> = layers.iter().map(Layer::snapshots).collect();
    // Layer 0 does two ops, then layer 1 appends; its attend fails.
    faults.plan(Fault { after: 3, works: false, error: lost() });
    assert_eq!(run(&mut layers, 3), Err(lost()));
    for l in [0, 2] {
        assert_eq!(layers[l].snapshots(), before[l]);
    }
    assert_poisoned(&mut layers[1], &[0, 1]);
    for slot in [0, 1] {
        layers[1].restore(slot, &before[1][slot as usize]).unwrap();
    }
    assert_eq!(layers.iter().map(Layer::snapshots).collect::<Vec<_>>(), before);
    assert_eq!(run(&mut layers, 3), run(&mut stack(&shapes()[0], &faults), 3));
}

/// Every method refuses a poisoned slot, but for those that heal it and those that only tell.
fn assert_poisoned(layer: &mut Layer, slots: &[u32]) {
    for &slot in slots {
        let poisoned = Error::Poisoned { slot };
        assert_eq!(layer.tokens(slot, FEED, 1), Err(poisoned.clone()));
        assert_eq!(layer.set_memory(slot, FEED, 1), Err(poisoned.clone()));
        assert_eq!(layer.streams.keep_memory(&[slot]), Err(poisoned.clone()));
        assert_eq!(layer.streams.rollback(slot, 0), Err(poisoned.clone()));
        assert_eq!(layer.copy_slot(slot, 1 - slot), Err(poisoned.clone()));
        assert_eq!(layer.streams.infini_state(slot).unwrap_err(), poisoned.clone());
        let snapshot = layer.streams.snapshot(&layer.plan, &mut fam::cpu::Par::Serial, slot);
        assert_eq!(snapshot.map(Blob), Err(poisoned));
        assert!(layer.streams.position(slot).is_ok());
        assert!(layer.streams.memory_due(slot).is_ok());
    }
}

/// A poisoned slot is healed by a reset, a restore, or a copy over it; the others never notice.
#[test]
fn a_poisoned_slot_until_it_is_healed() {
    for shape in shapes() {
        let mut layer = Layer::new(&shape, 2);
        layer.run_to(0, FEED, 10, 4);
        layer.run_to(1, Feed(2), 7, 4);
        let before = layer.snapshots();
        for heal in 0..3 {
            layer.streams.poison(0).unwrap();
            assert_poisoned(&mut layer, &[0]);
            assert_eq!(layer.snapshot(1), before[1]);
            let mut both = Call::new(&layer, &[(1, Feed(2), 1), (0, FEED, 1)]);
            assert_eq!(layer.enqueue(&mut both).unwrap_err(), Error::Poisoned { slot: 0 });
            assert_eq!(layer.snapshot(1), before[1]);
            let healed = match heal {
                0 => {
                    layer.reset(0, 0).unwrap();
                    Layer::new(&shape, 1).snapshot(0)
                }
                1 => {
                    layer.copy_slot(1, 0).unwrap();
                    before[1].clone()
                }
                _ => {
                    layer.restore(0, &before[0]).unwrap();
                    before[0].clone()
                }
            };
            assert_eq!(layer.snapshots(), [healed, before[1].clone()]);
        }
        layer.run_to(0, FEED, 20, 4);
    }
}

/// A method that a fault is planned for.
type Attempt = fn(&mut Layer) -> Result<()>;

const ATTEMPTS: [(&str, Attempt); 5] = [
    ("step", |layer| layer.tokens(0, FEED, 2).map(drop)),
    ("set_memory", |layer| layer.set_memory(0, FEED, 2)),
    ("copy_slot", |layer| layer.copy_slot(1, 0)),
    ("reset", |layer| layer.reset(0, 0)),
    ("restore", |layer| {
        let mut donor = Layer::new(&layer.shape(), 1);
        donor.run_to(0, Feed(3), 6, 4);
        layer.restore(0, &donor.snapshot(0))
    }),
];

/// Whichever call of the backend finds it lost: every slot is poisoned.
#[test]
fn a_lost_device_takes_every_slot() {
    for shape in shapes() {
        for (name, attempt) in ATTEMPTS {
            let mut calls = 0;
            for (after, works) in (0..).flat_map(|after| [(after, false), (after, true)]) {
                let mut layer = ready(&shape);
                layer.faults.plan(Fault { after, works, error: lost() });
                let done = attempt(&mut layer);
                if layer.faults.clear() {
                    break;
                }
                assert_eq!(done, Err(lost()), "{name} of {shape:?}, call {after}");
                assert_poisoned(&mut layer, &[0, 1]);
                calls += 1;
            }
            let idle = match name {
                "reset" => shape.infini().is_none(),
                "set_memory" => shape.mem_len() == 0,
                _ => false,
            };
            assert!(calls > 0 || idle, "{name} of {shape:?} never reached the device");
        }
    }
}

/// What is left of a lost device is a snapshot, which goes on elsewhere as if nothing had happened.
#[test]
fn a_snapshot_outlives_its_device() {
    for shape in shapes() {
        let [mut lost_one, mut untroubled] = [ready(&shape), ready(&shape)];
        let saved = lost_one.snapshot(0);
        lost_one.faults.plan(Fault { after: 0, works: false, error: lost() });
        assert_eq!(lost_one.tokens(0, FEED, 2).map(drop), Err(lost()));
        assert_poisoned(&mut lost_one, &[0, 1]);
        let mut elsewhere = Layer::new(&shape, 1);
        elsewhere.restore(0, &saved).unwrap();
        assert_eq!(elsewhere.tokens(0, FEED, 2), untroubled.tokens(0, FEED, 2));
        assert_eq!(elsewhere.run_to(0, FEED, 20, 4), untroubled.run_to(0, FEED, 20, 4));
        assert_eq!(elsewhere.snapshot(0), untroubled.snapshot(0));
    }
}

/// Two streams at a block's boundary, the first with its memory set.
fn ready(shape: &Shape) -> Layer {
    let mut layer = Layer::new(shape, 2);
    layer.run_to(0, FEED, 8, 4);
    layer.enter_block(0, FEED);
    layer.run_to(1, Feed(2), 5, 4);
    layer
}

/// Another error of the device while a slot is being overwritten poisons that slot alone. Refused work leaves it as it was.
#[test]
fn a_refusal_by_the_device_reaches_one_slot_at_most() {
    for shape in shapes() {
        for (name, attempt) in ATTEMPTS {
            for after in 0.. {
                let mut layer = ready(&shape);
                let before = layer.snapshots();
                layer.faults.plan(Fault { after, works: false, error: refused() });
                let done = attempt(&mut layer);
                if layer.faults.clear() {
                    break;
                }
                assert_eq!(done, Err(refused()), "{name} of {shape:?}, call {after}");
                assert_eq!(layer.snapshot(1), before[1], "{name} of {shape:?}, call {after}");
                match name {
                    "step" | "set_memory" => assert_eq!(layer.snapshot(0), before[0], "{name} of {shape:?}, call {after}"),
                    // What a restore brings along is taken to the device before the slot is touched.
                    "restore" if layer.streams.rollback(0, 0).is_ok() => assert_eq!(layer.snapshot(0), before[0], "call {after}"),
                    _ => assert_poisoned(&mut layer, &[0]),
                }
            }
        }
    }
}
