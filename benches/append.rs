//! `append`: one block's keys and values into the ring. Throughput in bytes copied.

use benches::{LAYERS, Layer, plan, values};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use fam::cpu::Par;
use fam::{Append, Backend, Element, Op, Plan, Result, Span, Spans, View, bf16};

fn bench<T: Element>(c: &mut Criterion, layer: &Layer) -> Result<()> {
    let Layer { kv_heads, head_dim, block_len, .. } = *layer;
    let (cpu, plan, mut scratch) = plan(layer.shape(T::DTYPE).build()?, block_len, Op::Append)?;
    let sizes = [1, block_len, kv_heads, head_dim];
    let (k, v) = (values::<T>("k", sizes.iter().product()), values::<T>("v", sizes.iter().product()));
    let mut ring = vec![0; plan.support().ring_bytes as usize];
    let span = [Span::new(0, 0, block_len as u32)];
    let mut group = c.benchmark_group("append");
    group.throughput(Throughput::Bytes(2 * size_of_val(k.as_slice()) as u64));
    group.bench_function(layer.id::<T>("block"), |b| {
        b.iter(|| {
            let args = Append::new(Spans::Host(&span)).rows(View::tokens(&k, sizes), View::tokens(&v, sizes), &mut ring);
            cpu.append(&plan, &mut Par::Serial, args, &mut scratch).expect("arguments that fit the plan");
        });
    });
    group.finish();
    Ok(())
}

fn benches(c: &mut Criterion) {
    for layer in &LAYERS {
        bench::<f32>(c, layer).expect("a layer of the table");
        bench::<bf16>(c, layer).expect("a layer of the table");
    }
}

criterion_group!(all, benches);
criterion_main!(all);
