//! Which rows of a call see which keys, tile by tile: the order of keys that `attend` and its backward pass have in common.
//!
//! A piece of rows that lie in one block walks its keys in the order
//!
//! ```text
//! window, oldest first  |  memory rows  |  current block
//! ```
//!
//! in tiles of `BLOCK_N` keys. Window tiles are counted back from the block's start, those of the current block forward from it. So which
//! keys share a tile depends on their distance to the row's block alone: a row's arithmetic is the same in a step and a prefill of
//! more than `FEW_ROWS` rows, in any batch, slot, cache or tile of rows, and so are its bits; and rows that are few have theirs.

use crate::memory::{Cache, HeadRows};
use crate::tile::{BLOCK_N, MAX_MR, MAX_WIDTH, Tile};
use crate::vector::Vector;
use fam_core::{Shape, Span, Window, mutate};
use std::ops::Range;

/// Rows of one tile in one block. Row `r` is query head `r mod group` of the group, of token (or memory row) `first + r / group`.
pub(crate) struct Piece {
    pub span: Span,
    /// Block of the call.
    pub i: usize,
    /// Position of the block's first token.
    block: u64,
    /// Position of the first key that the first token sees: with a window of blocks they all do.
    window: u64,
    /// First token, counted from the call's first; or first memory row.
    pub first: usize,
    pub tokens: usize,
    pub is_memory: bool,
}

impl Piece {
    /// Tokens `rows` of a span, counted from its first, or memory rows `rows`, in block `i` of the call.
    pub fn new(shape: &Shape, span: Span, i: usize, rows: Range<usize>, is_memory: bool) -> Piece {
        let block = block_start(shape, &span, i);
        let window = span.window_first(if is_memory { block } else { span.start + rows.start as u64 }, shape);
        Piece { span, i, block, window, first: rows.start, tokens: rows.len(), is_memory }
    }

    /// Tokens of the span, counted from its first, that lie in its block `i`.
    pub fn tokens_of_block(shape: &Shape, span: &Span, i: usize) -> Range<usize> {
        let block = block_start(shape, span, i);
        (block.max(span.start) - span.start) as usize..((block + shape.block_len() as u64).min(span.end()) - span.start) as usize
    }

    /// Tokens `rows` of a span, block by block.
    pub fn of_rows(shape: &Shape, span: Span, rows: Range<usize>) -> impl Iterator<Item = Piece> {
        let block_len = shape.block_len() as u64;
        let mut first = rows.start;
        std::iter::from_fn(move || {
            let position = span.start + first as u64;
            let i = (position / block_len - span.start / block_len) as usize;
            let end = rows.end.min(first + (block_len - position % block_len) as usize);
            let piece = (first < end).then(|| Piece::new(shape, span, i, first..end, false));
            first = end;
            piece
        })
    }

    /// Whether the rows of its block in the call are few, whatever tile of them it is; or the block's memory rows.
    pub fn is_few(&self, shape: &Shape) -> bool {
        match self.is_memory {
            true => Tile::has_few_mem_rows(shape),
            false => Tile::is_few(shape, Piece::tokens_of_block(shape, &self.span, self.i).len()),
        }
    }

    /// Row `r` of a stream and kv head, in the tensors of its kind.
    pub fn at(&self, shape: &Shape, head: [usize; 2], r: usize) -> [usize; 4] {
        self.places(shape, head, r).at
    }

    /// Row `r` and those that follow.
    pub fn places(&self, shape: &Shape, [n, kv_head]: [usize; 2], r: usize) -> Places {
        let group = shape.group();
        let first = [n, if self.is_memory { self.i } else { 0 }, self.first, kv_head * group];
        Places::new(first, group, r)
    }

    /// Keys of window and current block that token `t` of the piece sees, counted from the block's start.
    fn visible(&self, t: usize, shape: &Shape) -> Range<i64> {
        let from_block = |position: u64| position.wrapping_sub(self.block).cast_signed();
        let (span, block_len) = (&self.span, shape.block_len());
        if self.is_memory {
            let keys = span.block_keys(self.i, block_len);
            let (first, end) = (from_block(keys.start), from_block(keys.end));
            let first = mutate!("attend-mem-rows-window", first, first.min(from_block(self.window)));
            return first..mutate!("attend-mem-rows-causal", end, end.min((self.first + t) as i64 + 1));
        }
        let position = span.start + (self.first + t) as u64;
        let first = from_block(match shape.window() {
            Window::Blocks(_) => self.window,
            _ => span.window_first(position, shape),
        });
        let end = from_block(position + 1);
        let first = mutate!("attend-window-block", first, (first + block_len as i64).min(first.max(0)));
        let first = mutate!(
            "attend-window-tokens",
            first,
            match shape.window() {
                Window::Blocks(m) => first.max(end - 1 - (m * block_len) as i64),
                _ => first,
            }
        );
        let first = mutate!(
            "attend-token-window",
            first,
            if shape.window() == Window::Tokens(1) { first } else { (first + 1).min(end - 1) }
        );
        first..mutate!("attend-dropped-key", end, (first + 1).max(end - 1))
    }
}

