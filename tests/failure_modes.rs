//! What a user gets when something is wrong, for a single op on the CPU. Streams under faults and corrupted snapshots are in tests/streams,
//! files in fam-testkit/tests; what the command line says, and its watchdog, in fam-cli/tests.

use fam::cpu::{Cpu, Par, Pool};
use fam::{
    Attend, Backend, BackendName, Device, Dtype, Error, Keys, Layout, Merge, Op, Partial, Plan, ReadRing, Result, Rows, Shape,
    ShapeBuilder, Span, Spans, View, ViewMut, Window,
};
use rayon::prelude::*;

const TOKENS: usize = 12;
const HEADS: usize = 2;
const D: usize = 8;
const BLOCK: usize = 4;

fn shape() -> ShapeBuilder {
    Shape::builder().heads(HEADS).kv_heads(1).head_dim(D).block_len(BLOCK).window(Window::Blocks(1)).mem_len(2)
}

/// One stream of three blocks with two memory rows, all finite.
#[derive(Clone)]
struct Problem {
    shape: Shape,
    span: Span,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    mem_q: Vec<f32>,
    mem_k: Vec<f32>,
    mem_v: Vec<f32>,
}

/// `o` and `lse` of the block rows, `o` of the memory rows.
type Results = [Vec<f32>; 3];

impl Problem {
    fn new() -> Self {
        let numbers = |seed: usize, n: usize| (0..n).map(|i| ((i * 37 + seed * 101) % 61) as f32 / 30.0 - 1.0).collect();
        let blocks = TOKENS / BLOCK;
        Problem {
            shape: shape().build().unwrap(),
            span: Span::new(0, 0, TOKENS as u32).with_mem_rows(2),
            q: numbers(1, TOKENS * HEADS * D),
            k: numbers(2, TOKENS * D),
            v: numbers(3, TOKENS * D),
            mem_q: numbers(4, blocks * 2 * HEADS * D),
            mem_k: numbers(5, blocks * 2 * D),
            mem_v: numbers(6, blocks * 2 * D),
        }
    }

    fn run(&self) -> Results {
        self.run_on(&mut Par::Serial).unwrap()
    }

    fn run_on(&self, par: &mut Par<'_>) -> Result<Results> {
        let cpu = Cpu::new()?;
        let plan = cpu.plan(&self.shape.spec(1, TOKENS).build()?)?;
        let blocks = TOKENS / BLOCK;
        let mut scratch = vec![0; plan.support().scratch_bytes as usize];
        let mut out = [vec![9.0; TOKENS * HEADS * D], vec![9.0; TOKENS * HEADS], vec![9.0; blocks * 2 * HEADS * D]];
        let [o, lse, mem_o] = &mut out;
        let kv = |data| View::tokens(data, [1, TOKENS, 1, D]);
        let mem = |data, heads| View::of(data, Layout::packed(Dtype::F32, [1, blocks, 2, heads, D]));
        let rows = Rows::new(View::tokens(&self.q, [1, TOKENS, HEADS, D]), ViewMut::tokens(o, [1, TOKENS, HEADS, D]));
        let mem_rows =
            Rows::new(mem(&self.mem_q, HEADS), ViewMut::of(mem_o, Layout::packed(Dtype::F32, [1, blocks, 2, HEADS, D])));
        let args = Attend::new(Spans::Host(std::slice::from_ref(&self.span)), Keys::Strided { k: kv(&self.k), v: kv(&self.v) })
            .rows(rows.lse(ViewMut::tokens(lse, [1, TOKENS, HEADS, 1])))
            .mem_rows(mem_rows)
            .mem(mem(&self.mem_k, 1), mem(&self.mem_v, 1));
        cpu.attend(&plan, par, args, &mut scratch)?;
        Ok(out)
    }
}

/// Values of `o` in token `t`, bit for bit.
fn token(o: &[f32], t: usize) -> Vec<u32> {
    o[t * HEADS * D..(t + 1) * HEADS * D].iter().map(|x| x.to_bits()).collect()
}

fn bits(results: &Results) -> Vec<Vec<u32>> {
    results.iter().map(|r| r.iter().map(|x| x.to_bits()).collect()).collect()
}

#[test]
fn nan_or_infinity_in_a_visible_query_stays_in_its_row() {
    let right = Problem::new().run();
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut problem = Problem::new();
        problem.q[(5 * HEADS + 1) * D + 3] = bad;
        let [o, lse, mem_o] = problem.run();
        assert_eq!(mem_o, right[2]);
        for row in (0..TOKENS * HEADS).filter(|r| *r != 5 * HEADS + 1) {
            assert_eq!((&o[row * D..][..D], lse[row]), (&right[0][row * D..][..D], right[1][row]), "row {row}");
        }
        assert!(o[(5 * HEADS + 1) * D..][..D].iter().all(|x| x.is_nan()) || bad == f32::NEG_INFINITY);
    }
}

