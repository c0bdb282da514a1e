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

use crate::convert::{Convert, last_channels};
use crate::memory::{Elements, HeadRows, Input};
use crate::product::{Broadcast, Factor, Pair};
use crate::vector::{Body, MAX_LANES, Vector};
use crate::walk::Places;
use bytemuck::{cast_slice, cast_slice_mut};
use fam_core::{bf16, f16};
use std::marker::PhantomData;
use std::ops::Range;

/// Rows of a tile are padded to a multiple of this.
pub(crate) const PAD: usize = MAX_LANES;

/// D rounded up to [`PAD`].
pub(crate) fn padded(head_dim: usize) -> usize {
    head_dim.next_multiple_of(PAD)
}

/// How rows of any dtype that a plan may have become factors.
pub(crate) trait Form: Factor {
    /// Work for each element type that can.
    fn each<V: Vector, W: OfType<Self>>(of: Elements<'_>, work: W);
    /// Rows where they lie, `stride` elements apart, and the distance in factors; `None` where they are no factors.
    fn lying(of: Elements<'_>, stride: usize) -> Option<(&[Self], usize)>;
    /// Writes terms in their order to the first factors.
    fn put<V: Vector>(terms: V, to: &mut [Self]);
    /// Rows `range` of values in factors of keys, the first key at place `lead`: where they lie, or copied to `buffer`.
    fn values<'a, V: Vector>(
        rows: &HeadRows<'a>,
        range: Range<u64>,
        lead: usize,
        dp: usize,
        buffer: &'a mut [f32],
    ) -> Rows<'a, Self>;
}

/// How rows of `T` become factors.
pub(crate) trait FormOf<T: Convert>: Form {
    /// The `LANES` factors of a row's channels from factor `i` on, all of them there, times 1, 0 or −1.
    fn channels<V: Vector>(row: &[T], i: usize, sign: f32) -> V;
    /// The same where they are not; 0 beyond the row's end.
    fn last_channels<V: Vector>(row: &[T], i: usize, sign: f32) -> V;
}

/// Work on rows of one element type.
pub(crate) trait OfType<F> {
    /// Does it, `#[inline(always)]`.
    fn run<V: Vector, T: Convert>(self)
    where
        F: FormOf<T>;
}

/// Such work as a body, on elements of the type of these.
struct Elementwise<'a, F, W>(Elements<'a>, W, PhantomData<F>);

impl<F: Form, W: OfType<F>> Body for Elementwise<'_, F, W> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector, const MR: usize, const NR: usize>(self) {
        F::each::<V, W>(self.0, self.1);
    }
}

impl Form for f32 {
    #[inline(always)]
    fn each<V: Vector, W: OfType<f32>>(of: Elements<'_>, work: W) {
        match of {
            Elements::F32(_) => work.run::<V, f32>(),
            Elements::F16(_) => work.run::<V, f16>(),
            Elements::Bf16(_) => work.run::<V, bf16>(),
        }
    }
    #[inline(always)]
    fn lying(of: Elements<'_>, stride: usize) -> Option<(&[f32], usize)> {
        if let Elements::F32(of) = of { Some((of, stride)) } else { None }
    }
    #[inline(always)]
    fn put<V: Vector>(terms: V, to: &mut [f32]) {
        terms.store(to);
    }
    #[inline(always)]
    fn values<'a, V: Vector>(rows: &HeadRows<'a>, range: Range<u64>, _: usize, dp: usize, buffer: &'a mut [f32]) -> Rows<'a> {
        Rows::of::<V>(rows, range, dp, buffer)
    }
}

impl<T: Convert> FormOf<T> for f32 {
    #[inline(always)]
    fn channels<V: Vector>(row: &[T], i: usize, sign: f32) -> V {
        T::load::<V>(&row[i..]).mul(V::splat(sign))
    }
    #[inline(always)]
    fn last_channels<V: Vector>(row: &[T], i: usize, sign: f32) -> V {
        last_channels::<V, T>(row, i).mul(V::splat(sign))
    }
}

