//! A row-major array of f64: all that the reference needs of a tensor library.

use std::ops::{Index, IndexMut};

/// Row-major f64 array of `R` axes.
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
    /// # Panics
    /// Where `data` does not have the shape's number of elements.
    pub fn new(shape: [usize; R], data: Vec<f64>) -> Self {
        assert_eq!(data.len(), shape.iter().product::<usize>(), "elements of an array of shape {shape:?}");
        Array { shape, data }
    }

    /// The same elements under another shape.
    ///
    /// # Panics
    /// Where the number of elements differs.
    pub fn reshape<const S: usize>(self, shape: [usize; S]) -> Array<S> {
        Array::new(shape, self.data)
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