#[test]
fn nan_in_a_key_or_value_reaches_the_rows_that_see_it_and_no_other() {
    let right = Problem::new().run();
    for in_value in [false, true] {
        let mut problem = Problem::new();
        // Token 5, in block 1: seen by itself and later tokens of block 1, all of block 2 (its window), and block 1's memory rows.
        (if in_value { &mut problem.v } else { &mut problem.k })[5 * D + 2] = f32::NAN;
        let [o, _, mem_o] = problem.run();
        for t in 0..TOKENS {
            let is_hit = o[t * HEADS * D..(t + 1) * HEADS * D].iter().any(|x| x.is_nan());
            assert_eq!(is_hit, t >= 5, "token {t}");
            assert!(is_hit || token(&o, t) == token(&right[0], t), "token {t}");
        }
        let per_block = 2 * HEADS * D;
        for block in 0..TOKENS / BLOCK {
            let (got, want) = (&mem_o[block * per_block..][..per_block], &right[2][block * per_block..][..per_block]);
            assert_eq!(got.iter().any(|x| x.is_nan()), block == 1, "memory rows of block {block}");
            assert!(block == 1 || got == want);
        }
    }
}

#[test]
fn nan_in_bytes_that_no_row_may_see_changes_no_bit() {
    let mut problem = Problem::new();
    problem.span.len = 7;
    problem.span.mem_rows = 1;
    let right = problem.run();
    for x in [&mut problem.k, &mut problem.v] {
        x[7 * D..].fill(f32::NAN);
    }
    problem.q[7 * HEADS * D..].fill(f32::NAN);
    for x in [&mut problem.mem_k, &mut problem.mem_v] {
        // The second memory row of each block is absent; block 2 is not reached.
        (0..2).for_each(|block| x[(block * 2 + 1) * D..(block * 2 + 2) * D].fill(f32::NAN));
        x[4 * D..].fill(f32::NAN);
    }
    assert_eq!(bits(&problem.run()), bits(&right));
    // Rows past the length were not written.
    assert!(right[0][7 * HEADS * D..].iter().chain(&right[2][2 * 2 * HEADS * D..]).all(|x| *x == 9.0));
}

#[test]
fn a_logit_of_minus_infinity_has_no_weight_and_a_row_of_them_is_empty() {
    let mut problem = Problem::new();
    problem.span.mem_rows = 0;
    problem.q[..HEADS * D].fill(1.0);
    problem.q[HEADS * D..2 * HEADS * D].fill(1.0);
    problem.k[..D].fill(f32::NEG_INFINITY);
    let [o, lse, _] = problem.run();
    // Token 0 sees key 0 alone.
    assert_eq!(token(&o, 0), vec![0; HEADS * D]);
    assert_eq!(lse[..HEADS], [f32::NEG_INFINITY; HEADS]);
    // Token 1 sees keys 0 and 1, of which 1 has all the weight.
    assert_eq!(o[HEADS * D..][..D], problem.v[D..2 * D]);
}

#[test]
fn rows_without_keys_are_empty() {
    let mut problem = Problem::new();
    problem.span.mem_rows = 0;
    problem.span.len = 0;
    // No token, no block: nothing is touched.
    assert!(problem.run().iter().flatten().all(|x| *x == 9.0));
    // A stream's first token without memory sees itself alone.
    problem.span.len = 1;
    let [o, lse, mem_o] = problem.run();
    assert_eq!(o[..D], problem.v[..D]);
    assert!(lse[0].is_finite());
    assert_eq!(mem_o[..D], problem.v[..D]);
}

#[test]
fn an_empty_batch_is_fine_and_sizes_of_zero_are_not() {
    let cpu = Cpu::new().unwrap();
    let plan = cpu.plan(&shape().build().unwrap().spec(0, 0).build().unwrap()).unwrap();
    let none: [f32; 0] = [];
    let keys = Keys::Strided { k: View::tokens(&none, [0, 0, 1, D]), v: View::tokens(&none, [0, 0, 1, D]) };
    let mut scratch = vec![0; plan.support().scratch_bytes as usize];
    cpu.attend(&plan, &mut Par::Serial, Attend::new(Spans::Host(&[]), keys), &mut scratch).unwrap();
    for broken in [shape().head_dim(0), shape().heads(0), shape().kv_heads(0), shape().heads(3).kv_heads(2)] {
        assert!(matches!(broken.build(), Err(Error::Invalid { .. })));
    }
}

