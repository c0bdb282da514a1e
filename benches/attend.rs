//! `attend` over linear caches: a step (block rows and memory rows), and one token. Throughput in visible pairs of query row and key.

use benches::{LAYERS, Layer, plan, values};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use fam::cpu::Par;
use fam::{Attend, Backend, Element, Keys, Layout, Op, Result, Rows, Span, Spans, View, ViewMut, bf16, f16};

/// `len` tokens at the end of `window_blocks + 1` blocks; a whole block brings its memory rows.
fn bench<T: Element>(c: &mut Criterion, layer: &Layer, what: &str, len: usize) -> Result<()> {
    let Layer { heads, kv_heads, head_dim, block_len, window_blocks, mem_len, .. } = *layer;
    let (cpu, plan, mut scratch) = plan(layer.shape(T::DTYPE).build()?, len, Op::Attend)?;
    let tokens = (window_blocks + 1) * block_len;
    let (q_sizes, kv_sizes) = ([1, len, heads, head_dim], [1, tokens, kv_heads, head_dim]);
    let mem_q_layout = Layout::packed(T::DTYPE, [1, 1, mem_len, heads, head_dim]);
    let mem_kv_layout = Layout::packed(T::DTYPE, [1, 1, mem_len, kv_heads, head_dim]);
    let (q, mem_q) = (values::<T>("q", q_sizes.iter().product()), values::<T>("mem_q", mem_q_layout.shape.iter().product()));
    let [k, v] = ["k", "v"].map(|name| values::<T>(name, kv_sizes.iter().product()));
    let [mem_k, mem_v] = ["mem_k", "mem_v"].map(|name| values::<T>(name, mem_kv_layout.shape.iter().product()));
    let (mut o, mut mem_o) = (q.clone(), mem_q.clone());
    let span = [Span::new(0, (tokens - len) as u64, len as u32).with_mem_rows(mem_len as u32)];

    let is_block = len == block_len;
    let of_rows: usize = (tokens - len..tokens).map(|position| position + 1 + mem_len).sum();
    let of_mem_rows = if is_block { mem_len * (mem_len + len) } else { 0 };
    let mut group = c.benchmark_group("attend");
    group.sample_size(20).throughput(Throughput::Elements((heads * (of_rows + of_mem_rows)) as u64));
    group.bench_function(layer.id::<T>(what), |b| {
        b.iter(|| {
            let keys = Keys::Strided { k: View::tokens(&k, kv_sizes), v: View::tokens(&v, kv_sizes) };
            let rows = Rows::new(View::tokens(&q, q_sizes), ViewMut::tokens(&mut o, q_sizes));
            let mut args = Attend::new(Spans::Host(&span), keys).rows(rows);
            args = args.mem(View::of(&mem_k, mem_kv_layout), View::of(&mem_v, mem_kv_layout));
            if is_block {
                args = args.mem_rows(Rows::new(View::of(&mem_q, mem_q_layout), ViewMut::of(&mut mem_o, mem_q_layout)));
            }
            cpu.attend(&plan, &mut Par::Serial, args, &mut scratch).expect("arguments that fit the plan");
        });
    });
    group.finish();
    Ok(())
}

fn benches(c: &mut Criterion) {
    for layer in &LAYERS {
        for (what, len) in [("step", layer.block_len), ("token", 1)] {
            bench::<f32>(c, layer, what, len).expect("a layer of the table");
            bench::<f16>(c, layer, what, len).expect("a layer of the table");
            bench::<bf16>(c, layer, what, len).expect("a layer of the table");
        }
    }
}

criterion_group!(all, benches);
criterion_main!(all);
