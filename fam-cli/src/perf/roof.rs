//! What this machine can do with the instructions that the kernels use: the roof that a case's time is a share of.
//!
//! The probes of arithmetic are `fam-cpu`'s own, of the level that its kernels run at ([`Isa::multiply_adds`], [`Isa::bf16_multiply_adds`], [`Isa::exponentials`]): the
//! roof of the level `avx2` is the peak of AVX2, whatever else the machine has.

use fam::cpu::Isa;
use serde::Serialize;
use std::hint::black_box;
use std::time::Instant;

/// Rates per second of all threads together.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Rates {
    /// f32 multiplications and additions, in registers.
    pub flops: f64,
    /// The same of bf16, as attention multiplies it at this level: in pairs, or as f32.
    pub bf16_flops: f64,
    /// f32 exponentials, in L1.
    pub exps: f64,
    /// Bytes read from memory.
    pub bytes: f64,
}

/// Rounds and passes of the probes of arithmetic: some milliseconds at any level.
const ROUNDS: usize = 1 << 21;
const PASSES: usize = 1 << 13;
/// What the probe of memory reads, together: several times the last cache of most machines.
const READ_BYTES: usize = 256 << 20;

/// The probes, and the memory that one of them reads.
pub struct Probe {
    isa: Isa,
    threads: usize,
    memory: Vec<u64>,
}

impl Probe {
    /// Probes that use `isa` and `threads` threads, as the cases do.
    pub fn new(isa: Isa, threads: usize) -> Self {
        Probe { isa, threads, memory: vec![1; READ_BYTES / size_of::<u64>()] }
    }

    /// Measures once: some tens of milliseconds.
    pub fn measure(&self) -> Rates {
        let part = self.memory.len().div_ceil(self.threads);
        Rates {
            flops: self.rate(|_| self.isa.multiply_adds(ROUNDS).unwrap_or_default()),
            bf16_flops: self.rate(|_| self.isa.bf16_multiply_adds(ROUNDS).unwrap_or_default()),
            exps: self.rate(|_| self.isa.exponentials(PASSES).unwrap_or_default()),
            bytes: self.rate(|i| {
                let end = self.memory.len().min((i + 1) * part);
                let read = &self.memory[(i * part).min(end)..end];
                black_box(read.iter().fold(0u64, |sum, x| sum.wrapping_add(*x)));
                size_of_val(read) as f64
            }),
        }
    }

    /// The sum of all threads' rates. `work` says how much it was.
    fn rate(&self, work: impl Fn(usize) -> f64 + Sync) -> f64 {
        let timed = |i| {
            let start = Instant::now();
            let amount = work(i);
            amount / start.elapsed().as_secs_f64()
        };
        let timed = &timed;
        std::thread::scope(|scope| {
            let others: Vec<_> = (1..self.threads).map(|i| scope.spawn(move || timed(i))).collect();
            // A probe that panicked has no rate.
            timed(0) + others.into_iter().map(|thread| thread.join().unwrap_or(0.0)).sum::<f64>()
        })
    }
}
