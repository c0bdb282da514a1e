// Query rows in tiles: which a workgroup has, and their elements as vectors of four channels. An op's own text gives `words2`, `put` and `put_half`.

const COLUMNS = (HEAD_DIM + 3u) / 4u; // vectors of four channels
const CHUNKS = (COLUMNS + 15u) / 16u; // and 64 channels at once

// A task: a block of a stream, some of its rows, and which keys these may see.
struct Piece {
    is_memory: bool,
    n: u32,
    i: u32,           // block of the call
    kv_head: u32,
    first: u32,       // row of the piece, heads folded
    rows: u32,        // rows of the block
    token: u32,       // token of the call at which they begin
    base: i32,        // first token of the block, from the call's first
    oldest: i32,      // first key that exists; positions count from the block's first token
    end: i32,         // one past the last key that a memory row sees
}

// The words of four channels of the row at element `at`: nothing is made of them yet, so that many can be on their way. Words beyond the row are
// not read.
fn ask(which: u32, in_memory: bool, at: u32, column: u32) -> vec4<u32> {
    let last = word(DTYPE, at + HEAD_DIM - 1u);
    let first = word(DTYPE, at + 4u * column);
    let words = vec4(words2(which, in_memory, first, min(first + 1u, last)), 0u, 0u);
    // Two elements to a word, a row that begins with the second of one has a third.
    if (DTYPE == F32 || (at & 1u) == 1u) {
        return vec4(words.xy, words2(which, in_memory, min(first + 2u, last), min(first + 3u, last)));
    }
    return words;
}

// Their elements; channels beyond the head are 0.
fn widen(words: vec4<u32>, at: u32, column: u32) -> vec4<f32> {
    var x = bitcast<vec4<f32>>(words);
    if (DTYPE != F32) {
        let is_odd = (at & 1u) == 1u;
        let low = select(words.x, (words.x >> 16u) | (words.y << 16u), is_odd);
        let high = select(words.y, (words.y >> 16u) | (words.z << 16u), is_odd);
        x = vec4(half(DTYPE, low, 0u), half(DTYPE, low, 1u), half(DTYPE, high, 0u), half(DTYPE, high, 1u));
    }
    if (HEAD_DIM % 4u == 0u) {
        return x;
    }
    return select(vec4(0.0), x, vec4(4u * column) + vec4(0u, 1u, 2u, 3u) < vec4(HEAD_DIM));
}

// Four channels of the row at element `at`; 0 where it is not there.
fn load4(which: u32, in_memory: bool, at: u32, column: u32, is_there: bool) -> vec4<f32> {
    if (!is_there) {
        return vec4(0.0);
    }
    return widen(ask(which, in_memory, at, column), at, column);
}

fn store4(which: u32, dtype: u32, i: u32, column: u32, x: vec4<f32>) {
    let first = i + 4u * column;
    let n = min(4u, HEAD_DIM - 4u * column);
    if (dtype == F32) {
        for (var j = 0u; j < n; j++) {
            put(which, first + j, bitcast<u32>(x[j]));
        }
    } else if (n == 4u && (first & 1u) == 0u) {
        put(which, first >> 1u, narrow(dtype, x.x) | (narrow(dtype, x.y) << 16u));
        put(which, (first >> 1u) + 1u, narrow(dtype, x.z) | (narrow(dtype, x.w) << 16u));
    } else {
        for (var j = 0u; j < n; j++) {
            put_half(which, first + j, narrow(dtype, x[j]));
        }
    }
}

// Element at which a row of the piece begins, in q, o or lse.
fn row_place(t: Tensor, piece: Piece, row: u32) -> u32 {
    let group = size(Group);
    let head = piece.kv_head * group + row % group;
    if (piece.is_memory) {
        return place(t, piece.n, piece.i, row / group, head);
    }
    return place(t, piece.n, 0u, piece.token + row / group, head);
}

// Rows from `first` on of block i of the call; heads of all streams are numbered.
fn rows_of(head: u32, i: u32, is_memory: bool, first: u32) -> Piece {
    var piece: Piece;
    piece.is_memory = is_memory;
    piece.n = head / size(KvHeads);
    if (piece.n >= size(Batch)) {
        return piece;
    }
    piece.kv_head = head % size(KvHeads);
    let s = stream(piece.n);
    piece.i = i;
    piece.first = first;
    piece.base = i32(i * size(BlockLen)) - i32(s.in_block);
    piece.oldest = -i32(s.before) - piece.base;
    piece.token = u32(max(piece.base, 0));
    let end = min(i32(size(BlockLen)), i32(s.len) - piece.base);
    piece.end = end;
    if (i >= s.blocks) {
        return piece;
    }
    if (is_memory) {
        piece.rows = size(MemLen) * size(Group);
    } else {
        piece.rows = u32(piece.base + end - i32(piece.token)) * size(Group);
    }
    return piece;
}
