//! Attention with a memory on the CPU: every operation of [`fam_core`] in f32, f16 and bf16.
//!
//! ```
//! use fam_core::{Attend, Backend, Keys, Plan, Rows, Shape, Span, Spans, View, ViewMut};
//! use fam_cpu::{Cpu, Par, Pool};
//!
//! let shape = Shape::builder().heads(4).kv_heads(2).head_dim(64).block_len(16).build()?;
//! let cpu = Cpu::new()?;
//! let plan = cpu.plan(&shape.spec(1, 16).build()?)?; // once, for all layers and steps
//! let mut scratch = vec![0; plan.support().scratch_bytes as usize];
//! let pool = Pool::new(2)?;
//!
//! let (q, k, v) = (vec![0.5f32; 16 * 4 * 64], vec![0.1f32; 16 * 2 * 64], vec![2.0f32; 16 * 2 * 64]);
//! let mut o = vec![0f32; q.len()];
//! let keys = Keys::Strided { k: View::tokens(&k, [1, 16, 2, 64]), v: View::tokens(&v, [1, 16, 2, 64]) };
//! let rows = Rows::new(View::tokens(&q, [1, 16, 4, 64]), ViewMut::tokens(&mut o, [1, 16, 4, 64]));
//! let span = [Span::new(0, 0, 16)];
//! cpu.attend(&plan, &mut Par::Pool(&pool), Attend::new(Spans::Host(&span), keys).rows(rows), &mut scratch)?;
//! assert!(o.iter().all(|o| (o - 2.0).abs() < 1e-6));
//! # Ok::<(), fam_core::Error>(())
//! ```
//!
//! Memory is `[u8]`, aligned for its elements; a slice of elements becomes a view with [`fam_core::View::of`]. Operations run where the
//! queue, a [`Par`], says; they allocate nothing, and their bits depend neither on the number of threads nor on who runs them.
//!
//! NaN and infinities in a key or value reach exactly the rows that see it; in the backward ops, no other stream and kv head.

#![deny(unsafe_code)]
#![allow(clippy::needless_range_loop, reason = "i and j are the indices of a block of registers")]

mod append;
mod attend;
mod attend_backward;
mod convert;
mod device;
mod infini_backward;
mod infini_read;
mod infini_write;
mod isa;
mod memory;
mod merge;
mod merge_backward;
mod pack;
#[allow(unsafe_code, reason = "tasks share scratch memory and outputs, and a pool runs borrowed work")]
mod parallel;
#[cfg(feature = "probe")]
mod probe;
#[allow(unsafe_code, reason = "the inner loop of all products, whose indices are checked once for all of its rounds")]
mod product;
mod softmax;
mod span;
mod tile;
#[allow(unsafe_code, reason = "loads and stores of vectors")]
mod vector;
mod walk;

pub use isa::Isa;
pub use parallel::pool::Pool;
pub use parallel::{Executor, Par};
pub use tile::{BLOCK_N, FEW_MEM_ROWS, FEW_ROWS};

use fam_core::{
    Append, Attend, AttendBackward, Backend, Dtype, Error, InfiniRead, InfiniReadBackward, InfiniWrite, InfiniWriteBackward,
    KernelId, Merge, MergeBackward, Plan, Result, Spec, Support,
};
use tile::Tile;

/// The CPU as a backend: an instruction set, and the number of workers that plans reserve scratch memory for.
#[derive(Clone, Copy, Debug)]
pub struct Cpu {
    isa: Isa,
    threads: usize,
}

impl Cpu {
    /// This machine: its best instruction set, or the one that the environment variable `FAM_ISA` names, and all its threads.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where `FAM_ISA` names an instruction set that this crate or this machine lacks.
    pub fn new() -> Result<Self> {
        Ok(Cpu { isa: Isa::detect()?, threads: std::thread::available_parallelism().map_or(1, usize::from) })
    }

