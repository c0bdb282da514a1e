//! What the tensors of a case are filled with. A kernel that is right on one normal distribution can be wrong on every page of this file.

use crate::rng::Rng;
use fam_core::{Dtype, Element, Op, bf16, f16};

/// A family of inputs. Every value is exact in the dtype that it is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Distribution {
    /// Independent normal values.
    Normal,
    /// Independent uniform values in [−1, 1).
    Uniform,
    /// Normal with q and k eight times as large: one or two keys carry a row.
    Sharp,
    /// Logits around 10⁵, exact in f32.
    Logit1e5,
    /// Logits around 10⁶, exact in f32.
    Logit1e6,
    /// q and v at the largest value of f16 (65504; 65280 in bf16), logits exact in f32.
    F16Limit,
    /// q·k up to the largest power of two of f32 (2²³ in f16), brought back by the scale to logits of −127 … 127; and v such that Σ|v| over
    /// the visible keys stays just below the largest value.
    F32Limit,
    /// All logits exactly 133120.
    EqualHuge,
    /// One key that carries all the weight: the first, the last, or one at the edge of a tile.
    Needle,
    /// The same key everywhere: uniform weights.
    ConstantK,
    /// The same value everywhere: the output is that value.
    ConstantV,
    /// Some of q, k, v are 0.
    Zeros,
    /// Logits that rise with the position: every tile brings a new maximum.
    Ascending,
    /// Logits that fall with the position.
    Descending,
    /// Logits that rise and fall.
    Sawtooth,
    /// Several keys share the maximum exactly.
    EqualMaxima,
    /// A few channels are far larger than the rest.
    OutlierChannels,
    /// All logits share a large offset.
    Offset,
    /// Denormal q, k and v.
    Denormals,
    /// Exponents over the whole range that products survive, 2⁻²⁰ … 2²⁰ (2¹⁴ in f16).
    Exponents,
    /// Small integers and powers of two.
    Integers,
    /// Normal, and one value in a thousand a hundred times larger.
    Spikes,
    /// v alternates between ±10⁴: the outputs cancel.
    AlternatingV,
    /// Normal with NaN or ±inf at random places of one tensor.
    NonFinite,
    /// Logits of ±(88 + {0, 1, 2}), where exp in f32 overflows, among the lowest ones that there are.
    Adversary,
}

use Distribution::*;

impl Distribution {
    /// Every distribution.
    pub const ALL: [Distribution; 25] = [
        Normal,
        Uniform,
        Sharp,
        Logit1e5,
        Logit1e6,
        F16Limit,
        F32Limit,
        EqualHuge,
        Needle,
        ConstantK,
        ConstantV,
        Zeros,
        Ascending,
        Descending,
        Sawtooth,
        EqualMaxima,
        OutlierChannels,
        Offset,
        Denormals,
        Exponents,
        Integers,
        Spikes,
        AlternatingV,
        NonFinite,
        Adversary,
    ];

    /// The name printed in cases and coverage tables.
    pub fn name(self) -> &'static str {
        match self {
            Normal => "normal",
            Uniform => "uniform",
            Sharp => "sharp",
            Logit1e5 => "logit-1e5",
            Logit1e6 => "logit-1e6",
            F16Limit => "f16-limit",
            F32Limit => "f32-limit",
            EqualHuge => "equal-huge",
            Needle => "needle",
            ConstantK => "constant-k",
            ConstantV => "constant-v",
            Zeros => "zeros",
            Ascending => "ascending",
            Descending => "descending",
            Sawtooth => "sawtooth",
            EqualMaxima => "equal-maxima",
            OutlierChannels => "outlier-channels",
            Offset => "offset",
            Denormals => "denormals",
            Exponents => "exponents",
            Integers => "integers",
            Spikes => "spikes",
            AlternatingV => "alternating-v",
            NonFinite => "non-finite",
            Adversary => "adversary",
        }
    }

    /// Whether logits are exact in f32, so that the bound is taken with S = 40: the largest distance from the maximum that still
    /// carries weight. The products of such q and k are small integers times one power of two, and so is their sum in any order.
    pub fn has_exact_logits(self) -> bool {
        matches!(self, Logit1e5 | Logit1e6 | F16Limit | F32Limit | EqualHuge | Adversary)
    }

    /// The distribution for un-rotated queries and keys beside one that shapes logits: the compressive memory has none.
    pub(crate) fn without_logits(self) -> Self {
        match self {
            Logit1e5 | Logit1e6 | F16Limit | F32Limit | EqualHuge | Needle | Ascending | Descending | Sawtooth | EqualMaxima
            | Adversary => Normal,
            other => other,
        }
    }

    /// The distribution of the gradients that arrive beside it: of ordinary size where values lie at the end of what there is, since
    /// products of two such leave f32.
    pub(crate) fn upstream(self) -> Self {
        match self {
            F16Limit | F32Limit | Denormals | NonFinite => Normal,
            other => other,
        }
    }

    /// The distributions that say something about `op`.
    pub fn of(op: Op) -> Vec<Distribution> {
        let all = Self::ALL.into_iter();
        match op {
            Op::InfiniRead | Op::InfiniWrite | Op::InfiniReadBackward | Op::InfiniWriteBackward => {
                all.filter(|d| d.without_logits() == *d).collect()
            }
            // Of a part only o and lse are seen: no keys, no queries.
            Op::Merge | Op::MergeBackward => all
                .filter(|d| !matches!(d, F16Limit | F32Limit | Needle | ConstantK | Ascending | Descending | Sawtooth))
                .collect(),
            _ => all.collect(),
        }
    }
}

