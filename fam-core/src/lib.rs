//! The contract of attention with a memory: what every backend of `fam` computes, and the types it is asked with.
//!
//! Two methods process an endless stream in constant memory. *TransformerFAM* ([arXiv 2404.09173](https://arxiv.org/abs/2404.09173),
//! Algorithms 1 and 2) gives a layer a few memory rows that attend to themselves and to the current block, and that the next block attends to
//! beside a sliding window of whole blocks. *Infini-attention* ([arXiv 2404.07143](https://arxiv.org/abs/2404.07143), Eq. 5–11) keeps a
//! compressive matrix instead. Here is the part of both that is attention: projections, norms, residuals, feed-forward and rotary positions
//! stay with the caller. This page is the manual; the crate `fam-ref` is its executable form in f64.
//!
//! # 1. Words and sizes
//!
//! | symbol | name | meaning |
//! |---|---|---|
//! | N | `batch` | streams in a call |
//! | Hq, Hkv | `heads`, `kv_heads` | query heads, and key and value heads; query head h reads kv head ⌊h / (Hq/Hkv)⌋ of k, v, m and z |
//! | D | `head_dim` | elements per head, of q, k and v alike |
//! | B | `block_len` | tokens in a block; the token at absolute position i lies in block ⌊i/B⌋ |
//! | M | `window_blocks` | past blocks that a block row still sees; may be 0 |
//! | F | `mem_len` | memory rows; 0 is plain block sliding window attention |
//! | C | `ring_rows` | rows of a slot's key ring |
//! | nb | `blocks` | blocks that a call's tokens touch |
//!
//! A [`Shape`] holds the sizes of a layer, a [`Spec`] adds the largest calls, a [`Plan`] is the kernels that a backend chose for it. Tensors
//! are [`View`]s: borrowed memory with a [`Layout`] of five axes `[batch, blocks, rows, heads, head_dim]`, any non-negative stride but a unit
//! one in `head_dim`. Callers with (batch, heads, tokens, dim) pass strides, not copies ([`Layout::heads_first`]); an input stride of 0
//! repeats. Elements are f32, f16 or bf16 ([`Dtype`]); `o` has the inputs' type or f32; `lse`, `m`, `z`, `sink` and `beta` are f32. Sums are
//! in f32.
//!
//! # 2. `attend`
//!
//! One softmax over the keys that a row sees. Two groups of rows, three segments of keys:
//!
//! | rows \ keys | window: the M past blocks | memory: rows of the previous update | current block |
//! |---|---|---|---|
//! | block rows (`q`) | all | all | causal, the row itself included |
//! | memory rows (`mem_q`) | none | all | all that are there |
//!
//! A block row at position i sees the key at position j iff `j <= i` and `⌊j/B⌋ >= ⌊i/B⌋ − M`, and every memory key of its block: M·B+1 to
//! (M+1)·B keys of a window that moves by whole blocks ([`Window::Blocks`]). With [`Window::Tokens`] it sees `i − w < j <= i` instead; memory
//! keys stay visible, and memory rows do not know of w. Over the visible j
//!
//! ```text
//! p_j ∝ exp(scale · q·k_j)      o = Σ p_j v_j      lse = ln Σ exp(scale · q·k_j)
//! ```
//!
//! * A row that sees no key has `o = +0`, `lse = −inf`. A row that sees one key returns its v, bit for bit in f32 (but for a zero's sign; and
//!   subnormal numbers of bf16 count as 0 where a backend says so, as `fam-cpu` does at the level `avx512bf16`). No finite number stands for
//!   −inf, and no epsilon sits in a denominator.
//! * A visible logit of −inf has weight 0. Bytes that no row of the call may see have no effect, even if they are NaN.
//! * `sink`: a logit per query head that joins every row's denominator with a value of zero; `lse` includes it. An otherwise empty row then
//!   has `o = +0`, `lse = sink`.
//! * Without `mem_q` the memory is *frozen*: attention sinks, a fixed prompt. That helps any pre-trained model. Feedback memory needs a model
//!   trained for it.
//!
//! ## Spans
//!
//! A [`Span`] names, for stream n of a call, its tokens `start .. start + len`, the position `origin` of the stream's first key, the number of
//! memory keys present, and the `slot`. **Cached tensors** (ring, linear cache, `mem_k`, `mem_v`, `m`, `z`) **are indexed by slot; tensors of
//! the call** (`q`, `o`, `lse`, `mem_q`, `mem_o`, new `k` and `v`, `infini_q`) **by n.** Entry i of `mem_q` and `mem_o` belongs to the call's
//! i-th block. One rule serves
//!
//! * a *step*: one whole block, both row groups in one launch;
//! * a *prefill*: the memory rows block after block (the caller's feed-forward between them is the only true recurrence), then all block rows
//!   of all blocks in one launch;
//! * *decode*: a few tokens inside a block, the memory rows in the call that completes it;
//! * *continuous batching*: other spans and slots for every stream.
//!
//! Spans are host values, checked before anything is enqueued, or lie in device memory, where the kernel reads and clamps them, so that a
//! captured graph can be replayed as the streams move on.
//!
//! ## The key ring
//!
//! `append` puts the key at position j into row `(j − origin) mod C` of its slot. C is a multiple of B that holds the window and the blocks of
//! a call: (M + nb)·B rows, or ⌈(w−1)/B⌉·B + nb·B. A row that block t overwrites held block t−M−1 or an older one, which nothing sees any
//! more. Softmax ignores the order of keys, so nothing is ever moved, and a slot's state does not grow with its stream.
//!
//! # 3. Compressive memory
//!
//! With σ(x) = x + 1 for x > 0 and exp(x) otherwise, and the state m `[D, D]`, z `[D]` of a slot and kv head, 0 at first:
//!
//! ```text
//! infini_read     a = σ(q) m / (σ(q)·z)          0 where z is all 0       o = g·a + (1−g)·o_local,   g = sigmoid(β_h)
//! infini_write    linear  m' = m + σ(k)ᵀ v       delta  m' = m + σ(k)ᵀ (v − σ(k) m / (σ(k)·z))       z' = z + Σ_t σ(k_t)
//! ```
//!
//! q and k carry no rotary position here (`infini_q`, `infini_k`). A segment is a block. Rows of a segment read what earlier segments wrote;
//! the gate applies in the first segment too. Only whole segments are written. The delta rule reads the old m and z for all keys of the segment
//! at once. a does not change when all of σ(q) is scaled, so a row whose q are all negative is shifted by its maximum first: the denominator
//! cannot underflow. `lse` stays that of the local attention.
//!
//! m and z have an axis of *entries*: segment i of a call reads entry `(state_entry + i) mod entries` and writes the one after it. Two entries
//! are a double buffer; nb + 1 keep every segment's state, as a backward pass wants it.
//!
//! # 4. `merge`
//!
//! Attention over two disjoint key sets is combined through their `lse`, up to rounding; −inf means an empty set. So keys can be split over
//! devices, or old ones be kept elsewhere.
//!
//! # 5. Streams
//!
//! [`Streams`] holds ring, memory, m, z and positions of a fixed number of slots for one layer, and composes the ops: set_memory, step,
//! commit, rollback, copy, reset, snapshot, restore. An engine with caches of its own uses the ops and loses nothing.
//!
//! # 6. Errors
//!
//! Sizes are checked when a [`Shape`] or [`Spec`] is built, abilities when a plan is made, arguments at the door of each op; each [`Error`]
//! names the field, its value and the rule. After an error of an op nothing was enqueued, but for [`Error::DeviceLost`]. No public function
//! panics; an index or a row number out of range, where a type offers them as a slice does, is the exception.
//!
//! | what | what happens |
//! |---|---|
//! | NaN or infinity in a visible q row | that row |
//! | NaN or infinity in visible k, v | rows of the call in tiles that load that key; other rows, heads and streams not in a bit |
//! | Σ_c \|q_c k_c\|, before or after the scale, beyond f32 | that row is unspecified; other rows not in a bit |
//! | a sum of visible \|v\| beyond f32 | `o` of that row is unspecified, `lse` is not |
//! | no stream, or no token | `Ok`, nothing is launched |
//! | an op, size or dtype that a backend lacks | [`Error::Unsupported`] or [`Error::LimitExceeded`] when the plan is made, never later |
//!
//! # 7. What holds on every backend
//!
//! Within the error bound: block by block = the dense mask over the whole sequence; step = prefill = decode; both row groups in one call = two
//! calls; any split of the keys, merged. Bit for bit: a row does not depend on keys it may not see, on the other streams of the batch, on slots
//! or on the number of threads; a stream cut at a block's boundary, with snapshot and restore between, gives the same; a repeat
//! repeats.
//!
//! # 8. The backward pass
//!
//! [`AttendBackward`], [`InfiniReadBackward`], [`InfiniWriteBackward`] and [`MergeBackward`] give the gradients of everything that the forward
//! ops read, spans aside. They have a forward op's arguments, what it returned, and for each `x` a `d_x`:
//!
//! * What belongs to one row of the call is written: `d_q`, `d_mem_q`, `d_infini_q`, `d_o_local`, the gradients of a merge's parts.
//! * What rows share is f32 and **added to**: `d_k`, `d_v`, `d_mem_k`, `d_mem_v`, `d_m`, `d_z`, `d_sink`, `d_beta`. A key collects from the rows
//!   of its block and of later ones, from memory rows, and from every query head of its group, in as many calls as the caller likes: the
//!   memory's recurrence takes one a block, the last block first. The caller clears them before the first.
//! * Saved from the forward pass are `lse` and `o`, where it is gated `o` before the gate ([`Attend::o_local`]): at g = 0.99 the gated one has
//!   lost it. [`Spec::saved_bytes`] counts them. Keys lie in linear caches, for a ring has forgotten, and m and z in an entry for every
//!   segment.
//! * Nothing is detached: gradients flow through window and memory keys, without which the memory does not form. A caller that
//!   wants to cut them leaves those outputs out.
//!
//! A NaN or an infinity in what the rows of a stream and kv head read, or in what arrives at them, leaves that stream's gradients of that
//! head unspecified, and `d_sink` and `d_beta` of its query heads; all others not in a bit. Where a sum on the way leaves f32, what it goes
//! into is unspecified.
//!
//! As in the forward pass, a row that sees no key passes nothing on, and bytes that no row of the call may see have no effect. Sums are made
//! in an order that depends on neither threads nor batch.
#![forbid(unsafe_code)]

