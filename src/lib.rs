//! Attention kernels with a memory.
#![forbid(unsafe_code)]
pub use fam_core::*;