/// Position of the first token of the span's block `i`.
fn block_start(shape: &Shape, span: &Span, i: usize) -> u64 {
    let block_len = shape.block_len() as u64;
    (span.start / block_len + i as u64) * block_len
}

/// Rows of a tensor `[batch, blocks, rows, heads]`: the heads of a group, then those of the next token, without end. A division for each
/// would take as long as the rest of what is done to find a row.
#[derive(Clone)]
pub(crate) struct Places {
    at: [usize; 4],
    heads: Range<usize>,
}

impl Places {
    /// From row `r` on, if `first` is row 0.
    pub fn new([n, block, token, head]: [usize; 4], group: usize, r: usize) -> Self {
        Places { at: [n, block, token + r / group, head + r % group], heads: head..head + group }
    }
}

impl Iterator for Places {
    type Item = [usize; 4];

    #[inline(always)]
    fn next(&mut self) -> Option<[usize; 4]> {
        let at = self.at;
        self.at[3] += 1;
        if self.at[3] == self.heads.end {
            (self.at[2], self.at[3]) = (at[2] + 1, self.heads.start);
        }
        Some(at)
    }
}

/// Keys and values that share a tile, and are seen by some row of a piece.
pub(crate) struct KeyTile<'a> {
    /// The head's rows of the cache.
    pub rows: (HeadRows<'a>, HeadRows<'a>),
    /// Numbers of the tile's rows in the cache: from the first that some row sees to the last.
    pub range: Range<u64>,
    /// Slot, entry and head in the cache.
    pub at: [usize; 3],
    /// Number of the tile among all that a row of the shape can see, wherever in its block it is ([`most_tiles`]).
    pub number: usize,
    /// Whether they are memory rows.
    pub is_memory: bool,
    /// Whether all rows of the piece see all of them.
    pub is_whole: bool,
    /// Memory keys that all rows see, or what `piece` says; and the first key of the tile on that scale.
    memory: Option<Range<i64>>,
    first: i64,
    piece: &'a Piece,
    shape: &'a Shape,
}

impl KeyTile<'_> {
    /// Keys of the tile that token `t` of the piece sees.
    pub fn visible(&self, t: usize) -> Range<usize> {
        let keys = self.memory.clone().unwrap_or_else(|| self.piece.visible(t, self.shape));
        let count = (self.range.end - self.range.start) as i64;
        let in_tile = |key: i64| (key - self.first).clamp(0, count) as usize;
        in_tile(keys.start)..in_tile(keys.end)
    }

    /// Asks for the keys and values, as [`HeadRows::prefetch`] does.
    pub fn prefetch<V: Vector>(&self) {
        self.rows.0.prefetch::<V>(self.range.clone());
        self.rows.1.prefetch::<V>(self.range.clone());
    }

    /// The place of the first key where factors hold so many terms ([`crate::product::Factor`]): places are counted from where a factor
    /// begins. Like tiles, factors begin at places that depend on their distance to the row's block alone.
    pub fn lead(&self, terms: usize) -> usize {
        self.first.rem_euclid(terms as i64) as usize
    }

    /// Rows of the piece that see a key of `keys`: the rows between two of them do so too.
    #[inline(never)]
    pub fn rows_seeing(&self, keys: &Range<usize>) -> Range<usize> {
        let (group, tokens) = (self.shape.group(), self.piece.tokens);
        if self.is_whole {
            return 0..tokens * group;
        }
        let first = partition_point(tokens, |t| self.visible(t).end <= keys.start);
        let first = mutate!("backward-rows-seeing", first, (first + 1).min(tokens));
        first * group..partition_point(tokens, |t| self.visible(t).start < keys.end) * group
    }

    /// What the vectors, of so many lanes, of a panel of `rows` see, as places of keys of which the first has place `lead`. Where a vector
    /// does not see all, `ranges` gets each row's first key, and behind `MAX_WIDTH` the one after its last.
    #[inline(never)]
    pub fn seen(&self, rows: Range<usize>, lanes: usize, lead: usize, ranges: &mut [f32]) -> [Seen; MAX_MR] {
        let group = self.shape.group();
        let count = (self.range.end - self.range.start) as usize;
        let visible = |row: usize| {
            let keys = self.visible(row / group);
            lead + keys.start..lead + keys.end
        };
        let mut of_vectors: [Seen; MAX_MR] = Default::default();
        if self.is_whole {
            of_vectors[..rows.len().div_ceil(lanes)].fill(Seen { any: lead..lead + count, all: lead..lead + count });
            return of_vectors;
        }
        for (of_vector, r) in of_vectors.iter_mut().zip(rows.clone().step_by(lanes)) {
            let last = rows.end.min(r + lanes) - 1;
            *of_vector = Seen::new(visible(r), visible(last));
            // Looked at for keys that not all rows of the panel see.
            if of_vector.all != (lead..lead + count) {
                for lane in 0..lanes {
                    let (keys, at) = (visible(last.min(r + lane)), r - rows.start + lane);
                    (ranges[at], ranges[MAX_WIDTH + at]) = (keys.start as f32, keys.end as f32);
                }
            }
        }
        of_vectors
    }
}

