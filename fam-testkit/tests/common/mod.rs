//! The CPU backend under the harness.

use fam_core::{Error, Result};
use fam_cpu::{Cpu, Executor, Par, Pool};
use fam_testkit::{Harness, Limits, Queue};

/// The CPU, and where its ops run.
pub struct CpuHarness {
    cpu: Cpu,
    place: Place,
}

enum Place {
    Serial,
    Pool(Pool),
    Caller(Scoped),
    Slices(usize),
}

#[allow(dead_code)] // Not every test file runs all.
impl CpuHarness {
    fn new(threads: usize, place: Place) -> Self {
        CpuHarness { cpu: Cpu::new().unwrap().with_threads(threads), place }
    }

    /// On the caller's thread.
    pub fn serial() -> Self {
        Self::new(1, Place::Serial)
    }

    /// The same by plans for so many threads: work is cut as for these, and an op's second phase runs.
    pub fn serial_planned_for(threads: usize) -> Self {
        Self::new(threads, Place::Serial)
    }

    /// On a pool of the backend's own.
    pub fn pool(threads: usize) -> Self {
        Self::new(threads, Place::Pool(Pool::new(threads).unwrap()))
    }

    /// On threads that the caller brings.
    pub fn caller(threads: usize) -> Self {
        Self::new(threads, Place::Caller(Scoped(threads)))
    }

    /// In `nth` slices one after the other, by plans for `threads` threads. For work of one op: the slices of a second must wait for all of
    /// the first.
    pub fn slices(nth: usize, threads: usize) -> Self {
        Self::new(threads, Place::Slices(nth))
    }
}

/// A caller's executor: a thread for each task, the last task first.
struct Scoped(usize);

impl Executor for Scoped {
    fn threads(&self) -> usize {
        self.0
    }
    fn run(&self, tasks: usize, body: &(dyn Fn(usize) + Sync)) {
        std::thread::scope(|s| (0..tasks).rev().for_each(|i| drop(s.spawn(move || body(i)))));
    }
}

impl Harness for CpuHarness {
    type Backend = Cpu;

    fn backend(&self) -> &Cpu {
        &self.cpu
    }

    fn run(&self, work: &mut dyn FnMut(&mut Queue<'_, Self>) -> Result<()>) -> Result<()> {
        match &self.place {
            Place::Serial => work(&mut Par::Serial),
            Place::Pool(pool) => work(&mut Par::Pool(pool)),
            Place::Caller(executor) => work(&mut Par::Caller(executor)),
            Place::Slices(nth) => {
                let mut parts = |nth, phase| (0..nth).try_for_each(|ith| work(&mut Par::Slice { ith, nth, phase }));
                match parts(*nth, 0) {
                    // What is no op (reading a ring) is not cut.
                    Err(Error::Invalid { field: "slice.nth", .. }) => return parts(1, 0),
                    first => first?,
                }
                match parts(*nth, 1) {
                    // An op of one phase.
                    Err(Error::Invalid { field: "slice.phase", .. }) => Ok(()),
                    second => second,
                }
            }
        }
    }

    fn limits(&self) -> Limits {
        let pairs = self.cpu.isa().pairs();
        Limits::default()
            .key_tile(fam_cpu::BLOCK_N)
            .p16(pairs)
            .p16_backward(pairs)
            .flushes(pairs)
            .few_rows([fam_cpu::FEW_ROWS, fam_cpu::FEW_MEM_ROWS])
    }
}
