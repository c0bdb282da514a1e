//! Small calls: the memory rows of 8 streams of 8 heads, 8 rows each over 8 memory keys and a block of 16, forward and backward. Throughput in
//! visible pairs of query row and key.

use benches::values;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use fam::cpu::{Cpu, Par};
use fam::{Attend, AttendBackward, Backend, Dtype, Element, Keys, Layout, Op, Plan, Result, Rows, RowsBackward, Shape, Span};
use fam::{Spans, View, ViewMut, Window, bf16, f16};

const N: usize = 8;
const H: usize = 8;
const D: usize = 64;
const F: usize = 8;
const B: usize = 16;

fn bench<T: Element>(c: &mut Criterion) -> Result<()> {
    let shape =
        Shape::builder().heads(H).kv_heads(H).head_dim(D).dtype(T::DTYPE).block_len(B).window(Window::Blocks(1)).mem_len(F);
    let cpu = Cpu::new()?.with_threads(1);
    let plan = cpu.plan(&shape.build()?.spec(N, B).slots(N).ops(&[Op::Attend, Op::AttendBackward]).build()?)?;
    let mut scratch = vec![0; plan.support().scratch_bytes as usize];
    let kv_sizes = [N, B, H, D];
    let of_mem = |dtype, d| Layout::packed(dtype, [N, 1, F, H, d]);
    let (mem_layout, lse_layout, d_mem_layout) = (of_mem(T::DTYPE, D), of_mem(Dtype::F32, 1), of_mem(Dtype::F32, D));
    let [k, v] = ["k", "v"].map(|name| values::<T>(name, N * B * H * D));
    let [mem_q, mem_k, mem_v, d_mem_o] = ["mem_q", "mem_k", "mem_v", "d_mem_o"].map(|name| values::<T>(name, N * F * H * D));
    let (mut mem_o, mut mem_lse) = (mem_q.clone(), vec![0f32; N * F * H]);
    let spans: Vec<_> = (0..N).map(|n| Span::new(n as u32, 0, B as u32).with_mem_rows(F as u32)).collect();

    let mut group = c.benchmark_group("mem_rows");
    group.throughput(Throughput::Elements((N * H * F * (F + B)) as u64));
    group.bench_function(format!("{}/forward", T::DTYPE), |b| {
        b.iter(|| {
            let keys = Keys::Strided { k: View::tokens(&k, kv_sizes), v: View::tokens(&v, kv_sizes) };
            let rows = Rows::new(View::of(&mem_q, mem_layout), ViewMut::of(&mut mem_o, mem_layout));
            let args = Attend::new(Spans::Host(&spans), keys).mem_rows(rows.lse(ViewMut::of(&mut mem_lse, lse_layout)));
            let args = args.mem(View::of(&mem_k, mem_layout), View::of(&mem_v, mem_layout));
            cpu.attend(&plan, &mut Par::Serial, args, &mut scratch).expect("arguments that fit the plan");
        });
    });
    let mut d_mem_q = mem_q.clone();
    let [mut d_k, mut d_v] = [0; 2].map(|_| vec![0f32; k.len()]);
    let [mut d_mem_k, mut d_mem_v] = [0; 2].map(|_| vec![0f32; mem_k.len()]);
    group.bench_function(format!("{}/backward", T::DTYPE), |b| {
        b.iter(|| {
            let (q, o, lse) = (View::of(&mem_q, mem_layout), View::of(&mem_o, mem_layout), View::of(&mem_lse, lse_layout));
            let rows = RowsBackward::new(q, o, lse, View::of(&d_mem_o, mem_layout), ViewMut::of(&mut d_mem_q, mem_layout));
            let args = AttendBackward::new(Spans::Host(&spans), View::tokens(&k, kv_sizes), View::tokens(&v, kv_sizes))
                .mem(View::of(&mem_k, mem_layout), View::of(&mem_v, mem_layout))
                .mem_rows(rows)
                .d_keys(ViewMut::tokens(&mut d_k, kv_sizes), ViewMut::tokens(&mut d_v, kv_sizes))
                .d_mem(ViewMut::of(&mut d_mem_k, d_mem_layout), ViewMut::of(&mut d_mem_v, d_mem_layout));
            cpu.attend_backward(&plan, &mut Par::Serial, args, &mut scratch).expect("arguments that fit the plan");
        });
    });
    group.finish();
    Ok(())
}

fn benches(c: &mut Criterion) {
    bench::<f32>(c).expect("a plan of small calls");
    bench::<f16>(c).expect("a plan of small calls");
    bench::<bf16>(c).expect("a plan of small calls");
}

criterion_group!(all, benches);
criterion_main!(all);