/// The nearest value of `dtype`, finite values kept finite.
pub(crate) fn round(value: f64, dtype: Dtype) -> f64 {
    if !value.is_finite() {
        return value;
    }
    let value = value.clamp(-largest(dtype), largest(dtype)) as f32;
    match dtype {
        Dtype::F16 => f16::from_f32(value).to_f32().into(),
        Dtype::Bf16 => bf16::from_f32(value).to_f32().into(),
        _ => value.into(),
    }
}

/// The largest finite value of `dtype`.
pub(crate) fn largest(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F16 => f16::MAX.into(),
        Dtype::Bf16 => bf16::MAX.into(),
        _ => f32::MAX.into(),
    }
}

/// 2^e, exactly. −1022 ≤ e ≤ 1023.
pub(crate) fn exp2(e: i64) -> f64 {
    f64::from_bits(((1023 + e) as u64) << 52)
}

/// The scale of [`Distribution::F32Limit`]: logits of up to 127 are then q·k of up to 2⁷ / scale.
pub(crate) fn limit_scale(dtype: Dtype) -> f64 {
    exp2(if dtype == Dtype::F16 { -16 } else { -120 })
}

/// Memory keys that a row may see beside those of tokens.
const MOST_MEMORY: usize = 64;

/// Draws rows of q, k and v of one case.
pub(crate) struct Source {
    distribution: Distribution,
    dtype: Dtype,
    scale: f64,
    keys: usize,
    rng: Rng,
    /// ±√(1/(D·|scale|)): scale·base·base = ±1, so that k = c·base makes a logit of c.
    base: Vec<f64>,
    /// Per channel: an exponent (`Exponents`), or whether it is an outlier.
    channels: Vec<i64>,
    /// One of the distribution's forms.
    form: usize,
    /// The repeated row of `ConstantK` and `ConstantV`, per head.
    constant: Vec<Vec<f64>>,
}

impl Source {
    /// Rows of `head_dim` values; logits are q·k·`scale`, over `keys` keys of tokens.
    pub fn new(
        distribution: Distribution,
        dtype: Dtype,
        [heads, head_dim]: [usize; 2],
        scale: f64,
        keys: usize,
        mut rng: Rng,
    ) -> Self {
        let scale_or_1 = if scale == 0.0 { 1.0 } else { scale.abs() };
        let length = (1.0 / (head_dim as f64 * scale_or_1)).sqrt();
        let base = (0..head_dim).map(|_| length * rng.sign()).collect();
        let limit = if dtype == Dtype::F16 { 14 } else { 20 };
        let channels = (0..head_dim).map(|_| rng.between(-limit, limit)).collect();
        let constant = (0..heads).map(|_| (0..head_dim).map(|_| rng.normal()).collect()).collect();
        let form = rng.below(64);
        Source { distribution, dtype, scale: scale_or_1, keys: keys.max(1), rng, base, channels, form, constant }
    }

    /// The same family drawn on from another generator: another tensor.
    pub fn reseed(&mut self, rng: Rng) {
        self.rng = rng;
    }

