//! A backend that can be made to fail.

use fam::cpu::{Cpu, CpuPlan, Par};
use fam::{Append, Attend, Backend, Bytes, Device, Error, InfiniRead, InfiniWrite, Merge, ReadRing, Result, Spec, Support};
use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock};

/// The CPU, asked once what it can do, with scratch memory for the calling thread.
pub fn cpu() -> Cpu {
    static CPU: OnceLock<Cpu> = OnceLock::new();
    *CPU.get_or_init(|| Cpu::new().unwrap().with_threads(1))
}

/// When the next error comes, and which; shared by all clones.
#[derive(Clone, Debug, Default)]
pub struct Faults(Arc<Mutex<Option<Fault>>>);

/// A planned failure.
#[derive(Clone, Debug)]
pub struct Fault {
    /// Calls of the backend that still succeed.
    pub after: usize,
    /// Whether the failing call does its work nevertheless: an error found too late.
    pub works: bool,
    pub error: Error,
}

impl Faults {
    pub fn plan(&self, fault: Fault) {
        *self.0.lock().unwrap() = Some(fault);
    }

    /// Takes the plan back; whether it was still due.
    pub fn clear(&self) -> bool {
        self.0.lock().unwrap().take().is_some()
    }

    fn around<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let due = {
            let mut fault = self.0.lock().unwrap();
            match &mut *fault {
                Some(Fault { after: after @ 1.., .. }) => {
                    *after -= 1;
                    None
                }
                fault => fault.take(),
            }
        };
        match due {
            None => work(),
            Some(Fault { works, error, .. }) => {
                if works {
                    work()?;
                }
                Err(error)
            }
        }
    }
}

/// The CPU, with faults.
#[derive(Clone, Debug)]
pub struct Faulty {
    cpu: Cpu,
    faults: Faults,
}

impl Faulty {
    pub fn new(faults: Faults) -> Self {
        Faulty { cpu: cpu(), faults }
    }
}

impl Backend for Faulty {
    type Mem = [u8];
    type Queue<'q> = Par<'q>;
    type Plan = CpuPlan;

    fn name(&self) -> &'static str {
        self.cpu.name()
    }
    fn support(&self, spec: &Spec) -> Result<Support> {
        self.cpu.support(spec)
    }
    fn plan(&self, spec: &Spec) -> Result<CpuPlan> {
        self.cpu.plan(spec)
    }
    fn append(&self, plan: &CpuPlan, queue: &mut Par<'_>, args: Append<'_, [u8]>, scratch: &mut [u8]) -> Result<()> {
        self.faults.around(|| self.cpu.append(plan, queue, args, scratch))
    }
    fn attend(&self, plan: &CpuPlan, queue: &mut Par<'_>, args: Attend<'_, [u8]>, scratch: &mut [u8]) -> Result<()> {
        self.faults.around(|| self.cpu.attend(plan, queue, args, scratch))
    }
    fn infini_read(&self, plan: &CpuPlan, queue: &mut Par<'_>, args: InfiniRead<'_, [u8]>, scratch: &mut [u8]) -> Result<()> {
        self.faults.around(|| self.cpu.infini_read(plan, queue, args, scratch))
    }
    fn infini_write(&self, plan: &CpuPlan, queue: &mut Par<'_>, args: InfiniWrite<'_, [u8]>, scratch: &mut [u8]) -> Result<()> {
        self.faults.around(|| self.cpu.infini_write(plan, queue, args, scratch))
    }
    fn merge(&self, plan: &CpuPlan, queue: &mut Par<'_>, args: Merge<'_, [u8]>, scratch: &mut [u8]) -> Result<()> {
        self.faults.around(|| self.cpu.merge(plan, queue, args, scratch))
    }
}

impl Device for Faulty {
    type Owned = Bytes;

    fn alloc(&self, bytes: u64) -> Result<Bytes> {
        self.cpu.alloc(bytes)
    }
    fn upload(&self, mem: &mut [u8], offset: u64, bytes: &[u8]) -> Result<()> {
        self.faults.around(|| self.cpu.upload(mem, offset, bytes))
    }
    fn download(&self, mem: &[u8], offset: u64, bytes: &mut [u8]) -> Result<()> {
        self.faults.around(|| self.cpu.download(mem, offset, bytes))
    }
    fn check_queue(&self, queue: &Par<'_>) -> Result<()> {
        self.cpu.check_queue(queue)
    }
    fn synchronize(&self, queue: &mut Par<'_>) -> Result<()> {
        self.faults.around(|| self.cpu.synchronize(queue))
    }
    fn clear(&self, queue: &mut Par<'_>, mem: &mut [u8], at: Range<u64>) -> Result<()> {
        self.faults.around(|| self.cpu.clear(queue, mem, at))
    }
    fn copy_within(&self, queue: &mut Par<'_>, mem: &mut [u8], from: Range<u64>, to: u64) -> Result<()> {
        self.faults.around(|| self.cpu.copy_within(queue, mem, from, to))
    }
    fn read_ring(&self, plan: &CpuPlan, queue: &mut Par<'_>, args: ReadRing<'_, [u8]>) -> Result<()> {
        self.faults.around(|| self.cpu.read_ring(plan, queue, args))
    }
}
