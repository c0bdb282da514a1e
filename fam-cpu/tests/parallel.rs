//! Whoever runs the tasks, the bits are the same.

mod common;

use common::{Outputs, Stream, shape};
use fam_core::{Dtype, Element, Window, bf16};
use fam_cpu::{Cpu, Executor, Par, Pool};

fn stream() -> Stream<f32> {
    Stream::new(shape([6, 3], 24, 32, Window::Blocks(2), 5, Dtype::F32), 150, 7)
}

fn run(par: &mut Par<'_>) -> Outputs {
    stream().prefill(&Cpu::new().unwrap().with_threads(16), par)
}

struct Scoped(usize);

impl Executor for Scoped {
    fn threads(&self) -> usize {
        self.0
    }
    fn run(&self, tasks: usize, body: &(dyn Fn(usize) + Sync)) {
        std::thread::scope(|s| (0..tasks).for_each(|i| drop(s.spawn(move || body(i)))));
    }
}

struct Rayon;

impl Executor for Rayon {
    fn threads(&self) -> usize {
        rayon::current_num_threads()
    }
    fn run(&self, tasks: usize, body: &(dyn Fn(usize) + Sync)) {
        use rayon::prelude::*;
        (0..tasks).into_par_iter().for_each(body);
    }
}

/// Leaves out every call but the first, which it makes twice.
struct Careless;

impl Executor for Careless {
    fn threads(&self) -> usize {
        4
    }
    fn run(&self, _tasks: usize, body: &(dyn Fn(usize) + Sync)) {
        body(0);
        body(0);
    }
}

#[test]
fn bits_do_not_depend_on_who_runs() {
    let serial = run(&mut Par::Serial).bits();
    for threads in [1, 2, 3, 4, 7, 16] {
        assert!(run(&mut Par::Pool(&Pool::new(threads).unwrap())).bits() == serial);
        assert!(run(&mut Par::Caller(&Scoped(threads))).bits() == serial);
    }
    assert!(run(&mut Par::Caller(&Rayon)).bits() == serial);
    assert!(run(&mut Par::Caller(&Careless)).bits() == serial);
    assert!(run(&mut Par::Caller(&Scoped(0))).bits() == serial);
}

#[test]
fn pools_serve_several_threads_and_sit_inside_others() {
    let serial = run(&mut Par::Serial).bits();
    let pool = Pool::new(3).unwrap();
    std::thread::scope(|s| {
        for _ in 0..4 {
            s.spawn(|| (0..5).for_each(|_| assert!(run(&mut Par::Pool(&pool)).bits() == serial)));
        }
    });
    use rayon::prelude::*;
    (0..8).into_par_iter().for_each(|i| {
        let bits = if i % 2 == 0 { run(&mut Par::Pool(&pool)) } else { run(&mut Par::Caller(&Rayon)) }.bits();
        assert!(bits == serial);
    });
}

/// Threads draw tasks in another order each time.
#[test]
fn repeats_have_the_same_bits() {
    repeats_of::<f32>();
    repeats_of::<bf16>();
}

/// Of 20 shapes, whose blocks' rows are too many to be few.
fn repeats_of<T: Element>() {
    let (cpu, pool) = (Cpu::new().unwrap().with_threads(3), Pool::new(3).unwrap());
    let windows = [Window::Blocks(2), Window::Tokens(20)];
    let shapes = [[1, 1], [6, 3]].into_iter().flat_map(|heads| windows.map(|window| (heads, window)));
    for (heads, window, d) in shapes.flat_map(|(heads, window)| [1, 16, 33, 64, 128].map(|d| (heads, window, d))) {
        let stream = Stream::<T>::new(shape(heads, d, 20, window, 5, T::DTYPE), 50, 7);
        let serial = stream.prefill(&cpu, &mut Par::Serial).bits();
        for _ in 0..250 {
            assert!(stream.prefill(&cpu, &mut Par::Pool(&pool)).bits() == serial, "{:?}", stream.shape);
        }
    }
}

/// Parts of a slice write disjoint rows, and all of them together.
#[test]
fn slices_add_up() {
    let serial = run(&mut Par::Serial);
    for nth in [1, 2, 5, 1000] {
        let mut all = vec![7f32.to_bits(); serial.bits().len()];
        for ith in 0..nth {
            let part = run(&mut Par::Slice { ith, nth, phase: 0 }).bits();
            for (all, part) in all.iter_mut().zip(part).filter(|(_, part)| *part != 7f32.to_bits()) {
                assert_eq!(*all, 7f32.to_bits(), "an element written by two parts");
                *all = part;
            }
        }
        assert!(all == serial.bits(), "{nth} parts");
    }
}
