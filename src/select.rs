//! The run-time choice of a backend: by name, or the best there is.

use fam_core::{Error, Result};
use std::fmt;
use std::str::FromStr;

/// What a user asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum BackendName {
    /// The first that works of: CUDA, a GPU through wgpu, the CPU, a software GPU through wgpu.
    Auto,
    /// The CPU.
    Cpu,
    /// Any GPU through wgpu.
    Wgpu,
    /// An NVIDIA GPU through CUDA.
    Cuda,
}

impl BackendName {
    /// The backends themselves, without `Auto`.
    pub const ALL: [BackendName; 3] = [BackendName::Cuda, BackendName::Wgpu, BackendName::Cpu];

    /// The name on the command line and in kernel ids.
    pub const fn name(self) -> &'static str {
        match self {
            BackendName::Auto => "auto",
            BackendName::Cpu => "cpu",
            BackendName::Wgpu => "wgpu",
            BackendName::Cuda => "cuda",
        }
    }
}

impl fmt::Display for BackendName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for BackendName {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        [BackendName::Auto]
            .into_iter()
            .chain(BackendName::ALL)
            .find(|b| b.name() == s)
            .ok_or_else(|| Error::invalid("backend", s, "one of auto, cpu, wgpu, cuda"))
    }
}

/// A backend chosen at run time. Match it once, then go on in code that is generic over [`fam_core::Backend`].
#[derive(Debug)]
#[non_exhaustive]
pub enum Selected {
    /// The CPU.
    #[cfg(feature = "cpu")]
    Cpu(fam_cpu::Cpu),
    /// A device of wgpu.
    #[cfg(feature = "wgpu")]
    Wgpu(fam_wgpu::Wgpu),
}

impl Selected {
    /// The backend's name in kernel ids and on the command line.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match *self {
            #[cfg(feature = "cpu")]
            Selected::Cpu(ref cpu) => fam_core::Backend::name(cpu),
            #[cfg(feature = "wgpu")]
            Selected::Wgpu(ref wgpu) => fam_core::Backend::name(wgpu),
        }
    }

    /// Whether it is a GPU that is a program on the CPU: `auto` prefers the CPU's own kernels.
    fn is_software(&self) -> bool {
        match *self {
            #[cfg(feature = "wgpu")]
            Selected::Wgpu(ref wgpu) => wgpu.is_software(),
            #[allow(unreachable_patterns, reason = "there may be no other backend")]
            _ => false,
        }
    }
}

/// A chosen backend and the reason.
#[derive(Debug)]
pub struct Selection {
    /// The backend.
    pub backend: Selected,
    /// Why this one, in a few words.
    pub reason: String,
}

/// One backend of this build or not, as [`candidates`] found it.
#[derive(Debug)]
pub struct Candidate {
    /// Which.
    pub name: BackendName,
    /// The backend, or why it cannot be had.
    pub backend: Result<Selected>,
}

/// Every backend that fam has, in the order that `auto` prefers.
#[must_use]
pub fn candidates() -> Vec<Candidate> {
    BackendName::ALL.into_iter().map(|name| Candidate { name, backend: open(name) }).collect()
}

/// Opens the backend that was asked for. A named one is never replaced by another.
///
/// # Errors
/// [`Error::BackendUnavailable`] with the reason.
pub fn select(name: BackendName) -> Result<Selection> {
    if name != BackendName::Auto {
        return Ok(Selection { backend: open(name)?, reason: "asked for by name".into() });
    }
    let (mut absent, mut software) = (Vec::new(), None);
    for candidate in candidates() {
        match candidate.backend {
            Ok(backend) if backend.is_software() => {
                absent.push(format!("no {} but in software", candidate.name));
                software.get_or_insert(backend);
            }
            Ok(backend) if absent.is_empty() => return Ok(Selection { backend, reason: "the first choice of auto".into() }),
            Ok(backend) => return Ok(Selection { backend, reason: format!("auto: {}", absent.join("; ")) }),
            Err(Error::BackendUnavailable { backend, reason }) => absent.push(format!("no {backend} ({reason})")),
            // `FAM_ISA` names what there is not: the caller is told, and not served by the slower device that there is.
            Err(error @ Error::Unsupported { .. }) => return Err(error),
            Err(other) => absent.push(other.to_string()),
        }
    }
    if let Some(backend) = software {
        return Ok(Selection { backend, reason: format!("auto: {}", absent.join("; ")) });
    }
    Err(Error::BackendUnavailable { backend: "auto", reason: absent.join("; ") })
}

fn open(name: BackendName) -> Result<Selected> {
    match name {
        #[cfg(feature = "cpu")]
        BackendName::Cpu => Ok(Selected::Cpu(fam_cpu::Cpu::new()?)),
        #[cfg(feature = "wgpu")]
        BackendName::Wgpu => {
            let adapters = pollster::block_on(fam_wgpu::adapters());
            let none = || Error::BackendUnavailable {
                backend: "wgpu",
                reason: "no adapter found: is a driver for Vulkan, Metal or DX12 there?".into(),
            };
            let adapter = adapters.first().ok_or_else(none)?;
            Ok(Selected::Wgpu(pollster::block_on(adapter.open(None))?))
        }
        _ => Err(Error::BackendUnavailable { backend: name.name(), reason: "not part of this build".into() }),
    }
}
