//! Attention with a memory on any GPU: every forward operation of [`fam_core`] as a WGSL compute shader, through [`wgpu`].
//!
//! A backend is made of the caller's device and queue; operations encode into the caller's encoder and read and write ranges of the caller's
//! buffers ([`Region`]). They submit nothing, wait for nothing and make no device memory but what the queue's own `write_buffer` takes for some
//! hundred bytes. What the encoder holds when it is submitted is done in order; a step that is never submitted has done nothing.
//!
//! wgpu counts references: a borrow of a [`Region`] may end before the work does. A [`Wgpu`] remembers the bind groups of its calls, and with them
//! some hundred buffers, as long as it lives.
//!
//! WGSL may assume that numbers are finite, and take subnormal ones for 0. So a NaN or an infinity in a query leaves its row, and in a key or value the rows of the call
//! that see it, or share a tile with one that does, unspecified; other rows do not change in a bit, and what no row sees has no effect.

#![deny(unsafe_code)]

mod append;
mod attend;
mod call;
mod device;
mod few;
mod infini_read;
mod infini_write;
mod load;
mod merge;
#[cfg(fam_mutants)]
mod mutants;
#[allow(unsafe_code, reason = "unchecked shader modules, where they are asked for")]
mod pipeline;
#[cfg(feature = "probe")]
mod probe;
mod region;
mod tile;

pub use device::{Adapter, adapters};
#[cfg(fam_mutants)]
pub use mutants::MUTANTS;
pub use pipeline::FEATURES;
pub use region::Region;
pub use tile::{BLOCK_N, FEW_ROWS};
pub use wgpu;

use call::{Pool, block_words};
use fam_core::{
    Append, Attend, Backend, Dtype, Error, InfiniRead, InfiniWrite, KernelId, Merge, Op, Plan, Result, Spec, Support, Window,
};
use pipeline::{Gpu, Kernel, Shader};
use std::sync::Arc;

/// A device of wgpu as a backend. Clones share what was compiled.
#[derive(Clone, Debug)]
pub struct Wgpu {
    gpu: Arc<Gpu>,
}

impl Wgpu {
    /// A backend on the caller's device. No callback is installed on it: where the caller hears that the device is lost, it says so with
    /// [`Wgpu::set_lost`].
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn new(device: &wgpu::Device, queue: &wgpu::Queue) -> Result<Self> {
        Ok(Wgpu { gpu: Arc::new(Gpu::new(device, queue, false)?) })
    }

    /// The same with shaders that check neither their indices nor their loops. All of them follow from arguments that were validated; the device
    /// itself may still check.
    ///
    /// # Errors
    /// As [`Wgpu::new`].
    pub fn unchecked(device: &wgpu::Device, queue: &wgpu::Queue) -> Result<Self> {
        Ok(Wgpu { gpu: Arc::new(Gpu::new(device, queue, true)?) })
    }

    /// The device.
    pub fn device(&self) -> &wgpu::Device {
        &self.gpu.device
    }

    /// The queue.
    pub fn queue(&self) -> &wgpu::Queue {
        &self.gpu.queue
    }

    /// Whether the device is a program on the CPU, such as lavapipe or SwiftShader.
    pub fn is_software(&self) -> bool {
        self.gpu.device.adapter_info().device_type == wgpu::DeviceType::Cpu
    }

    /// Notes that the device is lost: from now on every call fails with [`Error::DeviceLost`].
    pub fn set_lost(&self, reason: impl Into<String>) {
        pipeline::lock(&self.gpu.lost()).get_or_insert(reason.into());
    }

    /// The WGSL of every kernel that this device's plans have asked for so far, sorted; the entry point is `main`. For a caller's own cache of
    /// pipelines, and for checks by other compilers.
    pub fn shaders(&self) -> Vec<String> {
        self.gpu.texts()
    }

    /// The variant of the kernels, and why it is this one.
    pub fn variant(&self) -> (&'static str, String) {
        variant(&self.gpu.limits, self.gpu.features)
    }
}

