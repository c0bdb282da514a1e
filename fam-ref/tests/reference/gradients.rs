//! Every gradient against central finite differences of its forward pass.

use crate::common::{Inputs, memory_of};
use fam_core::{InfiniRule, Shape, Span, Window};
use fam_ref::layer::{Config, Layer, Random, Stack};
use fam_ref::{
    Array, Attend, AttendUpstream, Attended, attend, attend_backward, gate, gate_backward, infini_retrieve,
    infini_retrieve_backward, infini_write, infini_write_backward, merge, merge_backward,
};

const STEP: f64 = 1e-4;

/// Checks `gradient` at every element of `x` (at most some hundreds, spread out) against the loss `f` at two points on either side of it:
/// differences of fourth order, which are off by STEP⁴/30 of the fifth derivative and by rounding/STEP, some 1e-10 of the loss each.
fn check(what: &str, x: &[f64], gradient: &[f64], f: impl Fn(&[f64]) -> f64) {
    assert_eq!(x.len(), gradient.len(), "{what}");
    let mut at = x.to_vec();
    for i in (0..x.len()).step_by(x.len().div_ceil(300).max(1)) {
        let side = |at: &mut Vec<f64>, value: f64| {
            at[i] = value;
            f(at)
        };
        let [near, far] = [1.0, 2.0].map(|n| side(&mut at, x[i] + n * STEP) - side(&mut at, x[i] - n * STEP));
        at[i] = x[i];
        let slope = (8.0 * near - far) / (12.0 * STEP);
        assert!(
            (slope - gradient[i]).abs() <= 1e-7 * (1.0 + slope.abs()),
            "{what}[{i}]: {} and by differences {slope}",
            gradient[i]
        );
    }
}

/// The loss: a fixed random combination of all outputs that are finite.
fn loss<'a>(outputs: impl IntoIterator<Item = (&'a [f64], &'a [f64])>) -> f64 {
    outputs.into_iter().flat_map(|(x, d)| x.iter().zip(d)).filter(|(x, _)| x.is_finite()).map(|(x, d)| x * d).sum()
}

/// Gradients of [`attend`] for `inputs` and `sink`, with spans of any kind.
fn check_attend(what: &str, inputs: &Inputs, spans: &[Span], sink: Option<&[f64]>, with_rows: [bool; 2]) {
    fn args<'a>(inputs: &'a Inputs, spans: &'a [Span], sink: Option<&'a [f64]>, with_rows: [bool; 2]) -> Attend<'a> {
        let args = Attend { sink, ..inputs.args(spans) };
        Attend { q: args.q.filter(|_| with_rows[0]), mem_q: args.mem_q.filter(|_| with_rows[1]), ..args }
    }
    let mut random = Random::new(7);
    let out = attend(&args(inputs, spans, sink, with_rows)).unwrap();
    let d_o = out.rows.as_ref().map(|rows| (random.array(rows.o.shape, 1.0), random.array(rows.lse.shape, 1.0)));
    let d_mem_o = out.mem_rows.as_ref().map(|rows| (random.array(rows.o.shape, 1.0), random.array(rows.lse.shape, 1.0)));
    let upstream = AttendUpstream {
        d_o: d_o.as_ref().map(|d| &d.0),
        d_lse: d_o.as_ref().map(|d| &d.1),
        d_mem_o: d_mem_o.as_ref().map(|d| &d.0),
        d_mem_lse: d_mem_o.as_ref().map(|d| &d.1),
    };
    let gradients = attend_backward(&args(inputs, spans, sink, with_rows), &out, &upstream).unwrap();
    let of = |inputs: &Inputs, sink: Option<&[f64]>| {
        let out = attend(&args(inputs, spans, sink, with_rows)).unwrap();
        [(&out.rows, &d_o), (&out.mem_rows, &d_mem_o)]
            .into_iter()
            .filter_map(|(rows, d)| rows.as_ref().zip(d.as_ref()))
            .map(|(rows, (d_o, d_lse))| loss([(&*rows.o.data, &*d_o.data), (&*rows.lse.data, &*d_lse.data)]))
            .sum()
    };
    type Field = fn(&mut Inputs) -> &mut Vec<f64>;
    let fields: [(&str, Field, Option<&[f64]>); 6] = [
        ("q", |x| &mut x.q.data, gradients.d_q.as_ref().map(|d| &*d.data)),
        ("mem_q", |x| &mut x.mem_q.data, gradients.d_mem_q.as_ref().map(|d| &*d.data)),
        ("k", |x| &mut x.k.data, Some(&gradients.d_k.data)),
        ("v", |x| &mut x.v.data, Some(&gradients.d_v.data)),
        ("mem_k", |x| &mut x.mem_k.data, gradients.d_mem_k.as_ref().map(|d| &*d.data)),
        ("mem_v", |x| &mut x.mem_v.data, gradients.d_mem_v.as_ref().map(|d| &*d.data)),
    ];
    for (name, field, gradient) in fields {
        let Some(gradient) = gradient else { continue };
        let x = field(&mut inputs.clone()).clone();
        check(&format!("{what}, {name}"), &x, gradient, |x| {
            let mut inputs = inputs.clone();
            field(&mut inputs).copy_from_slice(x);
            of(&inputs, sink)
        });
    }
    if let (Some(sink), Some(d_sink)) = (sink, &gradients.d_sink) {
        check(&format!("{what}, sink"), sink, d_sink, |sink| of(inputs, Some(sink)));
    }
}

