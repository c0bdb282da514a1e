//! Owning memory and moving bytes: [`fam_core::Device`].

use crate::parallel::check_whole;
use crate::{Bytes, Cpu, CpuPlan, Par, append};
use fam_core::{Device, Error, ReadRing, Result};
use std::ops::Range;

impl Device for Cpu {
    type Owned = Bytes;

    fn alloc(&self, bytes: u64) -> Result<Bytes> {
        Bytes::zeroed(bytes)
    }

    fn upload(&self, mem: &mut [u8], offset: u64, bytes: &[u8]) -> Result<()> {
        let at = within("upload", offset..offset.saturating_add(bytes.len() as u64), mem.len())?;
        mem[at].copy_from_slice(bytes);
        Ok(())
    }

    fn download(&self, mem: &[u8], offset: u64, bytes: &mut [u8]) -> Result<()> {
        let at = within("download", offset..offset.saturating_add(bytes.len() as u64), mem.len())?;
        bytes.copy_from_slice(&mem[at]);
        Ok(())
    }

    /// All of it, or nothing: a step consists of several ops.
    fn check_queue(&self, queue: &Par<'_>) -> Result<()> {
        check_whole(queue)
    }

    /// Nothing to wait for: operations are done when they return.
    fn synchronize(&self, _queue: &mut Par<'_>) -> Result<()> {
        Ok(())
    }

    fn clear(&self, queue: &mut Par<'_>, mem: &mut [u8], at: Range<u64>) -> Result<()> {
        check_whole(queue)?;
        let at = within("clear", at, mem.len())?;
        mem[at].fill(0);
        Ok(())
    }

    fn copy_within(&self, queue: &mut Par<'_>, mem: &mut [u8], from: Range<u64>, to: u64) -> Result<()> {
        check_whole(queue)?;
        let len = from.end.saturating_sub(from.start);
        let from = within("copy_within.from", from, mem.len())?;
        let to = within("copy_within.to", to..to.saturating_add(len), mem.len())?;
        if from.start < to.end && to.start < from.end {
            return Err(Error::invalid("copy_within.to", format!("{to:?}"), format!("no overlap with from = {from:?}")));
        }
        mem.copy_within(from, to.start);
        Ok(())
    }

    fn read_ring(&self, plan: &CpuPlan, queue: &mut Par<'_>, args: ReadRing<'_, [u8]>) -> Result<()> {
        append::read_ring(plan, queue, args)
    }
}

/// A range of bytes in memory of `len` bytes.
fn within(field: &'static str, range: Range<u64>, len: usize) -> Result<Range<usize>> {
    if range.start > range.end || range.end > len as u64 {
        return Err(Error::invalid(
            field,
            format!("bytes {}..{}", range.start, range.end),
            format!("an ascending range in {len} bytes"),
        ));
    }
    Ok(range.start as usize..range.end as usize)
}
