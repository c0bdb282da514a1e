//! The backward pass of `merge` (contract section 8): with the weights p_a = exp(lse_a − lse) and p_b of the forward pass,
//!
//! ```text
//!   d_o_a   = p_a d_o                                    o   = p_a o_a + p_b o_b
//!   d_lse_a = p_a (p_b d_o.(o_a - o_b) + d_lse)          lse = ln(exp(lse_a) + exp(lse_b)), of which p_a and p_b are the shares
//! ```

use crate::array::check_len;
use crate::merge;
use fam_core::Result;

/// Gradients with respect to one part of a [`merge()`].
#[derive(Clone, Debug, PartialEq)]
pub struct PartGradients {
    /// Of the part's `o`, `[D]`.
    pub d_o: Vec<f64>,
    /// Of the part's `lse`.
    pub d_lse: f64,
}

/// Gradients with respect to both parts of [`merge()`]`(o_a, lse_a, o_b, lse_b)`, given those with respect to its `o` and `lse`. An empty
/// part receives none.
///
/// # Errors
/// Where lengths differ.
pub fn merge_backward(o_a: &[f64], lse_a: f64, o_b: &[f64], lse_b: f64, d_o: &[f64], d_lse: f64) -> Result<[PartGradients; 2]> {
    let (_, lse) = merge(o_a, lse_a, o_b, lse_b)?;
    check_len("d_o", d_o.len(), o_a.len())?;
    let weight = |part: f64| if part == f64::NEG_INFINITY { 0.0 } else { (part - lse).exp() };
    let (p_a, p_b) = (weight(lse_a), weight(lse_b));
    // Beside an empty part, whose o is not looked at, nothing is shared.
    let apart = if p_a * p_b == 0.0 { 0.0 } else { o_a.iter().zip(o_b).zip(d_o).map(|((a, b), d_o)| d_o * (a - b)).sum::<f64>() };
    let part = |p: f64, apart: f64| match p {
        0.0 => PartGradients { d_o: vec![0.0; d_o.len()], d_lse: 0.0 },
        _ => PartGradients { d_o: d_o.iter().map(|d_o| p * d_o).collect(), d_lse: p * (apart + d_lse) },
    };
    Ok([part(p_a, p_b * apart), part(p_b, -p_a * apart)])
}
