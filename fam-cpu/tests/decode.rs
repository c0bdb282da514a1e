//! Few rows of a stream: whoever runs them, in parts or whole, alone or beside others, their bits are the same. That they are right is
//! the conformance suite's to show.

mod common;

use common::{levels, random};
use fam_core::{Attend, Backend, Dtype, Element, Keys, Layout, Op, Plan, Rows, Shape, Span, Spans, View, ViewMut, Window};
use fam_cpu::{Cpu, Executor, FEW_ROWS, Par, Pool};

/// Sizes of a call: query and kv heads, D, window, F and how many memory rows spans have; keys of each stream and tokens of the call.
struct Call {
    heads: [usize; 2],
    d: usize,
    window: Window,
    mem_len: usize,
    mem_rows: usize,
    keys: usize,
    lens: &'static [usize],
}

/// Many splits; channels that are no whole vectors, and rows that see different keys; a window whose keys end amid blocks; beside a prefill;
/// splits between the first and the last that hold no key: of a block's beginning, of memory rows that are not there.
const CALLS: [Call; 7] = [
    Call { heads: [4, 1], d: 64, window: Window::Blocks(2), mem_len: 3, mem_rows: 3, keys: 2900, lens: &[1] },
    Call { heads: [3, 3], d: 31, window: Window::Blocks(1), mem_len: 0, mem_rows: 0, keys: 1100, lens: &[5, 1] },
    Call { heads: [4, 2], d: 48, window: Window::Tokens(700), mem_len: 2, mem_rows: 2, keys: 1500, lens: &[3, 40, 8] },
    Call { heads: [2, 1], d: 128, window: Window::Blocks(0), mem_len: 70, mem_rows: 70, keys: 1000, lens: &[2, 0, 7] },
    Call { heads: [1, 1], d: 16, window: Window::Blocks(1), mem_len: 1, mem_rows: 1, keys: 130, lens: &[1, 1, 16, 17] },
    Call { heads: [1, 1], d: 16, window: Window::Tokens(64), mem_len: 3, mem_rows: 3, keys: 950, lens: &[1] },
    Call { heads: [2, 1], d: 16, window: Window::Blocks(1), mem_len: 600, mem_rows: 0, keys: 1100, lens: &[3] },
];

/// The positions' blocks end before the last two keys, so that a call of several tokens touches two.
const BLOCK: usize = 998;

