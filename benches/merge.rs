//! `merge`: two parts of one block's rows. Throughput in rows of all query heads.

use benches::{LAYERS, Layer, plan, values};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use fam::cpu::Par;
use fam::{Backend, Element, Merge, Op, Partial, Result, View, ViewMut, bf16};

fn bench<T: Element>(c: &mut Criterion, layer: &Layer) -> Result<()> {
    let Layer { heads, head_dim, block_len, .. } = *layer;
    let (cpu, plan, mut scratch) = plan(layer.shape(T::DTYPE).build()?, block_len, Op::Merge)?;
    let (o_sizes, lse_sizes) = ([1, block_len, heads, head_dim], [1, block_len, heads, 1]);
    let [o_a, o_b] = ["o_a", "o_b"].map(|name| values::<f32>(name, o_sizes.iter().product()));
    let [lse_a, lse_b] = ["lse_a", "lse_b"].map(|name| values::<f32>(name, lse_sizes.iter().product()));
    let (mut o, mut lse) = (values::<T>("o", o_a.len()), lse_a.clone());
    let mut group = c.benchmark_group("merge");
    group.throughput(Throughput::Elements((block_len * heads) as u64));
    group.bench_function(layer.id::<T>("block"), |b| {
        b.iter(|| {
            let part = |o, lse| Partial { o: View::tokens(o, o_sizes), lse: View::tokens(lse, lse_sizes) };
            let args = Merge::new(part(&o_a, &lse_a), part(&o_b, &lse_b), ViewMut::tokens(&mut o, o_sizes));
            cpu.merge(&plan, &mut Par::Serial, args.lse(ViewMut::tokens(&mut lse, lse_sizes)), &mut scratch)
                .expect("arguments that fit the plan");
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
