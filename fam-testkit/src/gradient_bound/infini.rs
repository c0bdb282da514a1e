//! The bounds of the compressive memory's gradients: of a row's read, of the gate, and of one segment's write.
//!
//! ```text
//! σ(x)        relative error   u·(3|x − shift| + 6) for x ≤ 0, 2u above, and 2⁻¹⁴⁹
//! g(β)        relative error   u·(3|β|(1 − g) + 8), and all of it where it is subnormal
//! w = s / (s·z), a = w m, A = d_a·a, d_s = (m d_a − z A) / (s·z)        first order in the errors of s and d_a, (D + 4) u for each sum
//! ```

use super::{Gradient, LEAST, dot, magnitude_of, products, within_f32};
use crate::attend::Reads;
use crate::case::Case;
use crate::data::{Data, Role};
use crate::distribution::exp2;
use crate::tolerance::{Level, U32};
use fam_core::{InfiniRule, Result};
use fam_ref::sigma;

/// σ of a row, up to a constant factor, with the bound of its error; `shift` is taken off where all of the row is ≤ 0.
fn feature(x: &[f64], may_shift: bool) -> Vec<[f64; 2]> {
    let most = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let shift = if may_shift { most.min(0.0) } else { 0.0 };
    let of = |x: &f64| {
        let s = sigma(x - shift);
        let relative = if *x > 0.0 { 2.0 } else { 3.0 * (x - shift).abs() + 6.0 };
        [s, U32 * relative * s + LEAST]
    };
    x.iter().map(of).collect()
}

/// dσ/dx where s is σ(x) or a multiple of it, with its error.
fn slope(x: f64, s: [f64; 2]) -> [f64; 2] {
    if x > 0.0 { [1.0, 0.0] } else { s }
}

/// A row's read differentiated, each quantity beside the bound of its error. Nothing where z is all 0.
struct Retrieval {
    a: Vec<[f64; 2]>,
    /// s_i / (s·z), and s·z.
    weight: Vec<[f64; 2]>,
    den: f64,
    /// d_a·a: the magnitude of its terms, and the error.
    through: [f64; 2],
    /// Of d_q, as `through`.
    d_q: Vec<[f64; 2]>,
    /// The largest magnitude on the way: d_a may meet m before the division or after it.
    peak: f64,
}

impl Retrieval {
    fn new(q: &[f64], m: &[f64], z: &[f64], d_a: &[[f64; 2]]) -> Option<Self> {
        if z.iter().all(|z| *z == 0.0) {
            return None;
        }
        let d = q.len();
        let (s, unit) = (feature(q, true), U32 * products(Level::Hard, d));
        let den = s.iter().zip(z).map(|([s, _], z)| s * z).sum::<f64>().abs();
        // Relative.
        let den_error = s.iter().zip(z).map(|([s, error], z)| (error + unit * s) * z.abs()).sum::<f64>() / den;
        let weight = |[s, error]: &[f64; 2]| [s / den, error / den + (den_error + 3.0 * U32) * s / den + LEAST];
        let weight: Vec<_> = s.iter().map(weight).collect();
        let column = |j: usize| {
            let (mut a, mut magnitude, mut error) = (0.0, 0.0, LEAST);
            for ([s, s_error], row) in s.iter().zip(m.chunks_exact(d)) {
                a += s * row[j];
                magnitude += s * row[j].abs();
                error += (s_error + unit * s) * row[j].abs() + LEAST;
            }
            ([a / den, error / den + (den_error + 2.0 * U32) * a.abs() / den + LEAST], magnitude)
        };
        let (a, sums): (Vec<_>, Vec<_>) = (0..d).map(column).unzip();
        let mut peak = sums.into_iter().fold(0.0, f64::max);
        let through = a.iter().zip(d_a).fold([0.0, LEAST], |[magnitude, error], ([a, a_error], [d_a, d_error])| {
            let term = (a * d_a).abs();
            [magnitude + term, error + a_error * (d_a.abs() + d_error) + a.abs() * d_error + unit * term + LEAST]
        });
        let largest = d_a.iter().fold(through[0], |largest, [d_a, _]| largest.max(d_a.abs()));
        peak = peak.max(largest).max(largest / den);
        let all = a.iter().zip(d_a).map(|([a, _], [d_a, _])| a * d_a).sum::<f64>();
        let d_q = (0..d).map(|i| {
            let (mut value, mut magnitude, mut error) = (-z[i] * all, z[i].abs() * through[0], z[i].abs() * through[1]);
            // Where the division comes first, its result may be subnormal.
            let mut divided = LEAST * z[i].abs();
            for (m, [d_a, d_error]) in m[i * d..][..d].iter().zip(d_a) {
                value += m * d_a;
                magnitude += (m * d_a).abs();
                error += m.abs() * d_error + LEAST;
                divided += LEAST * m.abs();
            }
            error += unit * magnitude;
            peak = peak.max(magnitude);
            let [slope, slope_error] = slope(q[i], s[i]);
            let d_s = [value.abs() / den, divided + error / den + (den_error + 2.0 * U32) * value.abs() / den];
            [slope * magnitude / den, (slope + slope_error) * d_s[1] + (slope_error + 2.0 * U32 * slope) * d_s[0] + LEAST]
        });
        let d_q = d_q.collect();
        Some(Retrieval { a, weight, den, through, d_q, peak })
    }

