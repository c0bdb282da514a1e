//! Nothing is allocated in a step: not by [`fam::Streams`], not by the CPU, on the calling thread or in its own pool.
//! Allocations of all threads count, so this is a test binary of its own with one test.

use fam::cpu::{Cpu, Par, Pool};
use fam::{Backend, Device, InfiniRule, Layout, Plan, Rows, Shape, Step, StepInfini, Streams, View, ViewMut, Window};
use std::alloc::{GlobalAlloc, Layout as Memory, System};
use std::borrow::BorrowMut;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is handed to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, memory: Memory) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, SeqCst);
        // SAFETY: the caller's promises are the system allocator's.
        unsafe { System.alloc(memory) }
    }
    unsafe fn dealloc(&self, at: *mut u8, memory: Memory) {
        // SAFETY: as above.
        unsafe { System.dealloc(at, memory) }
    }
    unsafe fn realloc(&self, at: *mut u8, memory: Memory, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, SeqCst);
        // SAFETY: as above.
        unsafe { System.realloc(at, memory, size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

const BLOCK: usize = 16;
const STREAMS: usize = 3;

#[test]
fn a_step_allocates_nothing() -> fam::Result<()> {
    let pool = Pool::new(4)?;
    let base = || Shape::builder().heads(8).kv_heads(2).head_dim(32).block_len(BLOCK).window(Window::Blocks(2));
    for shape in [base().mem_len(8).build()?, base().mem_len(4).infini(InfiniRule::Delta).build()?] {
        for par in [Par::Serial, Par::Pool(&pool)] {
            // Threads of the pool and of the test harness allocate when they begin.
            for round in 0..10 {
                let allocations = allocations_of_a_stream(&shape, par)?;
                assert!(allocations == 0 || round < 3, "{par:?}: {allocations} in round {round}");
            }
        }
    }
    // The counter counts.
    let before = ALLOCATIONS.load(SeqCst);
    drop(std::hint::black_box(vec![0u8; 100]));
    assert!(ALLOCATIONS.load(SeqCst) > before);
    Ok(())
}

/// Allocations during the first blocks of three fresh streams: every second block whole, the others token by token.
fn allocations_of_a_stream(shape: &Shape, mut par: Par<'_>) -> fam::Result<usize> {
    let cpu = Cpu::new()?.with_threads(4);
    let plan = cpu.plan(&shape.spec(STREAMS, BLOCK).build()?)?;
    let mut streams = Streams::new(cpu, &plan)?;
    let mut scratch = cpu.alloc(plan.support().scratch_bytes)?;
    let scratch: &mut [u8] = scratch.borrow_mut();

    let (heads, kv_heads, d, mem_len) = (shape.heads(), shape.kv_heads(), shape.head_dim(), shape.mem_len());
    let values: Vec<f32> = (0..STREAMS * BLOCK * heads * d).map(|i| (i % 17) as f32 / 8.0 - 1.0).collect();
    let of = |rows, heads| View::of(&values, Layout::tokens(fam::Dtype::F32, [STREAMS, rows, heads, d]));
    let beta = View::of(&values, Layout::per_head(heads));
    let [mut o, mut mem_o] = [BLOCK, mem_len].map(|rows| vec![0f32; STREAMS * rows * heads * d]);
    let mut lse = vec![0f32; STREAMS * BLOCK * heads];
    let slots: Vec<u32> = (0..STREAMS as u32).collect();

    let before = ALLOCATIONS.load(SeqCst);
    for block in 0..8 {
        match block % 3 {
            2 => streams.keep_memory(&slots)?,
            _ => streams.set_memory(&plan, &mut par, &slots, of(mem_len, kv_heads), of(mem_len, kv_heads), scratch)?,
        }
        let len = if block % 2 == 0 { BLOCK } else { 1 };
        for _ in 0..BLOCK / len {
            let rows = Rows::new(of(len, heads), ViewMut::tokens(&mut o, [STREAMS, len, heads, d]))
                .lse(ViewMut::tokens(&mut lse, [STREAMS, len, heads, 1]));
            let mem_rows = Rows::new(of(mem_len, heads), ViewMut::tokens(&mut mem_o, [STREAMS, mem_len, heads, d]));
            let mut step = Step::new(&slots, of(len, kv_heads), of(len, kv_heads)).rows(rows).mem_rows(mem_rows);
            if shape.infini().is_some() {
                step = step.infini(StepInfini { q: of(len, heads), k: of(len, kv_heads), beta });
            }
            streams.step(&plan, &mut par, step, scratch)?.commit();
        }
    }
    let allocations = ALLOCATIONS.load(SeqCst) - before;
    assert_eq!(streams.position(0)?, 8 * BLOCK as u64);
    Ok(allocations)
}
