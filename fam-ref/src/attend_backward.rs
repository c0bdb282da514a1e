//! The backward pass of `attend` (contract section 8): for each query row, with its p, o and lse of the forward pass,
//!
//! ```text
//!   d_logit_t = p_t (d_o.v_t - d_o.o + d_lse)           o = sum_t p_t v_t, lse = ln sum: d_p_t = d_o.v_t, and p sums to 1 with the sink's
//!   d_sink   += p_sink (d_lse - d_o.o)                  the sink's value is 0
//!   d_q       = scale sum_t d_logit_t k_t               logit_t = scale * q.k_t
//!   d_k_t    += scale d_logit_t q        d_v_t += p_t d_o
//! ```
//!
//! Keys of a block and of a memory receive gradients from both groups of rows, and from every query head of their group.

use crate::array::check;
use crate::attend::{Attend, Key, Row, Rows};
use crate::{Array, Attended};
use fam_core::Result;

/// Gradients of a loss with respect to the outputs of [`crate::attend()`]; an absent one is 0.
#[derive(Clone, Copy, Debug, Default)]
pub struct AttendUpstream<'a> {
    /// Of the block rows' `o`, `[N, 1, L, Hq, D]`.
    pub d_o: Option<&'a Array<5>>,
    /// Of the block rows' `lse`, `[N, 1, L, Hq]`.
    pub d_lse: Option<&'a Array<4>>,
    /// Of the memory rows' `o`, `[N, nb, F, Hq, D]`.
    pub d_mem_o: Option<&'a Array<5>>,
    /// Of the memory rows' `lse`, `[N, nb, F, Hq]`.
    pub d_mem_lse: Option<&'a Array<4>>,
}

/// Gradients with respect to the inputs of [`crate::attend()`], each of its input's shape and present where that is.
#[derive(Clone, Debug, PartialEq)]
pub struct AttendGradients {
    /// Of `q`.
    pub d_q: Option<Array<4>>,
    /// Of `mem_q`.
    pub d_mem_q: Option<Array<5>>,
    /// Of `k`.
    pub d_k: Array<4>,
    /// Of `v`.
    pub d_v: Array<4>,
    /// Of `mem_k`.
    pub d_mem_k: Option<Array<5>>,
    /// Of `mem_v`.
    pub d_mem_v: Option<Array<5>>,
    /// Of `sink`, `[Hq]`.
    pub d_sink: Option<Vec<f64>>,
}

/// Gradients of a loss whose gradients with respect to the outputs are `upstream`. A row that sees no key with any weight passes nothing on.
///
/// `saved` is what [`crate::attend()`] has returned for `args`, of which `o` and `lse` are read: as they are given, so that a kernel that was
/// handed rounded ones is compared with the same function of them.
///
/// # Errors
/// Those of [`crate::attend()`]; a result or an upstream gradient that has not its output's sizes, or belongs to absent rows.
pub fn attend_backward(args: &Attend, saved: &Attended, upstream: &AttendUpstream) -> Result<AttendGradients> {
    args.validate()?;
    let (batch, heads, d) = (args.spans.len(), args.shape.heads(), args.shape.head_dim());
    let like = |x: Option<&Array<5>>| x.map(|x| Array::zeros(x.shape));
    let mut gradients = AttendGradients {
        d_q: args.q.map(|q| Array::zeros(q.shape)),
        d_mem_q: like(args.mem_q),
        d_k: Array::zeros(args.k.shape),
        d_v: Array::zeros(args.v.shape),
        d_mem_k: like(args.mem_k),
        d_mem_v: like(args.mem_v),
        d_sink: args.sink.map(|sink| vec![0.0; sink.len()]),
    };
    let shape = args.q.map(|q| [batch, 1, q.shape[1], heads, d]);
    let rows = Group::new(["o", "lse", "d_o", "d_lse"], shape, &saved.rows, upstream.d_o, upstream.d_lse)?;
    let shape = args.mem_q.map(|q| q.shape);
    let fields = ["mem_o", "mem_lse", "d_mem_o", "d_mem_lse"];
    let mem_rows = Group::new(fields, shape, &saved.mem_rows, upstream.d_mem_o, upstream.d_mem_lse)?;
    if let (Some(group), Some(q)) = (&rows, args.q) {
        for row in args.block_rows() {
            let [n, _, t, h] = row.at;
            let d_q = gradients.row(args, &row, q.row(&[n, t, h]), group);
            gradients.d_q.iter_mut().for_each(|to| to.row_mut(&[n, t, h]).copy_from_slice(&d_q));
        }
    }
    if let (Some(group), Some(mem_q)) = (&mem_rows, args.mem_q) {
        for row in args.mem_rows() {
            let d_q = gradients.row(args, &row, mem_q.row(&row.at), group);
            gradients.d_mem_q.iter_mut().for_each(|to| to.row_mut(&row.at).copy_from_slice(&d_q));
        }
    }
    Ok(gradients)
}

