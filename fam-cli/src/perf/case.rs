//! The table of cases, and what each of them has to compute.

use fam::{Dtype, InfiniRule, Result, Shape, Window};

/// One case: a call of [`fam::Streams`] at a given place of its streams. The call appends its tokens' keys and values, attends, and where
/// there is a compressive memory reads, gates and writes it. Of the backward pass: `attend_backward` of that call, over linear caches.
#[derive(Clone, Copy, Debug)]
pub struct PerfCase {
    /// `A`, or `E-64` for one of several of a letter.
    pub name: &'static str,
    /// In words.
    pub what: &'static str,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub block_len: usize,
    pub window_blocks: usize,
    pub mem_len: usize,
    pub infini: Option<InfiniRule>,
    /// Streams in the call.
    pub batch: usize,
    /// Tokens that each stream has before the call.
    pub history: usize,
    /// Tokens of a call: a whole block with its memory rows, after which the stream goes on; or fewer, which are taken back.
    pub rows: usize,
    /// Calls in one sample.
    pub calls: usize,
    /// Whether what is timed is the backward pass.
    pub is_backward: bool,
}

const A: PerfCase = PerfCase {
    name: "A",
    what: "a step: 8 heads of 64, blocks of 256, a window of 1 block, 16 memory rows",
    heads: 8,
    kv_heads: 8,
    head_dim: 64,
    block_len: 256,
    window_blocks: 1,
    mem_len: 16,
    infini: None,
    batch: 1,
    history: 256,
    rows: 256,
    calls: 1,
    is_backward: false,
};
const B: PerfCase = PerfCase {
    name: "B",
    what: "a step: 16 query heads on 4 kv heads of 128, blocks of 512, a window of 2 blocks, 64 memory rows",
    heads: 16,
    kv_heads: 4,
    head_dim: 128,
    block_len: 512,
    window_blocks: 2,
    mem_len: 64,
    history: 1024,
    rows: 512,
    ..A
};
const E: PerfCase = PerfCase {
    name: "E-64",
    what: "causal attention over 2048 tokens, 8 heads of 64",
    block_len: 2048,
    window_blocks: 0,
    mem_len: 0,
    history: 0,
    rows: 2048,
    ..A
};
const F: PerfCase = PerfCase {
    name: "F-linear",
    what: "a segment of 256 with compressive memory, 8 heads of 64: local attention, read, gate, linear write",
    window_blocks: 0,
    mem_len: 0,
    infini: Some(InfiniRule::Linear),
    ..A
};

/// Every case.
pub const CASES: [PerfCase; 10] = [
    A,
    B,
    PerfCase { name: "C", what: "a stream: 64 steps of A", calls: 64, ..A },
    // The ring holds the tokens of the window and no more, so that all of it is read.
    PerfCase {
        name: "D",
        what: "decode: 8 streams, a token each on 1024 tokens and 64 memory rows, 16 query heads on 4 kv heads of 128",
        window_blocks: 1,
        batch: 8,
        history: 1023,
        rows: 1,
        ..B
    },
    E,
    PerfCase { name: "E-128", what: "causal attention over 2048 tokens, 8 heads of 128", head_dim: 128, ..E },
    F,
    PerfCase {
        name: "F-delta",
        what: "a segment of 256 with compressive memory, 8 heads of 64: local attention, read, gate, delta write",
        infini: Some(InfiniRule::Delta),
        ..F
    },
    PerfCase { name: "A-backward", what: "all gradients of A's attention", is_backward: true, ..A },
    PerfCase { name: "B-backward", what: "all gradients of B's attention", is_backward: true, ..B },
];

/// What one sample of a case computes and reads.
#[derive(Clone, Copy, Debug)]
pub struct Work {
    /// 4·D for each visible pair of query row and key, 10·D in the backward pass (five products: logits again, d_p, d_v, d_k, d_q); with a
    /// compressive memory 2·D² more for each row that reads it and for each key that is written, and with the delta rule 2·D² for each key
    /// that reads it first.
    pub flops: f64,
    /// Those of them that a level with the dot of bf16 pairs does in pairs; they are not in `flops`.
    pub bf16_flops: f64,
    /// One for each visible pair; with a compressive memory σ of every channel of q and k.
    pub exps: f64,
    /// Visible keys and values, each once.
    pub bytes: f64,
}