impl Form for Pair {
    #[inline(always)]
    fn each<V: Vector, W: OfType<Pair>>(of: Elements<'_>, work: W) {
        match of {
            // The gradient of an output.
            Elements::F32(_) => work.run::<V, f32>(),
            _ => work.run::<V, bf16>(),
        }
    }
    #[inline(always)]
    fn lying(of: Elements<'_>, stride: usize) -> Option<(&[Pair], usize)> {
        let of = bf16::of(of);
        (of.len().is_multiple_of(2) && stride.is_multiple_of(2)).then(|| (cast_slice(of), stride / 2))
    }
    #[inline(always)]
    fn put<V: Vector>(terms: V, to: &mut [Pair]) {
        terms.store_terms(cast_slice_mut(to));
    }
    #[inline(always)]
    fn values<'a, V: Vector>(
        rows: &HeadRows<'a>,
        range: Range<u64>,
        lead: usize,
        dp: usize,
        buffer: &'a mut [f32],
    ) -> Rows<'a, Pair> {
        V::run(PairsOfKeys { rows, range, lead, dp, to: &mut *buffer });
        Rows { data: cast_slice(buffer), stride: dp }
    }
}

/// Rounded.
impl FormOf<f32> for Pair {
    #[inline(always)]
    fn channels<V: Vector>(row: &[f32], i: usize, sign: f32) -> V {
        let [even, odd] = V::load(&row[2 * i..]).unzip(V::load(&row[2 * i + V::LANES..]));
        V::pair(even.mul(V::splat(sign)), odd.mul(V::splat(sign)))
    }
    #[inline(always)]
    fn last_channels<V: Vector>(row: &[f32], i: usize, sign: f32) -> V {
        let mut last = [0.0; 2 * MAX_LANES];
        last.iter_mut().zip(row.get(2 * i..).unwrap_or_default()).for_each(|(to, x)| *to = *x);
        Self::channels(&last, 0, sign)
    }
}

impl FormOf<bf16> for Pair {
    #[inline(always)]
    fn channels<V: Vector>(row: &[bf16], i: usize, sign: f32) -> V {
        let pairs = V::load_pairs(&row[2 * i..]);
        if sign == 1.0 { pairs } else { Self::last_channels(row, i, sign) }
    }
    #[inline(always)]
    fn last_channels<V: Vector>(row: &[bf16], i: usize, sign: f32) -> V {
        let mut pairs = [0f32; MAX_LANES];
        for (to, x) in
            cast_slice_mut::<_, bf16>(&mut pairs).iter_mut().zip(row.get(2 * i..).unwrap_or_default()).take(2 * V::LANES)
        {
            // The product is a bf16: nothing is lost.
            *to = bf16::from_bits(((x.to_f32() * sign).to_bits() >> 16) as u16);
        }
        V::load(&pairs)
    }
}

/// [`Form::values`] of pairs.
struct PairsOfKeys<'a, 'b> {
    rows: &'b HeadRows<'a>,
    range: Range<u64>,
    lead: usize,
    dp: usize,
    to: &'b mut [f32],
}

impl Body for PairsOfKeys<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector, const MR: usize, const NR: usize>(self) {
        let PairsOfKeys { rows, range, lead, dp, to } = self;
        let (d, count) = (rows.get(range.start).len(), (range.end - range.start) as usize);
        let (rest, end) = (d / V::LANES * V::LANES, lead + count);
        let run = rows.run(range.start, count).map(|(run, stride)| (bf16::of(run), stride));
        for (i, to) in to.chunks_exact_mut(dp).take(end.div_ceil(2)).enumerate() {
            let mut keys = [&bf16::ZEROS[..d]; 2];
            for (key, t) in keys.iter_mut().zip(2 * i..) {
                // Beside its only visible key a pair has zeros: the other's may be NaN, or not there.
                if (lead..end).contains(&t) {
                    *key = match run {
                        Some((run, stride)) => &run[(t - lead) * stride..][..d],
                        None => bf16::of(rows.get(range.start + (t - lead) as u64)),
                    };
                }
            }
            let [first, second] = keys;
            for c in (0..rest).step_by(V::LANES) {
                V::interleave(&first[c..], &second[c..]).store(&mut to[c..]);
            }
            if rest < d {
                let mut last = [[bf16::ZERO; MAX_LANES]; 2];
                for (last, key) in last.iter_mut().zip(keys) {
                    last[..d - rest].copy_from_slice(&key[rest..]);
                }
                V::interleave(&last[0], &last[1]).store(&mut to[rest..]);
            }
        }
    }
}

