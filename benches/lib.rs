//! Criterion benches, one file per op.
