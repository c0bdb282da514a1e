//! The CPU's memory is the host's: [`fam_core::Device`] comes with that.

use crate::parallel::check_whole;
use crate::{Cpu, CpuPlan, Par, append};
use fam_core::{HostMemory, ReadRing, Result};

impl HostMemory for Cpu {
    /// All of it, or nothing: a step consists of several ops.
    fn check_whole(&self, queue: &Par<'_>) -> Result<()> {
        check_whole(queue)
    }

    fn unpack_ring(&self, plan: &CpuPlan, queue: &mut Par<'_>, args: ReadRing<'_, [u8]>) -> Result<()> {
        append::read_ring(plan, queue, args)
    }
}
