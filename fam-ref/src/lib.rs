//! Feedback attention memory and Infini-attention in f64, slow on purpose: the executable specification
