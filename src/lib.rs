//! Attention kernels with a memory: TransformerFAM and Infini-attention behind one contract.
//!
//! This crate re-exports [`fam_core`] (the contract: read its page first) and the backends that its features switch on: `cpu` (default), `wgpu`.
//! Code that knows its backend uses it directly; code that does not calls [`select`] and matches the enum once. The page
//! `docs/embedding.md` is for engines: layouts, loops over layers, continuous batching, and what is not offered.
#![doc = concat!("\n\n```\n", include_str!("../examples/readme.rs"), "```\n")]
#![forbid(unsafe_code)]

mod select;

pub use fam_core::*;
#[cfg(feature = "cpu")]
pub use fam_cpu as cpu;
#[cfg(feature = "wgpu")]
pub use fam_wgpu as wgpu;
pub use select::{BackendName, Candidate, Selected, Selection, candidates, select};

/// The page for engines, whose programs are tests.
#[cfg(all(doctest, feature = "cpu"))]
#[doc = include_str!("../docs/embedding.md")]
struct Embedding;

/// Engines move streams between threads.
#[cfg(feature = "cpu")]
const _: () = {
    const fn is_shared<T: Send + Sync>() {}
    is_shared::<Streams<cpu::Cpu>>();
};
