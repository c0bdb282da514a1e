//! Attention of few rows, as in decode: a token of a stream, the tokens of a draft, memory rows that are few.
//!
//! A task takes a kv head's keys, or some of them, for all rows of the group at once, so that memory gives each key and value once. Keys are
//! cut into splits ([`tiles_of_split`]): each is a softmax of its own, and they are joined in their order. Where there are fewer heads than
//! keep all threads busy, a head's splits are dealt out to several tasks, each leaves what it has in shared scratch memory, and the tasks of
//! a second phase join it; else one task joins them as it goes. Whoever does, the arithmetic is the same.
//!
//! What a row gets does not depend on the rows beside it: tiles, steps and splits lie where the shape and the row's block put them, and one
//! in which a row sees nothing multiplies its sums by 1 and adds 0.

use super::rows::{Band, RowsInBands, RowsOverTile};
use super::{Kernel, RowGroup};
use crate::convert::widen;
use crate::memory::{Cache, Elements, Input};
use crate::pack;
use crate::parallel::Task;
use crate::parallel::output::{Output, Owner};
use crate::softmax::{Softmax, join};
use crate::span::SpanSource;
use crate::tile::{BLOCK_N, FEW_ROWS, MAX_SPLITS, MAX_WIDTH, STEP, Tile, carve, few_tokens, partial, tiles_of_split};
use crate::vector::{Body, MAX_LANES, Vector};
use crate::walk::{KeyTile, Piece, Walk, most_tiles, tile_numbers};
use fam_core::{Dtype, Layout, Shape, Spec, mutate};
use std::mem::swap;
use std::ops::Range;

/// Sizes of a worker's buffers, in the order of [`Buffers`].
pub(crate) fn scratch(shape: &Shape, tile: Tile) -> [usize; 16] {
    let (rows, keys, panel) = (FEW_ROWS * tile.dp, BLOCK_N * tile.dp, MAX_WIDTH * tile.dp);
    let [panel, shares, stage, m] = match shape.infini() {
        Some(_) => [panel, 2 * MAX_WIDTH, pack::stage(tile.dp), tile.dp * tile.dp],
        None => [0; 4],
    };
    [
        rows,
        rows,
        FEW_ROWS,
        FEW_ROWS,
        rows,
        FEW_ROWS,
        FEW_ROWS,
        keys,
        keys,
        STEP * MAX_LANES,
        panel,
        panel,
        panel,
        shares,
        stage,
        m,
    ]
}

/// Tiles in one split of a piece.
fn tiles_of_one(shape: &Shape, piece: &Piece) -> usize {
    tiles_of_split(most_tiles(shape, piece.is_memory).iter().sum())
}

/// Splits that hold keys of a piece, in order. Others lie between them where no row sees the end of its window, or there are few memory rows.
fn splits_of(shape: &Shape, mem: Option<&Cache<'_>>, piece: &Piece) -> impl Iterator<Item = usize> + Clone {
    let (tiles, of_one) = (tile_numbers(shape, mem, piece), tiles_of_one(shape, piece));
    (0..MAX_SPLITS).filter(move |split| tiles.iter().any(|of| of.start < (split + 1) * of_one && split * of_one < of.end))
}

/// From the first of them to behind the last.
fn splits_from_to(shape: &Shape, mem: Option<&Cache<'_>>, piece: &Piece) -> Range<usize> {
    let mut splits = splits_of(shape, mem, piece);
    let first = splits.next();
    first.map_or(0..0, |first| first..splits.last().unwrap_or(first) + 1)
}

/// Behind the last split of any stream of few tokens.
pub(super) fn splits_end(shape: &Shape, spans: &SpanSource<'_>, mem: Option<&Cache<'_>>) -> usize {
    let spans = (0..spans.batch()).map(|n| spans.get(n)).filter(|span| Tile::is_few(shape, span.len as usize));
    let pieces = spans.flat_map(|span| Piece::of_rows(shape, span, 0..span.len as usize));
    pieces.map(|piece| splits_from_to(shape, mem, &piece).end).max().unwrap_or(0)
}

