//! The threads that candle computes on, lent to fam.

use fam::cpu::{Executor, Par};
use rayon::prelude::*;

/// The pool of the calling thread: candle's own inside `Device::with_context`, rayon's global one elsewhere.
struct Rayon;

impl Executor for Rayon {
    fn threads(&self) -> usize {
        rayon::current_num_threads()
    }

    fn run(&self, tasks: usize, body: &(dyn Fn(usize) + Sync)) {
        (0..tasks).into_par_iter().for_each(body);
    }
}

/// fam's queue: a second pool beside candle's would compete with it for the same cores.
pub fn queue() -> Par<'static> {
    Par::Caller(&Rayon)
}
