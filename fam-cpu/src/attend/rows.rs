//! A few rows over one tile of keys: logits, softmax and P·V.
//!
//! ```text
//! S[t][r] = Σ_c k[t][c]·q[r][c]        P = exp((S − row_max)·unit)        O[r][c] = O[r][c]·before + Σ_t v[t][c]·P[t][r]
//! ```
//!
//! In both products **a lane is a channel**: in a panel most lanes would have no row. Keys and values are read in their own type, once for
//! all rows, and widened in registers. Only logits need a horizontal step, and it adds up those of several keys and rows at once; in the
//! softmax a lane is a row again. What a row gets does not depend on the rows beside it: its logits are sums of lanes, its
//! results chains over the keys that it sees.
//!
//! Few rows are bound by memory. A tile is worked off in steps of `STEP` keys, and each loop asks for two lines for each that it reads: into
//! the second level of cache for the one that another loop will read `AHEAD` bytes later, since keys and values are two streams, and
//! the processor's own prefetch loses both whenever they take turns; and into the first for the one `SOON` bytes behind. What the first
//! level waits for is counted in few entries, which lines from memory would hold for long.

use crate::convert::Convert;
use crate::product::zero;
use crate::softmax;
use crate::tile::{AHEAD, SOON, STEP};
use crate::vector::{Body, MAX_LANES, Vector, lane_sums};
use fam_core::mutate;
use std::ops::Range;

/// Keys, or values: rows of whole vectors, `stride` apart.
#[derive(Clone, Copy)]
struct Run<'a, E> {
    data: &'a [E],
    stride: usize,
}

impl<E> Run<'_, E> {
    /// `count` elements of row `t` from channel `c` on.
    #[inline(always)]
    fn row(&self, t: usize, c: usize, count: usize) -> &[E] {
        &self.data[t * self.stride + c..][..count]
    }

    /// How many bytes behind a row that is read, row by row, is the one of `next` that will be read so many steps later.
    #[inline(always)]
    fn ahead(&self, next: &Self, steps: usize) -> usize {
        let row = next.data.as_ptr().wrapping_add((steps * STEP).wrapping_mul(next.stride));
        (row as usize).wrapping_sub(self.data.as_ptr() as usize)
    }
}

/// Rows that see the same keys of the tile.
#[derive(Clone, Debug, Default)]
pub(super) struct Band {
    pub rows: Range<usize>,
    pub keys: Range<usize>,
}

/// Few rows, and what they have of the keys so far.
pub(super) struct RowsInBands<'a> {
    /// `[rows][dp]`, with the sign of the scale, zeros behind the last channel.
    pub q: &'a [f32],
    pub dp: usize,
    /// |scale|.
    pub unit: f32,
    /// All rows.
    pub bands: &'a [Band],
    /// S, then P, of a step and a vector of rows, `[STEP][LANES]`.
    pub s: &'a mut [f32],
    /// O, `[rows][dp]`.
    pub acc: &'a mut [f32],
    /// Of whole vectors of rows.
    pub row_max: &'a mut [f32],
    pub row_sum: &'a mut [f32],
}

/// See the file's head.
pub(super) struct RowsOverTile<'a, E> {
    rows: RowsInBands<'a>,
    k: Run<'a, E>,
    v: Run<'a, E>,
    /// Places of the tile's keys, counted from where a step begins.
    places: Range<usize>,
    /// Channels, whole vectors: zeros behind the last.
    width: usize,
}

impl<'a, E> RowsOverTile<'a, E> {
    /// Keys and values `strides` elements apart, of `width` channels: whole vectors, zeros behind the last.
    pub fn new(rows: RowsInBands<'a>, [k, v]: [&'a [E]; 2], strides: [usize; 2], places: Range<usize>, width: usize) -> Self {
        RowsOverTile { rows, k: Run { data: k, stride: strides[0] }, v: Run { data: v, stride: strides[1] }, places, width }
    }
}

