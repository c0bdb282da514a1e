//! Properties of `attend` and `merge`, each against a formulation that shares no code with them.

use crate::common::{Inputs, block_of, difference, memory_of, shape, tokens_of};
use fam_core::{Shape, Span, Window};
use fam_ref::{Array, Attend, Attended, Rows, attend, gate, merge};

/// One row by the textbook: exp of every logit where the mask allows it, no maximum taken off.
fn dense_row(q: &[f64], keys: &[(&[f64], &[f64], bool)], scale: f64) -> (Vec<f64>, f64) {
    let weights: Vec<f64> = keys
        .iter()
        .map(|(k, _, visible)| if *visible { (scale * q.iter().zip(*k).map(|(q, k)| q * k).sum::<f64>()).exp() } else { 0.0 })
        .collect();
    let sum: f64 = weights.iter().sum();
    let o = (0..q.len()).map(|c| keys.iter().zip(&weights).map(|((_, v, _), w)| w * v[c]).sum::<f64>() / sum).collect();
    (o, sum.ln())
}

/// Every row of stream `n` over every key of the stream and every block's memory, under a mask.
fn check_dense(inputs: &Inputs, n: usize, start: usize, origin: usize, rows: &Rows, mem_rows: &Rows) {
    let Inputs { shape, q, mem_q, k, v, mem_k, mem_v } = inputs;
    let (b, group, scale) = (shape.block_len(), shape.group(), f64::from(shape.scale()));
    let [_, tokens, heads, _] = q.shape;
    let [_, blocks, mem_len, ..] = mem_q.shape;
    let window = |i: usize, j: usize| match shape.window() {
        Window::Blocks(m) => (j / b) as i64 >= (i / b) as i64 - m as i64,
        Window::Tokens(w) => j as i64 > i as i64 - w as i64,
        _ => unreachable!("no other window is tested"),
    };
    let keys = |h: usize, token: &dyn Fn(usize) -> bool, block: usize| {
        let mut keys = Vec::new();
        for t in 0..blocks {
            keys.extend((0..mem_len).map(|f| (mem_k.row(&[n, t, f, h]), mem_v.row(&[n, t, f, h]), t == block)));
        }
        keys.extend((0..tokens).map(|j| (k.row(&[n, j, h]), v.row(&[n, j, h]), j >= origin && token(j))));
        keys
    };
    for h in 0..heads {
        for i in start..tokens {
            let (o, lse) = dense_row(q.row(&[n, i, h]), &keys(h / group, &|j| j <= i && window(i, j), i / b), scale);
            assert!(difference(rows.o.row(&[n, 0, i - start, h]), &o) < 1e-13);
            assert!((rows.lse[[n, 0, i - start, h]] - lse).abs() < 1e-13);
        }
        for t in start / b..blocks {
            for f in 0..mem_len {
                let (o, lse) = dense_row(mem_q.row(&[n, t, f, h]), &keys(h / group, &|j| j / b == t, t), scale);
                assert!(difference(mem_rows.o.row(&[n, t - start / b, f, h]), &o) < 1e-13);
                assert!((mem_rows.lse[[n, t - start / b, f, h]] - lse).abs() < 1e-13);
            }
        }
    }
}

const WINDOWS: [Window; 7] = [
    Window::Blocks(0),
    Window::Blocks(1),
    Window::Blocks(2),
    Window::Blocks(9),
    Window::Tokens(1),
    Window::Tokens(7),
    Window::Tokens(100),
];

#[test]
fn equals_the_dense_mask() {
    for window in WINDOWS {
        for mem_len in [0, 1, 3] {
            let inputs = Inputs::new(shape(5, window, mem_len), 2, 23, 1);
            let attended = attend(&inputs.args(&inputs.spans())).unwrap();
            for n in 0..2 {
                check_dense(&inputs, n, 0, 0, attended.rows.as_ref().unwrap(), attended.mem_rows.as_ref().unwrap());
            }
        }
    }
}

