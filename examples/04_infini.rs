//! Compressive memory (Infini-attention): what was read a thousand segments ago, out of one matrix per head.
//!
//! ```sh
//! cargo run --release --example 04_infini
//! ```
//!
//! The first segment writes values under keys that nothing else uses; every later one writes 1 under one more key, over and over. At the
//! end each of them is asked for, through a gate that leaves local attention out. Both rules give back what was written once. Of what was
//! written often the linear rule keeps the average; the delta rule, as the paper prints it, keeps half, because it counts every write in z
//! but adds to m only what is new.

use fam::cpu::{Cpu, Par};
use fam::{Backend, InfiniRule, Layout, Plan, Rows, Shape, Step, StepInfini, Streams, View, ViewMut};
use fam_ref::layer::Random;

const SEGMENT: usize = 32;
const HEAD_DIM: usize = 64;
const SEGMENTS: usize = 1000;

fn main() -> fam::Result<()> {
    for (rule, often) in [(InfiniRule::Linear, 1.0), (InfiniRule::Delta, 0.5)] {
        let shape = Shape::builder().head_dim(HEAD_DIM).block_len(SEGMENT).infini(rule).build()?;
        let cpu = Cpu::new()?;
        let plan = cpu.plan(&shape.spec(1, SEGMENT).build()?)?;
        let mut streams = Streams::new(cpu, &plan)?;
        let mut scratch = vec![0; plan.support().scratch_bytes as usize];

        // Token t of the first segment has a key and random values of its own; the filler has the last key.
        let keys: Vec<f32> = (0..SEGMENT).flat_map(one_hot).collect();
        let values: Vec<f32> = Random::new(1).array([SEGMENT * HEAD_DIM], 1.0).data.iter().map(|&x| x as f32).collect();
        let filler_keys = one_hot(HEAD_DIM - 1).repeat(SEGMENT);
        let filler_values = vec![1f32; SEGMENT * HEAD_DIM];
        let beta = [30f32]; // g = 1 − 1e-13: the memory branch, all but alone.

        let mut o = vec![0f32; SEGMENT * HEAD_DIM];
        let mut segment = |q: &[f32], k: &[f32], v: &[f32]| {
            let [q, k, v] = [q, k, v].map(|x| View::tokens(x, [1, SEGMENT, 1, HEAD_DIM]));
            // Keys of the local attention carry rotary positions, those of the memory do not; here there are none at all.
            let infini = StepInfini { q, k, beta: View::of(&beta, Layout::per_head(1)) };
            let rows = Rows::new(q, ViewMut::tokens(&mut o, [1, SEGMENT, 1, HEAD_DIM]));
            streams.step(&plan, &mut Par::Serial, Step::new(&[0], k, v).rows(rows).infini(infini), &mut scratch)?.commit();
            fam::Result::Ok(o.clone())
        };

        let nothing = segment(&keys, &keys, &values)?;
        assert!(nothing.iter().all(|o| o.abs() < 1e-12), "a segment is read before it is written: the memory was empty");
        for _ in 0..SEGMENTS {
            segment(&filler_keys, &filler_keys, &filler_values)?;
        }
        let once = segment(&keys, &filler_keys, &filler_values)?;
        let many_times = segment(&filler_keys, &filler_keys, &filler_values)?;

        let worst = once.iter().zip(&values).map(|(o, v)| (o - v).abs()).fold(0.0, f32::max);
        println!("{rule:?}, {SEGMENTS} segments later, from {} bytes of state:", streams.state_bytes());
        println!("  written once: {SEGMENT} keys, {} values, read back within {worst:.1e}", values.len());
        println!("  written {} times: 1, read back as {}", SEGMENTS * SEGMENT, many_times[0]);
        assert!(worst < 1e-5);
        assert!(many_times.iter().all(|o| (o - often).abs() < 1e-3));
    }
    Ok(())
}

/// A key whose σ is 1 in one channel and all but 0 in the others: σ(x) = exp(x) below 0.
fn one_hot(channel: usize) -> Vec<f32> {
    (0..HEAD_DIM).map(|c| if c == channel { 0.0 } else { -80.0 }).collect()
}