    /// Adds what the read passes to m and z.
    fn pass(&self, d_a: &[[f64; 2]], is_finite: bool, d_m: &mut Gradient, d_z: &mut Gradient, [n, i, kv]: [usize; 3]) {
        let error = |error: f64| if is_finite { within_f32(self.peak, error) } else { f64::INFINITY };
        let [all, all_error] = self.through;
        for (r, [w, w_error]) in self.weight.iter().enumerate() {
            let s = w * self.den;
            for (sum, [d_a, d_error]) in d_m.sums_mut([n, i, r, kv]).iter_mut().zip(d_a) {
                let term = (w * d_a).abs();
                sum.add(term, 0.0, error(w_error * (d_a.abs() + d_error) + w * d_error + 2.0 * U32 * term + LEAST * (1.0 + s)));
            }
            let of_z = error(w_error * (all + all_error) + w * all_error + 2.0 * U32 * w * all + LEAST * (1.0 + s));
            d_z.sums_mut([n, i, 0, kv])[r].add(w * all, 0.0, of_z);
        }
    }
}

/// g or 1 − g, with the bound of its error: below the least normal number it may be lost whole.
fn share(beta: f64) -> [f64; 2] {
    let g = fam_ref::gate(beta);
    let lost = if g < exp2(-126) { g + LEAST } else { 0.0 };
    [g, U32 * (3.0 * beta.abs() * (1.0 - g) + 8.0) * g + lost]
}

fn is_finite(of: &[&[f64]]) -> bool {
    of.iter().copied().flatten().all(|x| x.is_finite())
}

/// Gradients of `infini_read`.
#[derive(Clone, Debug)]
pub(crate) struct ReadBounds {
    pub d_q: Gradient,
    pub d_o_local: Gradient,
    pub d_m: Gradient,
    pub d_z: Gradient,
    pub d_beta: Gradient,
}

