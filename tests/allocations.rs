//! Nothing is allocated in a step: not by [`fam::Streams`], not by the CPU, on the calling thread or in its own pool. And a snapshot's
//! header, whatever it claims, is refused before anything is allocated for it.
//!
//! Allocations of all threads count, so this is a program without the test harness, whose threads allocate when they like.

use fam::cpu::{Cpu, Par, Pool};
use fam::{
    Backend, Device, Dtype, Element, InfiniRule, Layout, Plan, Rows, Shape, Step, StepInfini, Streams, View, ViewMut, Window,
    bf16, f16,
};
use std::alloc::{GlobalAlloc, Layout as Memory, System};
use std::borrow::BorrowMut;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);
static BYTES: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is handed to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, memory: Memory) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, SeqCst);
        BYTES.fetch_add(memory.size(), SeqCst);
        // SAFETY: the caller's promises are the system allocator's.
        unsafe { System.alloc(memory) }
    }
    unsafe fn dealloc(&self, at: *mut u8, memory: Memory) {
        // SAFETY: as above.
        unsafe { System.dealloc(at, memory) }
    }
    unsafe fn realloc(&self, at: *mut u8, memory: Memory, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, SeqCst);
        BYTES.fetch_add(size, SeqCst);
        // SAFETY: as above.
        unsafe { System.realloc(at, memory, size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

const BLOCK: usize = 16;
const STREAMS: usize = 3;

fn main() -> fam::Result<()> {
    // The counter counts.
    let before = ALLOCATIONS.load(SeqCst);
    drop(std::hint::black_box(vec![0u8; 100]));
    assert_eq!(ALLOCATIONS.load(SeqCst) - before, 1);

    let pool = Pool::new(4)?;
    let base = || Shape::builder().heads(8).kv_heads(2).head_dim(32).block_len(BLOCK).window(Window::Blocks(64));
    let mut steps = 0;
    for shape in [base().mem_len(8), base().mem_len(4).infini(InfiniRule::Delta)] {
        for dtype in Dtype::ALL {
            let shape = shape.clone().dtype(dtype).build()?;
            for par in [Par::Serial, Par::Pool(&pool)] {
                for round in 0..5 {
                    let allocations = match dtype {
                        Dtype::F16 => allocations_of_a_stream::<f16>(&shape, par)?,
                        Dtype::Bf16 => allocations_of_a_stream::<bf16>(&shape, par)?,
                        _ => allocations_of_a_stream::<f32>(&shape, par)?,
                    };
                    assert_eq!(allocations, 0, "{dtype} {par:?}, round {round}");
                    steps += 4 + 4 * BLOCK;
                }
            }
        }
    }
    hostile_snapshots()?;
    println!("0 allocations in {steps} steps; hostile snapshots refused before they were given memory");
    Ok(())
}

/// Headers that claim more than memory can hold, in place of a good one's numbers.
fn hostile_snapshots() -> fam::Result<()> {
    let shape = Shape::builder().head_dim(8).block_len(4).window(Window::Blocks(1)).mem_len(2).build()?;
    let cpu = Cpu::new()?;
    let plan = cpu.plan(&shape.spec(1, 4).build()?)?;
    let (mut streams, queue) = (Streams::new(cpu, &plan)?, &mut Par::Serial);
    let good = streams.snapshot(&plan, queue, 0)?;
    let mut scratch = vec![0; plan.support().scratch_bytes as usize];
    for at in (8..good.len() - 4).step_by(8) {
        for claim in [1u64 << 31, 1_000_000_000_000, u64::MAX / 2, u64::MAX] {
            let mut bytes = good.clone();
            bytes[at..at + 8].copy_from_slice(&claim.to_le_bytes());
            let before = BYTES.load(SeqCst);
            assert!(matches!(streams.restore(&plan, queue, 0, &bytes, &mut scratch), Err(fam::Error::Malformed { .. })));
            let given = BYTES.load(SeqCst) - before;
            assert!(
                given < 1000,
                "{given} bytes allocated for a header that claims {claim} at byte {at}: more than an error's text"
            );
        }
    }
    assert_eq!(streams.snapshot(&plan, queue, 0)?, good);
    Ok(())
}

/// Allocations during the first blocks of three fresh streams: every second block whole, the others token by token.
fn allocations_of_a_stream<T: Element>(shape: &Shape, mut par: Par<'_>) -> fam::Result<usize> {
    // So many threads, and a window of several splits: tasks share a decode's keys.
    let cpu = Cpu::new()?.with_threads(16);
    let plan = cpu.plan(&shape.spec(STREAMS, BLOCK).build()?)?;
    let mut streams = Streams::new(cpu, &plan)?;
    let mut scratch = cpu.alloc(plan.support().scratch_bytes)?;
    let scratch: &mut [u8] = scratch.borrow_mut();

    let (heads, kv_heads, d, mem_len) = (shape.heads(), shape.kv_heads(), shape.head_dim(), shape.mem_len());
    let number = |i: usize| (i % 17) as f32 / 8.0 - 1.0;
    let values: Vec<T> = (0..STREAMS * BLOCK * heads * d).map(|i| T::from_f32(number(i))).collect();
    let of = |rows, heads| View::of(&values, Layout::tokens(T::DTYPE, [STREAMS, rows, heads, d]));
    let per_head: Vec<f32> = (0..heads).map(number).collect();
    let per_head = View::of(&per_head, Layout::per_head(heads));
    let [mut o, mut mem_o] = [BLOCK, mem_len].map(|rows| vec![T::from_f32(0.0); STREAMS * rows * heads * d]);
    let mut lse = vec![0f32; STREAMS * BLOCK * heads];
    let slots: Vec<u32> = (0..STREAMS as u32).collect();
    let lens = [BLOCK, 1].map(|len| vec![len as u32; STREAMS]);

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
            let step = Step::new(&slots, of(len, kv_heads), of(len, kv_heads)).rows(rows).mem_rows(mem_rows);
            let mut step = step.lens(&lens[block % 2]).sink(per_head);
            if shape.infini().is_some() {
                step = step.infini(StepInfini { q: of(len, heads), k: of(len, kv_heads), beta: per_head });
            }
            streams.step(&plan, &mut par, step, scratch)?.commit();
        }
    }
    let allocations = ALLOCATIONS.load(SeqCst) - before;
    assert_eq!(streams.position(0)?, 8 * BLOCK as u64);
    Ok(allocations)
}