    /// A query row.
    pub fn query(&mut self, row: &mut [f64]) {
        let d = row.len();
        let one_hot = self.form % d;
        let unit = self.logit_unit();
        for (c, x) in row.iter_mut().enumerate() {
            let rng = &mut self.rng;
            let value = match self.distribution {
                Uniform => 2.0 * rng.unit() - 1.0,
                Sharp => 8.0 * rng.normal(),
                Logit1e5 | Logit1e6 => rng.between(-7, 7) as f64 * exp2(unit / 2),
                F16Limit => rng.sign() * self.f16_limit(),
                F32Limit => self.hot(c, one_hot, (1.0 / self.scale).sqrt()),
                EqualHuge => self.hot(c, one_hot, 4.0 / self.scale),
                Adversary => self.hot(c, one_hot, 1.0 / self.scale),
                Needle | Ascending | Descending | Sawtooth => self.base[c] + 0.02 * rng.normal() * self.base[c],
                EqualMaxima => self.base[c],
                Zeros if self.form & 1 == 1 => 0.0,
                OutlierChannels => rng.normal() * self.outlier(c, 20.0),
                Offset => self.base[c] * self.offset().sqrt(),
                Denormals => self.denormal(),
                Exponents => rng.sign() * exp2(self.channels[c]) * rng.pick(&[0.5, 1.0, 2.0]),
                Integers => rng.between(-2, 2) as f64,
                _ => rng.normal() * spike(self.distribution, rng),
            };
            *x = round(value, self.dtype);
        }
    }

    /// The key row of head `h` at place `t` of the keys' order.
    pub fn key(&mut self, t: usize, h: usize, row: &mut [f64]) {
        let d = row.len();
        let one_hot = self.form % d;
        let logit = self.logit(t);
        let (unit, offset) = (self.logit_unit(), self.offset());
        for (c, x) in row.iter_mut().enumerate() {
            let rng = &mut self.rng;
            let value = match self.distribution {
                Uniform => 2.0 * rng.unit() - 1.0,
                Sharp => 8.0 * rng.normal(),
                Logit1e5 | Logit1e6 => rng.between(-7, 7) as f64 * exp2(unit - unit / 2),
                F16Limit => rng.between(-2, 2) as f64,
                F32Limit => self.hot(c, one_hot, logit * (1.0 / self.scale).sqrt()),
                EqualHuge => self.hot(c, one_hot, 33280.0),
                Adversary => self.hot(c, one_hot, logit),
                Needle | Ascending | Descending | Sawtooth => self.base[c] * logit + 0.5 * self.base[c] * rng.normal(),
                EqualMaxima => self.base[c] * logit,
                Zeros if self.form & 2 == 2 => 0.0,
                ConstantK => self.constant[h][c],
                OutlierChannels => rng.normal() * self.outlier(c, 20.0),
                Offset => -self.base[c] * offset.sqrt() + 0.5 * rng.normal(),
                Denormals => self.denormal(),
                Exponents => rng.sign() * exp2(-self.channels[c]) * rng.pick(&[0.5, 1.0, 2.0]),
                Integers => rng.between(-2, 2) as f64,
                _ => rng.normal() * spike(self.distribution, rng),
            };
            *x = round(value, self.dtype);
        }
    }

    /// The value row of head `h` at place `t` of the keys' order.
    pub fn value(&mut self, t: usize, h: usize, row: &mut [f64]) {
        for (c, x) in row.iter_mut().enumerate() {
            let rng = &mut self.rng;
            let value = match self.distribution {
                Uniform => 2.0 * rng.unit() - 1.0,
                F16Limit => rng.sign() * self.f16_limit(),
                F32Limit => rng.sign() * (0.9 + 0.1 * rng.unit()) * 0.99 * largest(self.dtype) / (self.keys + MOST_MEMORY) as f64,
                ConstantV => self.constant[h][c],
                Zeros if self.form & 4 == 4 || self.form & 3 == 0 => 0.0,
                OutlierChannels => rng.normal() * self.outlier(c, 60.0),
                // Within a few bits of the smallest normal number: a flushed denormal is far beyond the bound.
                Denormals if self.dtype != Dtype::F16 => rng.sign() * (1.0 + rng.unit()) * exp2(rng.between(-129, -124)),
                Denormals => self.denormal(),
                Exponents => {
                    let high = if self.dtype == Dtype::F16 { 14 } else { 20 };
                    rng.sign() * exp2(rng.between(-20, high))
                }
                Integers => rng.sign() * exp2(rng.between(-1, 2)),
                AlternatingV => 1e4 * if t.is_multiple_of(2) { 1.0 } else { -1.0 },
                _ => rng.normal() * spike(self.distribution, rng),
            };
            *x = round(value, self.dtype);
        }
    }

    /// The logit that the key at place `t` is to have.
    fn logit(&mut self, t: usize) -> f64 {
        let along = (t % self.keys) as f64 / self.keys as f64;
        let range = [20.0, 80.0, 200.0][self.form % 3];
        match self.distribution {
            Needle => {
                let place = [0, self.keys - 1, 15, 16, 17, 31, 32, 33, 63, 64][self.form % 10];
                if t == place % self.keys { 30.0 } else { 0.0 }
            }
            Ascending => range * along,
            Descending => range * (1.0 - along),
            Sawtooth => range * ((t % 11) as f64 / 11.0),
            EqualMaxima => 8.0 * f64::from(u8::from(self.rng.chance(1, 3))),
            F32Limit => self.rng.between(-127, 127) as f64,
            Adversary if self.rng.chance(1, 8) => self.rng.sign() * (88.0 + self.rng.below(3) as f64),
            // A quarter of the lowest: headroom for a kernel that works in base 2.
            Adversary => -largest(self.dtype) / 4.0,
            _ => 0.0,
        }
    }

