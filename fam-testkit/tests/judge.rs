//! What the judge of case files must find, must let pass, and must say that it did not judge.

mod common;

use common::CpuHarness;
use fam_core::{Dtype, InfiniRule, Op, Shape, ShapeBuilder, Window};
use fam_testkit::{
    Case, CaseFile, Distribution, Filter, Harness, InfiniCase, Limits, Mode, Reference, Rng, Tensor, Verdict, case_file,
    case_seed, replay,
};
use std::collections::BTreeMap;

/// One stream of `tokens` tokens with two memory rows, so that every row sees several keys.
fn file(shape: ShapeBuilder, tokens: usize) -> CaseFile {
    let shape = shape.mem_len(2).build().unwrap();
    let mut rng = Rng::new(7);
    let mut normal = |sizes: &[usize]| {
        let count: usize = sizes.iter().product();
        Tensor::from_values(Dtype::F32, sizes.to_vec(), (0..count).map(|_| rng.normal()))
    };
    let (h, kv, d) = (shape.heads(), shape.kv_heads(), shape.head_dim());
    let infini = shape.infini().map(|rule| InfiniCase { rule, q: None, k: None, beta: normal(&[h]), m0: None, z0: None });
    CaseFile {
        shape,
        batch: 1,
        tokens,
        lengths: vec![tokens as u64],
        start: vec![0],
        q: normal(&[1, tokens, h, d]),
        k: normal(&[1, tokens, kv, d]),
        v: normal(&[1, tokens, kv, d]),
        mem_q: None,
        mem: Some((normal(&[1, 1, 2, kv, d]), normal(&[1, 1, 2, kv, d]))),
        sink: None,
        infini,
        expected: BTreeMap::new(),
        source: String::new(),
    }
}

fn small() -> ShapeBuilder {
    Shape::builder().heads(4).kv_heads(2).head_dim(8).block_len(16).window(Window::Blocks(0))
}

/// Every element through `f(place, value)`.
fn change(tensor: &mut Tensor, f: impl Fn(usize, f64) -> f64) {
    let values: Vec<f64> = tensor.values().into_iter().enumerate().map(|(at, x)| f(at, x)).collect();
    *tensor = Tensor::from_values(tensor.dtype, tensor.shape.clone(), values);
}

/// Judges one output alone.
fn judge(case: &CaseFile, name: &str, tensor: &Tensor, limits: &Limits) -> Verdict {
    Reference::new(case).unwrap().judge(case, &BTreeMap::from([(name.to_string(), tensor.clone())]), limits)
}

/// The CPU's outputs are right in every mode; those of a step, and how many elements were judged and not.
fn right(case: &CaseFile) -> (BTreeMap<String, Tensor>, Verdict) {
    let h = CpuHarness::serial();
    let reference = Reference::new(case).unwrap();
    let [step, ..] = Mode::ALL.map(|mode| {
        let outputs = replay(&h, case, mode).unwrap();
        let verdict = reference.judge(case, &outputs, &h.limits());
        assert!(verdict.wrong.is_none(), "{} {mode}: {:?}", case.source, verdict.wrong);
        (outputs, verdict)
    });
    step
}

#[test]
fn huge_logits_that_are_exact_are_judged() {
    for distribution in ["logit-1e5", "logit-1e6", "f16-limit", "f32-limit", "equal-huge", "adversary"] {
        let filter = Filter { ops: vec![Op::Attend], text: format!(" {distribution} "), ..Filter::default() };
        let cases = (0..).filter_map(|i| Case::generate(case_seed(11, i), &filter));
        let files = cases.filter_map(|case| case_file(&case).unwrap()).filter(|file| file.infini.is_none());
        // A sink far above a row's logits leaves it weights that 16 bits lose.
        let has_far_sink = |file: &CaseFile| file.sink.as_ref().is_some_and(|sink| sink.values().iter().any(|sink| *sink > 0.0));
        for file in files.filter(|file| !has_far_sink(file)).take(20) {
            let (outputs, verdict) = right(&file);
            assert_eq!(verdict.vacuous, 0, "{}", file.source);
            let mut o = outputs["o"].clone();
            change(&mut o, |_, _| 0.0);
            let is_zero = outputs["o"].values().iter().all(|o| *o == 0.0);
            let wrong = judge(&file, "o", &o, &Limits::any_kernel()).wrong;
            assert!(wrong.is_some() || is_zero, "zeros pass: {}", file.source);
        }
    }
    assert!(Distribution::ALL.iter().filter(|d| d.has_exact_logits()).count() == 6);
}

#[test]
fn what_cannot_be_wrong_is_not_judged() {
    let mut case = file(small(), 40);
    change(&mut case.q, |_, q| q * 1e30);
    let mut o = case.q.clone();
    change(&mut o, |at, _| 1e10 * (at as f64).sin());
    let verdict = judge(&case, "o", &o, &Limits::any_kernel());
    assert_eq!((verdict.compared, verdict.vacuous), (0, 40 * 4 * 8));
    // Ordinary logits judge every element.
    let case = file(small(), 40);
    let verdict = judge(&case, "o", &o, &Limits::any_kernel());
    assert!((verdict.compared, verdict.vacuous) == (40 * 4 * 8, 0) && verdict.wrong.is_some());
}

