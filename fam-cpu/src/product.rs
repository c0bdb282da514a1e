//! The micro-kernel of every matrix product in this crate.
//!
//! ```text
//! out[i][lanes] = Σ_k b[i·bi + k·bk] · x[k·xs + lanes]
//! ```
//!
//! `MR` vectors of lanes by `NR` values of i stay in registers; x is loaded, b is broadcast from where it lies. So nothing that is
//! broadcast needs packing, whichever way its rows run:
//!
//! | product | lanes | i | k | b |
//! |---|---|---|---|---|
//! | logits Sᵀ = K·Qᵀ | rows | keys | channels | K |
//! | Oᵀ = Vᵀ·Pᵀ | rows | channels | keys | V |
//! | read aᵀ = mᵀ·σ(q)ᵀ | rows | value channels | key channels | m |
//! | write m = σ(k)ᵀ·v | value channels | key channels | keys | σ(k) |
//! | dV = Pᵀ·dO, dK = dSᵀ·Q | channels | keys | rows | P, dS |
//!
//! A lane's arithmetic is one chain over k, the same for any `MR` and `NR`: tiles may be cut anywhere without changing a bit.
//!
//! x and b hold f32, or pairs of bf16 that are neighbours in k ([`Factor`]); then k counts pairs. Sums are f32.

use crate::isa::Isa;
use crate::tile::CHAIN;
use crate::vector::{Body, Vector};
use bytemuck::{Pod, Zeroable};
use fam_core::{bf16, mutate};
use std::ops::Range;

/// What a product multiplies. As large as an f32, so that one scratch memory serves all.
pub(crate) trait Factor: Pod {
    /// Terms of the sum in one factor.
    const TERMS: usize;
    /// Runs a body with such products on vectors that have them.
    fn run<B: Body>(isa: Isa, body: B) -> B::Output;
    /// `sum + x·b`, lane by lane.
    fn add_product<V: Vector>(self, x: V, sum: V) -> V;
    /// The same with those terms of factor k alone that are `within`, in each lane from the one number to before the other; one by one,
    /// with the bits of all at once.
    fn add_products_within<V: Vector>(self, x: V, sum: V, k: usize, within: [V; 2]) -> V;
    /// Factors of the first `TERMS` terms.
    fn join<V: Vector>(terms: [V; 2]) -> V;
}

impl Factor for f32 {
    const TERMS: usize = 1;

    #[inline(always)]
    fn run<B: Body>(isa: Isa, body: B) -> B::Output {
        isa.run(body)
    }
    #[inline(always)]
    fn add_product<V: Vector>(self, x: V, sum: V) -> V {
        x.mul_add(V::splat(self), sum)
    }
    #[inline(always)]
    fn add_products_within<V: Vector>(self, x: V, sum: V, k: usize, [first, end]: [V; 2]) -> V {
        self.add_product(x, sum).select(V::splat(k as f32).is_within(first, end), sum)
    }
    #[inline(always)]
    fn join<V: Vector>([term, _]: [V; 2]) -> V {
        term
    }
}

/// Terms 2i and 2i + 1. The second enters the sum first ([`Vector::dot`]).
#[derive(Clone, Copy, Default, Pod, Zeroable)]
#[repr(transparent)]
pub(crate) struct Pair(pub [bf16; 2]);

impl Factor for Pair {
    const TERMS: usize = 2;

    #[inline(always)]
    fn run<B: Body>(isa: Isa, body: B) -> B::Output {
        isa.run_pairs(body)
    }
    #[inline(always)]
    fn add_product<V: Vector>(self, x: V, sum: V) -> V {
        sum.dot(x, V::splat(bytemuck::cast(self)))
    }
    #[inline(always)]
    fn add_products_within<V: Vector>(self, x: V, sum: V, k: usize, [first, end]: [V; 2]) -> V {
        let (first_term, second_term) = ((2 * k) as f32, (2 * k + mutate!("attend-pair-whole", 1, 0)) as f32);
        let Pair(b) = self;
        let sum = Pair([bf16::ZERO, b[1]]).add_product(x, sum).select(V::splat(second_term).is_within(first, end), sum);
        Pair([b[0], bf16::ZERO]).add_product(x, sum).select(V::splat(first_term).is_within(first, end), sum)
    }
    #[inline(always)]
    fn join<V: Vector>([first, second]: [V; 2]) -> V {
        V::pair(first, second)
    }
}

