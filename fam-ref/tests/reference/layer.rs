//! Properties of Algorithm 2 as a whole.

use crate::common::difference;
use fam_core::{Error, Shape, Window};
use fam_ref::Array;
use fam_ref::layer::{Config, Layer, LayerState, Random, Stack, State};

const B: usize = 8;

fn config(window: Window, mem_len: usize, feedback_norm: bool) -> Config {
    let shape = Shape::builder().heads(4).kv_heads(2).head_dim(6).block_len(B).window(window).mem_len(mem_len);
    Config { shape: shape.build().unwrap(), d_model: 20, d_ff: 28, layers: 3, feedback_norm }
}

const CONFIGS: [(Window, usize, bool); 6] = [
    (Window::Blocks(0), 3, false),
    (Window::Blocks(2), 3, false),
    (Window::Blocks(1), 3, true),
    (Window::Blocks(1), 0, true),
    (Window::Blocks(1), 11, false),
    (Window::Tokens(11), 3, true),
];

fn tokens(config: &Config, count: usize) -> Array<2> {
    Random::new(99).array([count, config.d_model], 1.0)
}

/// Rows `first .. first + count` of `x`.
fn rows(x: &Array<2>, first: usize, count: usize) -> Array<2> {
    let width = x.shape[1];
    Array::new([count, width], x.data[first * width..(first + count) * width].to_vec()).unwrap()
}

/// Block by block; the last may be partial.
fn stream(stack: &Stack, x: &Array<2>, position_offset: i64) -> Vec<f64> {
    let mut state = stack.start(position_offset);
    let starts = (0..x.shape[0]).step_by(B);
    starts.flat_map(|start| stack.block(&rows(x, start, B.min(x.shape[0] - start)), &mut state).unwrap().data).collect()
}

#[test]
fn streaming_equals_layer_by_layer() {
    for (window, mem_len, feedback_norm) in CONFIGS {
        let config = config(window, mem_len, feedback_norm);
        let stack = Stack::random(&config, 1);
        let x = tokens(&config, 5 * B + 3);
        let (streamed, whole) = (stream(&stack, &x, 0), stack.sequence(&x, 0).unwrap());
        assert!(difference(&streamed, &whole.data) < 1e-12);
    }
}

#[test]
fn a_constant_added_to_all_positions_changes_nothing() {
    for (window, mem_len, feedback_norm) in CONFIGS {
        let config = config(window, mem_len, feedback_norm);
        let stack = Stack::random(&config, 2);
        let x = tokens(&config, 5 * B);
        let expected = stream(&stack, &x, 0);
        for offset in [1, -17, 4096, 62_832] {
            // An angle of 62,832 radians is itself known to no better than 7e-12.
            assert!(difference(&stream(&stack, &x, offset), &expected) < 1e-9);
        }
    }
}

#[test]
fn the_prompt_travels_up_and_block_0_has_no_residual() {
    let config = config(Window::Blocks(1), 3, true);
    let stack = Stack::random(&config, 3);
    let x = tokens(&config, B);
    let mut state = stack.start(0);
    stack.block(&x, &mut state).unwrap();

    let (mut rows, mut memory) = (x, stack.prompt.clone());
    for (layer, state) in stack.layers.iter().zip(&state.layers) {
        let mut fresh = LayerState::new(&layer.shape, memory.clone(), 0);
        let (output, next) = layer.block(&rows, &mut fresh).unwrap();

        // F_0 by the formula, without `block`: both groups' keys, one softmax, no residual.
        let (tok, mem) = (layer.project(&rows, 0).unwrap(), layer.project_memory(&memory, 0).unwrap());
        let mut mem_o = Array::zeros(mem.q.shape);
        for f in 0..3 {
            for h in 0..4 {
                let keys = (0..3).map(|t| (mem.k.row(&[t, h / 2]), mem.v.row(&[t, h / 2])));
                let keys: Vec<_> = keys.chain((0..B).map(|t| (tok.k.row(&[t, h / 2]), tok.v.row(&[t, h / 2])))).collect();
                let dot = |k: &[f64]| mem.q.row(&[f, h]).iter().zip(k).map(|(q, k)| q * k).sum::<f64>();
                let weights: Vec<f64> = keys.iter().map(|(k, _)| (f64::from(layer.shape.scale()) * dot(k)).exp()).collect();
                for (w, (_, v)) in weights.iter().zip(&keys) {
                    let share = w / weights.iter().sum::<f64>();
                    mem_o.row_mut(&[f, h]).iter_mut().zip(*v).for_each(|(o, v)| *o += share * v);
                }
            }
        }
        assert!(difference(&layer.finish_memory(&mem_o, &memory, 0).unwrap().data, &next.data) < 1e-12);
        // No residual: what `finish` adds is a zero row. From block 1 on it is the memory.
        let zero = Array::zeros(memory.shape);
        assert_eq!(layer.finish_memory(&mem_o, &memory, 0).unwrap(), layer.finish(&mem_o, &zero).unwrap());
        assert_eq!(layer.finish_memory(&mem_o, &memory, 1).unwrap(), layer.finish(&mem_o, &memory).unwrap());
        assert!(difference(&layer.finish(&mem_o, &memory).unwrap().data, &next.data) > 0.1);

        // What stays in the layer is normalised; what travels up is not.
        assert_eq!(state.memory, layer.feed_back(&next).unwrap());
        assert!(difference(&state.memory.data, &next.data) > 0.1);
        (rows, memory) = (output, next);
    }
}

