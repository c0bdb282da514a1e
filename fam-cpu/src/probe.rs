//! What a level of instructions can do at most, as the kernels use it: the roof that a figure is a share of.

use crate::Isa;
use crate::product::{All, Broadcast, Factor, Lanes, Pair, accumulate, store, zero};
use crate::vector::{Body, MAX_LANES, Vector, exp2};
use fam_core::{Result, bf16};
use std::hint::black_box;
use std::time::Instant;

/// Fewest and most independent chains of sums. There are as many as the micro-kernel has sums, which is more than multiply-adds are under way
/// at once (two a cycle, on some AArch64 processors four, each of four cycles), and fits the registers. Where one is two instructions, one after
/// the other, it takes more chains to keep both busy.
const CHAINS: [usize; 2] = [6, 24];
/// Passes over 64 rows for one time.
const PASSES: usize = 100;
/// Exponentials of a pass: in L1.
const EXPONENTIALS: usize = 2048;

impl Isa {
    /// f32 multiplications and additions of `rounds` rounds in registers, done on this thread: how many these were. They are fused where the
    /// level fuses.
    ///
    /// # Errors
    /// [`fam_core::Error::Unsupported`] where this machine lacks the level; so do the other probes.
    pub fn multiply_adds(self, rounds: usize) -> Result<f64> {
        Ok(self.available()?.run(MultiplyAdds(rounds, 0.001f32)))
    }

    /// The same of bf16, as attention multiplies it at this level: in pairs where the level has their dot, else in f32.
    ///
    /// # Errors
    /// See [`Isa::multiply_adds`].
    pub fn bf16_multiply_adds(self, rounds: usize) -> Result<f64> {
        match self.pairs() {
            [] => self.multiply_adds(rounds),
            _ => Ok(self.available()?.run_pairs(MultiplyAdds(rounds, Pair([bf16::EPSILON; 2])))),
        }
    }

    /// Exponentials of `passes` passes over L1, by the method of the softmax, done on this thread: how many these were.
    ///
    /// # Errors
    /// See [`Isa::multiply_adds`].
    pub fn exponentials(self, passes: usize) -> Result<f64> {
        Ok(self.available()?.run(Exponentials(passes)))
    }

    /// Speed of the micro-kernel in blocks of so many vectors by so many broadcast values: `[vectors, values]` and FLOP/s, the best of many
    /// short runs out of L1. In pairs of bf16 where the level has their dot, else in f32.
    ///
    /// # Errors
    /// See [`Isa::multiply_adds`].
    pub fn product_speeds(self) -> Result<Vec<([usize; 2], f64)>> {
        let isa = self.available()?;
        Ok(match self.pairs() {
            [] => block_speeds(isa, 0.25f32),
            _ => block_speeds(isa, Pair([bf16::EPSILON; 2])),
        })
    }
}

/// [`Isa::product_speeds`] of one kind of factors.
fn block_speeds<F: Factor>(isa: Isa, b: F) -> Vec<([usize; 2], f64)> {
    vec![
        ([1, 16], block_speed::<F, 1, 16>(isa, b)),
        ([2, 6], block_speed::<F, 2, 6>(isa, b)),
        ([2, 8], block_speed::<F, 2, 8>(isa, b)),
        ([2, 12], block_speed::<F, 2, 12>(isa, b)),
        ([3, 8], block_speed::<F, 3, 8>(isa, b)),
        ([4, 4], block_speed::<F, 4, 4>(isa, b)),
    ]
}

/// FLOP/s of 64 rows with a panel of `M` vectors over 64 channels, `N` rows at once.
fn block_speed<F: Factor, const M: usize, const N: usize>(isa: Isa, b: F) -> f64 {
    let (x, b, mut out) = (vec![b; 64 * M * MAX_LANES], vec![b; 64 * 64], vec![0.0f32; 64 * M * MAX_LANES]);
    let (mut best, mut flops) = (f64::MAX, 0);
    for _ in 0..50 {
        let start = Instant::now();
        flops = F::run(isa, Block::<F, M, N> { x: &x, b: &b, out: black_box(&mut out) });
        best = best.min(start.elapsed().as_secs_f64());
    }
    flops as f64 / best
}

/// Passes of [`block_speed`], and how many FLOPs these were.
struct Block<'a, F, const M: usize, const N: usize> {
    x: &'a [F],
    b: &'a [F],
    out: &'a mut [f32],
}

impl<F: Factor, const M: usize, const N: usize> Body for Block<'_, F, M, N> {
    type Output = usize;

    #[inline(always)]
    fn run<V: Vector, const MR: usize, const NR: usize>(self) -> usize {
        let (width, rows, factors) = (M * V::LANES, 64 / N * N, 64 / F::TERMS);
        for _ in 0..PASSES {
            for i in (0..rows).step_by(N) {
                let mut sum = zero::<V, M, N>();
                let b = Broadcast { data: black_box(self.b), i: factors, k: 1 };
                accumulate(Lanes { data: self.x, stride: width }, b.skip(i), 0..factors, &All, &mut sum);
                store(&sum, &mut self.out[i * width..], width);
            }
        }
        PASSES * 2 * 64 * rows * width
    }
}

/// So many rounds, with this factor.
struct MultiplyAdds<F>(usize, F);

impl<F: Factor> Body for MultiplyAdds<F> {
    type Output = f64;

    #[inline(always)]
    fn run<V: Vector, const MR: usize, const NR: usize>(self) -> f64 {
        let (a, b) = (F::join([V::splat(black_box(0.999)); 2]), black_box(self.1));
        let mut x = [a; CHAINS[1]];
        // Chains of equal numbers would be compiled into one.
        for (i, x) in x.iter_mut().enumerate() {
            *x = V::splat(i as f32);
        }
        let chains = (MR * NR).clamp(CHAINS[0], CHAINS[1]);
        for _ in 0..self.0 {
            for x in &mut x[..chains] {
                *x = b.add_product(a, *x);
            }
        }
        let mut out = [0.0; CHAINS[1] * 16];
        for (x, out) in x.into_iter().zip(out.chunks_exact_mut(16)) {
            x.store(out);
        }
        black_box(out);
        (2 * F::TERMS * chains * V::LANES * self.0) as f64
    }
}

struct Exponentials(usize);

impl Body for Exponentials {
    type Output = f64;

    #[inline(always)]
    fn run<V: Vector, const MR: usize, const NR: usize>(self) -> f64 {
        let mut x = [0.0f32; EXPONENTIALS];
        x.iter_mut().enumerate().for_each(|(i, x)| *x = i as f32 * -0.01);
        let mut y = [0.0f32; EXPONENTIALS];
        for _ in 0..self.0 {
            for (x, y) in black_box(&x).chunks_exact(V::LANES).zip(y.chunks_exact_mut(V::LANES)) {
                exp2(V::load(x)).store(y);
            }
            black_box(&mut y);
        }
        (EXPONENTIALS * self.0) as f64
    }
}
