//! The two matrix products: logits from packed keys, and weighted sums of packed values.
//!
//! A row's arithmetic is the same however many rows (`MR`) or vectors (`NR`) a call holds in registers: a logit is a chain over channels
//! in its own lane, a sum is a chain over keys in its own lane. So tiles may be cut anywhere without changing a bit.

use crate::tile::BLOCK_N;
use crate::vector::Vector;
use std::ops::Range;

/// Channels that are summed in one chain. A longer dot product adds up chains, so that its error grows with its square root even where
/// all terms are equal and each rounding errs to the same side.
const CHAIN: usize = 32;

/// `s[i][key] = scale · Σ_c q[i][c]·k[key][c]` for `MR` rows and the keys of `panels`. Rows of `q` are `q_stride` apart, of `s`
/// `BLOCK_N`; `k` holds all panels of a tile, each `[d][LANES]`.
#[inline(always)]
pub(crate) fn logits<V: Vector, const MR: usize, const NR: usize>(
    q: &[f32],
    q_stride: usize,
    d: usize,
    k: &[f32],
    panels: Range<usize>,
    scale: f32,
    s: &mut [f32],
) {
    let mut p = panels.start;
    while p + NR <= panels.end {
        logits_of::<V, MR, NR>(q, q_stride, d, &k[p * d * V::LANES..], scale, &mut s[p * V::LANES..]);
        p += NR;
    }
    while p < panels.end {
        logits_of::<V, MR, 1>(q, q_stride, d, &k[p * d * V::LANES..], scale, &mut s[p * V::LANES..]);
        p += 1;
    }
}

#[inline(always)]
fn logits_of<V: Vector, const MR: usize, const NR: usize>(
    q: &[f32],
    q_stride: usize,
    d: usize,
    k: &[f32],
    scale: f32,
    s: &mut [f32],
) {
    let zero = [[V::splat(0.0); NR]; MR];
    let mut sum = zero;
    for first in (0..d).step_by(CHAIN) {
        let mut chain = zero;
        for c in first..(first + CHAIN).min(d) {
            for j in 0..NR {
                let k = V::load(&k[(j * d + c) * V::LANES..]);
                for i in 0..MR {
                    chain[i][j] = k.mul_add(V::splat(q[i * q_stride + c]), chain[i][j]);
                }
            }
        }
        for i in 0..MR {
            for j in 0..NR {
                sum[i][j] = sum[i][j].add(chain[i][j]);
            }
        }
    }
    for i in 0..MR {
        for j in 0..NR {
            sum[i][j].mul(V::splat(scale)).store(&mut s[i * BLOCK_N + j * V::LANES..]);
        }
    }
}

/// `acc[i][c] += Σ_t p[i][t]·v[t][c]` over keys `t` for `MR` rows and all `dp` channels. Rows of `p` are `p_stride` apart, of `v` and
/// `acc` `dp`.
#[inline(always)]
pub(crate) fn accumulate<V: Vector, const MR: usize, const NR: usize>(
    p: &[f32],
    p_stride: usize,
    v: &[f32],
    keys: Range<usize>,
    dp: usize,
    acc: &mut [f32],
) {
    if keys.is_empty() {
        return;
    }
    let mut c = 0;
    while c + NR * V::LANES <= dp {
        accumulate_of::<V, MR, NR>(p, p_stride, &v[c..], keys.clone(), dp, &mut acc[c..]);
        c += NR * V::LANES;
    }
    while c < dp {
        accumulate_of::<V, MR, 1>(p, p_stride, &v[c..], keys.clone(), dp, &mut acc[c..]);
        c += V::LANES;
    }
}

#[inline(always)]
fn accumulate_of<V: Vector, const MR: usize, const NR: usize>(
    p: &[f32],
    p_stride: usize,
    v: &[f32],
    keys: Range<usize>,
    dp: usize,
    acc: &mut [f32],
) {
    let mut sum: [[V; NR]; MR] = std::array::from_fn(|i| std::array::from_fn(|j| V::load(&acc[i * dp + j * V::LANES..])));
    for t in keys {
        for j in 0..NR {
            let v = V::load(&v[t * dp + j * V::LANES..]);
            for i in 0..MR {
                sum[i][j] = v.mul_add(V::splat(p[i * p_stride + t]), sum[i][j]);
            }
        }
    }
    for i in 0..MR {
        for j in 0..NR {
            sum[i][j].store(&mut acc[i * dp + j * V::LANES..]);
        }
    }
}