#[test]
fn wrong_arguments_are_named_and_nothing_is_written() {
    let cpu = Cpu::new().unwrap();
    let plan = cpu.plan(&shape().build().unwrap().spec(1, TOKENS).build().unwrap()).unwrap();
    let mut scratch = vec![0; plan.support().scratch_bytes as usize];
    let data = vec![0.5f32; TOKENS * HEADS * D + 1];
    let bytes: &[u8] = bytemuck::cast_slice(&data);
    let kv = Layout::tokens(Dtype::F32, [1, TOKENS, 1, D]);
    let good = Layout::tokens(Dtype::F32, [1, TOKENS, HEADS, D]);
    let span = Span::new(0, 0, TOKENS as u32);
    let mut call = |spans: &[Span], q: &[u8], layout: Layout, o: Layout, scratch_len: usize| {
        let mut out = vec![9.0f32; TOKENS * HEADS * D];
        let keys = Keys::Strided { k: View::new(bytes, kv), v: View::new(bytes, kv) };
        let rows = Rows::new(View::new(q, layout), ViewMut::of(&mut out, o));
        let done =
            cpu.attend(&plan, &mut Par::Serial, Attend::new(Spans::Host(spans), keys).rows(rows), &mut scratch[..scratch_len]);
        assert!(done.is_ok() || out.iter().all(|x| *x == 9.0), "a refused call wrote");
        done.map_err(|error| match error {
            Error::Invalid { field, .. } => field,
            Error::LimitExceeded { what, .. } => what,
            other => panic!("{other:?}"),
        })
    };
    let whole = plan.support().scratch_bytes as usize;
    assert_eq!(call(&[span], bytes, good, good, whole), Ok(()));
    assert_eq!(call(&[span], &bytes[..64], good, good, whole), Err("q"));
    assert_eq!(call(&[span], &bytes[1..], good, good, whole), Err("q"), "misaligned");
    assert_eq!(call(&[span], bytes, Layout { dtype: Dtype::Bf16, ..good }, good, whole), Err("q"));
    assert_eq!(call(&[span], bytes, good, good.with_stride([0; 4]), whole), Err("o"));
    assert_eq!(call(&[Span::new(1, 0, 4)], bytes, good, good, whole), Err("span.slot"));
    assert_eq!(call(&[span, span], bytes, good, good, whole), Err("streams in a call (batch)"));
    assert_eq!(call(&[span], bytes, good, good, whole.min(16)), Err("scratch"));
    assert_eq!(call(&[span.with_mem_rows(1)], bytes, good, good, whole), Err("mem"));
}

#[test]
fn sizes_beyond_the_limits_are_refused_when_the_plan_is_made() {
    let cpu = Cpu::new().unwrap();
    let limit = |result: Result<Vec<fam::KernelId>>| assert!(matches!(result, Err(Error::LimitExceeded { .. })));
    let support = |s: ShapeBuilder, batch, rows| {
        let support = cpu.support(&s.build()?.spec(batch, rows).build()?)?;
        Ok(support.kernels.iter().map(|(id, _)| *id).collect())
    };
    limit(support(shape(), usize::MAX, usize::MAX));
    limit(support(shape(), 1 << 20, 1 << 20));
    limit(support(shape().window(Window::Blocks(usize::MAX)), 1, 1));
    limit(support(shape().head_dim(1 << 40), 1, 1));
    limit(support(shape().head_dim(257), 1, 1));
    // A ring that a plan never asked for is not there, however large it would be.
    let wide = Shape::builder().heads(2).head_dim(64).block_len(1 << 20).window(Window::Blocks((1 << 37) - 1)).build().unwrap();
    assert!(wide.spec(1, 1).build().is_err());
    let plan = cpu.plan(&wide.spec(1, 1).ops(&[Op::Attend]).build().unwrap()).unwrap();
    assert_eq!((plan.spec().ring_rows(), plan.support().ring_bytes), (0, 0));
    let ring: &[u8] = &[0; 64];
    let attend = Attend::new(Spans::Host(&[]), Keys::Ring(ring));
    let mut scratch = vec![0; plan.support().scratch_bytes as usize];
    assert!(matches!(cpu.attend(&plan, &mut Par::Serial, attend, &mut scratch), Err(Error::Invalid { field: "keys", .. })));
    let (mut k, mut v) = ([0f32; 128], [0f32; 128]);
    let [k, v] = [&mut k, &mut v].map(|to| ViewMut::tokens(to, [1, 1, 2, 64]));
    let read = cpu.read_ring(&plan, &mut Par::Serial, ReadRing::new(Spans::Host(&[Span::new(0, 0, 1)]), ring, k, v));
    assert!(matches!(read, Err(Error::Invalid { field: "keys", .. })), "{read:?}");
}

