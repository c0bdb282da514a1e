// One joint softmax over window, memory and current block; `attend.rs` says how. A workgroup is BLOCK_M rows of a stream's block and kv head,
// query heads of a group folded into rows, 16 x TY threads. Thread (tx, ty) owns rows 4 ty .. 4 ty + 4: with keys tx, tx + 16, .. of a tile
// their logits, with channels 4 tx .. 4 tx + 4 of each 64 their sums. Sizes of the tile come from Rust (`tile.rs`).

const THREADS = 16u * TY;
const KEYS = BLOCK_N / 16u;           // of a thread, in a tile

var<workgroup> qs: array<vec4<f32>, BLOCK_M * 16u * Q_CHUNKS>; // [row][column], the chunks of a row together
var<workgroup> kv: array<vec4<f32>, BLOCK_N * 16u>;            // keys [key][column ^ key % 16], so that 16 keys lie in 16 banks; values [key][column]
var<workgroup> ps: array<vec4<f32>, BLOCK_N * TY>;             // weights [key][four rows]
var<workgroup> partial: array<vec4<f32>, THREADS>;             // what 16 threads have of four rows

@compute @workgroup_size(16, TY)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let piece = find(group_number(workgroup));
    if (piece.first >= piece.rows || is_few(piece)) {
        return;
    }
    let s = stream(piece.n);
    let tx = local.x;
    let ty = local.y;
    let thread = ty * 16u + tx;
    let unit = bitcast<f32>(size(UnitLog2));
    let q_tensor = select(Q, MemQ, piece.is_memory);

    // What four rows see, what all rows of the piece see, and tiles of it: window | memory | own block, with edges that count from the block.
    let row = piece.first + 4u * ty;
    let r0 = seen(piece, row);
    let r1 = seen(piece, row + 1u);
    let r2 = seen(piece, row + 2u);
    let r3 = seen(piece, row + 3u);
    let token_first = vec4(r0.x, r1.x, r2.x, r3.x);
    let token_end = vec4(r0.y, r1.y, r2.y, r3.y);
    let all = vec2(seen(piece, piece.first).x, seen(piece, min(piece.first + BLOCK_M, piece.rows) - 1u).y);
    let n = i32(BLOCK_N);
    let window_tiles = (max(-all.x, 0) + n - 1) / n;
    let memory_tiles = i32((s.mem_rows + BLOCK_N - 1u) / BLOCK_N);
    let first_own = max(all.x, 0) / n;
    let tiles = window_tiles + memory_tiles + max((all.y + n - 1) / n - first_own, 0);

    let sign = bitcast<f32>(size(Sign));
    if (Q_CHUNKS == CHUNKS) {
        for (var at = thread; at < BLOCK_M * COLUMNS; at += THREADS) {
            let r = at / COLUMNS;
            let column = at % COLUMNS;
            var x = vec4(0.0);
            if (piece.first + r < piece.rows) {
                x = sign * load4(q_tensor, row_place(tensor(q_tensor), piece, piece.first + r), column);
            }
            qs[r * 16u * Q_CHUNKS + column] = x;
        }
    }

    var row_max = vec4(0.0);
    var row_sum = vec4(0.0);
    var has_keys = vec4(false);
    var acc: array<vec4<f32>, 4u * CHUNKS>;

    for (var t = 0; t < tiles; t++) {
        let in_memory = t >= window_tiles && t < window_tiles + memory_tiles;
        var x0 = (t - window_tiles) * n;
        if (t >= window_tiles + memory_tiles) {
            x0 = (first_own + t - window_tiles - memory_tiles) * n;
        }
        var first = token_first;
        var end = token_end;
        var load = all;
        if (in_memory) {
            let is_row = token_first < token_end;
            first = vec4(0);
            end = select(vec4(0), vec4(i32(s.mem_rows)), vec4(row, row + 1u, row + 2u, row + 3u) < vec4(piece.rows));
            load = vec2(0, i32(s.mem_rows));
        } else if (t < window_tiles) {
            // Keys of the own block have tiles of their own.
            end = min(token_end, vec4(max(0, x0 + n)));
        }
        let k_tensor = select(K, MemK, in_memory);

        // Logits.
        var logits: array<vec4<f32>, KEYS>;
        for (var j = 0u; j < KEYS; j++) {
            logits[j] = vec4(0.0);
        }
        for (var chunk = 0u; chunk < CHUNKS; chunk++) {
            let columns = min(16u, COLUMNS - 16u * chunk);
            workgroupBarrier();
            if (Q_CHUNKS < CHUNKS) {
                for (var at = thread; at < BLOCK_M * columns; at += THREADS) {
                    let r = at / columns;
                    let column = at % columns;
                    var x = vec4(0.0);
                    if (piece.first + r < piece.rows) {
                        x = sign * load4(q_tensor, row_place(tensor(q_tensor), piece, piece.first + r), 16u * chunk + column);
                    }
                    qs[r * 16u + column] = x;
                }
            }
            load_keys(k_tensor, piece, s, x0, load, chunk, columns, thread, true);
            workgroupBarrier();
            let q_at = 4u * ty * 16u * Q_CHUNKS + select(0u, 16u * chunk, Q_CHUNKS == CHUNKS);
            for (var c = 0u; c < columns; c++) {
                let q0 = qs[q_at + c];
                let q1 = qs[q_at + 16u * Q_CHUNKS + c];
                let q2 = qs[q_at + 32u * Q_CHUNKS + c];
                let q3 = qs[q_at + 48u * Q_CHUNKS + c];
                for (var j = 0u; j < KEYS; j++) {
                    let key = kv[(tx + 16u * j) * 16u + (c ^ tx)];
                    logits[j] += vec4(dot(q0, key), dot(q1, key), dot(q2, key), dot(q3, key));
                }
            }
        }

        // Maxima, over the keys that a row sees.
        var most = vec4(-3.4028234e38);
        for (var j = 0u; j < KEYS; j++) {
            let x = vec4(x0 + i32(tx + 16u * j));
            most = select(most, max(most, logits[j]), (x >= first) & (x < end));
        }
        partial[thread] = most;
        workgroupBarrier();
        for (var i = 0u; i < 16u; i++) {
            most = max(most, partial[ty * 16u + i]);
        }
        let sees = (max(first, vec4(x0)) < min(end, vec4(x0 + n)));
        let before = row_max;
        row_max = select(row_max, select(most, max(row_max, most), has_keys), sees);
        let rescale = (before - row_max) * unit;
        let factor = select(
            vec4(1.0),
            vec4(exp2_negative(rescale.x), exp2_negative(rescale.y), exp2_negative(rescale.z), exp2_negative(rescale.w)),
            has_keys & sees,
        );
        has_keys = has_keys | sees;
        row_sum *= factor;
        for (var j = 0u; j < KEYS; j++) {
            let x = vec4(x0 + i32(tx + 16u * j));
            let e = (logits[j] - row_max) * unit;
            let p = select(
                vec4(0.0),
                vec4(exp2_negative(e.x), exp2_negative(e.y), exp2_negative(e.z), exp2_negative(e.w)),
                (x >= first) & (x < end),
            );
            row_sum += p;
            ps[(tx + 16u * j) * TY + ty] = p;
        }

        // Values.
        let keys = u32(clamp(load.y - x0, 0, n));
        for (var chunk = 0u; chunk < CHUNKS; chunk++) {
            let columns = min(16u, COLUMNS - 16u * chunk);
            if (chunk > 0u) {
                workgroupBarrier();
            }
            load_keys(k_tensor + 1u, piece, s, x0, load, chunk, columns, thread, false);
            workgroupBarrier();
            var a0 = acc[4u * chunk] * factor.x;
            var a1 = acc[4u * chunk + 1u] * factor.y;
            var a2 = acc[4u * chunk + 2u] * factor.z;
            var a3 = acc[4u * chunk + 3u] * factor.w;
            if (tx < columns) {
                for (var key = 0u; key < keys; key++) {
                    let p = ps[key * TY + ty];
                    let v = kv[key * 16u + tx];
                    a0 += p.x * v;
                    a1 += p.y * v;
                    a2 += p.z * v;
                    a3 += p.w * v;
                }
            }
            acc[4u * chunk] = a0;
            acc[4u * chunk + 1u] = a1;
            acc[4u * chunk + 2u] = a2;
            acc[4u * chunk + 3u] = a3;
        }
    }

    // The rows' ends: sums of 16 threads in their order, the sink, lse.
    workgroupBarrier();
    partial[thread] = row_sum;
    workgroupBarrier();
    var sum = vec4(0.0);
    for (var i = 0u; i < 16u; i++) {
        sum += partial[ty * 16u + i];
    }
    for (var i = 0u; i < 4u; i++) {
        if (row + i >= piece.rows) {
            break;
        }
        for (var chunk = 0u; chunk < CHUNKS; chunk++) {
            let column = 16u * chunk + tx;
            if (column < COLUMNS) {
                write_row(piece, row + i, column, acc[4u * chunk + i], has_keys[i], row_max[i], sum[i]);
            }
        }
    }
}

// `columns` vectors of channels of the tile's keys, or of their values, from the first of a chunk on. What no row of the piece sees is 0.
fn load_keys(which: u32, piece: Piece, s: Stream, x0: i32, seen: vec2<i32>, chunk: u32, columns: u32, thread: u32, swizzle: bool) {
    let t = tensor(which);
    for (var at = thread; at < BLOCK_N * columns; at += THREADS) {
        let key = at / columns;
        let column = at % columns;
        let x = x0 + i32(key);
        var value = vec4(0.0);
        if (x >= seen.x && x < seen.y) {
            value = load4(which, key_place(t, which >= MemK, piece, s, x), 16u * chunk + column);
        }
        kv[key * 16u + select(column, column ^ (key & 15u), swizzle)] = value;
    }
}
