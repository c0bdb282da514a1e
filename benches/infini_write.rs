//! `infini_write`: one segment into the compressive memory, by both rules. Throughput in keys of all kv heads.

use benches::{LAYERS, Layer, plan, values};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use fam::cpu::Par;
use fam::{Backend, Element, InfiniRule, InfiniWrite, Keys, Layout, Op, Result, Span, Spans, View, ViewMut, bf16};

fn bench<T: Element>(c: &mut Criterion, layer: &Layer, rule: InfiniRule) -> Result<()> {
    let Layer { kv_heads, head_dim, block_len, .. } = *layer;
    let (cpu, plan, mut scratch) = plan(layer.shape(T::DTYPE).infini(rule).build()?, block_len, Op::InfiniWrite)?;
    let sizes = [1, block_len, kv_heads, head_dim];
    let [k, v] = ["k", "v"].map(|name| values::<T>(name, sizes.iter().product()));
    let (m_layout, z_layout) = (Layout::infini_m(1, 2, kv_heads, head_dim), Layout::infini_z(1, 2, kv_heads, head_dim));
    let mut m = values::<f32>("m", m_layout.shape.iter().product());
    let mut z: Vec<f32> = values::<f32>("z", z_layout.shape.iter().product()).iter().map(|z| 100.0 + z).collect();
    let span = [Span::new(0, 0, block_len as u32)];
    let mut group = c.benchmark_group("infini_write");
    group.throughput(Throughput::Elements((block_len * kv_heads) as u64));
    group.bench_function(layer.id::<T>(&format!("{rule:?}").to_lowercase()), |b| {
        b.iter(|| {
            let keys = Keys::Strided { k: View::tokens(&k, sizes), v: View::tokens(&v, sizes) };
            let (m, z) = (ViewMut::of(&mut m, m_layout), ViewMut::of(&mut z, z_layout));
            cpu.infini_write(&plan, &mut Par::Serial, InfiniWrite::new(Spans::Host(&span), keys, m, z), &mut scratch)
                .expect("arguments that fit the plan");
        });
    });
    group.finish();
    Ok(())
}

fn benches(c: &mut Criterion) {
    for layer in &LAYERS {
        for rule in [InfiniRule::Linear, InfiniRule::Delta] {
            bench::<f32>(c, layer, rule).expect("a layer of the table");
            bench::<bf16>(c, layer, rule).expect("a layer of the table");
        }
    }
}

criterion_group!(all, benches);
criterion_main!(all);
