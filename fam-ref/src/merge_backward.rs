//! The backward pass of `merge` (contract section 8): with the weights p_a = exp(lse_a − lse) and p_b of the forward pass,
//!
//! ```text
//!   d_o_a   = p_a d_o                                    o   = p_a o_a + p_b o_b
//!   d_lse_a = p_a (d_o.(o_a - o) + d_lse)                lse = ln(exp(lse_a) + exp(lse_b)), of which p_a and p_b are the shares
//! ```

use crate::array::check_len;
use crate::attend_backward::dot;
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
    let (o, lse) = merge(o_a, lse_a, o_b, lse_b)?;
    check_len("d_o", d_o.len(), o.len())?;
    Ok([(o_a, lse_a), (o_b, lse_b)].map(|(o_part, lse_part)| {
        if lse_part == f64::NEG_INFINITY {
            return PartGradients { d_o: vec![0.0; o.len()], d_lse: 0.0 };
        }
        let p = (lse_part - lse).exp();
        PartGradients { d_o: d_o.iter().map(|d_o| p * d_o).collect(), d_lse: p * (dot(d_o, o_part) - dot(d_o, &o) + d_lse) }
    }))
}
