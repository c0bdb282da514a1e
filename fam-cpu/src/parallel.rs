//! How an op's work is cut into tasks, who runs them, and what each may write.
//!
//! An op is a [`Grid`] of tasks, one for each stream, kv head and tile of rows. Whoever runs them, in whatever order, every task does
//! the same arithmetic on its own rows, so the bits do not depend on threads. Nothing here allocates.

pub(crate) mod output;
pub(crate) mod pool;

use crate::span::SpanSource;
use fam_core::{Error, Op, Result, Span};
use pool::Pool;
use std::fmt;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// Where an op runs: the CPU's queue.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub enum Par<'q> {
    /// On the calling thread.
    Serial,
    /// On a pool of this crate; the calling thread works too.
    Pool(&'q Pool),
    /// On the caller's threads.
    Caller(&'q dyn Executor),
    /// Part `ith` of `nth` of one phase of the op, on the calling thread: an engine that deals its own time out runs all parts one after
    /// another, phase by phase ([`fam_core::Support::phases`] counts them). Parts write disjoint rows. For single operations, not for
    /// [`fam_core::Streams`], whose steps are several. Parts at the same time would each borrow the outputs exclusively, which cannot be:
    /// threads that all enter an op at once are an [`Executor`]. All phases of a call have the same arguments and scratch memory.
    Slice {
        /// Which part, below `nth`.
        ith: usize,
        /// Number of parts, at least 1.
        nth: usize,
        /// Which phase.
        phase: usize,
    },
}

impl fmt::Debug for Par<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Par::Serial => f.write_str("Serial"),
            Par::Pool(pool) => write!(f, "Pool({} threads)", pool.threads()),
            Par::Caller(executor) => write!(f, "Caller({} threads)", executor.threads()),
            Par::Slice { ith, nth, phase } => write!(f, "Slice({ith} of {nth}, phase {phase})"),
        }
    }
}

/// A caller's own threads. An engine whose threads all enter an op lets one of them call it; its `run` publishes `body` to the others, each
/// of which calls `body(i)` for every `i` that is its own (`ith`, `ith + nth`, …), and waits for them.
///
/// ```
/// struct Scoped(usize);
///
/// impl fam_cpu::Executor for Scoped {
///     fn threads(&self) -> usize {
///         self.0
///     }
///     fn run(&self, tasks: usize, body: &(dyn Fn(usize) + Sync)) {
///         std::thread::scope(|s| (0..tasks).for_each(|i| drop(s.spawn(move || body(i)))));
///     }
/// }
/// ```
///
/// With rayon `run` is `(0..tasks).into_par_iter().for_each(body)`.
pub trait Executor: Sync {
    /// Most calls of `body` worth making at once.
    fn threads(&self) -> usize;
    /// Calls `body(0) … body(tasks − 1)`, in any order, on any threads, and returns when all have returned.
    fn run(&self, tasks: usize, body: &(dyn Fn(usize) + Sync));
}

/// The tasks of an op.
#[derive(Clone, Copy)]
pub(crate) struct Grid<'a> {
    /// N.
    pub streams: usize,
    /// Head groups: Hkv.
    pub groups: usize,
    /// Tiles of rows.
    pub tiles: usize,
    /// The streams' spans; `None` where an op has none.
    pub spans: Option<SpanSource<'a>>,
    /// Which spans write rows of their slot; `None` where tasks write none. Of streams that name one slot (only device spans can) the first
    /// that writes has it.
    pub writes_slots: Option<fn(&Span) -> bool>,
}

impl Grid<'_> {
    fn tasks(&self) -> usize {
        let sizes = [self.streams, self.groups, self.tiles];
        // An empty output may have any size along its other axes.
        if sizes.contains(&0) { 0 } else { sizes.iter().product() }
    }

    /// Tiles of one head lie together: they read the same keys.
    fn task(&self, index: usize) -> Task {
        let (n, rest) = (index / (self.groups * self.tiles), index % (self.groups * self.tiles));
        let (span, slot) = match &self.spans {
            Some(spans) => (
                spans.get(n),
                self.writes_slots.is_some_and(|writes| spans.is_first_of_slot(n, writes)).then(|| spans.get(n).slot as usize),
            ),
            None => (Span::default(), None),
        };
        Task { n, group: rest / self.tiles, tile: rest % self.tiles, tiles: self.tiles, span, slot }
    }
}

