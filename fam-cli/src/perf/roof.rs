//! What this machine can do with the instructions that the kernels use: the roof that a case's time is a share of.
//!
//! The probes are plain Rust that LLVM turns into the target's baseline vectors, as it does with the kernels of the level `scalar`; so the
//! roof is the peak of that instruction set (on x86-64 SSE2: a multiplication and an addition, four lanes each), not of the machine.

use serde::Serialize;
use std::hint::black_box;
use std::time::Instant;

/// Rates per second of all threads together.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Rates {
    /// f32 multiplications and additions, in registers.
    pub flops: f64,
    /// f32 exponentials, in L1.
    pub exps: f64,
    /// Bytes read from memory.
    pub bytes: f64,
}

/// f32 lanes of a vector register of the target's baseline.
const LANES: usize = if cfg!(target_feature = "avx512f") {
    16
} else if cfg!(target_feature = "avx") {
    8
} else {
    4
};
/// Independent chains: two a cycle, each of a multiplication and an addition of three cycles. With the factor, the term and a temporary
/// they fill 15 of 16 registers.
const CHAINS: usize = 12;
/// Rounds of a probe that takes about as long as the others: some milliseconds.
const ROUNDS: usize = 1 << 22;
/// Exponentials in L1, and passes over them.
const EXPS: usize = 2048;
const EXP_PASSES: usize = 4096;
/// What the probe of memory reads, together: several times the last cache of most machines.
const READ_BYTES: usize = 256 << 20;

/// The probes, and the memory that one of them reads.
pub struct Probe {
    threads: usize,
    memory: Vec<u64>,
}

impl Probe {
    /// Probes that use `threads` threads, as the cases do.
    pub fn new(threads: usize) -> Self {
        Probe { threads, memory: vec![1; READ_BYTES / size_of::<u64>()] }
    }

    /// Measures once: some tens of milliseconds.
    pub fn measure(&self) -> Rates {
        let part = self.memory.len().div_ceil(self.threads);
        Rates {
            flops: self.rate((2 * LANES * CHAINS * ROUNDS) as f64, |_| multiply_adds(ROUNDS)),
            exps: self.rate((EXPS * EXP_PASSES) as f64, |_| exponentials(EXP_PASSES)),
            bytes: self.rate((READ_BYTES / self.threads) as f64, |i| {
                let end = self.memory.len().min((i + 1) * part);
                black_box(self.memory[(i * part).min(end)..end].iter().fold(0u64, |sum, x| sum.wrapping_add(*x)));
            }),
        }
    }

    /// The sum of all threads' rates at `amount` of work each.
    fn rate(&self, amount: f64, work: impl Fn(usize) + Sync) -> f64 {
        let timed = |i| {
            let start = Instant::now();
            work(i);
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

/// x ← x·a + b in independent chains of registers.
#[inline(never)]
fn multiply_adds(rounds: usize) {
    let (a, b) = (black_box(0.999f32), black_box(1e-3f32));
    let mut x = [[1.0f32; LANES]; CHAINS];
    for _ in 0..rounds {
        for lane in x.as_flattened_mut() {
            *lane = *lane * a + b;
        }
    }
    black_box(x);
}

/// Exponentials by the method of the kernels: x = n·ln 2 + r, a polynomial of degree 6 in r, and 2ⁿ in two factors.
#[inline(never)]
fn exponentials(passes: usize) {
    /// In 2²³ .. 2²⁴ f32 has no fraction: adding and subtracting this rounds.
    const MAGIC: f32 = 12_582_912.0;
    const POLYNOMIAL: [f32; 6] = [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];
    let x: [f32; EXPS] = std::array::from_fn(|i| i as f32 * -0.01);
    let mut y = [0f32; EXPS];
    for _ in 0..passes {
        for (y, x) in y.iter_mut().zip(black_box(&x)) {
            let x = if *x < -105.0 { -105.0 } else { *x };
            let shifted = x * std::f32::consts::LOG2_E + MAGIC;
            let (n, bits) = (shifted - MAGIC, shifted.to_bits() as i32 - MAGIC.to_bits() as i32);
            let r = n * 2.121_944_4e-4 + (n * (-355.0 / 512.0) + x);
            let p = POLYNOMIAL[1..].iter().fold(POLYNOMIAL[0], |p, c| p * r + c);
            let power = |n: i32| f32::from_bits(((n + 127) << 23) as u32);
            *y = (p * (r * r) + r + 1.0) * power(bits >> 1) * power(bits - (bits >> 1));
        }
        black_box(&mut y);
    }
}
