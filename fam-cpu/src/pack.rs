//! From strided rows of any element type to dense tiles of f32.
//!
//! | tile | form | read by |
//! |---|---|---|
//! | rows (`q`, σ(q)) | `[rows][dp]` | broadcasts |
//! | `k` | panels of `LANES` keys, each `[D][LANES]` | [`crate::product::logits`]: a lane is a key |
//! | `v`, `m` | `[keys][dp]` | [`crate::product::accumulate`]: a lane is a channel |
//!
//! `dp` is D rounded up to [`PAD`] elements, so that no kernel has a tail.

use crate::memory::HeadRows;
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
}

impl Convert for f16 {
    #[inline(always)]
    fn widen(from: &[f16], to: &mut [f32]) {
        from.convert_to_f32_slice(to);
    }
    #[inline(always)]
    fn narrow(from: &[f32], to: &mut [f16]) {
        to.convert_from_f32_slice(from);
    }
}

impl Convert for bf16 {
    #[inline(always)]
    fn widen(from: &[bf16], to: &mut [f32]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = from.to_f32();
        }
    }
    #[inline(always)]
    fn narrow(from: &[f32], to: &mut [bf16]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = mutate!("attend-truncated", bf16::from_f32(*from), bf16::from_bits((from.to_bits() >> 16) as u16));
        }
    }
}

/// Packs one row: its channels, then `pad`.
#[inline(always)]
pub(crate) fn row<T: Convert>(from: &[T], to: &mut [f32], pad: f32) {
    let (channels, rest) = to.split_at_mut(from.len());
    T::widen(from, channels);
    rest.fill(pad);
}

/// Packs values `range` of a tile whose row 0 is row `first` of `rows`. Others are left as they are: no kernel reads them.
#[inline(always)]
pub(crate) fn values<T: Convert>(rows: &HeadRows<'_, T>, first: u64, range: Range<usize>, dp: usize, to: &mut [f32]) {
    for (key, to) in range.clone().zip(to[range.start * dp..].chunks_exact_mut(dp)) {
        row(rows.get(first.wrapping_add(key as u64)), to, 0.0);
    }
}

/// Packs keys `range` of a tile, as [`values`] does, into panels; absent keys of a panel become 0. `rows_of_panel` is a buffer of `LANES`
/// rows of `d`: a panel's rows are widened first, then transposed from L1.
#[inline(always)]
pub(crate) fn keys<V: Vector, T: Convert>(
    rows: &HeadRows<'_, T>,
    first: u64,
    range: Range<usize>,
    d: usize,
    rows_of_panel: &mut [f32],
    to: &mut [f32],
) {
    for p in range.start / V::LANES..range.end.div_ceil(V::LANES) {
        for (lane, to) in rows_of_panel.chunks_exact_mut(d).take(V::LANES).enumerate() {
            let key = p * V::LANES + lane;
            match range.contains(&key) {
                true => T::widen(rows.get(first.wrapping_add(key as u64)), to),
                false => to.fill(0.0),
            }
        }
        let panel = to[p * d * V::LANES..][..d * V::LANES].chunks_exact_mut(V::LANES);
        for (c, to) in panel.enumerate() {
            for lane in 0..V::LANES {
                to[lane] = rows_of_panel[lane * d + c];
            }
        }
    }
}
