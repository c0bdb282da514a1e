//! The traits that a backend implements, and what it says of itself.

use crate::{
    Append, Attend, AttendBackward, Dtype, Error, InfiniRead, InfiniReadBackward, InfiniWrite, InfiniWriteBackward, Memory,
    Merge, MergeBackward, ReadRing, Result, Spec,
};
use std::borrow::BorrowMut;
use std::fmt;

/// The operations of the contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Op {
    /// [`Backend::append`].
    Append,
    /// [`Backend::attend`].
    Attend,
    /// [`Backend::infini_read`].
    InfiniRead,
    /// [`Backend::infini_write`].
    InfiniWrite,
    /// [`Backend::merge`].
    Merge,
    /// [`Backend::attend_backward`].
    AttendBackward,
    /// [`Backend::infini_read_backward`].
    InfiniReadBackward,
    /// [`Backend::infini_write_backward`].
    InfiniWriteBackward,
    /// [`Backend::merge_backward`].
    MergeBackward,
}

impl Op {
    /// Every operation of the forward pass.
    pub const FORWARD: [Op; 5] = [Op::Append, Op::Attend, Op::InfiniRead, Op::InfiniWrite, Op::Merge];
    /// Every operation of the backward pass.
    pub const BACKWARD: [Op; 4] = [Op::AttendBackward, Op::InfiniReadBackward, Op::InfiniWriteBackward, Op::MergeBackward];
    /// Every operation.
    pub const ALL: [Op; 9] = [
        Op::Append,
        Op::Attend,
        Op::InfiniRead,
        Op::InfiniWrite,
        Op::Merge,
        Op::AttendBackward,
        Op::InfiniReadBackward,
        Op::InfiniWriteBackward,
        Op::MergeBackward,
    ];

    /// The name used in kernel ids and on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Op::Append => "append",
            Op::Attend => "attend",
            Op::InfiniRead => "infini_read",
            Op::InfiniWrite => "infini_write",
            Op::Merge => "merge",
            Op::AttendBackward => "attend_backward",
            Op::InfiniReadBackward => "infini_read_backward",
            Op::InfiniWriteBackward => "infini_write_backward",
            Op::MergeBackward => "merge_backward",
        }
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Names one kernel: `{backend}-{op}-{dtype}-{variant}`, e.g. `cpu-attend-bf16-scalar`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KernelId {
    /// [`Backend::name`].
    pub backend: &'static str,
    /// The operation.
    pub op: Op,
    /// The shape's dtype.
    pub dtype: Dtype,
    /// Instruction set, tile or device family.
    pub variant: &'static str,
}

impl fmt::Display for KernelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}-{}-{}", self.backend, self.op, self.dtype, self.variant)
    }
}

/// What a backend will do for a [`Spec`]: a pure function of the spec and the device's abilities.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Support {
    /// The kernel of each op of the spec, with its number of phases (see [`Support::phases`]).
    pub kernels: Vec<(KernelId, usize)>,
    /// Bytes of scratch memory that every call of the plan is handed; contents need not survive between calls (the phases of a call are one).
    pub scratch_bytes: u64,
    /// Bytes of the key ring of all slots. Slot `s` is bytes `s·ring_bytes/slots ..`: a slot is the page, copied whole.
    pub ring_bytes: u64,
}

impl Support {
    /// No scratch, no ring; add what the backend needs.
    pub fn new(kernels: Vec<(KernelId, usize)>) -> Self {
        Support { kernels, scratch_bytes: 0, ring_bytes: 0 }
    }

    /// Sets [`Support::scratch_bytes`].
    #[must_use]
    pub fn scratch_bytes(mut self, bytes: u64) -> Self {
        self.scratch_bytes = bytes;
        self
    }

    /// Sets [`Support::ring_bytes`].
    #[must_use]
    pub fn ring_bytes(mut self, bytes: u64) -> Self {
        self.ring_bytes = bytes;
        self
    }

    /// The kernel that serves `op`.
    pub fn kernel(&self, op: Op) -> Option<KernelId> {
        self.kernels.iter().find(|(id, _)| id.op == op).map(|(id, _)| *id)
    }

    /// Phases of `op`: parts of the work with a barrier between, where a caller runs it in slices. 1 on a GPU.
    pub fn phases(&self, op: Op) -> usize {
        self.kernels.iter().find(|(id, _)| id.op == op).map_or(0, |(_, phases)| *phases)
    }
}

/// A kernel chosen for every op of a [`Spec`]. Made once, used by all layers and steps.
pub trait Plan: Send + Sync {
    /// What it was made for.
    fn spec(&self) -> &Spec;
    /// What was chosen.
    fn support(&self) -> &Support;
    /// Bytes that the forward pass keeps for the backward pass: [`Spec::saved_bytes`].
    fn saved_bytes(&self) -> u64 {
        self.spec().saved_bytes()
    }
}