/// The first of `0 .. count` for which `is_before` does not hold, which holds for none after it.
fn partition_point(count: usize, is_before: impl Fn(usize) -> bool) -> usize {
    let (mut first, mut end) = (0, count);
    while first < end {
        let middle = (first + end) / 2;
        if is_before(middle) { first = middle + 1 } else { end = middle }
    }
    first
}

/// The keys of a tile that a vector of rows sees.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Seen {
    /// Those that some of its rows see.
    pub any: Range<usize>,
    /// Those that all of its rows see: a part of `any`.
    pub all: Range<usize>,
}

impl Seen {
    /// The keys that some row of some vector sees.
    #[inline(always)]
    pub fn of_panel(vectors: &[Seen]) -> Option<Range<usize>> {
        let any = vectors.iter().map(|s| s.any.clone()).filter(|any| !any.is_empty());
        any.reduce(|a, b| a.start.min(b.start)..a.end.max(b.end))
    }

    /// Factors of so many terms that some row sees, and those whose terms all rows see, or nobody: beyond the ends of the tile's `keys` are
    /// zeros.
    pub fn factors(&self, terms: usize, keys: &Range<usize>) -> (Range<usize>, Range<usize>) {
        let Seen { any, all } = self;
        let (begin, end) = (any.start / terms, any.end.div_ceil(terms));
        let from = if all.start == keys.start { all.start / terms } else { all.start.div_ceil(terms) };
        let until = if all.end == keys.end { all.end.div_ceil(terms) } else { all.end / terms };
        (begin..end, if from < until { from..until } else { end..end })
    }

    /// From the keys that the first and the last row see: neither end of a row's range lies before that of an earlier row.
    fn new(first: Range<usize>, last: Range<usize>) -> Self {
        let (any, all) = (first.start..last.end, last.start..first.end);
        // With none that all see, those before and after them are all of `any`.
        Seen { all: if all.is_empty() { any.end..any.end } else { all }, any }
    }
}

/// Keys of window, memory and own block that some row of the piece sees: from where tiles begin to one past the last, counted from the
/// block's start, and those of the memory from its first row.
fn segments(shape: &Shape, mem: Option<&Cache<'_>>, piece: &Piece) -> [Range<i64>; 3] {
    let (first, end) = (piece.visible(0, shape).start, piece.visible(piece.tokens - 1, shape).end);
    let step = BLOCK_N as i64;
    let window = -(-first.min(0) as u64).next_multiple_of(BLOCK_N as u64).cast_signed()..end.min(0);
    let memory = if mem.is_some() { i64::from(piece.span.mem_rows) } else { 0 };
    let all = mutate!("attend-mem-rows-all", memory, mem.map_or(0, |mem| mem.rows_per_entry().min(shape.mem_len()) as i64));
    let memory = mutate!("attend-mem-rows-short", all, (all - 1).max(0));
    let own = first.max(0) / step * step..mutate!("attend-partial-tile", end, if end > step { end / step * step } else { end });
    [window, 0..memory, own]
}

/// Most tiles of window, memory and own block that a row of the shape sees, a memory row if `is_memory`. They have numbers in this order; a
/// block with a short past or few rows of its own sees some from the middle.
pub(crate) fn most_tiles(shape: &Shape, is_memory: bool) -> [usize; 3] {
    let window = match shape.window() {
        // So the bits of memory rows do not depend on the window.
        _ if is_memory => 0,
        Window::Tokens(tokens) => tokens.saturating_sub(1),
        Window::Blocks(blocks) => blocks.saturating_mul(shape.block_len()),
        _ => 0,
    };
    [window, shape.mem_len(), shape.block_len()].map(|keys| keys.div_ceil(BLOCK_N))
}

