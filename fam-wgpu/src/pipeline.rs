//! From WGSL to work in an encoder: kernels are compiled when a plan is made, in an error scope; a call then only encodes.

use crate::call::{Call, Lease, Size, T};
use crate::{Region, WgpuPlan};
use fam_core::{Error, Result};
use std::collections::HashMap;
use std::future::Future;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

/// Bind groups that are kept, so that a call whose tensors lie where those of an earlier one did makes none. A bind group keeps its buffers
/// alive: when there are so many, all are forgotten.
const BIND_GROUPS: usize = 512;

/// The optional features that kernels use where a device was made with them.
pub const FEATURES: wgpu::Features = wgpu::Features::SHADER_F16.union(wgpu::Features::SUBGROUP);

/// A device, and what is made on it once for all plans.
#[derive(Debug)]
pub(crate) struct Gpu {
    pub device: wgpu::Device,
    pub queue: wgpu::Queue,
    pub limits: wgpu::Limits,
    /// Those of [`FEATURES`] that it has.
    pub features: wgpu::Features,
    /// Whether shaders may leave out checks of their indices and loops: [`crate::Wgpu::unchecked`].
    pub unchecked: bool,
    /// Why the device was lost.
    lost: Arc<Mutex<Option<String>>>,
    kernels: Mutex<HashMap<String, Kernel>>,
    layouts: Mutex<HashMap<usize, wgpu::BindGroupLayout>>,
    bind_groups: Mutex<HashMap<Vec<Binding>, wgpu::BindGroup>>,
    /// What absent tensors are bound to.
    nothing: Binding,
}

/// A compiled shader and the tensors that it binds, in order.
#[derive(Clone, Debug)]
pub(crate) struct Kernel {
    pipeline: wgpu::ComputePipeline,
    tensors: &'static [T],
}

impl Kernel {
    /// The tensors that it binds.
    pub fn tensors(&self) -> impl Iterator<Item = T> {
        self.tensors.iter().copied()
    }
}

/// A shader to be compiled.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shader {
    pub name: &'static str,
    pub text: &'static str,
    /// Tensors in the order of their bindings.
    pub tensors: &'static [T],
}

/// Bytes of a buffer that a shader reaches.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Binding {
    buffer: wgpu::Buffer,
    offset: u64,
    size: u64,
}

impl Binding {
    /// Bytes `bytes` of a region, and at which byte of the binding they begin: bindings begin where the device lets them.
    ///
    /// # Errors
    /// [`Error::LimitExceeded`] where they are more than a binding may have.
    pub fn new(gpu: &Gpu, what: &'static str, region: &Region, bytes: Range<u64>) -> Result<(Self, u64)> {
        let alignment = u64::from(gpu.limits.min_storage_buffer_offset_alignment);
        let first = region.range().start + bytes.start;
        let offset = first - first % alignment;
        let size = (region.range().start + bytes.end).next_multiple_of(4) - offset;
        let max = max_binding(&gpu.limits);
        if size > max {
            return Err(Error::LimitExceeded { what, requested: size, max });
        }
        Ok((Binding { buffer: region.buffer().clone(), offset, size }, first - offset))
    }

    fn resource(&self) -> wgpu::BindingResource<'_> {
        let size = std::num::NonZero::new(self.size);
        wgpu::BindingResource::Buffer(wgpu::BufferBinding { buffer: &self.buffer, offset: self.offset, size })
    }
}

/// Bytes of the largest binding: a shader may be told its length in 32 bits, as those of Metal are, whatever the limit says.
pub(crate) fn max_binding(limits: &wgpu::Limits) -> u64 {
    limits.max_storage_buffer_binding_size.min(u64::from(u32::MAX) & !3)
}

