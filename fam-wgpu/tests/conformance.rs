//! Generated cases against the reference, under Vulkan's validation layers: on a device with all that the adapter has, the CPU beside it; without
//! checks in the shaders; with the least that WebGPU guarantees. Whatever wgpu or a layer has to say fails every test here.

mod common;

use common::{Gpu, conform, least};
use fam_core::{Backend, Op, Shape};
use fam_cpu::{Cpu, Par};
use fam_testkit::{Harness, Queue};
use fam_wgpu::{FEATURES, Wgpu};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

/// What was logged.
struct Messages(Mutex<Vec<String>>);

impl Messages {
    fn lock(&self) -> MutexGuard<'_, Vec<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl log::Log for Messages {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }
    fn log(&self, record: &log::Record<'_>) {
        let message = format!("{} {}: {}", record.level(), record.target(), record.args());
        // Where there are no layers to hear from wgpu says that at a lower level.
        if record.level() <= log::Level::Warn || message.contains("unable to find layer") {
            self.lock().push(message);
        }
    }
    fn flush(&self) {}
}

static MESSAGES: Messages = Messages(Mutex::new(Vec::new()));

fn assert_silent() {
    let messages = MESSAGES.lock();
    assert!(messages.is_empty(), "{} messages:\n{}", messages.len(), messages.join("\n"));
}

/// A device of the first adapter behind the validation layers, with all of its limits and features, or with these limits and none. A layer that is
/// missing is a message.
fn validated(limits: Option<wgpu::Limits>, make: fn(&wgpu::Device, &wgpu::Queue) -> fam_core::Result<Wgpu>) -> Gpu {
    static LOGGER: Once = Once::new();
    LOGGER.call_once(|| {
        log::set_logger(&MESSAGES).expect("the only logger");
    });
    log::set_max_level(log::LevelFilter::Debug);
    let backends = wgpu::Backends::VULKAN | wgpu::Backends::METAL | wgpu::Backends::DX12;
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor {
        backends,
        flags: wgpu::InstanceFlags::VALIDATION,
        ..wgpu::InstanceDescriptor::new_without_display_handle()
    });
    log::set_max_level(log::LevelFilter::Warn);
    // The one that all other tests take.
    let name = common::adapter().info().name;
    let adapters = pollster::block_on(instance.enumerate_adapters(backends));
    let adapter =
        adapters.into_iter().find(|adapter| adapter.get_info().name == name).expect("the same adapter behind the layers");
    let required_features = match limits {
        Some(_) => wgpu::Features::empty(),
        None => adapter.features() & FEATURES,
    };
    let required_limits = limits.unwrap_or_else(|| adapter.limits());
    let descriptor = wgpu::DeviceDescriptor { required_features, required_limits, ..Default::default() };
    let (device, queue) = pollster::block_on(adapter.request_device(&descriptor)).expect("a device");
    Gpu(make(&device, &queue).expect("a backend"))
}

/// The variants that serve a plan of every forward op.
fn variants(h: &Gpu) -> Vec<&'static str> {
    let spec = Shape::builder()
        .infini(fam_core::InfiniRule::Linear)
        .build()
        .and_then(|s| s.spec(1, 1).ops(&Op::FORWARD).build())
        .expect("a spec");
    let support = h.backend().support(&spec).expect("all forward ops");
    Op::FORWARD.map(|op| support.kernel(op).expect("a kernel").variant).to_vec()
}

struct OnCpu(Cpu);

impl Harness for OnCpu {
    type Backend = Cpu;

    fn backend(&self) -> &Cpu {
        &self.0
    }

    fn run(&self, work: &mut dyn FnMut(&mut Queue<'_, Self>) -> fam_core::Result<()>) -> fam_core::Result<()> {
        work(&mut Par::Serial)
    }

    fn limits(&self) -> fam_testkit::Limits {
        let pairs = self.0.isa().pairs();
        fam_testkit::Limits::default()
            .key_tile(fam_cpu::BLOCK_N)
            .p16(pairs)
            .flushes(pairs)
            .few_rows([fam_cpu::FEW_ROWS, fam_cpu::FEW_MEM_ROWS])
    }
}

/// Both within their bounds of the same reference: within twice the bound of each other.
#[test]
fn all_limits_and_the_cpu_beside() {
    let gpu = validated(None, Wgpu::new);
    let features = common::adapter().features();
    for variant in variants(&gpu) {
        assert!(variant.starts_with("wide"), "{variant}");
        assert_eq!(variant.contains("-subgroup"), features.contains(wgpu::Features::SUBGROUP), "{variant}");
        assert_eq!(variant.ends_with("-f16"), features.contains(wgpu::Features::SHADER_F16), "{variant}");
    }
    let here = conform(&gpu, 1, 1400);
    let cpu = conform(&OnCpu(Cpu::new().expect("the CPU").with_threads(1)), 1, 1400);
    // What WGSL leaves unspecified beside numbers that are not finite is compared on the CPU alone.
    assert!(here[0] == cpu[0] && here[0] >= 1000 && here[1] > 1_000_000 && here[1] <= cpu[1], "{here:?} and {cpu:?}");
    assert_silent();
}

#[test]
fn the_least_limits() {
    let gpu = validated(Some(least()), Wgpu::new);
    assert_eq!(variants(&gpu), ["baseline"; 5]);
    assert!(conform(&gpu, 2, 120)[1] > 100_000);
    assert_silent();
}

#[test]
fn unchecked_shaders() {
    assert!(conform(&validated(None, Wgpu::unchecked), 3, 120)[1] > 100_000);
    assert_silent();
}
