//! The narrow waist between kernels and instruction sets: some twenty verbs over a register of f32 lanes.
//!
//! A kernel is written once, as a [`Body`] generic over [`Vector`] and `#[inline(always)]`; an instruction set implements the verbs in a
//! file of its own and runs bodies in a shell with its `#[target_feature]`. The shell is the only way in ([`crate::Isa::run`]), so a verb
//! runs only on a machine that has its instructions.
//!
//! What NaN does is part of the contract: no verb loses the NaN of its receiver.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;
pub(crate) mod plain;
pub(crate) mod scalar;

use fam_core::{bf16, f16};

/// Lanes of the widest level.
pub(crate) const MAX_LANES: usize = 16;

/// Work over vectors of any instruction set.
///
/// What works on vectors is no closure: a closure is not sure to be inlined, and then lacks the shell's instructions.
///
/// `MR` vectors of lanes by `NR` broadcast values are what a level holds in registers at once ([`crate::product`]).
pub(crate) trait Body {
    /// What it gives.
    type Output;
    /// Does it. Implementations are `#[inline(always)]`, so that they take on the instructions of the shell that they run in.
    fn run<V: Vector, const MR: usize, const NR: usize>(self) -> Self::Output;
}

/// A register of f32 lanes.
pub(crate) trait Vector: Copy {
    /// Lanes.
    const LANES: usize;
    /// Vectors of lanes that are held in registers at once. A panel of rows is as wide.
    const MR: usize;
    /// A lane of a mask is true or false.
    type Mask: Copy;

    /// Runs a body in this level's shell: a function of its own, with these instructions.
    fn run<B: Body>(body: B) -> B::Output;

    /// The same value in every lane.
    fn splat(value: f32) -> Self;
    /// The `LANES` elements from `from` on, aligned or not.
    ///
    /// # Safety
    /// They can be read.
    unsafe fn load_from(from: *const f32) -> Self;
    /// The first `LANES` elements of `from`.
    #[inline(always)]
    fn load(from: &[f32]) -> Self {
        let from = &from[..Self::LANES];
        // SAFETY: the slice has them.
        unsafe { Self::load_from(from.as_ptr()) }
    }
    /// Writes the `LANES` elements from `to` on.
    ///
    /// # Safety
    /// They can be written.
    unsafe fn store_to(self, to: *mut f32);
    /// Writes the first `LANES` elements of `to`.
    #[inline(always)]
    fn store(self, to: &mut [f32]) {
        let to = &mut to[..Self::LANES];
        // SAFETY: the slice has them.
        unsafe { self.store_to(to.as_mut_ptr()) }
    }
    /// The exact values of the first `LANES` elements of `from`.
    fn load_f16(from: &[f16]) -> Self;
    /// Writes the nearest values, ties to even, to the first `LANES` elements of `to`.
    fn store_f16(self, to: &mut [f16]);
    /// The exact values of the first `LANES` elements of `from`.
    fn load_bf16(from: &[bf16]) -> Self;
    /// Writes the nearest values, ties to even, to the first `LANES` elements of `to`.
    fn store_bf16(self, to: &mut [bf16]);
    /// The first `2·LANES` elements of `from` as pairs.
    #[inline(always)]
    fn load_pairs(from: &[bf16]) -> Self {
        let from = &from[..2 * Self::LANES];
        // SAFETY: the slice has them, and any bits are a lane.
        unsafe { Self::load_from(from.as_ptr().cast()) }
    }
    /// The first `LANES` elements of each as pairs, one of each in a pair.
    #[inline(always)]
    fn interleave(first: &[bf16], second: &[bf16]) -> Self {
        plain::interleave(&first[..Self::LANES], &second[..Self::LANES])
    }
    /// The columns of the square that the first `LANES` rows are. What comes behind them is of no use.
    fn transpose(rows: [Self; MAX_LANES]) -> [Self; MAX_LANES];

    /// The even lanes of `self` and behind them those of `other`; the odd ones likewise.
    fn unzip(self, other: Self) -> [Self; 2];
    /// Asks for the cache line at `at`, which may lie anywhere, where the level has an instruction for it.
    #[inline(always)]
    fn prefetch<T>(_at: *const T) {}
    /// The same, but into the second level of cache alone.
    #[inline(always)]
    fn prefetch_far<T>(_at: *const T) {}

    /// `self + other`.
    fn add(self, other: Self) -> Self;
    /// `self − other`.
    fn sub(self, other: Self) -> Self;
    /// `self · other`.
    fn mul(self, other: Self) -> Self;
    /// `self / other`.
    fn div(self, other: Self) -> Self;
    /// `self · a + b`, rounded once or twice: once where the instruction set fuses.
    fn mul_add(self, a: Self, b: Self) -> Self;
    /// The larger; `self` where either is NaN.
    fn max(self, other: Self) -> Self;
    /// The smaller; `self` where either is NaN.
    fn min(self, other: Self) -> Self;
    /// `self · 2ⁿ` for integral n in −152 ..= 128, rounded once, subnormal results included. Any value where `self` and `n` are NaN
    /// together is NaN.
    fn ldexp(self, n: Self) -> Self;
    /// The nearest integer, for |self| < 2²².
    fn round(self) -> Self;

