//! One row of the test table: an op, its sizes, spans and memory layout, all drawn from one printed seed.

use crate::distribution::Distribution;
use crate::draw;
use fam_core::{Dtype, Op, Shape, Span, Spec, SpecBuilder, Window};
use std::fmt;

/// Where the keys of a case lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum KeySource {
    /// Linear caches.
    Linear,
    /// The backend's ring, filled by calls of `append` before the op.
    Ring,
}

/// How the elements of the tensors lie in their buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Strides {
    /// Row-major, no gaps.
    Packed,
    /// (batch, heads, rows, dim) in memory.
    HeadsMajor,
    /// Axes in any order, gaps between them, an offset before.
    Padded,
    /// Stride 0 along random axes of the inputs; outputs are padded.
    Broadcast,
}

impl Strides {
    /// Every arrangement.
    pub const ALL: [Strides; 4] = [Strides::Packed, Strides::HeadsMajor, Strides::Padded, Strides::Broadcast];

    /// The name printed in cases and coverage tables.
    pub fn name(self) -> &'static str {
        match self {
            Strides::Packed => "packed",
            Strides::HeadsMajor => "heads-major",
            Strides::Padded => "padded",
            Strides::Broadcast => "broadcast",
        }
    }
}

/// What an engine would be doing: decides how long spans are and where they start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Style {
    /// One whole block.
    Step,
    /// Many tokens from the start of the stream or of a block.
    Prefill,
    /// One to three tokens anywhere.
    Decode,
    /// Any number of tokens anywhere, 0 included, different for every stream.
    Ragged,
}

impl Style {
    /// Every style.
    pub const ALL: [Style; 4] = [Style::Step, Style::Prefill, Style::Decode, Style::Ragged];

    /// The name printed in cases and coverage tables.
    pub fn name(self) -> &'static str {
        match self {
            Style::Step => "step",
            Style::Prefill => "prefill",
            Style::Decode => "decode",
            Style::Ragged => "ragged",
        }
    }
}

/// A generated case. A pure function of its seed: [`Case::from_seed`] gives the same case for ever.
///
/// Values of tensors are drawn from the seed too, when the case is run. Every case is valid; calls that must be refused are in
/// [`crate::invalid_calls`].
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Case {
    /// What replays it.
    pub seed: u64,
    /// The op under test.
    pub op: Op,
    /// What the tensors hold.
    pub distribution: Distribution,
    /// Sizes of the layer.
    pub shape: Shape,
    /// Type of `o` and `mem_o`.
    pub out_dtype: Dtype,
    /// How spans were chosen.
    pub style: Style,
    /// One span a stream.
    pub spans: Vec<Span>,
    /// Whether the op reads its spans from device memory.
    pub device_spans: bool,
    /// Most tokens of a stream that the plan serves.
    pub plan_rows: usize,
    /// Most blocks that the plan serves.
    pub plan_blocks: usize,
    /// Slots of the cached tensors.
    pub slots: usize,
    /// Blocks of the ring beyond the least.
    pub ring_spare: usize,
    /// Where keys lie.
    pub keys: KeySource,
    /// How far before the first visible key the ring was filled, in tokens: those keys are NaN and partly overwritten.
    pub stale: usize,
    /// Entries of `mem_k`, `mem_v`.
    pub mem_entries: usize,
    /// Entries of `m`, `z`.
    pub state_entries: usize,
    /// Whether there are block rows.
    pub rows: bool,
    /// Whether there are memory rows.
    pub mem_rows: bool,
    /// Whether the log-sum-exp is asked for.
    pub lse: bool,
    /// Whether there is a sink.
    pub sink: bool,
    /// Whether the read of the compressive memory is fused into `attend`.
    pub fused: bool,
    /// Whether a fused `attend` is asked for its output before the gate too.
    pub o_local: bool,
    /// What a backward op reads and is asked for.
    pub gradients: Gradients,
    /// Type of the partial outputs that `merge` reads: the shape's dtype or f32.
    pub part_dtypes: [Dtype; 2],
    /// How buffers are laid out.
    pub strides: Strides,
}

