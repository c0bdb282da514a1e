//! No op allocates, however it is run, with spans of the host or of the device. Allocations of the whole process are counted, so this is a
//! program without the test harness, whose threads allocate when they like.

mod common;

use fam_core::{
    Append, Attend, Backend, Device, InfiniRead, InfiniRule, InfiniState, InfiniWrite, Keys, Layout, Merge, Op, Partial, Plan,
    Rows, Shape, Span, Spans, View, ViewMut, Window,
};
use fam_cpu::{Cpu, Executor, Par, Pool};
use std::alloc::{GlobalAlloc, Layout as Block, System};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: every call is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, block: Block) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, SeqCst);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(block) }
    }
    unsafe fn dealloc(&self, at: *mut u8, block: Block) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(at, block) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// An executor that allocates nothing itself.
struct Inline;

impl Executor for Inline {
    fn threads(&self) -> usize {
        2
    }
    fn run(&self, tasks: usize, body: &(dyn Fn(usize) + Sync)) {
        (0..tasks).for_each(body);
    }
}

fn main() {
    let (n, len, h, kv, d, f, b) = (2, 20, 4, 2, 32, 3, 16);
    let builder = Shape::builder().heads(h).kv_heads(kv).head_dim(d).block_len(b).window(Window::Blocks(16)).mem_len(f);
    let shape = builder.infini(InfiniRule::Delta).build().unwrap();
    let cpu = Cpu::new().unwrap().with_threads(16);
    let spec = shape.spec(n, len).blocks(2).ops(&Op::FORWARD).build().unwrap();
    let plan = cpu.plan(&spec).unwrap();
    let (mut scratch, mut ring) = (vec![0; plan.support().scratch_bytes as usize], cpu.alloc(plan.support().ring_bytes).unwrap());
    let ring: &mut [u8] = std::borrow::BorrowMut::borrow_mut(&mut ring);

    let x = common::random::<f32>(1, n * len * h * d);
    let (mut o, mut lse, mut mem_o) = (x.clone(), vec![0f32; n * len * h], x.clone());
    let (mut mem_k, mut mem_v, mut m, mut z) = (x.clone(), x.clone(), vec![0f32; n * 3 * kv * d * d], vec![0f32; n * 3 * kv * d]);
    let tokens = |heads, d| Layout::tokens(fam_core::Dtype::F32, [n, len, heads, d]);
    let memory = |heads| Layout::packed(fam_core::Dtype::F32, [n, 2, f, heads, d]);
    let per_head = View::of(&x, Layout::per_head(h));
    // A prefill, and a decode whose keys several tasks share: what they leave is joined in the op's second phase.
    let spans = [Span::new(1, 0, len as u32).with_mem_rows(3), Span::new(0, 203, 2)];
    let pool = Pool::new(3).unwrap();

    let queues = [Par::Serial, Par::Pool(&pool), Par::Caller(&Inline), Par::Slice { ith: 0, nth: 1, phase: 0 }];
    for par in queues.into_iter().cycle().take(20) {
        let device = Spans::Device { mem: bytemuck::cast_slice(&spans), batch: n };
        for spans in [Spans::Host(&spans), device] {
            let mut queue = par;
            o.fill(f32::NAN);
            let before = ALLOCATIONS.load(SeqCst);
            let new = View::of(&x, tokens(kv, d));
            let append = Append::new(spans).rows(new, new, ring).mem_rows(
                View::of(&x, memory(kv)),
                View::of(&x, memory(kv)),
                ViewMut::of(&mut mem_k, memory(kv)),
                ViewMut::of(&mut mem_v, memory(kv)),
            );
            cpu.append(&plan, &mut queue, append, &mut scratch).unwrap();
            let (m_layout, z_layout) = (Layout::infini_m(n, 3, kv, d), Layout::infini_z(n, 3, kv, d));
            let write = InfiniWrite::new(spans, Keys::Ring(ring), ViewMut::of(&mut m, m_layout), ViewMut::of(&mut z, z_layout));
            cpu.infini_write(&plan, &mut queue, write, &mut scratch).unwrap();
            let q = View::of(&x, tokens(h, d));
            let state = || InfiniState { q, m: View::of(&m, m_layout), z: View::of(&z, z_layout), beta: per_head };
            let attend = Attend::new(spans, Keys::Ring(ring))
                .rows(Rows::new(q, ViewMut::of(&mut o, tokens(h, d))).lse(ViewMut::of(&mut lse, tokens(h, 1))))
                .mem_rows(Rows::new(View::of(&x, memory(h)), ViewMut::of(&mut mem_o, memory(h))))
                .mem(View::of(&mem_k, memory(kv)), View::of(&mem_v, memory(kv)))
                .sink(per_head)
                .infini(state());
            cpu.attend(&plan, &mut queue, attend, &mut scratch).unwrap();
            let is_first_phase = matches!(par, Par::Slice { phase: 0, .. });
            assert!(o[..len * h * d].iter().all(|o| o.is_finite()), "the prefill's rows, {par:?}");
            assert!(o[len * h * d..][..2 * h * d].iter().all(|o| o.is_nan() == is_first_phase), "the decode's rows, {par:?}");
            let read = InfiniRead::new(spans, state(), q, ViewMut::of(&mut o, tokens(h, d)));
            cpu.infini_read(&plan, &mut queue, read, &mut scratch).unwrap();
            let part = || Partial { o: q, lse: View::of(&lse, tokens(h, 1)) };
            let merge = Merge::new(part(), part(), ViewMut::of(&mut o, tokens(h, d)));
            cpu.merge(&plan, &mut queue, merge, &mut scratch).unwrap();
            assert_eq!(ALLOCATIONS.load(SeqCst) - before, 0, "{par:?}, {spans:?}");
        }
    }

    let mut gradients = common::gradients::Gradients::new(cpu);
    let spans = common::gradients::spans();
    for par in queues.into_iter().cycle().take(20) {
        let device = Spans::Device { mem: bytemuck::cast_slice(&spans), batch: spans.len() };
        for spans in [Spans::Host(&spans), device] {
            let before = ALLOCATIONS.load(SeqCst);
            Op::BACKWARD.into_iter().for_each(|op| gradients.run(op, par, spans));
            assert_eq!(ALLOCATIONS.load(SeqCst) - before, 0, "backward, {par:?}, {spans:?}");
        }
    }
    println!("0 allocations in 40 rounds of all ops");
}
