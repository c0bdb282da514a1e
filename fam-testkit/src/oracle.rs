//! Problems with their results and all gradients in f64, as files: for implementations of the mathematics in other languages, which agree
//! with the reference to rounding, and whose automatic differentiation agrees with its backward pass.
//!
//! Beside a case file's inputs such a file has `expected_X` for each output X in F64; `d_X`, the gradient of some loss with respect to X;
//! and `expected_d_Y`, the gradient with respect to each input Y, in its shape.

mod infini;

use crate::casefile::{CaseFile, Stored, Tensor, serialize};
use crate::judge::{memory, spans, tokens};
use crate::rng::Rng;
use fam_core::{Result, Shape, Window};
use fam_ref::layer::{Config, Layer, Random, Stack};
use fam_ref::{Array, Attend, AttendUpstream, Rows, attend, attend_backward, merge, merge_backward};
use infini::Infini;
use std::collections::HashMap;

/// The tensors of a file, by name.
type Named = Vec<(String, Stored)>;

fn store<const R: usize>(to: &mut Named, name: &str, x: &Array<R>) {
    to.push((name.into(), Stored::wide(&x.shape, &x.data)));
}

/// A case's results and gradients; some elements of its `infini_q` and `infini_k` become 0. The loss's gradients with respect to the outputs
/// are drawn from `seed`.
///
/// # Errors
/// Where tensors do not fit each other; a case that was read or generated has none of those.
pub fn attention_oracle(case: &CaseFile, seed: u64) -> Result<Vec<u8>> {
    let case = &on_the_seam(case);
    let mut random = Random::new(seed);
    let (q, k, v) = (tokens(&case.q), tokens(&case.k), tokens(&case.v));
    let mem_q = case.mem_q.as_ref().map(|t| memory(case, t));
    let mem = case.mem.as_ref().map(|(k, v)| (memory(case, k), memory(case, v)));
    let sink = case.sink.as_ref().map(Tensor::values);
    let spans = spans(case);
    let args = Attend {
        shape: &case.shape,
        spans: &spans,
        q: Some(&q),
        mem_q: mem_q.as_ref(),
        k: &k,
        v: &v,
        mem_k: mem.as_ref().map(|(k, _)| k),
        mem_v: mem.as_ref().map(|(_, v)| v),
        sink: sink.as_deref(),
    };
    let attended = attend(&args)?;
    let mut file = case.inputs();

    // 1. What arrives at the rows. Those of tokens that do not exist are 0.
    let mut arriving = |rows: &Option<Rows>| {
        rows.as_ref().map(|rows| {
            let (mut d_o, mut d_lse) = (random.array(rows.o.shape, 1.0), random.array(rows.lse.shape, 1.0));
            let d = rows.o.shape[4];
            for (at, &n) in rows.n.data.iter().enumerate().filter(|(_, n)| **n == 0.0) {
                d_o.data[at * d..][..d].fill(n);
                d_lse.data[at] = n;
            }
            (d_o, d_lse)
        })
    };
    let (d_rows, d_mem_rows) = (arriving(&attended.rows), arriving(&attended.mem_rows));

    // 2. Local attention, and where there is one the compressive memory behind it.
    let infini = case.infini.as_ref().map(|infini| Infini::new(case, infini, &q, &k, &v)).transpose()?;
    let groups = [("", &attended.rows, &d_rows), ("mem_", &attended.mem_rows, &d_mem_rows)];
    for (prefix, rows, d) in groups {
        let (Some(rows), Some((d_o, d_lse))) = (rows, d) else { continue };
        let o = match &infini {
            Some(infini) if prefix.is_empty() => &infini.gated(&rows.o),
            _ => &rows.o,
        };
        for (name, wide, per_row) in [("expected_", o, &rows.lse), ("d_", d_o, d_lse)] {
            // Block rows are `[N, L, ..]`, memory rows `[N, nb, F, ..]`.
            let [n, nb, l, h, d] = wide.shape;
            let (wide_shape, per_row_shape) =
                if prefix.is_empty() { (vec![n, l, h, d], vec![n, l, h]) } else { (vec![n, nb, l, h, d], vec![n, nb, l, h]) };
            file.push((format!("{name}{prefix}o"), Stored::wide(&wide_shape, &wide.data)));
            file.push((format!("{name}{prefix}lse"), Stored::wide(&per_row_shape, &per_row.data)));
        }
    }
    let mut d_local = d_rows.as_ref().map(|(d_o, _)| d_o.clone());
    let mut passed = None;
    if let (Some(infini), Some(rows), Some((d_o, _))) = (&infini, &attended.rows, &d_rows) {
        let (d_m, d_z) = (random.array(infini.m().shape, 1.0), random.array(infini.z().shape, 1.0));
        store(&mut file, "expected_m", infini.m());
        store(&mut file, "expected_z", infini.z());
        store(&mut file, "d_m", &d_m);
        store(&mut file, "d_z", &d_z);
        let gradients = infini.backward(&rows.o, d_o, d_m, d_z)?;
        d_local = Some(gradients.d_o_local.clone());
        passed = Some(gradients);
    }

    // 3. Back through the local attention.
    let upstream = AttendUpstream {
        d_o: d_local.as_ref(),
        d_lse: d_rows.as_ref().map(|(_, d_lse)| d_lse),
        d_mem_o: d_mem_rows.as_ref().map(|(d_o, _)| d_o),
        d_mem_lse: d_mem_rows.as_ref().map(|(_, d_lse)| d_lse),
    };
    let mut gradients = attend_backward(&args, &attended, &upstream)?;
    if let (Some(passed), Some(infini), Some(d_q)) = (&passed, &case.infini, &mut gradients.d_q) {
        passed.store(&mut file, infini, d_q, &mut gradients.d_k);
        add(&mut gradients.d_v, &passed.d_v);
    }
    gradients.d_q.iter().for_each(|d| store(&mut file, "expected_d_q", d));
    store(&mut file, "expected_d_k", &gradients.d_k);
    store(&mut file, "expected_d_v", &gradients.d_v);
    let given = [case.mem_q.as_ref(), case.mem.as_ref().map(|(k, _)| k), case.mem.as_ref().map(|(_, v)| v)];
    let of_memory = [gradients.d_mem_q, gradients.d_mem_k, gradients.d_mem_v];
    for ((name, given), d) in ["mem_q", "mem_k", "mem_v"].into_iter().zip(given).zip(of_memory) {
        if let (Some(given), Some(d)) = (given, d) {
            store(&mut file, &format!("expected_d_{name}"), &shared(&d, given));
        }
    }
    gradients.d_sink.iter().for_each(|d| file.push(("expected_d_sink".into(), Stored::wide(&[d.len()], d))));
    serialize(Some(case.metadata()?), file)
}