/// The plan of a backend that has nothing else to remember.
impl Plan for (Spec, Support) {
    fn spec(&self) -> &Spec {
        &self.0
    }
    fn support(&self) -> &Support {
        &self.1
    }
}

/// A device, or a set of threads, that runs the contract's operations.
///
/// Operations only *enqueue*: on the caller's queue, with borrowed views and scratch memory that the caller owns. They allocate no device
/// memory, never synchronise, load a module, read back or touch a global, so they can be captured into a graph. They check their arguments
/// first (`args.validate(plan, scratch)`) and enqueue nothing on error. An op that a backend lacks is `Unsupported` when the plan is made.
pub trait Backend {
    /// Memory of the device: `[u8]` on the CPU, a region of a buffer elsewhere.
    type Mem: ?Sized + Memory;
    /// Where work is enqueued, borrowed from the caller: a thread pool, a CUDA stream, a wgpu encoder.
    type Queue<'q>;
    /// The kernels chosen for a spec.
    type Plan: Plan;

    /// The name in kernel ids, reports and on the command line.
    fn name(&self) -> &'static str;

    /// What this backend would do for `spec`, without doing any of it.
    ///
    /// # Errors
    /// [`Error::Unsupported`] or [`Error::LimitExceeded`], naming what is not served.
    fn support(&self, spec: &Spec) -> Result<Support>;

    /// Chooses and loads the kernels. May be slow; it is made once.
    ///
    /// # Errors
    /// Those of [`Backend::support`], and what loading can bring.
    fn plan(&self, spec: &Spec) -> Result<Self::Plan>;

    /// Copies new keys and values into the ring, and memory rows into their buffer.
    ///
    /// # Errors
    /// As [`Append::validate`]; [`Error::DeviceLost`].
    fn append(
        &self,
        plan: &Self::Plan,
        _queue: &mut Self::Queue<'_>,
        _args: Append<'_, Self::Mem>,
        _scratch: &mut Self::Mem,
    ) -> Result<()> {
        missing(self, plan, Op::Append)
    }

    /// One joint softmax over window, memory and the current block.
    ///
    /// # Errors
    /// As [`Attend::validate`]; [`Error::DeviceLost`].
    fn attend(
        &self,
        plan: &Self::Plan,
        _queue: &mut Self::Queue<'_>,
        _args: Attend<'_, Self::Mem>,
        _scratch: &mut Self::Mem,
    ) -> Result<()> {
        missing(self, plan, Op::Attend)
    }

    /// Reads the compressive memory and gates it into the local attention.
    ///
    /// # Errors
    /// As [`InfiniRead::validate`]; [`Error::DeviceLost`].
    fn infini_read(
        &self,
        plan: &Self::Plan,
        _queue: &mut Self::Queue<'_>,
        _args: InfiniRead<'_, Self::Mem>,
        _scratch: &mut Self::Mem,
    ) -> Result<()> {
        missing(self, plan, Op::InfiniRead)
    }

    /// Writes whole segments into the compressive memory.
    ///
    /// # Errors
    /// As [`InfiniWrite::validate`]; [`Error::DeviceLost`].
    fn infini_write(
        &self,
        plan: &Self::Plan,
        _queue: &mut Self::Queue<'_>,
        _args: InfiniWrite<'_, Self::Mem>,
        _scratch: &mut Self::Mem,
    ) -> Result<()> {
        missing(self, plan, Op::InfiniWrite)
    }

    /// Combines attention over two disjoint key sets.
    ///
    /// # Errors
    /// As [`Merge::validate`]; [`Error::DeviceLost`].
    fn merge(
        &self,
        plan: &Self::Plan,
        _queue: &mut Self::Queue<'_>,
        _args: Merge<'_, Self::Mem>,
        _scratch: &mut Self::Mem,
    ) -> Result<()> {
        missing(self, plan, Op::Merge)
    }

    /// Gradients of [`Backend::attend`].
    ///
    /// # Errors
    /// As [`AttendBackward::validate`]; [`Error::DeviceLost`].
    fn attend_backward(
        &self,
        plan: &Self::Plan,
        _queue: &mut Self::Queue<'_>,
        _args: AttendBackward<'_, Self::Mem>,
        _scratch: &mut Self::Mem,
    ) -> Result<()> {
        missing(self, plan, Op::AttendBackward)
    }

    /// Gradients of [`Backend::infini_read`].
    ///
    /// # Errors
    /// As [`InfiniReadBackward::validate`]; [`Error::DeviceLost`].
    fn infini_read_backward(
        &self,
        plan: &Self::Plan,
        _queue: &mut Self::Queue<'_>,
        _args: InfiniReadBackward<'_, Self::Mem>,
        _scratch: &mut Self::Mem,
    ) -> Result<()> {
        missing(self, plan, Op::InfiniReadBackward)
    }

