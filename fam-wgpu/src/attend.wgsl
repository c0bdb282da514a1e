// One joint softmax over window, memory and current block; `attend.rs` says how. A workgroup is BLOCK_M rows of a stream's block and kv head,
// query heads of a group folded into rows, 8 x 8 threads. Thread (tx, ty) owns four or eight rows from R ty on: with keys tx, tx + 8, tx + 16,
// tx + 24 of a tile their logits, with channels 4 tx .. and 32 + 4 tx .. of each 64 their sums.
//
// What is hot has no loops within: WGSL's guard against endless loops costs a third of the speed there.

const THREADS = 64u;
const R = BLOCK_M / 8u;     // rows of a thread
const FOURS = R / 4u;       // in vectors
const BLOCK_N = 32u;        // keys in a tile
const STEP = 8u;            // columns of q and keys at once

// Columns of q [row][column] and of keys [key][column ^ key % 8], so that eight keys lie in eight banks; then values [key][column], at last results [row][column].
var<workgroup> tile: array<vec4<f32>, 16u * BLOCK_M>;
var<workgroup> weights: array<vec4<f32>, BLOCK_N * 8u * FOURS>; // [key][four rows]
var<workgroup> partial: array<vec4<f32>, THREADS * FOURS>;      // what eight threads have of their rows
var<workgroup> ends: array<f32, BLOCK_M>;                        // what a row's sums are multiplied by

// Four rows of a thread, side by side in vectors.
struct Four {
    first: vec4<i32>,               // the tokens that they see
    end: vec4<i32>,
    has_keys: vec4<bool>,
    row_max: vec4<f32>,
    row_sum: vec4<f32>,
    logits: array<vec4<f32>, 4>,    // of four keys
    sums: array<vec4<f32>, 8u * CHUNKS>, // of each row two vectors of channels in each chunk
}

fn start(four: ptr<function, Four>, piece: Piece, row: u32) {
    let a = seen(piece, row);
    let b = seen(piece, row + 1u);
    let c = seen(piece, row + 2u);
    let d = seen(piece, row + 3u);
    (*four).first = vec4(a.x, b.x, c.x, d.x);
    (*four).end = vec4(a.y, b.y, c.y, d.y);
}

// Adds what four columns, at `at` of the tile, add to the logits of four keys.
fn add_logits(four: ptr<function, Four>, at: u32, k0: vec4<f32>, k1: vec4<f32>, k2: vec4<f32>, k3: vec4<f32>) {
    let q = mat4x4(tile[at], tile[at + STEP], tile[at + 2u * STEP], tile[at + 3u * STEP]);
    (*four).logits[0] += k0 * q;
    (*four).logits[1] += k1 * q;
    (*four).logits[2] += k2 * q;
    (*four).logits[3] += k3 * q;
}

// The keys of a tile and what of them rows see: of tokens each its own, of memory rows all that there are.
struct Keys {
    x0: i32,          // position of the first, of a memory row its number
    in_memory: bool,
    mem_rows: i32,
}

fn sees(four: ptr<function, Four>, keys: Keys, key: u32) -> vec4<bool> {
    let x = vec4(keys.x0 + i32(key));
    let of_memory = ((*four).first < (*four).end) & (x < vec4(keys.mem_rows));
    return select((x >= (*four).first) & (x < (*four).end), of_memory, vec4(keys.in_memory));
}

// The largest logits of the thread's keys.
fn largest(four: ptr<function, Four>, keys: Keys, tx: u32) -> vec4<f32> {
    var most = vec4(-3.4028234e38);
    for (var j = 0u; j < 4u; j++) {
        most = select(most, max(most, (*four).logits[j]), sees(four, keys, tx + 8u * j));
    }
    return most;
}

// Turns logits into weights, stored from `at` on; returns what sums so far are multiplied by. `most`: the largest logits of the tile.
fn weigh(four: ptr<function, Four>, keys: Keys, most: vec4<f32>, tx: u32, at: u32) -> vec4<f32> {
    let unit = bitcast<f32>(size(UnitLog2));
    let before = (*four).row_max;
    let had_keys = (*four).has_keys;
    var end = min((*four).end, vec4(keys.x0 + i32(BLOCK_N)));
    var first = max((*four).first, vec4(keys.x0));
    if (keys.in_memory) {
        first = vec4(0);
        end = select(vec4(0), vec4(1), (*four).first < (*four).end);
    }
    let has = first < end;
    let row_max = select(before, select(most, max(before, most), had_keys), has);
    let factor = select(vec4(1.0), exp2_of((before - row_max) * unit), had_keys & has);
    var sum = (*four).row_sum * factor;
    for (var j = 0u; j < 4u; j++) {
        let p = select(vec4(0.0), exp2_of(((*four).logits[j] - row_max) * unit), sees(four, keys, tx + 8u * j));
        sum += p;
        weights[at + 64u * FOURS * j] = p;
        (*four).logits[j] = vec4(0.0);
    }
    (*four).row_max = row_max;
    (*four).row_sum = sum;
    (*four).has_keys = had_keys | has;
    return factor;
}