/// Every seventh element of what σ is taken of is 0, where its two branches meet: random numbers hardly ever are.
fn on_the_seam(case: &CaseFile) -> CaseFile {
    let mut case = case.clone();
    for x in case.infini.iter_mut().flat_map(|infini| [&mut infini.q, &mut infini.k]).flatten() {
        let values = x.values().into_iter().enumerate().map(|(i, x)| if i % 7 == 0 { 0.0 } else { x });
        *x = Tensor::from_values(x.dtype, x.shape.clone(), values);
    }
    case
}

/// The gradient of a memory that streams or blocks share: the sum of theirs.
fn shared(d: &Array<5>, given: &Tensor) -> Array<5> {
    let mut sum = Array::zeros(std::array::from_fn(|axis| given.shape[axis]));
    for (n, i) in (0..d.shape[0]).flat_map(|n| (0..d.shape[1]).map(move |i| (n, i))) {
        let at = [n.min(sum.shape[0] - 1), i.min(sum.shape[1] - 1)];
        sum.row_mut(&at).iter_mut().zip(d.row(&[n, i])).for_each(|(sum, d)| *sum += d);
    }
    sum
}

fn add<const R: usize>(to: &mut Array<R>, x: &Array<R>) {
    to.data.iter_mut().zip(&x.data).for_each(|(to, x)| *to += x);
}