#[test]
fn attend_over_windows_memories_groups_and_partial_blocks() {
    let sink = [-1.0, 0.0, 2.0, 0.5];
    for (window, mem_len) in
        [(Window::Blocks(0), 0), (Window::Blocks(0), 2), (Window::Blocks(1), 2), (Window::Blocks(9), 1), (Window::Tokens(4), 2)]
    {
        // Four heads over two; three blocks of three, the last one partial.
        let inputs = Inputs::new(crate::common::shape(3, window, mem_len), 2, 8, 1);
        let mut spans = inputs.spans();
        spans[1].len = 5;
        spans[1].mem_rows = spans[1].mem_rows.min(1);
        for sink in [None, Some(&sink[..])] {
            for with_rows in [[true, true], [true, false], [false, true]] {
                check_attend(&format!("{window:?} F={mem_len} {sink:?} {with_rows:?}"), &inputs, &spans, sink, with_rows);
            }
        }
    }
}

#[test]
fn attend_with_hidden_keys_and_empty_rows() {
    let sink = [-1.0, 0.0, 2.0, 0.5];
    let mut inputs = Inputs::new(crate::common::shape(3, Window::Blocks(1), 2), 1, 6, 2);
    // Channel 0 of all queries is positive, so that these keys' logits are −inf: the rows of block 0 see nothing else.
    let d = inputs.q.shape[3];
    for q in inputs.q.data.iter_mut().step_by(d).chain(inputs.mem_q.data.iter_mut().step_by(d)) {
        *q = q.abs() + 0.5;
    }
    inputs.mem_k.data.iter_mut().step_by(d).for_each(|k| *k = f64::NEG_INFINITY);
    for (t, h) in (0..4).flat_map(|t| [(t, 0), (t, 1)]) {
        inputs.k.row_mut(&[0, t, h])[0] = f64::NEG_INFINITY;
    }
    let spans = inputs.spans();
    let empty = attend(&inputs.args(&spans)).unwrap().rows.unwrap();
    assert_eq!(empty.lse[[0, 0, 0, 0]], f64::NEG_INFINITY);
    assert!(empty.lse[[0, 0, 5, 0]].is_finite());
    for sink in [None, Some(&sink[..])] {
        check_attend(&format!("hidden keys, {sink:?}"), &inputs, &spans, sink, [true, true]);
    }
}

#[test]
fn attend_with_no_more_memory_rows_than_spans_name() {
    let mut inputs = Inputs::new(crate::common::shape(3, Window::Blocks(1), 3), 2, 7, 4);
    (inputs.mem_k, inputs.mem_v) = (memory_of(&inputs.mem_k, 2), memory_of(&inputs.mem_v, 2));
    let mut spans = inputs.spans();
    (spans[0].mem_rows, spans[1].mem_rows) = (1, 2);
    check_attend("two of three memory rows", &inputs, &spans, None, [true, true]);
}

#[test]
fn merge_of_full_and_empty_parts() {
    let mut random = Random::new(3);
    let draw = |random: &mut Random| random.array([5], 1.0).data;
    let (o_a, o_b, d_o) = (draw(&mut random), draw(&mut random), draw(&mut random));
    for (lse_a, lse_b) in
        [(0.3, -0.4), (5.0, -5.0), (f64::NEG_INFINITY, 1.0), (1.0, f64::NEG_INFINITY), (f64::NEG_INFINITY, f64::NEG_INFINITY)]
    {
        let d_lse = 0.7;
        let [a, b] = merge_backward(&o_a, lse_a, &o_b, lse_b, &d_o, d_lse).unwrap();
        let of = |o_a: &[f64], lse_a, o_b: &[f64], lse_b| {
            let (o, lse) = merge(o_a, lse_a, o_b, lse_b).unwrap();
            loss([(&*o, &*d_o), (&[lse], &[d_lse])])
        };
        check("o_a", &o_a, &a.d_o, |x| of(x, lse_a, &o_b, lse_b));
        check("o_b", &o_b, &b.d_o, |x| of(&o_a, lse_a, x, lse_b));
        check("lse_a", &[lse_a], &[a.d_lse], |x| of(&o_a, x[0], &o_b, lse_b));
        check("lse_b", &[lse_b], &[b.d_lse], |x| of(&o_a, lse_a, &o_b, x[0]));
    }
    // What an empty part holds is not looked at.
    let nan = [f64::NAN; 5];
    let [a, b] = merge_backward(&nan, f64::NEG_INFINITY, &o_b, 1.0, &d_o, 0.0).unwrap();
    assert_eq!((a.d_o, a.d_lse, b.d_o), (vec![0.0; 5], 0.0, d_o));
}