/// The reference's gradients of a case of `infini_read`, with their bounds.
///
/// # Errors
/// Where tensors do not fit each other.
pub(crate) fn read(case: &Case, data: &Data) -> Result<ReadBounds> {
    let zeros = |role| Gradient::zeros(case.sizes(role));
    let [d_q, d_o_local] = [Role::InfiniQ, Role::OLocal].map(zeros);
    let [d_m, d_z, d_beta] = [Role::M, Role::Z, Role::Beta].map(zeros);
    let mut bounds = ReadBounds { d_q, d_o_local, d_m, d_z, d_beta };
    let reads = Reads::new(case, data);
    let indices: Vec<_> = case
        .places(Role::OLocal)
        .into_iter()
        .flat_map(|place| (0..case.shape.heads()).map(move |h| [place.value[0], 0, place.value[2], h]))
        .collect();
    let row_is_finite = |at: [usize; 4]| {
        let (_, m, z) = reads.state(at);
        let of_row = [Role::InfiniQ, Role::OLocal, Role::DO].map(|role| data.get(role).row(&at));
        is_finite(&of_row) && is_finite(&[m, z, data.get(Role::Beta).row(&[0, 0, 0, at[3]])])
    };
    let kv_of = |[n, _, _, h]: [usize; 4]| [n, h / case.shape.group()];
    // What one row of a stream and kv head reads may reach all gradients of that stream and head.
    let reached: Vec<_> = indices.iter().filter(|at| !row_is_finite(**at)).map(|at| kv_of(*at)).collect();
    for at @ [n, _, _, h] in indices {
        let ((i, m, z), kv) = (reads.state(at), h / case.shape.group());
        let [q, o_local, d_o] = [Role::InfiniQ, Role::OLocal, Role::DO].map(|role| data.get(role).row(&at));
        let beta = data.get(Role::Beta).data[h];
        let is_finite = !reached.contains(&kv_of(at));
        let error = |error: f64| if is_finite { error } else { f64::INFINITY };

        // 1. What the reference gives.
        let a = fam_ref::infini_retrieve(q, m, z)?.a;
        let gate = fam_ref::gate_backward(beta, &a, o_local, d_o)?;
        let gradients = fam_ref::infini_retrieve_backward(q, m, z, &gate.d_a)?;
        bounds.d_q.value.row_mut(&at).copy_from_slice(&gradients.d_q);
        bounds.d_o_local.value.row_mut(&at).copy_from_slice(&gate.d_o_local);
        bounds.d_beta.value.data[h] += gate.d_beta;
        add_state(&mut bounds.d_m, &mut bounds.d_z, [n, i, kv], &gradients.d_m, &gradients.d_z);

        // 2. How far a kernel may be from it.
        let ([g, g_error], [rest, rest_error]) = (share(beta), share(-beta));
        let d_a: Vec<_> = d_o.iter().map(|d_o| [g * d_o, (g_error + U32 * g) * d_o.abs() + LEAST]).collect();
        let retrieval = Retrieval::new(q, m, z, &d_a);
        for (c, sum) in bounds.d_q.sums_mut(at).iter_mut().enumerate() {
            let ([magnitude, of_q], peak) = retrieval.as_ref().map_or(([0.0; 2], 0.0), |r| (r.d_q[c], r.peak));
            sum.add(magnitude, peak, error(of_q));
        }
        for (sum, d_o) in bounds.d_o_local.sums_mut(at).iter_mut().zip(d_o) {
            sum.add(rest * d_o.abs(), 0.0, error(rest_error * d_o.abs() + LEAST));
        }
        if let Some(retrieval) = &retrieval {
            retrieval.pass(&d_a, is_finite, &mut bounds.d_m, &mut bounds.d_z, [n, i, kv]);
        }
        let a_error = |c: usize| retrieval.as_ref().map_or(0.0, |r| r.a[c][1]);
        let total = magnitude_of(d_o, &a) + magnitude_of(d_o, o_local);
        let parts = d_o.iter().enumerate().map(|(c, d_o)| d_o.abs() * a_error(c) + LEAST).sum::<f64>();
        let parts = parts + U32 * products(Level::Hard, d_o.len()) * total;
        let of_gate = g * rest_error + rest * g_error + 2.0 * U32 * g * rest;
        let of_beta = (g + g_error) * (rest + rest_error) * parts + of_gate * total;
        bounds.d_beta.sums_mut([0, 0, 0, h])[0].add(g * rest * total, total, error(of_beta));
    }
    Ok(bounds)
}

fn add_state(d_m: &mut Gradient, d_z: &mut Gradient, [n, i, kv]: [usize; 3], of_m: &[f64], of_z: &[f64]) {
    let add = |to: &mut [f64], x: &[f64]| to.iter_mut().zip(x).for_each(|(to, x)| *to += x);
    let d = of_z.len();
    of_m.chunks_exact(d).enumerate().for_each(|(r, row)| add(d_m.value.row_mut(&[n, i, r, kv]), row));
    add(d_z.value.row_mut(&[n, i, 0, kv]), of_z);
}

/// Gradients of `infini_write`: what each segment adds to the entry that it read.
#[derive(Clone, Debug)]
pub(crate) struct WriteBounds {
    pub d_keys: [Gradient; 2],
    pub d_m: Gradient,
    pub d_z: Gradient,
}

/// One segment of one stream and head.
pub(crate) struct Segment<'a> {
    /// Stream, block of the call, and kv head.
    pub at: [usize; 3],
    /// Row of its first token in the keys' array; `None` where it is passed over.
    pub first: Option<usize>,
    /// The state that it read, and the gradient of the one that it wrote: `[D, D]` and `[D]`.
    pub m: &'a [f64],
    pub z: &'a [f64],
    pub d_m: &'a [f64],
    pub d_z: &'a [f64],
    /// Whether all is finite that the stream's segments of this head read.
    pub is_finite: bool,
}

impl WriteBounds {
    pub fn new(case: &Case) -> Self {
        let zeros = |role| Gradient::zeros(case.sizes(role));
        WriteBounds { d_keys: [Role::K, Role::V].map(zeros), d_m: zeros(Role::M), d_z: zeros(Role::Z) }
    }

