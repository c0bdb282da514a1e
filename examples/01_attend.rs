//! Attention over a whole sequence in one call, on arrays of your own, and how far it may be from the truth.
//!
//! ```sh
//! cargo run --release --example 01_attend
//! ```
//!
//! The window slides by blocks: a token sees its own block up to itself, and the whole block before. Keys are read where they lie;
//! nothing is cached. The result is held against the f64 reference with the bound that this input allows f32.

use fam::cpu::{Cpu, Par, Pool};
use fam::{Attend, Backend, Dtype, Keys, Op, Plan, Rows, Shape, Span, Spans, View, ViewMut, Window};
use fam_ref::Array;
use fam_ref::layer::Random;
use fam_testkit::{Bound, Condition, Level, Limits};

const TOKENS: usize = 300; // Four blocks and a part of a fifth.
const HEADS: usize = 8;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 64;

fn main() -> fam::Result<()> {
    let shape =
        Shape::builder().heads(HEADS).kv_heads(KV_HEADS).head_dim(HEAD_DIM).block_len(64).window(Window::Blocks(1)).build()?;

    // The kernel is chosen once, for the largest call.
    let cpu = Cpu::new()?;
    let plan = cpu.plan(&shape.spec(1, TOKENS).ops(&[Op::Attend]).build()?)?;
    let mut scratch = vec![0; plan.support().scratch_bytes as usize];
    let pool = Pool::new(cpu.threads())?;

    // [batch, tokens, heads, head_dim], as a projection leaves them.
    let mut random = Random::new(1);
    let mut normal = |heads| random.array([1, TOKENS, heads, HEAD_DIM], 1.0).data.iter().map(|&x| x as f32).collect();
    let (q, k, v): (Vec<f32>, Vec<f32>, Vec<f32>) = (normal(HEADS), normal(KV_HEADS), normal(KV_HEADS));
    let mut o = vec![0f32; q.len()];

    let (q_shape, kv_shape) = ([1, TOKENS, HEADS, HEAD_DIM], [1, TOKENS, KV_HEADS, HEAD_DIM]);
    let spans = [Span::new(0, 0, TOKENS as u32)];
    let keys = Keys::Strided { k: View::tokens(&k, kv_shape), v: View::tokens(&v, kv_shape) };
    let rows = Rows::new(View::tokens(&q, q_shape), ViewMut::tokens(&mut o, q_shape));
    cpu.attend(&plan, &mut Par::Pool(&pool), Attend::new(Spans::Host(&spans), keys).rows(rows), &mut scratch)?;

    // The same in f64, with the magnitudes that rounding errors grow with.
    let wide = |x: &[f32], shape| Array { shape, data: x.iter().map(|&x| x.into()).collect() };
    let (q, k, v) = (wide(&q, q_shape), wide(&k, kv_shape), wide(&v, kv_shape));
    let args = fam_ref::Attend {
        shape: &shape,
        spans: &spans,
        q: Some(&q),
        mem_q: None,
        k: &k,
        v: &v,
        mem_k: None,
        mem_v: None,
        sink: None,
    };
    let expected = fam_ref::attend(&args)?.rows.expect("there are block rows");

    let limits = Limits::default();
    let bound = Bound::new(Level::Hard, Dtype::F32, Dtype::F32, &limits);
    let worst = (0..o.len()).map(|i| {
        let row = i / HEAD_DIM;
        let (s, n, v_max) = (expected.s.data[row], expected.n.data[row], expected.v_max.data[row]);
        let tiles = (n / limits.key_tile as f64).ceil() + 1.0;
        let condition = Condition {
            o: expected.o.data[i],
            a: expected.a.data[i],
            s,
            n,
            tiles,
            d: HEAD_DIM as f64,
            v_max,
            sink: 0.0,
            flushed: 0.0,
        };
        (f64::from(o[i]) - expected.o.data[i]).abs() / bound.o(&condition)
    });
    let worst = worst.fold(0.0, f64::max);

    println!("{} attended {TOKENS} tokens in one call", plan.support().kernel(Op::Attend).expect("planned"));
    println!("worst error: {worst:.3} of its bound, over {} elements", o.len());
    assert!(worst <= 1.0);
    Ok(())
}
