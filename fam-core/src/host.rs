//! Backends whose memory is the host's own bytes: the [`Device`] that they have in common.

use crate::backend::lacks;
use crate::{Backend, Device, Error, ReadRing, Result};
use std::borrow::{Borrow, BorrowMut};
use std::ops::Range;

/// A cache line.
const ALIGN: usize = 64;

/// A backend over bytes of the host whose operations are done when they return. To say so is to have a [`Device`], with [`Bytes`] as
/// memory; `read_ring` is refused where [`HostMemory::unpack_ring`] is not there.
pub trait HostMemory: Backend<Mem = [u8]> + Sized {
    /// [`Device::check_queue`]. Default: every queue takes whole operations.
    ///
    /// # Errors
    /// As [`Device::check_queue`].
    fn check_whole(&self, _queue: &Self::Queue<'_>) -> Result<()> {
        Ok(())
    }

    /// [`Device::read_ring`]: what packs the ring knows how to unpack it. Default: refused.
    ///
    /// # Errors
    /// As [`Device::read_ring`].
    fn unpack_ring(&self, _plan: &Self::Plan, _queue: &mut Self::Queue<'_>, _args: ReadRing<'_, [u8]>) -> Result<()> {
        Err(lacks(self, "read_ring"))
    }
}

impl<B: HostMemory> Device for B {
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

    fn synchronize(&self, _queue: &mut B::Queue<'_>) -> Result<()> {
        Ok(())
    }

    fn check_queue(&self, queue: &B::Queue<'_>) -> Result<()> {
        self.check_whole(queue)
    }

    fn clear(&self, queue: &mut B::Queue<'_>, mem: &mut [u8], at: Range<u64>) -> Result<()> {
        self.check_whole(queue)?;
        let at = within("clear", at, mem.len())?;
        mem[at].fill(0);
        Ok(())
    }

    fn copy_within(&self, queue: &mut B::Queue<'_>, mem: &mut [u8], from: Range<u64>, to: u64) -> Result<()> {
        self.check_whole(queue)?;
        let len = from.end.saturating_sub(from.start);
        let from = within("copy_within.from", from, mem.len())?;
        let to = within("copy_within.to", to..to.saturating_add(len), mem.len())?;
        if from.start < to.end && to.start < from.end {
            return Err(Error::invalid("copy_within.to", format!("{to:?}"), format!("no overlap with from = {from:?}")));
        }
        mem.copy_within(from, to.start);
        Ok(())
    }

    fn read_ring(&self, plan: &B::Plan, queue: &mut B::Queue<'_>, args: ReadRing<'_, [u8]>) -> Result<()> {
        self.unpack_ring(plan, queue, args)
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

/// Owned host memory: zeros at first, aligned to a cache line.
#[derive(Debug)]
pub struct Bytes {
    data: Vec<u8>,
    first: usize,
    len: usize,
}

impl Bytes {
    /// # Errors
    /// [`Error::OutOfMemory`].
    fn zeroed(bytes: u64) -> Result<Self> {
        let out_of_memory = || Error::OutOfMemory { requested: bytes };
        let len = usize::try_from(bytes).map_err(|_| out_of_memory())?;
        let all = len.checked_add(ALIGN).ok_or_else(out_of_memory)?;
        let mut data = Vec::new();
        data.try_reserve_exact(all).map_err(|_| out_of_memory())?;
        data.resize(all, 0);
        // The vector never grows, so its first byte stays where it is.
        let first = data.as_ptr().align_offset(ALIGN);
        Ok(Bytes { data, first, len })
    }
}

impl Borrow<[u8]> for Bytes {
    fn borrow(&self) -> &[u8] {
        &self.data[self.first..self.first + self.len]
    }
}

impl BorrowMut<[u8]> for Bytes {
    fn borrow_mut(&mut self) -> &mut [u8] {
        &mut self.data[self.first..self.first + self.len]
    }
}