    /// e such that 2^e products of two integers in −7 ..= 7, D of them added, make a logit around 10⁵ or 10⁶.
    fn logit_unit(&self) -> i64 {
        let target = if self.distribution == Logit1e5 { 1e5 } else { 1e6 };
        let sum = 18.7 * (self.base.len() as f64).sqrt() * self.scale;
        (0..).find(|&e| exp2(e) * sum >= target).unwrap_or(0)
    }

    fn f16_limit(&self) -> f64 {
        if self.dtype == Dtype::Bf16 { 65280.0 } else { 65504.0 }
    }

    fn hot(&self, c: usize, one_hot: usize, value: f64) -> f64 {
        if c == one_hot { value } else { 0.0 }
    }

    fn outlier(&self, c: usize, factor: f64) -> f64 {
        if c == self.form % self.channels.len() || self.channels[c] == 3 { factor } else { 1.0 }
    }

    fn offset(&self) -> f64 {
        [100.0, 400.0, 2000.0][self.form % 3]
    }

    fn denormal(&mut self) -> f64 {
        let j = self.rng.between(-127, 127) as f64;
        match self.dtype {
            Dtype::F16 => j * 8.0 * exp2(-24),
            _ => j * exp2(-133),
        }
    }
}

fn spike(distribution: Distribution, rng: &mut Rng) -> f64 {
    if distribution == Spikes && rng.chance(1, 1000) { 100.0 } else { 1.0 }
}

impl std::fmt::Display for Distribution {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Writes `values` as elements of `dtype`, little-endian as every device of this workspace reads them.
pub(crate) fn encode(values: &[f64], dtype: Dtype, bytes: &mut [u8]) {
    fn each<T: Element>(values: &[f64], bytes: &mut [u8]) {
        for (value, out) in values.iter().zip(bytes.chunks_exact_mut(size_of::<T>())) {
            out.copy_from_slice(bytemuck::bytes_of(&T::from_f32(*value as f32)));
        }
    }
    match dtype {
        Dtype::F16 => each::<f16>(values, bytes),
        Dtype::Bf16 => each::<bf16>(values, bytes),
        _ => each::<f32>(values, bytes),
    }
}

/// Reads elements of `dtype`.
pub(crate) fn decode(bytes: &[u8], dtype: Dtype, values: &mut [f64]) {
    fn each<T: Element>(bytes: &[u8], values: &mut [f64]) {
        for (value, raw) in values.iter_mut().zip(bytes.chunks_exact(size_of::<T>())) {
            *value = bytemuck::pod_read_unaligned::<T>(raw).to_f32().into();
        }
    }
    match dtype {
        Dtype::F16 => each::<f16>(bytes, values),
        Dtype::Bf16 => each::<bf16>(bytes, values),
        _ => each::<f32>(bytes, values),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every distribution stays within the dtype, is exact in it, and where it says so has logits that f32 sums exactly.
    #[test]
    fn values_are_exact() {
        for distribution in Distribution::ALL {
            for dtype in Dtype::ALL {
                for (d, seed) in [(1, 0u64), (7, 1), (64, 2), (256, 3)] {
                    let scale = if distribution == F32Limit { limit_scale(dtype) } else { 0.5 };
                    let mut source = Source::new(distribution, dtype, [2, d], scale, 40, Rng::new(seed));
                    let (mut q, mut k, mut v) = (vec![0.0; d], vec![0.0; d], vec![0.0; d]);
                    for t in 0..40 {
                        source.query(&mut q);
                        source.key(t, 1, &mut k);
                        source.value(t, 0, &mut v);
                        for x in q.iter().chain(&k).chain(&v) {
                            assert!(x.is_finite() && *x == round(*x, dtype), "{distribution} {dtype} {x}");
                        }
                        if distribution.has_exact_logits() {
                            let exact: f64 = q.iter().zip(&k).map(|(q, k)| q * k).sum();
                            let rounded: f32 = q.iter().zip(&k).map(|(q, k)| *q as f32 * *k as f32).sum();
                            assert_eq!(exact, f64::from(rounded), "{distribution} {dtype}");
                        }
                    }
                }
            }
        }
    }
}
