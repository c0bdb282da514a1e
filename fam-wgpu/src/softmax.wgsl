// What the kernels of `attend` share: which keys a row sees and where they lie, and how a row ends.

// The positions that a row sees, as a range. Rows beyond the piece see none.
fn seen(piece: Piece, row: u32) -> vec2<i32> {
    if (row >= piece.rows) {
        return vec2(0, 0);
    }
    if (piece.is_memory) {
        return vec2(max(0, piece.oldest), piece.end);
    }
    let position = i32(piece.token + row / size(Group)) - piece.base;
    var first = -i32(size(WindowBlocks));
    if (size(WindowTokens) > 0u) {
        first = position + 1 - i32(size(WindowTokens));
    }
    return vec2(max(first, piece.oldest), position + 1);
}

// Row of its cache, or of the memory, in which the key at position x from the block's first token lies.
fn cache_row(in_memory: bool, piece: Piece, s: Stream, x: i32) -> u32 {
    if (in_memory) {
        return u32(x);
    }
    let row = s.first_row + bitcast<u32>(piece.base + x);
    if (size(IsRing) == 1u) {
        return (row + size(RingRows)) % size(RingRows);
    }
    return row;
}

// Element at which row 0 of a head's keys, or values, begins.
fn cache_place(t: Tensor, in_memory: bool, piece: Piece, s: Stream) -> u32 {
    return place(t, s.slot, select(0u, (s.mem_entry + piece.i) % t.blocks, in_memory), 0u, piece.kv_head);
}

// Whether the block's rows are those of `few.wgsl`. It depends on the stream alone, and so do bits.
fn is_few(piece: Piece) -> bool {
    return !piece.is_memory && piece.rows <= FEW_ROWS;
}

// What a row's sums are multiplied by, and the bits of its lse.
struct Finished {
    weight: f32,
    lse: u32,
}

fn finish(row_max: f32, sum: f32) -> Finished {
    return Finished(1.0 / sum, bitcast<u32>(row_max + ln(sum)));
}

// The same with a sink: a logit of its own without a value. One of -inf is none.
fn join_sink(has_keys: bool, row_max: f32, sum: f32, sink: f32, without: Finished) -> Finished {
    if (bitcast<u32>(sink) == 0xff800000u) {
        return without;
    }
    if (!has_keys) {
        return Finished(0.0, bitcast<u32>(sink));
    }
    let most = max(row_max, sink);
    let before = exp_negative(row_max - most);
    let joined = fma(sum, before, exp_negative(sink - most));
    return Finished(before / joined, bitcast<u32>(most + ln(joined)));
}

// The end of a row of the piece: its largest logit, not yet scaled, and its sum of weights; the sink joins them.
fn row_end(piece: Piece, row: u32, has_keys: bool, row_max: f32, sum: f32) -> Finished {
    let most = row_max * bitcast<f32>(size(Unit));
    var end = Finished(0.0, 0xff800000u);
    if (has_keys) {
        end = finish(most, sum);
    }
    if (size(SinkAt) > 0u) {
        let group = size(Group);
        end = join_sink(has_keys, most, sum, per_head(size(SinkAt), piece.kv_head * group + row % group), end);
    }
    return end;
}

fn write_lse(piece: Piece, row: u32, end: Finished) {
    if (size(select(HasLse, HasMemLse, piece.is_memory)) == 1u) {
        let lse_tensor = select(Lse, MemLse, piece.is_memory);
        put_lse(lse_tensor, row_place(tensor(lse_tensor), piece, row), end.lse);
    }
}

