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
use crate::vector::{MAX_LANES, Vector};
use fam_core::{Element, bf16, f16, mutate};
use std::ops::Range;

/// Rows of a tile are padded to a multiple of this.
pub(crate) const PAD: usize = MAX_LANES;

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

/// Elements as lanes of f32.
pub(crate) trait Convert: Element {
    /// The exact values of the first `LANES` elements of `from`.
    fn load<V: Vector>(from: &[Self]) -> V;
    /// Writes the nearest values, ties to even, to the first `LANES` elements of `to`.
    fn store<V: Vector>(x: V, to: &mut [Self]);
    /// The same memory, if it is f32.
    fn as_f32(of: &[Self]) -> Option<&[f32]>;
}

impl Convert for f32 {
    #[inline(always)]
    fn load<V: Vector>(from: &[f32]) -> V {
        V::load(from)
    }
    #[inline(always)]
    fn store<V: Vector>(x: V, to: &mut [f32]) {
        x.store(to);
    }
    #[inline(always)]
    fn as_f32(of: &[f32]) -> Option<&[f32]> {
        Some(of)
    }
}

impl Convert for f16 {
    #[inline(always)]
    fn load<V: Vector>(from: &[f16]) -> V {
        V::load_f16(from)
    }
    #[inline(always)]
    fn store<V: Vector>(x: V, to: &mut [f16]) {
        x.store_f16(to);
    }
    #[inline(always)]
    fn as_f32(_: &[f16]) -> Option<&[f32]> {
        None
    }
}

impl Convert for bf16 {
    #[inline(always)]
    fn load<V: Vector>(from: &[bf16]) -> V {
        V::load_bf16(from)
    }
    #[inline(always)]
    fn store<V: Vector>(x: V, to: &mut [bf16]) {
        mutate!("attend-truncated", x.store_bf16(to), {
            let mut all = [0.0; PAD];
            x.store(&mut all);
            to.iter_mut().zip(&all[..V::LANES]).for_each(|(to, x)| *to = bf16::from_bits((x.to_bits() >> 16) as u16));
        });
    }
    #[inline(always)]
    fn as_f32(_: &[bf16]) -> Option<&[f32]> {
        None
    }
}

/// The `LANES` channels of a row from channel `c` on; 0 beyond its end.
#[inline(always)]
fn channels<V: Vector, T: Convert>(row: &[T], c: usize) -> V {
    match row.get(c..).unwrap_or_default() {
        from if from.len() >= V::LANES => T::load(from),
        from => {
            let mut channels = [0.0; PAD];
            channels.iter_mut().zip(from).for_each(|(to, x)| *to = x.to_f32());
            V::load(&channels)
        }
    }
}

/// Packs one row: its channels, then zeros. `to` is whole vectors.
#[inline(always)]
pub(crate) fn row<V: Vector, T: Convert>(from: &[T], to: &mut [f32]) {
    for (c, to) in to.chunks_exact_mut(V::LANES).enumerate() {
        channels::<V, T>(from, c * V::LANES).store(to);
    }
}

/// The inverse of [`row`]: rounds as many channels as `to` has, once.
#[inline(always)]
pub(crate) fn unpack_row<V: Vector, T: Convert>(from: &[f32], to: &mut [T]) {
    let rest = to.len() / V::LANES * V::LANES;
    for (from, to) in from.chunks_exact(V::LANES).zip(to.chunks_exact_mut(V::LANES)) {
        T::store(V::load(from), to);
    }
    to[rest..].iter_mut().zip(&from[rest..]).for_each(|(to, x)| *to = T::from_f32(*x));
}

/// Elements of the buffer in which the rows of a vector are transposed.
pub(crate) const fn stage(dp: usize) -> usize {
    PAD * dp
}