impl<E: Convert> Body for RowsOverTile<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector, const MR: usize, const NR: usize>(mut self) {
        // A step has its keys, then its values: what is so many turns ahead.
        let turns = (AHEAD / (STEP * self.width * size_of::<E>())).max(1);
        let ahead = match turns % 2 {
            0 => [self.k.ahead(&self.k, turns / 2), self.v.ahead(&self.v, turns / 2)],
            _ => [self.k.ahead(&self.v, turns / 2), self.v.ahead(&self.k, turns / 2 + 1)],
        };
        let count = self.rows.bands.last().map_or(0, |band| band.rows.end);
        // Like tiles, steps begin at places that depend on their distance to the rows' block alone.
        for first in (0..self.places.end).step_by(STEP) {
            let step = first.max(self.places.start) - self.places.start..self.places.end.min(first + STEP) - self.places.start;
            for r in (0..count).step_by(V::LANES) {
                self.step::<V, MR, NR>(step.clone(), r..count.min(r + V::LANES), ahead);
            }
        }
    }
}

/// Some rows and some keys of a step.
#[derive(Clone, Copy)]
struct Block {
    /// The first row.
    r: usize,
    /// The keys.
    keys: [usize; 2],
    /// Where in `s` the first row's first key is.
    s: usize,
}