impl PerfCase {
    /// Whether `name` asks for this case: its name, or a letter that no case has for its name.
    pub fn is_named(&self, name: &str) -> bool {
        let is_letter = || CASES.iter().all(|case| case.name != name);
        self.name == name || self.name.split_once('-').is_some_and(|(letter, _)| letter == name) && is_letter()
    }

    /// The layer.
    pub fn shape(&self, dtype: Dtype) -> Result<Shape> {
        let shape = Shape::builder().heads(self.heads).kv_heads(self.kv_heads).head_dim(self.head_dim).dtype(dtype);
        let shape = shape.block_len(self.block_len).window(Window::Blocks(self.window_blocks)).mem_len(self.mem_len);
        match self.infini {
            Some(rule) => shape.infini(rule).build(),
            None => shape.build(),
        }
    }

    /// Whether a call is a whole block: then the memory rows are in it, and it is committed.
    pub fn is_block(&self) -> bool {
        self.rows == self.block_len
    }

    /// Decode reads each key for a few rows only: memory bounds it, arithmetic the others.
    pub fn is_bound_by_memory(&self) -> bool {
        self.rows == 1
    }

    /// The work of one sample.
    pub fn work(&self, dtype: Dtype) -> Work {
        let window = Window::Blocks(self.window_blocks);
        let first = |position| window.first(position, self.block_len);
        let start = self.history as u64;
        let (end, mem_len) = (start + self.rows as u64, self.mem_len as u64);
        let of_rows: u64 = (start..end).map(|position| position + 1 - first(position) + mem_len).sum();
        let of_mem_rows = if self.is_block() { mem_len * (mem_len + self.rows as u64) } else { 0 };
        let keys = end - first(start) + mem_len;

        let [d, rows] = [self.head_dim, self.rows].map(|n| n as f64);
        let [heads, kv_heads] = [self.heads, self.kv_heads].map(|n| (n * self.batch * self.calls) as f64);
        let pairs = (of_rows + of_mem_rows) as f64 * heads;
        let (products, sigmas) = match self.infini {
            None => (0.0, 0.0),
            Some(InfiniRule::Linear) => (heads + kv_heads, heads + kv_heads),
            Some(_) => (heads + 2.0 * kv_heads, heads + kv_heads),
        };
        let attention = if self.is_backward { 10.0 } else { 4.0 } * d * pairs;
        let is_bf16 = dtype == Dtype::Bf16;
        Work {
            flops: if is_bf16 { 0.0 } else { attention } + 2.0 * d * d * rows * products,
            bf16_flops: if is_bf16 { attention } else { 0.0 },
            exps: pairs + d * rows * sigmas,
            bytes: 2.0 * (dtype.bytes() * keys as usize) as f64 * d * kv_heads,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_case_is_asked_for_by_its_name_or_its_letter() {
        let named = |name: &str| CASES.iter().filter(|c| c.is_named(name)).map(|c| c.name).collect::<Vec<_>>();
        assert_eq!(named("A"), ["A"]);
        assert_eq!(named("E"), ["E-64", "E-128"]);
        assert_eq!(named("B-backward"), ["B-backward"]);
        assert!(named("G").is_empty());
    }

    #[test]
    fn work_by_hand() {
        let case = |name: &str| CASES.into_iter().find(|c| c.name == name).unwrap().work(Dtype::F32);
        // 256 rows see 256 window keys, 16 memory keys and 128.5 of their own on average; 16 memory rows see 16 + 256.
        let pairs = 8.0 * (256.0 * (256.0 + 16.0 + 128.5) + 16.0 * 272.0);
        assert_eq!((case("A").exps, case("A").flops), (pairs, 256.0 * pairs));
        assert_eq!(case("C").flops, 64.0 * case("A").flops);
        assert_eq!(case("D").exps, 8.0 * 16.0 * 1088.0);
        assert_eq!(case("D").bytes, 8.0 * 4.0 * 1088.0 * 128.0 * 2.0 * 4.0);
        assert_eq!(case("E-64").exps, 8.0 * 2048.0 * 1024.5);
        let local = 8.0 * 256.0 * 128.5 * 256.0;
        assert_eq!(case("F-linear").flops, local + 8.0 * 256.0 * 4.0 * 4096.0);
        assert_eq!(case("F-delta").flops, local + 8.0 * 256.0 * 6.0 * 4096.0);
        assert_eq!((case("A-backward").exps, case("A-backward").flops), (pairs, 640.0 * pairs));
    }
}
