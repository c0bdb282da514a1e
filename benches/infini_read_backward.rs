//! `infini_read_backward`: all gradients of one segment's rows that read and gate. Throughput in rows of all query heads.

use benches::{LAYERS, Layer, plan, values};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use fam::cpu::Par;
use fam::{Backend, Element, InfiniReadBackward, InfiniRule, InfiniState, Layout, Op, Result, Span, Spans, View, ViewMut, bf16};

fn bench<T: Element>(c: &mut Criterion, layer: &Layer) -> Result<()> {
    let Layer { heads, kv_heads, head_dim, block_len, .. } = *layer;
    let shape = layer.shape(T::DTYPE).infini(InfiniRule::Linear).build()?;
    let (cpu, plan, mut scratch) = plan(shape, block_len, Op::InfiniReadBackward)?;
    let sizes = [1, block_len, heads, head_dim];
    let [q, d_o] = ["q", "d_o"].map(|name| values::<T>(name, sizes.iter().product()));
    let o_local = values::<f32>("o", q.len());
    let (m_layout, z_layout) = (Layout::infini_m(1, 1, kv_heads, head_dim), Layout::infini_z(1, 1, kv_heads, head_dim));
    let m = values::<f32>("m", m_layout.shape.iter().product());
    let z: Vec<f32> = values::<f32>("z", z_layout.shape.iter().product()).iter().map(|z| 100.0 + z).collect();
    let beta = values::<f32>("beta", heads);
    let (mut d_q, mut d_o_local) = (q.clone(), o_local.clone());
    let (mut d_m, mut d_z, mut d_beta) = (vec![0f32; m.len()], vec![0f32; z.len()], vec![0f32; heads]);
    let span = [Span::new(0, 0, block_len as u32)];
    let mut group = c.benchmark_group("infini_read_backward");
    group.throughput(Throughput::Elements((block_len * heads) as u64));
    group.bench_function(layer.id::<T>("segment"), |b| {
        b.iter(|| {
            let state = InfiniState {
                q: View::tokens(&q, sizes),
                m: View::of(&m, m_layout),
                z: View::of(&z, z_layout),
                beta: View::of(&beta, Layout::per_head(heads)),
            };
            let (o_local, d_o) = (View::tokens(&o_local, sizes), View::tokens(&d_o, sizes));
            let (d_q, d_o_local) = (ViewMut::tokens(&mut d_q, sizes), ViewMut::tokens(&mut d_o_local, sizes));
            let args = InfiniReadBackward::new(Spans::Host(&span), state, o_local, d_o, d_q, d_o_local)
                .d_state(ViewMut::of(&mut d_m, m_layout), ViewMut::of(&mut d_z, z_layout))
                .d_beta(ViewMut::of(&mut d_beta, Layout::per_head(heads)));
            cpu.infini_read_backward(&plan, &mut Par::Serial, args, &mut scratch).expect("arguments that fit the plan");
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
