//! Candle's tensors as fam's views: the same memory, the same strides.

use candle_core::{CpuStorage, Layout, Result, Storage, WithDType, bail};
use fam::{Element, View};
use std::ops::Deref;

/// The element types that both know.
pub trait Number: WithDType + Element {}
impl<T: WithDType + Element> Number for T {}

/// Runs `$body` with `$T` bound to the Rust type of a fam dtype.
macro_rules! with_number {
    ($dtype:expr, $T:ident, $body:expr) => {
        match $dtype {
            fam::Dtype::F32 => {
                type $T = f32;
                $body
            }
            fam::Dtype::F16 => {
                type $T = fam::f16;
                $body
            }
            fam::Dtype::Bf16 => {
                type $T = fam::bf16;
                $body
            }
            other => candle_core::bail!("{other} has no counterpart in candle"),
        }
    };
}
pub(crate) use with_number;

/// `blocks · rows` rows of a tensor (batch, heads, rows, dim), from row `first` on, as fam's `[batch, blocks, rows, heads, dim]`.
pub fn layout<T: Number>(layout: &Layout, first: usize, blocks: usize, rows: usize) -> Result<fam::Layout> {
    let (&[batch, heads, all, dim], &[sb, sh, sr, sd]) = (layout.dims(), layout.stride()) else {
        bail!("expected (batch, heads, rows, dim), got {:?}", layout.shape());
    };
    if first + blocks * rows > all {
        bail!("rows {first}..{} of a tensor of {all} rows", first + blocks * rows);
    }
    if sd != 1 && dim > 1 {
        bail!("dim has stride {sd}: the last axis must be contiguous");
    }
    let packed = fam::Layout::packed(<T as Element>::DTYPE, [batch, blocks, rows, heads, dim]);
    Ok(packed.with_stride([sb, rows * sr, sr, sh]).with_offset(layout.start_offset() + first * sr))
}

/// Those rows of borrowed storage.
pub fn rows<'a, T: Number>(
    (storage, of): (&'a CpuStorage, &Layout),
    first: usize,
    blocks: usize,
    rows: usize,
) -> Result<View<'a, [u8]>> {
    Ok(View::of(T::cpu_storage_as_slice(storage)?, layout::<T>(of, first, blocks, rows)?))
}

/// All rows of a tensor whose storage is borrowed ([`candle_core::Tensor::storage_and_layout`]), as tokens.
pub fn tokens<'a, T: Number>((storage, of): &'a (impl Deref<Target = Storage>, &Layout)) -> Result<View<'a, [u8]>> {
    let Storage::Cpu(storage) = &**storage else { bail!("expected a tensor on the CPU") };
    rows::<T>((storage, of), 0, 1, of.dims().get(2).copied().unwrap_or(0))
}