/// Vectors over k, `stride` apart.
#[derive(Clone, Copy)]
pub(crate) struct Lanes<'a, F = f32> {
    pub data: &'a [F],
    pub stride: usize,
}

/// Values b[i·`i` + k·`k`].
#[derive(Clone, Copy)]
pub(crate) struct Broadcast<'a, F = f32> {
    pub data: &'a [F],
    pub i: usize,
    pub k: usize,
}

impl<'a, F> Broadcast<'a, F> {
    /// The values from i = `first` on.
    #[inline(always)]
    pub fn skip(self, first: usize) -> Self {
        Broadcast { data: &self.data[first * self.i..], ..self }
    }
}

/// The neutral element of addition, −0: with it even a sum's sign of zero does not tell how many terms it has.
#[inline(always)]
pub(crate) fn zero<V: Vector, const MR: usize, const NR: usize>() -> [[V; MR]; NR] {
    [[V::splat(-0.0); MR]; NR]
}

/// How a term enters its sum.
pub(crate) trait Term<V: Vector, F> {
    /// `sum` with x·b: factor k of vector j.
    fn add(&self, sum: V, x: V, b: F, k: usize, j: usize) -> V;
}

/// Every term.
pub(crate) struct All;

impl<V: Vector, F: Factor> Term<V, F> for All {
    #[inline(always)]
    fn add(&self, sum: V, x: V, b: F, _: usize, _: usize) -> V {
        b.add_product(x, sum)
    }
}

/// In each lane the terms `first ≤ k < end` alone. Others are not multiplied by 0 but left out, since they may be NaN.
pub(crate) struct Within<V, const MR: usize> {
    pub first: [V; MR],
    pub end: [V; MR],
}

impl<V: Vector, const MR: usize> Within<V, MR> {
    /// `x`, but 0 in the lanes of vector j that are not to have term k.
    #[inline(always)]
    pub fn or_0(&self, x: V, k: usize, j: usize) -> V {
        x.select(V::splat(k as f32).is_within(self.first[j], self.end[j]), V::splat(0.0))
    }
}

impl<V: Vector, F: Factor, const MR: usize> Term<V, F> for Within<V, MR> {
    #[inline(always)]
    fn add(&self, sum: V, x: V, b: F, k: usize, j: usize) -> V {
        b.add_products_within(x, sum, k, [self.first[j], self.end[j]])
    }
}

/// `sum[i][j] += Σ_k b[i][k] · x[k][j]` over the factors k.
#[inline(always)]
pub(crate) fn accumulate<V: Vector, F: Factor, const MR: usize, const NR: usize>(
    x: Lanes<'_, F>,
    b: Broadcast<'_, F>,
    factors: Range<usize>,
    term: &impl Term<V, F>,
    sum: &mut [[V; MR]; NR],
) {
    const { assert!(size_of::<F>() == size_of::<f32>()) };
    if factors.is_empty() {
        return;
    }
    let last = factors.end - 1;
    assert!(last * x.stride + MR * V::LANES <= x.data.len() && (NR - 1) * b.i + last * b.k < b.data.len());
    let (x_data, b_data) = (x.data.as_ptr(), b.data.as_ptr());
    let mut out = *sum;
    for k in factors {
        for i in 0..NR {
            // SAFETY: k is at most `last` and i at most NR − 1; with these the index has been checked.
            let b = unsafe { *b_data.add(i * b.i + k * b.k) };
            for j in 0..MR {
                // SAFETY: as above, with j at most MR − 1. Factors are as large as an f32, and any bits are one.
                let x = unsafe { V::load_from(x_data.add(k * x.stride + j * V::LANES).cast()) };
                out[i][j] = term.add(out[i][j], x, b, k, j);
            }
        }
    }
    *sum = out;
}

