//! Elements of f32, f16 and bf16 as lanes of f32, and back: exact one way, to nearest even the other.

use crate::memory::Elements;
use crate::tile::MAX_HEAD_DIM;
use crate::vector::{Body, MAX_LANES, Vector};
use fam_core::{Element, bf16, f16, mutate};

/// Elements of one type as lanes of f32. What meets elements is a [`Body`] of its own, made for each type: kernels are made once for all.
pub(crate) trait Convert: Element {
    /// A row of zeros.
    const ZEROS: &'static [Self; MAX_HEAD_DIM];
    /// The elements, if they are of this type; else none.
    fn of(elements: Elements<'_>) -> &[Self];
    /// The exact values of the first `LANES` elements of `from`.
    fn load<V: Vector>(from: &[Self]) -> V;
    /// Writes the nearest values, ties to even, to the first `LANES` elements of `to`.
    fn store<V: Vector>(x: V, to: &mut [Self]);
}

impl Convert for f32 {
    const ZEROS: &'static [f32; MAX_HEAD_DIM] = &[0.0; MAX_HEAD_DIM];

    #[inline(always)]
    fn of(elements: Elements<'_>) -> &[f32] {
        if let Elements::F32(x) = elements { x } else { &[] }
    }
    #[inline(always)]
    fn load<V: Vector>(from: &[f32]) -> V {
        V::load(from)
    }
    #[inline(always)]
    fn store<V: Vector>(x: V, to: &mut [f32]) {
        x.store(to);
    }
}

impl Convert for f16 {
    const ZEROS: &'static [f16; MAX_HEAD_DIM] = &[f16::ZERO; MAX_HEAD_DIM];

    #[inline(always)]
    fn of(elements: Elements<'_>) -> &[f16] {
        if let Elements::F16(x) = elements { x } else { &[] }
    }
    #[inline(always)]
    fn load<V: Vector>(from: &[f16]) -> V {
        V::load_f16(from)
    }
    #[inline(always)]
    fn store<V: Vector>(x: V, to: &mut [f16]) {
        x.store_f16(to);
    }
}

impl Convert for bf16 {
    const ZEROS: &'static [bf16; MAX_HEAD_DIM] = &[bf16::ZERO; MAX_HEAD_DIM];

    #[inline(always)]
    fn of(elements: Elements<'_>) -> &[bf16] {
        if let Elements::Bf16(x) = elements { x } else { &[] }
    }
    #[inline(always)]
    fn load<V: Vector>(from: &[bf16]) -> V {
        V::load_bf16(from)
    }
    #[inline(always)]
    fn store<V: Vector>(x: V, to: &mut [bf16]) {
        mutate!("attend-truncated", x.store_bf16(to), {
            let mut all = [0.0; MAX_LANES];
            x.store(&mut all);
            to.iter_mut().zip(&all[..V::LANES]).for_each(|(to, x)| *to = bf16::from_bits((x.to_bits() >> 16) as u16));
        });
    }
}

/// The channels of a row from channel `c` on that do not fill a vector, then 0.
#[inline(always)]
pub(crate) fn last_channels<V: Vector, T: Convert>(row: &[T], c: usize) -> V {
    let mut channels = [0.0; MAX_LANES];
    channels.iter_mut().zip(row.get(c..).unwrap_or_default()).for_each(|(to, x)| *to = x.to_f32());
    V::load(&channels)
}

/// The channels of a row, then zeros. `to` is whole vectors.
#[inline(always)]
pub(crate) fn widen<V: Vector>(from: Elements<'_>, to: &mut [f32]) {
    V::run(Widen { from, to });
}

/// [`widen`].
struct Widen<'a> {
    from: Elements<'a>,
    to: &'a mut [f32],
}

impl Body for Widen<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector, const MR: usize, const NR: usize>(self) {
        widen_here::<V>(self.from, self.to);
    }
}

/// [`widen`] within a body that is about elements itself.
#[inline(always)]
pub(crate) fn widen_here<V: Vector>(from: Elements<'_>, to: &mut [f32]) {
    match from {
        Elements::F32(from) => widen_elements::<V, f32>(from, to),
        Elements::F16(from) => widen_elements::<V, f16>(from, to),
        Elements::Bf16(from) => widen_elements::<V, bf16>(from, to),
    }
}

#[inline(always)]
fn widen_elements<V: Vector, T: Convert>(from: &[T], to: &mut [f32]) {
    let whole = from.len().min(to.len()) / V::LANES * V::LANES;
    for c in (0..whole).step_by(V::LANES) {
        T::load::<V>(&from[c..]).store(&mut to[c..]);
    }
    for c in (whole..to.len()).step_by(V::LANES) {
        last_channels::<V, T>(from, c).store(&mut to[c..]);
    }
}

/// The inverse of [`widen`]: rounds as many channels as `to` has, once.
#[inline(always)]
pub(crate) fn narrow<V: Vector, T: Convert>(from: &[f32], to: &mut [T]) {
    let rest = to.len() / V::LANES * V::LANES;
    for (from, to) in from.chunks_exact(V::LANES).zip(to.chunks_exact_mut(V::LANES)) {
        T::store(V::load(from), to);
    }
    to[rest..].iter_mut().zip(&from[rest..]).for_each(|(to, x)| *to = T::from_f32(*x));
}

#[cfg(test)]
mod tests {
    use super::{Convert, narrow, widen_elements};
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
            widen_elements::<V, T>(&self.0[1..], &mut wide);
            let mut narrowed = vec![T::from_f32(0.0); self.1.len()];
            narrow::<V, T>(&self.1, &mut narrowed);
            (wide, narrowed)
        }
    }

    fn check<T: Convert>() {
        let of = |bits: u16| bytemuck::cast::<u16, T>(bits);
        let (halves, floats) = (
            (0..=u16::MAX).map(of).collect::<Vec<_>>(),
            (0..=u32::MAX).step_by(31 * 64).chain(0x7f80_0000 - 99..0x7f80_0100).map(f32::from_bits).collect::<Vec<_>>(),
        );
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            let (wide, narrowed) = isa.run(All(halves.clone(), floats.clone()));
            for (of, got) in halves[1..].iter().map(|x| x.to_f32()).chain([0.0; 17]).zip(wide) {
                assert!(got.to_bits() == of.to_bits() || got.is_nan() && of.is_nan(), "{isa}: {got} {of}");
            }
            for (x, got) in floats.iter().zip(narrowed) {
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
