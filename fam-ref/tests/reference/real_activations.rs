//! The reference against an independent witness: results for real activations, computed elsewhere in f64 and stored in f32.

use crate::common::{Inputs, block_of, tokens_of};
use fam_core::{InfiniRule, Shape, Span, Window, f16};
use fam_ref::{Array, Attend, attend, gate, infini_retrieve, infini_write};
use safetensors::{Dtype, SafeTensors};
use std::collections::HashMap;

struct File {
    bytes: Vec<u8>,
    metadata: HashMap<String, String>,
}

impl File {
    fn open(name: &str) -> Self {
        let path = format!("{}/../testdata/{name}.safetensors", env!("CARGO_MANIFEST_DIR"));
        let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        File { metadata: header.metadata().clone().unwrap(), bytes }
    }

    fn get<const R: usize>(&self, name: &str) -> Array<R> {
        let tensors = SafeTensors::deserialize(&self.bytes).unwrap();
        let tensor = tensors.tensor(name).unwrap();
        let data = match tensor.dtype() {
            Dtype::F16 => tensor.data().chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f64()).collect(),
            Dtype::F32 => tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()).into()).collect(),
            dtype => panic!("{name} is {dtype:?}"),
        };
        Array::new(tensor.shape().try_into().unwrap(), data).unwrap()
    }

    fn shape(&self, mem_len: usize) -> Shape {
        let [_, _, heads, d] = self.get::<4>("q").shape;
        let number = |key: &str| self.metadata[key].parse::<usize>().unwrap();
        Shape::builder()
            .heads(heads)
            .kv_heads(self.get::<4>("k").shape[2])
            .head_dim(d)
            .block_len(number("block_len"))
            .window(Window::Blocks(number("window_blocks")))
            .mem_len(mem_len)
            .scale(self.metadata["scale"].parse().unwrap())
            .build()
            .unwrap()
    }

    /// Within half an ulp of the stored f32, and 1e-12 of the largest entry.
    fn check(&self, name: &str, got: &[f64]) {
        let expected = self.get_flat(name);
        assert_eq!(got.len(), expected.len(), "{name}");
        let largest = expected.iter().fold(0f32, |m, x| m.max(x.abs()));
        for (i, (got, &expected)) in got.iter().zip(&expected).enumerate() {
            let half_ulp = f64::from(expected.abs().next_up() - expected.abs()) / 2.0;
            let error = (got - f64::from(expected)).abs();
            assert!(error <= half_ulp + 1e-12 * f64::from(largest), "{name}[{i}]: {got} for {expected}, off by {error:e}");
        }
    }

    fn get_flat(&self, name: &str) -> Vec<f32> {
        let tensors = SafeTensors::deserialize(&self.bytes).unwrap();
        let tensor = tensors.tensor(name).unwrap();
        assert_eq!(tensor.dtype(), Dtype::F32, "{name}");
        tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }
}

fn check_attend(name: &str) {
    let file = File::open(name);
    let mem_q = file.get::<5>("mem_q");
    let inputs = Inputs {
        shape: file.shape(mem_q.shape[2]),
        q: file.get("q"),
        mem_q,
        k: file.get("k"),
        v: file.get("v"),
        mem_k: file.get("mem_k"),
        mem_v: file.get("mem_v"),
    };
    let attended = attend(&inputs.args(&inputs.spans())).unwrap();
    let (rows, mem_rows) = (attended.rows.unwrap(), attended.mem_rows.unwrap());
    file.check("expected_o", &rows.o.data);
    file.check("expected_lse", &rows.lse.data);
    file.check("expected_mem_o", &mem_rows.o.data);
    file.check("expected_mem_lse", &mem_rows.lse.data);
    // One block in the middle on its own.
    let block = inputs.attend_block(2);
    assert_eq!(block.mem_rows.unwrap().o, block_of(&mem_rows.o, 2));
    let (b, [batch, _, len, heads, d]) = (inputs.shape.block_len(), rows.o.shape);
    assert_eq!(block.rows.unwrap().o.data, tokens_of(&Array { shape: [batch, len, heads, d], data: rows.o.data }, 2 * b, b).data);
}

#[test]
fn smollm2_layer_12() {
    check_attend("smollm2_l12_f16");
}

#[test]
fn smollm2_layer_29_two_streams() {
    check_attend("smollm2_l29_f32_small");
}

fn check_infini(name: &str, rule: InfiniRule, rule_name: &str) {
    let file = File::open(name);
    assert_eq!(file.metadata["rule"], rule_name);
    let shape = file.shape(0);
    let (q, k, v) = (file.get::<4>("q"), file.get::<4>("k"), file.get::<4>("v"));
    let (infini_q, infini_k) = (file.get::<4>("infini_q"), file.get::<4>("infini_k"));
    let beta = file.get::<1>("beta");
    let [_, tokens, heads, d] = q.shape;
    let (b, kv_heads) = (shape.block_len(), shape.kv_heads());

    let local = attend(&Attend {
        shape: &shape,
        spans: &[Span::new(0, 0, tokens as u32)],
        q: Some(&q),
        mem_q: None,
        k: &k,
        v: &v,
        mem_k: None,
        mem_v: None,
        sink: None,
    })
    .unwrap();
    let local = local.rows.unwrap();
    let mut o = Array::zeros([tokens, heads, d]);
    let mut m = Array::zeros([kv_heads, d, d]);
    let mut z = Array::zeros([kv_heads, d]);
    for start in (0..tokens).step_by(b) {
        let segment = start..tokens.min(start + b);
        for t in segment.clone() {
            for h in 0..heads {
                let kv = h / shape.group();
                let a = infini_retrieve(infini_q.row(&[0, t, h]), m.row(&[kv]), z.row(&[kv])).unwrap().a;
                let g = gate(beta.data[h]);
                for (c, o) in o.row_mut(&[t, h]).iter_mut().enumerate() {
                    *o = g * a[c] + (1.0 - g) * local.o[[0, 0, t, h, c]];
                }
            }
        }
        if segment.len() == b {
            for h in 0..kv_heads {
                let (k, v): (Vec<_>, Vec<_>) = segment.clone().map(|t| (infini_k.row(&[0, t, h]), v.row(&[0, t, h]))).unzip();
                let written = infini_write(rule, &k, &v, m.row(&[h]), z.row(&[h])).unwrap();
                m.row_mut(&[h]).copy_from_slice(&written.m);
                z.row_mut(&[h]).copy_from_slice(&written.z);
            }
        }
    }
    file.check("expected_o", &o.data);
    file.check("expected_m", &m.data);
    file.check("expected_z", &z.data);
}

#[test]
fn smollm2_infini_linear() {
    check_infini("smollm2_infini_l05_f32", InfiniRule::Linear, "linear");
}

#[test]
fn smollm2_infini_delta() {
    check_infini("smollm2_infini_l05_delta_f32", InfiniRule::Delta, "delta");
}
