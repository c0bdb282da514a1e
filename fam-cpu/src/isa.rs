//! Instruction sets that the kernels are compiled for, and the choice among them.

#[cfg(target_arch = "aarch64")]
use crate::vector::neon::Neon;
use crate::vector::{Body, Vector, scalar::Scalar};
#[cfg(target_arch = "x86_64")]
use crate::vector::{avx2::Avx2, avx512::Avx512};
use fam_core::{Dtype, Error, Op, Result};
use std::fmt;
use std::str::FromStr;

/// A level of instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Isa {
    /// x86-64 with AVX512-BF16, beside what `Avx512` asks for.
    Avx512Bf16,
    /// x86-64 with AVX-512 F, BW, DQ and VL, beside what `Avx2` asks for.
    Avx512,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// AArch64 with NEON.
    Neon,
    /// The target's baseline: runs anywhere.
    Scalar,
}

impl Isa {
    /// Every level, the best first.
    pub const ALL: [Isa; 5] = [Isa::Avx512Bf16, Isa::Avx512, Isa::Avx2, Isa::Neon, Isa::Scalar];

    /// The name in kernel ids and in `FAM_ISA`.
    pub const fn name(self) -> &'static str {
        match self {
            Isa::Avx512Bf16 => "avx512bf16",
            Isa::Avx512 => "avx512",
            Isa::Avx2 => "avx2",
            Isa::Neon => "neon",
            Isa::Scalar => "scalar",
        }
    }

    /// Whether this machine has the instructions.
    pub fn is_available(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => Avx512::<true>::is_available(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => Avx512::<false>::is_available(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => Avx2::is_available(),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => Neon::is_available(),
            Isa::Scalar => true,
            #[allow(unreachable_patterns)]
            _ => false,
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

    /// The level whose kernel an op runs: the dot of bf16 pairs serves attention in bf16 and its gradients, and nothing else differs from `Avx512`.
    pub fn kernel(self, op: Op, dtype: Dtype) -> Isa {
        match self {
            Isa::Avx512Bf16 if !matches!(op, Op::Attend | Op::AttendBackward) || !self.pairs().contains(&dtype) => Isa::Avx512,
            _ => self,
        }
    }

    /// The dtypes in which attention multiplies pairs of bf16, but in the forward pass for rows that are few ([`crate::FEW_ROWS`], [`crate::FEW_MEM_ROWS`]). Then
    /// probabilities are rounded to bf16, and operands and sums of products that are subnormal in f32 count as 0.
    pub const fn pairs(self) -> &'static [Dtype] {
        if matches!(self, Isa::Avx512Bf16) { &[Dtype::Bf16] } else { &[] }
    }

    /// Runs a body whose products are of pairs, on vectors of the level that has their dot.
    pub(crate) fn run_pairs<B: Body>(self, body: B) -> B::Output {
        assert!(self == Isa::Avx512Bf16 && self.is_available(), "a plan is made only for a level that the machine has");
        #[cfg(target_arch = "x86_64")]
        return Avx512::<true>::run(body);
        #[cfg(not(target_arch = "x86_64"))]
        Scalar::run(body)
    }

    /// Runs a body on vectors of this level.
    pub(crate) fn run<B: Body>(self, body: B) -> B::Output {
        assert!(self.is_available(), "a plan is made only for a level that the machine has");
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 | Isa::Avx512 => Avx512::<false>::run(body),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => Avx2::run(body),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => Neon::run(body),
            _ => Scalar::run(body),
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
