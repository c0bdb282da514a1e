//! A backend of your own under the conformance suite: `attend` over linear keys in f32, as plain loops. All else it declines.
//!
//! ```sh
//! cargo run --release --example 06_your_backend          # every case passes
//! cargo run --release --example 06_your_backend -- bug   # the window moves on one token early: found, exit 1
//! ```

mod harness;

use fam::*;
use fam_testkit::{Budget, Filter, SuiteOptions, run_suite};
use harness::{load, store};

struct Loops {
    has_bug: bool,
}

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
        let shape = plan.spec().shape();
        let Attend { spans, rows, mem_rows, keys: Keys::Strided { k, v }, mem, sink, .. } = args else {
            return Err(Error::unsupported("keys", "a ring", "linear caches"));
        };
        for (mut rows, is_mem) in rows.map(|r| (r, false)).into_iter().chain(mem_rows.map(|r| (r, true))) {
            for (n, span) in (0..spans.batch()).map(|n| (n, spans.get(n, plan.spec()))) {
                let blocks = span.blocks(shape.block_len());
                let (blocks, len) = if is_mem { (blocks, shape.mem_len()) } else { (1, span.len as usize) };
                for (i, t, h) in harness::indices([blocks, len, shape.heads()]) {
                    // The block whose memory serves the row, and the positions of the keys that it sees.
                    let (p, bug) = (span.start + t as u64, u64::from(self.has_bug));
                    let (block, positions) = match is_mem {
                        true => (i as u64, span.block_keys(i, shape.block_len())),
                        false => (shape.block(p) - shape.block(span.start), span.window_first(p + bug, shape)..p + 1),
                    };
                    let (slot, head) = (span.slot as usize, h / shape.group());
                    let key = |[k, v]: [&View<'_, [u8]>; 2], entry, row| [k, v].map(|x| load(x, [slot, entry, row, head]));
                    let mut keys: Vec<_> = positions.map(|p| key([&k, &v], 0, (p - span.origin) as usize)).collect();
                    if let Some(MemKeys { k, v }) = &mem {
                        let entry = (span.mem_entry as usize + block as usize) % k.layout.shape[1];
                        keys.extend((0..span.mem_rows as usize).map(|f| key([k, v], entry, f)));
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
    let mut o = vec![0.0; q.len()];
    if logits.iter().all(|&x| x == f32::NEG_INFINITY) {
        return (o, sink);
    }
    let row_max = logits.iter().copied().fold(sink, f32::max);
    let mut row_sum = (sink - row_max).exp();
    for (logit, [_, v]) in logits.iter().zip(keys) {
        let p = (logit - row_max).exp();
        row_sum += p;
        o.iter_mut().zip(v).for_each(|(o, v)| *o += p * v);
    }
    o.iter_mut().for_each(|o| *o /= row_sum);
    (o, row_max + row_sum.ln())
}

fn main() -> std::process::ExitCode {
    let loops = Loops { has_bug: std::env::args().any(|arg| arg == "bug") };
    let filter = Filter { ops: vec![Op::Attend], dtypes: vec![Dtype::F32], text: " linear".into() };
    let options = SuiteOptions { budget: Budget::Cases(5000), filter, max_failures: 1, ..SuiteOptions::default() };
    let report = run_suite(&loops, &options, &mut |_| ());
    println!("{report}");
    if report.is_ok() { 0.into() } else { 1.into() }
}
