//! A backend of your own under the conformance suite: `attend` over linear keys in f32, as plain loops. All else it declines.
//! `cargo run --release --example 06_your_backend` passes; with `-- bug` the window moves on one token early, which is found: exit 1.
use fam::*;
use fam_testkit::{Budget, Filter, Harness, SuiteOptions, run_suite};

/// With the bug or without.
struct Loops(bool);

impl Backend for Loops {
    type Mem = [u8];
    type Queue<'q> = ();
    type Plan = (Spec, Support);
    fn name(&self) -> &'static str {
        "loops"
    }
    /// What `attend` would not compute is declined here, before anything runs.
    fn support(&self, spec: &Spec) -> Result<Support> {
        let asked = (spec.ops(), spec.shape().dtype(), spec.shape().infini());
        if asked != (&[Op::Attend][..], Dtype::F32, None) {
            return Err(Error::unsupported("ops, dtype, infini", format!("{asked:?}"), "attend over linear keys in f32"));
        }
        Ok(Support::new(vec![(KernelId { backend: "loops", op: Op::Attend, dtype: Dtype::F32, variant: "plain" }, 1)]))
    }
    fn plan(&self, spec: &Spec) -> Result<Self::Plan> {
        Ok((spec.clone(), self.support(spec)?))
    }
    fn attend(&self, plan: &Self::Plan, _: &mut (), args: Attend<'_, [u8]>, scratch: &mut [u8]) -> Result<()> {
        args.validate(plan, scratch)?;
        let (shape, heads) = (plan.spec().shape(), plan.spec().shape().heads());
        let Attend { spans, rows, mem_rows, keys: Keys::Strided { k, v }, mem, sink, .. } = args else {
            return Err(Error::unsupported("keys", "a ring", "linear caches"));
        };
        for (mut rows, is_mem) in rows.map(|r| (r, false)).into_iter().chain(mem_rows.map(|r| (r, true))) {
            for (n, span) in (0..spans.batch()).map(|n| (n, spans.get(n, plan.spec()))) {
                let [entries, len] =
                    if is_mem { [span.blocks(shape.block_len()), shape.mem_len()] } else { [1, span.len as usize] };
                for (i, t, h) in (0..entries * len * heads).map(|x| (x / heads / len, x / heads % len, x % heads)) {
                    // The block whose memory serves the row, and the positions of the keys that it sees.
                    let (p, bug) = (span.start + t as u64, u64::from(self.0));
                    let (block, positions) = match is_mem {
                        true => (i, span.block_keys(i, shape.block_len())),
                        false => ((shape.block(p) - shape.block(span.start)) as usize, span.window_first(p + bug, shape)..p + 1),
                    };
                    let row = |x: &View<'_, [u8]>, entry, r| load(x, [span.slot as usize, entry, r, h / shape.group()]);
                    let mut keys: Vec<_> = positions.map(|p| [k, v].map(|x| row(&x, 0, (p - span.origin) as usize))).collect();
                    if let Some(MemKeys { k, v }) = mem {
                        let entry = (span.mem_entry as usize + block) % k.layout.shape[1];
                        keys.extend((0..span.mem_rows as usize).map(|f| [k, v].map(|x| row(&x, entry, f))));
                    }
                    let sink = sink.map_or(f32::NEG_INFINITY, |sink| load(&sink, [0, 0, 0, h])[0]);
                    let (o, lse) = softmax(&load(&rows.q, [n, i, t, h]), &keys, shape.scale(), sink);
                    store(&mut rows.o, [n, i, t, h], &o);
                    rows.lse.iter_mut().for_each(|to| store(to, [n, i, t, h], &[lse]));
                }
            }
        }
        Ok(())
    }
}

/// One row over its keys and values, in two passes.
fn softmax(q: &[f32], keys: &[[Vec<f32>; 2]], scale: f32, sink: f32) -> (Vec<f32>, f32) {
    let logits: Vec<f32> = keys.iter().map(|[k, _]| scale * q.iter().zip(k).map(|(q, k)| q * k).sum::<f32>()).collect();
    let is_empty = logits.iter().all(|&logit| logit == f32::NEG_INFINITY);
    let row_max = logits.iter().copied().fold(sink, f32::max).max(f32::MIN); // finite: ∞ - ∞ is NaN
    let p: Vec<f32> = logits.iter().map(|logit| (logit - row_max).exp()).collect();
    let row_sum = (sink - row_max).exp() + p.iter().sum::<f32>();
    let o = |c: usize| p.iter().zip(keys).fold(0.0, |o, (p, [_, v])| o + p * v[c]) / row_sum;
    ((0..q.len()).map(|c| if is_empty { 0.0 } else { o(c) }).collect(), row_max + row_sum.ln())
}

fn load(view: &View<'_, [u8]>, at: [usize; 4]) -> Vec<f32> {
    let row = &view.mem[4 * view.layout.at(at)..][..4 * view.layout.shape[4]];
    row.chunks_exact(4).map(bytemuck::pod_read_unaligned).collect()
}

fn store(view: &mut ViewMut<'_, [u8]>, at: [usize; 4], row: &[f32]) {
    view.mem[4 * view.layout.at(at)..][..4 * row.len()].copy_from_slice(bytemuck::cast_slice(row));
}

/// The memory is the host's, so alloc, upload and download are there already.
impl HostMemory for Loops {}

impl Harness for Loops {
    type Backend = Self;
    fn backend(&self) -> &Self {
        self
    }
    fn run(&self, work: &mut dyn FnMut(&mut ()) -> Result<()>) -> Result<()> {
        work(&mut ())
    }
}

fn main() -> std::process::ExitCode {
    let filter = Filter { ops: vec![Op::Attend], dtypes: vec![Dtype::F32], text: " linear".into() };
    let options = SuiteOptions { budget: Budget::Cases(5000), filter, max_failures: 1, ..SuiteOptions::default() };
    let report = run_suite(&Loops(std::env::args().any(|arg| arg == "bug")), &options, &mut |_| ());
    println!("{report}");
    if report.is_ok() { 0.into() } else { 1.into() }
}
