//! The executable specification of attention with a memory: every op of [`fam_core`] in f64, slow on purpose, and Algorithm 2 of
//! TransformerFAM whole ([`layer`]).
//!
//! | page | op | source |
//! |---|---|---|
//! | [`attend()`] | one joint softmax over window, memory and the current block | TransformerFAM (arXiv 2404.09173 v3), Alg. 1 and 2 |
//! | [`infini_retrieve`], [`gate`], [`infini_write`] | the compressive memory, read, gated and written | Infini-attention (arXiv 2404.07143 v2), Eq. 5–11 |
//! | [`merge()`] | two disjoint key sets | the usual log-sum-exp identity |
//! | [`layer`] | what surrounds the attention: projections, residual, feed-forward, the way of the memory | TransformerFAM, Alg. 2 and App. B |
//!
//! Each op is written as its formula reads: shapes first, numbered passes, one row at a time, naive two-pass softmax, no tiles and
//! no reordering. What makes it right is that it can be read beside the papers. Beside its result each op returns the magnitudes
//! that the rounding error of any other implementation is bounded by, so that tolerances are derived and not chosen.
//!
//! Inputs are whatever the kernel under test was given, widened to f64: rounded to f16 first, where the kernel reads f16.
//!
//! ```
//! use fam_core::{Shape, Span, Window};
//! use fam_ref::{Array, Attend, attend};
//!
//! // Two blocks of two tokens; a row sees its own block up to itself, and two memory rows.
//! let shape = Shape::builder().head_dim(2).block_len(2).window(Window::Blocks(0)).mem_len(2).build()?;
//! let (q, k, v) = (Array::zeros([1, 4, 1, 2]), Array::zeros([1, 4, 1, 2]), Array::full([1, 4, 1, 2], 3.0));
//! let (mem_k, mem_v) = (Array::zeros([1, 2, 2, 1, 2]), Array::zeros([1, 2, 2, 1, 2]));
//! let attended = attend(&Attend {
//!     shape: &shape,
//!     spans: &[Span::new(0, 0, 4).with_mem_rows(2)],
//!     q: Some(&q),
//!     mem_q: None, // frozen memory
//!     k: &k,
//!     v: &v,
//!     mem_k: Some(&mem_k),
//!     mem_v: Some(&mem_v),
//!     sink: None,
//! })?;
//! // All logits are equal, so o is the share of visible keys that hold a 3: 1 of 3, then 2 of 4, in each block.
//! let o = attended.rows.unwrap().o;
//! assert_eq!([0, 1, 2, 3].map(|t| o[[0, 0, t, 0, 0]]), [1.0, 1.5, 1.0, 1.5]);
//! # Ok::<(), fam_core::Error>(())
//! ```

#![forbid(unsafe_code)]

mod array;
mod attend;
mod attend_backward;
mod dense;
mod infini_backward;
mod infini_read;
mod infini_write;
pub mod layer;
mod merge;
mod merge_backward;

pub use array::Array;
pub use attend::{Attend, Attended, Row, Rows, attend};
pub use attend_backward::{AttendGradients, AttendUpstream, attend_backward};
pub use infini_backward::{
    GateGradients, RetrieveGradients, WriteGradients, gate_backward, infini_retrieve_backward, infini_write_backward,
};
pub use infini_read::{Retrieved, gate, infini_retrieve, sigma};
pub use infini_write::{Written, infini_write};
pub use merge::merge;
pub use merge_backward::{PartGradients, merge_backward};
