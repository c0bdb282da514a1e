//! Products of bf16 pairs in plain Rust: what the instructions of AVX512-BF16 do, to the bit, and what a level without them would do.

use super::{MAX_LANES, Vector};
use fam_core::bf16;

/// [`Vector::pair`].
#[inline(always)]
pub(crate) fn pair<V: Vector>(first: V, second: V) -> V {
    each([first, second], |[first, second]| {
        let [first, second] = [first, second].map(|x| u32::from(term(x).to_bits()));
        f32::from_bits(first | second << 16)
    })
}

/// [`Vector::store_terms`].
#[inline(always)]
pub(crate) fn store_terms<V: Vector>(x: V, to: &mut [bf16]) {
    let mut lanes = [0.0; MAX_LANES];
    x.store(&mut lanes);
    to.iter_mut().zip(lanes).for_each(|(to, x)| *to = term(x));
}

fn term(x: f32) -> bf16 {
    bf16::from_f32(flush(x))
}

/// [`Vector::interleave`].
#[inline(always)]
pub(crate) fn interleave<V: Vector>(first: &[bf16], second: &[bf16]) -> V {
    let mut out = [0.0; MAX_LANES];
    for (out, (first, second)) in out.iter_mut().zip(first.iter().zip(second)) {
        *out = f32::from_bits(u32::from(first.to_bits()) | u32::from(second.to_bits()) << 16);
    }
    V::load(&out)
}

/// [`Vector::dot`].
#[inline(always)]
pub(crate) fn dot<V: Vector>(sum: V, x: V, b: V) -> V {
    each([sum, x, b], |[sum, x, b]| {
        let [x, b] = [x, b].map(|pair| [pair.to_bits() << 16, pair.to_bits() & 0xffff_0000].map(|x| flush(f32::from_bits(x))));
        let sum = flush(x[1].mul_add(b[1], flush(sum)));
        flush(x[0].mul_add(b[0], sum))
    })
}

/// A number that is not subnormal, or 0 of its sign.
fn flush(x: f32) -> f32 {
    if x.is_subnormal() { 0f32.copysign(x) } else { x }
}

/// A function of each lane.
#[inline(always)]
fn each<V: Vector, const N: usize>(of: [V; N], f: impl Fn([f32; N]) -> f32) -> V {
    let mut lanes = [[0.0; MAX_LANES]; N];
    for (lanes, of) in lanes.iter_mut().zip(of) {
        of.store(lanes);
    }
    let mut out = [0.0; MAX_LANES];
    for (i, out) in out.iter_mut().enumerate() {
        *out = f(std::array::from_fn(|n| lanes[n][i]));
    }
    V::load(&out)
}
