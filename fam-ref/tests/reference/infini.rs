//! Properties of the compressive memory.

use crate::common::difference;
use fam_core::InfiniRule::{self, Delta, Linear};
use fam_ref::layer::Random;
use fam_ref::{Array, gate, infini_retrieve, infini_write, sigma};

const D: usize = 5;

/// The memory after segments of `segment` tokens, and what each row of `q` reads in its own segment.
fn stream(rule: InfiniRule, segment: usize, q: &Array<2>, k: &Array<2>, v: &Array<2>) -> (Vec<f64>, Vec<f64>, Vec<Vec<f64>>) {
    let (mut m, mut z, mut read) = (vec![0.0; D * D], vec![0.0; D], Vec::new());
    for start in (0..k.shape[0]).step_by(segment) {
        let rows = start..start + segment;
        read.extend(rows.clone().map(|t| infini_retrieve(q.row(&[t]), &m, &z).unwrap().a));
        let (k, v): (Vec<_>, Vec<_>) = rows.map(|t| (k.row(&[t]), v.row(&[t]))).unzip();
        let written = infini_write(rule, &k, &v, &m, &z).unwrap();
        (m, z) = (written.m, written.z);
    }
    (m, z, read)
}

#[test]
fn sigma_is_elu_plus_one() {
    assert_eq!([sigma(2.0), sigma(0.0), sigma(-0.0)], [3.0, 1.0, 1.0]);
    assert_eq!(sigma(-40.0), (-40f64).exp());
    assert_eq!([gate(0.0), gate(f64::INFINITY), gate(f64::NEG_INFINITY)], [0.5, 1.0, 0.0]);
}

#[test]
fn linear_is_normalised_linear_attention_over_earlier_segments() {
    let mut random = Random::new(1);
    let [q, k, v] = std::array::from_fn(|_| random.array([24, D], 1.5));
    let (m, z, read) = stream(Linear, 6, &q, &k, &v);
    let similarity =
        |i: usize, j: usize| -> f64 { q.row(&[i]).iter().zip(k.row(&[j])).map(|(q, k)| sigma(*q) * sigma(*k)).sum() };
    for (i, a) in read.iter().enumerate() {
        let earlier = i / 6 * 6;
        let sum: f64 = (0..earlier).map(|j| similarity(i, j)).sum();
        let of = |c| (0..earlier).map(|j| similarity(i, j) * v[[j, c]]).sum::<f64>();
        let expected: Vec<f64> = (0..D).map(|c| if earlier == 0 { 0.0 } else { of(c) / sum }).collect();
        assert!(difference(a, &expected) < 1e-14);
    }
    // The state does not know where segments ended.
    for segment in [1, 2, 8, 24] {
        let (other_m, other_z, _) = stream(Linear, segment, &q, &k, &v);
        assert!(difference(&m, &other_m) < 1e-13 && difference(&z, &other_z) < 1e-13);
    }
}

#[test]
fn delta_depends_on_the_segment_length() {
    let mut random = Random::new(2);
    let [q, k, v] = std::array::from_fn(|_| random.array([24, D], 1.5));
    let ((m, z, _), (other_m, other_z, _)) = (stream(Delta, 6, &q, &k, &v), stream(Delta, 12, &q, &k, &v));
    assert!(difference(&m, &other_m) > 0.1);
    assert!(difference(&z, &other_z) < 1e-13);
}

#[test]
fn delta_leaves_what_is_already_stored() {
    let mut random = Random::new(3);
    let [q, k, v] = std::array::from_fn(|_| random.array([12, D], 1.5));
    let (m, z, _) = stream(Delta, 6, &q, &k, &v);
    // New keys, with the values that the memory already gives for them.
    let new: Array<2> = random.array([7, D], 1.5);
    let keys: Vec<_> = (0..7).map(|t| new.row(&[t])).collect();
    let stored: Vec<_> = keys.iter().map(|k| infini_retrieve(k, &m, &z).unwrap().a).collect();
    let values: Vec<_> = stored.iter().map(Vec::as_slice).collect();
    let written = infini_write(Delta, &keys, &values, &m, &z).unwrap();
    assert_eq!(written.m, m, "v − a is exactly 0");
    assert!(written.z.iter().zip(&z).all(|(new, old)| new > old));
    assert!(difference(&infini_write(Linear, &keys, &values, &m, &z).unwrap().m, &m) > 0.1);
}

#[test]
fn constants_read_back_from_linear_and_halve_in_delta() {
    let mut random = Random::new(4);
    let [q, k] = std::array::from_fn(|_| random.array([24, D], 1.5));
    let v = Array::full([24, D], 1.0);
    for (rule, second) in [(Linear, 1.0), (Delta, 0.5)] {
        // The same keys in every segment, so that delta's half is exact.
        let k = Array::new([24, D], k.row(&[0]).repeat(24)).unwrap();
        let (_, _, read) = stream(rule, 6, &q, &k, &v);
        assert!(read[..6].iter().flatten().all(|&a| a == 0.0), "nothing is stored yet");
        assert!(read[6..12].iter().flatten().all(|a| (a - 1.0).abs() < 1e-14));
        assert!(read[12..18].iter().flatten().all(|a| (a - second).abs() < 1e-14));
    }
    let (_, _, read) = stream(Linear, 6, &q, &k, &v);
    assert!(read[6..].iter().flatten().all(|a| (a - 1.0).abs() < 1e-14));
}

#[test]
fn reading_survives_very_negative_queries() {
    let (m, z) = ((0..D * D).map(|i| i as f64 - 7.0).collect::<Vec<_>>(), vec![1.0, 2.0, 3.0, 4.0, 5.0]);
    let q = [-1.0, -0.5, -2.0, -3.0, -0.25];
    let expected = infini_retrieve(&q, &m, &z).unwrap();
    let far = infini_retrieve(&q.map(|q| q - 5000.0), &m, &z).unwrap();
    assert!(difference(&far.a, &expected.a) < 1e-12 && difference(&far.magnitude, &expected.magnitude) < 1e-12);
    assert_eq!(infini_retrieve(&q, &m, &[0.0; D]).unwrap().a, [0.0; D]);
}

#[test]
fn magnitudes_by_hand() {
    // D = 1, s = 2 and 3: the memory holds 4 for every key.
    let (m, z, keys, values) = ([8.0], [2.0], [[1.0], [2.0]], [[-1.0], [6.0]]);
    let (keys, values) = (keys.each_ref().map(|k| k.as_slice()), values.each_ref().map(|v| v.as_slice()));
    let written = infini_write(Delta, &keys, &values, &m, &z).unwrap();
    assert_eq!((written.m[0], written.z[0]), (8.0 + 2.0 * -5.0 + 3.0 * 2.0, 7.0));
    assert_eq!((written.s_sum[0], written.s_v[0]), (5.0, 2.0 + 18.0));
    assert_eq!((written.s_read[0], written.s_diff[0]), (5.0 * 8.0, 10.0 + 6.0));
    let written = infini_write(Linear, &keys, &values, &m, &z).unwrap();
    assert_eq!((written.m[0], written.s_read[0], written.s_diff[0]), (8.0 - 2.0 + 18.0, 0.0, 0.0));
}