#[test]
fn memory_rows_sit_at_the_end_of_the_block_before() {
    let stack = Stack::random(&config(Window::Blocks(0), 3, false), 4);
    let layer = &stack.layers[0];
    // At block 0: −3, −2, −1. At block 2 of 8 tokens: 13, 14, 15.
    assert_eq!(layer.project_memory(&stack.prompt, 0).unwrap().q, layer.project(&stack.prompt, -3).unwrap().q);
    assert_eq!(layer.project_memory(&stack.prompt, 2 * B as i64).unwrap().k, layer.project(&stack.prompt, 13).unwrap().k);
    // Rotation turns q and k, keeps lengths, and leaves v.
    let (here, there) = (layer.project(&stack.prompt, 0).unwrap(), layer.project(&stack.prompt, 5).unwrap());
    let length = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>();
    assert!(difference(&here.q.data, &there.q.data) > 0.1);
    assert!((length(&here.q.data) - length(&there.q.data)).abs() < 1e-12);
    assert_eq!(here.v, there.v);
}

#[test]
fn only_the_memory_reaches_beyond_depth_times_window() {
    // M = 0: a token sees nothing of earlier blocks but through the memory.
    let far = |mem_len| {
        let config = config(Window::Blocks(0), mem_len, false);
        let stack = Stack::random(&config, 5);
        let x = tokens(&config, 6 * B);
        let mut other = x.clone();
        other.row_mut(&[0]).fill(3.0);
        let last = 5 * B * config.d_model..;
        difference(&stream(&stack, &x, 0)[last.clone()], &stream(&stack, &other, 0)[last])
    };
    assert_eq!(far(0), 0.0);
    assert!(far(3) > 1e-6, "the first token's trace in the sixth block");
}

#[test]
fn state_does_not_grow() {
    for (window, kept) in [(Window::Blocks(0), 0), (Window::Blocks(2), 2), (Window::Tokens(11), 2)] {
        let config = config(window, 3, true);
        let stack = Stack::random(&config, 6);
        let mut state = stack.start(0);
        let x = tokens(&config, B);
        let mut sizes = Vec::new();
        for _ in 0..6 {
            let y = stack.block(&x, &mut state).unwrap();
            assert!(y.data.iter().all(|y| y.is_finite()));
            sizes.push(state.layers[0].cached_rows());
        }
        assert!(sizes[kept..].iter().all(|&rows| rows <= (kept + 1) * B), "{sizes:?}");
    }
}

#[test]
fn what_does_not_fit_is_refused_and_moves_nothing() {
    let config = config(Window::Blocks(1), 3, true);
    let stack = Stack::random(&config, 6);
    let mut state = stack.start(0);
    let refused = |stack: &Stack, x: &Array<2>, state: &mut State, field| {
        let before = format!("{state:?}");
        match stack.block(x, state) {
            Err(Error::Invalid { field: named, .. }) => assert_eq!(named, field),
            other => panic!("{field}: {other:?}"),
        }
        assert_eq!(format!("{state:?}"), before);
    };
    let wide = Random::new(1).array([B, 21], 1.0);
    refused(&stack, &tokens(&config, B + 1), &mut state, "x");
    refused(&stack, &wide, &mut state, "rows of the residual stream");
    let mut short = tokens(&config, B);
    short.data.pop();
    refused(&stack, &short, &mut state, "rows of the residual stream");
    assert!(stack.sequence(&wide, 0).is_err());

    stack.block(&tokens(&config, B), &mut state).unwrap();
    let mut other = config;
    other.shape = Shape::builder().heads(4).kv_heads(4).head_dim(6).block_len(B).mem_len(3).build().unwrap();
    refused(&Stack::random(&other, 6), &tokens(&config, B), &mut state, "state");
    // The fault is in the last layer: the first has taken its step by then.
    for (field, spoil) in [
        ("w_q", (|layer| layer.w_q.shape = [20, 23]) as fn(&mut Layer)),
        ("w_v", |layer| layer.w_v = Array::zeros([19, 12])),
        ("w_o", |layer| layer.w_o = Array::zeros([24, 21])),
        ("attend_norm", |layer| layer.attend_norm.data.clear()),
        ("ff_norm", |layer| layer.ff_norm.data.clear()),
        ("w_down", |layer| layer.w_down = Array::zeros([27, 20])),
        ("feedback_norm", |layer| layer.feedback_norm.as_mut().unwrap().data.clear()),
    ] {
        let mut spoilt = stack.clone();
        spoil(&mut spoilt.layers[2]);
        refused(&spoilt, &tokens(&config, B), &mut state, field);
    }

    // Only the last block may be partial.
    stack.block(&tokens(&config, B - 1), &mut state).unwrap();
    refused(&stack, &tokens(&config, 1), &mut state, "position");
}

#[test]
fn weights_come_from_the_seed_alone() {
    let config = config(Window::Blocks(0), 3, true);
    let (a, b, c) = (Stack::random(&config, 7), Stack::random(&config, 7), Stack::random(&config, 8));
    assert_eq!((&a.prompt, &a.layers[2].w_down), (&b.prompt, &b.layers[2].w_down));
    assert_ne!(a.prompt, c.prompt);
    let numbers = Random::new(0).array([10_000], 2.0).data;
    let mean = numbers.iter().sum::<f64>() / 1e4;
    let std = (numbers.iter().map(|x| x * x).sum::<f64>() / 1e4 - mean * mean).sqrt();
    assert!(mean.abs() < 0.06 && (std - 2.0).abs() < 0.03, "mean {mean}, std {std}");
    // SplitMix64's published first output for the seed 0 is 0xe220a8397b1dcdaf.
    let first = (0xe220_a839_7b1d_cdaf_u64 >> 11) as f64 / (1u64 << 52) as f64 - 1.0;
    assert_eq!(numbers[0], first * 3f64.sqrt() * 2.0);
}
