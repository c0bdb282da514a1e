//! A small persistent thread pool: nothing is spawned or allocated per call.

use fam_core::{Error, Result};
use std::any::Any;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// Polls of the job number before a worker parks: some tens of microseconds, so that the ops of one step find it awake.
const SPINS: usize = 2000;

/// Threads that wait for work. The calling thread of an op works too, so a pool of n threads spawns n − 1.
///
/// May be shared by several threads and used from inside other pools: while one call has the workers, another runs on its own thread,
/// with the same bits.
pub struct Pool {
    shared: Arc<Shared>,
    /// Held while a call has the workers.
    turn: Mutex<()>,
    workers: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// Number of the last job, for workers that spin; written under the lock.
    number: AtomicU64,
    /// Notified of a new job and of the end.
    wake: Condvar,
    /// Notified when a worker has begun, and when the last one has left a job.
    left: Condvar,
}

#[derive(Default)]
struct State {
    /// Workers that have begun.
    begun: usize,
    number: u64,
    /// The job that workers may still enter.
    job: Option<Job>,
    /// Workers inside a job.
    inside: usize,
    parked: usize,
    stop: bool,
    panic: Option<Box<dyn Any + Send>>,
}

/// What workers run, its lifetime erased: valid as long as a worker can be inside, see [`Pool::run`].
#[derive(Clone, Copy)]
struct Job(*const (dyn Fn() + Sync + 'static));

// SAFETY: the closure behind the pointer is `Sync`.
unsafe impl Send for Job {}

impl Pool {
    /// A pool of `threads` threads, the calling one included.
    ///
    /// # Errors
    /// [`Error::Invalid`] for 0 threads; [`Error::BackendUnavailable`] where the system refuses to start one.
    pub fn new(threads: usize) -> Result<Self> {
        if threads == 0 {
            return Err(Error::invalid("threads", threads, "at least 1"));
        }
        let mut pool = Pool { shared: Arc::default(), turn: Mutex::default(), workers: Vec::new() };
        for i in 1..threads {
            let shared = pool.shared.clone();
            let worker = std::thread::Builder::new().name(format!("fam-cpu-{i}")).spawn(move || shared.work());
            let refused = |e| Error::BackendUnavailable { backend: "cpu", reason: format!("thread {i} of {threads}: {e}") };
            pool.workers.push(worker.map_err(refused)?);
        }
        // What threads allocate when they begin, they allocate before the first op.
        let mut state = pool.shared.lock();
        while state.begun < pool.workers.len() {
            state = pool.shared.left.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        drop(state);
        Ok(pool)
    }

    /// Threads that work on a call.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `job` on the calling thread and on every worker that comes before the calling thread has done. A panic of any of them is
    /// raised here, after all have left.
    pub(crate) fn run(&self, job: &(dyn Fn() + Sync)) {
        let turn = match self.turn.try_lock() {
            Err(std::sync::TryLockError::WouldBlock) => return job(),
            Err(std::sync::TryLockError::Poisoned(turn)) => turn.into_inner(),
            Ok(turn) => turn,
        };
        // SAFETY: only the lifetime changes. Workers enter a job only while `state.job` holds it, under the lock, and count themselves
        // `inside`; below, the job is taken out under the lock and `inside` waited for, on every path: `job` outlives every use.
        let erased = Job(unsafe {
            std::mem::transmute::<*const (dyn Fn() + Sync + '_), *const (dyn Fn() + Sync + 'static)>(std::ptr::from_ref(job))
        });
        {
            let mut state = self.shared.lock();
            state.number += 1;
            state.job = Some(erased);
            self.shared.number.store(state.number, Ordering::Release);
            if state.parked > 0 {
                self.shared.wake.notify_all();
            }
        }
        let mine = catch_unwind(AssertUnwindSafe(job));
        let mut state = self.shared.lock();
        state.job = None;
        while state.inside > 0 {
            state = self.shared.left.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let theirs = state.panic.take();
        drop(state);
        drop(turn);
        if let Some(panic) = mine.err().or(theirs) {
            resume_unwind(panic);
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A worker's life.
    fn work(&self) {
        self.lock().begun += 1;
        self.left.notify_all();
        let mut seen = 0;
        loop {
            for _ in 0..SPINS {
                if self.number.load(Ordering::Acquire) != seen {
                    break;
                }
                std::hint::spin_loop();
            }
            let mut state = self.lock();
            while state.number == seen && !state.stop {
                state.parked += 1;
                state = self.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
                state.parked -= 1;
            }
            if state.stop {
                return;
            }
            seen = state.number;
            let Some(job) = state.job else { continue };
            state.inside += 1;
            drop(state);
            // SAFETY: entered under the lock while the job was there and counted `inside`, so `Pool::run` has not returned.
            let result = catch_unwind(AssertUnwindSafe(unsafe { &*job.0 }));
            let mut state = self.lock();
            if let Err(panic) = result {
                state.panic = Some(panic);
            }
            state.inside -= 1;
            if state.inside == 0 {
                self.left.notify_all();
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        // A spinning worker looks at `stop` when its spins are over.
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            // Panics are caught in `work`: there is nothing to report.
            let _ = worker.join();
        }
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pool({} threads)", self.threads())
    }
}

#[cfg(test)]
mod tests {
    use super::Pool;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    fn count(calls: &AtomicUsize) {
        calls.fetch_add(1, SeqCst);
    }

    #[test]
    fn a_panic_is_raised_and_the_pool_goes_on() {
        let pool = Pool::new(3).unwrap();
        let caller = std::thread::current().id();
        for in_worker in [false, true] {
            // Whoever is not to panic waits for the one that is, so that it surely comes.
            let panicked = AtomicUsize::new(0);
            let job = || {
                if (std::thread::current().id() != caller) == in_worker {
                    panicked.fetch_add(1, SeqCst);
                    panic!("on purpose");
                }
                while panicked.load(SeqCst) == 0 {
                    std::thread::yield_now();
                }
            };
            assert!(catch_unwind(AssertUnwindSafe(|| pool.run(&job))).is_err());
            let ran = AtomicUsize::new(0);
            pool.run(&|| count(&ran));
            assert!(ran.into_inner() >= 1);
        }
    }

    #[test]
    fn nested_and_concurrent_calls_run() {
        let pool = Pool::new(2).unwrap();
        let ran = AtomicUsize::new(0);
        std::thread::scope(|s| {
            for _ in 0..4 {
                s.spawn(|| {
                    for _ in 0..200 {
                        pool.run(&|| pool.run(&|| count(&ran)));
                    }
                });
            }
        });
        assert!(ran.into_inner() >= 800);
    }
}