/// What a group of rows gave, and the loss's gradients with respect to that.
struct Group<'a> {
    rows: &'a Rows,
    d_o: Option<&'a Array<5>>,
    d_lse: Option<&'a Array<4>>,
}

impl<'a> Group<'a> {
    /// `shape`: of the group's o, where there are such rows.
    fn new(
        [o, lse, d_o_field, d_lse_field]: [&'static str; 4],
        shape: Option<[usize; 5]>,
        rows: &'a Option<Rows>,
        d_o: Option<&'a Array<5>>,
        d_lse: Option<&'a Array<4>>,
    ) -> Result<Option<Self>> {
        let [batch, blocks, count, heads, d] = shape.unwrap_or([0; 5]);
        let (o_shape, lse_shape) = ([batch, blocks, count, heads, d], [batch, blocks, count, heads]);
        d_o.map_or(Ok(()), |d_o| d_o.check(d_o_field, o_shape))?;
        d_lse.map_or(Ok(()), |d_lse| d_lse.check(d_lse_field, lse_shape))?;
        if shape.is_none() {
            return Ok(None);
        }
        check(o, "none", rows.is_some(), "needed where there are queries")?;
        rows.as_ref().map_or(Ok(()), |rows| rows.o.check(o, o_shape).and_then(|()| rows.lse.check(lse, lse_shape)))?;
        Ok(rows.as_ref().map(|rows| Group { rows, d_o, d_lse }))
    }
}

impl AttendGradients {
    /// Adds what one row passes on to keys, values and sink; the gradient of its query `q`.
    fn row(&mut self, args: &Attend, row: &Row, q: &[f64], group: &Group) -> Vec<f64> {
        let mut d_q = vec![0.0; q.len()];
        let (scale, lse) = (args.scale(), group.rows.lse[row.at]);
        if lse == f64::NEG_INFINITY {
            return d_q;
        }
        let zero = vec![0.0; q.len()];
        let d_o = group.d_o.map_or(&*zero, |d_o| d_o.row(&row.at));
        let d_lse = group.d_lse.map_or(0.0, |d_lse| d_lse[row.at]);
        let delta = dot(d_o, group.rows.o.row(&row.at));

        // The sink is a logit, and its value is 0.
        if let (Some(d_sink), Some(sink)) = (&mut self.d_sink, args.sink(row.at[3])) {
            d_sink[row.at[3]] += (sink - lse).exp() * (d_lse - delta);
        }

        let mut pass = |(k, v): Key, d_k: &mut [f64], d_v: &mut [f64]| {
            let p = (scale * dot(q, k) - lse).exp();
            // A hidden key may hold an infinity.
            if p > 0.0 {
                let d_logit = p * (dot(d_o, v) - delta + d_lse);
                add(d_v, p, d_o);
                add(d_k, scale * d_logit, q);
                add(&mut d_q, scale * d_logit, k);
            }
        };
        let (memory, tokens) = args.key_places(row);
        if let (Some(k), Some(v), Some(d_k), Some(d_v)) = (args.mem_k, args.mem_v, &mut self.d_mem_k, &mut self.d_mem_v) {
            memory.for_each(|at| pass((k.row(&at), v.row(&at)), d_k.row_mut(&at), d_v.row_mut(&at)));
        }
        tokens.for_each(|at| pass((args.k.row(&at), args.v.row(&at)), self.d_k.row_mut(&at), self.d_v.row_mut(&at)));
        d_q
    }
}

/// a·b.
pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// to += factor · x.
pub(crate) fn add(to: &mut [f64], factor: f64, x: &[f64]) {
    to.iter_mut().zip(x).for_each(|(to, x)| *to += factor * x);
}
