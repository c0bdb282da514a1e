//! Attention with a memory on the CPU
