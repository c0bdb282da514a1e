//! Parts of `merge` that are empty, or not finite.

mod common;

use common::random;
use fam_core::{Backend, Dtype, Element, Layout, Merge, Op, Partial, Plan, Shape, View, ViewMut};
use fam_cpu::{Cpu, Par};

const SIZES: [usize; 5] = [2, 3, 70, 4, 24];
const ROWS: usize = 2 * 3 * 70 * 4;
const D: usize = 24;

fn merged<T: Element>(a: (&[T], &[f32]), b: (&[f32], &[f32])) -> (Vec<f32>, Vec<f32>) {
    let shape = Shape::builder().heads(4).head_dim(D).dtype(T::DTYPE).build().unwrap();
    let spec = shape.spec(1, 1).ops(&[Op::Merge]).out_dtype(Dtype::F32).build().unwrap();
    let cpu = Cpu::new().unwrap();
    let plan = cpu.plan(&spec).unwrap();
    assert_eq!(plan.support().scratch_bytes, 0);
    let (mut o, mut lse) = (vec![7.0f32; ROWS * D], vec![7.0f32; ROWS]);
    let lse_sizes = Layout::packed(Dtype::F32, [SIZES[0], SIZES[1], SIZES[2], SIZES[3], 1]);
    let merge = Merge::new(
        Partial { o: View::of(a.0, Layout::packed(T::DTYPE, SIZES)), lse: View::of(a.1, lse_sizes) },
        Partial { o: View::of(b.0, Layout::packed(Dtype::F32, SIZES)), lse: View::of(b.1, lse_sizes) },
        ViewMut::of(&mut o, Layout::packed(Dtype::F32, SIZES)),
    );
    cpu.merge(&plan, &mut Par::Serial, merge.lse(ViewMut::of(&mut lse, lse_sizes)), &mut []).unwrap();
    (o, lse)
}

#[test]
fn an_empty_part_has_no_effect_even_if_it_is_nan() {
    let (o_b, lse_b) = (random::<f32>(2, ROWS * D), random::<f32>(4, ROWS));
    let (nan, empty) = (vec![f32::NAN; ROWS * D], vec![f32::NEG_INFINITY; ROWS]);
    assert_eq!(merged((&nan, &empty), (&o_b, &lse_b)), (o_b.clone(), lse_b.clone()));
    assert_eq!(merged((&o_b, &lse_b), (&nan, &empty)), (o_b, lse_b));
    let (o, lse) = merged((&nan, &empty), (&nan, &empty));
    assert!(o.iter().all(|o| o.to_bits() == 0) && lse == empty);
}

#[test]
fn nan_stays_in_its_row() {
    let (o, lse) = (vec![1.0f32; ROWS * D], vec![0.5f32; ROWS]);
    let mut dirty = lse.clone();
    dirty[5] = f32::NAN;
    let (merged_o, merged_lse) = merged((&o, &lse), (&o, &dirty));
    for row in 0..ROWS {
        assert_eq!(merged_lse[row].is_nan(), row == 5);
        assert!(merged_o[row * D..][..D].iter().all(|o| o.is_nan() == (row == 5)));
    }
}
