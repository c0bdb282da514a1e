//! What several of the tests need.

use fam_core::{Shape, Span, Window};
use fam_ref::layer::Random;
use fam_ref::{Array, Attend, Attended, attend};

/// Hq 4, Hkv 2, D 6.
pub fn shape(block_len: usize, window: Window, mem_len: usize) -> Shape {
    Shape::builder().heads(4).kv_heads(2).head_dim(6).block_len(block_len).window(window).mem_len(mem_len).build().unwrap()
}

#[derive(Clone)]
/// Random inputs of streams that begin at position 0, with one set of memory rows for each block.
pub struct Inputs {
    pub shape: Shape,
    pub q: Array<4>,
    pub mem_q: Array<5>,
    pub k: Array<4>,
    pub v: Array<4>,
    pub mem_k: Array<5>,
    pub mem_v: Array<5>,
}

impl Inputs {
    pub fn new(shape: Shape, batch: usize, tokens: usize, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let blocks = tokens.div_ceil(shape.block_len());
        let (hq, hkv, d, f) = (shape.heads(), shape.kv_heads(), shape.head_dim(), shape.mem_len());
        Inputs {
            shape,
            q: random.array([batch, tokens, hq, d], 2.0),
            mem_q: random.array([batch, blocks, f, hq, d], 2.0),
            k: random.array([batch, tokens, hkv, d], 2.0),
            v: random.array([batch, tokens, hkv, d], 1.0),
            mem_k: random.array([batch, blocks, f, hkv, d], 2.0),
            mem_v: random.array([batch, blocks, f, hkv, d], 1.0),
        }
    }

    /// Both row groups, over all of the inputs.
    pub fn args<'a>(&'a self, spans: &'a [Span]) -> Attend<'a> {
        Attend {
            shape: &self.shape,
            spans,
            q: Some(&self.q),
            mem_q: Some(&self.mem_q),
            k: &self.k,
            v: &self.v,
            mem_k: Some(&self.mem_k),
            mem_v: Some(&self.mem_v),
            sink: None,
        }
    }

    /// Spans of whole streams.
    pub fn spans(&self) -> Vec<Span> {
        let [batch, tokens, ..] = self.q.shape;
        (0..batch).map(|n| self.span(n, 0, tokens)).collect()
    }

    /// Tokens `start .. start + len` of stream `n`, with all memory rows present.
    pub fn span(&self, n: usize, start: usize, len: usize) -> Span {
        Span::new(n as u32, start as u64, len as u32).with_mem_rows(self.shape.mem_len() as u32)
    }

    /// One block of stream 0, as a call of its own that is given this block's rows and memory alone.
    pub fn attend_block(&self, block: usize) -> Attended {
        let (b, tokens) = (self.shape.block_len(), self.q.shape[1]);
        let (start, len) = (block * b, b.min(tokens - block * b));
        attend(&Attend {
            q: Some(&tokens_of(&self.q, start, len)),
            k: &tokens_of(&self.k, 0, tokens),
            v: &tokens_of(&self.v, 0, tokens),
            mem_q: Some(&block_of(&self.mem_q, block)),
            mem_k: Some(&block_of(&self.mem_k, block)),
            mem_v: Some(&block_of(&self.mem_v, block)),
            ..self.args(&[self.span(0, start, len)])
        })
        .unwrap()
    }
}

/// Tokens `start .. start + len` of stream 0.
pub fn tokens_of(x: &Array<4>, start: usize, len: usize) -> Array<4> {
    let [_, _, h, d] = x.shape;
    Array::new([1, len, h, d], x.data[start * h * d..(start + len) * h * d].to_vec()).unwrap()
}

/// Memory rows of one block of stream 0.
pub fn block_of(x: &Array<5>, block: usize) -> Array<5> {
    let [_, _, f, h, d] = x.shape;
    Array::new([1, 1, f, h, d], x.row(&[0, block]).to_vec()).unwrap()
}

/// The first `rows` memory rows of every block; NaN beyond those that there are.
pub fn memory_of(x: &Array<5>, rows: usize) -> Array<5> {
    let [batch, blocks, mem_len, h, d] = x.shape;
    let mut part = Array::full([batch, blocks, rows, h, d], f64::NAN);
    for (n, block) in (0..batch).flat_map(|n| (0..blocks).map(move |block| (n, block))) {
        let len = rows.min(mem_len) * h * d;
        part.row_mut(&[n, block])[..len].copy_from_slice(&x.row(&[n, block])[..len]);
    }
    part
}

/// Largest difference; infinite where one is NaN or infinite and the other is not the same.
pub fn difference(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| if a == b { 0.0 } else { (a - b).abs() }).fold(0.0, |m, x| if x <= m { m } else { x })
}