fn rescale(four: ptr<function, Four>, chunk: u32, factor: vec4<f32>) -> array<vec4<f32>, 8> {
    var sums: array<vec4<f32>, 8>;
    for (var i = 0u; i < 4u; i++) {
        sums[2u * i] = (*four).sums[8u * chunk + 2u * i] * factor[i];
        sums[2u * i + 1u] = (*four).sums[8u * chunk + 2u * i + 1u] * factor[i];
    }
    return sums;
}

fn add_values(sums: ptr<function, array<vec4<f32>, 8>>, p: vec4<f32>, v0: vec4<f32>, v1: vec4<f32>) {
    (*sums)[0] += p.x * v0;
    (*sums)[1] += p.x * v1;
    (*sums)[2] += p.y * v0;
    (*sums)[3] += p.y * v1;
    (*sums)[4] += p.z * v0;
    (*sums)[5] += p.z * v1;
    (*sums)[6] += p.w * v0;
    (*sums)[7] += p.w * v1;
}

fn keep(four: ptr<function, Four>, chunk: u32, sums: array<vec4<f32>, 8>) {
    for (var i = 0u; i < 8u; i++) {
        (*four).sums[8u * chunk + i] = sums[i];
    }
}

// What a row's end needs, to where it is found.
fn leave(four: ptr<function, Four>, at: u32, sum: vec4<f32>) {
    weights[at] = (*four).row_max;
    weights[at + 1u] = sum;
    weights[at + 2u] = select(vec4(0.0), vec4(1.0), (*four).has_keys);
}

// Results of four rows in a chunk, to the tile from row `row` on.
fn scaled(four: ptr<function, Four>, chunk: u32, row: u32, tx: u32) {
    for (var i = 0u; i < 4u; i++) {
        for (var half = 0u; half < 2u; half++) {
            tile[16u * (row + i) + 8u * half + tx] = (*four).sums[8u * chunk + 2u * i + half] * ends[row + i];
        }
    }
}

