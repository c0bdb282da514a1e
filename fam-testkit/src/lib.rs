//! Conformance tests for attention backends: cases, derived tolerances, case files and a runner
