//! Memory of this backend: a range of a buffer, since engines give many tensors one buffer.

use fam_core::{Dtype, Error, Memory, Result};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Range;

/// Bytes of a [`wgpu::Buffer`]. The handle is counted: a borrow of a region may end before the work that uses its bytes does.
#[derive(Clone, Debug)]
pub struct Region {
    buffer: wgpu::Buffer,
    bytes: Range<u64>,
}

impl Region {
    /// Bytes `bytes` of a buffer. Any offset will do that the tensors' elements may have; none needs to be a multiple of 256.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a range beyond the buffer, a buffer without the usage `STORAGE`, or one whose size is no multiple of 4.
    pub fn new(buffer: &wgpu::Buffer, bytes: Range<u64>) -> Result<Self> {
        if !buffer.usage().contains(wgpu::BufferUsages::STORAGE) {
            return Err(Error::invalid("buffer.usage", format!("{:?}", buffer.usage()), "with STORAGE"));
        }
        let size = buffer.size();
        if !size.is_multiple_of(4) {
            return Err(Error::invalid("buffer.size", size, "a multiple of 4 bytes: shaders read whole words"));
        }
        if bytes.start > bytes.end || bytes.end > size {
            return Err(Error::invalid("bytes", format!("{bytes:?}"), format!("an ascending range in {size} bytes")));
        }
        Ok(Region { buffer: buffer.clone(), bytes })
    }

    /// All of a buffer.
    ///
    /// # Errors
    /// As [`Region::new`].
    pub fn whole(buffer: &wgpu::Buffer) -> Result<Self> {
        Self::new(buffer, 0..buffer.size())
    }

    /// The buffer.
    pub fn buffer(&self) -> &wgpu::Buffer {
        &self.buffer
    }

    /// The range of its bytes.
    pub fn range(&self) -> Range<u64> {
        self.bytes.clone()
    }
}

impl Memory for Region {
    fn bytes(&self) -> u64 {
        self.bytes.end - self.bytes.start
    }

    fn place(&self) -> Option<(u64, u64)> {
        let mut hasher = DefaultHasher::new();
        self.buffer.hash(&mut hasher);
        Some((hasher.finish(), self.bytes.start))
    }

    fn is_aligned(&self, dtype: Dtype) -> bool {
        self.bytes.start.is_multiple_of(dtype.bytes() as u64)
    }
}
