//! The backward passes of the compressive memory (contract section 8), one row or one segment of one head.
//!
//! ```text
//!   read:    a = s m / (s.z), s = sigma(q)               d_m_ij  = s_i d_a_j / (s.z)        d_z_i = -s_i (d_a.a) / (s.z)
//!                                                        d_s_i   = (sum_j m_ij d_a_j - z_i (d_a.a)) / (s.z)
//!   gate:    o = g a + (1 - g) o_local                   d_a     = g d_o                    d_o_local = (1 - g) d_o
//!            g = sigmoid(beta)                           d_beta  = g (1 - g) d_o.(a - o_local)
//!   write:   m' = m + sum_t s_t^T u_t, u = v - a         d_u_t   = s_t d_m'                 d_v = d_u, d_a = -d_u: read, again
//!            z' = z + sum_t s_t                          d_s_ti  = sum_j d_m'_ij u_tj + d_z'_i
//!   sigma:   s = x + 1 for x > 0, else exp(x)            d_x     = d_s                      for x > 0, else s d_s
//! ```
//!
//! The linear rule has a = 0. Where z is all 0, a is the constant 0 and passes nothing on.

use crate::array::check_len;
use crate::attend_backward::{add, dot};
use crate::infini_read::feature;
use crate::{gate, infini_retrieve, sigma};
use fam_core::{InfiniRule, Result};

/// Gradients with respect to the inputs of [`infini_retrieve`].
#[derive(Clone, Debug, PartialEq)]
pub struct RetrieveGradients {
    /// Of q (or k, where delta reads), `[D]`.
    pub d_q: Vec<f64>,
    /// Of m, `[D, D]`.
    pub d_m: Vec<f64>,
    /// Of z, `[D]`.
    pub d_z: Vec<f64>,
}

/// Gradients of [`infini_retrieve`]`(q, m, z)`, given those with respect to its a.
///
/// a does not depend on a constant factor of σ(q), and so neither on the shift of a row whose q are all ≤ 0: it is taken for a constant.
///
/// # Errors
/// Where sizes do not fit each other.
pub fn infini_retrieve_backward(q: &[f64], m: &[f64], z: &[f64], d_a: &[f64]) -> Result<RetrieveGradients> {
    let a = infini_retrieve(q, m, z)?.a;
    let d = q.len();
    check_len("d_a", d_a.len(), d)?;
    let mut gradients = RetrieveGradients { d_q: vec![0.0; d], d_m: vec![0.0; d * d], d_z: vec![0.0; d] };
    if z.iter().all(|&z| z == 0.0) {
        return Ok(gradients);
    }
    let s = feature(q);
    let (den, d_a_a) = (dot(&s, z), dot(d_a, &a));
    for i in 0..d {
        let d_s = (dot(&m[i * d..][..d], d_a) - z[i] * d_a_a) / den;
        gradients.d_q[i] = d_s * slope(q[i], s[i]);
        gradients.d_z[i] = -s[i] * d_a_a / den;
        add(&mut gradients.d_m[i * d..][..d], s[i] / den, d_a);
    }
    Ok(gradients)
}

/// dσ/dx at x, where s is σ(x) or a constant multiple of it.
fn slope(x: f64, s: f64) -> f64 {
    if x > 0.0 { 1.0 } else { s }
}

/// Gradients with respect to the inputs of the gate.
#[derive(Clone, Debug, PartialEq)]
pub struct GateGradients {
    /// Of a, `[D]`.
    pub d_a: Vec<f64>,
    /// Of o_local, `[D]`.
    pub d_o_local: Vec<f64>,
    /// Of β.
    pub d_beta: f64,
}

/// Gradients of `o = g·a + (1 − g)·o_local`, g = sigmoid(β), for one row, given those with respect to o.
///
/// # Errors
/// Where lengths differ.
pub fn gate_backward(beta: f64, a: &[f64], o_local: &[f64], d_o: &[f64]) -> Result<GateGradients> {
    check_len("o_local", o_local.len(), a.len())?;
    check_len("d_o", d_o.len(), a.len())?;
    // 1 − g is g of −β: no digit is lost where g is close to 1.
    let (g, rest) = (gate(beta), gate(-beta));
    let part = |share: f64| d_o.iter().map(|d_o| share * d_o).collect();
    Ok(GateGradients { d_a: part(g), d_o_local: part(rest), d_beta: g * rest * (dot(d_o, a) - dot(d_o, o_local)) })
}

/// Gradients with respect to the inputs of [`crate::infini_write`].
#[derive(Clone, Debug, PartialEq)]
pub struct WriteGradients {
    /// Of each key, `[D]`.
    pub d_k: Vec<Vec<f64>>,
    /// Of each value, `[D]`.
    pub d_v: Vec<Vec<f64>>,
    /// Of m, `[D, D]`.
    pub d_m: Vec<f64>,
    /// Of z, `[D]`.
    pub d_z: Vec<f64>,
}

/// Gradients of [`crate::infini_write`]`(rule, k, v, m, z)`, given those with respect to m' `[D, D]` and z' `[D]`.
///
/// # Errors
/// Where sizes do not fit each other.
pub fn infini_write_backward(
    rule: InfiniRule,
    (k, v): (&[&[f64]], &[&[f64]]),
    (m, z): (&[f64], &[f64]),
    (d_m_new, d_z_new): (&[f64], &[f64]),
) -> Result<WriteGradients> {
    crate::infini_write::check(k, v, m, z)?;
    check_len("d_m", d_m_new.len(), m.len())?;
    check_len("d_z", d_z_new.len(), z.len())?;
    let d = z.len();
    let mut gradients = WriteGradients { d_k: Vec::new(), d_v: Vec::new(), d_m: d_m_new.to_vec(), d_z: d_z_new.to_vec() };
    for (k, v) in k.iter().zip(v) {
        // 1. u = v − a, and its gradient: v's, and for delta minus a's.
        let mut u = v.to_vec();
        if rule == InfiniRule::Delta {
            add(&mut u, -1.0, &infini_retrieve(k, m, z)?.a);
        }
        let mut d_u = vec![0.0; d];
        let mut d_k = vec![0.0; d];
        for (i, &k) in k.iter().enumerate() {
            let (s, row) = (sigma(k), &d_m_new[i * d..][..d]);
            add(&mut d_u, s, row);
            // 2. σ(k), which m' and z' both hold.
            d_k[i] = (dot(row, &u) + d_z_new[i]) * slope(k, s);
        }
        // 3. What delta has read from the old m and z.
        if rule == InfiniRule::Delta {
            let d_a: Vec<f64> = d_u.iter().map(|x| -x).collect();
            let read = infini_retrieve_backward(k, m, z, &d_a)?;
            add(&mut d_k, 1.0, &read.d_q);
            add(&mut gradients.d_m, 1.0, &read.d_m);
            add(&mut gradients.d_z, 1.0, &read.d_z);
        }
        gradients.d_k.push(d_k);
        gradients.d_v.push(d_u);
    }
    Ok(gradients)
}