pub(crate) fn lock<X>(mutex: &Mutex<X>) -> MutexGuard<'_, X> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Gpu {
    pub fn new(device: &wgpu::Device, queue: &wgpu::Queue, unchecked: bool) -> Result<Self> {
        let usage = wgpu::BufferUsages::STORAGE;
        let nothing = scoped(device, 256, || {
            device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("fam: nothing"),
                size: 256,
                usage,
                mapped_at_creation: false,
            })
        })?;
        Ok(Gpu {
            device: device.clone(),
            queue: queue.clone(),
            limits: device.limits(),
            features: device.features() & FEATURES,
            unchecked,
            lost: Arc::default(),
            kernels: Mutex::default(),
            layouts: Mutex::default(),
            bind_groups: Mutex::default(),
            nothing: Binding { buffer: nothing, offset: 0, size: 256 },
        })
    }

    /// How threads side by side share a maximum, in WGSL.
    pub fn lanes(&self) -> &'static str {
        match self.features.contains(wgpu::Features::SUBGROUP) {
            true => include_str!("lanes_subgroup.wgsl"),
            false => include_str!("lanes_memory.wgsl"),
        }
    }

    /// Most workgroups in a dimension of a dispatch.
    fn max_groups(&self) -> u64 {
        self.limits.max_compute_workgroups_per_dimension.into()
    }

    /// Where the reason of a loss is noted.
    pub fn lost(&self) -> Arc<Mutex<Option<String>>> {
        Arc::clone(&self.lost)
    }

    /// # Errors
    /// [`Error::DeviceLost`] from the moment on at which that is known.
    pub fn check(&self) -> Result<()> {
        match &*lock(&self.lost) {
            Some(reason) => Err(Error::DeviceLost { reason: reason.clone() }),
            None => Ok(()),
        }
    }

    /// Does something on the device. What goes wrong there is an error here, that of the loss where the device is lost.
    pub fn scoped<X>(&self, bytes: u64, make: impl FnOnce() -> X) -> Result<X> {
        scoped(&self.device, bytes, make).or_else(|error| {
            // A device that was lost takes work, and what it makes is invalid; it says so when what it had before is done.
            let _ = self.poll(wgpu::PollType::Wait { submission_index: None, timeout: Some(Duration::from_secs(1)) });
            self.check()?;
            Err(error)
        })
    }

    /// Sees how far the device is.
    ///
    /// # Errors
    /// [`Error::DeviceLost`]: where the device is lost while it is waited for, wgpu has no error but a panic.
    pub fn poll(&self, how: wgpu::PollType) -> Result<()> {
        let polled = catch_unwind(AssertUnwindSafe(|| self.device.poll(how)));
        if let Err(panic) = &polled
            && let Some(reason) = panic.downcast_ref::<String>().filter(|reason| reason.contains("Device::poll"))
        {
            lock(&self.lost).get_or_insert(reason.clone());
        }
        self.check()?;
        match polled {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(Error::DeviceLost { reason: error.to_string() }),
            // That of a callback of the caller's.
            Err(panic) => resume_unwind(panic),
        }
    }

    /// The texts of the kernels that were compiled so far, sorted.
    pub fn texts(&self) -> Vec<String> {
        let mut texts: Vec<_> = lock(&self.kernels).keys().cloned().collect();
        texts.sort_unstable();
        texts
    }

    /// A buffer of zeros.
    pub fn buffer(&self, label: &'static str, bytes: u64, usage: wgpu::BufferUsages) -> Result<wgpu::Buffer> {
        self.check()?;
        let max = self.limits.max_buffer_size;
        let Some(size) = bytes.max(1).checked_next_multiple_of(4).filter(|size| *size <= max) else {
            return Err(Error::LimitExceeded { what: "bytes of a buffer", requested: bytes, max });
        };
        self.scoped(size, || {
            self.device.create_buffer(&wgpu::BufferDescriptor { label: Some(label), size, usage, mapped_at_creation: false })
        })
    }

    /// The layout of `count` tensors. All of them may be written: a buffer that holds inputs and outputs may not be bound as both.
    fn layout(&self, count: usize) -> wgpu::BindGroupLayout {
        let make = || bind_group_layout(&self.device, count, false, false);
        lock(&self.layouts).entry(count).or_insert_with(make).clone()
    }

    /// The kernel of `shader` with the constants `constants`, compiled at the first time that it is asked for.
    ///
    /// # Errors
    /// [`Error::BackendUnavailable`] where the device's compiler refuses it.
    pub fn kernel(&self, shader: Shader, constants: &str) -> Result<Kernel> {
        self.check()?;
        let text = source(&self.limits, self.features, shader, constants);
        #[cfg(fam_mutants)]
        let text = crate::mutants::planted(text);
        if let Some(kernel) = lock(&self.kernels).get(&text) {
            return Ok(kernel.clone());
        }
        let writes_call = shader.name == "call";
        let module =
            || wgpu::ShaderModuleDescriptor { label: Some(shader.name), source: wgpu::ShaderSource::Wgsl(text.as_str().into()) };
        let pipeline = self.scoped(0, || {
            let module = self.module(module());
            let call = bind_group_layout(&self.device, 1, true, !writes_call);
            let tensors = self.layout(shader.tensors.len());
            let layout = self.device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
                label: Some(shader.name),
                bind_group_layouts: &[Some(&call), Some(&tensors)],
                immediate_size: 0,
            });
            self.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                label: Some(shader.name),
                layout: Some(&layout),
                module: &module,
                entry_point: Some("main"),
                compilation_options: wgpu::PipelineCompilationOptions {
                    // Nothing depends on workgroup memory that its shader has not written.
                    zero_initialize_workgroup_memory: false,
                    ..Default::default()
                },
                cache: None,
            })
        })?;
        let kernel = Kernel { pipeline, tensors: shader.tensors };
        lock(&self.kernels).insert(text, kernel.clone());
        Ok(kernel)
    }

    #[allow(unsafe_code, reason = "an unchecked module")]
    fn module(&self, descriptor: wgpu::ShaderModuleDescriptor<'_>) -> wgpu::ShaderModule {
        if self.unchecked {
            // SAFETY: the shaders are this crate's own. Every index follows from a layout that `validate` has checked against its memory, or from
            // numbers that `call.wgsl` has clamped to those; every loop counts to a bound; every divisor is a size, which is at least 1.
            unsafe { self.device.create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked()) }
        } else {
            self.device.create_shader_module(descriptor)
        }
    }

    /// A bind group of the call block, of a block's size anywhere in a pool.
    pub fn call_group(&self, pool: &wgpu::Buffer, bytes: u64, is_read: bool) -> Result<wgpu::BindGroup> {
        let binding = Binding { buffer: pool.clone(), offset: 0, size: bytes };
        self.scoped(0, || {
            self.device.create_bind_group(&wgpu::BindGroupDescriptor {
                label: Some("fam: call"),
                layout: &bind_group_layout(&self.device, 1, true, is_read),
                entries: &[wgpu::BindGroupEntry { binding: 0, resource: binding.resource() }],
            })
        })
    }

    /// The bind group of these tensors.
    fn bind_group(&self, bindings: Vec<Binding>) -> Result<wgpu::BindGroup> {
        if let Some(group) = lock(&self.bind_groups).get(&bindings) {
            return Ok(group.clone());
        }
        let layout = self.layout(bindings.len());
        let bound = bindings.iter().map(Binding::resource);
        let entries: Vec<_> = (0..).zip(bound).map(|(binding, resource)| wgpu::BindGroupEntry { binding, resource }).collect();
        let descriptor = wgpu::BindGroupDescriptor { label: Some("fam"), layout: &layout, entries: &entries };
        let group = self.scoped(0, || self.device.create_bind_group(&descriptor)).map_err(|error| match error {
            // A buffer of another device, or a destroyed one.
            Error::BackendUnavailable { reason, .. } => Error::invalid("memory", reason, "buffers of the backend's own device"),
            other => other,
        })?;
        let mut groups = lock(&self.bind_groups);
        if groups.len() >= BIND_GROUPS {
            groups.clear();
        }
        groups.insert(bindings, group.clone());
        Ok(group)
    }
}