/// Where splits leave what their rows have, `[N, 1, splits × few tokens, Hq, partial]`.
pub(super) fn partials(spec: &Spec, batch: usize) -> Layout {
    let shape = spec.shape();
    Layout::packed(Dtype::F32, [batch, 1, MAX_SPLITS * few_tokens(spec), shape.heads(), partial(shape)])
}

/// The row there of split `split` of a row of `o`.
fn partial_at(partials: &Layout, split: usize, [n, _, token, head]: [usize; 4]) -> [usize; 4] {
    [n, 0, split * (partials.shape[2] / MAX_SPLITS) + token, head]
}

/// Who writes them, where a task takes `splits` splits.
pub(super) fn owner(spec: &Spec, splits: usize, tiles: usize) -> Owner {
    Owner::Tile { heads: spec.shape().group(), rows: splits * few_tokens(spec), tiles, first: 0 }
}

/// What rows have of some keys: Σ p v `[rows][dp]`, the maximum of their logits, Σ p.
struct Sums<'s> {
    acc: &'s mut [f32],
    row_max: &'s mut [f32],
    row_sum: &'s mut [f32],
}

impl Sums<'_> {
    /// Of no keys.
    #[inline(always)]
    fn clear(&mut self, rows: usize, dp: usize) {
        self.acc[..rows * dp].fill(0.0);
        let fresh = mutate!("attend-stale-row", FEW_ROWS, 1);
        self.row_max[..fresh].fill(f32::NEG_INFINITY);
        self.row_sum[..fresh].fill(0.0);
    }

    /// Takes in what the rows have of other keys.
    #[inline(always)]
    fn join<V: Vector>(&mut self, other: &Sums<'_>, rows: usize, dp: usize, unit: f32) {
        for first in (0..rows).step_by(V::LANES) {
            let states = [&mut self.row_max[first..], &mut self.row_sum[first..]];
            let [ours, theirs] = join::<V>(states, [&other.row_max[first..], &other.row_sum[first..]], unit);
            let mut factors = [[0.0; MAX_LANES]; 2];
            ours.store(&mut factors[0]);
            theirs.store(&mut factors[1]);
            for r in first..rows.min(first + V::LANES) {
                let [ours, theirs] = [V::splat(factors[0][r - first]), V::splat(factors[1][r - first])];
                for c in (r * dp..(r + 1) * dp).step_by(V::LANES) {
                    let theirs = V::load(&other.acc[c..]).mul(theirs);
                    V::load(&self.acc[c..]).mul_add(ours, theirs).store(&mut self.acc[c..]);
                }
            }
        }
    }
}

/// A worker's buffers; see [`scratch`].
struct Buffers<'s> {
    /// Rows of q, with the sign of the scale.
    q: &'s mut [f32],
    /// Of all splits so far, and of one.
    whole: Sums<'s>,
    split: Sums<'s>,
    /// A tile of keys and values that cannot be read where they lie.
    k: &'s mut [f32],
    v: &'s mut [f32],
    /// Logits, then p, of a step.
    s: &'s mut [f32],
    /// For the compressive memory: panels of o, of σ(q) and of what they read, the shares of the gate, m; and for
    /// transposing.
    panel: &'s mut [f32],
    sigma_q: &'s mut [f32],
    read: &'s mut [f32],
    shares: &'s mut [f32],
    stage: &'s mut [f32],
    m: &'s mut [f32],
}

/// The few rows of a block in the call, and some splits of their keys.
pub(super) struct FewRows<'a, 's> {
    pub kernel: &'a Kernel<'a>,
    pub rows: &'a RowGroup<'a>,
    pub piece: Piece,
    /// What splits leave, where a head has several tasks.
    pub partials: Option<&'a Output<'a>>,
    pub task: &'s mut Task,
    pub scratch: &'s mut [f32],
}