/// What a case of a backward op reads and is asked for; nothing to the other ops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Gradients {
    /// Whether gradients of the log-sum-exps arrive.
    pub d_lse: bool,
    /// Whether `d_k` and `d_v` are asked for.
    pub keys: bool,
    /// Whether `d_mem_k` and `d_mem_v` are asked for, where there are memory rows.
    pub mem: bool,
    /// Whether `d_sink` is asked for, where there is a sink.
    pub sink: bool,
    /// Whether `d_m` and `d_z` are asked for.
    pub state: bool,
    /// Whether `d_beta` is asked for.
    pub beta: bool,
}

/// Which cases of a suite are run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Filter {
    /// Only these ops; all if empty.
    pub ops: Vec<Op>,
    /// Only these dtypes; all if empty.
    pub dtypes: Vec<Dtype>,
    /// Only cases whose printed line contains this.
    pub text: String,
}

impl Filter {
    fn pass(&self, (op, dtype): (Op, Dtype), case: impl FnOnce() -> Case) -> Option<Case> {
        if !self.ops.is_empty() && !self.ops.contains(&op) || !self.dtypes.is_empty() && !self.dtypes.contains(&dtype) {
            return None;
        }
        let case = case();
        (self.text.is_empty() || case.to_string().contains(&self.text)).then_some(case)
    }
}

impl Case {
    /// The case of a seed.
    pub fn from_seed(seed: u64) -> Case {
        draw::case(seed)
    }

    /// The case of a seed among those of the backward ops.
    pub fn gradient(seed: u64) -> Case {
        draw::gradient(seed)
    }

    /// The case of a seed, if the filter lets it pass. Op and dtype are decided first, so that a refusal is cheap.
    pub fn generate(seed: u64, filter: &Filter) -> Option<Case> {
        filter.pass(draw::op_and_dtype(&mut draw::start(seed)), || draw::case(seed))
    }

    /// As [`Case::generate`], among the cases of the backward ops.
    pub fn generate_gradient(seed: u64, filter: &Filter) -> Option<Case> {
        filter.pass(draw::gradient_op_and_dtype(&mut draw::gradient_start(seed)), || draw::gradient(seed))
    }

    /// N: streams in the call.
    pub fn batch(&self) -> usize {
        self.spans.len()
    }

    /// L: the most tokens of any stream in the call.
    pub fn len(&self) -> usize {
        self.spans.iter().map(|s| s.len as usize).max().unwrap_or(0)
    }

    /// Whether no stream has a token.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// nb: the most blocks of any stream in the call.
    pub fn blocks(&self) -> usize {
        self.spans.iter().map(|s| s.blocks(self.shape.block_len())).max().unwrap_or(0)
    }

    /// Whether any stream's keys have gone round the ring.
    pub fn wraps(&self) -> bool {
        self.keys == KeySource::Ring && self.spans.iter().any(|s| s.len > 0 && s.end() - s.origin > self.ring_rows() as u64)
    }

    /// Whether any stream's keys lie 2³² positions or more from its origin: beyond what 32 bits count.
    pub fn is_far(&self) -> bool {
        self.spans.iter().any(|s| s.start - s.origin >= 1 << 32)
    }

    /// Whether it has two blocks or more, ring wrap, shared kv heads and memory keys, all at once.
    pub fn is_dense(&self) -> bool {
        self.blocks() >= 2 && self.wraps() && self.shape.group() > 1 && self.shape.mem_len() > 0
    }

    /// C: rows of a slot's ring.
    pub fn ring_rows(&self) -> usize {
        let b = self.shape.block_len();
        let window = match self.shape.window() {
            Window::Blocks(m) => m,
            Window::Tokens(w) => (w - 1).div_ceil(b),
            _ => 0,
        };
        (window + self.plan_blocks + self.ring_spare) * b
    }

    /// What the plan must serve for the case.
    ///
    /// # Errors
    /// None for a generated case.
    pub fn spec(&self) -> fam_core::Result<Spec> {
        let ring: &[Op] = if self.keys == KeySource::Ring && self.op != Op::Append { &[Op::Append] } else { &[] };
        self.spec_builder().ops(&[ring, &[self.op]].concat()).build()
    }

