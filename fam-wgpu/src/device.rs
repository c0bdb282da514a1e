//! Adapters of this machine, and the [`fam_core::Device`] that streams, tests and the command line need.

use crate::pipeline::{self, lock};
use crate::{Region, Wgpu, WgpuPlan, append};
use fam_core::{Device, Error, Memory, ReadRing, Result};
use std::ops::Range;
use std::sync::mpsc::channel;

/// A GPU, or a program that computes as one, that wgpu has found.
#[derive(Clone, Debug)]
pub struct Adapter {
    adapter: wgpu::Adapter,
}

/// All adapters of this machine, GPUs before software; where the environment variable `WGPU_ADAPTER_NAME` is set, those whose name has it in it.
/// `WGPU_VALIDATION=1` asks for the validation layers.
pub async fn adapters() -> Vec<Adapter> {
    let flags = wgpu::InstanceFlags::empty().with_env();
    let backends = wgpu::Backends::VULKAN | wgpu::Backends::METAL | wgpu::Backends::DX12;
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor {
        backends,
        flags,
        ..wgpu::InstanceDescriptor::new_without_display_handle()
    });
    let mut adapters: Vec<_> =
        instance.enumerate_adapters(backends).await.into_iter().map(|adapter| Adapter { adapter }).collect();
    if let Ok(name) = std::env::var("WGPU_ADAPTER_NAME") {
        adapters.retain(|adapter| adapter.info().name.to_lowercase().contains(&name.to_lowercase()));
    }
    adapters.sort_by_key(Adapter::is_software);
    adapters
}

impl Adapter {
    /// What wgpu knows of it.
    pub fn info(&self) -> wgpu::AdapterInfo {
        self.adapter.get_info()
    }

    /// Whether it is a program on the CPU, such as lavapipe or SwiftShader.
    pub fn is_software(&self) -> bool {
        self.info().device_type == wgpu::DeviceType::Cpu
    }

    /// The features that it has.
    pub fn features(&self) -> wgpu::Features {
        self.adapter.features()
    }

    /// The limits that it has.
    pub fn limits(&self) -> wgpu::Limits {
        self.adapter.limits()
    }

    /// A device of one's own with all that the adapter has and shaders use, or with `limits` and no more, and a backend on it that notices its loss.
    ///
    /// # Errors
    /// [`Error::BackendUnavailable`] where the driver gives none.
    pub async fn open(&self, limits: Option<wgpu::Limits>) -> Result<Wgpu> {
        let descriptor = wgpu::DeviceDescriptor {
            label: Some("fam"),
            required_features: if limits.is_some() {
                wgpu::Features::empty()
            } else {
                self.adapter.features() & pipeline::FEATURES
            },
            required_limits: limits.unwrap_or_else(|| self.adapter.limits()),
            ..Default::default()
        };
        let unavailable =
            |error: wgpu::RequestDeviceError| Error::BackendUnavailable { backend: "wgpu", reason: error.to_string() };
        let (device, queue) = self.adapter.request_device(&descriptor).await.map_err(unavailable)?;
        let wgpu = Wgpu::new(&device, &queue)?;
        let lost = wgpu.gpu.lost();
        device.set_device_lost_callback(move |reason, message| {
            lock(&lost).get_or_insert(format!("{reason:?}: {message}"));
        });
        Ok(wgpu)
    }
}

/// Bytes `bytes` of a region as bytes of its buffer.
fn within(field: &'static str, mem: &Region, bytes: Range<u64>) -> Result<Range<u64>> {
    if bytes.start > bytes.end || bytes.end > mem.bytes() {
        return Err(Error::invalid(
            field,
            format!("bytes {}..{}", bytes.start, bytes.end),
            format!("an ascending range in {} bytes", mem.bytes()),
        ));
    }
    let first = mem.range().start;
    Ok(first + bytes.start..first + bytes.end)
}

/// The same in whole words.
fn words(bytes: &Range<u64>) -> Range<u64> {
    bytes.start - bytes.start % 4..bytes.end.next_multiple_of(4)
}

impl Wgpu {
    fn encoder(&self) -> wgpu::CommandEncoder {
        self.gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some("fam") })
    }

    fn submit(&self, encoder: wgpu::CommandEncoder) -> Result<()> {
        self.gpu.scoped(0, || {
            self.gpu.queue.submit([encoder.finish()]);
        })
    }

    fn wait(&self) -> Result<()> {
        self.gpu.poll(wgpu::PollType::wait_indefinitely())
    }

    fn write(&self, buffer: &wgpu::Buffer, offset: u64, words: &[u8]) -> Result<()> {
        self.gpu.scoped(words.len() as u64, || {
            self.gpu.queue.write_buffer(buffer, offset, words);
            self.gpu.queue.submit([]);
        })
    }

    /// Whole words of a buffer.
    fn read(&self, buffer: &wgpu::Buffer, words: Range<u64>) -> Result<Vec<u8>> {
        let size = words.end - words.start;
        if size == 0 {
            return Ok(Vec::new());
        }
        let staging = self.gpu.buffer("fam: download", size, wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST)?;
        let mut encoder = self.encoder();
        encoder.copy_buffer_to_buffer(buffer, words.start, &staging, 0, size);
        self.submit(encoder)?;
        let (send, receive) = channel();
        // On a device that is lost nothing before this is an error, and this is one.
        self.gpu.scoped(0, || {
            staging.map_async(wgpu::MapMode::Read, .., move |mapped| {
                let _ = send.send(mapped);
            });
        })?;
        self.wait()?;
        let lost = |reason: String| Error::DeviceLost { reason };
        receive.recv().map_err(|error| lost(error.to_string()))?.map_err(|error| lost(error.to_string()))?;
        let view = staging.get_mapped_range(..).map_err(|error| lost(error.to_string()))?;
        Ok(view.to_vec())
    }
}

