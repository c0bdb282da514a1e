//! Attention with a memory as one would write it in candle: repeated kv heads, a mask tensor, softmax over all keys.

use crate::attention::{Attended, Attends};
use crate::pack::Packing;
use candle_core::{D, Result, Tensor};
use fam::{Shape, Span};

/// Candle's own operations, differentiable, on any device and in any of its float types. A row that sees no key is NaN.
#[derive(Clone, Copy, Debug)]
pub struct Naive {
    /// Sizes of the layer.
    pub shape: Shape,
}

impl Attends for Naive {
    fn attend(&self, spans: &[Span], tokens: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Attended> {
        let packing = Packing::new(&self.shape, spans, tokens, [q, k, v])?;
        let o = self.masked(q, k, v, &self.mask(spans, &packing, q)?)?;
        Ok(Attended { o: o.narrow(2, 0, tokens)?, mem_o: o.narrow(2, tokens, packing.mem_rows())? })
    }
}

impl Naive {
    /// Attention of all rows of q (N, Hq, rows, D) under a [`Naive::mask`]. Returns o like q.
    ///
    /// # Errors
    /// Those of candle.
    pub fn masked(&self, q: &Tensor, k: &Tensor, v: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let (k, v) = (self.repeat(k)?, self.repeat(v)?);
        let logits = (q.contiguous()?.matmul(&k.t()?)? * f64::from(self.shape.scale()))?.broadcast_add(mask)?;
        // The maximum shifts every logit of a row alike: no gradient flows through it.
        let row_max = logits.max_keepdim(D::Minus1)?.detach();
        let weights = logits.broadcast_sub(&row_max)?.exp()?;
        weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?.matmul(&v)
    }

    /// (N, 1, rows of q, rows of k), typed and placed like a tensor: 0 where a row sees a key, −inf elsewhere.
    ///
    /// # Errors
    /// Those of candle.
    pub fn mask(&self, spans: &[Span], packing: &Packing, like: &Tensor) -> Result<Tensor> {
        let (rows, columns) = (packing.tokens + packing.mem_rows(), packing.keys + packing.blocks * packing.mem_k);
        let mut mask = vec![f32::NEG_INFINITY; packing.batch * rows * columns];
        for (n, span) in spans.iter().enumerate() {
            let block_len = self.shape.block_len() as u64;
            let mut show = |row: usize, block: usize, keys: std::ops::Range<u64>| {
                let row = &mut mask[(n * rows + row) * columns..][..columns];
                row[(keys.start - span.origin) as usize..(keys.end - span.origin) as usize].fill(0.0);
                row[packing.keys + block * packing.mem_k..][..span.mem_rows as usize].fill(0.0);
            };
            for t in 0..packing.tokens.min(span.len as usize) {
                let position = span.start + t as u64;
                let block = (position / block_len - span.start / block_len) as usize;
                show(t, block, span.window_first(position, &self.shape)..position + 1);
            }
            for block in 0..span.blocks(self.shape.block_len()) {
                for f in 0..packing.mem_q {
                    show(packing.tokens + block * packing.mem_q + f, block, span.block_keys(block, self.shape.block_len()));
                }
            }
        }
        Tensor::from_vec(mask, (packing.batch, 1, rows, columns), like.device())?.to_dtype(like.dtype())
    }

    /// (N, Hkv, rows, D) as (N, Hq, rows, D): query head h reads kv head ⌊h / group⌋.
    fn repeat(&self, x: &Tensor) -> Result<Tensor> {
        let (n, h, rows, d) = x.dims4()?;
        let group = self.shape.group();
        x.unsqueeze(2)?.expand((n, h, group, rows, d))?.reshape((n, h * group, rows, d))
    }
}