#[test]
fn a_later_start_and_origin_cut_rows_and_keys() {
    // The call begins inside block 1; keys before the origin, in block 0 or inside block 1, do not exist.
    let (start, len) = (7, 16);
    for (window, origin) in WINDOWS.into_iter().flat_map(|w| [(w, 3), (w, 6), (w, 7)]) {
        let inputs = Inputs::new(shape(5, window, 2), 1, start + len, 2);
        let from_block_1 = |x: &Array<5>| Array::new([1, 4, 2, x.shape[3], 6], x.data[x.data.len() / 5..].to_vec()).unwrap();
        let attended = attend(&Attend {
            q: Some(&tokens_of(&inputs.q, start, len)),
            mem_q: Some(&from_block_1(&inputs.mem_q)),
            mem_k: Some(&from_block_1(&inputs.mem_k)),
            mem_v: Some(&from_block_1(&inputs.mem_v)),
            k: &tokens_of(&inputs.k, origin, start + len - origin),
            v: &tokens_of(&inputs.v, origin, start + len - origin),
            ..inputs.args(&[inputs.span(0, start, len).with_origin(origin as u64)])
        })
        .unwrap();
        check_dense(&inputs, 0, start, origin, &attended.rows.unwrap(), &attended.mem_rows.unwrap());
    }
}

#[test]
fn block_by_block_is_the_whole() {
    for window in WINDOWS {
        let inputs = Inputs::new(shape(5, window, 3), 1, 23, 3);
        let whole = attend(&inputs.args(&inputs.spans())).unwrap();
        let (rows, mem_rows) = (whole.rows.unwrap(), whole.mem_rows.unwrap());
        for block in 0..5 {
            let part = inputs.attend_block(block);
            let (part_rows, part_mem_rows) = (part.rows.unwrap(), part.mem_rows.unwrap());
            let len = part_rows.o.shape[2];
            assert_eq!(part_rows.o.data, rows.o.data[block * 5 * 24..][..len * 24]);
            assert_eq!(part_rows.lse.data, rows.lse.data[block * 5 * 4..][..len * 4]);
            assert_eq!(part_mem_rows.o.data, mem_rows.o.row(&[0, block]));
            assert_eq!(part_mem_rows.lse.data, mem_rows.lse.row(&[0, block]));
        }
    }
}

#[test]
fn without_memory_rows_it_is_block_sliding_window_attention() {
    let with = Inputs::new(shape(5, Window::Blocks(1), 3), 1, 23, 4);
    let without = Inputs { shape: shape(5, Window::Blocks(1), 0), ..Inputs::new(with.shape, 1, 23, 4) };
    let no_rows = [Span::new(0, 0, 23)];
    // F = 0, memory rows absent from the span, and no memory at all are the same.
    let expected = attend(&Attend { mem_q: None, mem_k: None, mem_v: None, ..without.args(&no_rows) }).unwrap();
    assert_eq!(attend(&Attend { mem_q: None, ..with.args(&no_rows) }).unwrap(), expected);
    assert_eq!(expected.mem_rows, None);
}

#[test]
fn the_sink_takes_its_share() {
    let inputs = Inputs::new(shape(5, Window::Blocks(1), 3), 1, 23, 5);
    let spans = inputs.spans();
    let sink = [-1.0, 0.0, 3.0, f64::NEG_INFINITY];
    let plain = attend(&inputs.args(&spans)).unwrap();
    let sunk = attend(&Attend { sink: Some(&sink), ..inputs.args(&spans) }).unwrap();
    for (plain, sunk) in [(plain.rows, sunk.rows), (plain.mem_rows, sunk.mem_rows)] {
        let (plain, sunk) = (plain.unwrap(), sunk.unwrap());
        for (row, (&lse, &with)) in plain.lse.data.iter().zip(&sunk.lse.data).enumerate() {
            let sink = sink[row % 4];
            let share = gate(lse - sink);
            let expected: Vec<f64> = plain.o.data[row * 6..][..6].iter().map(|o| o * share).collect();
            assert!(difference(&sunk.o.data[row * 6..][..6], &expected) < 1e-14);
            assert!((with - (lse.exp() + sink.exp()).ln()).abs() < 1e-13);
        }
        assert_eq!(plain.n, sunk.n, "the sink is no key");
    }
}

