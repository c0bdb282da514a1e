//! The tensors of a case: their values, where each row lies, and which rows the call may see.

use crate::case::{Case, KeySource};
use crate::distribution::Distribution;
use crate::fill::{fill, state};
use crate::guard::{Tensor, arrange};
use crate::rng::Rng;
use fam_core::{Dtype, Layout, Op, Span};
use fam_ref::Array;
use std::ops::Range;

/// The part that a tensor plays in a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Q,
    MemQ,
    InfiniQ,
    /// Keys and values in linear caches, or, for a ring, as `append` is given them.
    K,
    V,
    MemK,
    MemV,
    Sink,
    Beta,
    M,
    Z,
    OLocal,
    O,
    Lse,
    MemO,
    MemLse,
    // Their gradients, in the same order.
    DQ,
    DMemQ,
    DInfiniQ,
    DK,
    DV,
    DMemK,
    DMemV,
    DSink,
    DBeta,
    DM,
    DZ,
    DOLocal,
    DO,
    DLse,
    DMemO,
    DMemLse,
}

use Role::*;

/// What there is beside gradients.
const ROLES: [Role; 16] = [Q, MemQ, InfiniQ, K, V, MemK, MemV, Sink, Beta, M, Z, OLocal, O, Lse, MemO, MemLse];

const NAMES: [&str; 32] = [
    "q",
    "mem_q",
    "infini_q",
    "k",
    "v",
    "mem_k",
    "mem_v",
    "sink",
    "beta",
    "m",
    "z",
    "o_local",
    "o",
    "lse",
    "mem_o",
    "mem_lse",
    "d_q",
    "d_mem_q",
    "d_infini_q",
    "d_k",
    "d_v",
    "d_mem_k",
    "d_mem_v",
    "d_sink",
    "d_beta",
    "d_m",
    "d_z",
    "d_o_local",
    "d_o",
    "d_lse",
    "d_mem_o",
    "d_mem_lse",
];

impl Role {
    /// The name in reports.
    pub fn name(self) -> &'static str {
        NAMES[self as usize]
    }

    /// What it is the gradient of: of the same sizes, at the same places. Itself where it is none.
    pub fn of(self) -> Role {
        ROLES[self as usize % ROLES.len()]
    }

    fn is_gradient(self) -> bool {
        self.of() != self
    }

    /// Whether it arrives at the backward ops, rather than leaves them.
    fn arrives(self) -> bool {
        matches!(self, DO | DLse | DMemO | DMemLse)
    }

    /// One name for tensors that must have the same sizes.
    fn pair(self) -> &'static str {
        match self {
            V => K.name(),
            MemV => MemK.name(),
            Z => M.name(),
            other => other.name(),
        }
    }
}

/// One row that a call may see or must write: where it stands in the values' array `[n, i, row]`, and in the tensor.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub value: [usize; 3],
    pub tensor: [usize; 3],
}

/// One call's tokens of one stream: of `append`, which fills the ring, or of `read_ring`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Chunk {
    pub start: u64,
    pub len: u32,
}

impl Case {
    /// First position whose key is stored; earlier ones are NaN or absent.
    pub(crate) fn first_key(&self, span: &Span) -> u64 {
        if span.len == 0 {
            return span.start;
        }
        match self.op {
            // Segments are whole blocks, whatever the window.
            Op::InfiniWrite | Op::InfiniWriteBackward => span.block_keys(0, self.shape.block_len()).start,
            _ => span.first_key(&self.shape),
        }
    }

    /// The calls of `append` that fill the ring, per stream: stale keys, then the visible ones, in chunks that the plan serves.
    pub(crate) fn chunks(&self, span: &Span) -> Vec<Chunk> {
        if span.len == 0 {
            return Vec::new();
        }
        self.pieces(self.first_key(span).saturating_sub(self.stale as u64).max(span.origin)..span.end())
    }