mod append;
mod attend;
mod attend_backward;
mod backend;
mod door;
mod element;
mod error;
mod host;
mod infini;
mod infini_backward;
mod merge;
mod merge_backward;
#[doc(hidden)]
pub mod mutants;
mod shape;
mod snapshot;
mod span;
mod streams;
mod view;

pub use append::{Append, AppendMem, AppendRows, ReadRing};
pub use attend::{Attend, InfiniState, Keys, MemKeys, Rows};
pub use attend_backward::{AttendBackward, KeyGradients, RowsBackward};
pub use backend::{Backend, Device, KernelId, Op, Plan, Support};
pub use element::{Dtype, Element};
pub use error::{Error, Result};
pub use half::{bf16, f16};
pub use host::{Bytes, HostMemory};
pub use infini::{InfiniRead, InfiniWrite};
pub use infini_backward::{InfiniReadBackward, InfiniWriteBackward, StateGradients};
pub use merge::{Merge, Partial};
pub use merge_backward::{MergeBackward, PartialGradients};
pub use shape::{InfiniRule, MAX_ELEMENTS, Shape, ShapeBuilder, Spec, SpecBuilder, Window};
pub use span::{Span, Spans};
pub use streams::{Pending, Step, StepInfini, Streams};
pub use view::{Layout, Memory, View, ViewMut};