#[test]
fn logits_beyond_f32_are_open() {
    for scale in [1e38, -3e38] {
        let (_, verdict) = right(&file(small().scale(scale), 40));
        assert!(verdict.vacuous > 0);
    }
    // Formed before they are scaled.
    let mut case = file(small().scale(1e-30), 40);
    change(&mut case.q, |_, q| q * 1e38);
    change(&mut case.k, |_, k| k * 1e10);
    assert!(right(&case).1.vacuous > 0);
}

#[test]
fn a_gate_near_0_or_1_keeps_its_digits() {
    for beta in [30.0, -30.0, 100.0, -100.0] {
        for rule in [InfiniRule::Linear, InfiniRule::Delta] {
            let mut case = file(small().infini(rule), 50);
            let infini = case.infini.as_mut().unwrap();
            change(&mut infini.beta, |_, _| beta);
            let (outputs, verdict) = right(&case);
            assert_eq!(verdict.vacuous, 0);
            // 1 − g in floating point: the first segment's rows, which have nothing but their local attention, would be 0.
            let mut o = outputs["o"].clone();
            change(&mut o, |at, o| if at < 16 * 4 * 8 { 0.0 } else { o });
            let is_found = judge(&case, "o", &o, &Limits::default()).wrong.is_some();
            // Beyond the range of f32 a share may be 0.
            assert_eq!(is_found, beta < 100.0, "beta {beta} {rule:?}");
        }
    }
}

#[test]
fn keys_whose_sigma_is_subnormal_are_written_right() {
    for k in [-88.0, -95.0, -100.0, -103.0, -110.0] {
        for rule in [InfiniRule::Linear, InfiniRule::Delta] {
            let mut case = file(small().infini(rule), 64);
            change(&mut case.k, |at, x| k + 0.1 * x + (at % 3) as f64);
            change(&mut case.v, |_, v| 20.0 * v);
            right(&case);
        }
    }
}

#[test]
fn nan_reaches_no_further_than_tiles() {
    let mut case = file(small(), 400);
    // Key 5 of kv head 0.
    change(&mut case.k, |at, k| if at == (5 * 2) * 8 { f64::NAN } else { k });
    let (outputs, verdict) = right(&case);
    assert_eq!(verdict.vacuous, 0, "the CPU confines NaN to the rows that see it");
    let with_nan = |row: usize, head: usize| {
        let mut o = outputs["o"].clone();
        change(&mut o, |at, o| if at / 8 == row * 4 + head { f64::NAN } else { o });
        o
    };
    for (row, head, may) in [(3, 1, true), (15, 0, true), (20, 0, true), (390, 0, false), (3, 2, false), (20, 3, false)] {
        let verdict = judge(&case, "o", &with_nan(row, head), &Limits::any_kernel());
        assert_eq!(verdict.wrong.is_none(), may, "row {row}, head {head}: {:?}", verdict.wrong);
        let strict = judge(&case, "o", &with_nan(row, head), &Limits::default());
        assert_eq!(strict.wrong.is_none(), (5..16).contains(&row) && head < 2, "row {row}, head {head}");
    }
    // Beside a NaN that may be there, the rest of the row is judged.
    let mut o = with_nan(3, 1);
    let element = (3 * 4 + 1) * 8;
    change(&mut o, |at, x| if at == element { 7.0 } else { x });
    let wrong = judge(&case, "o", &o, &Limits::any_kernel()).wrong.unwrap().0;
    assert_eq!(wrong.at.index, [0, 0, 3, 1, 0]);
}

#[test]
fn edges_of_tiles_are_named() {
    let case = file(small().block_len(256), 256);
    let edges = |row: usize, limits: &Limits| {
        let mut o = replay(&CpuHarness::serial(), &case, Mode::Step).unwrap().remove("o").unwrap();
        change(&mut o, |at, o| if at == (row * 4 + 1) * 8 { o + 1.0 } else { o });
        judge(&case, "o", &o, limits).wrong.unwrap().1
    };
    let unknown = edges(64, &Limits::any_kernel());
    for edge in
        ["first row of a tile of 16, 32, 64", "its last key the first of a tile of 16, 32, 64", "query head 1 of 2 of kv head 0"]
    {
        assert!(unknown.contains(edge), "{unknown}");
    }
    let stated = edges(95, &Limits::default().key_tile(48));
    assert!(
        stated.contains("last row of a tile of 16, 32") && stated.contains("its last key the last of a tile of 48"),
        "{stated}"
    );
}

/// A sink without weight changes nothing, and hides nothing: neither in `o` nor in `lse`.
#[test]
fn a_far_negative_sink_hides_no_error() {
    let filter = Filter { ops: vec![Op::Attend], text: " normal ".into(), ..Filter::default() };
    let cases = (0..).filter_map(|i| Case::generate(case_seed(12, i), &filter));
    let files = cases.filter_map(|case| case_file(&case).unwrap()).filter(|file| file.infini.is_none());
    for mut file in files.filter(|file| file.shape.dtype() == Dtype::F32).take(20) {
        let far = [-1e3, -1e30, -f64::from(f32::MAX) / 4.0].into_iter().cycle().take(file.shape.heads());
        file.sink = Some(Tensor::from_values(Dtype::F32, vec![file.shape.heads()], far));
        file.expected.clear();
        let (outputs, verdict) = right(&file);
        assert_eq!(verdict.vacuous, 0, "{}", file.source);
        for (name, error) in [("o", 1e-2), ("lse", 1e-2)] {
            let mut changed = outputs[name].clone();
            change(&mut changed, |_, x| x + error);
            assert!(judge(&file, name, &changed, &Limits::any_kernel()).wrong.is_some(), "{name} of {}", file.source);
        }
    }
}
