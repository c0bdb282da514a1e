//! The op against the reference, within the derived bound of each element; and what it refuses.

mod common;

use candle_core::{DType, Result, Tensor};
use common::strided;
use fam::{Dtype, Shape, Span, Window};
use fam_candle::{Attended, Attends, Attention, Naive};
use fam_ref::{Array, Rows};
use fam_testkit::{Bound, Condition, Level, Limits};

const BLOCK: usize = 4;
const MEM: usize = 3;

fn shape(dtype: Dtype) -> Shape {
    let builder = Shape::builder().heads(6).kv_heads(2).head_dim(20).block_len(BLOCK);
    builder.window(Window::Blocks(1)).mem_len(MEM).dtype(dtype).build().unwrap()
}

/// Two streams at different places: blocks 2 and 3 of one, all memory rows present; a part of block 5 of the other, with its window cut by
/// the origin and two memory rows.
fn spans() -> [Span; 2] {
    [Span::new(0, 8, 8).with_origin(4).with_mem_rows(MEM as u32), Span::new(1, 20, 3).with_origin(17).with_mem_rows(2)]
}

fn packed(dtype: DType) -> Result<[Tensor; 3]> {
    let (rows, keys, memory) = (8, 12, 2 * MEM);
    Ok([
        strided(1, [2, 6, rows + memory, 20], dtype)?,
        strided(2, [2, 2, keys + memory, 20], dtype)?,
        strided(3, [2, 2, keys + memory, 20], dtype)?,
    ])
}

/// Rows `first ..` of (N, H, rows, D) as `[N, rows, H, D]` in f64.
fn rows(x: &Tensor, first: usize, count: usize) -> Result<Array<4>> {
    let x = x.narrow(2, first, count)?.transpose(1, 2)?;
    let (n, rows, h, d) = x.dims4()?;
    Ok(Array { shape: [n, rows, h, d], data: x.to_dtype(DType::F64)?.flatten_all()?.to_vec1()? })
}

fn blocks(x: Array<4>) -> Array<5> {
    let [n, rows, h, d] = x.shape;
    Array { shape: [n, rows / MEM, MEM, h, d], data: x.data }
}

fn assert_within_bound(o: &Tensor, reference: &Rows, dtype: Dtype, d: usize) -> Result<()> {
    let o = o.transpose(1, 2)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
    assert_eq!(o.len(), reference.o.data.len());
    let limits = Limits::default().p16(fam::cpu::Isa::detect().map_err(candle_core::Error::wrap)?.pairs());
    let bound = Bound::new(Level::Hard, dtype, dtype, &limits);
    for (i, (&o, &expected)) in o.iter().zip(&reference.o.data).enumerate() {
        let n = reference.n.data[i / d];
        let (a, s, v_max) = (reference.a.data[i], reference.s.data[i / d], reference.v_max.data[i / d]);
        let tiles = (n / limits.key_tile as f64).ceil();
        let most = bound.o(&Condition { o: expected, a, s, sink: 0.0, n, tiles, d: d as f64, v_max, flushed: 0.0 });
        assert!((o - expected).abs() <= most, "{dtype}, element {i}: {o} instead of {expected}, at most {most} apart");
    }
    Ok(())
}

