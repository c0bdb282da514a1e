//! `attend_backward` over linear caches: all gradients of a step (block rows and memory rows). Throughput in visible pairs of query row and
//! key. Keys collect from iteration to iteration, as they do over the calls of a training step.

use benches::{LAYERS, Layer, plan, values};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use fam::cpu::Par;
use fam::{Attend, AttendBackward, Backend, Element, Keys, Layout, Op, Result, Rows, RowsBackward, Span, Spans, View, ViewMut};
use fam::{Dtype, bf16, f16};

fn bench<T: Element>(c: &mut Criterion, layer: &Layer) -> Result<()> {
    let Layer { heads, kv_heads, head_dim, block_len: len, window_blocks, mem_len, .. } = *layer;
    let shape = layer.shape(T::DTYPE).build()?;
    let (cpu, forward, mut forward_scratch) = plan(shape, len, Op::Attend)?;
    let (_, plan, mut scratch) = plan(shape, len, Op::AttendBackward)?;
    let tokens = (window_blocks + 1) * len;
    let (q_sizes, lse_sizes, kv_sizes) = ([1, len, heads, head_dim], [1, len, heads, 1], [1, tokens, kv_heads, head_dim]);
    let mem_layout = |dtype, heads, d| Layout::packed(dtype, [1, 1, mem_len, heads, d]);
    let (mem_q_layout, mem_lse_layout) = (mem_layout(T::DTYPE, heads, head_dim), mem_layout(Dtype::F32, heads, 1));
    let (mem_kv_layout, d_mem_layout) = (mem_layout(T::DTYPE, kv_heads, head_dim), mem_layout(Dtype::F32, kv_heads, head_dim));
    let [q, d_o] = ["q", "d_o"].map(|name| values::<T>(name, q_sizes.iter().product()));
    let [mem_q, d_mem_o] = ["mem_q", "d_mem_o"].map(|name| values::<T>(name, mem_q_layout.shape.iter().product()));
    let [k, v] = ["k", "v"].map(|name| values::<T>(name, kv_sizes.iter().product()));
    let [mem_k, mem_v] = ["mem_k", "mem_v"].map(|name| values::<T>(name, mem_kv_layout.shape.iter().product()));
    let span = [Span::new(0, (tokens - len) as u64, len as u32).with_mem_rows(mem_len as u32)];

    let (mut o, mut lse) = (q.clone(), vec![0f32; len * heads]);
    let (mut mem_o, mut mem_lse) = (mem_q.clone(), vec![0f32; mem_len * heads]);
    let keys = Keys::Strided { k: View::tokens(&k, kv_sizes), v: View::tokens(&v, kv_sizes) };
    let rows = Rows::new(View::tokens(&q, q_sizes), ViewMut::tokens(&mut o, q_sizes)).lse(ViewMut::tokens(&mut lse, lse_sizes));
    let mem_rows = Rows::new(View::of(&mem_q, mem_q_layout), ViewMut::of(&mut mem_o, mem_q_layout));
    let mem_rows = mem_rows.lse(ViewMut::of(&mut mem_lse, mem_lse_layout));
    let args = Attend::new(Spans::Host(&span), keys).rows(rows).mem_rows(mem_rows);
    let args = args.mem(View::of(&mem_k, mem_kv_layout), View::of(&mem_v, mem_kv_layout));
    cpu.attend(&forward, &mut Par::Serial, args, &mut forward_scratch)?;

    let (mut d_q, mut d_mem_q) = (q.clone(), mem_q.clone());
    let [mut d_k, mut d_v] = [0; 2].map(|_| vec![0f32; k.len()]);
    let [mut d_mem_k, mut d_mem_v] = [0; 2].map(|_| vec![0f32; mem_k.len()]);
    let of_rows: usize = (tokens - len..tokens).map(|position| position + 1 + mem_len).sum();
    let mut group = c.benchmark_group("attend_backward");
    group.sample_size(20).throughput(Throughput::Elements((heads * (of_rows + mem_len * (mem_len + len))) as u64));
    group.bench_function(layer.id::<T>("step"), |b| {
        b.iter(|| {
            let (o, lse, d_o) = (View::tokens(&o, q_sizes), View::tokens(&lse, lse_sizes), View::tokens(&d_o, q_sizes));
            let rows = RowsBackward::new(View::tokens(&q, q_sizes), o, lse, d_o, ViewMut::tokens(&mut d_q, q_sizes));
            let (mem_o, mem_lse) = (View::of(&mem_o, mem_q_layout), View::of(&mem_lse, mem_lse_layout));
            let (d_mem_o, d_mem_q) = (View::of(&d_mem_o, mem_q_layout), ViewMut::of(&mut d_mem_q, mem_q_layout));
            let mem_rows = RowsBackward::new(View::of(&mem_q, mem_q_layout), mem_o, mem_lse, d_mem_o, d_mem_q);
            let args = AttendBackward::new(Spans::Host(&span), View::tokens(&k, kv_sizes), View::tokens(&v, kv_sizes))
                .rows(rows)
                .mem_rows(mem_rows)
                .mem(View::of(&mem_k, mem_kv_layout), View::of(&mem_v, mem_kv_layout))
                .d_keys(ViewMut::tokens(&mut d_k, kv_sizes), ViewMut::tokens(&mut d_v, kv_sizes))
                .d_mem(ViewMut::of(&mut d_mem_k, d_mem_layout), ViewMut::of(&mut d_mem_v, d_mem_layout));
            cpu.attend_backward(&plan, &mut Par::Serial, args, &mut scratch).expect("arguments that fit the plan");
        });
    });
    group.finish();
    Ok(())
}

fn benches(c: &mut Criterion) {
    for layer in &LAYERS {
        bench::<f32>(c, layer).expect("a layer of the table");
        bench::<f16>(c, layer).expect("a layer of the table");
        bench::<bf16>(c, layer).expect("a layer of the table");
    }
}

criterion_group!(all, benches);
criterion_main!(all);