    /// Positions in pieces that a call of the plan may cover.
    pub(crate) fn pieces(&self, positions: Range<u64>) -> Vec<Chunk> {
        let b = self.shape.block_len() as u64;
        let mut pieces = Vec::new();
        let mut start = positions.start;
        while start < positions.end {
            let in_blocks = self.plan_blocks as u64 * b - start % b;
            let len = (self.plan_rows as u64).min(in_blocks).min(positions.end - start);
            pieces.push(Chunk { start, len: len as u32 });
            start += len;
        }
        pieces
    }

    /// Blocks whose memory rows are given: `append` stores one even for a stream without tokens.
    fn memory_blocks(&self, blocks: usize) -> usize {
        if self.op == Op::Append { blocks.max(1) } else { blocks }
    }

    /// Sizes of the values' array `[N, i, rows, heads, dim]`.
    pub(crate) fn sizes(&self, role: Role) -> [usize; 5] {
        let s = &self.shape;
        let (n, l, nb, f) = (self.batch(), self.len(), self.blocks(), s.mem_len());
        let (h, kv, d) = (s.heads(), s.kv_heads(), s.head_dim());
        match role.of() {
            Q | InfiniQ | OLocal | O => [n, 1, l, h, d],
            Lse => [n, 1, l, h, 1],
            MemQ | MemO => [n, nb, f, h, d],
            MemLse => [n, nb, f, h, 1],
            K | V => {
                let keys = self.spans.iter().map(|s| (s.end() - self.first_key(s)) as usize).max();
                [n, 1, keys.unwrap_or(0), kv, d]
            }
            MemK | MemV => [n, self.memory_blocks(nb), f, kv, d],
            M => [n, nb, d, kv, d],
            Z => [n, nb, 1, kv, d],
            _ => [1, 1, 1, h, 1],
        }
    }

    /// Type and layout of the tensor: larger than the call's values where the case says so.
    pub(crate) fn layout(&self, role: Role) -> Layout {
        let s = &self.shape;
        let (mut shape, of) = (self.sizes(role), role.of());
        // A kernel that reads its spans itself may be handed any that the plan serves.
        if self.device_spans {
            shape[2] = shape[2].max(match of {
                Q | InfiniQ | OLocal | O | Lse => self.plan_rows,
                MemQ | MemO | MemLse => s.mem_len(),
                _ => 0,
            });
            if matches!(of, MemQ | MemO | MemLse) {
                shape[1] = self.plan_blocks;
            }
        }
        match of {
            K | V => {
                shape[0] = if self.keys == KeySource::Linear { self.slots } else { self.batch() };
                shape[2] = match self.keys {
                    KeySource::Linear => self.spans.iter().map(|s| (s.end() - s.origin) as usize).max().unwrap_or(0),
                    KeySource::Ring => self.spans.iter().map(|s| self.chunks(s).len()).max().unwrap_or(0) * self.plan_rows,
                };
            }
            MemK | MemV => (shape[0], shape[1]) = (self.slots, self.mem_entries),
            M | Z => (shape[0], shape[1]) = (self.slots, self.state_entries),
            _ => {}
        }
        // Axes that are called "at least": more entries than the call has, none of which it may touch.
        let mut growth = Rng::of(self.seed, of.pair());
        if growth.chance(1, 3) {
            match of {
                Sink | Beta => {}
                K | V | MemK | MemV | M | Z => shape[growth.pick(&[0, 0, 2])] += 1,
                _ => shape[growth.pick(&[0, 1, 2])] += 1 + growth.below(2),
            }
        }
        let dtype = match role {
            O | MemO | DO | DMemO | DQ | DMemQ | DInfiniQ => self.out_dtype,
            Sink | Beta | M | Z | OLocal | Lse | MemLse => Dtype::F32,
            role if role.is_gradient() => Dtype::F32,
            _ => s.dtype(),
        };
        // Saved results are a row's own too.
        let is_output = matches!(role, O | Lse | MemO | MemLse)
            || (role.is_gradient() && !role.arrives())
            || (self.op == Op::InfiniWrite && matches!(role, M | Z))
            || (self.op == Op::Attend && role == OLocal);
        let mut rng = Rng::of(self.seed, ["layout", role.name()].concat().as_str());
        arrange(self.strides, dtype, shape, is_output, &mut rng)
    }