type Key<'a> = (&'a [f64], &'a [f64]);

/// Attention of one query over any keys: rows at position `n − 1` of one long block see them all.
fn over(q: &[f64], keys: &[Key], sink: Option<&[f64]>) -> (Vec<f64>, f64) {
    if keys.is_empty() {
        return (vec![0.0; q.len()], sink.map_or(f64::NEG_INFINITY, |s| s[0]));
    }
    let (n, d) = (keys.len(), q.len());
    let shape = Shape::builder().head_dim(d).block_len(n).build().unwrap();
    let k = keys.iter().flat_map(|(k, _)| *k).copied().collect();
    let v = keys.iter().flat_map(|(_, v)| *v).copied().collect();
    let rows = attend(&Attend {
        shape: &shape,
        spans: &[Span::new(0, n as u64 - 1, 1)],
        q: Some(&Array::new([1, 1, 1, d], q.to_vec()).unwrap()),
        mem_q: None,
        k: &Array::new([1, n, 1, d], k).unwrap(),
        v: &Array::new([1, n, 1, d], v).unwrap(),
        mem_k: None,
        mem_v: None,
        sink,
    })
    .unwrap();
    let rows = rows.rows.unwrap();
    (rows.o.data.clone(), rows.lse.data[0])
}

#[test]
fn any_split_of_the_keys_merges() {
    let inputs = Inputs::new(shape(12, Window::Blocks(0), 0), 1, 12, 6);
    let q = inputs.q.row(&[0, 3, 0]);
    let keys: Vec<_> = (0..12).map(|j| (inputs.k.row(&[0, j, 0]), inputs.v.row(&[0, j, 0]))).collect();
    for sink in [None, Some([0.5].as_slice())] {
        let (o, lse) = over(q, &keys, sink);
        // Each bit of `split` gives one key to the first or the second part.
        for split in [0, 1, 0b1010_1010_1010, 0b1111_0000_1111, 0b0111_1111_1111, 0b1111_1111_1111] {
            let part = |bit| keys.iter().enumerate().filter(|(j, _)| split >> j & 1 == bit).map(|(_, &k)| k).collect::<Vec<_>>();
            let ((o_a, lse_a), (o_b, lse_b)) = (over(q, &part(0), sink), over(q, &part(1), None));
            let (merged, merged_lse) = merge(&o_a, lse_a, &o_b, lse_b).unwrap();
            assert!(difference(&merged, &o) < 1e-14);
            assert!((merged_lse - lse).abs() < 1e-14);
        }
    }
}

#[test]
fn merging_with_an_empty_part_changes_no_bit() {
    let (none, o) = ([f64::NAN; 2], [0.1, -0.7]);
    assert_eq!(merge(&o, 3.7, &none, f64::NEG_INFINITY).unwrap(), (o.to_vec(), 3.7));
    assert_eq!(merge(&none, f64::NEG_INFINITY, &o, 3.7).unwrap(), (o.to_vec(), 3.7));
    assert_eq!(merge(&none, f64::NEG_INFINITY, &none, f64::NEG_INFINITY).unwrap(), (vec![0.0, 0.0], f64::NEG_INFINITY));
    // Far apart, and far beyond what exp can hold.
    assert_eq!(merge(&o, 1e6, &none.map(|_| 5.0), -1e6).unwrap(), (o.to_vec(), 1e6));
}

