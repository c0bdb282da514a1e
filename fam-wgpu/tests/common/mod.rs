//! What the tests share: a device of this machine, and the harness that hands it to the conformance runner.
#![allow(dead_code, reason = "every test file is a crate of its own, and uses a part")]

pub mod rows;

use fam_core::{Device, Dtype, Result};
use fam_testkit::{Budget, Filter, Harness, Level, Limits, NanReach, Queue, SuiteOptions, run_suite};
use fam_wgpu::{Adapter, Wgpu};

/// The first adapter. Without one nothing here could be tested.
pub fn adapter() -> Adapter {
    let adapters = pollster::block_on(fam_wgpu::adapters());
    adapters.into_iter().next().expect("an adapter: on Debian and Ubuntu, scripts/apt-install mesa-vulkan-drivers libvulkan1")
}

/// A device with all limits that the adapter has.
pub fn device() -> Wgpu {
    pollster::block_on(adapter().open(None)).expect("a device")
}

/// The least that WebGPU guarantees.
pub fn least() -> wgpu::Limits {
    let limits = wgpu::Limits::default();
    assert_eq!(limits.max_storage_buffers_per_shader_stage, 8);
    assert_eq!((limits.max_compute_workgroup_storage_size, limits.max_compute_invocations_per_workgroup), (16 << 10, 256));
    limits
}

/// A device under test.
pub struct Gpu(pub Wgpu);

impl Harness for Gpu {
    type Backend = Wgpu;

    fn backend(&self) -> &Wgpu {
        &self.0
    }

    fn run(&self, work: &mut dyn FnMut(&mut Queue<'_, Self>) -> Result<()>) -> Result<()> {
        let mut encoder = self.0.device().create_command_encoder(&Default::default());
        work(&mut encoder)?;
        self.0.synchronize(&mut encoder)
    }

    fn limits(&self) -> Limits {
        Limits::default().key_tile(fam_wgpu::BLOCK_N).flushes(&Dtype::ALL).nan(NanReach::Unspecified)
    }
}

/// Head dims of the cases that are run: those of the generator with every remainder by four, and each number of chunks of 64 channels.
const HEAD_DIMS: [usize; 6] = [7, 31, 64, 80, 111, 256];

/// About so many generated cases of the forward ops, every one right: how many there were, and how many elements were compared. Cases of one head dim come together: Mesa
/// forgets compiled shaders when they are many.
pub fn conform(h: &(impl Harness + Sync), seed: u64, cases: u64) -> [u64; 2] {
    // The generator draws one of fourteen head dims.
    let tried = cases * 14 / HEAD_DIMS.len() as u64;
    let mut done = [0; 2];
    for d in HEAD_DIMS {
        let filter = Filter { text: format!(" D={d} "), ..Filter::default() };
        let options = SuiteOptions {
            seed,
            budget: Budget::Cases(tried),
            filter,
            level: Level::Hard,
            threads: 2,
            ..SuiteOptions::default()
        };
        let report = run_suite(h, &options, &mut |_| ());
        assert!(report.is_ok(), "{report}");
        assert!(report.passed > 0 && report.skipped.is_empty(), "{report}");
        done = [done[0] + report.passed, done[1] + report.compared];
    }
    println!("{} cases, {} elements", done[0], done[1]);
    assert!(done[0] >= cases * 3 / 4, "{} cases", done[0]);
    done
}
