//! What this machine can do with the instructions that the kernels use: the roof that a case's time is a share of.
//!
//! The probes of arithmetic are the backend's own: of `fam-cpu` those of the level that its kernels run at ([`Isa::multiply_adds`],
//! [`Isa::bf16_multiply_adds`], [`Isa::exponentials`]), so the roof of the level `avx2` is the peak of AVX2, whatever else the machine has; of `fam-wgpu`
//! shaders ([`Wgpu::multiply_adds`], [`Wgpu::exponentials`]) and a copy in the device's memory.

use fam::Result;
use fam::cpu::Isa;
use fam::wgpu::Wgpu;
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

/// The probes.
pub enum Probe {
    /// Of instructions, on as many threads as the cases have, and the memory that one of them reads.
    Cpu { isa: Isa, threads: usize, memory: Vec<u64> },
    /// Of a device.
    Wgpu(Wgpu),
}

impl Probe {
    /// Probes that use `isa` and `threads` threads, as the cases do.
    pub fn cpu(isa: Isa, threads: usize) -> Self {
        Probe::Cpu { isa, threads, memory: vec![1; READ_BYTES / size_of::<u64>()] }
    }

    /// Whose the rates are.
    pub fn subject(&self) -> String {
        match self {
            Probe::Cpu { isa, .. } => format!("what the level {isa} reaches, that of the kernels"),
            Probe::Wgpu(_) => "what shaders reach in registers, and a copy, read and written".into(),
        }
    }

    /// Measures once: some tens of milliseconds.
    ///
    /// # Errors
    /// Those of the backend's probes.
    pub fn measure(&self) -> Result<Rates> {
        match self {
            Probe::Cpu { isa, threads, memory } => {
                let part = memory.len().div_ceil(*threads);
                Ok(Rates {
                    flops: rate(*threads, |_| isa.multiply_adds(ROUNDS).unwrap_or_default()),
                    bf16_flops: rate(*threads, |_| isa.bf16_multiply_adds(ROUNDS).unwrap_or_default()),
                    exps: rate(*threads, |_| isa.exponentials(PASSES).unwrap_or_default()),
                    bytes: rate(*threads, |i| {
                        let end = memory.len().min((i + 1) * part);
                        let read = &memory[(i * part).min(end)..end];
                        black_box(read.iter().fold(0u64, |sum, x| sum.wrapping_add(*x)));
                        size_of_val(read) as f64
                    }),
                })
            }
            Probe::Wgpu(wgpu) => {
                let flops = wgpu.multiply_adds()?;
                // bf16 is widened.
                Ok(Rates { flops, bf16_flops: flops, exps: wgpu.exponentials()?, bytes: wgpu.copied_bytes()? })
            }
        }
    }
}

/// The sum of all threads' rates. `work` says how much it was.
fn rate(threads: usize, work: impl Fn(usize) -> f64 + Sync) -> f64 {
    let timed = |i| {
        let start = Instant::now();
        let amount = work(i);
        amount / start.elapsed().as_secs_f64()
    };
    let timed = &timed;
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|i| scope.spawn(move || timed(i))).collect();
        // A probe that panicked has no rate.
        timed(0) + others.into_iter().map(|thread| thread.join().unwrap_or(0.0)).sum::<f64>()
    })
}
