//! Strided tensors reach the kernel as they are: a call allocates its output, and nothing of the size of an input.

mod common;

use candle_core::{DType, Result, Tensor};
use common::strided;
use fam::{Shape, Span, Window};
use fam_candle::{Attends, Attention, Stream};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

static BYTES: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: every call is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        BYTES.fetch_add(layout.size(), SeqCst);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Bytes that the later of two calls allocates: threads start in the first.
fn bytes<T>(mut call: impl FnMut() -> Result<T>) -> Result<usize> {
    drop(call()?);
    let before = BYTES.load(SeqCst);
    drop(call()?);
    Ok(BYTES.load(SeqCst) - before)
}

/// The graph's nodes, shapes and spans, and the thread pool's queue.
const BOOKKEEPING: usize = 8 * 1024;

#[test]
fn no_copies() -> Result<()> {
    let (heads, kv_heads, d, block, window, f) = (9, 3, 64, 128, 1, 16);
    let builder = Shape::builder().heads(heads).kv_heads(kv_heads).head_dim(d).block_len(block);
    let shape = builder.window(Window::Blocks(window)).mem_len(f).build().unwrap();
    let batch = 2;
    let attention = Attention::new(&shape, batch, block)?;
    let (rows, keys) = (block + f, (window + 1) * block);
    let q = strided(1, [batch, heads, rows, d], DType::F32)?;
    let [k, v] = [2, 3].map(|seed| strided(seed, [batch, kv_heads, keys + f, d], DType::F32));
    let (k, v) = (k?, v?);
    let spans = [0, 1].map(|n| Span::new(n, block as u64, block as u32).with_mem_rows(f as u32));

    // o, and for the way back lse.
    let output = 4 * batch * heads * rows * (d + 1);
    let input = 4 * batch * kv_heads * keys * d;
    assert!(input > 10 * BOOKKEEPING, "a copy of the smallest input would show");
    let op = bytes(|| attention.attend(&spans, block, &q, &k, &v))?;
    assert!((output..output + BOOKKEEPING).contains(&op), "{op} bytes for an output of {output}");
    // The same with packed tensors.
    let [packed_q, packed_k, packed_v] = [&q, &k, &v].map(Tensor::contiguous);
    let (q_, k_, v_) = (packed_q?, packed_k?, packed_v?);
    let op = bytes(|| attention.attend(&spans, block, &q_, &k_, &v_))?;
    assert!((output..output + BOOKKEEPING).contains(&op), "{op} bytes for an output of {output}");

    let mut stream = Stream::new(&attention)?;
    let slots = [1, 0];
    let (q, k, v) = (q.narrow(2, 0, block)?, k.narrow(2, 0, block)?, v.narrow(2, 0, block)?);
    let (mem_k, mem_v) = (k.narrow(2, 0, f)?, v.narrow(2, 0, f)?);
    let output = 4 * batch * heads * block * d;
    let step = bytes(|| {
        stream.set_memory(&slots, &mem_k, &mem_v)?;
        stream.step(&slots, &q, &k, &v, None)
    })?;
    assert!((output..output + BOOKKEEPING).contains(&step), "{step} bytes for an output of {output}");
    Ok(())
}
