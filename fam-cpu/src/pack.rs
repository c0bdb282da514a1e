//! From strided rows of any element type to factors, f32 or pairs of bf16, in the forms that [`crate::product`] reads.
//!
//! | form | of | as |
//! |---|---|---|
//! | panel, `[dp][W]` | rows (`q`, σ(q), sums): a lane is a row, W of them | vectors |
//! | tile, `[keys][stride]` | keys, values, `m` | broadcasts |
//! | tile, `[keys / 2][stride]` | values in pairs of keys | broadcasts |
//!
//! `dp` is D rounded up to [`PAD`] elements (in pairs of channels half of that) and `W` is `MR` vectors. A tile of single keys is read where
//! it lies if its elements are the factors and it is dense; else it is copied.

use crate::memory::HeadRows;
use crate::product::{Broadcast, Factor, Pair};
use crate::tile::MAX_HEAD_DIM;
use crate::vector::{MAX_LANES, Vector};
use bytemuck::{cast_slice, cast_slice_mut};
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

/// How rows of `T` become factors.
pub(crate) trait Form<T: Element>: Factor {
    /// The `LANES` factors of a row's channels from factor `i` on, times 1, 0 or −1; 0 beyond its end.
    fn channels<V: Vector>(row: &[T], i: usize, sign: f32) -> V;
    /// Rows where they lie, `stride` elements apart, and the distance in factors; `None` where they are no factors.
    fn lying(of: &[T], stride: usize) -> Option<(&[Self], usize)>;
    /// Rows `range` of values in factors of keys, the first key at place `lead`: where they lie, or copied to `buffer`.
    fn values<'a, V: Vector>(
        rows: &HeadRows<'a, T>,
        range: Range<u64>,
        lead: usize,
        dp: usize,
        buffer: &'a mut [f32],
    ) -> Rows<'a, Self>;
}

impl<T: Convert> Form<T> for f32 {
    #[inline(always)]
    fn channels<V: Vector>(row: &[T], i: usize, sign: f32) -> V {
        channels::<V, T>(row, i).mul(V::splat(sign))
    }
    #[inline(always)]
    fn lying(of: &[T], stride: usize) -> Option<(&[f32], usize)> {
        T::as_f32(of).map(|of| (of, stride))
    }
    #[inline(always)]
    fn values<'a, V: Vector>(rows: &HeadRows<'a, T>, range: Range<u64>, _: usize, dp: usize, buffer: &'a mut [f32]) -> Rows<'a> {
        Rows::of::<V, T>(rows, range, dp, buffer)
    }
}

impl Form<bf16> for Pair {
    #[inline(always)]
    fn channels<V: Vector>(row: &[bf16], i: usize, sign: f32) -> V {
        let row = row.get(2 * i..).unwrap_or_default();
        if row.len() >= 2 * V::LANES && sign == 1.0 {
            return V::load_pairs(row);
        }
        let mut pairs = [0f32; MAX_LANES];
        for (to, x) in cast_slice_mut::<_, bf16>(&mut pairs).iter_mut().zip(row) {
            // The product is a bf16: nothing is lost.
            *to = bf16::from_bits(((x.to_f32() * sign).to_bits() >> 16) as u16);
        }
        V::load(&pairs)
    }
    #[inline(always)]
    fn lying(of: &[bf16], stride: usize) -> Option<(&[Pair], usize)> {
        (of.len().is_multiple_of(2) && stride.is_multiple_of(2)).then(|| (cast_slice(of), stride / 2))
    }
    #[inline(always)]
    fn values<'a, V: Vector>(
        rows: &HeadRows<'a, bf16>,
        range: Range<u64>,
        lead: usize,
        dp: usize,
        buffer: &'a mut [f32],
    ) -> Rows<'a, Pair> {
        const ABSENT: [bf16; MAX_HEAD_DIM] = [bf16::ZERO; MAX_HEAD_DIM];
        let (d, end) = (rows.get(range.start).len(), lead + (range.end - range.start) as usize);
        let rest = d / V::LANES * V::LANES;
        // Beside its only visible key a pair has zeros: the other's may be NaN, or not there.
        let key = |t: usize| if (lead..end).contains(&t) { rows.get(range.start + (t - lead) as u64) } else { &ABSENT[..d] };
        for (i, to) in buffer.chunks_exact_mut(dp).take(end.div_ceil(2)).enumerate() {
            let (first, second) = (key(2 * i), key(2 * i + 1));
            for c in (0..rest).step_by(V::LANES) {
                V::pair(V::load_bf16(&first[c..]), V::load_bf16(&second[c..])).store(&mut to[c..]);
            }
            if rest < d {
                V::pair(channels::<V, bf16>(first, rest), channels::<V, bf16>(second, rest)).store(&mut to[rest..]);
            }
        }
        Rows { data: cast_slice(buffer), stride: dp }
    }
}

/// Elements of the buffer in which the rows of a vector are transposed.
pub(crate) const fn stage(dp: usize) -> usize {
    PAD * dp
}

/// Packs `count` rows into a panel, times 1, 0 or −1. The last vector's absent rows are 0; further vectors are left as they are.
#[inline(always)]
pub(crate) fn panel<'r, V: Vector, T: Convert, F: Form<T>>(
    rows: impl Fn(usize) -> &'r [T],
    count: usize,
    sign: f32,
    to: &mut [f32],
) {
    let width = V::MR * V::LANES;
    let factors = to.len() / width / F::TERMS;
    for first in (0..count).step_by(V::LANES) {
        let rows: [&[T]; MAX_LANES] = std::array::from_fn(|r| if first + r < count { rows(first + r) } else { &[] });
        for c in (0..factors).step_by(V::LANES) {
            let mut square = [V::splat(0.0); MAX_LANES];
            for r in 0..V::LANES {
                square[r] = F::channels::<V>(rows[r], c, sign);
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

/// Keys, values or rows of `m`, as factors.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a, F = f32> {
    pub data: &'a [F],
    pub stride: usize,
}

impl<'a, F: Factor> Rows<'a, F> {
    /// Rows `range` of a cache, where they lie or copied to `buffer`, `[rows][dp]`.
    ///
    /// Rows that are further apart than they are long would share few sets of L1: a tile of them does not stay there, and the prefetcher
    /// brings what nobody reads.
    #[inline(always)]
    pub fn of<V: Vector, T: Convert>(rows: &HeadRows<'a, T>, range: Range<u64>, dp: usize, buffer: &'a mut [f32]) -> Self
    where
        F: Form<T>,
    {
        let count = (range.end - range.start) as usize;
        if let Some((run, stride)) = rows.run(range.start, count)
            && stride <= dp
            && let Some((data, stride)) = F::lying(run, stride)
        {
            return Rows { data, stride };
        }
        for (index, to) in range.zip(buffer.chunks_exact_mut(dp)) {
            for (i, to) in (0..dp / F::TERMS).step_by(V::LANES).zip(to.chunks_exact_mut(V::LANES)) {
                F::channels::<V>(rows.get(index), i, 1.0).store(to);
            }
        }
        Rows { data: cast_slice(buffer), stride: dp }
    }

    /// Sums over the channels of each row.
    #[inline(always)]
    pub fn over_channels(self) -> Broadcast<'a, F> {
        Broadcast { data: self.data, i: self.stride, k: 1 }
    }

    /// Sums over the rows of each channel.
    #[inline(always)]
    pub fn over_rows(self) -> Broadcast<'a, F> {
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
