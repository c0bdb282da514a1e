//! What a level of instructions can do at most, as the kernels use it: the roof that a figure is a share of.

use crate::Isa;
use crate::product::{All, Broadcast, Lanes, accumulate, store, zero};
use crate::vector::{Body, Vector, exp2};
use fam_core::Result;
use std::hint::black_box;
use std::time::Instant;

/// Fewest and most independent chains of sums. There are as many as the micro-kernel has sums, which is more than multiply-adds are under way
/// at once (two a cycle, on some AArch64 processors four, each of four cycles), and fits the registers. Where one is two instructions, one after
/// the other, it takes more chains to keep both busy.
const CHAINS: [usize; 2] = [6, 24];
/// Exponentials of a pass: in L1.
const EXPONENTIALS: usize = 2048;

impl Isa {
    /// f32 multiplications and additions of `rounds` rounds in registers, done on this thread: how many these were. They are fused where the
    /// level fuses.
    ///
    /// # Errors
    /// [`fam_core::Error::Unsupported`] where this machine lacks the level; so do the other probes.
    pub fn multiply_adds(self, rounds: usize) -> Result<f64> {
        Ok(self.available()?.run(MultiplyAdds(rounds)))
    }

    /// Exponentials of `passes` passes over L1, by the method of the softmax, done on this thread: how many these were.
    ///
    /// # Errors
    /// See [`Isa::multiply_adds`].
    pub fn exponentials(self, passes: usize) -> Result<f64> {
        Ok(self.available()?.run(Exponentials(passes)))
    }

    /// Speed of the micro-kernel in blocks of so many vectors by so many broadcast values: `[vectors, values]` and FLOP/s, the best of many
    /// short runs out of L1.
    ///
    /// # Errors
    /// See [`Isa::multiply_adds`].
    pub fn product_speeds(self) -> Result<Vec<([usize; 2], f64)>> {
        let isa = self.available()?;
        Ok(vec![
            ([1, 4], isa.run(Block::<1, 4>)),
            ([1, 8], isa.run(Block::<1, 8>)),
            ([1, 16], isa.run(Block::<1, 16>)),
            ([2, 4], isa.run(Block::<2, 4>)),
            ([2, 6], isa.run(Block::<2, 6>)),
            ([2, 8], isa.run(Block::<2, 8>)),
            ([2, 12], isa.run(Block::<2, 12>)),
            ([3, 4], isa.run(Block::<3, 4>)),
            ([3, 8], isa.run(Block::<3, 8>)),
            ([4, 4], isa.run(Block::<4, 4>)),
            ([4, 6], isa.run(Block::<4, 6>)),
        ])
    }
}

/// Products of 64 rows with a panel of `M` vectors over 64 channels, `N` rows at once.
struct Block<const M: usize, const N: usize>;

impl<const M: usize, const N: usize> Body for Block<M, N> {
    type Output = f64;

    #[inline(always)]
    fn run<V: Vector, const MR: usize, const NR: usize>(self) -> f64 {
        let (width, rows) = (M * V::LANES, 64 / N * N);
        let (x, b, mut out) = (vec![0.5f32; 64 * width], [0.25f32; 64 * 64], vec![0.0f32; 64 * width]);
        let mut best = f64::MAX;
        for _ in 0..50 {
            let start = Instant::now();
            for _ in 0..100 {
                for i in (0..rows).step_by(N) {
                    let mut sum = zero::<V, M, N>();
                    let b = Broadcast { data: black_box(&b), i: 64, k: 1 };
                    accumulate(Lanes { data: &x, stride: width }, b.skip(i), 0..64, &All, &mut sum);
                    store(&sum, &mut out[i * width..], width);
                }
            }
            black_box(&mut out);
            best = best.min(start.elapsed().as_secs_f64());
        }
        (100 * 2 * 64 * rows * width) as f64 / best
    }
}

struct MultiplyAdds(usize);

impl Body for MultiplyAdds {
    type Output = f64;

    #[inline(always)]
    fn run<V: Vector, const MR: usize, const NR: usize>(self) -> f64 {
        let (a, b) = (V::splat(black_box(0.999)), V::splat(black_box(1e-3)));
        let mut x = [a; CHAINS[1]];
        // Chains of equal numbers would be compiled into one.
        for (i, x) in x.iter_mut().enumerate() {
            *x = V::splat(i as f32);
        }
        let chains = (MR * NR).clamp(CHAINS[0], CHAINS[1]);
        for _ in 0..self.0 {
            for x in &mut x[..chains] {
                *x = x.mul_add(a, b);
            }
        }
        let mut out = [0.0; CHAINS[1] * 16];
        for (x, out) in x.into_iter().zip(out.chunks_exact_mut(16)) {
            x.store(out);
        }
        black_box(out);
        (2 * chains * V::LANES * self.0) as f64
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