impl<E: Convert> RowsOverTile<'_, E> {
    /// The keys `step` for a vector of rows.
    #[inline(always)]
    fn step<V: Vector, const MR: usize, const NR: usize>(&mut self, step: Range<usize>, rows: Range<usize>, ahead: [usize; 2]) {
        let bands = self.rows.bands;
        if bands.len() > 1 {
            self.rows.s[..step.len() * V::LANES].fill(mutate!("attend-finite-sentinel", f32::NEG_INFINITY, -1e4));
        }
        // A row takes four of the sums that fill the registers.
        let most = MR * NR / 4;
        let block = |band: &Band, r: usize| {
            let keys = [band.keys.start.max(step.start), band.keys.end.min(step.end)];
            Block { r, keys, s: keys[0].saturating_sub(step.start) * V::LANES + r - rows.start }
        };
        for band in bands {
            let mut r = band.rows.start.max(rows.start);
            let end = band.rows.end.min(rows.end);
            while r < end {
                let block = block(band, r);
                r += if most >= 4 && end - r >= 4 {
                    self.logits::<V, 4>(block, ahead[0])
                } else if most >= 2 && end - r >= 2 {
                    self.logits::<V, 2>(block, ahead[0])
                } else {
                    self.logits::<V, 1>(block, ahead[0])
                };
            }
        }

        let lanes = rows.start..rows.start + V::LANES;
        let RowsInBands { row_max, row_sum, s, unit, .. } = &mut self.rows;
        let states = [&mut row_max[lanes.clone()], &mut row_sum[lanes]];
        let mut maxima = V::load(states[0]);
        for s in s.chunks_exact(V::LANES).take(step.len()) {
            maxima = maxima.max(V::load(s));
        }
        let [factors] = softmax::update::<V, f32, 1>(states, [maxima], *unit, s, V::LANES, 0..step.len());
        let mut before = [0.0; MAX_LANES];
        factors.store(&mut before);

        for band in bands {
            let mut r = band.rows.start.max(rows.start);
            let end = band.rows.end.min(rows.end);
            while r < end {
                let (block, before) = (block(band, r), &before[r - rows.start..]);
                r += if most >= 4 && end - r >= 4 {
                    self.values::<V, 4>(block, before, ahead[1])
                } else if most >= 2 && end - r >= 2 {
                    self.values::<V, 2>(block, before, ahead[1])
                } else {
                    self.values::<V, 1>(block, before, ahead[1])
                };
            }
        }
    }

    /// Logits of a block of `R` rows. Returns `R`.
    #[inline(always)]
    fn logits<V: Vector, const R: usize>(&mut self, block: Block, ahead: usize) -> usize {
        let [mut t, end] = block.keys;
        while t < end {
            if end - block.keys[0] < 4 {
                self.logits_of::<V, R, 1>(block, t, ahead);
                t += 1;
            } else {
                // The last keys again rather than fewer at once: a logit is the same however often it is computed.
                self.logits_of::<V, R, 4>(block, t.min(end - 4), ahead);
                t += 4;
            }
        }
        R
    }

    /// The same of the keys `t .. t + K`.
    #[inline(always)]
    fn logits_of<V: Vector, const R: usize, const K: usize>(&mut self, block: Block, t: usize, ahead: usize) {
        let (width, dp) = (self.width, self.rows.dp);
        let k: [&[E]; K] = std::array::from_fn(|i| self.k.row(t + i, 0, width));
        let q: [&[f32]; R] = std::array::from_fn(|j| &self.rows.q[(block.r + j) * dp..][..width]);
        let mut sum = zero::<V, R, K>();
        let mut c = 0;
        while c + V::LANES <= width {
            let mut x = [V::splat(0.0); R];
            for j in 0..R {
                x[j] = V::load(&q[j][c..c + V::LANES]);
            }
            for i in 0..K {
                let k = &k[i][c..c + V::LANES];
                V::prefetch(k.as_ptr().wrapping_byte_add(SOON));
                V::prefetch_far(k.as_ptr().wrapping_byte_add(ahead));
                let k: V = E::load(k);
                for j in 0..R {
                    sum[i][j] = k.mul_add(x[j], sum[i][j]);
                }
            }
            c += V::LANES;
        }
        let mut all = [sum[0][0]; MAX_LANES];
        for i in 0..K {
            for j in 0..R {
                all[i * R + j] = sum[i][j];
            }
        }
        let logits = lane_sums(all, K * R);
        for i in 0..K {
            self.rows.s[block.s + (t - block.keys[0] + i) * V::LANES..][..R].copy_from_slice(&logits[i * R..][..R]);
        }
    }

    /// Rescales the sums of a block of `R` rows and adds what its keys give. Returns `R`.
    #[inline(always)]
    fn values<V: Vector, const R: usize>(&mut self, block: Block, before: &[f32], ahead: usize) -> usize {
        let mut c = 0;
        while c < self.width && block.keys[0] < block.keys[1] {
            c += if c + 4 * V::LANES <= self.width {
                self.values_of::<V, R, 4>(block, before, c, ahead)
            } else {
                self.values_of::<V, R, 1>(block, before, c, ahead)
            };
        }
        R
    }

    /// The same for `C` vectors of channels from channel `c` on. Returns their channels.
    #[inline(always)]
    fn values_of<V: Vector, const R: usize, const C: usize>(
        &mut self,
        block: Block,
        before: &[f32],
        c: usize,
        ahead: usize,
    ) -> usize {
        let mut sum = zero::<V, C, R>();
        let p = self.rows.s[block.s..].chunks(V::LANES);
        for (t, p) in (block.keys[0]..block.keys[1]).zip(p) {
            let (v, p) = (self.v.row(t, c, C * V::LANES), &p[..R]);
            for i in 0..C {
                let v = &v[i * V::LANES..][..V::LANES];
                V::prefetch(v.as_ptr().wrapping_byte_add(SOON));
                V::prefetch_far(v.as_ptr().wrapping_byte_add(ahead));
                let v: V = E::load(v);
                for j in 0..R {
                    sum[j][i] = v.mul_add(V::splat(p[j]), sum[j][i]);
                }
            }
        }
        for j in 0..R {
            let acc = &mut self.rows.acc[(block.r + j) * self.rows.dp + c..][..C * V::LANES];
            for i in 0..C {
                let acc = &mut acc[i * V::LANES..][..V::LANES];
                V::load(acc).mul_add(V::splat(before[j]), sum[j][i]).store(acc);
            }
        }
        C * V::LANES
    }
}