    /// Gradients of [`Backend::infini_write`].
    ///
    /// # Errors
    /// As [`InfiniWriteBackward::validate`]; [`Error::DeviceLost`].
    fn infini_write_backward(
        &self,
        plan: &Self::Plan,
        _queue: &mut Self::Queue<'_>,
        _args: InfiniWriteBackward<'_, Self::Mem>,
        _scratch: &mut Self::Mem,
    ) -> Result<()> {
        missing(self, plan, Op::InfiniWriteBackward)
    }

    /// Gradients of [`Backend::merge`].
    ///
    /// # Errors
    /// As [`MergeBackward::validate`]; [`Error::DeviceLost`].
    fn merge_backward(
        &self,
        plan: &Self::Plan,
        _queue: &mut Self::Queue<'_>,
        _args: MergeBackward<'_, Self::Mem>,
        _scratch: &mut Self::Mem,
    ) -> Result<()> {
        missing(self, plan, Op::MergeBackward)
    }
}

/// What an op returns where a backend leaves it out: plans for it cannot be made.
fn missing<B: Backend + ?Sized>(backend: &B, plan: &B::Plan, op: Op) -> Result<()> {
    Err(Error::no_kernel(op, plan.spec().shape().dtype(), backend.name()))
}

/// Owning memory and moving bytes: what [`crate::Streams`], tests and the command line need beside the operations. An engine that embeds
/// the operations never meets this trait. Only [`crate::Streams`] needs the methods that have a default, which is `Unsupported`.
pub trait Device: Backend {
    /// Memory that this crate owns.
    type Owned: BorrowMut<Self::Mem> + Send;

    /// Exactly `bytes` bytes of zeros ([`Memory::bytes`]), aligned for any element type.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::LimitExceeded`], [`Error::DeviceLost`].
    fn alloc(&self, bytes: u64) -> Result<Self::Owned>;

    /// Copies from the host, after all work submitted before.
    ///
    /// # Errors
    /// [`Error::Invalid`] past the end; [`Error::DeviceLost`].
    fn upload(&self, mem: &mut Self::Mem, offset: u64, bytes: &[u8]) -> Result<()>;

    /// Copies to the host; waits for all work submitted before.
    ///
    /// # Errors
    /// [`Error::Invalid`] past the end; [`Error::DeviceLost`].
    fn download(&self, mem: &Self::Mem, offset: u64, bytes: &mut [u8]) -> Result<()>;

    /// Submits what was enqueued on `queue` and waits until it is done.
    ///
    /// # Errors
    /// [`Error::DeviceLost`].
    fn synchronize(&self, queue: &mut Self::Queue<'_>) -> Result<()>;

    /// Refuses a queue that would leave out a part of what is enqueued on it. [`crate::Streams`] asks before it enqueues anything.
    ///
    /// # Errors
    /// [`Error::Invalid`], naming the queue's property.
    fn check_queue(&self, _queue: &Self::Queue<'_>) -> Result<()> {
        Ok(())
    }

    /// Enqueues zeros in bytes `at`.
    ///
    /// # Errors
    /// [`Error::Invalid`] past the end; [`Error::DeviceLost`].
    fn clear(&self, _queue: &mut Self::Queue<'_>, _mem: &mut Self::Mem, _at: std::ops::Range<u64>) -> Result<()> {
        Err(lacks(self, "clear"))
    }

    /// Enqueues a copy of bytes `from` to `to ..`; the two do not overlap.
    ///
    /// # Errors
    /// [`Error::Invalid`] past the end; [`Error::DeviceLost`].
    fn copy_within(
        &self,
        _queue: &mut Self::Queue<'_>,
        _mem: &mut Self::Mem,
        _from: std::ops::Range<u64>,
        _to: u64,
    ) -> Result<()> {
        Err(lacks(self, "copy_within"))
    }

    /// Enqueues the inverse of [`Backend::append`]: keys and values of the spans' tokens, from the ring.
    ///
    /// # Errors
    /// As [`ReadRing::validate`]; [`Error::DeviceLost`].
    fn read_ring(&self, _plan: &Self::Plan, _queue: &mut Self::Queue<'_>, _args: ReadRing<'_, Self::Mem>) -> Result<()> {
        Err(lacks(self, "read_ring"))
    }
}

/// What a method of [`Device`] returns where a backend leaves it out.
pub(crate) fn lacks<B: Backend + ?Sized>(backend: &B, method: &'static str) -> Error {
    Error::unsupported("method", method, format!("Streams needs it; {} has operations only", backend.name()))
}
