//! The CPU backend under the harness.

use fam_core::Result;
use fam_cpu::{Cpu, Par, Pool};
use fam_testkit::{Harness, Limits, Queue};

/// The CPU on the caller's thread, or on a pool of its own.
pub struct CpuHarness {
    cpu: Cpu,
    pool: Option<Pool>,
}

impl CpuHarness {
    pub fn serial() -> Self {
        CpuHarness { cpu: Cpu::new().unwrap().with_threads(1), pool: None }
    }

    #[allow(dead_code)] // Not every test file runs pools.
    pub fn pool(threads: usize) -> Self {
        CpuHarness { cpu: Cpu::new().unwrap().with_threads(threads), pool: Some(Pool::new(threads).unwrap()) }
    }
}

impl Harness for CpuHarness {
    type Backend = Cpu;

    fn backend(&self) -> &Cpu {
        &self.cpu
    }

    fn run(&self, work: &mut dyn FnMut(&mut Queue<'_, Self>) -> Result<()>) -> Result<()> {
        match &self.pool {
            None => work(&mut Par::Serial),
            Some(pool) => work(&mut Par::Pool(pool)),
        }
    }

    fn limits(&self) -> Limits {
        Limits::default().key_tile(fam_cpu::BLOCK_N)
    }
}
