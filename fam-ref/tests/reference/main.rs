//! The reference against formulations that share no code with it, and against results for real activations computed elsewhere.

mod attend;
mod common;
mod gradients;
mod infini;
mod layer;
mod real_activations;
mod refusals;