/// Number of the tile of key `x` of window, memory or own block, as [`segments`] count it.
fn tile_number(shape: &Shape, is_memory: bool, segment: usize, x: i64) -> usize {
    let [window, memory, _] = most_tiles(shape, is_memory);
    [window, window, window + memory][segment].saturating_add_signed(x.div_euclid(BLOCK_N as i64) as isize)
}

/// Numbers of the tiles of a [`Walk`], of window, memory and own block: between two of these there may be tiles that no row sees.
pub(crate) fn tile_numbers(shape: &Shape, mem: Option<&Cache<'_>>, piece: &Piece) -> [Range<usize>; 3] {
    let segments = segments(shape, mem, piece);
    let number = |i, x| tile_number(shape, piece.is_memory, i, x);
    std::array::from_fn(|i| match &segments[i] {
        keys if keys.is_empty() => 0..0,
        keys => number(i, keys.start)..number(i, keys.end - 1) + 1,
    })
}

/// Every tile of keys that some row of a piece sees, in order. Keys that none sees are in no tile.
pub(crate) struct Walk<'a> {
    shape: &'a Shape,
    piece: &'a Piece,
    /// Window, memory and own block.
    segments: [Segment<'a>; 3],
    /// The segment that the next tile is of, and where it begins there.
    segment: usize,
    x: i64,
}

/// Keys of one kind that a piece sees.
struct Segment<'a> {
    /// The head's rows of their cache.
    rows: (HeadRows<'a>, HeadRows<'a>),
    /// Slot, entry and head there.
    at: [usize; 3],
    /// Number of the row of key 0. Arithmetic with it wraps, since a block may begin before the origin.
    row: u64,
    /// From where tiles begin.
    keys: Range<i64>,
    is_memory: bool,
}

impl<'a> Walk<'a> {
    /// Of the keys of kv head `kv_head`.
    pub fn new(shape: &'a Shape, keys: &Cache<'a>, mem: Option<&Cache<'a>>, piece: &'a Piece, kv_head: usize) -> Self {
        let span = &piece.span;
        let kv_head = mutate!("attend-gqa", kv_head, kv_head * shape.group() % shape.kv_heads());
        let slot = mutate!("attend-slot", span.slot as usize, 0);
        let origin = mutate!("attend-origin", span.origin, if keys.is_ring() { 0 } else { span.origin });
        let [window, of_memory, own] = segments(shape, mem, piece);
        let of_tokens = |keys_of_segment: Range<i64>| {
            let at = [slot, 0, kv_head];
            let row = piece.block.wrapping_sub(origin);
            Segment { rows: keys.rows(at), at, row, keys: keys_of_segment, is_memory: false }
        };
        let (window, own) = (of_tokens(window), of_tokens(own));
        let memory = match mem {
            Some(mem) => {
                let i = mutate!("attend-next-memory", piece.i, piece.i + 1);
                let entry = (u64::from(span.mem_entry) + i as u64) % mem.entries() as u64;
                let at = [slot, entry as usize, kv_head];
                Segment { rows: mem.rows(at), at, row: 0, keys: of_memory, is_memory: true }
            }
            None => of_tokens(0..0),
        };
        Walk { shape, piece, x: window.keys.start, segments: [window, memory, own], segment: 0 }
    }
}

impl<'a> Iterator for Walk<'a> {
    type Item = KeyTile<'a>;

    // Compiled once, not into every kernel.
    #[inline(never)]
    fn next(&mut self) -> Option<KeyTile<'a>> {
        let (shape, piece, step) = (self.shape, self.piece, BLOCK_N as i64);
        loop {
            let (number, segment, x) = (self.segment, self.segments.get(self.segment)?, self.x);
            if x >= segment.keys.end {
                self.segment += 1;
                self.x = self.segments.get(self.segment)?.keys.start;
                continue;
            }
            self.x += step;
            // From the first key of the tile that some row sees to the last.
            let memory = segment.is_memory.then(|| segment.keys.clone());
            let seen = |t: usize| memory.clone().unwrap_or_else(|| piece.visible(t, shape));
            let (first, last) = (seen(0), seen(piece.tokens - 1));
            let (from, until) = (first.start.max(x), last.end.min(x + step));
            if from < until {
                let row_of = |x: i64| segment.row.wrapping_add(x.cast_unsigned());
                return Some(KeyTile {
                    rows: segment.rows,
                    range: segment.rows.0.reduced(row_of(from)..row_of(until)),
                    at: segment.at,
                    number: tile_number(shape, piece.is_memory, number, x),
                    is_memory: segment.is_memory,
                    is_whole: first.end >= until && last.start <= from,
                    memory,
                    first: from,
                    piece,
                    shape,
                });
            }
        }
    }
}