    /// Lanes where `first ≤ self < end`.
    fn is_within(self, first: Self, end: Self) -> Self::Mask;
    /// `self` where the mask is true, `other` elsewhere.
    fn select(self, mask: Self::Mask, other: Self) -> Self;

    /// Two bf16 in each lane, `first` in its lower half: the nearest ones, ties to even. What is subnormal in f32 becomes 0.
    #[inline(always)]
    fn pair(first: Self, second: Self) -> Self {
        plain::pair(first, second)
    }
    /// Writes the first `LANES` elements of `to`, rounded as [`Vector::pair`] does.
    #[inline(always)]
    fn store_terms(self, to: &mut [bf16]) {
        plain::store_terms(self, &mut to[..Self::LANES]);
    }
    /// `self + x₂·b₂ + x₁·b₁`, where lanes of `x` and `b` are pairs of bf16: each product is added in one rounding. Operands, sums and
    /// `self` that are subnormal in f32 count as 0.
    #[inline(always)]
    fn dot(self, x: Self, b: Self) -> Self {
        plain::dot(self, x, b)
    }
}

/// The sums of the lanes of each of `x[..n]`. n is a power of two.
///
/// Neighbours are added, of two vectors at once, until each sum is one lane.
#[inline(always)]
pub(crate) fn lane_sums<V: Vector>(mut x: [V; MAX_LANES], n: usize) -> [f32; MAX_LANES] {
    let (mut vectors, mut lanes) = (n, V::LANES);
    while lanes > 1 {
        let last = vectors - 1;
        vectors = vectors.div_ceil(2);
        for i in 0..vectors {
            let [even, odd] = x[2 * i].unzip(x[last.min(2 * i + 1)]);
            x[i] = even.add(odd);
        }
        lanes /= 2;
    }
    let mut sums = [0.0; MAX_LANES];
    for (i, sums) in sums.chunks_exact_mut(V::LANES).enumerate().take(vectors) {
        x[i].store(sums);
    }
    sums
}

/// 2ˣ for x ≤ 0 within 2 ulp: 1 for 0, 0 for −∞, NaN for NaN, correctly rounded subnormals; ∞ for 128. Not for x > 128.
///
/// x = n + r with |r| ≤ ½, and 2ʳ by the polynomial of Cephes' `exp2f` (S. Moshier).
#[inline(always)]
pub(crate) fn exp2<V: Vector>(x: V) -> V {
    // 2⁻¹⁵¹ is below half the smallest subnormal: from here on the result is 0, and n stays in range.
    let x = x.max(V::splat(-151.5));
    let n = x.round();
    power(x.sub(n), n)
}

/// exp(x) for x ≤ 0 within 2 ulp; as [`exp2`], for x ≤ 88.
///
/// x = n·ln 2 + r with |r| ≤ ln 2 / 2. ln 2 is split in two so that n times its upper part is exact.
#[inline(always)]
pub(crate) fn exp<V: Vector>(x: V) -> V {
    const LN2_UPPER: f32 = 355.0 / 512.0;
    const LN2_LOWER: f32 = -2.121_944_4e-4;
    let log2_e = V::splat(std::f32::consts::LOG2_E);
    let x = x.max(V::splat(-105.0));
    let n = x.mul(log2_e).round();
    let r = n.mul_add(V::splat(-LN2_UPPER), x);
    let r = n.mul_add(V::splat(-LN2_LOWER), r);
    power(r.mul(log2_e), n)
}

/// 2ʳ·2ⁿ for |r| ≤ ½ and integral n.
#[inline(always)]
fn power<V: Vector>(r: V, n: V) -> V {
    const POLYNOMIAL: [f32; 7] =
        [1.535_336_2e-4, 1.339_887_4e-3, 9.618_437e-3, 5.550_332_5e-2, 2.402_264_8e-1, 6.931_472e-1, 1.0];
    let mut p = V::splat(POLYNOMIAL[0]);
    for c in &POLYNOMIAL[1..] {
        p = p.mul_add(r, V::splat(*c));
    }
    p.ldexp(n)
}

/// σ(x) = ELU(x) + 1: x + 1 for x > 0, exp(x) otherwise (Infini-attention, Eq. 3; never `expm1(x) + 1`, which cancels).
///
/// Written as exp(min(x, 0)) + max(x, 0): one of the two terms is always the exact 1 or 0.
#[inline(always)]
pub(crate) fn sigma<V: Vector>(x: V) -> V {
    let zero = V::splat(0.0);
    exp(x.min(zero)).add(x.max(zero))
}