/// Keys or queries with positive and negative channels, or none that is positive.
fn rows(random: &mut Random, count: usize, d: usize, negative: bool) -> Vec<Vec<f64>> {
    (0..count)
        .map(|_| random.array([d], 1.0).data.into_iter().map(|x| if negative { -x.abs() - 0.1 } else { x }).collect())
        .collect()
}

#[test]
fn infini_read_and_gate() {
    let (d, mut random) = (4, Random::new(4));
    for (negative, is_empty, beta) in [(false, false, 0.3), (true, false, -2.0), (false, true, 1.0), (true, true, 30.0)] {
        let q = rows(&mut random, 1, d, negative).remove(0);
        let m = random.array([d * d], 1.0).data;
        let z: Vec<f64> =
            if is_empty { vec![0.0; d] } else { random.array([d], 1.0).data.iter().map(|z| z.abs() + 0.5).collect() };
        let (o_local, d_o) = (random.array([d], 1.0).data, random.array([d], 1.0).data);
        let of = |q: &[f64], m: &[f64], z: &[f64], o_local: &[f64], beta: f64| {
            let a = infini_retrieve(q, m, z).unwrap().a;
            let o: Vec<f64> = a.iter().zip(o_local).map(|(a, o)| gate(beta) * a + gate(-beta) * o).collect();
            loss([(&*o, &*d_o)])
        };
        let gated = gate_backward(beta, &infini_retrieve(&q, &m, &z).unwrap().a, &o_local, &d_o).unwrap();
        let read = infini_retrieve_backward(&q, &m, &z, &gated.d_a).unwrap();
        check("o_local", &o_local, &gated.d_o_local, |x| of(&q, &m, &z, x, beta));
        check("beta", &[beta], &[gated.d_beta], |x| of(&q, &m, &z, &o_local, x[0]));
        check("q", &q, &read.d_q, |x| of(x, &m, &z, &o_local, beta));
        check("m", &m, &read.d_m, |x| of(&q, x, &z, &o_local, beta));
        if !is_empty {
            check("z", &z, &read.d_z, |x| of(&q, &m, x, &o_local, beta));
        }
    }
}

#[test]
fn infini_write_through_both_rules() {
    let (d, count, mut random) = (4, 3, Random::new(5));
    for rule in [InfiniRule::Linear, InfiniRule::Delta] {
        for (negative, is_empty) in [(false, false), (true, false), (false, true)] {
            let (k, v) = (rows(&mut random, count, d, negative), rows(&mut random, count, d, false));
            let m = random.array([d * d], if is_empty { 0.0 } else { 1.0 }).data;
            let z: Vec<f64> = random.array([d], 1.0).data.iter().map(|z| if is_empty { 0.0 } else { z.abs() + 0.5 }).collect();
            let (d_m, d_z) = (random.array([d * d], 1.0).data, random.array([d], 1.0).data);
            fn refs(rows: &[Vec<f64>]) -> Vec<&[f64]> {
                rows.iter().map(Vec::as_slice).collect()
            }
            let of = |k: &[Vec<f64>], v: &[Vec<f64>], m: &[f64], z: &[f64]| {
                let new = infini_write(rule, &refs(k), &refs(v), m, z).unwrap();
                loss([(&*new.m, &*d_m), (&*new.z, &*d_z)])
            };
            let gradients = infini_write_backward(rule, (&refs(&k), &refs(&v)), (&m, &z), (&d_m, &d_z)).unwrap();
            let with = |rows: &[Vec<f64>], t: usize, row: &[f64]| {
                let mut rows = rows.to_vec();
                rows[t] = row.to_vec();
                rows
            };
            for t in 0..count {
                check("k", &k[t], &gradients.d_k[t], |x| of(&with(&k, t, x), &v, &m, &z));
                check("v", &v[t], &gradients.d_v[t], |x| of(&k, &with(&v, t, x), &m, &z));
            }
            check("m", &m, &gradients.d_m, |x| of(&k, &v, x, &z));
            // Where z is all 0 delta reads the constant 0: there is no slope to measure.
            if rule == InfiniRule::Linear || !is_empty {
                check("z", &z, &gradients.d_z, |x| of(&k, &v, &m, x));
            }
        }
    }
}