/// `o` and `lse` of each stream, then `mem_o`, of a call in the given phases or parts of it.
fn run<T: Element>(cpu: Cpu, call: &Call, streams: &[usize], queues: &mut [Par<'_>]) -> Vec<Vec<u32>> {
    let Call { heads: [h, kv], d, window, mem_len: f, mem_rows, keys, lens } = *call;
    let shape = Shape::builder().heads(h).kv_heads(kv).head_dim(d).block_len(BLOCK).window(window).mem_len(f).dtype(T::DTYPE);
    let shape = shape.build().unwrap();
    let most = *lens.iter().max().unwrap();
    let spec = shape.spec(lens.len(), most).blocks(2).slots(lens.len()).out_dtype(Dtype::F32).ops(&[Op::Attend]).build().unwrap();
    let plan = cpu.plan(&spec).unwrap();
    let mut scratch = vec![0xff; plan.support().scratch_bytes as usize];
    let span = |&n: &usize| Span::new(n as u32, (keys - lens[n]) as u64, lens[n] as u32).with_mem_rows(mem_rows as u32);
    let spans: Vec<Span> = streams.iter().map(span).collect();
    let (k, v) = (random::<T>(1, lens.len() * keys * kv * d), random::<T>(2, lens.len() * keys * kv * d));
    let mem = random::<T>(3, lens.len() * f * kv * d);
    // The rows of stream n are the same wherever it stands in the call.
    let of_streams =
        |seed: u64, size: usize| streams.iter().flat_map(|&n| random::<T>(seed + n as u64, size)).collect::<Vec<T>>();
    let (q, mem_q) = (of_streams(10, most * h * d), of_streams(20, 2 * f * h * d));
    let batch = streams.len();
    let (mut o, mut lse, mut mem_o) =
        (vec![7f32; batch * most * h * d], vec![7f32; batch * most * h], vec![7f32; batch * 2 * f * h * d]);
    let cached = |rows| Layout::packed(T::DTYPE, [lens.len(), 1, rows, kv, d]);
    let of_mem_rows = |dtype| Layout::packed(dtype, [batch, 2, f, h, d]);
    for queue in queues {
        let rows = Rows::new(View::tokens(&q, [batch, most, h, d]), ViewMut::tokens(&mut o, [batch, most, h, d]));
        let mut args =
            Attend::new(Spans::Host(&spans), Keys::Strided { k: View::of(&k, cached(keys)), v: View::of(&v, cached(keys)) })
                .rows(rows.lse(ViewMut::tokens(&mut lse, [batch, most, h, 1])));
        if f > 0 {
            args = args.mem(View::of(&mem, cached(f)), View::of(&mem, cached(f)));
            args = args
                .mem_rows(Rows::new(View::of(&mem_q, of_mem_rows(T::DTYPE)), ViewMut::of(&mut mem_o, of_mem_rows(Dtype::F32))));
        }
        cpu.attend(&plan, queue, args, &mut scratch).unwrap();
    }
    let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<u32>>();
    let of = |m: usize| {
        [
            bits(&o[m * most * h * d..][..most * h * d]),
            bits(&lse[m * most * h..][..most * h]),
            bits(&mem_o[m * 2 * f * h * d..][..2 * f * h * d]),
        ]
    };
    (0..batch).map(|m| of(m).concat()).collect()
}

struct Scoped(usize);

impl Executor for Scoped {
    fn threads(&self) -> usize {
        self.0
    }
    fn run(&self, tasks: usize, body: &(dyn Fn(usize) + Sync)) {
        std::thread::scope(|s| (0..tasks).for_each(|i| drop(s.spawn(move || body(i)))));
    }
}

fn who_runs<T: Element>() {
    for (cpu, call) in levels().flat_map(|cpu| CALLS.iter().map(move |call| (cpu, call))) {
        let all: Vec<usize> = (0..call.lens.len()).collect();
        // One worker joins the splits of a head as it goes, several leave them to a second phase.
        let whole = run::<T>(cpu.with_threads(1), call, &all, &mut [Par::Serial]);
        for threads in [1, 2, 3, 4, 7, 16] {
            let cpu = cpu.with_threads(threads);
            assert!(run::<T>(cpu, call, &all, &mut [Par::Serial]) == whole, "plan for {threads} threads");
            assert!(run::<T>(cpu, call, &all, &mut [Par::Pool(&Pool::new(threads).unwrap())]) == whole, "{threads} threads");
            assert!(run::<T>(cpu, call, &all, &mut [Par::Caller(&Scoped(threads))]) == whole, "{threads} callers");
            let slices = (0..2).flat_map(|phase| (0..threads).map(move |ith| Par::Slice { ith, nth: threads, phase }));
            assert!(run::<T>(cpu, call, &all, &mut slices.collect::<Vec<_>>()) == whole, "{threads} slices");
        }
    }
}

#[test]
fn bits_do_not_depend_on_who_runs() {
    each_dtype!(who_runs);
}

#[test]
fn bits_do_not_depend_on_the_batch() {
    for (cpu, call) in levels().flat_map(|cpu| CALLS.iter().map(move |call| (cpu.with_threads(4), call))) {
        let all: Vec<usize> = (0..call.lens.len()).collect();
        let batch = run::<f32>(cpu, call, &all, &mut [Par::Serial]);
        for (n, together) in all.iter().zip(&batch) {
            assert!(run::<f32>(cpu, call, &[*n], &mut [Par::Serial])[0] == *together, "stream {n} of {:?}", call.lens);
        }
        let backwards: Vec<usize> = all.into_iter().rev().collect();
        assert!(run::<f32>(cpu, call, &backwards, &mut [Par::Serial]).iter().eq(batch.iter().rev()));
    }
}

/// The calls are of few rows, of more, and of as many as are few.
#[test]
fn calls_are_on_either_side() {
    let rows = CALLS.iter().flat_map(|call| call.lens.iter().map(|len| len * call.heads[0] / call.heads[1]));
    let rows: Vec<usize> = rows.collect();
    assert!(rows.contains(&FEW_ROWS) && rows.contains(&(FEW_ROWS + 1)) && rows.contains(&1));
}