/// The whole text of a shader: constants, what all share, and its own.
fn source(limits: &wgpu::Limits, features: wgpu::Features, shader: Shader, constants: &str) -> String {
    let f16 = match features.contains(wgpu::Features::SHADER_F16) {
        true => include_str!("f16_native.wgsl"),
        false => include_str!("f16_bits.wgsl"),
    };
    let access = if shader.name == "call" { "read_write" } else { "read" };
    format!(
        "@group(0) @binding(0) var<storage, {access}> call: array<u32>;\nconst MAX_GROUPS = {}u;\n{constants}{}{}{}\n{f16}\n{}",
        limits.max_compute_workgroups_per_dimension,
        Size::wgsl(),
        T::wgsl(),
        include_str!("common.wgsl"),
        shader.text,
    )
}

fn bind_group_layout(device: &wgpu::Device, count: usize, has_dynamic_offset: bool, read_only: bool) -> wgpu::BindGroupLayout {
    let entry = |binding| wgpu::BindGroupLayoutEntry {
        binding,
        visibility: wgpu::ShaderStages::COMPUTE,
        ty: wgpu::BindingType::Buffer {
            ty: wgpu::BufferBindingType::Storage { read_only },
            has_dynamic_offset,
            min_binding_size: None,
        },
        count: None,
    };
    let entries: Vec<_> = (0..count as u32).map(entry).collect();
    device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: Some("fam"), entries: &entries })
}

