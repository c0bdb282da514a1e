//! What a bound is taken from where keys or values are not finite: from those that are.
//!
//! A finite result beside a NaN or an infinity owes nothing to it: the channel of the value is another one, or the key's weight is 0.

/// The finite magnitudes among the keys and values of one stream and kv head.
#[derive(Clone, Debug)]
pub(crate) struct Finite {
    /// Of each channel of the keys.
    k_max: Vec<f64>,
    /// Of the values.
    pub v_max: f64,
    /// Whether there is a key or a value that is not finite.
    pub has_others: bool,
}

impl Finite {
    /// Before the first row of `head_dim` channels.
    pub fn new(head_dim: usize) -> Self {
        Finite { k_max: vec![0.0; head_dim], v_max: 0.0, has_others: false }
    }

    /// Takes in a key.
    pub fn key(&mut self, row: &[f64]) {
        for (max, k) in self.k_max.iter_mut().zip(row) {
            self.has_others |= !k.is_finite();
            *max = max.max(magnitude(*k));
        }
    }

    /// Takes in a value.
    pub fn value(&mut self, row: &[f64]) {
        for v in row {
            self.has_others |= !v.is_finite();
            self.v_max = self.v_max.max(magnitude(*v));
        }
    }

    /// No smaller than S = |scale|·max_t Σ_c |q_c k_tc| over the keys whose logits are finite.
    pub fn s(&self, q: &[f64], scale: f64) -> f64 {
        scale.abs() * q.iter().zip(&self.k_max).map(|(q, k)| magnitude(*q) * k).sum::<f64>()
    }
}

/// |x|, or 0 where x is not finite.
pub(crate) fn magnitude(x: f64) -> f64 {
    if x.is_finite() { x.abs() } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_finite_does_not_count() {
        let mut seen = Finite::new(2);
        seen.key(&[-3.0, 1.0]);
        seen.value(&[2.0, -5.0]);
        assert!(!seen.has_others);
        seen.key(&[2.0, f64::NEG_INFINITY]);
        seen.value(&[f64::NAN, 1.0]);
        assert!(seen.has_others);
        assert_eq!((seen.s(&[1.0, 4.0], -0.5), seen.s(&[f64::NAN, 4.0], 1.0), seen.v_max), (3.5, 4.0, 5.0));
    }
}