type Weight = fn(&mut Layer) -> &mut Vec<f64>;

const WEIGHTS: [(&str, Weight); 10] = [
    ("attend_norm", |l| &mut l.attend_norm.data),
    ("w_q", |l| &mut l.w_q.data),
    ("w_k", |l| &mut l.w_k.data),
    ("w_v", |l| &mut l.w_v.data),
    ("w_o", |l| &mut l.w_o.data),
    ("ff_norm", |l| &mut l.ff_norm.data),
    ("w_gate", |l| &mut l.w_gate.data),
    ("w_up", |l| &mut l.w_up.data),
    ("w_down", |l| &mut l.w_down.data),
    ("feedback_norm", |l| &mut l.feedback_norm.as_mut().expect("where the layer has one").data),
];

/// Two layers, three whole blocks and a partial one: tokens, prompt, and every weight of both layers.
#[test]
fn two_layers_through_a_chain_of_blocks() {
    for (window, mem_len, feedback_norm) in
        [(Window::Blocks(1), 2, true), (Window::Blocks(0), 3, false), (Window::Blocks(1), 0, false), (Window::Tokens(4), 1, true)]
    {
        let shape =
            Shape::builder().heads(2).kv_heads(1).head_dim(3).block_len(3).window(window).mem_len(mem_len).build().unwrap();
        let config = Config { shape, d_model: 5, d_ff: 6, layers: 2, feedback_norm };
        let (stack, mut random) = (Stack::random(&config, 1), Random::new(2));
        let (x, d_output): (Array<2>, Array<2>) = (random.array([11, 5], 1.0), random.array([11, 5], 1.0));
        let of = |stack: &Stack, x: &Array<2>| loss([(&*stack.sequence(x, 7).unwrap().data, &*d_output.data)]);

        let gradients = stack.sequence_backward(&x, 7, &d_output).unwrap();
        check("x", &x.data, &gradients.x.data, |data| of(&stack, &Array { shape: x.shape, data: data.to_vec() }));
        check("prompt", &stack.prompt.data, &gradients.weights.prompt.data, |data| {
            let mut stack = stack.clone();
            stack.prompt.data.copy_from_slice(data);
            of(&stack, &x)
        });
        for (l, (name, weight)) in (0..2).flat_map(|l| WEIGHTS.map(|w| (l, w))) {
            if name == "feedback_norm" && !feedback_norm {
                continue;
            }
            let [at, gradient] = [&stack, &gradients.weights].map(|stack| weight(&mut stack.layers[l].clone()).clone());
            check(&format!("{name} of layer {l}, {window:?}"), &at, &gradient, |data| {
                let mut stack = stack.clone();
                weight(&mut stack.layers[l]).copy_from_slice(data);
                of(&stack, &x)
            });
        }
    }
}

#[test]
fn upstream_gradients_that_do_not_fit_are_refused() {
    let inputs = Inputs::new(crate::common::shape(3, Window::Blocks(1), 2), 1, 6, 2);
    let spans = inputs.spans();
    let args = inputs.args(&spans);
    let saved = attend(&args).unwrap();
    let wrong = Array::zeros([1, 1, 5, 4, 6]);
    for upstream in [
        AttendUpstream { d_o: Some(&wrong), ..AttendUpstream::default() },
        AttendUpstream { d_mem_o: Some(&wrong), ..AttendUpstream::default() },
        AttendUpstream { d_lse: Some(&Array::zeros([1, 1, 6, 3])), ..AttendUpstream::default() },
    ] {
        assert!(attend_backward(&args, &saved, &upstream).is_err());
    }
    let no_rows = Attend { q: None, ..args };
    let d_o = Array::zeros([1, 1, 6, 4, 6]);
    assert!(attend_backward(&args, &Attended { rows: None, ..saved.clone() }, &AttendUpstream::default()).is_err());
    assert!(attend_backward(&no_rows, &saved, &AttendUpstream { d_o: Some(&d_o), ..AttendUpstream::default() }).is_err());
    assert!(merge_backward(&[0.0], 0.0, &[0.0], 0.0, &[0.0; 2], 0.0).is_err());
    assert!(gate_backward(0.0, &[0.0], &[0.0], &[0.0; 2]).is_err());
    assert!(infini_retrieve_backward(&[0.0], &[0.0], &[0.0], &[]).is_err());
}