/// A part of an op's work. Made only in this module, once for each index of the grid: a task is the right to write its own rows
/// ([`output::Output`]).
pub(crate) struct Task {
    n: usize,
    group: usize,
    tile: usize,
    tiles: usize,
    span: Span,
    slot: Option<usize>,
}

impl Task {
    /// The stream.
    pub fn n(&self) -> usize {
        self.n
    }
    /// The kv head.
    pub fn group(&self) -> usize {
        self.group
    }
    /// The tile of rows.
    pub fn tile(&self) -> usize {
        self.tile
    }
    /// The stream's span.
    pub fn span(&self) -> Span {
        self.span
    }
    /// Whether the task may write its stream's slot.
    pub fn owns_slot(&self) -> bool {
        self.slot.is_some()
    }
}

/// Runs `body` for every task of `grid`, each call with `share` elements of scratch memory that no other call uses meanwhile.
///
/// The op has validated that `scratch` is at least [`scratch_bytes`] long.
///
/// # Errors
/// [`Error::Invalid`] for a bad slice.
pub(crate) fn run(
    par: &Par<'_>,
    grid: &Grid<'_>,
    scratch: &mut [u8],
    share: usize,
    body: &(dyn Fn(&mut Task, &mut [f32]) + Sync),
) -> Result<()> {
    run_phase(par, Phase::ONLY, grid, scratch, share, body)
}

/// One of the grids of an op, each of which reads what those before have written.
#[derive(Clone, Copy)]
pub(crate) struct Phase {
    /// Which, from 0.
    pub number: usize,
    /// How many there are.
    pub of: usize,
}

impl Phase {
    /// An op of one grid.
    pub const ONLY: Phase = Phase { number: 0, of: 1 };
}

/// [`run`] of one phase of an op.
///
/// # Errors
/// [`Error::Invalid`] for a bad slice.
pub(crate) fn run_phase(
    par: &Par<'_>,
    phase: Phase,
    grid: &Grid<'_>,
    scratch: &mut [u8],
    share: usize,
    body: &(dyn Fn(&mut Task, &mut [f32]) + Sync),
) -> Result<()> {
    let threads = match par {
        Par::Serial => 1,
        Par::Pool(pool) => pool.threads(),
        Par::Caller(executor) => executor.threads().max(1),
        Par::Slice { ith, nth, phase: asked } => {
            check_slice(*ith, *nth, *asked, phase.of)?;
            if *asked != phase.number {
                return Ok(());
            }
            1
        }
    };
    let tasks = grid.tasks();
    let shares = Shares::new(scratch, share);
    if let Par::Slice { ith, nth, .. } = *par {
        // SAFETY: the only use of `shares`.
        let scratch = unsafe { shares.get(0) };
        for index in (ith..tasks).step_by(nth) {
            body(&mut grid.task(index), scratch);
        }
        return Ok(());
    }
    let workers = threads.min(shares.count).min(tasks);
    let (joined, next) = (AtomicUsize::new(0), AtomicUsize::new(0));
    // Worker and task numbers are drawn here rather than taken from the executor: each is drawn once, whatever it does.
    let work = || {
        let worker = joined.fetch_add(1, Relaxed);
        if worker >= workers {
            return;
        }
        // SAFETY: `worker` is below the count, and no other call has drawn it.
        let scratch = unsafe { shares.get(worker) };
        loop {
            let index = next.fetch_add(1, Relaxed);
            if index >= tasks {
                return;
            }
            body(&mut grid.task(index), scratch);
        }
    };
    match par {
        Par::Pool(pool) if workers > 1 => pool.run(&work),
        Par::Caller(executor) if workers > 1 => executor.run(workers, &|_| work()),
        _ => {}
    }
    // All that there is to do for one worker, and for an executor that left calls out.
    work();
    Ok(())
}