    fn spec_builder(&self) -> SpecBuilder {
        self.shape
            .spec(self.batch(), self.plan_rows)
            .blocks(self.plan_blocks)
            .slots(self.slots)
            .ring_rows(self.ring_rows())
            .out_dtype(self.out_dtype)
    }

    /// Query and key pairs that count, times D: what a case costs.
    pub fn work(&self) -> u64 {
        let s = &self.shape;
        let b = s.block_len() as u64;
        let d = s.head_dim() as u64;
        let stream = |span: &Span| -> u64 {
            if span.len == 0 {
                return 0;
            }
            let rows: u64 = (span.start..span.end())
                .map(|p| p + 1 - span.window_first(p, s) + u64::from(span.mem_rows) + if self.fused { d } else { 0 })
                .sum();
            let mem: u64 = s.mem_len() as u64
                * (0..span.blocks(s.block_len()))
                    .map(|i| {
                        let keys = span.block_keys(i, s.block_len());
                        keys.end - keys.start + u64::from(span.mem_rows)
                    })
                    .sum::<u64>();
            let kept = (span.end() - span.first_key(s) + self.stale as u64) / 4;
            let attended = rows * u64::from(self.rows) + mem * u64::from(self.mem_rows);
            let pairs = match self.op {
                Op::Attend => attended + kept,
                Op::AttendBackward => 5 * attended + kept,
                Op::InfiniRead => u64::from(span.len) * d,
                Op::InfiniWrite => (u64::from(span.len) + b) * 2 * d,
                Op::InfiniReadBackward => u64::from(span.len) * 4 * d,
                Op::InfiniWriteBackward => (u64::from(span.len) + b) * 8 * d,
                _ => u64::from(span.len) * 4 + (span.blocks(s.block_len()) * s.mem_len()) as u64,
            };
            pairs * s.heads() as u64 * d
        };
        self.spans.iter().map(stream).sum()
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let s = &self.shape;
        write!(f, "{:#018x} {} {} {}", self.seed, self.op, s.dtype(), self.distribution)?;
        if self.out_dtype != s.dtype() {
            write!(f, " out={}", self.out_dtype)?;
        }
        write!(f, " N={} H={}/{} D={} B={}", self.batch(), s.heads(), s.kv_heads(), s.head_dim(), s.block_len())?;
        match s.window() {
            Window::Blocks(m) => write!(f, " M={m}")?,
            Window::Tokens(w) => write!(f, " w={w}")?,
            _ => write!(f, " {:?}", s.window())?,
        }
        write!(f, " F={} scale={:?} {} {}", s.mem_len(), s.scale(), self.style.name(), self.strides.name())?;
        match self.keys {
            KeySource::Ring => write!(f, " ring={}{}", self.ring_rows(), if self.wraps() { "(wraps)" } else { "" })?,
            KeySource::Linear => write!(f, " linear")?,
        }
        if let Some(rule) = s.infini() {
            write!(f, " infini={rule:?}{}", if self.fused { "(fused)" } else { "" })?;
        }
        for (on, name) in [
            (self.rows, "rows"),
            (self.mem_rows, "mem_rows"),
            (self.lse, "lse"),
            (self.sink, "sink"),
            (self.device_spans, "device_spans"),
            (self.fused && self.o_local, "o_local"),
        ] {
            if on {
                write!(f, " {name}")?;
            }
        }
        if Op::BACKWARD.contains(&self.op) {
            write!(f, " {}", self.gradients)?;
        }
        write!(f, " spans=[")?;
        for (i, span) in self.spans.iter().enumerate() {
            write!(f, "{}{}+{}@{}", if i > 0 { " " } else { "" }, span.start, span.len, span.slot)?;
            if span.origin > 0 {
                write!(f, " origin={}", span.origin)?;
            }
            if s.mem_len() > 0 {
                write!(f, " mem={}", span.mem_rows)?;
            }
        }
        write!(f, "]")
    }
}

impl fmt::Display for Gradients {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("wants=")?;
        let wants = [(self.keys, "k"), (self.mem, "m"), (self.sink, "s"), (self.state, "i"), (self.beta, "b")];
        wants.into_iter().filter(|(wanted, _)| *wanted).try_for_each(|(_, name)| f.write_str(name))?;
        if self.d_lse { f.write_str(" d_lse") } else { Ok(()) }
    }
}
