//! `infini_write_backward`: all gradients of one segment's write, by both rules. Throughput in keys of all kv heads.

use benches::{LAYERS, Layer, plan, values};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use fam::cpu::Par;
use fam::{Backend, Element, InfiniRule, InfiniWriteBackward, Layout, Op, Result, Span, Spans, View, ViewMut, bf16};

fn bench<T: Element>(c: &mut Criterion, layer: &Layer, rule: InfiniRule) -> Result<()> {
    let Layer { kv_heads, head_dim, block_len, .. } = *layer;
    let (cpu, plan, mut scratch) = plan(layer.shape(T::DTYPE).infini(rule).build()?, block_len, Op::InfiniWriteBackward)?;
    let sizes = [1, block_len, kv_heads, head_dim];
    let [k, v] = ["k", "v"].map(|name| values::<T>(name, sizes.iter().product()));
    let (m_layout, z_layout) = (Layout::infini_m(1, 2, kv_heads, head_dim), Layout::infini_z(1, 2, kv_heads, head_dim));
    let [m, m_gradient] = ["m", "d_m"].map(|name| values::<f32>(name, m_layout.shape.iter().product()));
    let [z, z_gradient] = ["z", "d_z"].map(|name| values::<f32>(name, z_layout.shape.iter().product()));
    let z: Vec<f32> = z.iter().map(|z| 100.0 + z).collect();
    let (mut d_m, mut d_z) = (m_gradient, z_gradient);
    let [mut d_k, mut d_v] = [0; 2].map(|_| vec![0f32; k.len()]);
    let span = [Span::new(0, 0, block_len as u32)];
    let mut group = c.benchmark_group("infini_write_backward");
    group.throughput(Throughput::Elements((block_len * kv_heads) as u64));
    group.bench_function(layer.id::<T>(&format!("{rule:?}").to_lowercase()), |b| {
        b.iter(|| {
            let (keys, state) = ([&k, &v].map(|x| View::tokens(x, sizes)), [View::of(&m, m_layout), View::of(&z, z_layout)]);
            let d_state = [ViewMut::of(&mut d_m, m_layout), ViewMut::of(&mut d_z, z_layout)];
            let args = InfiniWriteBackward::new(Spans::Host(&span), keys, state, d_state);
            let args = args.d_keys(ViewMut::tokens(&mut d_k, sizes), ViewMut::tokens(&mut d_v, sizes));
            cpu.infini_write_backward(&plan, &mut Par::Serial, args, &mut scratch).expect("arguments that fit the plan");
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