/// Packs `count` rows into a panel, times `factor`. The last vector's absent rows are 0; further vectors are left as they are.
#[inline(always)]
pub(crate) fn panel<'r, V: Vector, T: Convert>(rows: impl Fn(usize) -> &'r [T], count: usize, factor: f32, to: &mut [f32]) {
    let (width, dp) = (V::MR * V::LANES, to.len() / (V::MR * V::LANES));
    for first in (0..count).step_by(V::LANES) {
        let rows: [&[T]; MAX_LANES] = std::array::from_fn(|r| if first + r < count { rows(first + r) } else { &[] });
        for c in (0..dp).step_by(V::LANES) {
            let mut square = [V::splat(0.0); MAX_LANES];
            for r in 0..V::LANES {
                square[r] = channels::<V, T>(rows[r], c).mul(V::splat(factor));
            }
            let columns = V::transpose(square);
            for j in 0..V::LANES {
                columns[j].store(&mut to[(c + j) * width + first..]);
            }
        }
    }
}

/// The rows of a panel's vector that begins at lane `first`, `[LANES][dp]`: [`panel`]'s inverse.
#[inline(always)]
pub(crate) fn unpack<V: Vector>(panel: &[f32], first: usize, to: &mut [f32]) {
    let (width, dp) = (V::MR * V::LANES, panel.len() / (V::MR * V::LANES));
    for c in (0..dp).step_by(V::LANES) {
        let mut square = [V::splat(0.0); MAX_LANES];
        for j in 0..V::LANES {
            square[j] = V::load(&panel[(c + j) * width + first..]);
        }
        let rows = V::transpose(square);
        for r in 0..V::LANES {
            rows[r].store(&mut to[r * dp + c..]);
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
    pub fn of<V: Vector, T: Convert>(rows: &HeadRows<'a, T>, range: Range<u64>, dp: usize, buffer: &'a mut [f32]) -> Self {
        let count = (range.end - range.start) as usize;
        if let Some((run, stride)) = rows.run(range.start, count)
            && stride <= dp
            && let Some(data) = T::as_f32(run)
        {
            return Rows { data, stride };
        }
        for (index, to) in range.zip(buffer.chunks_exact_mut(dp)) {
            row::<V, T>(rows.get(index), to);
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
    use super::{Convert, row, unpack_row};
    use crate::Isa;
    use crate::vector::{Body, Vector};
    use fam_core::{bf16, f16};

    /// Every number of 16 bits, widened; and every 31st of 32 bits, narrowed, in rows that end amid a vector.
    struct All<T>(Vec<T>, Vec<f32>);

    impl<T: Convert> Body for All<T> {
        type Output = (Vec<f32>, Vec<T>);

        #[inline(always)]
        fn run<V: Vector, const MR: usize, const NR: usize>(self) -> Self::Output {
            let mut wide = vec![-1.0; self.0.len() + 16];
            row::<V, T>(&self.0[1..], &mut wide);
            let mut narrow = vec![T::from_f32(0.0); self.1.len()];
            unpack_row::<V, T>(&self.1, &mut narrow);
            (wide, narrow)
        }
    }

    fn check<T: Convert>() {
        let of = |bits: u16| bytemuck::cast::<u16, T>(bits);
        let (halves, floats) = (
            (0..=u16::MAX).map(of).collect::<Vec<_>>(),
            (0..=u32::MAX).step_by(31 * 64).chain(0x7f80_0000 - 99..0x7f80_0100).map(f32::from_bits).collect::<Vec<_>>(),
        );
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            let (wide, narrow) = isa.run(All(halves.clone(), floats.clone()));
            for (of, got) in halves[1..].iter().map(|x| x.to_f32()).chain([0.0; 17]).zip(wide) {
                assert!(got.to_bits() == of.to_bits() || got.is_nan() && of.is_nan(), "{isa}: {got} {of}");
            }
            for (x, got) in floats.iter().zip(narrow) {
                let (of, got) = (T::from_f32(*x).to_f32(), got.to_f32());
                assert!(got.to_bits() == of.to_bits() || got.is_nan() && of.is_nan(), "{isa}: {x:e} became {got:e}, not {of:e}");
            }
        }
    }

    #[test]
    fn conversions_are_those_of_half_at_every_level() {
        check::<f16>();
        check::<bf16>();
    }
}
