//! The way back through `attend`.

use crate::attention::Op;
use crate::pack::Packing;
use crate::threads::queue;
use crate::view::{self, Number};
use crate::wrap;
use candle_core::{DType, Device, Result, Storage, Tensor, bail};
use fam::{AttendBackward, Backend, Dtype, Layout, RowsBackward, Spans, View, ViewMut};
use std::sync::PoisonError;

impl Op {
    /// Gradients of q, k and v, packed and typed as they are, from the flat output of [`Op::forward`] and its gradient.
    pub fn backward<T: Number>(&self, [q, k, v]: [&Tensor; 3], out: &Tensor, d_out: &Tensor) -> Result<[Tensor; 3]> {
        let Packing { batch, tokens, blocks, mem_q, keys, mem_k } = self.packing;
        let shape = self.attention.shape();
        let (heads, kv_heads, d, dtype) = (shape.heads(), shape.kv_heads(), shape.head_dim(), shape.dtype());
        // Block rows, then memory rows, as the forward pass returned them; and the same of keys.
        let rows = [[batch, 1, tokens, heads, d], [batch, blocks, mem_q, heads, d]];
        let kv = [[batch, 1, keys, kv_heads, d], [batch, blocks, mem_k, kv_heads, d]];

        // 1. Where everything lies.
        let stored = [q, k, v].map(Tensor::storage_and_layout);
        let [q_of, k_of, v_of] = stored.each_ref().map(|(storage, layout)| match &**storage {
            Storage::Cpu(storage) => Ok((storage, *layout)),
            _ => bail!("expected a tensor on the CPU"),
        });
        let (q_of, k_of, v_of) = (q_of?, k_of?, v_of?);
        let [o, d_o] = [out, d_out].map(|x| x.flatten_all()?.to_vec1::<T>());
        let (o, d_o) = (o?, d_o?);
        let lse = self.lse.lock().unwrap_or_else(PoisonError::into_inner);
        let split = batch * tokens * heads;
        let (o, d_o, lse) = (o.split_at(split * d), d_o.split_at(split * d), lse.split_at(split));
        let [mut d_q, mut d_mem_q] = rows.map(|shape| vec![T::from_f64(0.0); shape.iter().product()]);
        let [mut d_k, mut d_mem_k] = kv.map(|shape| vec![0f32; shape.iter().product()]);
        let [mut d_v, mut d_mem_v] = kv.map(|shape| vec![0f32; shape.iter().product()]);

        // 2. The op.
        let (k_rows, v_rows) = (view::rows::<T>(k_of, 0, keys)?, view::rows::<T>(v_of, 0, keys)?);
        let wide = |shape| Layout::packed(dtype, shape);
        let f32s = |shape| Layout::packed(Dtype::F32, shape);
        let per_row = |[n, b, r, h, _]: [usize; 5]| f32s([n, b, r, h, 1]);
        let mut args = AttendBackward::new(Spans::Host(&self.spans), k_rows, v_rows)
            .d_keys(ViewMut::of(&mut d_k, f32s(kv[0])), ViewMut::of(&mut d_v, f32s(kv[0])));
        if tokens > 0 {
            let given = [o.0, d_o.0].map(|x| View::of(x, wide(rows[0])));
            let (q, lse) = (view::rows::<T>(q_of, 0, tokens)?, View::of(lse.0, per_row(rows[0])));
            args = args.rows(RowsBackward::new(q, given[0], lse, given[1], ViewMut::of(&mut d_q, wide(rows[0]))));
        }
        if mem_q > 0 {
            let given = [o.1, d_o.1].map(|x| View::of(x, wide(rows[1])));
            let (q, lse) = (view::memory::<T>(q_of, tokens, blocks, mem_q)?, View::of(lse.1, per_row(rows[1])));
            args = args.mem_rows(RowsBackward::new(q, given[0], lse, given[1], ViewMut::of(&mut d_mem_q, wide(rows[1]))));
        }
        if mem_k > 0 {
            args = args
                .mem(view::memory::<T>(k_of, keys, blocks, mem_k)?, view::memory::<T>(v_of, keys, blocks, mem_k)?)
                .d_mem(ViewMut::of(&mut d_mem_k, f32s(kv[1])), ViewMut::of(&mut d_mem_v, f32s(kv[1])));
        }
        let (cpu, plan) = (self.attention.cpu(), self.attention.plan());
        self.attention.with_scratch(|scratch| cpu.attend_backward(plan, &mut queue(), args, scratch)).map_err(wrap)?;

        // 3. Rows of tokens and of memory side by side again.
        let rows = packed([(d_q, rows[0]), (d_mem_q, rows[1])])?;
        let [d_k, d_v] = [(d_k, d_mem_k), (d_v, d_mem_v)].map(|(tokens, memory)| packed([(tokens, kv[0]), (memory, kv[1])]));
        let dtype: DType = q.dtype();
        Ok([rows, d_k?.to_dtype(dtype)?, d_v?.to_dtype(dtype)?])
    }
}

/// (N, H, rows, D) from two groups of rows `[N, blocks, rows, H, D]`.
fn packed<T: candle_core::WithDType>(groups: [(Vec<T>, [usize; 5]); 2]) -> Result<Tensor> {
    let groups = groups
        .map(|(data, [n, blocks, rows, h, d])| Tensor::from_vec(data, (n, blocks * rows, h, d), &Device::Cpu)?.transpose(1, 2));
    let [tokens, memory] = groups;
    Tensor::cat(&[tokens?, memory?], 2)
}