impl Body for FewRows<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector, const MR: usize, const NR: usize>(self) {
        let FewRows { kernel, rows, piece, partials, task, scratch } = self;
        // Splits are dealt out where all of a stream's rows are few.
        let splits = match !piece.is_memory && Tile::is_few(kernel.shape, piece.span.len as usize) {
            true => task.tile() * kernel.splits..(task.tile() + 1) * kernel.splits,
            false => 0..MAX_SPLITS,
        };
        Few::new(kernel, rows, partials, scratch).piece::<V>(task, &piece, splits);
    }
}

/// Few rows of a stream and kv head.
struct Few<'a, 's> {
    kernel: &'a Kernel<'a>,
    rows: &'a RowGroup<'a>,
    partials: Option<&'a Output<'a>>,
    b: Buffers<'s>,
}

impl<'a, 's> Few<'a, 's> {
    fn new(kernel: &'a Kernel<'a>, rows: &'a RowGroup<'a>, partials: Option<&'a Output<'a>>, scratch: &'s mut [f32]) -> Self {
        let [q, acc, row_max, row_sum, split, split_max, split_sum, k, v, s, panel, sigma_q, read, shares, stage, m] =
            carve(scratch, self::scratch(kernel.shape, kernel.tile));
        let whole = Sums { acc, row_max, row_sum };
        let split = Sums { acc: split, row_max: split_max, row_sum: split_sum };
        Few { kernel, rows, partials, b: Buffers { q, whole, split, k, v, s, panel, sigma_q, read, shares, stage, m } }
    }

    /// Splits `splits` of a piece: ends its rows if these are all that there are, else leaves what they have for [`JoinSplits`].
    #[inline(always)]
    fn piece<V: Vector>(&mut self, task: &mut Task, piece: &Piece, splits: Range<usize>) {
        let Kernel { shape, tile, keys, mem, sign, .. } = self.kernel;
        let all = splits_from_to(shape, mem.as_ref(), piece);
        let is_whole = splits.start == 0 && all.end <= splits.end;
        if !is_whole && (all.end <= splits.start || splits.end <= all.start) {
            return;
        }
        let (count, head) = (piece.tokens * shape.group(), [task.n(), task.group()]);
        pack::rows::<V, f32>(&self.rows.q, piece.places(shape, head, 0), count, tile.dp, self.b.q);
        if *sign != 1.0 {
            for q in self.b.q[..count * tile.dp].chunks_exact_mut(V::LANES) {
                V::load(q).mul(V::splat(*sign)).store(q);
            }
        }
        self.b.whole.clear(count, tile.dp);
        let tiles = tiles_of_one(shape, piece);
        let mut of_splits = OfSplits { few: self, task, piece, count, is_whole, first: all.start, splits, tiles, split: None };
        for tile in Walk::new(shape, keys, mem.as_ref(), piece, head[1]) {
            of_splits.tile::<V>(&tile);
        }
        of_splits.close::<V>();
        if is_whole {
            V::run(Finish { few: self, task, piece, count });
        }
    }

