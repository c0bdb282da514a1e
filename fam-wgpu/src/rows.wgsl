// Query rows in tiles: which a workgroup has, and how vectors of four of their channels are written. An op's own text gives `put` and `put_half`.

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