/// Refuses a slice that is not the whole.
///
/// # Errors
/// [`Error::Invalid`].
pub(crate) fn check_whole(par: &Par<'_>) -> Result<()> {
    let Par::Slice { ith, nth, phase } = *par else { return Ok(()) };
    check_slice(ith, nth, phase, 1)?;
    if nth > 1 {
        return Err(Error::invalid("slice.nth", nth, "1: only operations can be cut into slices"));
    }
    Ok(())
}

/// Phases of an op.
pub(crate) fn phases(op: Op) -> usize {
    match op {
        Op::Attend | Op::AttendBackward | Op::InfiniReadBackward => 2,
        _ => 1,
    }
}

fn check_slice(ith: usize, nth: usize, phase: usize, phases: usize) -> Result<()> {
    if nth == 0 {
        return Err(Error::invalid("slice.nth", nth, "at least 1"));
    }
    if ith >= nth {
        return Err(Error::invalid("slice.ith", ith, format!("below nth = {nth}")));
    }
    if phase >= phases {
        return Err(Error::invalid("slice.phase", phase, format!("below the op's {phases} phases")));
    }
    Ok(())
}

/// Alignment of scratch memory: a cache line, and the widest vector.
pub(crate) const ALIGN: usize = 64;

/// Bytes of scratch memory in which `workers` shares of `share` elements fit wherever it begins.
pub(crate) fn scratch_bytes(share: usize, workers: usize) -> u64 {
    if share == 0 { 0 } else { (share as u64 * 4).saturating_mul(workers as u64).saturating_add(ALIGN as u64 - 1) }
}

/// Cuts `elements` elements off scratch memory, for all tasks of all phases; the rest is for [`run`].
pub(crate) fn shared(scratch: &mut [u8], elements: usize) -> (&mut [u8], &mut [u8]) {
    let skip = scratch.as_ptr().align_offset(ALIGN).min(scratch.len());
    let (_, scratch) = scratch.split_at_mut(skip);
    scratch.split_at_mut(shared_bytes(elements))
}

/// Bytes that [`shared`] takes, whole cache lines: beside those of [`scratch_bytes`].
pub(crate) fn shared_bytes(elements: usize) -> usize {
    (elements * 4).next_multiple_of(ALIGN)
}

/// Scratch memory cut into equal shares, one for each worker.
struct Shares<'a> {
    first: *mut f32,
    share: usize,
    count: usize,
    _borrow: PhantomData<&'a mut [f32]>,
}

// SAFETY: a share is reached only through `get`, whose callers promise to be alone with it.
unsafe impl Sync for Shares<'_> {}

impl<'a> Shares<'a> {
    fn new(scratch: &'a mut [u8], share: usize) -> Self {
        let skip = scratch.as_ptr().align_offset(ALIGN).min(scratch.len());
        let whole = (scratch.len() - skip) / ALIGN * ALIGN;
        // The cast fails on an empty slice alone, which may lie anywhere.
        let floats: &mut [f32] = bytemuck::try_cast_slice_mut(&mut scratch[skip..skip + whole]).unwrap_or_default();
        let count = floats.len().checked_div(share).unwrap_or(usize::MAX);
        assert!(count > 0, "validated: scratch memory for one worker");
        Shares { first: floats.as_mut_ptr(), share, count, _borrow: PhantomData }
    }

    /// Share `worker`.
    ///
    /// # Safety
    /// `worker < count`, and no other slice of this share is in use.
    #[allow(clippy::mut_from_ref)]
    unsafe fn get(&self, worker: usize) -> &mut [f32] {
        // SAFETY: `new` has found `count` shares of `share` elements from `first`, exclusively borrowed for `'a`; shares of different
        // workers do not overlap, and the caller is alone with this one.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(worker * self.share), self.share) }
    }
}