@compute @workgroup_size(8, 8)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let piece = find(group_number(workgroup));
    if (piece.first >= piece.rows || is_few(piece)) {
        return;
    }
    let s = stream(piece.n);
    let tx = local.x;
    let ty = local.y;
    let thread = ty * 8u + tx;
    let in_lanes = are_lanes(thread);
    let sign = bitcast<f32>(size(Sign));
    // Of what the workgroup loads, the thread has column tx of each step, of rows and keys ty, ty + 8, ..
    let q_tensor = select(Q, MemQ, piece.is_memory);
    var q_at: array<u32, R>;
    for (var i = 0u; i < R; i++) {
        q_at[i] = row_place(tensor(q_tensor), piece, min(piece.first + ty + 8u * i, piece.rows - 1u));
    }

    let row = piece.first + R * ty;
    var low: Four;
    var high: Four;
    start(&low, piece, row);
    if (FOURS == 2u) {
        start(&high, piece, row + 4u);
    }
    // What all rows of the piece see, and tiles of it: window | memory | own block, with edges that count from the block.
    let all = vec2(seen(piece, piece.first).x, seen(piece, min(piece.first + BLOCK_M, piece.rows) - 1u).y);
    let n = i32(BLOCK_N);
    let window_tiles = (max(-all.x, 0) + n - 1) / n;
    let memory_tiles = i32((s.mem_rows + BLOCK_N - 1u) / BLOCK_N);
    let first_own = max(all.x, 0) / n;
    let tiles = window_tiles + memory_tiles + max((all.y + n - 1) / n - first_own, 0);

    for (var t = 0; t < tiles; t++) {
        let in_memory = t >= window_tiles && t < window_tiles + memory_tiles;
        var keys = Keys((t - window_tiles) * n, in_memory, i32(s.mem_rows));
        if (t >= window_tiles + memory_tiles) {
            keys.x0 = (first_own + t - window_tiles - memory_tiles) * n;
        }
        let load = select(all, vec2(0, keys.mem_rows), in_memory);
        let k_tensor = select(K, MemK, in_memory);
        let k_place = tensor(k_tensor);
        let v_place = tensor(k_tensor + 1u);
        let k_first = cache_place(k_place, in_memory, piece, s);
        let v_first = cache_place(v_place, in_memory, piece, s);
        var key_row: array<u32, 4>;
        var is_loaded: array<bool, 4>;
        for (var j = 0u; j < 4u; j++) {
            let x = keys.x0 + i32(ty + 8u * j);
            is_loaded[j] = x >= load.x && x < load.y;
            key_row[j] = cache_row(in_memory, piece, s, x);
        }

        for (var column = 0u; column < COLUMNS; column += STEP) {
            workgroupBarrier();
            let own = column + tx;
            for (var i = 0u; i < R; i++) {
                tile[STEP * (ty + 8u * i) + tx] = sign * load4(Q, piece.is_memory, q_at[i], own, own < COLUMNS);
            }
            for (var j = 0u; j < 4u; j++) {
                let x = load4(K, in_memory, k_first + key_row[j] * k_place.row, own, is_loaded[j] && own < COLUMNS);
                tile[STEP * (BLOCK_M + ty + 8u * j) + (tx ^ ty)] = x;
            }
            workgroupBarrier();
            for (var c = 0u; c < STEP; c++) {
                let at = STEP * (BLOCK_M + tx) + (c ^ tx);
                let k0 = tile[at];
                let k1 = tile[at + 8u * STEP];
                let k2 = tile[at + 16u * STEP];
                let k3 = tile[at + 24u * STEP];
                add_logits(&low, STEP * R * ty + c, k0, k1, k2, k3);
                if (FOURS == 2u) {
                    add_logits(&high, STEP * (R * ty + 4u) + c, k0, k1, k2, k3);
                }
            }
        }

        let own_low = largest(&low, keys, tx);
        var own_high = own_low;
        if (FOURS == 2u) {
            own_high = largest(&high, keys, tx);
        }
        var most_low = largest_of_lanes(own_low);
        var most_high = largest_of_lanes(own_high);
        if (!in_lanes) {
            partial[thread * FOURS] = own_low;
            partial[thread * FOURS + FOURS - 1u] = own_high;
        }
        workgroupBarrier();
        if (!in_lanes) {
            most_low = partial[ty * 8u * FOURS];
            most_high = partial[ty * 8u * FOURS + FOURS - 1u];
            for (var i = 1u; i < 8u; i++) {
                most_low = max(most_low, partial[(ty * 8u + i) * FOURS]);
                most_high = max(most_high, partial[(ty * 8u + i) * FOURS + FOURS - 1u]);
            }
        }
        let factor_low = weigh(&low, keys, most_low, tx, (tx * 8u + ty) * FOURS);
        var factor_high = vec4(1.0);
        if (FOURS == 2u) {
            factor_high = weigh(&high, keys, most_high, tx, (tx * 8u + ty) * FOURS + 1u);
        }

        let count = u32(clamp(load.y - keys.x0, 0, n));
        for (var chunk = 0u; chunk < CHUNKS; chunk++) {
            if (chunk > 0u) {
                workgroupBarrier();
            }
            for (var j = 0u; j < 4u; j++) {
                for (var half = 0u; half < 2u; half++) {
                    let own = 16u * chunk + 8u * half + tx;
                    let x = load4(V, in_memory, v_first + key_row[j] * v_place.row, own, is_loaded[j] && own < COLUMNS);
                    tile[16u * (ty + 8u * j) + 8u * half + tx] = x;
                }
            }
            workgroupBarrier();
            var sums_low = rescale(&low, chunk, factor_low);
            var sums_high = rescale(&high, chunk, factor_high);
            for (var key = 0u; key < count; key++) {
                let v0 = tile[key * 16u + tx];
                let v1 = tile[key * 16u + 8u + tx];
                let at = (key * 8u + ty) * FOURS;
                add_values(&sums_low, weights[at], v0, v1);
                if (FOURS == 2u) {
                    add_values(&sums_high, weights[at + 1u], v0, v1);
                }
            }
            keep(&low, chunk, sums_low);
            keep(&high, chunk, sums_high);
        }
    }

    // Sums of eight threads in their order.
    workgroupBarrier();
    partial[thread * FOURS] = low.row_sum;
    if (FOURS == 2u) {
        partial[thread * FOURS + 1u] = high.row_sum;
    }
    workgroupBarrier();
    var sum_low = vec4(0.0);
    var sum_high = vec4(0.0);
    for (var i = 0u; i < 8u; i++) {
        sum_low += partial[(ty * 8u + i) * FOURS];
        sum_high += partial[(ty * 8u + i) * FOURS + FOURS - 1u];
    }
    if (tx == 0u) {
        leave(&low, 3u * FOURS * ty, sum_low);
        if (FOURS == 2u) {
            leave(&high, 3u * (FOURS * ty + 1u), sum_high);
        }
    }
    workgroupBarrier();
    // One thread ends a row; then rows are written as they lie.
    if (thread < BLOCK_M && piece.first + thread < piece.rows) {
        let at = 3u * (thread / 4u);
        let end = row_end(piece, piece.first + thread, weights[at + 2u][thread % 4u] > 0.0, weights[at][thread % 4u], weights[at + 1u][thread % 4u]);
        ends[thread] = end.weight;
        write_lse(piece, piece.first + thread, end);
    }
    let o_tensor = select(O, MemO, piece.is_memory);
    let out = tensor(o_tensor);
    for (var chunk = 0u; chunk < CHUNKS; chunk++) {
        workgroupBarrier();
        scaled(&low, chunk, R * ty, tx);
        if (FOURS == 2u) {
            scaled(&high, chunk, R * ty + 4u, tx);
        }
        workgroupBarrier();
        for (var at = thread; at < BLOCK_M * 16u; at += THREADS) {
            let r = piece.first + at / 16u;
            let column = 16u * chunk + at % 16u;
            if (r < piece.rows && column < COLUMNS) {
                store4(o_tensor, out.dtype, row_place(out, piece, r), column, tile[at]);
            }
        }
    }
}

fn exp2_of(x: vec4<f32>) -> vec4<f32> {
    return vec4(exp2_negative(x.x), exp2_negative(x.y), exp2_negative(x.z), exp2_negative(x.w));
}