/// Rows to be merged, `o_a`, `o_b` `[rows, D]` with `lse_a`, `lse_b` `[rows]`, some parts empty; outputs `o`, `lse`.
///
/// # Errors
/// None.
pub fn merge_oracle(seed: u64) -> Result<Vec<u8>> {
    let (rows, d) = (24, 5);
    let (mut random, mut rng) = (Random::new(seed), Rng::of(seed, "merge oracle"));
    let [o_a, o_b, d_o] = [(); 3].map(|()| random.array([rows, d], 1.0));
    let [mut lse_a, mut lse_b, mut d_lse] = [(); 3].map(|()| random.array([rows], 3.0));
    let (mut o, mut lse) = (d_o.clone(), d_lse.clone());
    let mut d_parts = [(o_a.clone(), lse_a.clone()), (o_b.clone(), lse_b.clone())];
    for r in 0..rows {
        for part in [&mut lse_a, &mut lse_b] {
            if rng.chance(1, 5) {
                part.data[r] = f64::NEG_INFINITY;
            }
        }
        let (row, merged) = merge(o_a.row(&[r]), lse_a.data[r], o_b.row(&[r]), lse_b.data[r])?;
        if merged == f64::NEG_INFINITY {
            d_lse.data[r] = 0.0;
        }
        o.row_mut(&[r]).copy_from_slice(&row);
        lse.data[r] = merged;
        let parts = merge_backward(o_a.row(&[r]), lse_a.data[r], o_b.row(&[r]), lse_b.data[r], d_o.row(&[r]), d_lse.data[r])?;
        for ((d_o, d_lse), part) in d_parts.iter_mut().zip(parts) {
            d_o.row_mut(&[r]).copy_from_slice(&part.d_o);
            d_lse.data[r] = part.d_lse;
        }
    }
    let mut file = Named::new();
    let [(d_o_a, d_lse_a), (d_o_b, d_lse_b)] = &d_parts;
    for (name, x) in
        [("o_a", &o_a), ("o_b", &o_b), ("d_o", &d_o), ("expected_o", &o), ("expected_d_o_a", d_o_a), ("expected_d_o_b", d_o_b)]
    {
        store(&mut file, name, x);
    }
    for (name, x) in [
        ("lse_a", &lse_a),
        ("lse_b", &lse_b),
        ("d_lse", &d_lse),
        ("expected_lse", &lse),
        ("expected_d_lse_a", d_lse_a),
        ("expected_d_lse_b", d_lse_b),
    ] {
        store(&mut file, name, x);
    }
    serialize(Some(metadata("merge", seed)), file)
}