    /// Adds a segment: the reference's gradients, and how far a kernel may be from them.
    ///
    /// # Errors
    /// Where tensors do not fit each other.
    pub fn segment(&mut self, case: &Case, data: &Data, segment: &Segment<'_>) -> Result<()> {
        let Segment { at: [n, i, kv], first, m, z, d_m, d_z, .. } = *segment;
        let d = z.len();
        // What is passed on, one term.
        let passed = if segment.is_finite { 0.0 } else { f64::INFINITY };
        for (r, row) in d_m.chunks_exact(d).enumerate() {
            self.d_m.sums_mut([n, i, r, kv]).iter_mut().zip(row).for_each(|(sum, x)| sum.add(x.abs(), 0.0, passed));
        }
        self.d_z.sums_mut([n, i, 0, kv]).iter_mut().zip(d_z).for_each(|(sum, x)| sum.add(x.abs(), 0.0, passed));
        let Some(first) = first else {
            add_state(&mut self.d_m, &mut self.d_z, segment.at, d_m, d_z);
            return Ok(());
        };
        let rule = case.shape.infini().unwrap_or(InfiniRule::Linear);
        let rows = |role| -> Vec<&[f64]> {
            (first..first + case.shape.block_len()).map(|r| data.get(role).row(&[n, 0, r, kv])).collect()
        };
        let (k, v) = (rows(Role::K), rows(Role::V));
        let gradients = fam_ref::infini_write_backward(rule, (&k, &v), (m, z), (d_m, d_z))?;
        add_state(&mut self.d_m, &mut self.d_z, segment.at, &gradients.d_m, &gradients.d_z);
        for (t, (k, v)) in k.iter().zip(&v).enumerate() {
            let at = [n, 0, first + t, kv];
            self.d_keys[0].value.row_mut(&at).copy_from_slice(&gradients.d_k[t]);
            self.d_keys[1].value.row_mut(&at).copy_from_slice(&gradients.d_v[t]);
            self.token(segment, rule, (k, v), at)?;
        }
        Ok(())
    }

    /// The bounds of what one token of a segment gets and gives.
    fn token(&mut self, segment: &Segment<'_>, rule: InfiniRule, (k, v): (&[f64], &[f64]), at: [usize; 4]) -> Result<()> {
        let Segment { m, z, d_m, d_z, .. } = *segment;
        let is_finite = segment.is_finite && is_finite(&[d_m, d_z]);
        let d = z.len();
        let (s, unit) = (feature(k, false), U32 * products(Level::Hard, d));
        let d_u = |j: usize| {
            let terms = s
                .iter()
                .zip(d_m.chunks_exact(d))
                .map(|([s, error], row)| [s * row[j], (error + unit * s) * row[j].abs() + LEAST]);
            terms.fold([0.0, 0.0, 0.0], |[sum, magnitude, error], [term, e]| [sum + term, magnitude + term.abs(), error + e])
        };
        let d_u: Vec<[f64; 3]> = (0..d).map(d_u).collect();
        // Where one channel of d_u leaves f32, so does all that is made of it.
        let most = d_u.iter().fold(0.0, |most: f64, [_, magnitude, _]| most.max(*magnitude));
        let error = |peak: f64, error: f64| if is_finite { within_f32(peak.max(most), error) } else { f64::INFINITY };
        for (sum, [_, magnitude, of_u]) in self.d_keys[1].sums_mut(at).iter_mut().zip(&d_u) {
            sum.add(*magnitude, 0.0, error(*magnitude, *of_u));
        }

        // u = v − a, where delta has read a.
        let d_a: Vec<_> = d_u.iter().map(|[sum, _, error]| [-sum, *error]).collect();
        let retrieval = if rule == InfiniRule::Delta { Retrieval::new(k, m, z, &d_a) } else { None };
        let u: Vec<_> = (0..d)
            .map(|j| {
                let [a, a_error] = retrieval.as_ref().map_or([0.0; 2], |r| r.a[j]);
                [v[j] - a, a_error + U32 * (v[j] - a).abs()]
            })
            .collect();
        for (i, sum) in self.d_keys[0].sums_mut(at).iter_mut().enumerate() {
            let row = &d_m[i * d..][..d];
            let values: Vec<f64> = u.iter().map(|[u, _]| *u).collect();
            let magnitude = magnitude_of(row, &values) + d_z[i].abs();
            let of_u = row.iter().zip(&u).map(|(d_m, [_, error])| d_m.abs() * error + LEAST).sum::<f64>();
            let d_s = dot(row, &values) + d_z[i];
            let [slope, slope_error] = slope(k[i], s[i]);
            let of_s = (slope + slope_error) * (of_u + unit * magnitude) + (slope_error + 2.0 * U32 * slope) * d_s.abs() + LEAST;
            let made_of = slope * (magnitude_of(row, v) + d_z[i].abs()) + slope * magnitude;
            sum.add_made_of(made_of, slope * magnitude, magnitude, error(magnitude, of_s));
            if let Some(retrieval) = &retrieval {
                let [magnitude, of_q] = retrieval.d_q[i];
                sum.add(magnitude, retrieval.peak, error(retrieval.peak, of_q));
            }
        }
        if let Some(retrieval) = &retrieval {
            retrieval.pass(&d_a, is_finite && most <= f64::from(f32::MAX), &mut self.d_m, &mut self.d_z, segment.at);
        }
        Ok(())
    }
}
