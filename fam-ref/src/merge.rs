//! `merge`: attention over two disjoint sets of keys from the attention over each.
//!
//! ```text
//!   lse = ln(exp(lse_a) + exp(lse_b))        o = exp(lse_a - lse) o_a + exp(lse_b - lse) o_b
//! ```

use crate::array::check_len;
use crate::attend::max;
use fam_core::Result;

/// Merges two parts of one row; returns `o` and `lse`. An `lse` of −inf means "empty": its `o` is not looked at, and two empty
/// parts give an empty row, `o = +0`. Where there is a sink, exactly one part has it.
///
/// # Errors
/// Where the parts differ in length.
pub fn merge(o_a: &[f64], lse_a: f64, o_b: &[f64], lse_b: f64) -> Result<(Vec<f64>, f64)> {
    check_len("o_b", o_b.len(), o_a.len())?;
    match (lse_a == f64::NEG_INFINITY, lse_b == f64::NEG_INFINITY) {
        (true, true) => return Ok((vec![0.0; o_a.len()], f64::NEG_INFINITY)),
        (true, false) => return Ok((o_b.to_vec(), lse_b)),
        (false, true) => return Ok((o_a.to_vec(), lse_a)),
        (false, false) => {}
    }
    let lse_max = max(lse_a, lse_b);
    let (w_a, w_b) = ((lse_a - lse_max).exp(), (lse_b - lse_max).exp());
    let o = o_a.iter().zip(o_b).map(|(a, b)| (w_a * a + w_b * b) / (w_a + w_b)).collect();
    Ok((o, lse_max + (w_a + w_b).ln()))
}
