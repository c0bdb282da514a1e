//! Gradients have the same bits whoever runs the tasks. What they are is held to the reference by the conformance suite.

mod common;

use common::gradients::{Gradients, spans};
use common::{levels, random, shape};
use fam_core::{
    AttendBackward, Backend, Dtype, Element, Layout, Op, Plan, RowsBackward, Span, Spans, View, ViewMut, Window, bf16,
};
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

/// d_q of a stream's rows, two blocks of 70 tokens and a window of one, with these keys and values.
fn d_q<T: Element>(cpu: &Cpu, heads: usize, [k, v]: [&[T]; 2]) -> Vec<f32> {
    let shape = shape([heads, 1], 16, 70, Window::Blocks(1), 0, T::DTYPE);
    let plan = cpu.plan(&shape.spec(1, 210).out_dtype(Dtype::F32).blocks(3).ops(&[Op::AttendBackward]).build().unwrap()).unwrap();
    let [rows, lse] = [16, 1].map(|d| Layout::packed(Dtype::F32, [1, 1, 210, heads, d]));
    let q = random::<T>(1, 210 * heads * 16);
    let [o, d_o, of_lse] = [3, 4, 5].map(|seed| random::<f32>(seed, 210 * heads * 16));
    let (mut d_q, mut scratch) = (vec![7.0; 210 * heads * 16], vec![0xff; plan.support().scratch_bytes as usize]);
    let keys = Layout::packed(T::DTYPE, [1, 1, 210, 1, 16]);
    let q = View::of(&q, Layout::packed(T::DTYPE, [1, 1, 210, heads, 16]));
    let of_rows =
        RowsBackward::new(q, View::of(&o, rows), View::of(&of_lse, lse), View::of(&d_o, rows), ViewMut::of(&mut d_q, rows));
    let spans = [Span::new(0, 0, 210)];
    let args = AttendBackward::new(Spans::Host(&spans), View::of(k, keys), View::of(v, keys)).rows(of_rows);
    cpu.attend_backward(&plan, &mut Par::Serial, args, &mut scratch).unwrap();
    d_q
}

/// A key or a value that is not finite reaches exactly the rows that see it. The others have the bits that they have beside finite keys, which are not
/// masked one by one.
fn hidden_keys_stay_hidden_of<T: Element>(cpu: &Cpu, heads: usize) {
    let mut kv = [6, 2].map(|seed| random::<T>(seed, 210 * 16));
    let d_q = |[k, v]: &[Vec<T>; 2]| d_q(cpu, heads, [k, v]);
    let clean = d_q(&kv);
    assert!(clean.iter().all(|x| x.is_finite()));
    for (which, at) in [0, 1].into_iter().flat_map(|which| [0, 69, 70, 75, 100, 139, 140, 209].map(|at| (which, at))) {
        for dirty in [f32::NAN, f32::INFINITY] {
            let before = std::mem::replace(&mut kv[which][at * 16], T::from_f32(dirty));
            let of_rows = d_q(&kv);
            for (row, (dirty, clean)) in of_rows.chunks(heads * 16).zip(clean.chunks(heads * 16)).enumerate() {
                let sees = row >= at && row / 70 <= at / 70 + 1;
                let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                assert_eq!(
                    sees,
                    bits(dirty) != bits(clean),
                    "{}, {heads} heads, row {row}, {} {at}",
                    cpu.isa(),
                    ["key", "value"][which]
                );
            }
            kv[which][at * 16] = before;
        }
    }
}

#[test]
fn hidden_keys_stay_hidden() {
    for cpu in levels() {
        // A vector's rows see different keys; whole vectors see the same, but not all keys of their tile.
        for heads in [1, 3, 64] {
            hidden_keys_stay_hidden_of::<f32>(&cpu, heads);
            hidden_keys_stay_hidden_of::<bf16>(&cpu, heads);
        }
    }
}
