//! `attend` and `append` against themselves, at every level of this machine: the same stream cut and run in other ways has the same bits. That
//! they are right is the conformance suite's to show.

mod common;

use common::{Outputs, Stream, levels, shape};
use fam_core::{Backend, Dtype, Element, Op, Plan, Span, Window, bf16};
use fam_cpu::{Cpu, FEW_ROWS, Isa, Par};

/// (heads, head_dim, block_len, window, mem_len, tokens, origin).
type Case = ([usize; 2], usize, usize, Window, usize, usize, u64);

const CASES: [Case; 15] = [
    ([1, 1], 1, 1, Window::Blocks(0), 0, 1, 0),
    ([1, 1], 8, 4, Window::Blocks(1), 2, 11, 0),
    ([2, 1], 64, 64, Window::Blocks(1), 7, 150, 0),
    ([4, 2], 16, 65, Window::Blocks(2), 16, 300, 0),
    ([6, 3], 31, 7, Window::Blocks(3), 1, 50, 3),
    ([8, 2], 80, 63, Window::Blocks(0), 0, 100, 1000),
    ([3, 3], 7, 128, Window::Blocks(1), 70, 260, 130),
    ([4, 1], 59, 100, Window::Blocks(1), 3, 230, 37),
    ([1, 1], 128, 32, Window::Tokens(1), 4, 40, 0),
    ([2, 2], 24, 32, Window::Tokens(33), 4, 140, 5),
    // Steps of 19 tokens are not few, and their windows begin amid a block at odd places too.
    ([4, 1], 64, 100, Window::Tokens(33), 2, 230, 5),
    ([2, 1], 256, 16, Window::Tokens(70), 2, 100, 0),
    ([9, 3], 111, 5, Window::Blocks(20), 2, 130, 11),
    ([130, 1], 2, 3, Window::Blocks(2), 2, 10, 0),
    ([1, 1], 16, 300, Window::Blocks(1), 0, 450, 250),
];

fn cases<T: Element>() -> impl Iterator<Item = Stream<T>> {
    CASES
        .into_iter()
        .map(|(heads, d, b, window, f, len, origin)| Stream::new(shape(heads, d, b, window, f, T::DTYPE), len, origin))
}

#[test]
fn kernels_say_their_level() {
    for (isa, dtype) in Isa::ALL.into_iter().flat_map(|isa| Dtype::ALL.iter().map(move |dtype| (isa, *dtype))) {
        let spec = shape([2, 1], 16, 4, Window::Blocks(1), 0, dtype).spec(1, 4).ops(&Op::ALL).build().unwrap();
        match Cpu::new().unwrap().with_isa(isa) {
            Ok(cpu) => {
                let support = cpu.plan(&spec).unwrap().support().clone();
                for op in Op::ALL {
                    // The dot of bf16 pairs serves attention in bf16 alone, and its gradients.
                    let in_pairs = dtype == Dtype::Bf16 && [Op::Attend, Op::AttendBackward].contains(&op);
                    let is_served = isa != Isa::Avx512Bf16 || in_pairs;
                    let level = if is_served { isa.name() } else { "avx512" };
                    assert_eq!(support.kernel(op).unwrap().to_string(), format!("cpu-{op}-{dtype}-{level}"));
                }
            }
            Err(error) => assert!(!isa.is_available() && error.to_string().contains(isa.name()), "{error}"),
        }
    }
}

/// What the level with the dot of bf16 pairs computes is what its kernel's name says: other bits than without, but for few rows.
#[test]
fn pairs_multiply_where_kernels_say_so() {
    let levels = [Isa::Avx512, Isa::Avx512Bf16].map(|isa| Cpu::new().unwrap().with_isa(isa));
    let [Ok(without), Ok(with)] = levels else { return };
    let stream = Stream::<bf16>::new(shape([2, 1], 64, 40, Window::Blocks(1), 3, Dtype::Bf16), 40, 0);
    let many = [&with, &without].map(|cpu| stream.prefill(cpu, &mut Par::Serial).o);
    assert_ne!(many[0], many[1]);
    let few = [&with, &without].map(|cpu| stream.stepwise(cpu, &mut Par::Serial, 4).o);
    assert_eq!(few[0], few[1]);
}

/// Of each token whether its block has few rows in the call, and its bits.
fn bits_of_tokens(outputs: &Outputs, stream: &Stream<impl Element>, spans: &[Span]) -> Vec<(bool, Vec<u32>)> {
    let (h, d, b) = (stream.shape.heads(), stream.shape.head_dim(), stream.shape.block_len() as u64);
    let bits_of = |position: u64| {
        let t = (position - stream.origin) as usize;
        let (o, lse) = (&outputs.o[t * h * d..][..h * d], &outputs.lse[t * h..][..h]);
        o.iter().chain(lse).map(|x| x.to_bits()).collect()
    };
    let positions = |span: &Span| span.start..span.start + u64::from(span.len);
    let tokens = spans.iter().flat_map(|span| positions(span).map(move |position| (span, position)));
    tokens
        .map(|(span, position)| {
            let rows = positions(span).filter(|other| other / b == position / b).count() * stream.shape.group();
            (rows <= FEW_ROWS, bits_of(position))
        })
        .collect()
}

