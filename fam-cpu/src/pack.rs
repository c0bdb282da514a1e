//! From strided rows of any element type to f32 in the forms that [`crate::product`] reads.
//!
//! | form | of | as |
//! |---|---|---|
//! | panel, `[dp][W]` | rows (`q`, σ(q), sums): a lane is a row, W of them | vectors |
//! | tile, `[keys][stride]` | keys, values, `m` | broadcasts |
//!
//! `dp` is D rounded up to [`PAD`] elements and `W` is `MR` vectors. A tile is read where it lies if it is f32 and dense; else it is copied.

use crate::memory::HeadRows;
use crate::product::Broadcast;
use crate::vector::Vector;
use fam_core::{Element, bf16, f16, mutate};
use half::slice::HalfFloatSliceExt;
use std::ops::Range;

/// Rows of a tile are padded to a multiple of this: the lanes of the widest level.
pub(crate) const PAD: usize = 16;

/// D rounded up to [`PAD`].
pub(crate) fn padded(head_dim: usize) -> usize {
    head_dim.next_multiple_of(PAD)
}

/// Runs `$work` with `$T` the element type of a plan's dtype.
macro_rules! with_element {
    ($plan:expr, $T:ident => $work:expr) => {
        match fam_core::Plan::spec($plan).shape().dtype() {
            fam_core::Dtype::F32 => {
                type $T = f32;
                $work
            }
            fam_core::Dtype::F16 => {
                type $T = fam_core::f16;
                $work
            }
            fam_core::Dtype::Bf16 => {
                type $T = fam_core::bf16;
                $work
            }
            other => unreachable!("refused when the plan was made: {other}"),
        }
    };
}
pub(crate) use with_element;

/// Conversions of whole rows.
pub(crate) trait Convert: Element {
    /// The exact values.
    fn widen(from: &[Self], to: &mut [f32]);
    /// The nearest values, ties to even.
    fn narrow(from: &[f32], to: &mut [Self]);
    /// The same memory, if it is f32.
    fn as_f32(of: &[Self]) -> Option<&[f32]>;
}

impl Convert for f32 {
    #[inline(always)]
    fn widen(from: &[f32], to: &mut [f32]) {
        to.copy_from_slice(from);
    }
    #[inline(always)]
    fn narrow(from: &[f32], to: &mut [f32]) {
        to.copy_from_slice(from);
    }
    #[inline(always)]
    fn as_f32(of: &[f32]) -> Option<&[f32]> {
        Some(of)
    }
}

impl Convert for f16 {
    #[inline(always)]
    fn widen(from: &[f16], to: &mut [f32]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = widen_f16(*from);
        }
    }
    #[inline(always)]
    fn narrow(from: &[f32], to: &mut [f16]) {
        to.convert_from_f32_slice(from);
    }
    #[inline(always)]
    fn as_f32(_: &[f16]) -> Option<&[f32]> {
        None
    }
}

impl Convert for bf16 {
    #[inline(always)]
    fn widen(from: &[bf16], to: &mut [f32]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = f32::from_bits(u32::from(from.to_bits()) << 16);
        }
    }
    #[inline(always)]
    fn narrow(from: &[f32], to: &mut [bf16]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = mutate!("attend-truncated", bf16::from_f32(*from), bf16::from_bits((from.to_bits() >> 16) as u16));
        }
    }
    #[inline(always)]
    fn as_f32(_: &[bf16]) -> Option<&[f32]> {
        None
    }
}

/// The exact value, in operations that a loop does for all lanes of a vector at once: with its fraction and exponent moved to where f32
/// has them, a number is too small by 2⁻¹¹², subnormal ones included.
#[inline(always)]
fn widen_f16(x: f16) -> f32 {
    let bits = u32::from(x.to_bits());
    let number = f32::from_bits((bits & 0x7fff) << 13) * 2f32.powi(112);
    let is_finite = bits & 0x7c00 != 0x7c00;
    let magnitude = if is_finite { number.to_bits() } else { (bits & 0x03ff) << 13 | 0x7f80_0000 };
    f32::from_bits((bits & 0x8000) << 16 | magnitude)
}