    /// A tile of keys, for all rows.
    #[inline(always)]
    fn tile<V: Vector>(&mut self, tile: &KeyTile<'_>, tokens: usize) {
        let (d, dp, group) = (self.kernel.shape.head_dim(), self.kernel.tile.dp, self.kernel.shape.group());
        let (keys, lead) = ((tile.range.end - tile.range.start) as usize, tile.lead(STEP));
        let mut bands: [Band; FEW_ROWS] = Default::default();
        let bands = if tile.visible(0) == tile.visible(tokens - 1) {
            bands[0] = Band { rows: 0..tokens * group, keys: 0..keys };
            &bands[..1]
        } else {
            for (t, band) in bands[..tokens].iter_mut().enumerate() {
                *band = Band { rows: t * group..(t + 1) * group, keys: tile.visible(t) };
            }
            &bands[..tokens]
        };
        let Buffers { q, split, k: k_rows, v: v_rows, s, .. } = &mut self.b;
        let Sums { acc, row_max, row_sum } = split;
        let rows = RowsInBands { q, dp, unit: self.kernel.unit, bands, s, acc, row_max, row_sum };
        let (of_k, of_v) = &tile.rows;
        if let (Some((k, k_stride)), Some((v, v_stride))) = (of_k.run(tile.range.start, keys), of_v.run(tile.range.start, keys))
            && d.is_multiple_of(V::LANES)
        {
            let strides = [k_stride, v_stride];
            match (k, v) {
                (Elements::F32(k), Elements::F32(v)) => {
                    return V::run(RowsOverTile::new(rows, [k, v], strides, lead..lead + keys, d));
                }
                // Where rows are taken one by one, each would widen the keys anew.
                (Elements::F16(k), Elements::F16(v)) if const { V::MR > 1 } => {
                    return V::run(RowsOverTile::new(rows, [k, v], strides, lead..lead + keys, d));
                }
                (Elements::Bf16(k), Elements::Bf16(v)) if const { V::MR > 1 } => {
                    return V::run(RowsOverTile::new(rows, [k, v], strides, lead..lead + keys, d));
                }
                _ => {}
            }
        }
        for (i, t) in tile.range.clone().enumerate() {
            widen::<V>(of_k.get(t), &mut k_rows[i * dp..][..dp]);
            widen::<V>(of_v.get(t), &mut v_rows[i * dp..][..dp]);
        }
        V::run(RowsOverTile::new(rows, [k_rows, v_rows], [dp; 2], lead..lead + keys, d.next_multiple_of(V::LANES)));
    }

    /// Joins what one more split has left in `b.split` to those before it.
    #[inline(always)]
    fn join<V: Vector>(&mut self, is_first: bool, count: usize) {
        let Buffers { whole, split: other, .. } = &mut self.b;
        match is_first {
            true => swap(whole, other),
            false => whole.join::<V>(other, count, self.kernel.tile.dp, self.kernel.unit),
        }
    }
}

/// Weighs the rows of a piece and writes them.
struct Finish<'f, 'a, 's> {
    few: &'f mut Few<'a, 's>,
    task: &'f mut Task,
    piece: &'f Piece,
    count: usize,
}

impl Body for Finish<'_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector, const MR: usize, const NR: usize>(self) {
        let Finish { few, task, piece, count } = self;
        let Few { kernel, rows, b, .. } = few;
        let (shape, dp, head) = (kernel.shape, kernel.tile.dp, [task.n(), task.group()]);
        let at = |r: usize| piece.at(shape, head, r);
        let infini = kernel.infini.as_ref().filter(|_| !piece.is_memory);
        for (r, o) in b.whole.acc.chunks_exact_mut(dp).take(count).enumerate() {
            let keys = Softmax { row_max: b.whole.row_max[r], row_sum: b.whole.row_sum[r] };
            match kernel.weigh(task, rows, at(r), keys) {
                Some(weight) => {
                    for o in o.chunks_exact_mut(V::LANES) {
                        // A sum that is rescaled to −0 is +0 beside a row that sees one more split: which zero, must not show.
                        V::load(o).mul_add(V::splat(weight), V::splat(0.0)).store(o);
                    }
                }
                None => o.fill(0.0),
            }
        }
        let places = || piece.places(shape, head, 0);
        if let (Some(o_local), false) = (&kernel.o_local, piece.is_memory) {
            o_local.write_rows::<V>(task, &b.whole.acc[..count * dp], dp, places());
        }
        if infini.is_none() {
            rows.o.write_rows::<V>(task, &b.whole.acc[..count * dp], dp, places());
        }
        let Some(state) = infini else { return };
        let (width, heads) = (V::MR * V::LANES, head[1] * shape.group()..(head[1] + 1) * shape.group());
        for first in (0..count).step_by(width) {
            let (end, panel) = (count.min(first + width), &mut b.panel[..width * dp]);
            pack::panel::<V, f32>((first..end).map(|r| Elements::F32(&b.whole.acc[r * dp..][..dp])), end - first, 1.0, panel);
            let places = piece.places(shape, head, first);
            let row = |at| mutate!("infini-rotated-query", state.q.row(at), rows.q.row(at));
            let buffers = [&mut *b.sigma_q, &mut *b.read, &mut *b.m, &mut *b.shares];
            state.gate_panel::<V>(&piece.span, piece.i, heads.clone(), first..end, places.clone().map(row), buffers, panel);
            rows.o.write_panel::<V>(task, panel, end - first, b.stage, places);
        }
    }
}

