//! `infini_read`: the compressive memory of Infini-attention read (arXiv 2404.07143, Eq. 5 and 10): one row of one head, f64.
//!
//! ```text
//!   sigma(x) = x + 1 for x > 0, else exp(x)               elementwise: ELU(x) + 1
//!   a        = sigma(q) m / (sigma(q).z)                  0 where z is all 0
//!   o        = g a + (1 - g) o_local,   g = sigmoid(beta), 1 - g = sigmoid(-beta)
//! ```
//!
//! m is `[D, D]` (row: key channel, column: value channel), z is `[D]`, both 0 at the start. Rows of a segment read what earlier
//! segments wrote: first read, then write.

use crate::array::check_len;
use fam_core::Result;

/// σ(x) = ELU(x) + 1 > 0. Not `exp_m1(x) + 1`, which loses all digits of a small σ.
pub fn sigma(x: f64) -> f64 {
    if x > 0.0 { x + 1.0 } else { x.exp() }
}

/// g = sigmoid(β), the share of the memory branch in the output (Eq. 10). The other share, 1 − g, is `gate(-beta)`: the difference would
/// cancel where g is close to 1.
pub fn gate(beta: f64) -> f64 {
    1.0 / (1.0 + (-beta).exp())
}

/// What [`infini_retrieve`] read.
#[derive(Clone, Debug, PartialEq)]
pub struct Retrieved {
    /// a, `[D]`.
    pub a: Vec<f64>,
    /// Σ_c s_c |m_cj| / Σ_c s_c z_c, `[D]`: what the error bound of a kernel is derived from.
    pub magnitude: Vec<f64>,
}

/// a = σ(q) m / (σ(q)·z) for one row (Eq. 5); exactly 0 where z is all 0. `q` and `z` have D elements and `m` has D·D.
///
/// a does not change when σ(q) is multiplied by a constant. Where all of q is ≤ 0, so that σ = exp, q is shifted by its maximum:
/// one element of σ(q) is then 1, and the denominator cannot underflow.
///
/// # Errors
/// Where `m` or `z` has another size.
pub fn infini_retrieve(q: &[f64], m: &[f64], z: &[f64]) -> Result<Retrieved> {
    let d = q.len();
    check_len("m", m.len(), d * d)?;
    check_len("z", z.len(), d)?;
    let mut a = vec![0.0; d];
    let mut magnitude = vec![0.0; d];
    if z.iter().all(|&z| z == 0.0) {
        return Ok(Retrieved { a, magnitude });
    }

    // 1. s = σ(q), up to a constant factor.
    let s = feature(q);

    // 2. The denominator s·z, then s m.
    let den: f64 = s.iter().zip(z).map(|(s, z)| s * z).sum();
    for (s, m) in s.iter().zip(m.chunks_exact(d)) {
        for j in 0..d {
            a[j] += s * m[j];
            magnitude[j] += s * m[j].abs();
        }
    }
    a.iter_mut().chain(&mut magnitude).for_each(|x| *x /= den);
    Ok(Retrieved { a, magnitude })
}

/// σ(q), up to a constant factor: where all of q is ≤ 0 the largest element is 1.
pub(crate) fn feature(q: &[f64]) -> Vec<f64> {
    let shift = if q.iter().all(|&x| x <= 0.0) { q.iter().copied().fold(f64::NEG_INFINITY, f64::max) } else { 0.0 };
    q.iter().map(|x| sigma(x - shift)).collect()
}