fn steps_are_prefill<T: Element>() {
    let mut compared = [0; 2];
    for (cpu, stream) in levels().flat_map(|cpu| cases::<T>().map(move |stream| (cpu, stream))) {
        // f16 changes packing alone; bf16 may have products of its own.
        let lens: &[usize] = if T::DTYPE == Dtype::F16 { &[3, 19] } else { &[1, 2, 3, 4, 19, 1 << 16] };
        let prefill = stream.prefill(&cpu, &mut Par::Serial);
        let mut of_calls = vec![bits_of_tokens(&prefill, &stream, &[stream.span()])];
        for &len in lens {
            let steps = stream.stepwise(&cpu, &mut Par::Serial, len);
            let what = format!("{}, {:?} in steps of {len}", cpu.isa(), stream.shape);
            let of_steps = bits_of_tokens(&steps, &stream, &stream.steps(len));
            for (t, of_step) in of_steps.iter().enumerate() {
                for of_call in of_calls.iter().map(|tokens| &tokens[t]).filter(|of_call| of_call.0 == of_step.0) {
                    compared[usize::from(of_step.0)] += 1;
                    assert!(of_step == of_call, "token {t} of {what}");
                }
            }
            of_calls.push(of_steps);
            let mem = |o: &Outputs| [&o.mem_o, &o.mem_lse].map(|x| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
            assert!(mem(&steps) == mem(&prefill), "memory rows of {what}");
        }
    }
    assert!(compared.iter().all(|n| *n > 1000), "{compared:?}");
}

#[test]
fn tokens_of_equally_few_rows_have_the_same_bits_in_steps_and_prefill() {
    each_dtype!(steps_are_prefill);
}

#[test]
fn a_row_with_one_visible_key_is_its_value() {
    each_dtype!(one_key);
}

fn one_key<T: Element>() {
    // Rows that are few, and a group of more.
    for (cpu, group) in levels().flat_map(|cpu| [(cpu, 2), (cpu, 17)]) {
        let stream = Stream::<T>::new(shape([2 * group, 2], 19, 1, Window::Blocks(0), 0, T::DTYPE), 5, 0);
        let o = stream.prefill(&cpu, &mut Par::Serial).o;
        for (row, o) in o.chunks(19).enumerate() {
            let kv_row = row / group;
            let v: Vec<f32> = stream.v[kv_row * 19..][..19].iter().map(|v| v.to_f32()).collect();
            assert_eq!(o, v, "{}", cpu.isa());
        }
    }
}

/// NaN in one key and value reaches exactly the rows that see it.
#[test]
fn nan_reaches_the_rows_that_see_it() {
    levels().for_each(nan_reaches_the_rows::<f32>);
    levels().for_each(nan_reaches_the_rows::<bf16>);
}

fn nan_reaches_the_rows<T: Element>(cpu: Cpu) {
    nan_reaches_the_rows_of::<T>(2, |stream| stream.prefill(&cpu, &mut Par::Serial));
    // Whole vectors of rows that see the same keys, but not all keys of the tile.
    nan_reaches_the_rows_of::<T>(64, |stream| stream.prefill(&cpu, &mut Par::Serial));
    // Few rows at once, some of which see keys that others do not.
    nan_reaches_the_rows_of::<T>(2, |stream| stream.stepwise(&cpu, &mut Par::Serial, 4));
}

fn nan_reaches_the_rows_of<T: Element>(heads: usize, run: impl Fn(&Stream<T>) -> Outputs) {
    let mut stream = Stream::<T>::new(shape([heads, 1], 16, 70, Window::Blocks(1), 3, T::DTYPE), 350, 0);
    let [nan, infinity] = [f32::NAN, f32::INFINITY].map(T::from_f32);
    let clean = run(&stream);
    for at in [0, 75, 139, 140, 349] {
        let (k, v) = (stream.k[at * 16], stream.v[at * 16 + 3]);
        for (dirty_k, dirty_v) in [(nan, v), (k, infinity), (infinity, v)] {
            (stream.k[at * 16], stream.v[at * 16 + 3]) = (dirty_k, dirty_v);
            let dirty = run(&stream);
            for (row, (dirty, clean)) in dirty.o.chunks(heads * 16).zip(clean.o.chunks(heads * 16)).enumerate() {
                let sees = row >= at && row / 70 <= at / 70 + 1;
                assert_eq!(sees, dirty != clean, "row {row}, key {at}");
            }
            for (row, (dirty, clean)) in dirty.mem_o.chunks(heads * 16).zip(clean.mem_o.chunks(heads * 16)).enumerate() {
                assert_eq!(row / 3 == at / 70, dirty != clean, "memory row {row}, key {at}");
            }
        }
        (stream.k[at * 16], stream.v[at * 16 + 3]) = (k, v);
    }
}