/// The tiles of a piece of few rows, split by split.
struct OfSplits<'f, 'a, 's, 't> {
    few: &'f mut Few<'a, 's>,
    task: &'t mut Task,
    piece: &'t Piece,
    count: usize,
    /// Whether `splits` are all that the piece has.
    is_whole: bool,
    /// The piece's first split.
    first: usize,
    splits: Range<usize>,
    /// Tiles in a split.
    tiles: usize,
    /// The split whose sums are being made.
    split: Option<usize>,
}

impl OfSplits<'_, '_, '_, '_> {
    /// Ends the current split.
    #[inline(always)]
    fn close<V: Vector>(&mut self) {
        let Some(split) = self.split.take() else { return };
        let OfSplits { few, task, piece, count, .. } = self;
        if self.is_whole {
            return few.join::<V>(split == self.first, *count);
        }
        let Some(partials) = few.partials else { return };
        let (shape, dp, head, sums) = (few.kernel.shape, few.kernel.tile.dp, [task.n(), task.group()], &few.b.split);
        for r in 0..*count {
            let at = partial_at(partials.layout(), split, piece.at(shape, head, r));
            let partial = partials.row::<f32>(task, at);
            partial[..dp].copy_from_slice(&sums.acc[r * dp..][..dp]);
            [partial[dp], partial[dp + 1]] = [sums.row_max[r], sums.row_sum[r]];
        }
    }

    /// A tile of keys, for all rows.
    #[inline(always)]
    fn tile<V: Vector>(&mut self, tile: &KeyTile<'_>) {
        let split = tile.number / self.tiles;
        if !self.splits.contains(&split) {
            return;
        }
        if self.split != Some(split) {
            self.close::<V>();
            self.split = Some(split);
            self.few.b.split.clear(self.count, self.few.kernel.tile.dp);
        }
        self.few.tile::<V>(tile, self.piece.tokens);
    }
}

/// A task of the second phase: joins the splits of few rows that several tasks have left.
pub(super) struct JoinSplits<'a, 's> {
    pub kernel: &'a Kernel<'a>,
    pub partials: Input<'a>,
    pub task: &'s mut Task,
    pub scratch: &'s mut [f32],
}

impl Body for JoinSplits<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector, const MR: usize, const NR: usize>(self) {
        let JoinSplits { kernel, partials, task, scratch } = self;
        let (shape, dp, span, head) = (kernel.shape, kernel.tile.dp, task.span(), [task.n(), task.group()]);
        let Some(rows) = &kernel.rows else { return };
        if !Tile::is_few(shape, span.len as usize) {
            return;
        }
        let mut few = Few::new(kernel, rows, None, scratch);
        for piece in Piece::of_rows(shape, span, 0..span.len as usize) {
            let all = splits_from_to(shape, kernel.mem.as_ref(), &piece);
            if all.end <= kernel.splits {
                continue; // One task had them all.
            }
            let count = piece.tokens * shape.group();
            let end = mutate!("attend-split-lost", all.end, all.end - 1);
            // What nobody has written is what an earlier call has left there.
            for split in splits_of(shape, kernel.mem.as_ref(), &piece).filter(|split| *split < end) {
                for r in 0..count {
                    let partial = partials.f32(partial_at(partials.layout(), split, piece.at(shape, head, r)));
                    few.b.split.acc[r * dp..][..dp].copy_from_slice(&partial[..dp]);
                    [few.b.split.row_max[r], few.b.split.row_sum[r]] = [partial[dp], partial[dp + 1]];
                }
                few.join::<V>(split == all.start, count);
            }
            V::run(Finish { few: &mut few, task, piece: &piece, count });
        }
    }
}
