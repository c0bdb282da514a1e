//! The life of [`fam::Streams`] on the CPU: everything a slot can go through, what it refuses, and what must leave it untouched.
//! State is compared through snapshots, which hold all of it, outputs byte for byte.

mod corruption;
mod faults;
mod faulty;
mod fixture;
mod life_cycle;
mod refusals;
mod snapshots;

use fam::cpu::Cpu;
use fam::{Backend, Pending, Streams};

/// An engine moves streams between threads and shares plans.
const _: () = {
    const fn is_send<T: Send>() {}
    const fn is_send_and_sync<T: Send + Sync>() {}
    is_send::<Cpu>();
    is_send::<Streams<Cpu>>();
    is_send::<Pending<'_>>();
    is_send_and_sync::<<Cpu as Backend>::Plan>();
};