#[test]
fn memory_rows_ignore_window_and_later_keys() {
    let inputs = Inputs::new(shape(5, Window::Blocks(0), 3), 1, 23, 7);
    let spans = inputs.spans();
    let expected = attend(&inputs.args(&spans)).unwrap().mem_rows;
    for window in WINDOWS {
        let other = Inputs { shape: shape(5, window, 3), ..Inputs::new(inputs.shape, 1, 23, 7) };
        assert_eq!(attend(&other.args(&spans)).unwrap().mem_rows, expected);
        assert_eq!(attend(&Attend { q: None, ..other.args(&spans) }).unwrap().mem_rows, expected);
    }
    // The last call of a block sees the keys of earlier calls too.
    let last = attend(&Attend {
        q: None,
        mem_q: Some(&block_of(&inputs.mem_q, 2)),
        mem_k: Some(&block_of(&inputs.mem_k, 2)),
        mem_v: Some(&block_of(&inputs.mem_v, 2)),
        ..inputs.args(&[inputs.span(0, 13, 2)])
    })
    .unwrap();
    assert_eq!(last.mem_rows.unwrap().o.data, expected.unwrap().o.row(&[0, 2]));
}

#[test]
fn ragged_spans_leave_the_rest_empty() {
    let inputs = Inputs::new(shape(5, Window::Blocks(1), 2), 3, 15, 8);
    let spans = [inputs.span(0, 0, 15), inputs.span(1, 0, 6), inputs.span(2, 0, 0)];
    let whole = attend(&inputs.args(&inputs.spans())).unwrap().rows.unwrap();
    let Attended { rows, mem_rows } = attend(&inputs.args(&spans)).unwrap();
    let (rows, mem_rows) = (rows.unwrap(), mem_rows.unwrap());
    assert_eq!(rows.o.row(&[0]), whole.o.row(&[0]));
    assert_eq!(rows.o.row(&[1])[..6 * 24], whole.o.row(&[1])[..6 * 24]);
    assert!(rows.o.row(&[1])[6 * 24..].iter().chain(rows.o.row(&[2])).all(|o| *o == 0.0));
    assert!(rows.lse.row(&[1])[6 * 4..].iter().chain(rows.lse.row(&[2])).all(|lse| *lse == f64::NEG_INFINITY));
    // Six tokens touch two blocks; the second has one key beside its two memory rows.
    assert!(mem_rows.n.row(&[1, 0]).iter().all(|n| *n == 7.0));
    assert!(mem_rows.n.row(&[1, 1]).iter().all(|n| *n == 3.0));
    assert!(mem_rows.n.row(&[1, 2]).iter().chain(mem_rows.n.row(&[2])).all(|n| *n == 0.0));
}

#[test]
fn memory_keys_have_the_rows_that_spans_name_or_more() {
    let inputs = Inputs::new(shape(5, Window::Blocks(1), 3), 2, 12, 10);
    let mut spans = inputs.spans();
    (spans[0].mem_rows, spans[1].mem_rows) = (1, 2);
    let expected = attend(&inputs.args(&spans)).unwrap();
    for rows in [2, 4] {
        let (mem_k, mem_v) = (memory_of(&inputs.mem_k, rows), memory_of(&inputs.mem_v, rows));
        let attended = attend(&Attend { mem_k: Some(&mem_k), mem_v: Some(&mem_v), ..inputs.args(&spans) }).unwrap();
        assert_eq!(attended, expected, "{rows} rows");
    }
}

#[test]
fn one_visible_key_is_returned_bit_for_bit() {
    let inputs = Inputs::new(shape(1, Window::Blocks(0), 0), 1, 9, 9);
    let rows = attend(&inputs.args(&inputs.spans())).unwrap().rows.unwrap();
    for t in 0..9 {
        for h in 0..4 {
            assert_eq!(rows.o.row(&[0, 0, t, h]), inputs.v.row(&[0, t, h / 2]));
        }
    }
}