/// Two layers of TransformerFAM over some blocks, the last one perhaps partial: `x` `[1, L, d_model]`, `prompt` and the weights
/// `layers.0.w_q`, …; outputs `y`, like `x`, and, where the stream ends with a block, `memory` `[layers, 1, F, d_model]`, which each layer
/// feeds back after the last block.
///
/// # Errors
/// None.
pub fn layer_oracle(seed: u64) -> Result<Vec<u8>> {
    let mut rng = Rng::of(seed, "layer oracle");
    let (heads, kv_heads) = rng.pick(&[(1, 1), (2, 1), (4, 2)]);
    let (block_len, mem_len, window) = (rng.pick(&[1, 3, 4]), rng.pick(&[0, 1, 3, 5]), rng.pick(&[0, 1, 2]));
    // From 5 on, an odd D tells the exponent −2i/D of rotary positions from −i/⌊D/2⌋.
    let head_dim = rng.pick(&[1, 3, 4, 5, 7, 16]);
    // The default, 1/√D, is given where f32 would round it: whether a scale is rounded makes no difference.
    let scale = (!matches!(head_dim, 1 | 4 | 16) || rng.chance(1, 2)).then(|| rng.pick(&[1.0, 0.5, 0.25]));
    let shape = Shape::builder().heads(heads).kv_heads(kv_heads).head_dim(head_dim).block_len(block_len);
    let mut shape = shape.window(Window::Blocks(window)).mem_len(mem_len);
    if let Some(scale) = scale {
        shape = shape.scale(scale);
    }
    let shape = shape.build()?;
    let config = Config { shape, d_model: 6, d_ff: 7, layers: 2, feedback_norm: rng.chance(1, 2) };
    let (mut stack, mut random) = (Stack::random(&config, seed), Random::new(!seed));
    // A gain of 1 would not show whether it is applied.
    for layer in &mut stack.layers {
        for gain in [&mut layer.attend_norm, &mut layer.ff_norm].into_iter().chain(&mut layer.feedback_norm) {
            *gain = random.array(gain.shape, 0.3);
            gain.data.iter_mut().for_each(|gain| *gain += 1.0);
        }
    }
    let tokens = 3 * block_len + rng.below(block_len);
    let offset = rng.pick(&[0, 0, 17]);
    let (x, d_y) = (random.array([tokens, config.d_model], 1.0), random.array([tokens, config.d_model], 1.0));
    let (y, gradients) = (stack.sequence(&x, offset)?, stack.sequence_backward(&x, offset, &d_y)?);

    let mut file = Named::new();
    let sizes = [1, tokens, config.d_model];
    for (name, x) in [("x", &x), ("d_y", &d_y), ("expected_y", &y), ("expected_d_x", &gradients.x)] {
        file.push((name.into(), Stored::wide(&sizes, &x.data)));
    }
    let mut state = stack.start(offset);
    for block in x.data.chunks(block_len * config.d_model) {
        stack.block(&Array { shape: [block.len() / config.d_model, config.d_model], data: block.to_vec() }, &mut state)?;
    }
    let memory: Vec<f64> = state.layers.iter().flat_map(|layer| layer.memory.data.clone()).collect();
    file.push(("expected_memory".into(), Stored::wide(&[config.layers, 1, mem_len, config.d_model], &memory)));
    for (prefix, stack) in [("", &stack), ("expected_d_", &gradients.weights)] {
        store(&mut file, &format!("{prefix}prompt"), &stack.prompt);
        for (l, layer) in stack.layers.iter().enumerate() {
            weights(&mut file, &format!("{prefix}layers.{l}"), layer);
        }
    }
    let mut words = metadata("layer", seed);
    for (name, value) in [
        ("block_len", block_len),
        ("window_blocks", window),
        ("heads", heads),
        ("kv_heads", kv_heads),
        ("offset", offset as usize),
    ] {
        words.insert(name.into(), value.to_string());
    }
    scale.map(|scale| words.insert("scale".into(), scale.to_string()));
    serialize(Some(words), file)
}

fn weights(file: &mut Named, layer: &str, weights: &Layer) {
    let Layer { w_q, w_k, w_v, w_o, w_gate, w_up, w_down, attend_norm, ff_norm, feedback_norm, .. } = weights;
    for (name, w) in
        [("w_q", w_q), ("w_k", w_k), ("w_v", w_v), ("w_o", w_o), ("w_gate", w_gate), ("w_up", w_up), ("w_down", w_down)]
    {
        store(file, &format!("{layer}.{name}"), w);
    }
    let gains = [("attend_norm", Some(attend_norm)), ("ff_norm", Some(ff_norm)), ("feedback_norm", feedback_norm.as_ref())];
    for (name, gain) in gains {
        gain.iter().for_each(|gain| store(file, &format!("{layer}.{name}"), gain));
    }
}

fn metadata(op: &str, seed: u64) -> HashMap<String, String> {
    [("format", "1".into()), ("op", op.into()), ("source", format!("generated, seed {seed:#018x}"))]
        .map(|(k, v): (&str, String)| (k.into(), v))
        .into()
}
