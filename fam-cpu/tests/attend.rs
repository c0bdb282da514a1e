//! `attend` and `append` against themselves, at every level of this machine: the same stream cut and run in other ways has the same bits. That
//! they are right is the conformance suite's to show.

mod common;

use common::{Outputs, Stream, shape};
use fam_core::{Backend, Dtype, Element, Op, Plan, Span, Window, bf16};
use fam_cpu::{Cpu, FEW_ROWS, Isa, Par};

/// (heads, head_dim, block_len, window, mem_len, tokens, origin).
type Case = ([usize; 2], usize, usize, Window, usize, usize, u64);

const CASES: [Case; 14] = [
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
                    // The dot of bf16 pairs serves attention in bf16 alone.
                    let is_served = isa != Isa::Avx512Bf16 || (op, dtype) == (Op::Attend, Dtype::Bf16);
                    let level = if is_served { isa.name() } else { "avx512" };
                    assert_eq!(support.kernel(op).unwrap().to_string(), format!("cpu-{op}-{dtype}-{level}"));
                }
            }
            Err(error) => assert!(!isa.is_available() && error.to_string().contains(isa.name()), "{error}"),
        }
    }
}

/// The CPU at every level that this machine has.
fn levels() -> impl Iterator<Item = Cpu> {
    Isa::ALL.into_iter().filter_map(|isa| Cpu::new().unwrap().with_isa(isa).ok())
}

/// The bits of each token in a span of more than few rows.
fn of_many_rows(outputs: &Outputs, stream: &Stream<impl Element>, spans: &[Span]) -> Vec<Option<Vec<u32>>> {
    let (h, d, group) = (stream.shape.heads(), stream.shape.head_dim(), stream.shape.group());
    let mut tokens = vec![None; stream.len];
    for span in spans.iter().filter(|span| span.len as usize * group > FEW_ROWS) {
        let first = (span.start - stream.origin) as usize;
        for (t, token) in tokens.iter_mut().enumerate().skip(first).take(span.len as usize) {
            let (o, lse) = (&outputs.o[t * h * d..][..h * d], &outputs.lse[t * h..][..h]);
            *token = Some(o.iter().chain(lse).map(|x| x.to_bits()).collect());
        }
    }
    tokens
}

fn steps_are_prefill<T: Element>() {
    for (cpu, stream) in levels().flat_map(|cpu| cases::<T>().map(move |stream| (cpu, stream))) {
        let prefill = stream.prefill(&cpu, &mut Par::Serial);
        let many = of_many_rows(&prefill, &stream, &[stream.span()]);
        // f16 changes packing alone; bf16 may have products of its own.
        let lens: &[usize] = if T::DTYPE == Dtype::F16 { &[3, 19] } else { &[1, 3, 19, 1 << 16] };
        for &len in lens {
            let steps = stream.stepwise(&cpu, &mut Par::Serial, len);
            let what = format!("{}, {:?} in steps of {len}", cpu.isa(), stream.shape);
            let many_of_steps = of_many_rows(&steps, &stream, &stream.steps(len));
            for (step, prefill) in many_of_steps.iter().zip(&many) {
                assert!(step.is_none() || prefill.is_none() || step == prefill, "{what}");
            }
            let mem = |o: &Outputs| [&o.mem_o, &o.mem_lse].map(|x| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
            assert!(mem(&steps) == mem(&prefill), "memory rows of {what}");
        }
    }
}

#[test]
fn steps_of_more_than_few_rows_have_the_bits_of_a_prefill() {
    each_dtype!(steps_are_prefill);
}

#[test]
fn a_row_with_one_visible_key_is_its_value() {
    each_dtype!(one_key);
}

fn one_key<T: Element>() {
    let stream = Stream::<T>::new(shape([4, 2], 19, 1, Window::Blocks(0), 0, T::DTYPE), 5, 0);
    for cpu in levels() {
        let o = stream.prefill(&cpu, &mut Par::Serial).o;
        for (row, o) in o.chunks(19).enumerate() {
            let kv_row = row / 4 * 2 + row % 4 / 2;
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
    nan_reaches_the_rows_of::<T>(|stream| stream.prefill(&cpu, &mut Par::Serial));
    // Few rows at once, some of which see keys that others do not.
    nan_reaches_the_rows_of::<T>(|stream| stream.stepwise(&cpu, &mut Par::Serial, 4));
}

fn nan_reaches_the_rows_of<T: Element>(run: impl Fn(&Stream<T>) -> Outputs) {
    let mut stream = Stream::<T>::new(shape([2, 1], 16, 70, Window::Blocks(1), 3, T::DTYPE), 350, 0);
    let [nan, infinity] = [f32::NAN, f32::INFINITY].map(T::from_f32);
    let clean = run(&stream);
    for at in [0, 75, 139, 140, 349] {
        let (k, v) = (stream.k[at * 16], stream.v[at * 16 + 3]);
        for (dirty_k, dirty_v) in [(nan, v), (k, infinity), (infinity, v)] {
            (stream.k[at * 16], stream.v[at * 16 + 3]) = (dirty_k, dirty_v);
            let dirty = run(&stream);
            for (row, (dirty, clean)) in dirty.o.chunks(32).zip(clean.o.chunks(32)).enumerate() {
                let sees = row >= at && row / 70 <= at / 70 + 1;
                assert_eq!(sees, dirty != clean, "row {row}, key {at}");
            }
            for (row, (dirty, clean)) in dirty.mem_o.chunks(32).zip(clean.mem_o.chunks(32)).enumerate() {
                assert_eq!(row / 3 == at / 70, dirty != clean, "memory row {row}, key {at}");
            }
        }
        (stream.k[at * 16], stream.v[at * 16 + 3]) = (k, v);
    }
}
