//! `infini_write`: one segment written to the compressive memory of Infini-attention (arXiv 2404.07143, Eq. 8 and 9): one head, f64.
//!
//! ```text
//!   linear    m' = m + sigma(k)^T v                                       z' = z + sum_t sigma(k_t)
//!   delta     m' = m + sigma(k)^T (v - sigma(k) m / (sigma(k).z))         z' likewise
//! ```

use crate::array::{self, check_len};
use crate::{Retrieved, infini_retrieve, sigma};
use fam_core::{InfiniRule, Result};

/// The memory after [`infini_write`], and what the error bound of a kernel is derived from.
#[derive(Clone, Debug, PartialEq)]
pub struct Written {
    /// m', `[D, D]`.
    pub m: Vec<f64>,
    /// z', `[D]`.
    pub z: Vec<f64>,
    /// Σ_t s_ti, `[D]`.
    pub s_sum: Vec<f64>,
    /// Σ_t s_ti |v_tj|, `[D, D]`.
    pub s_v: Vec<f64>,
    /// Delta: Σ_t s_ti (magnitude_tj + |a_tj|), `[D, D]`; else 0.
    pub s_read: Vec<f64>,
    /// Delta: Σ_t s_ti |v_tj − a_tj|, `[D, D]`; else 0.
    pub s_diff: Vec<f64>,
    /// Σ_t |v_tj − a_tj|, `[D]`; a is 0 with the linear rule.
    pub diff: Vec<f64>,
}

/// Writes one whole segment (Eq. 8 and 9): `k` and `v` are its rows of D elements, keys without rotary positions. The delta rule
/// reads the old `m`, `z` for all keys at once.
///
/// # Errors
/// Where sizes do not fit each other.
pub fn infini_write(rule: InfiniRule, k: &[&[f64]], v: &[&[f64]], m: &[f64], z: &[f64]) -> Result<Written> {
    check(k, v, m, z)?;
    let d = z.len();
    let delta = rule == InfiniRule::Delta;
    let zero = || vec![0.0; d * d];
    let mut new = Written {
        m: m.to_vec(),
        z: z.to_vec(),
        s_sum: vec![0.0; d],
        s_v: zero(),
        s_read: zero(),
        s_diff: zero(),
        diff: vec![0.0; d],
    };

    for (k, v) in k.iter().zip(v) {
        // 1. What the old memory already holds for this key.
        let stored = if delta { infini_retrieve(k, m, z)? } else { Retrieved { a: vec![0.0; d], magnitude: vec![0.0; d] } };

        for j in 0..d {
            new.diff[j] += (v[j] - stored.a[j]).abs();
        }

        // 2. The outer product of σ(k) with what is missing.
        for (i, &k) in k.iter().enumerate() {
            let s = sigma(k);
            new.z[i] += s;
            new.s_sum[i] += s;
            for j in 0..d {
                let (a, at) = (stored.a[j], i * d + j);
                new.m[at] += s * (v[j] - a);
                new.s_v[at] += s * v[j].abs();
                if delta {
                    new.s_read[at] += s * (stored.magnitude[j] + a.abs());
                    new.s_diff[at] += s * (v[j] - a).abs();
                }
            }
        }
    }
    Ok(new)
}

/// Checks sizes against each other.
pub(crate) fn check(k: &[&[f64]], v: &[&[f64]], m: &[f64], z: &[f64]) -> Result<()> {
    let d = z.len();
    check_len("m", m.len(), d * d)?;
    array::check("v", format_args!("{} rows", v.len()), v.len() == k.len(), format_args!("{} rows, as many as k", k.len()))?;
    k.iter().try_for_each(|k| check_len("k", k.len(), d))?;
    v.iter().try_for_each(|v| check_len("v", v.len(), d))
}