/// Makes something on a device. What goes wrong there is an error here, and not the application's uncaptured one.
fn scoped<X>(device: &wgpu::Device, bytes: u64, make: impl FnOnce() -> X) -> Result<X> {
    let scopes = [wgpu::ErrorFilter::Validation, wgpu::ErrorFilter::OutOfMemory, wgpu::ErrorFilter::Internal]
        .map(|filter| device.push_error_scope(filter));
    let made = make();
    let errors = scopes.into_iter().rev().filter_map(|scope| now(scope.pop()).flatten());
    match errors.last() {
        None => Ok(made),
        Some(wgpu::Error::OutOfMemory { .. }) => Err(Error::OutOfMemory { requested: bytes }),
        Some(error) => Err(Error::BackendUnavailable { backend: "wgpu", reason: error.to_string() }),
    }
}

/// What a future has at once. Error scopes are resolved at once but in a browser, where errors are the application's to see.
fn now<X>(future: impl Future<Output = X>) -> Option<X> {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(x) => Some(x),
        Poll::Pending => None,
    }
}

/// A kernel of a call and its number of workgroups.
pub(crate) struct Dispatch<'k> {
    pub kernel: &'k Kernel,
    pub groups: u64,
}

/// Encodes calls: their blocks are written before the encoder's work begins; then their dispatches run one after another.
///
/// # Errors
/// [`Error::LimitExceeded`] for a grid that no dispatch can have, or where too many calls wait; [`Error::DeviceLost`]. Nothing is encoded then.
pub(crate) fn enqueue(encoder: &mut wgpu::CommandEncoder, calls: &[(&Call<'_>, &[Dispatch<'_>])]) -> Result<()> {
    let ready = calls.iter().map(|(call, dispatches)| Ready::new(call, dispatches)).collect::<Result<Vec<_>>>()?;
    ready.into_iter().flatten().for_each(|ready| ready.encode(encoder));
    Ok(())
}

/// A call that nothing can refuse any more.
struct Ready<'c> {
    call: &'c Call<'c>,
    lease: Lease,
    /// Of each dispatch its tensors, workgroups, and the block as it is bound.
    dispatches: Vec<(&'c Kernel, wgpu::BindGroup, u64, &'c wgpu::BindGroup)>,
}

impl<'c> Ready<'c> {
    /// Nothing for a call that has nothing to do.
    fn new(call: &'c Call<'_>, dispatches: &'c [Dispatch<'_>]) -> Result<Option<Self>> {
        let plan: &WgpuPlan = call.plan;
        let gpu = &plan.gpu;
        gpu.check()?;
        let mut ready = Vec::with_capacity(dispatches.len() + 1);
        if call.is_gathered() {
            let threads = call.batch().max(plan.spec.shape().heads()) as u64;
            let bind = |tensor| call.binding(tensor).unwrap_or(&gpu.nothing).clone();
            let bindings = vec![call.spans().unwrap_or(&gpu.nothing).clone(), bind(T::Sink), bind(T::Beta)];
            ready.push((&plan.gather, gpu.bind_group(bindings)?, threads.div_ceil(64), &plan.call_write));
        }
        for Dispatch { kernel, groups } in dispatches.iter().filter(|d| d.groups > 0) {
            let bindings = kernel.tensors.iter().map(|tensor| call.binding(*tensor).unwrap_or(&gpu.nothing).clone());
            ready.push((*kernel, gpu.bind_group(bindings.collect())?, *groups, &plan.call_read));
        }
        let max = gpu.max_groups() * gpu.max_groups();
        if let Some((.., groups, _)) = ready.iter().find(|(.., groups, _)| *groups > max) {
            return Err(Error::LimitExceeded { what: "workgroups of a dispatch", requested: *groups, max });
        }
        if dispatches.iter().all(|d| d.groups == 0) {
            return Ok(None);
        }
        let lease = plan.pool.lease(gpu)?;
        let block = bytemuck::cast_slice(call.words());
        gpu.scoped(block.len() as u64, || gpu.queue.write_buffer(&plan.pool.buffer, lease.offset(), block))?;
        Ok(Some(Ready { call, lease, dispatches: ready }))
    }

    fn encode(self, encoder: &mut wgpu::CommandEncoder) {
        let Ready { call, lease, dispatches } = self;
        let plan: &WgpuPlan = call.plan;
        let width = plan.gpu.max_groups();
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor { label: Some("fam"), timestamp_writes: None });
        for (kernel, tensors, groups, block) in dispatches {
            pass.set_pipeline(&kernel.pipeline);
            pass.set_bind_group(0, block, &[lease.offset() as u32]);
            pass.set_bind_group(1, &tensors, &[]);
            pass.dispatch_workgroups(groups.min(width) as u32, groups.div_ceil(width) as u32, 1);
        }
        drop(pass);
        // The block is free again when the work is done, or when the encoder is dropped and this with it.
        encoder.on_submitted_work_done(move || drop(lease));
    }
}