    /// The same with another instruction set.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where this machine lacks it.
    pub fn with_isa(self, isa: Isa) -> Result<Self> {
        Ok(Cpu { isa: isa.available()?, ..self })
    }

    /// The same with scratch memory for `threads` workers (at least 1) in every plan, whose calls are cut into tasks enough for so many. A
    /// queue uses no more threads than its call's scratch memory has room for.
    #[must_use]
    pub fn with_threads(self, threads: usize) -> Self {
        Cpu { threads: threads.max(1), ..self }
    }

    /// The instruction set.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Workers that plans reserve scratch memory for.
    pub fn threads(&self) -> usize {
        self.threads
    }
}

/// A plan of [`Cpu`].
#[derive(Clone, Debug)]
pub struct CpuPlan {
    spec: Spec,
    support: Support,
    isa: Isa,
    tile: Tile,
    /// Workers that there is scratch memory for.
    threads: usize,
    /// Elements of scratch memory for one worker, and for all tasks.
    share: usize,
    shared: usize,
}

impl Plan for CpuPlan {
    fn spec(&self) -> &Spec {
        &self.spec
    }
    fn support(&self) -> &Support {
        &self.support
    }
}

impl Backend for Cpu {
    type Mem = [u8];
    type Queue<'q> = Par<'q>;
    type Plan = CpuPlan;

    fn name(&self) -> &'static str {
        "cpu"
    }

    fn support(&self, spec: &Spec) -> Result<Support> {
        let (dtype, d) = (spec.shape().dtype(), spec.shape().head_dim());
        if d > tile::MAX_HEAD_DIM {
            return Err(Error::LimitExceeded { what: "head_dim", requested: d as u64, max: tile::MAX_HEAD_DIM as u64 });
        }
        if !Dtype::ALL.contains(&dtype) {
            return Err(Error::unsupported("dtype", dtype, "f32, f16, bf16"));
        }
        let kernel =
            |&op| (KernelId { backend: "cpu", op, dtype, variant: self.isa.kernel(op, dtype).name() }, parallel::phases(op));
        let ring = memory::ring_layout(spec);
        let ring_bytes = (ring.shape[0] * ring.stride[0] * ring.dtype.bytes()) as u64;
        Ok(Support::new(spec.ops().iter().map(kernel).collect())
            .scratch_bytes(
                parallel::scratch_bytes(tile::worker_share(spec), self.threads)
                    .saturating_add(parallel::shared_bytes(tile::shared(spec, self.threads)) as u64),
            )
            .ring_bytes(ring_bytes))
    }

    fn plan(&self, spec: &Spec) -> Result<CpuPlan> {
        let support = self.support(spec)?;
        let (tile, threads) = (Tile::of(spec.shape()), self.threads);
        let (share, shared) = (tile::worker_share(spec), tile::shared(spec, threads));
        Ok(CpuPlan { spec: spec.clone(), support, isa: self.isa, tile, threads, share, shared })
    }

    fn append(&self, plan: &CpuPlan, queue: &mut Par<'_>, args: Append<'_, [u8]>, scratch: &mut [u8]) -> Result<()> {
        append::append(plan, queue, args, scratch)
    }

    fn attend(&self, plan: &CpuPlan, queue: &mut Par<'_>, args: Attend<'_, [u8]>, scratch: &mut [u8]) -> Result<()> {
        attend::attend(plan, queue, args, scratch)
    }

    fn infini_read(&self, plan: &CpuPlan, queue: &mut Par<'_>, args: InfiniRead<'_, [u8]>, scratch: &mut [u8]) -> Result<()> {
        infini_read::infini_read(plan, queue, args, scratch)
    }

    fn infini_write(&self, plan: &CpuPlan, queue: &mut Par<'_>, args: InfiniWrite<'_, [u8]>, scratch: &mut [u8]) -> Result<()> {
        infini_write::infini_write(plan, queue, args, scratch)
    }

    fn merge(&self, plan: &CpuPlan, queue: &mut Par<'_>, args: Merge<'_, [u8]>, scratch: &mut [u8]) -> Result<()> {
        merge::merge(plan, queue, args, scratch)
    }

    fn attend_backward(
        &self,
        plan: &CpuPlan,
        queue: &mut Par<'_>,
        args: AttendBackward<'_, [u8]>,
        scratch: &mut [u8],
    ) -> Result<()> {
        attend_backward::attend_backward(plan, queue, args, scratch)
    }

    fn infini_read_backward(
        &self,
        plan: &CpuPlan,
        queue: &mut Par<'_>,
        args: InfiniReadBackward<'_, [u8]>,
        scratch: &mut [u8],
    ) -> Result<()> {
        infini_backward::infini_read_backward(plan, queue, args, scratch)
    }

    fn infini_write_backward(
        &self,
        plan: &CpuPlan,
        queue: &mut Par<'_>,
        args: InfiniWriteBackward<'_, [u8]>,
        scratch: &mut [u8],
    ) -> Result<()> {
        infini_backward::infini_write_backward(plan, queue, args, scratch)
    }

    fn merge_backward(
        &self,
        plan: &CpuPlan,
        queue: &mut Par<'_>,
        args: MergeBackward<'_, [u8]>,
        scratch: &mut [u8],
    ) -> Result<()> {
        merge_backward::merge_backward(plan, queue, args, scratch)
    }
}