    /// Every row of the tensor that the call may see or must write.
    pub(crate) fn places(&self, role: Role) -> Vec<Place> {
        let s = &self.shape;
        let (mut places, of) = (Vec::new(), role.of());
        if matches!(of, Sink | Beta) {
            return vec![Place { value: [0; 3], tensor: [0; 3] }];
        }
        for (n, span) in self.spans.iter().enumerate() {
            let (slot, nb, f) = (span.slot as usize, span.blocks(s.block_len()), s.mem_len());
            let mut add = |value: [usize; 2], tensor: [usize; 3]| {
                places.push(Place { value: [n, value[0], value[1]], tensor });
            };
            let nb = if matches!(of, MemK | MemV) { self.memory_blocks(nb) } else { nb };
            let per_block = |rows: usize| (0..nb).flat_map(move |i| (0..rows).map(move |r| (i, r)));
            match of {
                Q | InfiniQ | OLocal | O | Lse => (0..span.len as usize).for_each(|r| add([0, r], [n, 0, r])),
                MemQ | MemO | MemLse => per_block(f).for_each(|(i, r)| add([i, r], [n, i, r])),
                MemK | MemV => per_block(span.mem_rows as usize)
                    .for_each(|(i, r)| add([i, r], [slot, (span.mem_entry as usize + i) % self.mem_entries, r])),
                M | Z => per_block(if of == M { s.head_dim() } else { 1 })
                    .for_each(|(i, r)| add([i, r], [slot, (span.state_entry as usize + i) % self.state_entries, r])),
                K | V => {
                    let first = self.first_key(span);
                    if self.keys == KeySource::Linear {
                        (first..span.end()).for_each(|p| add([0, (p - first) as usize], [slot, 0, (p - span.origin) as usize]));
                        continue;
                    }
                    for (c, chunk) in self.chunks(span).iter().enumerate() {
                        for x in 0..u64::from(chunk.len) {
                            if let Some(row) = (chunk.start + x).checked_sub(first) {
                                add([0, row as usize], [n, 0, c * self.plan_rows + x as usize]);
                            }
                        }
                    }
                }
                _ => unreachable!("answered above"),
            }
        }
        places
    }

    /// Scalar on q·k.
    pub(crate) fn scale(&self) -> f64 {
        self.shape.scale().into()
    }
}

/// The values of a case's inputs, by role: what the reference sees.
#[derive(Clone, Debug)]
pub(crate) struct Data(Vec<Option<Array<5>>>);

impl Data {
    /// Draws the inputs of a case.
    pub fn new(case: &Case) -> Self {
        let distribution = case.distribution;
        let wanted: &[Role] = match case.op {
            Op::Attend if case.fused => &[Q, MemQ, K, V, MemK, MemV, Sink, InfiniQ, Beta, M, Z],
            Op::Attend => &[Q, MemQ, K, V, MemK, MemV, Sink],
            Op::InfiniRead => &[InfiniQ, Beta, M, Z, OLocal],
            Op::InfiniWrite | Op::InfiniWriteBackward => &[K, V, M, Z],
            // What was saved is computed: see attend_backward.rs.
            Op::AttendBackward => &[Q, MemQ, K, V, MemK, MemV, Sink, DO, DLse, DMemO, DMemLse],
            Op::InfiniReadBackward => &[InfiniQ, Beta, M, Z, OLocal, DO],
            Op::Append => &[K, V, MemK, MemV],
            // Parts have no queries and keys: see merge.rs.
            _ => &[],
        };
        let mut data = Data(vec![None; NAMES.len()]);
        for &role in wanted {
            data.0[role as usize] = Some(match role {
                M | Z => state(case, role),
                // Beside a local attention: what the compressive memory sees has no structure of logits.
                InfiniQ if distribution == Distribution::NonFinite => fill(case, role, Distribution::Normal),
                InfiniQ => fill(case, role, distribution.without_logits()),
                role if role.arrives() => fill(case, role, distribution.upstream()),
                _ => fill(case, role, distribution),
            });
        }
        if distribution == Distribution::NonFinite {
            crate::nonfinite::spoil(case, &mut data);
        }
        data.settle(case);
        data
    }