#[test]
fn equals_the_reference() -> Result<()> {
    for (dtype, candle) in [(Dtype::F32, DType::F32), (Dtype::F16, DType::F16), (Dtype::Bf16, DType::BF16)] {
        let (shape, spans, [q, k, v]) = (shape(dtype), spans(), packed(candle)?);
        let (tokens, keys) = (8, 12);
        let [mem_q, mem_k, mem_v] = [(&q, tokens), (&k, keys), (&v, keys)].map(|(x, first)| rows(x, first, 2 * MEM).map(blocks));
        let reference = fam_ref::attend(&fam_ref::Attend {
            shape: &shape,
            spans: &spans,
            q: Some(&rows(&q, 0, tokens)?),
            mem_q: Some(&mem_q?),
            k: &rows(&k, 0, keys)?,
            v: &rows(&v, 0, keys)?,
            mem_k: Some(&mem_k?),
            mem_v: Some(&mem_v?),
            sink: None,
        });
        let reference = reference.map_err(candle_core::Error::wrap)?;

        let attention = Attention::new(&shape, 2, 8)?;
        let Attended { o, mem_o } = attention.attend(&spans, tokens, &q, &k, &v)?;
        assert_within_bound(&o, &reference.rows.unwrap(), dtype, 20)?;
        assert_within_bound(&mem_o, &reference.mem_rows.unwrap(), dtype, 20)?;
    }
    Ok(())
}

#[test]
fn either_group_of_rows_alone() -> Result<()> {
    let (shape, spans, [q, k, v]) = (shape(Dtype::F32), spans(), packed(DType::F32)?);
    let attention = Attention::new(&shape, 2, 8)?;
    let both = attention.attend(&spans, 8, &q, &k, &v)?;
    let frozen = attention.attend(&spans, 8, &q.narrow(2, 0, 8)?, &k, &v)?;
    let update = attention.attend(&spans, 0, &q.narrow(2, 8, 2 * MEM)?, &k, &v)?;
    assert_eq!(frozen.mem_o.elem_count() + update.o.elem_count(), 0);
    for (one, other) in [(&both.o, &frozen.o), (&both.mem_o, &update.mem_o)] {
        assert_eq!(one.flatten_all()?.to_vec1::<f32>()?, other.flatten_all()?.to_vec1::<f32>()?);
    }
    Ok(())
}

#[test]
fn refuses_what_does_not_fit() -> Result<()> {
    let (shape, spans, [q, k, v]) = (shape(Dtype::F32), spans(), packed(DType::F32)?);
    let attention = Attention::new(&shape, 2, 8)?;
    let refused = |spans: &[Span], tokens, q: &Tensor, k: &Tensor, v: &Tensor, words: &str| {
        let error = attention.attend(spans, tokens, q, k, v).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    };
    refused(&spans, 7, &q, &k, &v, "q has 14 rows");
    refused(&spans[..1], 8, &q, &k, &v, "2 streams");
    refused(&[spans[1], spans[0]], 8, &q, &k, &v, "slot 1");
    refused(&spans, 8, &q, &k.narrow(2, 0, 4)?, &v.narrow(2, 0, 4)?, "k has 4 rows");
    refused(&spans, 8, &q, &k, &v.narrow(2, 0, 4)?, "one shape");
    refused(&spans, 8, &q, &k.narrow(2, 0, 17)?, &v.narrow(2, 0, 17)?, "rows >= 12");
    refused(&spans, 8, &q.to_dtype(DType::F64)?, &k, &v, "dtype");
    let across = Tensor::zeros((2, 2, 20, 18), DType::F32, q.device())?.transpose(2, 3)?;
    refused(&spans, 8, &q, &across, &across, "last axis must be contiguous");
    Ok(())
}

#[test]
fn the_yardstick_agrees() -> Result<()> {
    let (shape, [q, k, v]) = (shape(Dtype::F32), packed(DType::F32)?);
    // Every row of the call sees a key here: the yardstick knows no empty rows.
    let spans = [spans()[0], Span::new(1, 12, 8).with_origin(8).with_mem_rows(2)];
    let ours = Attention::new(&shape, 2, 8)?.attend(&spans, 8, &q, &k, &v)?;
    let naive = Naive { shape }.attend(&spans, 8, &q, &k, &v)?;
    for (ours, naive) in [(ours.o, naive.o), (ours.mem_o, naive.mem_o)] {
        let apart = (ours - naive)?.abs()?.max_all()?.to_scalar::<f32>()?;
        assert!(apart < 1e-5, "{apart}");
    }
    Ok(())
}