/// Elements of the buffer in which the rows of a vector are transposed.
pub(crate) const fn stage(dp: usize) -> usize {
    PAD * dp
}

/// Packs `count` rows into a panel, times 1, 0 or −1. The last vector's absent rows are 0; further vectors are left as they are.
#[inline(always)]
pub(crate) fn panel<'r, V: Vector, F: Form>(
    mut rows: impl Iterator<Item = Elements<'r>>,
    count: usize,
    sign: f32,
    to: &mut [f32],
) {
    for first in (0..count).step_by(V::LANES) {
        let count = V::LANES.min(count - first);
        let mut of_vector = [Elements::NONE; MAX_LANES];
        for (to, row) in of_vector[..count].iter_mut().zip(&mut rows) {
            *to = row;
        }
        V::run(Elementwise::<F, _>(of_vector[0], Columns { rows: &of_vector[..count], sign, first, to }, PhantomData));
    }
}

/// A vector of rows as columns of a panel, from lane `first` on.
struct Columns<'a> {
    rows: &'a [Elements<'a>],
    sign: f32,
    first: usize,
    to: &'a mut [f32],
}

impl<F: Form> OfType<F> for Columns<'_> {
    #[inline(always)]
    fn run<V: Vector, T: Convert>(self)
    where
        F: FormOf<T>,
    {
        let Columns { rows, sign, first, to } = self;
        let (d, width) = (rows[0].len(), V::MR * V::LANES);
        let mut of_type = [&T::ZEROS[..d]; MAX_LANES];
        for (to, row) in of_type.iter_mut().zip(rows) {
            *to = T::of(*row);
        }
        for c in (0..to.len() / width / F::TERMS).step_by(V::LANES) {
            let mut square = [V::splat(0.0); MAX_LANES];
            if (c + V::LANES) * F::TERMS <= d {
                for r in 0..V::LANES {
                    square[r] = F::channels::<V>(of_type[r], c, sign);
                }
            } else {
                for r in 0..V::LANES {
                    square[r] = F::last_channels::<V>(of_type[r], c, sign);
                }
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
    V::run(RowsOfPanel { panel, first, to });
}

/// Packs `count` rows in factors of rows, `[count / TERMS][dp]`. Terms that are not there are 0.
#[inline(always)]
pub(crate) fn rows<V: Vector, F: Form>(of: &Input<'_>, places: Places, count: usize, dp: usize, to: &mut [f32]) {
    if let Some(at) = places.clone().next() {
        V::run(Elementwise::<F, _>(of.row(at), Stack { of, places, count, dp, to }, PhantomData));
    }
}

/// [`rows`].
struct Stack<'a> {
    of: &'a Input<'a>,
    places: Places,
    count: usize,
    dp: usize,
    to: &'a mut [f32],
}

impl<F: Form> OfType<F> for Stack<'_> {
    #[inline(always)]
    fn run<V: Vector, T: Convert>(self)
    where
        F: FormOf<T>,
    {
        let Stack { of, mut places, count, dp, to } = self;
        for (first, to) in (0..count).step_by(F::TERMS).zip(to.chunks_exact_mut(dp)) {
            let mut terms: [&[T]; 2] = [T::ZEROS; 2];
            for (term, at) in terms.iter_mut().take(F::TERMS.min(count - first)).zip(&mut places) {
                *term = T::of(of.row(at));
            }
            let d = terms[0].len();
            for c in (0..d / V::LANES * V::LANES).step_by(V::LANES) {
                F::join([T::load::<V>(&terms[0][c..]), T::load::<V>(&terms[1][c..])]).store(&mut to[c..]);
            }
            for c in (d / V::LANES * V::LANES..dp).step_by(V::LANES) {
                F::join([last_channels::<V, T>(&terms[0][..d], c), last_channels::<V, T>(&terms[1][..d], c)]).store(&mut to[c..]);
            }
        }
    }
}

