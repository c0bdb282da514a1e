//! A row-major array of f64: all that the reference needs of a tensor library.

use fam_core::{Error, Result};
use std::ops::{Index, IndexMut};

/// Row-major f64 array of `R` axes.
///
/// As with a slice, an index outside of it panics. Every operation of this crate checks the arrays that it is given before it reads
/// them, and returns an error.
#[derive(Clone, Debug, PartialEq)]
pub struct Array<const R: usize> {
    /// Elements along each axis, outermost first.
    pub shape: [usize; R],
    /// All elements; the last axis is contiguous.
    pub data: Vec<f64>,
}

impl<const R: usize> Array<R> {
    /// All zero.
    pub fn zeros(shape: [usize; R]) -> Self {
        Self::full(shape, 0.0)
    }

    /// All `value`.
    pub fn full(shape: [usize; R], value: f64) -> Self {
        Array { shape, data: vec![value; shape.iter().product()] }
    }

    /// Takes `data` as it lies.
    ///
    /// # Errors
    /// Where `data` does not have the shape's number of elements.
    pub fn new(shape: [usize; R], data: Vec<f64>) -> Result<Self> {
        let array = Array { shape, data };
        array.check("array", shape)?;
        Ok(array)
    }

    /// An error that names `field`, unless the array has the shape `expected` and all its elements.
    pub(crate) fn check(&self, field: &'static str, expected: [usize; R]) -> Result<()> {
        check(field, format_args!("shape {:?}", self.shape), self.shape == expected, format_args!("shape {expected:?}"))?;
        check_len(field, self.data.len(), expected.iter().product())
    }

    /// The contiguous elements under `index`, which names the leading axes: `row(&[n, t, h])` of `[N, T, H, D]` is one vector of D.
    ///
    /// # Panics
    /// Where `index` is longer than the shape or outside of it.
    pub fn row(&self, index: &[usize]) -> &[f64] {
        let (first, len) = self.locate(index);
        &self.data[first..first + len]
    }

    /// [`Array::row`], to be written.
    ///
    /// # Panics
    /// As [`Array::row`].
    pub fn row_mut(&mut self, index: &[usize]) -> &mut [f64] {
        let (first, len) = self.locate(index);
        &mut self.data[first..first + len]
    }

    /// First element and number of elements under the leading `index`.
    fn locate(&self, index: &[usize]) -> (usize, usize) {
        let (leading, trailing) = self.shape.split_at(index.len());
        let len = trailing.iter().product();
        let mut first = 0;
        for (&i, &size) in index.iter().zip(leading) {
            assert!(i < size, "index {index:?} outside of shape {:?}", self.shape);
            first = first * size + i;
        }
        (first * len, len)
    }
}

impl<const R: usize> Index<[usize; R]> for Array<R> {
    type Output = f64;
    fn index(&self, index: [usize; R]) -> &f64 {
        &self.row(&index)[0]
    }
}

impl<const R: usize> IndexMut<[usize; R]> for Array<R> {
    fn index_mut(&mut self, index: [usize; R]) -> &mut f64 {
        &mut self.row_mut(&index)[0]
    }
}

/// An [`Error::Invalid`] unless `is_right`.
pub(crate) fn check(field: &'static str, value: impl ToString, is_right: bool, rule: impl ToString) -> Result<()> {
    if is_right { Ok(()) } else { Err(Error::invalid(field, value, rule.to_string())) }
}

/// Checks the number of elements of a slice.
pub(crate) fn check_len(field: &'static str, len: usize, expected: usize) -> Result<()> {
    check(field, format_args!("{len} elements"), len == expected, format_args!("{expected} elements"))
}
