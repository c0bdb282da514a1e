//! What a device can do at most, as the kernels use it: the roof that a figure is a share of.

use crate::Wgpu;
use crate::call::{Call, T};
use crate::pipeline::{Dispatch, Shader, enqueue};
use fam_core::{Backend, Device, Op, Result, Shape};
use std::time::Instant;

/// Turns of a shader's loop.
const ROUNDS: usize = 1024;
/// A rate is of so many seconds at least.
const SECONDS: f64 = 0.01;
/// Bytes that are copied: several times the last cache of most devices.
const COPIED_BYTES: u64 = 256 << 20;

impl Wgpu {
    /// f32 multiplications and additions a second, in registers.
    ///
    /// # Errors
    /// Those of [`Backend::plan`]; [`fam_core::Error::DeviceLost`]. So do the other probes.
    pub fn multiply_adds(&self) -> Result<f64> {
        // Eight vectors of four.
        self.rate(false, 2 * 8 * 4)
    }

    /// f32 exponentials a second, by the method of the softmax, in registers.
    ///
    /// # Errors
    /// As [`Wgpu::multiply_adds`].
    pub fn exponentials(&self) -> Result<f64> {
        self.rate(true, 2 * 4)
    }

    /// Bytes that a copy in the device's memory reads and writes a second.
    ///
    /// # Errors
    /// As [`Wgpu::multiply_adds`]; [`fam_core::Error::OutOfMemory`].
    pub fn copied_bytes(&self) -> Result<f64> {
        let bytes = COPIED_BYTES.min(self.gpu.limits.max_buffer_size / 2);
        let (source, target) = (self.alloc(bytes)?, self.alloc(bytes)?);
        let mut encoder = self.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let mut copy = || {
            encoder.copy_buffer_to_buffer(source.buffer(), 0, target.buffer(), 0, bytes);
            let start = Instant::now();
            self.synchronize(&mut encoder)?;
            Ok(start.elapsed().as_secs_f64())
        };
        copy()?;
        Ok(2.0 * bytes as f64 / copy()?)
    }

    /// Operations a second of the probe's shader, of which a thread does `each` in each round.
    fn rate(&self, exponentials: bool, each: usize) -> Result<f64> {
        let shape = Shape::builder().build()?;
        let plan = self.plan(&shape.spec(1, 1).ops(&[Op::Merge]).build()?)?;
        let shader = Shader { name: "probe", text: include_str!("probe.wgsl"), tensors: &[T::O] };
        let constants = format!("const EXPONENTIALS = {exponentials};\nconst ROUNDS = {ROUNDS}u;\n");
        let kernel = self.gpu.kernel(shader, &constants)?;
        let mut encoder = self.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let mut time = |groups| {
            enqueue(&mut encoder, &[(&Call::without_spans(&plan), &[Dispatch { kernel: &kernel, groups }])])?;
            let start = Instant::now();
            self.synchronize(&mut encoder)?;
            Ok(start.elapsed().as_secs_f64())
        };
        // The first turn compiles.
        time(1)?;
        let mut groups = 64;
        loop {
            let seconds = time(groups)?;
            if seconds >= SECONDS || groups >= 1 << 24 {
                return Ok((groups as usize * 64 * ROUNDS * each) as f64 / seconds);
            }
            groups *= 2;
        }
    }
}