/// Σ_k b[i][k] · x[k][j] over so many factors, in chains of at most `CHAIN` terms: a longer one's error would grow with its length, where
/// all terms are equal and each rounding errs to the same side.
#[inline(always)]
pub(crate) fn chained<V: Vector, F: Factor, const MR: usize, const NR: usize>(
    x: Lanes<'_, F>,
    b: Broadcast<'_, F>,
    factors: usize,
) -> [[V; MR]; NR] {
    let step = CHAIN / F::TERMS;
    let mut sum = zero::<V, MR, NR>();
    accumulate(x, b, 0..factors.min(step), &All, &mut sum);
    for first in (step..factors).step_by(step) {
        let mut chain = zero::<V, MR, NR>();
        accumulate(x, b, first..factors.min(first + step), &All, &mut chain);
        for i in 0..NR {
            for j in 0..MR {
                sum[i][j] = sum[i][j].add(chain[i][j]);
            }
        }
    }
    sum
}

/// A whole product of `count` values of i by `lanes` lanes, over so many factors.
pub(crate) struct Product<'a> {
    pub x: Lanes<'a>,
    pub b: Broadcast<'a>,
    pub count: usize,
    /// Whole vectors.
    pub lanes: usize,
    pub factors: usize,
    /// `[count][lanes]`: gets the sums, or has them added.
    pub out: &'a mut [f32],
    pub adds: bool,
}

impl Body for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector, const MR: usize, const NR: usize>(mut self) {
        let mut lane = 0;
        while lane < self.lanes {
            if lane + MR * V::LANES <= self.lanes {
                self.columns::<V, MR, NR>(lane);
                lane += MR * V::LANES;
            } else {
                self.columns::<V, 1, NR>(lane);
                lane += V::LANES;
            }
        }
    }
}

impl Product<'_> {
    /// All values of i for `M` vectors from `lane` on.
    #[inline(always)]
    fn columns<V: Vector, const M: usize, const NR: usize>(&mut self, lane: usize) {
        let whole = self.count / NR * NR;
        for i in (0..whole).step_by(NR) {
            self.block::<V, M, NR>(i, lane);
        }
        for i in whole..self.count {
            self.block::<V, M, 1>(i, lane);
        }
    }

    /// `N` of them.
    #[inline(always)]
    fn block<V: Vector, const M: usize, const N: usize>(&mut self, i: usize, lane: usize) {
        let x = Lanes { data: &self.x.data[lane..], ..self.x };
        let mut sum = chained::<V, f32, M, N>(x, self.b.skip(i), self.factors);
        let out = &mut self.out[i * self.lanes + lane..];
        if self.adds {
            let before: [[V; M]; N] = load(out, self.lanes);
            for i in 0..N {
                for j in 0..M {
                    sum[i][j] = before[i][j].add(sum[i][j]);
                }
            }
        }
        store(&sum, out, self.lanes);
    }
}

/// `NR` rows of `MR` vectors, `stride` apart.
#[inline(always)]
pub(crate) fn load<V: Vector, const MR: usize, const NR: usize>(from: &[f32], stride: usize) -> [[V; MR]; NR] {
    assert!((NR - 1) * stride + MR * V::LANES <= from.len());
    let mut block = zero();
    for i in 0..NR {
        for j in 0..MR {
            // SAFETY: i is at most NR − 1 and j at most MR − 1; with these the index has been checked.
            block[i][j] = unsafe { V::load_from(from.as_ptr().add(i * stride + j * V::LANES)) };
        }
    }
    block
}

/// The inverse of [`load`].
#[inline(always)]
pub(crate) fn store<V: Vector, const MR: usize, const NR: usize>(block: &[[V; MR]; NR], to: &mut [f32], stride: usize) {
    assert!((NR - 1) * stride + MR * V::LANES <= to.len());
    for i in 0..NR {
        for j in 0..MR {
            // SAFETY: as in `load`.
            unsafe { block[i][j].store_to(to.as_mut_ptr().add(i * stride + j * V::LANES)) };
        }
    }
}
