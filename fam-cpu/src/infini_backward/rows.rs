//! A tile of rows, queries or keys, and what it has to do with one state: see [`super`].

use crate::product::{Broadcast, Lanes, Product};
use crate::vector::{Body, Vector, sigma};
use fam_core::mutate;

/// a = σ(x) m / (σ(x)·z) of rows `x`, `[rows][dp]`, with what the backward pass needs of it.
pub(super) struct Read<'a> {
    pub x: &'a [f32],
    pub d: usize,
    pub m: &'a [f32],
    pub z: &'a [f32],
    /// σ of the rows, shifted by a maximum below 0.
    pub s: &'a mut [f32],
    pub a: &'a mut [f32],
    /// s·z of each row.
    pub den: &'a mut [f32],
}

impl Body for Read<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector, const MR: usize, const NR: usize>(self) {
        let Read { x, d, m, z, s, a, den } = self;
        let dp = z.len();
        for ((x, s), den) in x.chunks_exact(dp).zip(s.chunks_exact_mut(dp)).zip(&mut *den) {
            let largest = x[..d].iter().fold(f32::NEG_INFINITY, |largest, x| largest.max(*x));
            sigma_row::<V>(x, d, mutate!("infini-backward-unshifted", largest.min(0.0), 0.0), s);
            *den = dot(s, z);
        }
        let (m, b) = (Lanes { data: m, stride: dp }, Broadcast { data: &*s, i: dp, k: 1 });
        V::run(Product { x: m, b, count: x.len() / dp, lanes: dp, factors: d, out: &mut *a, adds: false });
        for (a, den) in a.chunks_exact_mut(dp).zip(den) {
            a.iter_mut().for_each(|a| *a /= *den);
        }
    }
}

/// σ(x − shift) of the first `d` channels, then 0.
#[inline(always)]
fn sigma_row<V: Vector>(x: &[f32], d: usize, shift: f32, s: &mut [f32]) {
    for (x, s) in x.chunks_exact(V::LANES).zip(s.chunks_exact_mut(V::LANES)) {
        sigma(V::load(x).sub(V::splat(shift))).store(s);
    }
    s[d..].fill(0.0);
}

/// Back through [`Read`]: adds to the gradients of x, m and z.
pub(super) struct ReadBackward<'a> {
    /// Rows that have read, `[rows][dp]`, as [`Read`] left them; a is overwritten.
    pub x: &'a [f32],
    pub s: &'a [f32],
    pub a: &'a mut [f32],
    pub den: &'a [f32],
    pub d: usize,
    /// m transposed.
    pub m_t: &'a [f32],
    pub z: &'a [f32],
    /// Of a; overwritten by d_a / den.
    pub d_a: &'a mut [f32],
    pub d_x: &'a mut [f32],
    pub d_m: &'a mut [f32],
    pub d_z: &'a mut [f32],
}

impl Body for ReadBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector, const MR: usize, const NR: usize>(self) {
        let ReadBackward { x, s, a, den, d, m_t, z, d_a, d_x, d_m, d_z } = self;
        let (dp, count) = (z.len(), x.len() / z.len());
        for (r, d_a) in d_a.chunks_exact_mut(dp).enumerate() {
            let row = r * dp..(r + 1) * dp;
            let (s, a) = (&s[row.clone()], &a[row.clone()]);
            let of_den = mutate!("infini-backward-ratio", dot(d_a, a) / den[r], 0.0);
            d_a.iter_mut().for_each(|d_a| *d_a /= den[r]);
            d_z.iter_mut().zip(s).for_each(|(d_z, s)| *d_z -= s * of_den);
            // −z_i (d_a·a) / den is one term of d_s, taken in front of the sum.
            let slopes = x[row.clone()].iter().zip(s).map(|(x, s)| slope(*x, *s));
            for ((d_x, z), slope) in d_x[row].iter_mut().zip(z).zip(slopes) {
                *d_x -= z * of_den * slope;
            }
        }
        let b = Broadcast { data: &*d_a, i: dp, k: 1 };
        V::run(Product { x: Lanes { data: m_t, stride: dp }, b, count, lanes: dp, factors: d, out: &mut *a, adds: false });
        for (((d_x, d_s), x), s) in d_x.iter_mut().zip(a).zip(x).zip(s) {
            *d_x += *d_s * slope(*x, *s);
        }
        let b = Broadcast { data: s, i: 1, k: dp };
        V::run(Product { x: Lanes { data: d_a, stride: dp }, b, count: d, lanes: dp, factors: count, out: d_m, adds: true });
    }
}

/// dσ/dx, where s is σ(x) or, for a row that was shifted, a multiple of it.
#[inline(always)]
fn slope(x: f32, s: f32) -> f32 {
    mutate!("infini-backward-slope", if x > 0.0 { 1.0 } else { s }, 1.0)
}

/// Back through m' = m + Σ_t s_tᵀ u_t and z' = z + Σ_t s_t.
pub(super) struct WriteBackward<'a> {
    /// Keys of a segment and what they wrote, `[rows][dp]`.
    pub x: &'a [f32],
    pub u: &'a [f32],
    pub d: usize,
    /// Gradients of m', the same transposed, and of z'.
    pub d_m: &'a [f32],
    pub d_m_t: &'a [f32],
    pub d_z: &'a [f32],
    /// A buffer for σ(x).
    pub sigma: &'a mut [f32],
    /// Gradients of x and u; overwritten.
    pub d_x: &'a mut [f32],
    pub d_u: &'a mut [f32],
}

impl Body for WriteBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector, const MR: usize, const NR: usize>(self) {
        let WriteBackward { x, u, d, d_m, d_m_t, d_z, sigma, d_x, d_u } = self;
        let (dp, count) = (d_z.len(), x.len() / d_z.len());
        for (x, s) in x.chunks_exact(dp).zip(sigma.chunks_exact_mut(dp)) {
            sigma_row::<V>(x, d, 0.0, s);
        }
        let b = Broadcast { data: &*sigma, i: dp, k: 1 };
        V::run(Product { x: Lanes { data: d_m, stride: dp }, b, count, lanes: dp, factors: d, out: d_u, adds: false });
        let b = Broadcast { data: u, i: dp, k: 1 };
        V::run(Product { x: Lanes { data: d_m_t, stride: dp }, b, count, lanes: dp, factors: d, out: &mut *d_x, adds: false });
        for ((d_x, x), s) in d_x.chunks_exact_mut(dp).zip(x.chunks_exact(dp)).zip(sigma.chunks_exact(dp)) {
            for (((d_x, d_z), x), s) in d_x.iter_mut().zip(d_z).zip(x).zip(s) {
                *d_x = mutate!("infini-backward-d-z", *d_x + d_z, *d_x) * slope(*x, *s);
            }
        }
    }
}

/// to += x, over the elements of `to`.
#[inline(always)]
pub(super) fn add(to: &mut [f32], x: &[f32]) {
    to.iter_mut().zip(x).for_each(|(to, x)| *to += x);
}

/// a·b over whole vectors of 16, in 16 chains.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0; 16];
    for (a, b) in a.chunks_exact(16).zip(b.chunks_exact(16)) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += a * b;
        }
    }
    sums.iter().sum()
}

/// The transposed copy of a square of `dp` rows.
#[inline(always)]
pub(super) fn transpose(from: &[f32], to: &mut [f32], dp: usize) {
    for (i, from) in from.chunks_exact(dp).enumerate() {
        from.iter().enumerate().for_each(|(j, x)| to[j * dp + i] = *x);
    }
}
