//! Gradients have the same bits whoever runs the tasks. What they are is held to the reference by the conformance suite.

mod common;

use common::gradients::{Gradients, spans};
use fam_core::{Op, Spans};
use fam_cpu::{Cpu, Executor, Par, Pool};

struct Scoped(usize);

impl Executor for Scoped {
    fn threads(&self) -> usize {
        self.0
    }
    fn run(&self, tasks: usize, body: &(dyn Fn(usize) + Sync)) {
        std::thread::scope(|s| (0..tasks).for_each(|i| drop(s.spawn(move || body(i)))));
    }
}

/// All ops, each in all of its phases, on queues that depend on the phase.
fn bits<'q>(queues: impl Fn(usize) -> Vec<Par<'q>>) -> Vec<u32> {
    let mut gradients = Gradients::new(Cpu::new().unwrap().with_threads(16));
    let spans = spans();
    for op in Op::BACKWARD {
        let phases = if matches!(queues(0)[0], Par::Slice { .. }) { gradients.phases(op) } else { 1 };
        for par in (0..phases).flat_map(&queues) {
            gradients.run(op, par, Spans::Host(&spans));
        }
    }
    gradients.bits()
}

#[test]
fn bits_do_not_depend_on_who_runs() {
    let serial = bits(|_| vec![Par::Serial]);
    assert!(serial.iter().all(|bits| f32::from_bits(*bits).is_finite()));
    for threads in [1, 2, 3, 4, 7, 16] {
        let pool = Pool::new(threads).unwrap();
        assert!(bits(|_| vec![Par::Pool(&pool)]) == serial, "a pool of {threads}");
        let scoped = Scoped(threads);
        assert!(bits(|_| vec![Par::Caller(&scoped)]) == serial, "{threads} threads of the caller");
    }
    let pool = Pool::new(3).unwrap();
    (0..250).for_each(|_| assert!(bits(|_| vec![Par::Pool(&pool)]) == serial, "repeated"));
    // All parts of a phase, then all of the next, in the same scratch memory.
    for nth in [1, 2, 5, 100] {
        let parts = |phase| (0..nth).map(|ith| Par::Slice { ith, nth, phase }).collect();
        assert!(bits(parts) == serial, "{nth} parts");
    }
}