/// An empty output of any size along its other axes.
#[test]
fn an_empty_merge_is_done_at_once() {
    let cpu = Cpu::new().unwrap();
    let plan = cpu.plan(&shape().build().unwrap().spec(1, 1).ops(&[Op::Merge]).build().unwrap()).unwrap();
    for sizes in [[usize::MAX, 1, 0, HEADS, D], [0, usize::MAX, usize::MAX, HEADS, D]] {
        let o = Layout::packed(Dtype::F32, sizes);
        let lse = Layout { shape: [sizes[0], sizes[1], sizes[2], HEADS, 1], ..o };
        let part = || Partial { o: View::of::<f32>(&[], o), lse: View::of::<f32>(&[], lse) };
        let args = Merge::new(part(), part(), ViewMut::of::<f32>(&mut [], o));
        cpu.merge(&plan, &mut Par::Serial, args, &mut vec![0; plan.support().scratch_bytes as usize]).unwrap();
    }
}

/// Logits that f32 cannot hold leave their own row unspecified, and every other bit as it was.
#[test]
fn logits_beyond_f32_stay_in_their_row() {
    let plain = Problem::new();
    let expected = plain.run();
    for (t, h, huge) in [(0, 0, 3e38), (5, 1, -3e38), (TOKENS - 1, 0, f32::MAX)] {
        let mut problem = plain.clone();
        problem.q[(t * HEADS + h) * D..][..D].fill(huge);
        let got = problem.run();
        for row in (0..TOKENS * HEADS).filter(|&row| row != t * HEADS + h) {
            let bits = |o: &[f32]| o[row * D..][..D].iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&got[0]), bits(&expected[0]), "row {row}");
            assert_eq!(got[1][row].to_bits(), expected[1][row].to_bits(), "row {row}");
        }
        assert_eq!(got[2], expected[2]);
    }
}

#[test]
fn memory_that_cannot_be_had_is_an_error() {
    let cpu = Cpu::new().unwrap();
    assert!(matches!(cpu.alloc(1 << 60), Err(Error::OutOfMemory { requested }) if requested == 1 << 60));
    assert!(matches!(cpu.alloc(u64::MAX), Err(Error::OutOfMemory { .. } | Error::LimitExceeded { .. })));
}

#[test]
fn copies_past_the_end_are_refused() {
    let cpu = Cpu::new().unwrap();
    let mut mem = vec![1u8; 16];
    assert!(cpu.upload(&mut mem, 9, &[0; 8]).is_err());
    assert!(cpu.upload(&mut mem, u64::MAX, &[0; 8]).is_err());
    assert!(cpu.download(&mem, 9, &mut [0; 8]).is_err());
    assert!(cpu.clear(&mut Par::Serial, &mut mem, 9..17).is_err());
    assert!(cpu.copy_within(&mut Par::Serial, &mut mem, 0..9, 8).is_err());
    assert_eq!(mem, [1; 16]);
}

#[test]
fn a_backend_is_the_one_asked_for_or_says_why_not() {
    for name in BackendName::ALL {
        match fam::select(name) {
            Ok(selection) => assert_eq!(selection.backend.name(), name.name()),
            Err(Error::BackendUnavailable { backend, reason }) => {
                assert!(backend == name.name() && !reason.is_empty(), "{reason}")
            }
            Err(other) => panic!("{other}"),
        }
    }
    // The CPU is always there; a GPU that is a program on it comes behind.
    let auto = fam::select(BackendName::Auto).unwrap();
    assert!(!auto.reason.is_empty());
    let is_gpu = fam::candidates()
        .into_iter()
        .any(|c| c.name != BackendName::Cpu && c.backend.is_ok() && auto.backend.name() == c.name.name());
    assert!(is_gpu || auto.backend.name() == "cpu");
}

#[test]
fn calls_from_inside_a_rayon_pool_and_from_many_threads_give_the_same_bits() {
    let problem = Problem::new();
    let right = bits(&problem.run());
    let pool = Pool::new(3).unwrap();
    let rayon = rayon::ThreadPoolBuilder::new().num_threads(4).build().unwrap();
    rayon.install(|| {
        (0..200).into_par_iter().for_each(|_| assert_eq!(bits(&problem.run_on(&mut Par::Pool(&pool)).unwrap()), right));
    });
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                (0..50).for_each(|_| assert_eq!(bits(&problem.run_on(&mut Par::Pool(&pool)).unwrap()), right));
            });
        }
    });
}
