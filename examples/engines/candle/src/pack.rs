//! Which rows of the packed tensors are whose.

use candle_core::{Result, Tensor, bail};
use fam::{Shape, Span};

/// Candle's custom ops take three tensors, attention with a memory has six: rows of tokens and of memory share one.
///
/// | tensor | rows |
/// |---|---|
/// | q | `tokens` block rows, then for each block its `mem_q` memory rows |
/// | k, v | `keys` rows of window and block, then for each block its `mem_k` memory rows |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packing {
    /// N: streams.
    pub batch: usize,
    /// Block rows of q, for the longest span; 0 where only memory rows are asked for.
    pub tokens: usize,
    /// nb: blocks that the longest span touches.
    pub blocks: usize,
    /// Memory rows of q in each block: F, or 0 where the memory is frozen.
    pub mem_q: usize,
    /// Keys of tokens: window and block, from the span's origin on.
    pub keys: usize,
    /// Memory keys in each block: the most that a span names.
    pub mem_k: usize,
}

impl Packing {
    /// Divides the rows of q, of which the first `tokens` are block rows, and of k and v for `spans`.
    ///
    /// # Errors
    /// Where the rows do not divide so; where stream n is not in slot n, which is where k and v have it.
    pub fn new(shape: &Shape, spans: &[Span], tokens: usize, [q, k, v]: [&Tensor; 3]) -> Result<Self> {
        if k.dims() != v.dims() {
            bail!("k is {:?} and v {:?}: expected one shape", k.shape(), v.shape());
        }
        let (q, k) = (q.dims4()?, k.dims4()?);
        let blocks = spans.iter().map(|s| s.blocks(shape.block_len())).max().unwrap_or(0);
        let mem_k = spans.iter().map(|s| s.mem_rows as usize).max().unwrap_or(0);
        if let Some(n) = (0..spans.len()).find(|&n| spans[n].slot as usize != n) {
            bail!("span {n} names slot {}: keys lie in the order of the batch", spans[n].slot);
        }
        if q.0 != spans.len() || k.0 != spans.len() {
            bail!("q has {} streams and k {}, for {} spans", q.0, k.0, spans.len());
        }
        let mem_q = match q.2.checked_sub(tokens) {
            Some(0) => 0,
            Some(rest) if rest == blocks * shape.mem_len() => shape.mem_len(),
            _ => bail!("q has {} rows: expected {tokens}, or with memory rows {tokens} + {blocks} x {}", q.2, shape.mem_len()),
        };
        let Some(keys) = k.2.checked_sub(blocks * mem_k) else {
            bail!("k has {} rows, fewer than the {blocks} x {mem_k} memory rows", k.2);
        };
        Ok(Packing { batch: q.0, tokens, blocks, mem_q, keys, mem_k })
    }

    /// Memory rows of q.
    pub(crate) fn mem_rows(&self) -> usize {
        self.blocks * self.mem_q
    }
}
