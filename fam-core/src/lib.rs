//! fam-core
#![forbid(unsafe_code)]

mod append;
mod attend;
mod backend;
mod element;
mod error;
mod infini;
mod merge;
#[doc(hidden)]
pub mod mutants;
mod shape;
mod snapshot;
mod span;
mod streams;
mod view;

pub use append::{Append, AppendMem, AppendRows};
pub use attend::{Attend, InfiniState, Keys, MemKeys, Rows};
pub use backend::{Backend, Device, KernelId, Op, Plan, Support};
pub use element::{Dtype, Element};
pub use error::{Error, Result};
pub use half::{bf16, f16};
pub use infini::{InfiniRead, InfiniWrite};
pub use merge::{Merge, Partial};
pub use shape::{InfiniRule, MAX_ELEMENTS, Shape, ShapeBuilder, Spec, SpecBuilder, Window};
pub use span::{Span, Spans};
pub use streams::{Pending, Step, StepInfini, Streams};
pub use view::{Layout, Memory, View, ViewMut};