/// The variant of the kernels of a device, and why it is this one.
fn variant(limits: &wgpu::Limits, features: wgpu::Features) -> (&'static str, String) {
    let together = attend::are_together(limits);
    let has_subgroups = features.contains(wgpu::Features::SUBGROUP);
    let has_f16 = features.contains(wgpu::Features::SHADER_F16);
    let name = match (together, has_subgroups, has_f16) {
        (true, true, true) => "wide-subgroup-f16",
        (true, true, false) => "wide-subgroup",
        (true, false, true) => "wide-f16",
        (true, false, false) => "wide",
        (false, true, true) => "baseline-subgroup-f16",
        (false, true, false) => "baseline-subgroup",
        (false, false, true) => "baseline-f16",
        (false, false, false) => "baseline",
    };
    let dispatches = if together { "one dispatch" } else { "two dispatches" };
    let maxima = if has_subgroups { "subgroups where they are eight threads or more" } else { "workgroup memory" };
    let f16 = if has_f16 { "the device's conversion" } else { "its bits" };
    let buffers = limits.max_storage_buffers_per_shader_stage;
    let why =
        format!("{buffers} storage buffers a shader, so block and memory rows in {dispatches}; maxima by {maxima}; f16 by {f16}");
    (name, why)
}

/// What a device with these limits and features would do for `spec`: [`Backend::support`] without a device.
///
/// # Errors
/// As [`Backend::support`].
pub fn support(spec: &Spec, limits: &wgpu::Limits, features: wgpu::Features) -> Result<Support> {
    let shape = spec.shape();
    let (dtype, d) = (shape.dtype(), shape.head_dim());
    let limit = |what, requested, max| match requested > max {
        true => Err(Error::LimitExceeded { what, requested, max }),
        false => Ok(()),
    };
    limit("head_dim", d as u64, tile::MAX_HEAD_DIM as u64)?;
    if !Dtype::ALL.contains(&dtype) {
        return Err(Error::unsupported("dtype", dtype, "f32, f16, bf16"));
    }
    if !matches!(shape.window(), Window::Blocks(_) | Window::Tokens(_)) {
        return Err(Error::unsupported("window", format!("{:?}", shape.window()), "blocks, tokens"));
    }
    // Positions within a call are 32 bits with a sign.
    limit("tokens of the blocks in a call", spec.blocks() as u64 * shape.block_len() as u64, 1 << 30)?;
    if let Some(op) = spec.ops().iter().find(|op| !Op::FORWARD.contains(op)) {
        return Err(Error::no_kernel(*op, dtype, "wgpu"));
    }
    let max = pipeline::max_binding(limits).min(limits.max_buffer_size);
    let bytes = |elements: usize| (elements as u64).saturating_mul(dtype.bytes() as u64);
    let ring = call::ring_layout(spec);
    let ring_bytes = bytes(ring.shape[0] * ring.stride[0]);
    limit("bytes of the key ring", ring_bytes, max)?;
    limit("bytes of q", bytes(spec.batch() * spec.rows() * shape.heads() * d), max)?;
    let attends = spec.ops().contains(&Op::Attend);
    let scratch_bytes = if attends { attend::scratch_bytes(spec, limits) } else { 0 };
    limit("bytes of scratch memory", scratch_bytes, max)?;
    let (block, blocks) = Pool::size(block_words(spec), limits.min_storage_buffer_offset_alignment.into());
    limit("bytes of a plan's call blocks", block * blocks, max.min(u32::MAX.into()))?;
    let variant = variant(limits, features).0;
    let kernel = |&op| (KernelId { backend: "wgpu", op, dtype, variant }, 1);
    Ok(Support::new(spec.ops().iter().map(kernel).collect()).scratch_bytes(scratch_bytes).ring_bytes(ring_bytes))
}