/// Packs one row: its channels, then zeros.
#[inline(always)]
pub(crate) fn row<T: Convert>(from: &[T], to: &mut [f32]) {
    let (channels, rest) = to.split_at_mut(from.len());
    T::widen(from, channels);
    rest.fill(0.0);
}

/// Elements of the buffer in which the rows of a vector are transposed.
pub(crate) const fn stage(dp: usize) -> usize {
    PAD * dp
}

/// Packs `count` rows into a panel, times `factor`. The last vector's absent rows are 0; further vectors are left as they are.
#[inline(always)]
pub(crate) fn panel<'r, V: Vector, T: Convert>(
    rows: impl Fn(usize) -> &'r [T],
    count: usize,
    factor: f32,
    stage: &mut [f32],
    to: &mut [f32],
) {
    let (width, dp) = (V::MR * V::LANES, to.len() / (V::MR * V::LANES));
    for first in (0..count).step_by(V::LANES) {
        for (r, stage) in (first..).zip(stage.chunks_exact_mut(dp).take(V::LANES)) {
            match r < count {
                true => row(rows(r), stage),
                false => stage.fill(0.0),
            }
            if factor != 1.0 {
                stage.iter_mut().for_each(|x| *x *= factor);
            }
        }
        for c in (0..dp).step_by(V::LANES) {
            V::transpose(&stage[c..], dp, &mut to[c * width + first..], width);
        }
    }
}

/// Hands out the rows of a panel: [`panel`]'s inverse.
#[inline(always)]
pub(crate) fn unpack<V: Vector>(panel: &[f32], count: usize, stage: &mut [f32], mut each: impl FnMut(usize, &[f32])) {
    let (width, dp) = (V::MR * V::LANES, panel.len() / (V::MR * V::LANES));
    for first in (0..count).step_by(V::LANES) {
        for c in (0..dp).step_by(V::LANES) {
            V::transpose(&panel[c * width + first..], width, &mut stage[c..], dp);
        }
        for (r, stage) in (first..count).zip(stage.chunks_exact(dp).take(V::LANES)) {
            each(r, stage);
        }
    }
}

/// Keys, values or rows of `m`, as f32.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    pub data: &'a [f32],
    pub stride: usize,
}

impl<'a> Rows<'a> {
    /// Rows `range` of a cache, where they lie or copied to `buffer`, `[rows][dp]`.
    ///
    /// Rows that are further apart than they are long would share few sets of L1: a tile of them does not stay there, and the prefetcher
    /// brings what nobody reads.
    #[inline(always)]
    pub fn of<T: Convert>(rows: &HeadRows<'a, T>, range: Range<u64>, dp: usize, buffer: &'a mut [f32]) -> Self {
        let count = (range.end - range.start) as usize;
        if let Some((run, stride)) = rows.run(range.start, count)
            && stride <= dp
            && let Some(data) = T::as_f32(run)
        {
            return Rows { data, stride };
        }
        for (index, to) in range.zip(buffer.chunks_exact_mut(dp)) {
            row(rows.get(index), to);
        }
        Rows { data: buffer, stride: dp }
    }

    /// Sums over the channels of each row.
    #[inline(always)]
    pub fn over_channels(self) -> Broadcast<'a> {
        Broadcast { data: self.data, i: self.stride, k: 1 }
    }

    /// Sums over the rows of each channel.
    #[inline(always)]
    pub fn over_rows(self) -> Broadcast<'a> {
        Broadcast { data: self.data, i: 1, k: self.stride }
    }
}

#[cfg(test)]
mod tests {
    use super::Convert;
    use fam_core::{bf16, f16};

    #[test]
    fn widening_is_exact() {
        for bits in 0..=u16::MAX {
            let (half, brain) = (f16::from_bits(bits), bf16::from_bits(bits));
            let mut wide = [0.0; 2];
            f16::widen(&[half], &mut wide[..1]);
            bf16::widen(&[brain], &mut wide[1..]);
            for (got, want) in wide.into_iter().zip([half.to_f32(), brain.to_f32()]) {
                assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(), "{bits:#x}: {got} {want}");
            }
        }
    }
}