/// Engines move these between threads.
const _: () = {
    const fn is_shared<T: Send + Sync>() {}
    is_shared::<Cpu>();
    is_shared::<CpuPlan>();
    is_shared::<fam_core::Bytes>();
    is_shared::<Pool>();
};

/// The deliberate errors of this crate, each selected with `fam_core::mutants::select`.
#[cfg(fam_mutants)]
#[doc(hidden)]
pub const MUTANTS: &[&str] = &[
    "attend-acc-not-rescaled",
    "attend-dropped-key",
    "attend-epsilon",
    "attend-finite-sentinel",
    "attend-gqa",
    "attend-index-32-bit",
    "attend-logits-16-bit",
    "attend-lse-log2",
    "attend-lse-without-sink",
    "attend-max-from-zero",
    "attend-mem-rows-all",
    "attend-mem-rows-causal",
    "attend-mem-rows-short",
    "attend-mem-rows-window",
    "attend-next-memory",
    "attend-origin",
    "attend-pair-whole",
    "attend-partial-tile",
    "attend-ring-wrap",
    "attend-scale",
    "attend-sink-weightless",
    "attend-slot",
    "attend-split-lost",
    "attend-split-unshifted",
    "attend-stale-row",
    "attend-sum-16-bit",
    "attend-sum-not-rescaled",
    "attend-token-window",
    "attend-truncated",
    "attend-window-block",
    "attend-window-tokens",
    "backward-d-lse",
    "backward-delta",
    "backward-mem-from-rows",
    "backward-pair-lost",
    "backward-rows-seeing",
    "backward-scale-k",
    "backward-scale-q",
    "infini-backward-d-z",
    "infini-backward-delta",
    "infini-backward-entry",
    "infini-backward-gate",
    "infini-backward-order",
    "infini-backward-origin",
    "infini-backward-ratio",
    "infini-backward-slope",
    "infini-backward-unshifted",
    "infini-before-origin",
    "infini-beta-head",
    "infini-delta-ignored",
    "infini-epsilon",
    "infini-expm1",
    "infini-gate-inverted",
    "infini-next-state",
    "infini-partial-segment",
    "infini-rotated-query",
    "infini-unshifted",
    "infini-z-stale",
    "merge-backward-lse",
    "merge-backward-other",
    "merge-empties",
    "merge-lse",
    "merge-swapped",
    "merge-unshifted",
];
