// One split of the keys of a block's few rows, 4 x QUADS of them, four rows to a vector. Keys come in tiles. A tile's keys and values are asked for
// at once; then a key's channels belong to LANES threads, each weight to one thread, and each column of four value channels to a thread for every
// few keys.

const THREADS = 128u;
const TILE = 32u;                          // keys
const LANES = 8u;                          // threads with a key's channels
const KEY_SLOTS = THREADS / LANES;         // keys at once
const KEYS = TILE / KEY_SLOTS;             // of a thread, in a tile
const KEY_COLUMNS = (COLUMNS + LANES - 1u) / LANES;
const VALUE_SLOTS = THREADS / VALUE_LANES; // values at once
const VALUES = TILE / VALUE_SLOTS;         // of a thread, in a tile

var<workgroup> qs: array<vec4<f32>, QUADS * 4u * COLUMNS>; // [four rows][channel of a column][column]; at the end sums [row][column]
var<workgroup> partial: array<vec4<f32>, QUADS * LANES * TILE>; // products [four rows][lane][key ^ lane], in as many banks as lanes
var<workgroup> logits: array<vec4<f32>, QUADS * TILE>;     // [four rows][key], or of each eight keys the largest
var<workgroup> weights: array<vec4<f32>, QUADS * TILE>;    // [four rows][key]
var<workgroup> factors: array<vec4<f32>, QUADS>;

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    var number = group_number(workgroup);
    let row_tile = number % size(FewTiles);
    number /= size(FewTiles);
    let split = number % size(Splits);
    number /= size(Splits);
    let piece = few_rows_of(number, 4u * QUADS * row_tile);
    if (piece.first >= piece.rows || !is_few(piece)) {
        return;
    }
    let s = stream(piece.n);
    let rows = min(piece.rows - piece.first, 4u * QUADS);
    let unit = bitcast<f32>(size(UnitLog2));
    let in_lanes = are_lanes(thread);

    let q_tensor = tensor(Q);
    let sign = bitcast<f32>(size(Sign));
    for (var at = thread; at < QUADS * COLUMNS; at += THREADS) {
        let quad = at / COLUMNS;
        let column = at % COLUMNS;
        var x: array<vec4<f32>, 4u>;
        for (var r = 0u; r < 4u; r++) {
            x[r] = vec4(0.0);
            if (4u * quad + r < rows) {
                x[r] = sign * load4(Q, false, row_place(q_tensor, piece, piece.first + 4u * quad + r), column, true);
            }
        }
        for (var c = 0u; c < 4u; c++) {
            qs[(4u * quad + c) * COLUMNS + column] = vec4(x[0][c], x[1][c], x[2][c], x[3][c]);
        }
    }

    // Of a thread: a key, and four rows, whose softmax it makes; a lane and a slot of keys; a column and a slot of values.
    let own_key = thread % TILE;
    let own_quad = thread / TILE;
    let row = piece.first + 4u * own_quad;
    let lane = thread % LANES;
    let key_slot = thread / LANES;
    let value_column = thread % VALUE_LANES;
    let value_slot = thread / VALUE_LANES;

    let r0 = seen(piece, row);
    let r1 = seen(piece, row + 1u);
    let r2 = seen(piece, row + 2u);
    let r3 = seen(piece, row + 3u);
    let token_first = vec4(r0.x, r1.x, r2.x, r3.x);
    let token_end = vec4(r0.y, r1.y, r2.y, r3.y);
    let all = vec2(seen(piece, piece.first).x, seen(piece, piece.first + rows - 1u).y);

    // Tiles in the order own block | memory | window, from the block's start on and back; each split has every so many.
    let n = i32(TILE);
    let own_tiles = i32((size(BlockLen) - 1u) / TILE) + 1;
    let window_tile = own_tiles + i32((size(MemLen) + TILE - 1u) / TILE);
    let tiles = window_tile + (max(-all.x, 0) + n - 1) / n;

    var row_max = vec4(0.0);
    var row_sum = vec4(0.0);
    var has_keys = vec4(false);
    var acc: array<vec4<f32>, 4u * QUADS>;
    for (var r = 0u; r < 4u * QUADS; r++) {
        acc[r] = vec4(0.0);
    }
    workgroupBarrier();

    for (var t = i32(split); t < tiles; t += i32(size(Splits))) {
        let in_memory = t >= own_tiles && t < window_tile;
        var x0 = t * n;
        var first = token_first;
        var end = token_end;
        var some = all;
        if (in_memory) {
            x0 -= own_tiles * n;
            first = vec4(0);
            end = select(vec4(0), vec4(i32(s.mem_rows)), vec4(row, row + 1u, row + 2u, row + 3u) < vec4(piece.rows));
            some = vec2(0, i32(s.mem_rows));
        } else if (t >= window_tile) {
            // Back from the block, whose own keys have tiles of their own.
            x0 = (window_tile - t - 1) * n;
        }
        some = vec2(max(some.x, x0), min(some.y, x0 + n));
        if (some.x >= some.y) {
            continue;
        }
        let k_tensor = tensor(select(K, MemK, in_memory));
        let v_tensor = tensor(select(V, MemV, in_memory));
        let k_first = cache_place(k_tensor, in_memory, piece, s);
        let v_first = cache_place(v_tensor, in_memory, piece, s);

        // What no row sees is not read: there is a key that one does see instead, and it weighs nothing.
        var key_at: array<u32, KEYS>;
        var key_words: array<vec4<u32>, KEYS * KEY_COLUMNS>;
        for (var j = 0u; j < KEYS; j++) {
            let x = clamp(x0 + i32(key_slot + KEY_SLOTS * j), some.x, some.y - 1);
            key_at[j] = k_first + cache_row(in_memory, piece, s, x) * k_tensor.row;
            for (var i = 0u; i < KEY_COLUMNS; i++) {
                if (lane + LANES * i < COLUMNS) {
                    key_words[j * KEY_COLUMNS + i] = ask(K, in_memory, key_at[j], lane + LANES * i);
                }
            }
        }
        var value_at: array<u32, VALUES>;
        var value_words: array<vec4<u32>, VALUES>;
        if (value_column < COLUMNS) {
            for (var j = 0u; j < VALUES; j++) {
                let x = clamp(x0 + i32(value_slot + VALUE_SLOTS * j), some.x, some.y - 1);
                value_at[j] = v_first + cache_row(in_memory, piece, s, x) * v_tensor.row;
                value_words[j] = ask(V, in_memory, value_at[j], value_column);
            }
        }

        // Logits: sums over a lane's channels, then over lanes in their order.
        var products: array<vec4<f32>, QUADS * KEYS>;
        for (var i = 0u; i < QUADS * KEYS; i++) {
            products[i] = vec4(0.0);
        }
        for (var i = 0u; i < KEY_COLUMNS; i++) {
            let column = lane + LANES * i;
            if (column < COLUMNS) {
                var key: array<vec4<f32>, KEYS>;
                for (var j = 0u; j < KEYS; j++) {
                    key[j] = widen(key_words[j * KEY_COLUMNS + i], key_at[j], column);
                }
                for (var quad = 0u; quad < QUADS; quad++) {
                    if (4u * quad < rows) {
                        let at = quad * 4u * COLUMNS + column;
                        let q0 = qs[at];
                        let q1 = qs[at + COLUMNS];
                        let q2 = qs[at + 2u * COLUMNS];
                        let q3 = qs[at + 3u * COLUMNS];
                        for (var j = 0u; j < KEYS; j++) {
                            var sum = fma(q0, vec4(key[j].x), products[quad * KEYS + j]);
                            sum = fma(q1, vec4(key[j].y), sum);
                            sum = fma(q2, vec4(key[j].z), sum);
                            products[quad * KEYS + j] = fma(q3, vec4(key[j].w), sum);
                        }
                    }
                }
            }
        }
        for (var quad = 0u; quad < QUADS; quad++) {
            if (4u * quad < rows) {
                for (var j = 0u; j < KEYS; j++) {
                    partial[(quad * LANES + lane) * TILE + ((key_slot + KEY_SLOTS * j) ^ lane)] = products[quad * KEYS + j];
                }
            }
        }
        workgroupBarrier();
        var logit = vec4(0.0);
        if (4u * own_quad < rows) {
            for (var i = 0u; i < LANES; i++) {
                logit += partial[(own_quad * LANES + i) * TILE + (own_key ^ i)];
            }
        }
        let is_seen = (vec4(x0 + i32(own_key)) >= first) & (vec4(x0 + i32(own_key)) < end);
        let own_logit = select(vec4(-3.4028234e38), logit, is_seen);
        let most_of_lanes = largest_of_lanes(own_logit);
        if (own_quad < QUADS) {
            logits[thread] = select(own_logit, most_of_lanes, in_lanes);
        }
        workgroupBarrier();

        // Weights: all threads of a row come to the same maximum.
        if (4u * own_quad < rows) {
            var most = vec4(-3.4028234e38);
            for (var i = 0u; i < TILE; i += select(1u, 8u, in_lanes)) {
                most = max(most, logits[own_quad * TILE + i]);
            }
            let sees = max(first, vec4(x0)) < min(end, vec4(x0 + n));
            let before = row_max;
            row_max = select(row_max, select(most, max(row_max, most), has_keys), sees);
            let rescale = (before - row_max) * unit;
            let factor = select(
                vec4(1.0),
                vec4(exp2_negative(rescale.x), exp2_negative(rescale.y), exp2_negative(rescale.z), exp2_negative(rescale.w)),
                has_keys & sees,
            );
            has_keys = has_keys | sees;
            let e = (logit - row_max) * unit;
            let p = select(vec4(0.0), vec4(exp2_negative(e.x), exp2_negative(e.y), exp2_negative(e.z), exp2_negative(e.w)), is_seen);
            row_sum = fma(row_sum, factor, p);
            weights[thread] = p;
            factors[own_quad] = factor;
        }
        workgroupBarrier();

        // Values.
        if (value_column < COLUMNS) {
            for (var quad = 0u; quad < QUADS; quad++) {
                if (4u * quad < rows) {
                    let factor = factors[quad];
                    for (var r = 0u; r < 4u; r++) {
                        acc[4u * quad + r] *= factor[r];
                    }
                }
            }
            for (var j = 0u; j < VALUES; j++) {
                let value = widen(value_words[j], value_at[j], value_column);
                for (var quad = 0u; quad < QUADS; quad++) {
                    if (4u * quad < rows) {
                        let p = weights[quad * TILE + value_slot + VALUE_SLOTS * j];
                        acc[4u * quad] = fma(vec4(p.x), value, acc[4u * quad]);
                        acc[4u * quad + 1u] = fma(vec4(p.y), value, acc[4u * quad + 1u]);
                        acc[4u * quad + 2u] = fma(vec4(p.z), value, acc[4u * quad + 2u]);
                        acc[4u * quad + 3u] = fma(vec4(p.w), value, acc[4u * quad + 3u]);
                    }
                }
            }
        }
    }

    // The split's end: sums over slots in their order, which take the place of q; then rows, whose sums of weights go over keys in theirs.
    for (var slot = 0u; slot < VALUE_SLOTS; slot++) {
        if (value_slot == slot && value_column < COLUMNS) {
            for (var r = 0u; r < 4u * QUADS; r++) {
                let at = r * COLUMNS + value_column;
                if (slot == 0u) {
                    qs[at] = acc[r];
                } else {
                    qs[at] += acc[r];
                }
            }
        }
        workgroupBarrier();
    }
    if (own_quad < QUADS) {
        logits[thread] = row_sum;
        factors[own_quad] = row_max;
    }
    workgroupBarrier();
    for (var at = thread; at < rows * COLUMNS; at += THREADS) {
        let r = at / COLUMNS;
        var sum = 0.0;
        for (var i = 0u; i < TILE; i++) {
            sum += logits[(r / 4u) * TILE + i][r % 4u];
        }
        leave(number, split, piece.first + r, at % COLUMNS, qs[at], factors[r / 4u][r % 4u], sum);
    }
}

// A row's column of the split.
fn leave(number: u32, split: u32, row: u32, column: u32, x: vec4<f32>, row_max: f32, sum: f32) {
    let at = part_place(number, row, split);
    if (column == 0u) {
        put(Parts, at, bitcast<u32>(row_max));
        put(Parts, at + 1u, bitcast<u32>(sum));
    }
    // The largest logit weighs 1: without keys the sum is 0, and nothing else is looked at.
    for (var c = 0u; sum > 0.0 && c < min(4u, HEAD_DIM - 4u * column); c++) {
        put(Parts, at + 2u + 4u * column + c, bitcast<u32>(x[c]));
    }
}
