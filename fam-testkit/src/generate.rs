//! Generated cases as case files.

use crate::case::{Case, KeySource, Strides};
use crate::casefile::{CaseFile, InfiniCase, MAX_START, Tensor};
use crate::data::{Data, Role};
use crate::distribution::Distribution;
use crate::judge::Reference;
use fam_core::{Dtype, Op, Result, Span};
use fam_ref::Array;
use std::collections::BTreeMap;

/// The case as a file with its expected results: sizes, spans and values of the case, each stream beginning where its span does, since a
/// file has no keys before its tokens. `infini_read` and fused reads become op "infini" with every segment read and written.
///
/// `None` for what a file cannot hold: other ops, no block rows, no tokens, values that are not finite or whose compressive memory would not be, positions past its last.
///
/// # Errors
/// None for a case that [`Case::from_seed`] gave.
pub fn case_file(case: &Case) -> Result<Option<CaseFile>> {
    let is_attention = matches!(case.op, Op::Attend | Op::InfiniRead);
    if !is_attention || !case.rows || case.is_empty() || case.distribution == Distribution::NonFinite {
        return Ok(None);
    }
    if case.spans.iter().any(|span| span.start > MAX_START) {
        return Ok(None);
    }
    let s = case.shape;
    // Sums of σ(k)·v leave f32 where those of v just do not.
    if s.infini().is_some() && case.distribution == Distribution::F32Limit {
        return Ok(None);
    }
    let mem_rows = s.mem_len() as u32;
    let streams = case.spans.iter().enumerate();
    let spans =
        streams.map(|(n, span)| Span { origin: span.start, slot: n as u32, mem_rows, mem_entry: 0, state_entry: 0, ..*span });
    let mut case = Case {
        op: Op::Attend,
        spans: spans.collect(),
        slots: case.batch(),
        keys: KeySource::Linear,
        stale: 0,
        device_spans: false,
        strides: Strides::Packed,
        fused: s.infini().is_some(),
        ..case.clone()
    };
    case.mem_entries = case.blocks();
    let data = Data::new(&case);
    let (batch, tokens, b) = (case.batch(), case.len(), s.block_len() as u64);
    let into = case.spans.iter().map(|span| (span.start % b) as usize).max().unwrap_or(0);
    let blocks = (into + tokens).div_ceil(s.block_len());

    let packed = |values: &Array<5>, shape: &[usize]| Tensor::from_values(s.dtype(), shape.to_vec(), values.data.iter().copied());
    let rows = |role| {
        let values = data.get(role);
        let [.., heads, d] = values.shape;
        packed(values, &[batch, tokens, heads, d])
    };
    // A stream that starts late in its block touches one block more than the generated ones need: it sees nothing of that memory.
    let memory = |role| {
        let values = data.get(role);
        let [_, given, f, heads, d] = values.shape;
        let mut padded = Array::zeros([batch, blocks, f, heads, d]);
        for (n, i) in (0..batch).flat_map(|n| (0..given).map(move |i| (n, i))) {
            padded.row_mut(&[n, i]).copy_from_slice(values.row(&[n, i]));
        }
        packed(&padded, &[batch, blocks, f, heads, d])
    };
    let per_head = |role| {
        let values = data.get(role);
        Tensor::from_values(Dtype::F32, vec![values.data.len()], values.data.iter().copied())
    };
    // The state before the first block, `[N, Hkv, D, D]` or `[N, Hkv, D]`.
    let state = |role| {
        let values = data.get(role);
        let [_, _, rows, heads, d] = values.shape;
        let at = (0..batch).flat_map(|n| (0..heads).flat_map(move |h| (0..rows).map(move |r| [n, 0, r, h])));
        let shape = if role == Role::M { vec![batch, heads, d, d] } else { vec![batch, heads, d] };
        Tensor::from_values(Dtype::F32, shape, at.flat_map(|at| values.row(&at).to_vec()))
    };
    let infini = s.infini().map(|rule| {
        // Keys without rotary positions: drawn apart from those that the local attention sees.
        let un_rotated = Data::new(&Case { seed: !case.seed, op: Op::InfiniWrite, ..case.clone() });
        let un_rotated_k = file_tokens(un_rotated.get(Role::K), [batch, tokens], s.dtype());
        let (m0, z0) = (Some(state(Role::M)), Some(state(Role::Z)));
        InfiniCase { rule, q: Some(rows(Role::InfiniQ)), k: Some(un_rotated_k), beta: per_head(Role::Beta), m0, z0 }
    });
    let has_memory = s.mem_len() > 0;
    let mut file = CaseFile {
        shape: s,
        batch,
        tokens,
        lengths: case.spans.iter().map(|span| span.len.into()).collect(),
        start: case.spans.iter().map(|span| span.start).collect(),
        q: rows(Role::Q),
        k: rows(Role::K),
        v: rows(Role::V),
        mem_q: (has_memory && case.mem_rows).then(|| memory(Role::MemQ)),
        mem: has_memory.then(|| (memory(Role::MemK), memory(Role::MemV))),
        sink: case.sink.then(|| per_head(Role::Sink)),
        infini,
        expected: BTreeMap::new(),
        source: format!("generated, seed {:#018x}, {}", case.seed, case.distribution),
    };
    file.expected = Reference::new(&file)?.expected(&file);
    Ok(Some(file))
}

/// The first `tokens` rows of each stream.
fn file_tokens(values: &Array<5>, [batch, tokens]: [usize; 2], dtype: Dtype) -> Tensor {
    let [_, _, _, heads, d] = values.shape;
    let rows = (0..batch).flat_map(|n| (0..tokens).map(move |r| [n, 0, r]));
    Tensor::from_values(dtype, vec![batch, tokens, heads, d], rows.flat_map(|at| values.row(&at).to_vec()))
}