impl Device for Wgpu {
    type Owned = Region;

    fn alloc(&self, bytes: u64) -> Result<Region> {
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
        Region::new(&self.gpu.buffer("fam", bytes, usage)?, 0..bytes)
    }

    fn upload(&self, mem: &mut Region, offset: u64, bytes: &[u8]) -> Result<()> {
        self.gpu.check()?;
        let at = within("upload", mem, offset..offset.saturating_add(bytes.len() as u64))?;
        let words = words(&at);
        if words == at {
            self.write(mem.buffer(), at.start, bytes)?;
        } else if !bytes.is_empty() {
            // A buffer is written in whole words: those at the ends are read first.
            let mut whole = vec![0; (words.end - words.start) as usize];
            whole[..4].copy_from_slice(&self.read(mem.buffer(), words.start..words.start + 4)?);
            let last = whole.len() - 4;
            whole[last..].copy_from_slice(&self.read(mem.buffer(), words.end - 4..words.end)?);
            whole[(at.start - words.start) as usize..][..bytes.len()].copy_from_slice(bytes);
            self.write(mem.buffer(), words.start, &whole)?;
        }
        Ok(())
    }

    fn download(&self, mem: &Region, offset: u64, bytes: &mut [u8]) -> Result<()> {
        self.gpu.check()?;
        let at = within("download", mem, offset..offset.saturating_add(bytes.len() as u64))?;
        let words = words(&at);
        let whole = self.read(mem.buffer(), words.clone())?;
        bytes.copy_from_slice(&whole[(at.start - words.start) as usize..][..bytes.len()]);
        Ok(())
    }

    fn synchronize(&self, encoder: &mut wgpu::CommandEncoder) -> Result<()> {
        self.gpu.check()?;
        let encoded = std::mem::replace(encoder, self.encoder());
        self.submit(encoded)?;
        self.wait()
    }

    fn clear(&self, encoder: &mut wgpu::CommandEncoder, mem: &mut Region, at: Range<u64>) -> Result<()> {
        self.gpu.check()?;
        let at = whole_words("clear", within("clear", mem, at)?)?;
        if at.start < at.end {
            has_usage("clear", mem, wgpu::BufferUsages::COPY_DST)?;
            encoder.clear_buffer(mem.buffer(), at.start, Some(at.end - at.start));
        }
        Ok(())
    }

    fn copy_within(&self, encoder: &mut wgpu::CommandEncoder, mem: &mut Region, from: Range<u64>, to: u64) -> Result<()> {
        self.gpu.check()?;
        let size = from.end.saturating_sub(from.start);
        let from = whole_words("copy_within.from", within("copy_within.from", mem, from)?)?;
        let to = whole_words("copy_within.to", within("copy_within.to", mem, to..to.saturating_add(size))?)?;
        if from.start < to.end && to.start < from.end {
            return Err(Error::invalid("copy_within.to", format!("{to:?}"), format!("no overlap with from = {from:?}")));
        }
        if size > 0 {
            has_usage("copy_within", mem, wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST)?;
            // wgpu copies between buffers only.
            let staging = self.gpu.buffer("fam: copy", size, wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST)?;
            encoder.copy_buffer_to_buffer(mem.buffer(), from.start, &staging, 0, size);
            encoder.copy_buffer_to_buffer(&staging, 0, mem.buffer(), to.start, size);
        }
        Ok(())
    }

    fn read_ring(&self, plan: &WgpuPlan, encoder: &mut wgpu::CommandEncoder, args: ReadRing<'_, Region>) -> Result<()> {
        append::read_ring(plan, encoder, args)
    }
}

/// Refuses a buffer for which an encoder would take the command, and be of no use from then on.
fn has_usage(field: &'static str, mem: &Region, usage: wgpu::BufferUsages) -> Result<()> {
    match mem.buffer().usage() {
        given if given.contains(usage) => Ok(()),
        given => Err(Error::invalid(field, format!("a buffer for {given:?}"), format!("one for {usage:?}"))),
    }
}

/// Refuses what is no whole number of words: encoders copy and clear only those.
fn whole_words(field: &'static str, bytes: Range<u64>) -> Result<Range<u64>> {
    match words(&bytes) == bytes {
        true => Ok(bytes),
        false => Err(Error::invalid(field, format!("bytes {bytes:?}"), "multiples of 4")),
    }
}
