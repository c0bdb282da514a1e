//! Buffers with traps: every byte that no row of the call may see is NaN, and every byte that is not an output of the call must be
//! what it was before.

use crate::case::Strides;
use crate::distribution::{decode, encode};
use crate::rng::Rng;
use fam_core::{Dtype, Layout};

/// The byte that unseen memory is filled with: 0xFF repeated is NaN in f32, f16 and bf16 alike.
pub const POISON: u8 = 0xFF;

/// The byte that outputs are filled with before the call. Finite in every dtype and improbable, so that an element that was never
/// written fails the bound, and different from [`POISON`], so that a copied trap is seen.
pub const CANARY: u8 = 0x7B;

/// Bytes behind the last element, which nothing may read or write. Also keeps empty tensors from being empty allocations.
pub(crate) const TAIL: usize = 64;

/// The index of one row of `head_dim` elements: `[batch, block, row, head]`.
pub(crate) type Row = [usize; 4];

/// The bytes of a buffer, and the tensor in it.
#[derive(Clone, Debug)]
pub(crate) struct Tensor {
    pub layout: Layout,
    pub bytes: Vec<u8>,
}

impl Tensor {
    /// A buffer for `layout`, every byte of it `fill`.
    pub fn new(layout: Layout, fill: u8) -> Self {
        let end = layout.end_bytes().expect("a generated tensor is small") as usize;
        Tensor { layout, bytes: vec![fill; end.next_multiple_of(4) + TAIL] }
    }

    fn range(&self, at: Row) -> std::ops::Range<usize> {
        let size = self.layout.dtype.bytes();
        let first = self.layout.at(at) * size;
        first..first + self.layout.shape[4] * size
    }

    pub fn put(&mut self, at: Row, values: &[f64]) {
        let range = self.range(at);
        encode(values, self.layout.dtype, &mut self.bytes[range]);
    }

    pub fn get(&self, at: Row, values: &mut [f64]) {
        decode(&self.bytes[self.range(at)], self.layout.dtype, values);
    }

    /// The first byte of `after` that differs from this tensor though it belongs to none of `rows` (all heads of each).
    pub fn disturbed(mut self, after: &[u8], rows: impl Iterator<Item = [usize; 3]>) -> Option<usize> {
        for [n, i, r] in rows {
            for h in 0..self.layout.shape[3] {
                let range = self.range([n, i, r, h]);
                self.bytes[range.clone()].copy_from_slice(&after[range]);
            }
        }
        first_difference(&self.bytes, after)
    }
}

/// Where two buffers of one length first differ.
pub(crate) fn first_difference(before: &[u8], after: &[u8]) -> Option<usize> {
    // Nearly always they do not, which the whole slices tell far faster than their bytes.
    (before != after).then(|| before.iter().zip(after).position(|(before, after)| before != after)).flatten()
}

/// A layout of `shape`, arranged as `strides` says. Outputs never repeat an element.
pub(crate) fn arrange(strides: Strides, dtype: Dtype, shape: [usize; 5], is_output: bool, rng: &mut Rng) -> Layout {
    let packed = Layout::packed(dtype, shape);
    match strides {
        Strides::Packed => packed,
        Strides::HeadsMajor => in_order(packed, [0, 1, 3, 2], || 0),
        Strides::Broadcast if !is_output => {
            let mut layout = packed;
            for stride in &mut layout.stride {
                if rng.chance(1, 3) {
                    *stride = 0;
                }
            }
            layout
        }
        Strides::Padded | Strides::Broadcast => {
            let mut order = [0, 1, 2, 3];
            rng.shuffle(&mut order);
            let offset = rng.below(9);
            in_order(packed, order, || rng.pick(&[0, 0, 1, 3, 8])).with_offset(offset)
        }
    }
}

/// Strides such that axis `order[0]` is outermost, with `gap()` elements between the entries of each axis.
fn in_order(mut layout: Layout, order: [usize; 4], mut gap: impl FnMut() -> usize) -> Layout {
    let mut step = layout.shape[4] + gap();
    for axis in order.into_iter().rev() {
        layout.stride[axis] = step;
        step = step * layout.shape[axis].max(1) + gap();
    }
    layout
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn poison_is_nan_and_the_canary_is_not() {
        for dtype in Dtype::ALL {
            let mut value = [0.0];
            decode(&[POISON; 4], dtype, &mut value);
            assert!(value[0].is_nan());
            decode(&[CANARY; 4], dtype, &mut value);
            assert!(value[0].is_finite() && value[0] > 1e4);
        }
    }

    #[test]
    fn disturbed_bytes_are_found() {
        let layout = arrange(Strides::Padded, Dtype::F32, [2, 1, 3, 2, 5], true, &mut Rng::new(3));
        let before = Tensor::new(layout, CANARY);
        let mut after = before.clone();
        after.put([1, 0, 2, 0], &[1.0; 5]);
        after.put([1, 0, 2, 1], &[1.0; 5]);
        assert_eq!(before.clone().disturbed(&after.bytes, [[1, 0, 2]].into_iter()), None);
        assert!(before.clone().disturbed(&after.bytes, [[1, 0, 1]].into_iter()).is_some());
        let last = after.bytes.len() - 1;
        after.bytes[last] ^= 1;
        assert_eq!(before.disturbed(&after.bytes, [[1, 0, 2]].into_iter()), Some(last));
    }
}
