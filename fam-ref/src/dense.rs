//! What a transformer layer has beside its attention: linear maps, RMSNorm, the gated activation, rotary positions, random weights.

use crate::Array;
use crate::attend_backward::{add as accumulate, dot};
use fam_core::Result;

/// Added to the mean square under RMSNorm's root: it keeps the norm of an all-zero row at zero. The papers name none.
pub const RMS_EPSILON: f64 = 1e-6;

/// Base of the rotary wavelengths (TransformerFAM, App. B.2): channel pair i of D/2 turns by position · `ROPE_THETA`^(−2i/D).
pub const ROPE_THETA: f64 = 10_000.0;

/// x w: `[T, I]` by `[I, J]` is `[T, J]`; an error names `w` by `field`.
pub(crate) fn linear(x: &Array<2>, field: &'static str, w: &Array<2>) -> Result<Array<2>> {
    let [tokens, inputs] = x.shape;
    let outputs = w.shape[1];
    w.check(field, [inputs, outputs])?;
    let mut y = Array::zeros([tokens, outputs]);
    for t in 0..tokens {
        let y = y.row_mut(&[t]);
        for (i, x) in x.row(&[t]).iter().enumerate() {
            for (y, w) in y.iter_mut().zip(w.row(&[i])) {
                *y += x * w;
            }
        }
    }
    Ok(y)
}

/// x / rms(x) · gain, row by row of `[T, d_model]`; `gain` is `[d_model]`, and an error names it by `field`.
pub(crate) fn rms_norm(x: &Array<2>, field: &'static str, gain: &Array<1>) -> Result<Array<2>> {
    x.check("rows of the residual stream", [x.shape[0], gain.shape[0]])?;
    gain.check(field, gain.shape)?;
    let mut y = x.clone();
    for t in 0..x.shape[0] {
        let row = y.row_mut(&[t]);
        let mean_square = row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64;
        let rms = (mean_square + RMS_EPSILON).sqrt();
        for (y, gain) in row.iter_mut().zip(&gain.data) {
            *y = *y / rms * gain;
        }
    }
    Ok(y)
}

/// x + y, elementwise.
pub(crate) fn add(mut x: Array<2>, y: &Array<2>) -> Result<Array<2>> {
    y.check("term of a sum", x.shape)?;
    x.data.iter_mut().zip(&y.data).for_each(|(x, y)| *x += y);
    Ok(x)
}

/// silu(gate) · up, elementwise, with silu(x) = x · sigmoid(x).
pub(crate) fn gated(gate: Array<2>, mut up: Array<2>) -> Array<2> {
    up.data.iter_mut().zip(&gate.data).for_each(|(up, x)| *up *= x / (1.0 + (-x).exp()));
    up
}

/// Rotates the vectors of `[T, H, D]` to positions `first_position`, `first_position + 1`, …: channels i and i + D/2 are a pair
/// (half-split) and turn by position · 10000^(−2i/D). Of an odd D the last channel stays.
pub(crate) fn rotate(x: &mut Array<3>, first_position: i64) {
    turn(x, first_position, 1.0);
}

/// [`rotate`] for angles times `direction`.
fn turn(x: &mut Array<3>, first_position: i64, direction: f64) {
    let [tokens, heads, d] = x.shape;
    let half = d / 2;
    for t in 0..tokens {
        let position = first_position.saturating_add(t as i64) as f64;
        for i in 0..half {
            let (sin, cos) = (direction * position * ROPE_THETA.powf(-2.0 * i as f64 / d as f64)).sin_cos();
            for h in 0..heads {
                let row = x.row_mut(&[t, h]);
                let (a, b) = (row[i], row[i + half]);
                (row[i], row[i + half]) = (a * cos - b * sin, a * sin + b * cos);
            }
        }
    }
}

/// Gradients of [`linear`]: of x, d_y wᵀ, and of w, xᵀ d_y.
pub(crate) fn linear_backward(x: &Array<2>, w: &Array<2>, d_y: &Array<2>) -> (Array<2>, Array<2>) {
    let (mut d_x, mut d_w) = (Array::zeros(x.shape), Array::zeros(w.shape));
    for t in 0..x.shape[0] {
        for i in 0..x.shape[1] {
            d_x[[t, i]] = dot(d_y.row(&[t]), w.row(&[i]));
            accumulate(d_w.row_mut(&[i]), x[[t, i]], d_y.row(&[t]));
        }
    }
    (d_x, d_w)
}

/// Gradients of [`rms_norm`]: y = gain·x / r with r² = mean(x²) + ε, so d_x = gain·d_y / r − x·mean(gain·d_y·x) / r³; and of the gain.
pub(crate) fn rms_norm_backward(x: &Array<2>, gain: &Array<1>, d_y: &Array<2>) -> (Array<2>, Array<1>) {
    let (mut d_x, mut d_gain) = (Array::zeros(x.shape), Array::zeros(gain.shape));
    for t in 0..x.shape[0] {
        let (row, d_y) = (x.row(&[t]), d_y.row(&[t]));
        let mean = |sum: f64| sum / row.len() as f64;
        let rms = (mean(dot(row, row)) + RMS_EPSILON).sqrt();
        let d_normed: Vec<f64> = d_y.iter().zip(&gain.data).map(|(d_y, gain)| d_y * gain).collect();
        let along = mean(dot(&d_normed, row)) / rms.powi(3);
        for (c, d_x) in d_x.row_mut(&[t]).iter_mut().enumerate() {
            *d_x = d_normed[c] / rms - row[c] * along;
            d_gain.data[c] += d_y[c] * row[c] / rms;
        }
    }
    (d_x, d_gain)
}

/// Gradients of [`gated`]: silu'(x) = s·(1 + x·(1 − s)) with s = sigmoid(x).
pub(crate) fn gated_backward(gate: &Array<2>, up: &Array<2>, d_y: &Array<2>) -> (Array<2>, Array<2>) {
    let (mut d_gate, mut d_up) = (d_y.clone(), d_y.clone());
    for (i, &x) in gate.data.iter().enumerate() {
        let s = 1.0 / (1.0 + (-x).exp());
        d_gate.data[i] *= up.data[i] * s * (1.0 + x * (1.0 - s));
        d_up.data[i] *= x * s;
    }
    (d_gate, d_up)
}

/// The gradient of [`rotate`]: back again.
pub(crate) fn rotate_backward(d_x: &mut Array<3>, first_position: i64) {
    turn(d_x, first_position, -1.0);
}

/// Random numbers from a seed, the same on every machine: SplitMix64, made uniform by integer arithmetic alone.
#[derive(Clone, Debug)]
pub struct Random {
    state: u64,
}

impl Random {
    /// The sequence of `seed`.
    pub fn new(seed: u64) -> Self {
        Random { state: seed }
    }

    /// Uniform numbers with mean 0 and standard deviation `std`.
    pub fn array<const R: usize>(&mut self, shape: [usize; R], std: f64) -> Array<R> {
        let mut array = Array::zeros(shape);
        // A uniform number of [−1, 1) has standard deviation 1/√3.
        array.data.iter_mut().for_each(|x| *x = self.uniform() * 3f64.sqrt() * std);
        array
    }

    /// Uniform in [−1, 1).
    fn uniform(&mut self) -> f64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.state;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^= x >> 31;
        (x >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }
}
