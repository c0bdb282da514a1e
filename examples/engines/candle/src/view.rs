//! Candle's tensors as fam's views: the same memory, the same strides.

use crate::wrap;
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

/// A tensor (batch, heads, rows, dim) as candle hands it to a custom op.
pub type Argument<'a> = (&'a CpuStorage, &'a Layout);

/// `count` of its rows from row `first` on: tokens.
pub fn rows<'a, T: Number>((storage, layout): Argument<'a>, first: usize, count: usize) -> Result<View<'a, [u8]>> {
    let (&[batch, heads, rows, dim], &[sb, sh, sr, sd]) = (layout.dims(), layout.stride()) else {
        bail!("expected (batch, heads, rows, dim), got {:?}", layout.shape());
    };
    if sd != 1 && dim > 1 {
        bail!("dim has stride {sd}: the last axis must be contiguous");
    }
    let all = fam::Layout::heads_first(<T as Element>::DTYPE, [batch, heads, rows, dim], [sb, sh, sr]);
    let part = all.with_offset(layout.start_offset()).rows(first, count).map_err(wrap)?;
    Ok(View::of(T::cpu_storage_as_slice(storage)?, part))
}

/// Its rows from row `first` on as `blocks` blocks of `rows` each: memory rows.
pub fn memory<'a, T: Number>(of: Argument<'a>, first: usize, blocks: usize, rows: usize) -> Result<View<'a, [u8]>> {
    let View { mem, layout } = self::rows::<T>(of, first, blocks * rows)?;
    Ok(View::new(mem, layout.blocks_of(rows).map_err(wrap)?))
}

/// All rows of a tensor whose storage is borrowed ([`candle_core::Tensor::storage_and_layout`]), as tokens.
pub fn tokens<'a, T: Number>((storage, of): &'a (impl Deref<Target = Storage>, &Layout)) -> Result<View<'a, [u8]>> {
    let Storage::Cpu(storage) = &**storage else { bail!("expected a tensor on the CPU") };
    rows::<T>((storage, of), 0, of.dims().get(2).copied().unwrap_or(0))
}
