//! What the kernels returned for a stream, block by block as case files, against the reference.

use super::{INFINI_K, INFINI_Q, K, Life, Q, Row, Stream, V};
use crate::casefile::{CaseFile, InfiniCase, Tensor};
use crate::harness::Harness;
use crate::judge::Reference;
use crate::launch::Stop;
use fam_core::{Dtype, Shape};
use std::collections::BTreeMap;

impl<H: Harness + ?Sized> Life<'_, H>
where
    H::Backend: Clone,
{
    /// Every committed row of a stream against the reference, and the compressive memory.
    pub fn check(&self, stream: usize) -> Result<(), Stop> {
        let data = &self.data[stream];
        // Committed tokens are a prefix: a rollback forgets the last.
        let done = data.o.len();
        let b = self.shape.block_len() as u64;
        if done == 0 {
            return Ok(());
        }
        let (first, last) = (self.shape.block(data.origin + data.shared as u64), self.shape.block(data.origin + done as u64 - 1));
        // Where all blocks are shared, the state is not.
        for block in first.min(last)..=last {
            let end = (((block + 1) * b).min(data.origin + done as u64) - data.origin) as usize;
            let from = ((block * b).max(data.origin) - data.origin) as usize;
            let (served, rows) = data.served.get(&block).copied().unwrap_or((block, 0));
            let mem_o = data.mem_o.get(&block).filter(|(tokens, _)| *tokens == end && rows > 0);
            let case = self.case(data, end, [block, served], rows, mem_o.is_some())?;
            let outputs = self.outputs(data, &case, mem_o.map(|(_, rows)| rows), block == last);
            self.judge(stream, &case, from, outputs)?;
        }
        Ok(())
    }

    /// The first `tokens` tokens of a stream as a case. Its memory is that of `block`, the first `rows` rows given for the block `served`, and
    /// shared by all: only that block is judged. A compressive memory holds tokens alone, whatever the memory rows.
    fn case(
        &self,
        data: &Stream,
        tokens: usize,
        [block, served]: [u64; 2],
        rows: usize,
        with_mem_q: bool,
    ) -> Result<CaseFile, Stop> {
        let s = &self.shape;
        let (dtype, d) = (s.dtype(), s.head_dim());
        let mut shape = Shape::builder().heads(s.heads()).kv_heads(s.kv_heads()).head_dim(d).block_len(s.block_len());
        shape = shape.window(s.window()).mem_len(rows).dtype(dtype);
        if let Some(rule) = s.infini() {
            shape = shape.infini(rule);
        }
        let tensor = |i: usize| {
            let heads = self.width(i) / d;
            let values = data.rows[i][..tokens * heads * d].iter().copied();
            Tensor::from_values(dtype, vec![1, tokens, heads, d], values)
        };
        let mem = |i: usize, block: u64, heads: usize| {
            let first = (block - s.block(data.origin)) as usize * s.mem_len() * heads * d;
            let values = data.mem[i][first..first + rows * heads * d].iter().copied();
            Tensor::from_values(dtype, vec![1, 1, rows, heads, d], values)
        };
        let numbers = |values: &[f64]| Tensor::from_values(Dtype::F32, vec![values.len()], values.iter().copied());
        let mem_q = with_mem_q.then(|| mem(0, block, s.heads()));
        let given = (rows > 0).then(|| (mem(1, served, s.kv_heads()), mem(2, served, s.kv_heads())));
        let infini = s.infini().map(|rule| InfiniCase {
            rule,
            q: Some(tensor(INFINI_Q)),
            k: Some(tensor(INFINI_K)),
            beta: numbers(&self.beta),
            m0: None,
            z0: None,
        });
        Ok(CaseFile {
            shape: shape.build()?,
            batch: 1,
            tokens,
            lengths: vec![tokens as u64],
            start: vec![data.origin],
            q: tensor(Q),
            k: tensor(K),
            v: tensor(V),
            mem_q,
            mem: given,
            sink: self.sink.as_deref().map(numbers),
            infini,
            expected: BTreeMap::new(),
            source: String::new(),
        })
    }

    /// What the kernels returned for the tokens of `case`; memory rows only of its last block, the state only after the stream's last.
    fn outputs(&self, data: &Stream, case: &CaseFile, mem_rows: Option<&Row>, is_last: bool) -> BTreeMap<String, Tensor> {
        let mut outputs = BTreeMap::new();
        let mut add = |name: &str, values: Vec<f64>| {
            let dtype = if name.ends_with('o') { self.shape.dtype() } else { Dtype::F32 };
            outputs.insert(name.to_string(), Tensor::from_values(dtype, case.output_shape(name), values));
        };
        let rows = || data.o.range(..case.tokens).map(|(_, row)| row);
        add("o", rows().flat_map(|row| row.o.iter().copied()).collect());
        add("lse", rows().flat_map(|row| row.lse.iter().copied()).collect());
        for (name, values) in mem_rows.iter().flat_map(|row| [("mem_o", &row.o), ("mem_lse", &row.lse)]) {
            let [_, blocks, ref block @ ..] = case.output_shape(name)[..] else { continue };
            let size = block.iter().product();
            // The case has as many memory rows as there were keys of them.
            add(name, std::iter::repeat_n(0.0, (blocks - 1) * size).chain(values[..size].iter().copied()).collect());
        }
        for (name, data) in data.state.iter().filter(|_| is_last).flat_map(|[m, z]| [("m", m), ("z", z)]) {
            let tensor = Tensor { dtype: Dtype::F32, shape: case.output_shape(name), data: data.clone() };
            outputs.insert(name.to_string(), tensor);
        }
        outputs
    }

    fn judge(&self, stream: usize, case: &CaseFile, from: usize, outputs: BTreeMap<String, Tensor>) -> Result<(), Stop> {
        let mut limits = self.h.limits();
        // The case has the rows that were kept: the call may have had more, and then they were not few.
        limits.few_rows[0] = 0;
        // It has as many memory rows as there were keys of them, the call all.
        if !limits.is_few(&self.shape, true, self.shape.mem_len()) {
            limits.few_rows[1] = 0;
        }
        match Reference::new(case)?.judge_from(from, case, &outputs, &limits).wrong {
            None => Ok(()),
            Some((wrong, edges)) => Err(Stop::Failed(format!("stream {stream} of {:?}: {wrong} ({edges})", self.shape))),
        }
    }
}
