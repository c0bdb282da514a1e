//! What a process waits for before its first block: backend, plan, memory and the first step of case A on one thread, beside a step when
//! all is warm. A median of processes, each of which has but one first call.

use benches::{LAYERS, Layer, values};
use fam::cpu::{Cpu, CpuPlan, Par};
use fam::{Backend, Dtype, Plan, Result, Rows, Step, Streams, View, ViewMut};
use std::process::{Command, exit};
use std::time::Instant;

/// Steps that are warm, of which the median counts.
const STEPS: usize = 64;
/// The argument of a process that measures.
const MEASURE: &str = "--measure";

fn main() -> Result<()> {
    let arguments: Vec<_> = std::env::args().collect();
    if arguments.iter().any(|argument| argument == MEASURE) {
        let [first, steady] = measure()?;
        println!("{first} {steady}");
        return Ok(());
    }
    // As criterion's: cargo bench -- --test runs everything once.
    let processes = if arguments.iter().any(|argument| argument == "--test") { 1 } else { 31 };
    let mut ratios = Vec::new();
    for _ in 0..processes {
        let output = Command::new(&arguments[0]).arg(MEASURE).output().expect("this program again");
        let text = String::from_utf8_lossy(&output.stdout);
        let numbers: Vec<f64> = text.split_whitespace().filter_map(|number| number.parse().ok()).collect();
        let [first, steady] = numbers[..] else {
            eprintln!("{text}{}", String::from_utf8_lossy(&output.stderr));
            exit(1);
        };
        ratios.push((first / steady, first, steady));
    }
    ratios.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (ratio, first, steady) = ratios[ratios.len() / 2];
    let (least, most) = (ratios[0].0, ratios[ratios.len() - 1].0);
    println!(
        "first call {:.2} ms, steady step {:.2} ms: {ratio:.2} steps (from {least:.2} to {most:.2} in {processes} processes)",
        1e3 * first,
        1e3 * steady
    );
    Ok(())
}

/// Seconds of the first call, and of a steady step.
fn measure() -> Result<[f64; 2]> {
    let layer = &LAYERS[0];
    let Layer { heads, kv_heads, head_dim, block_len, mem_len, .. } = *layer;
    let [q_sizes, kv_sizes] = [[1, block_len, heads, head_dim], [1, block_len, kv_heads, head_dim]];
    let [mem_q_sizes, mem_kv_sizes] = [[1, mem_len, heads, head_dim], [1, mem_len, kv_heads, head_dim]];
    let of = |name, sizes: [usize; 4]| values::<f32>(name, sizes.iter().product());
    let (q, k, v) = (of("q", q_sizes), of("k", kv_sizes), of("v", kv_sizes));
    let (mem_q, mem_k, mem_v) = (of("mem_q", mem_q_sizes), of("mem_k", mem_kv_sizes), of("mem_v", mem_kv_sizes));
    let (mut o, mut mem_o) = (q.clone(), mem_q.clone());

    let queue = &mut Par::Serial;
    let mut step = |plan: &CpuPlan, streams: &mut Streams<Cpu>, scratch: &mut [u8]| -> Result<()> {
        let [mem_k, mem_v] = [&mem_k, &mem_v].map(|x| View::tokens(x, mem_kv_sizes));
        streams.set_memory(plan, queue, &[0], mem_k, mem_v, scratch)?;
        let rows = Rows::new(View::tokens(&q, q_sizes), ViewMut::tokens(&mut o, q_sizes));
        let mem_rows = Rows::new(View::tokens(&mem_q, mem_q_sizes), ViewMut::tokens(&mut mem_o, mem_q_sizes));
        let [k, v] = [&k, &v].map(|x| View::tokens(x, kv_sizes));
        streams.step(plan, queue, Step::new(&[0], k, v).rows(rows).mem_rows(mem_rows), scratch)?.commit();
        Ok(())
    };
    let start = Instant::now();
    let cpu = Cpu::new()?.with_threads(1);
    let plan = cpu.plan(&layer.shape(Dtype::F32).build()?.spec(1, block_len).build()?)?;
    let mut streams = Streams::new(cpu, &plan)?;
    let mut scratch = vec![0; plan.support().scratch_bytes as usize];
    step(&plan, &mut streams, &mut scratch)?;
    let first = start.elapsed().as_secs_f64();

    let mut seconds = Vec::with_capacity(STEPS);
    for _ in 0..STEPS {
        let start = Instant::now();
        step(&plan, &mut streams, &mut scratch)?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    Ok([first, seconds[STEPS / 2]])
}
