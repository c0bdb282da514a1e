// The read of the compressive memory and its gate; `infini_read.rs` says how. A workgroup is BLOCK_M rows of a stream's block and kv head, 16 x TY
// threads: thread (tx, ty) owns rows 4 ty .. 4 ty + 4 and channels 4 tx .. 4 tx + 4 of each 64.

@group(1) @binding(0) var<storage, read_write> q: array<u32>;
@group(1) @binding(1) var<storage, read_write> o: array<atomic<u32>>;
@group(1) @binding(2) var<storage, read_write> o_local: array<f32>;
@group(1) @binding(3) var<storage, read_write> m: array<f32>;
@group(1) @binding(4) var<storage, read_write> z: array<f32>;

const THREADS = 16u * TY;
const STEP = 16u; // channels of keys at once

var<workgroup> weights: array<vec4<f32>, STEP * TY>; // sigma(q) [channel][four rows]
var<workgroup> matrix: array<vec4<f32>, STEP * 16u>; // m [channel][column], of a chunk
var<workgroup> norm: array<f32, STEP>;               // z
var<workgroup> partial: array<vec4<f32>, THREADS>;

fn put(which: u32, i: u32, w: u32) {
    atomicStore(&o[i], w);
}

fn put_half(which: u32, i: u32, bits: u32) {
    let shift = 16u * (i & 1u);
    atomicAnd(&o[i >> 1u], ~(0xffffu << shift));
    atomicOr(&o[i >> 1u], bits << shift);
}

fn query(piece: Piece, t: Tensor, row: u32, channel: u32) -> f32 {
    let i = row_place(t, piece, row) + channel;
    return element(DTYPE, q[word(DTYPE, i)], i);
}

// sigma(q), or where all q of the row are negative, sigma(q) over its largest: what is shifted is the row's maximum.
fn weight(x: f32, most: f32) -> f32 {
    if (most > 0.0) {
        return sigma(x);
    }
    return exp_negative(x - most);
}

@compute @workgroup_size(16, TY)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let piece = find(group_number(workgroup));
    if (piece.first >= piece.rows) {
        return;
    }
    let s = stream(piece.n);
    let tx = local.x;
    let ty = local.y;
    let thread = ty * 16u + tx;
    let row = piece.first + 4u * ty;
    let q_tensor = tensor(InfiniQ);
    let m_tensor = tensor(M);
    let z_tensor = tensor(Z);
    let out = tensor(Gated);
    let entry = (s.state_entry + piece.i) % m_tensor.blocks;
    let m_at = place(m_tensor, s.slot, entry, 0u, piece.kv_head);
    let z_at = place(z_tensor, s.slot, entry, 0u, piece.kv_head);

    // The largest q of each row.
    var most = vec4(-3.4028234e38);
    for (var r = 0u; r < 4u; r++) {
        if (row + r < piece.rows) {
            for (var channel = tx; channel < HEAD_DIM; channel += 16u) {
                most[r] = max(most[r], query(piece, q_tensor, row + r, channel));
            }
        }
    }
    partial[thread] = most;
    workgroupBarrier();
    for (var i = 0u; i < 16u; i++) {
        most = max(most, partial[ty * 16u + i]);
    }

    var acc: array<vec4<f32>, 4u * CHUNKS>;
    var denominator = vec4(0.0);
    var is_written = false;
    for (var first = 0u; first < HEAD_DIM; first += STEP) {
        let count = min(STEP, HEAD_DIM - first);
        for (var chunk = 0u; chunk < CHUNKS; chunk++) {
            workgroupBarrier();
            if (chunk == 0u) {
                // Thread tx has channel first + tx of its four rows.
                var w = vec4(0.0);
                for (var r = 0u; r < 4u; r++) {
                    if (row + r < piece.rows && tx < count) {
                        w[r] = weight(query(piece, q_tensor, row + r, first + tx), most[r]);
                    }
                }
                weights[tx * TY + ty] = w;
                if (thread < count) {
                    norm[thread] = z[z_at + first + thread];
                }
            }
            for (var at = thread; at < count * 16u; at += THREADS) {
                let channel = at / 16u;
                let column = 16u * chunk + at % 16u;
                var x = vec4(0.0);
                for (var j = 0u; j < 4u; j++) {
                    if (4u * column + j < HEAD_DIM) {
                        x[j] = m[m_at + (first + channel) * m_tensor.row + 4u * column + j];
                    }
                }
                matrix[at] = x;
            }
            workgroupBarrier();
            var a0 = acc[4u * chunk];
            var a1 = acc[4u * chunk + 1u];
            var a2 = acc[4u * chunk + 2u];
            var a3 = acc[4u * chunk + 3u];
            for (var c = 0u; c < count; c++) {
                let w = weights[c * TY + ty];
                let x = matrix[c * 16u + tx];
                a0 += w.x * x;
                a1 += w.y * x;
                a2 += w.z * x;
                a3 += w.w * x;
            }
            acc[4u * chunk] = a0;
            acc[4u * chunk + 1u] = a1;
            acc[4u * chunk + 2u] = a2;
            acc[4u * chunk + 3u] = a3;
            if (chunk == 0u) {
                for (var c = 0u; c < count; c++) {
                    denominator += weights[c * TY + ty] * norm[c];
                    is_written = is_written || norm[c] != 0.0;
                }
            }
        }
    }

    for (var r = 0u; r < 4u; r++) {
        if (row + r >= piece.rows) {
            break;
        }
        let beta = per_head(size(BetaAt), piece.kv_head * size(Group) + (row + r) % size(Group));
        // sigmoid(beta) and sigmoid(-beta), neither of them as 1 less the other.
        let e = exp_negative(-abs(beta));
        let gates = select(vec2(e, 1.0), vec2(1.0, e), beta >= 0.0) / (1.0 + e);
        let local_at = row_place(tensor(O), piece, row + r);
        let at = row_place(out, piece, row + r);
        for (var chunk = 0u; chunk < CHUNKS; chunk++) {
            let column = 16u * chunk + tx;
            if (column < COLUMNS) {
                let a = select(vec4(0.0), acc[4u * chunk + r] / denominator[r], is_written);
                var x = vec4(0.0);
                for (var j = 0u; j < min(4u, HEAD_DIM - 4u * column); j++) {
                    x[j] = gates.x * a[j] + gates.y * o_local[local_at + 4u * column + j];
                }
                store4(Gated, out.dtype, at, column, x);
            }
        }
    }
}
