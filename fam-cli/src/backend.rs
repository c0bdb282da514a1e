//! From a backend's name to code that is generic over backends: the one place where the choice is matched.

use crate::Failure;
use crate::perf::Probe;
use fam::cpu::{Cpu, Par, Pool};
use fam::wgpu::Wgpu;
use fam::{BackendName, Device, Dtype, Result, Selected};
use fam_testkit::{Harness, Limits, NanReach, Queue};

/// What to run on, on every command that runs something.
#[derive(clap::Args, Clone)]
pub struct Options {
    /// auto, cpu, wgpu or cuda. A named backend is never replaced by another.
    #[arg(long, default_value = "auto")]
    pub backend: BackendName,
    /// Threads of the CPU backend. Default: all that the system lets it use.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
}

/// A backend on this machine: what the program asks of it beside running tests.
pub trait Machine: Harness {
    /// The processor or device.
    fn machine(&self) -> String;
    /// What it can do at most, on `threads` threads where that is the CPU.
    fn probe(&self, threads: usize) -> Result<Probe>;
}

/// Work that runs on any backend.
pub trait Job {
    /// What it gives.
    type Output;
    /// Runs on the chosen backend; `reason` says why it was chosen.
    fn run<H: Machine + Sync>(self, h: &H, reason: &str) -> std::result::Result<Self::Output, Failure>
    where
        H::Backend: Clone;
}

/// Opens the backend and runs the job on it.
pub fn on<J: Job>(options: &Options, job: J) -> std::result::Result<J::Output, Failure> {
    let selection = fam::select(options.backend)?;
    match selection.backend {
        Selected::Cpu(cpu) => {
            let threads = options.threads.map_or_else(crate::environment::threads, usize::from);
            let harness = CpuHarness { cpu: cpu.with_threads(threads), pool: Pool::new(threads)? };
            job.run(&harness, &selection.reason)
        }
        Selected::Wgpu(wgpu) => job.run(&WgpuHarness { wgpu }, &selection.reason),
        other => Err(format!("{other:?} is not part of this build").into()),
    }
}

/// The CPU with a pool of its own.
struct CpuHarness {
    cpu: Cpu,
    pool: Pool,
}

impl Harness for CpuHarness {
    type Backend = Cpu;

    fn backend(&self) -> &Cpu {
        &self.cpu
    }

    fn run(&self, work: &mut dyn FnMut(&mut Queue<'_, Self>) -> Result<()>) -> Result<()> {
        work(&mut Par::Pool(&self.pool))
    }

    fn limits(&self) -> Limits {
        let pairs = self.cpu.isa().pairs();
        Limits::default()
            .key_tile(fam::cpu::BLOCK_N)
            .p16(pairs)
            .p16_backward(pairs)
            .flushes(pairs)
            .few_rows([fam::cpu::FEW_ROWS, fam::cpu::FEW_MEM_ROWS])
    }
}

impl Machine for CpuHarness {
    fn machine(&self) -> String {
        crate::environment::cpu_model()
    }

    fn probe(&self, threads: usize) -> Result<Probe> {
        Ok(Probe::cpu(self.cpu.isa(), threads))
    }
}

/// A device of wgpu.
struct WgpuHarness {
    wgpu: Wgpu,
}

impl Harness for WgpuHarness {
    type Backend = Wgpu;

    fn backend(&self) -> &Wgpu {
        &self.wgpu
    }

    fn run(&self, work: &mut dyn FnMut(&mut Queue<'_, Self>) -> Result<()>) -> Result<()> {
        let mut encoder = self.wgpu.device().create_command_encoder(&Default::default());
        work(&mut encoder)?;
        self.wgpu.synchronize(&mut encoder)
    }

    fn limits(&self) -> Limits {
        Limits::default().key_tile(fam::wgpu::BLOCK_N).flushes(&Dtype::ALL).nan(NanReach::Unspecified)
    }
}

impl Machine for WgpuHarness {
    fn machine(&self) -> String {
        self.wgpu.device().adapter_info().name
    }

    fn probe(&self, _threads: usize) -> Result<Probe> {
        Ok(Probe::Wgpu(self.wgpu.clone()))
    }
}