/// A plan of [`Wgpu`].
#[derive(Clone, Debug)]
pub struct WgpuPlan {
    spec: Spec,
    support: Support,
    gpu: Arc<Gpu>,
    /// Call blocks, and their bind groups for shaders that read and that write them.
    pool: Arc<Pool>,
    call_read: wgpu::BindGroup,
    call_write: wgpu::BindGroup,
    gather: Kernel,
    append: Option<append::Kernels>,
    attend: Option<attend::Kernels>,
    infini_read: Option<Kernel>,
    infini_write: Option<Kernel>,
    merge: Option<Kernel>,
}

impl Plan for WgpuPlan {
    fn spec(&self) -> &Spec {
        &self.spec
    }
    fn support(&self) -> &Support {
        &self.support
    }
}

impl Backend for Wgpu {
    type Mem = Region;
    type Queue<'q> = wgpu::CommandEncoder;
    type Plan = WgpuPlan;

    fn name(&self) -> &'static str {
        "wgpu"
    }

    fn support(&self, spec: &Spec) -> Result<Support> {
        self.gpu.check()?;
        support(spec, &self.gpu.limits, self.gpu.features)
    }

    fn plan(&self, spec: &Spec) -> Result<WgpuPlan> {
        let support = self.support(spec)?;
        let gpu = &self.gpu;
        let has = |op| spec.ops().contains(&op);
        let (block, blocks) = Pool::size(block_words(spec), gpu.limits.min_storage_buffer_offset_alignment.into());
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST;
        let buffer = gpu.buffer("fam: calls", block * blocks, usage)?;
        let gather =
            Shader { name: "call", text: include_str!("call.wgsl"), tensors: &[call::T::Q, call::T::Sink, call::T::Beta] };
        Ok(WgpuPlan {
            call_read: gpu.call_group(&buffer, block, true)?,
            call_write: gpu.call_group(&buffer, block, false)?,
            pool: Arc::new(Pool::new(buffer, block)),
            gather: gpu.kernel(gather, "")?,
            append: has(Op::Append).then(|| append::Kernels::new(gpu, spec)).transpose()?,
            attend: has(Op::Attend).then(|| attend::Kernels::new(gpu, spec)).transpose()?,
            infini_read: has(Op::InfiniRead).then(|| infini_read::kernel(gpu, spec)).transpose()?,
            infini_write: has(Op::InfiniWrite).then(|| infini_write::kernel(gpu, spec)).transpose()?,
            merge: has(Op::Merge).then(|| merge::kernel(gpu, spec)).transpose()?,
            gpu: Arc::clone(gpu),
            spec: spec.clone(),
            support,
        })
    }

    fn append(
        &self,
        plan: &WgpuPlan,
        encoder: &mut wgpu::CommandEncoder,
        args: Append<'_, Region>,
        scratch: &mut Region,
    ) -> Result<()> {
        append::append(plan, encoder, args, scratch)
    }

    fn attend(
        &self,
        plan: &WgpuPlan,
        encoder: &mut wgpu::CommandEncoder,
        args: Attend<'_, Region>,
        scratch: &mut Region,
    ) -> Result<()> {
        attend::attend(plan, encoder, args, scratch)
    }

    fn infini_read(
        &self,
        plan: &WgpuPlan,
        encoder: &mut wgpu::CommandEncoder,
        args: InfiniRead<'_, Region>,
        scratch: &mut Region,
    ) -> Result<()> {
        infini_read::infini_read(plan, encoder, args, scratch)
    }

    fn infini_write(
        &self,
        plan: &WgpuPlan,
        encoder: &mut wgpu::CommandEncoder,
        args: InfiniWrite<'_, Region>,
        scratch: &mut Region,
    ) -> Result<()> {
        infini_write::infini_write(plan, encoder, args, scratch)
    }

    fn merge(
        &self,
        plan: &WgpuPlan,
        encoder: &mut wgpu::CommandEncoder,
        args: Merge<'_, Region>,
        scratch: &mut Region,
    ) -> Result<()> {
        merge::merge(plan, encoder, args, scratch)
    }
}

/// Engines move these between threads.
const _: () = {
    const fn is_shared<T: Send + Sync>() {}
    is_shared::<Wgpu>();
    is_shared::<WgpuPlan>();
    is_shared::<Region>();
};
