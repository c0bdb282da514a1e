//! fam's attention in [candle](candle_core): what embedding it in an engine looks like.
//!
//! | item | what |
//! |---|---|
//! | [`Attention`] | `attend` as a custom op with autograd: tensors in, tensors out, their strides passed as they are |
//! | [`Stream`] | inference: one layer's key ring, memory and positions, constant in the length of the stream |
//! | [`Layer`] | a TransformerFAM layer (Algorithm 2) of candle tensors, differentiable through its memory |
//! | [`Naive`] | the same attention from candle's own matmul, mask and softmax: a yardstick |
//!
//! Tensors are (batch, heads, rows, dim), as attention code in candle has them: transposed views of what a projection returns. Nothing is
//! copied on the way in or out; only `dim` must have unit stride. The operations run on the threads that candle computes on.
#![forbid(unsafe_code)]

mod attention;
mod backward;
mod layer;
mod naive;
mod pack;
mod stream;
mod threads;
mod view;

pub use attention::{Attended, Attends, Attention};
pub use layer::{Layer, LayerState};
pub use naive::Naive;
pub use pack::Packing;
pub use stream::Stream;

/// fam's error as candle's.
fn wrap(error: fam::Error) -> candle_core::Error {
    candle_core::Error::wrap(error)
}
