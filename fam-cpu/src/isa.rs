//! Instruction sets that the kernels are compiled for, and the choice among them.

use crate::vector::{Body, Vector, scalar::Scalar};
use fam_core::{Error, Result};
use std::fmt;
use std::str::FromStr;

/// A level of instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Isa {
    /// The target's baseline: runs anywhere.
    Scalar,
}

impl Isa {
    /// Every level, the best first.
    pub const ALL: [Isa; 1] = [Isa::Scalar];

    /// The name in kernel ids and in `FAM_ISA`.
    pub const fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
        }
    }

    /// Whether this machine has the instructions.
    pub fn is_available(self) -> bool {
        match self {
            Isa::Scalar => true,
        }
    }

    /// The best level of this machine, or the one that the environment variable `FAM_ISA` names: it can only restrict.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where `FAM_ISA` names no level, or one that this machine lacks.
    pub fn detect() -> Result<Isa> {
        match std::env::var_os("FAM_ISA") {
            Some(name) => name.to_string_lossy().parse::<Isa>()?.available(),
            None => Ok(Isa::ALL.into_iter().find(|isa| isa.is_available()).unwrap_or(Isa::Scalar)),
        }
    }

    /// Runs a body on vectors of this level, which [`Isa::available`] has passed.
    pub(crate) fn run<B: Body>(self, body: B) -> B::Output {
        match self {
            Isa::Scalar => Scalar::run(body),
        }
    }

    /// The level itself, if this machine has it.
    pub(crate) fn available(self) -> Result<Isa> {
        if self.is_available() { Ok(self) } else { Err(unsupported(self)) }
    }
}

fn unsupported(got: impl ToString) -> Error {
    let allowed: Vec<_> = Isa::ALL.into_iter().filter(|isa| isa.is_available()).map(Isa::name).collect();
    Error::unsupported("isa", got, allowed.join(", "))
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Isa {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        Isa::ALL.into_iter().find(|isa| isa.name() == s).ok_or_else(|| unsupported(s))
    }
}