/// [`unpack`].
struct RowsOfPanel<'a> {
    panel: &'a [f32],
    first: usize,
    to: &'a mut [f32],
}

impl Body for RowsOfPanel<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector, const MR: usize, const NR: usize>(self) {
        let RowsOfPanel { panel, first, to } = self;
        let (width, dp) = (MR * V::LANES, panel.len() / (MR * V::LANES));
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
}

/// Keys, values or rows of `m`, as factors.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a, F = f32> {
    pub data: &'a [F],
    pub stride: usize,
}

impl<'a, F: Form> Rows<'a, F> {
    /// Rows `range` of a cache, where they lie or copied to `buffer`, `[rows][dp]`.
    ///
    /// Rows that are further apart than they are long would share few sets of L1: a tile of them does not stay there, and the prefetcher
    /// brings what nobody reads.
    #[inline(always)]
    pub fn of<V: Vector>(rows: &HeadRows<'a>, range: Range<u64>, dp: usize, buffer: &'a mut [f32]) -> Self {
        let count = (range.end - range.start) as usize;
        let run = rows.run(range.start, count);
        if let Some((run, stride)) = run
            && stride <= dp
            && let Some((data, stride)) = F::lying(run, stride)
        {
            return Rows { data, stride };
        }
        let first = rows.get(range.start);
        V::run(Elementwise::<F, _>(first, Copies { rows, range, run, dp, to: &mut *buffer }, PhantomData));
        Rows { data: cast_slice(buffer), stride: dp }
    }
}

/// Copies of rows as factors.
struct Copies<'a, 'b> {
    rows: &'b HeadRows<'a>,
    range: Range<u64>,
    /// [`HeadRows::run`] of these.
    run: Option<(Elements<'a>, usize)>,
    dp: usize,
    to: &'b mut [f32],
}

impl<F: Form> OfType<F> for Copies<'_, '_> {
    #[inline(always)]
    fn run<V: Vector, T: Convert>(self)
    where
        F: FormOf<T>,
    {
        let Copies { rows, range, run, dp, to } = self;
        let d = rows.get(range.start).len();
        let (whole, run) = (d / F::TERMS / V::LANES * V::LANES, run.map(|(run, stride)| (T::of(run), stride)));
        for ((n, index), to) in range.enumerate().zip(to.chunks_exact_mut(dp)) {
            let row = match run {
                Some((run, stride)) => &run[n * stride..][..d],
                None => T::of(rows.get(index)),
            };
            for i in (0..whole).step_by(V::LANES) {
                F::channels::<V>(row, i, 1.0).store(&mut to[i..]);
            }
            for i in (whole..dp / F::TERMS).step_by(V::LANES) {
                F::last_channels::<V>(row, i, 1.0).store(&mut to[i..]);
            }
        }
    }
}

impl<'a, F: Factor> Rows<'a, F> {
    /// Whether the first `count` rows of `d` factors are finite. If what lies between them is not, or they are less than a few vectors, they
    /// may be taken for what they are not.
    #[inline(always)]
    pub fn are_finite<V: Vector>(self, count: usize, d: usize) -> bool {
        V::run(AreFinite(&self.data[..(count - 1) * self.stride + d]))
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

/// Whether factors are finite: 0 times each is 0. Never of less than `CHAINS` vectors.
struct AreFinite<'a, F>(&'a [F]);

impl<F: Factor> Body for AreFinite<'_, F> {
    type Output = bool;

    #[inline(always)]
    fn run<V: Vector, const MR: usize, const NR: usize>(self) -> bool {
        const CHAINS: usize = 8;
        let step = CHAINS * V::LANES;
        let Some(last) = self.0.len().checked_sub(step) else { return false };
        let mut sums = [V::splat(0.0); CHAINS];
        for at in (0..last).step_by(step).chain([last]) {
            let x: &[f32] = cast_slice(&self.0[at..at + step]);
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum = F::zeroed().add_product(V::load(&x[i * V::LANES..]), *sum);
            }
        }
        let mut lanes = [0.0; MAX_LANES];
        sums.into_iter().all(|sum| {
            sum.store(&mut lanes);
            lanes.iter().all(|x| *x == 0.0)
        })
    }
}
