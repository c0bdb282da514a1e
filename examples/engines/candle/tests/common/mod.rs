//! Random tensors, as they lie in an engine.

use candle_core::{DType, Device, Result, Tensor};
use fam_ref::Array;
use fam_ref::layer::Random;

/// A tensor (N, heads, rows, D) that is a part of a larger projection: transposed, with rows and heads of others around it.
pub fn strided(seed: u64, [n, heads, rows, d]: [usize; 4], dtype: DType) -> Result<Tensor> {
    let whole: Array<4> = Random::new(seed).array([n, rows + 3, heads + 2, d], 1.0);
    let whole = Tensor::from_vec(whole.data, &whole.shape, &Device::Cpu)?.to_dtype(dtype)?;
    whole.transpose(1, 2)?.narrow(1, 1, heads)?.narrow(2, 2, rows)
}