    pub fn get(&self, role: Role) -> &Array<5> {
        self.0[role as usize].as_ref().expect("the op has this tensor")
    }

    pub fn get_mut(&mut self, role: Role) -> &mut Array<5> {
        self.0[role as usize].as_mut().expect("the op has this tensor")
    }

    /// What the forward pass has returned.
    pub fn set(&mut self, role: Role, values: Array<5>) {
        self.0[role as usize] = Some(values);
    }

    pub fn has(&self, role: Role) -> bool {
        self.0[role as usize].is_some()
    }

    /// A `[N, L, H, D]` tensor as the reference takes it.
    pub fn tokens(&self, role: Role) -> Array<4> {
        let Array { shape: [n, _, l, h, d], data } = self.get(role).clone();
        Array { shape: [n, l, h, d], data }
    }

    /// The tensor of a role: `fill` everywhere but in the rows that the call may see.
    pub fn tensor(&self, case: &Case, role: Role, fill: u8) -> Tensor {
        let mut tensor = Tensor::new(case.layout(role), fill);
        let values = self.get(role);
        for Place { value: [n, i, r], tensor: [tn, ti, tr] } in case.places(role) {
            for h in 0..values.shape[3] {
                tensor.put([tn, ti, tr, h], values.row(&[n, i, r, h]));
            }
        }
        tensor
    }

    /// Keys and values of the same stream as another case sees them: position by position.
    pub fn seen_by(&self, from: &Case, to: &Case) -> Data {
        let mut data = self.clone();
        for role in [K, V] {
            let mut values = Array::zeros(to.sizes(role));
            for (n, (from_span, to_span)) in from.spans.iter().zip(&to.spans).enumerate() {
                let (from_first, to_first) = (from.first_key(from_span), to.first_key(to_span));
                for position in to_first..to_span.end() {
                    let row = self.get(role).row(&[n, 0, (position - from_first) as usize]);
                    values.row_mut(&[n, 0, (position - to_first) as usize]).copy_from_slice(row);
                }
            }
            data.0[role as usize] = Some(values);
        }
        data
    }

    /// The streams in another order, or some of them.
    pub fn streams(&self, order: &[usize]) -> Data {
        let mut data = self.clone();
        for (role, values) in data.0.iter_mut().enumerate() {
            let Some(values) = values.as_mut().filter(|_| role != Sink as usize && role != Beta as usize) else { continue };
            let gathered = order.iter().flat_map(|&n| values.row(&[n]).to_vec()).collect();
            let [_, i, r, h, d] = values.shape;
            *values = Array { shape: [order.len(), i, r, h, d], data: gathered };
        }
        data
    }

    /// Where rows share memory (strides of 0, fewer entries than blocks), the last one written is what all of them hold.
    fn settle(&mut self, case: &Case) {
        for role in [Q, MemQ, InfiniQ, K, V, MemK, MemV, Sink, Beta, M, Z, OLocal, DO, DLse, DMemO, DMemLse] {
            let is_shared = matches!(role, MemK | MemV) && case.mem_entries < case.blocks();
            if !self.has(role) || !(is_shared || case.layout(role).stride.contains(&0)) {
                continue;
            }
            let tensor = self.tensor(case, role, crate::guard::POISON);
            let values = self.get_mut(role);
            for Place { value: [n, i, r], tensor: [tn, ti, tr] } in case.places(role) {
                for h in 0..values.shape[3] {
                    tensor.get([tn, ti, tr, h], values.row_mut(&[n, i, r, h]));
                }
            }
        }
    }
}