#[test]
fn conditioning_is_what_the_bound_says() {
    // One row over two keys, by hand.
    let shape = Shape::builder().head_dim(2).block_len(2).scale(-0.5).build().unwrap();
    let rows = attend(&Attend {
        shape: &shape,
        spans: &[Span::new(0, 1, 1)],
        q: Some(&Array::new([1, 1, 1, 2], vec![-1.0, 2.0]).unwrap()),
        mem_q: None,
        k: &Array::new([1, 2, 1, 2], vec![3.0, 1.0, -1.0, 1.0]).unwrap(),
        v: &Array::new([1, 2, 1, 2], vec![2.0, -1.0, -4.0, -3.0]).unwrap(),
        mem_k: None,
        mem_v: None,
        sink: None,
    })
    .unwrap();
    let rows = rows.rows.unwrap();
    // −0.5·(−3 + 2) = 0.5 and −0.5·(1 + 2) = −1.5.
    let p = gate(2.0);
    assert!(difference(&rows.o.data, &[2.0 * p - 4.0 * (1.0 - p), -p - 3.0 * (1.0 - p)]) < 1e-15);
    assert!(difference(&rows.a.data, &[2.0 * p + 4.0 * (1.0 - p), p + 3.0 * (1.0 - p)]) < 1e-15);
    assert_eq!((rows.s.data[0], rows.n.data[0], rows.v_max.data[0]), (2.5, 2.0, 4.0));
}

/// Three positions in one block of one head, D = 1, scale 1: the keys are the logits of q = 1.
fn three(k: [f64; 3], v: [f64; 3], sink: Option<&[f64]>) -> Rows {
    let shape = Shape::builder().head_dim(1).block_len(3).scale(1.0).build().unwrap();
    let attended = attend(&Attend {
        shape: &shape,
        spans: &[Span::new(0, 0, 3)],
        q: Some(&Array::full([1, 3, 1, 1], 1.0)),
        mem_q: None,
        k: &Array::new([1, 3, 1, 1], k.to_vec()).unwrap(),
        v: &Array::new([1, 3, 1, 1], v.to_vec()).unwrap(),
        mem_k: None,
        mem_v: None,
        sink,
    })
    .unwrap();
    attended.rows.unwrap()
}

#[test]
fn infinite_and_undefined_logits() {
    const INF: f64 = f64::INFINITY;
    // −inf has weight 0; nothing else visible is an empty row.
    let rows = three([-INF, 0.0, -INF], [5.0, 7.0, 9.0], None);
    assert_eq!(rows.o.data, [0.0, 7.0, 7.0]);
    assert_eq!(rows.lse.data, [-INF, 0.0, 0.0]);
    let rows = three([-INF, -INF, 0.0], [f64::NAN, -5.0, 1.0], Some(&[2.0]));
    assert_eq!(rows.lse.data[..2], [2.0, 2.0]);
    assert_eq!(rows.o.data[..2], [0.0, 0.0]);
    assert!(rows.o.data.iter().take(2).all(|o| o.is_sign_positive()));
    // NaN and +inf take the rows that see them, and no earlier one.
    for bad in [f64::NAN, INF] {
        let rows = three([-INF, bad, 0.0], [5.0, 7.0, 9.0], None);
        assert_eq!((rows.o.data[0], rows.lse.data[0]), (0.0, -INF));
        assert!(rows.o.data[1..].iter().chain(&rows.lse.data[1..]).all(|x| x.is_nan()));
    }
    let rows = three([0.0, 0.0, 0.0], [5.0, f64::NAN, 9.0], None);
    assert_eq!(rows.o.data[0], 5.0);
    assert!(rows.o.data[1..].iter().all(|o| o.is_nan()));
    // Logits that exp cannot hold.
    let rows = three([1e6, 1e6, -1e6], [1.0, 2.0, 3.0], None);
    assert_eq!(rows.o.data, [1.0, 1.5, 1.5]);
    assert_eq!(rows.lse.data[0], 1e6);
}
