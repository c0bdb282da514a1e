//! What a level of instructions can do at most, as the kernels use it: the roof that a figure is a share of.

use crate::Isa;
use crate::vector::{Body, Vector, exp2};
use std::hint::black_box;

/// Independent chains of sums: more than multiply-adds are under way at once (two a cycle, each of four). They and the factor and the term
/// fit the registers of AVX2; where a vector is two registers, half of them do.
const CHAINS: usize = 12;
/// Exponentials of a pass: in L1.
const EXPONENTIALS: usize = 2048;

impl Isa {
    /// f32 multiplications and additions of `rounds` rounds in registers, done on this thread: how many these were. They are fused where the
    /// level fuses.
    ///
    /// # Panics
    /// Where this machine lacks the level; so does [`Isa::exponentials`].
    #[must_use]
    pub fn multiply_adds(self, rounds: usize) -> f64 {
        self.run(MultiplyAdds(rounds))
    }

    /// Exponentials of `passes` passes over L1, by the method of the softmax, done on this thread: how many these were.
    #[must_use]
    pub fn exponentials(self, passes: usize) -> f64 {
        self.run(Exponentials(passes))
    }
}

struct MultiplyAdds(usize);

impl Body for MultiplyAdds {
    type Output = f64;

    #[inline(always)]
    fn run<V: Vector, const MR: usize, const NR: usize>(self) -> f64 {
        let (a, b) = (V::splat(black_box(0.999)), V::splat(black_box(1e-3)));
        let mut x = [a; CHAINS];
        // Chains of equal numbers would be compiled into one.
        for (i, x) in x.iter_mut().enumerate() {
            *x = V::splat(i as f32);
        }
        let chains = if V::MR == 1 { CHAINS / 2 } else { CHAINS };
        for _ in 0..self.0 {
            for x in &mut x[..chains] {
                *x = x.mul_add(a, b);
            }
        }
        let mut out = [0.0; CHAINS * 16];
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
