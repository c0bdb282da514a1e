//! Inputs that do not fit are refused by name, never read past their end.

use crate::common::{Inputs, memory_of, shape};
use fam_core::{Error, InfiniRule, Result, Window};
use fam_ref::{Array, Attend, attend, infini_retrieve, infini_write, merge};

fn refused<T: std::fmt::Debug>(result: Result<T>, field: &str) {
    match result {
        Err(Error::Invalid { field: named, .. }) => assert_eq!(named, field),
        other => panic!("{field}: {other:?}"),
    }
}

#[test]
fn attend_refuses_what_does_not_fit() {
    let inputs = Inputs::new(shape(5, Window::Blocks(1), 3), 2, 23, 1);
    let spans = inputs.spans();
    let args = inputs.args(&spans);
    assert!(attend(&args).is_ok());

    // Every tensor: one row short, another head count, elements missing.
    fn spoilt<const R: usize>(x: &Array<R>, rows: usize) -> [Array<R>; 3] {
        let (mut short, mut heads, mut elements) = (x.shape, x.shape, x.clone());
        short[rows] -= 1;
        heads[R - 2] += 1;
        elements.data.pop();
        [Array::zeros(short), Array::zeros(heads), elements]
    }
    for q in &spoilt(&inputs.q, 1) {
        refused(attend(&Attend { q: Some(q), ..args }), "q");
    }
    for x in &spoilt(&inputs.k, 1) {
        refused(attend(&Attend { k: x, ..args }), "k");
        refused(attend(&Attend { v: x, ..args }), "v");
    }
    for (q, kv) in spoilt(&inputs.mem_q, 1).iter().zip(&spoilt(&inputs.mem_k, 1)) {
        refused(attend(&Attend { mem_q: Some(q), ..args }), "mem_q");
        refused(attend(&Attend { mem_k: Some(kv), ..args }), "mem_k");
        refused(attend(&Attend { mem_v: Some(kv), ..args }), "mem_v");
    }
    refused(attend(&Attend { mem_k: Some(&memory_of(&inputs.mem_k, 2)), ..args }), "mem_k");
    refused(attend(&Attend { mem_v: Some(&memory_of(&inputs.mem_v, 2)), ..args }), "mem_v");
    refused(attend(&Attend { mem_k: None, ..args }), "mem_k");
    refused(attend(&Attend { mem_v: None, ..args }), "mem_v");
    refused(attend(&Attend { sink: Some(&[0.0; 3]), ..args }), "sink");
    refused(attend(&Attend { spans: &spans[..1], ..args }), "q");

    for (field, spoil) in [
        ("span.origin", (|span| span.origin = 1) as fn(&mut fam_core::Span)),
        ("span.start", |span| span.start = u64::MAX),
        ("span.mem_rows", |span| span.mem_rows = 4),
        ("k", |span| span.start = 1),
        ("q", |span| span.len = 24),
    ] {
        let mut spans = spans.clone();
        spoil(&mut spans[1]);
        refused(attend(&Attend { spans: &spans, ..args }), field);
    }
}

#[test]
fn rows_of_other_sizes_are_refused() {
    refused(Array::new([2, 3], vec![0.0; 5]), "array");
    let (x, m) = ([1.0; 4], [1.0; 16]);
    refused(infini_retrieve(&x, &m[..15], &x), "m");
    refused(infini_retrieve(&x, &m, &x[..3]), "z");
    for rule in [InfiniRule::Linear, InfiniRule::Delta] {
        assert!(infini_write(rule, &[&x], &[&x], &m, &x).is_ok());
        refused(infini_write(rule, &[&x], &[&x], &m[1..], &x), "m");
        refused(infini_write(rule, &[&x], &[], &m, &x), "v");
        refused(infini_write(rule, &[&x[1..]], &[&x], &m, &x), "k");
        refused(infini_write(rule, &[&x], &[&x[1..]], &m, &x), "v");
    }
    assert!(infini_retrieve(&[], &[], &[]).is_ok());
    refused(merge(&x, 0.0, &x[1..], 0.0), "o_b");
}
