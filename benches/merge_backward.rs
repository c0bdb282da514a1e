//! `merge_backward`: the gradients of two parts of one block's rows. Throughput in rows of all query heads.

use benches::{LAYERS, Layer, plan, values};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use fam::cpu::Par;
use fam::{Backend, Element, MergeBackward, Op, Partial, PartialGradients, Result, View, ViewMut, bf16};

fn bench<T: Element>(c: &mut Criterion, layer: &Layer) -> Result<()> {
    let Layer { heads, head_dim, block_len, .. } = *layer;
    let (cpu, plan, mut scratch) = plan(layer.shape(T::DTYPE).build()?, block_len, Op::MergeBackward)?;
    let (o_sizes, lse_sizes) = ([1, block_len, heads, head_dim], [1, block_len, heads, 1]);
    let [o_a, o_b] = ["o_a", "o_b"].map(|name| values::<f32>(name, o_sizes.iter().product()));
    let [lse_a, lse_b, d_lse] = ["lse_a", "lse_b", "d_lse"].map(|name| values::<f32>(name, lse_sizes.iter().product()));
    let d_o = values::<T>("d_o", o_a.len());
    let [mut d_o_a, mut d_o_b] = [0; 2].map(|_| d_o.clone());
    let [mut d_lse_a, mut d_lse_b] = [0; 2].map(|_| lse_a.clone());
    let mut group = c.benchmark_group("merge_backward");
    group.throughput(Throughput::Elements((block_len * heads) as u64));
    group.bench_function(layer.id::<T>("block"), |b| {
        b.iter(|| {
            let part = |o, lse| Partial { o: View::tokens(o, o_sizes), lse: View::tokens(lse, lse_sizes) };
            let d_a =
                PartialGradients { d_o: ViewMut::tokens(&mut d_o_a, o_sizes), d_lse: ViewMut::tokens(&mut d_lse_a, lse_sizes) };
            let d_b =
                PartialGradients { d_o: ViewMut::tokens(&mut d_o_b, o_sizes), d_lse: ViewMut::tokens(&mut d_lse_b, lse_sizes) };
            let args = MergeBackward::new([part(&o_a, &lse_a), part(&o_b, &lse_b)], View::tokens(&d_o, o_sizes), [d_a, d_b]);
            cpu.merge_backward(&plan, &mut Par::Serial, args.d_lse(View::tokens(&d_lse, lse_sizes)), &mut scratch)
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
