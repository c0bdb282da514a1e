//! The way back through `attend`: the reference's, in f64.

use crate::attention::Op;
use crate::pack::Packing;
use crate::wrap;
use candle_core::{DType, Device, Result, Tensor};
use fam_ref::{Array, AttendUpstream};

impl Op {
    /// Gradients of q, k and v, packed and typed as they are, from the gradient of the flat output of [`Op::forward`].
    pub fn backward(&self, [q, k, v]: [&Tensor; 3], d_out: &Tensor) -> Result<[Tensor; 3]> {
        let Packing { batch, tokens, blocks, mem_q, keys, mem_k } = self.packing;
        let shape = *self.attention.shape();
        let (heads, d) = (shape.heads(), shape.head_dim());

        // 1. The arguments as the reference takes them.
        let (q_rows, mem_q_rows) = (token_rows(q, tokens)?, memory_rows(q, tokens, blocks, mem_q)?);
        let (k_rows, mem_k_rows) = (token_rows(k, keys)?, memory_rows(k, keys, blocks, mem_k)?);
        let (v_rows, mem_v_rows) = (token_rows(v, keys)?, memory_rows(v, keys, blocks, mem_k)?);
        let args = fam_ref::Attend {
            shape: &shape,
            spans: &self.spans,
            q: (tokens > 0).then_some(&q_rows),
            mem_q: (mem_q > 0).then_some(&mem_q_rows),
            k: &k_rows,
            v: &v_rows,
            mem_k: (mem_k > 0).then_some(&mem_k_rows),
            mem_v: (mem_k > 0).then_some(&mem_v_rows),
            sink: None,
        };
        let mut d_o = d_out.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
        let d_mem_o = Array { shape: [batch, blocks, mem_q, heads, d], data: d_o.split_off(batch * tokens * heads * d) };
        let d_o = Array { shape: [batch, 1, tokens, heads, d], data: d_o };

        // 2. The reference.
        let upstream = AttendUpstream {
            d_o: (tokens > 0).then_some(&d_o),
            d_mem_o: (mem_q > 0).then_some(&d_mem_o),
            ..AttendUpstream::default()
        };
        let saved = fam_ref::attend(&args).map_err(wrap)?;
        let grads = fam_ref::attend_backward(&args, &saved, &upstream).map_err(wrap)?;

        // 3. Rows of tokens and of memory side by side again.
        let packed = |of: &Tensor, rows: Option<Array<4>>, memory: Option<Array<5>>| {
            let mut groups = Vec::new();
            if let Some(rows) = rows {
                groups.push(Tensor::from_vec(rows.data, &rows.shape, &Device::Cpu)?.transpose(1, 2)?);
            }
            if let Some(memory) = memory {
                let [n, blocks, rows, h, d] = memory.shape;
                let memory = Tensor::from_vec(memory.data, &memory.shape, &Device::Cpu)?;
                groups.push(memory.permute((0, 3, 1, 2, 4))?.reshape((n, h, blocks * rows, d))?);
            }
            Tensor::cat(&groups, 2)?.to_dtype(of.dtype())
        };
        Ok([
            packed(q, grads.d_q, grads.d_mem_q)?,
            packed(k, Some(grads.d_k), grads.d_mem_k)?,
            packed(v, Some(grads.d_v), grads.d_mem_v)?,
        ])
    }
}

/// The first rows of a tensor (N, H, rows, D) as `[N, rows, H, D]`.
fn token_rows(x: &Tensor, rows: usize) -> Result<Array<4>> {
    let x = x.narrow(2, 0, rows)?.transpose(1, 2)?;
    let (n, rows, h, d) = x.dims4()?;
    Ok(Array { shape: [n, rows, h, d], data: elements(&x)? })
}

/// The rows of a tensor (N, H, rows, D) behind the first `first`, as `[N, blocks, rows, H, D]`.
fn memory_rows(x: &Tensor, first: usize, blocks: usize, rows: usize) -> Result<Array<5>> {
    let (n, h, _, d) = x.dims4()?;
    let x = x.narrow(2, first, blocks * rows)?.reshape((n, h, blocks, rows, d))?.permute((0, 2, 3, 1, 4))?;
    Ok(Array { shape: [n, blocks, rows, h, d], data: elements(&x)? })
}

fn elements(x: &Tensor) -> Result<Vec<f64>> {
    x.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
}
