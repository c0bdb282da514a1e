//! `infini_read`: one segment's rows read the compressive memory and gate it. Throughput in rows of all query heads.

use benches::{LAYERS, Layer, plan, values};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use fam::cpu::Par;
use fam::{Backend, Element, InfiniRead, InfiniRule, InfiniState, Layout, Op, Result, Span, Spans, View, ViewMut, bf16};

fn bench<T: Element>(c: &mut Criterion, layer: &Layer) -> Result<()> {
    let Layer { heads, kv_heads, head_dim, block_len, .. } = *layer;
    let shape = layer.shape(T::DTYPE).infini(InfiniRule::Linear).build()?;
    let (cpu, plan, mut scratch) = plan(shape, block_len, Op::InfiniRead)?;
    let sizes = [1, block_len, heads, head_dim];
    let (q, o_local) = (values::<T>("q", sizes.iter().product()), values::<f32>("o", sizes.iter().product()));
    let (m_layout, z_layout) = (Layout::infini_m(1, 1, kv_heads, head_dim), Layout::infini_z(1, 1, kv_heads, head_dim));
    let m = values::<f32>("m", m_layout.shape.iter().product());
    let z: Vec<f32> = values::<f32>("z", z_layout.shape.iter().product()).iter().map(|z| 100.0 + z).collect();
    let beta = values::<f32>("beta", heads);
    let mut o = q.clone();
    let span = [Span::new(0, 0, block_len as u32)];
    let mut group = c.benchmark_group("infini_read");
    group.throughput(Throughput::Elements((block_len * heads) as u64));
    group.bench_function(layer.id::<T>("segment"), |b| {
        b.iter(|| {
            let state = InfiniState {
                q: View::tokens(&q, sizes),
                m: View::of(&m, m_layout),
                z: View::of(&z, z_layout),
                beta: View::of(&beta, Layout::per_head(heads)),
            };
            let (o_local, o) = (View::tokens(&o_local, sizes), ViewMut::tokens(&mut o, sizes));
            cpu.infini_read(&plan, &mut Par::Serial, InfiniRead::new(Spans::Host(&span), state, o_local, o), &mut scratch)
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