#[cfg(test)]
mod tests {
    use super::{Body, MAX_LANES, Vector, exp, exp2, lane_sums, plain, sigma};
    use crate::Isa;

    /// Functions of one number, in every lane.
    #[derive(Clone, Copy, Debug)]
    enum Function {
        Exp2,
        Exp,
        Sigma,
    }
    use Function::{Exp, Exp2, Sigma};

    /// A function of each number.
    struct Of<'a>(Function, &'a [f32]);

    impl Body for Of<'_> {
        type Output = Vec<f32>;

        #[inline(always)]
        fn run<V: Vector, const MR: usize, const NR: usize>(self) -> Vec<f32> {
            let mut out = vec![0.0; self.1.len().next_multiple_of(V::LANES)];
            out[..self.1.len()].copy_from_slice(self.1);
            for x in out.chunks_exact_mut(V::LANES) {
                let of = V::load(x);
                match self.0 {
                    Exp2 => exp2(of),
                    Exp => exp(of),
                    Sigma => sigma(of),
                }
                .store(x);
            }
            out.truncate(self.1.len());
            out
        }
    }

    fn levels() -> impl Iterator<Item = Isa> {
        Isa::ALL.into_iter().filter(|isa| isa.is_available())
    }

    /// Distance in units of the last place of the exact value, which for subnormal results is the smallest subnormal.
    fn ulps(got: f32, exact: f64) -> f64 {
        let exponent = exact.log2().floor().max(-126.0);
        (f64::from(got) - exact).abs() / (exponent - 23.0).exp2()
    }

    #[test]
    fn exponentials_are_within_two_ulp() {
        for (isa, function) in levels().flat_map(|isa| [(isa, Exp2), (isa, Exp)]) {
            let (lowest, exact): (f32, fn(f64) -> f64) = match function {
                Exp2 => (-152.5, f64::exp2),
                _ => (-106.0, f64::exp),
            };
            let x: Vec<f32> = ((-0.0f32).to_bits()..lowest.to_bits()).step_by(997).map(f32::from_bits).collect();
            let got = isa.run(Of(function, &x));
            let worst = x.iter().zip(got).map(|(x, got)| ulps(got, exact(f64::from(*x)))).fold(0.0, f64::max);
            assert!(worst <= 2.0, "{isa}, {function:?}: {worst} ulp");
            let ends = [0.0, -0.0, f32::NEG_INFINITY, -1e30, lowest];
            let want = [1.0f32, 1.0, 0.0, 0.0, 0.0];
            assert_eq!(isa.run(Of(function, &ends)).iter().map(|x| x.to_bits()).collect::<Vec<_>>(), want.map(f32::to_bits));
            assert_eq!(isa.run(Of(Exp2, &[128.0])), [f32::INFINITY], "{isa}");
        }
    }

    #[test]
    fn nan_stays_nan() {
        for (isa, function) in levels().flat_map(|isa| [(isa, Exp2), (isa, Exp), (isa, Sigma)]) {
            let nan = [f32::NAN, -f32::NAN, f32::from_bits(0x7f80_0001)];
            assert!(isa.run(Of(function, &nan)).iter().all(|x| x.is_nan()), "{isa}, {function:?}");
        }
    }

    #[test]
    fn sigma_is_exact_above_zero() {
        for isa in levels() {
            let x = [0.0, 1e-30f32, 0.1, 1.0, 3.3e7, f32::MAX, f32::INFINITY];
            assert_eq!(isa.run(Of(Sigma, &x)), x.map(|x| x + 1.0), "{isa}");
            assert!(ulps(isa.run(Of(Sigma, &[-20.0]))[0], (-20f64).exp()) <= 2.0);
        }
    }

    /// The other verbs, against plain Rust.
    struct Verbs;

    impl Body for Verbs {
        type Output = ();

        #[inline(always)]
        fn run<V: Vector, const MR: usize, const NR: usize>(self) {
            let x: Vec<f32> = (0..V::LANES * V::LANES).map(|i| i as f32 - 7.25).collect();
            let mut t = vec![0.0; V::LANES * (V::LANES + 3)];
            let columns = V::transpose(std::array::from_fn(|i| V::load(&x[i % V::LANES * V::LANES..])));
            columns.iter().take(V::LANES).enumerate().for_each(|(j, column)| column.store(&mut t[j * (V::LANES + 3)..]));
            for (i, j) in (0..V::LANES).flat_map(|i| (0..V::LANES).map(move |j| (i, j))) {
                assert_eq!(t[j * (V::LANES + 3) + i], x[i * V::LANES + j]);
            }
            for n in [1, 2, 4, 8, 16] {
                let mut rows = [V::splat(f32::NAN); MAX_LANES];
                for i in 0..n {
                    rows[i] = V::load(&x[i % V::LANES * V::LANES..]).mul(V::splat(1.0 + i as f32));
                }
                let sums = lane_sums(rows, n);
                for i in 0..n {
                    let sum: f32 = x[i % V::LANES * V::LANES..][..V::LANES].iter().sum();
                    assert_eq!(sums[i], sum * (1.0 + i as f32));
                }
            }
            V::prefetch(std::ptr::null::<f32>());
            V::prefetch_far(std::ptr::null::<f32>());
            let lanes = |v: V| {
                let mut out = vec![0.0; V::LANES];
                v.store(&mut out);
                out
            };
            let (a, b) = (V::load(&x), V::splat(-3.0));
            let each = |f: &dyn Fn(f32) -> f32| x[..V::LANES].iter().map(|x| f(*x)).collect::<Vec<f32>>();
            assert_eq!(lanes(a.add(b)), each(&|x| x - 3.0));
            assert_eq!(lanes(a.sub(b)), each(&|x| x + 3.0));
            assert_eq!(lanes(a.mul(b)), each(&|x| x * -3.0));
            assert_eq!(lanes(a.div(b)), each(&|x| x / -3.0));
            assert_eq!(lanes(a.mul_add(b, a)), each(&|x| x * -3.0 + x));
            assert_eq!(lanes(a.max(b)), each(&|x| x.max(-3.0)));
            assert_eq!(lanes(a.min(b)), each(&|x| x.min(-3.0)));
            assert_eq!(lanes(a.round()), each(&f32::round_ties_even));
            let mask = a.is_within(V::splat(-5.25), V::splat(-3.25));
            assert_eq!(lanes(a.select(mask, b)), each(&|x| if (-5.25..-3.25).contains(&x) { x } else { -3.0 }));
            for n in [-152.0f32, -149.0, -127.0, -1.0, 0.0, 127.0] {
                let two_to_n = f64::from(n).exp2();
                assert_eq!(lanes(V::splat(1.4).ldexp(V::splat(n))), vec![(f64::from(1.4f32) * two_to_n) as f32; V::LANES]);
            }
            let nan = V::splat(f32::NAN);
            assert!(lanes(nan.max(b)).iter().chain(&lanes(nan.min(b))).chain(&lanes(nan.ldexp(nan))).all(|x| x.is_nan()));
            assert_eq!((lanes(b.max(nan)), lanes(b.min(nan))), (lanes(b), lanes(b)));
            let seen = V::splat(0.0).is_within(V::splat(f32::NEG_INFINITY), nan);
            assert_eq!(lanes(a.select(seen, b)), lanes(b));
        }
    }

    #[test]
    fn verbs_do_what_they_say() {
        levels().for_each(|isa| isa.run(Verbs));
    }

    /// Pairs and their dot against plain Rust, of all kinds of numbers.
    struct Pairs;

    impl Body for Pairs {
        type Output = ();

        #[inline(always)]
        fn run<V: Vector, const MR: usize, const NR: usize>(self) {
            let mut state = 1u64;
            let mut random = |least: u32, exponents: u32| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let bits = (state >> 32) as u32;
                f32::from_bits(bits & 0x807f_ffff | (least + (bits >> 23 & 0xff) % exponents) << 23)
            };
            let same = |got: V, want: V| {
                let mut lanes = [[0.0; 16]; 2];
                got.store(&mut lanes[0]);
                want.store(&mut lanes[1]);
                let is_same = |got: f32, want: f32| got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan();
                assert!(lanes[0].into_iter().zip(lanes[1]).all(|(got, want)| is_same(got, want)), "{lanes:?}");
            };
            // Ordinary numbers, products and sums around the least normal one, and all that there are.
            for (least, exponents, of_sum) in [(120, 12, 110), (55, 20, 0), (0, 256, 0)] {
                for _ in 0..20_000 {
                    let mut lanes = [[0.0; 16]; 5];
                    lanes.iter_mut().flatten().for_each(|x| *x = random(least, exponents));
                    lanes[0].iter_mut().for_each(|x| *x = random(of_sum, exponents));
                    let [sum, a, b, c, d] = lanes.map(|x| V::load(&x));
                    if least > 0 || exponents == 256 {
                        let (x, y) = (plain::pair(a, b), plain::pair(c, d));
                        // A pair with a NaN may hold any NaN.
                        if !lanes.iter().flatten().any(|x| x.is_nan()) {
                            same(V::pair(a, b), x);
                        }
                        same(sum.dot(x, y), plain::dot(sum, x, y));
                    }
                }
            }
        }
    }

    #[test]
    fn pairs_are_what_plain_rust_makes_of_them() {
        levels().filter(|isa| !isa.pairs().is_empty()).for_each(|isa| isa.run_pairs(Pairs));
    }
}
