// Whole segments into the compressive memory; `infini_write.rs` says how. A workgroup is a stream, a kv head and 64 channels of values, 16 x TY
// threads, and takes the call's segments one after another: columns of m do not depend on each other. Thread (tx, ty) owns channels
// 4 tx .. 4 tx + 4 of the 64, and of them rows ty, ty + TY, .. of m.

@group(1) @binding(0) var<storage, read_write> k: array<u32>;
@group(1) @binding(1) var<storage, read_write> v: array<u32>;
@group(1) @binding(2) var<storage, read_write> m: array<f32>;
@group(1) @binding(3) var<storage, read_write> z: array<f32>;

const THREADS = 16u * TY;
const COLUMNS = (HEAD_DIM + 3u) / 4u;
const CHUNKS = (COLUMNS + 15u) / 16u;
const ROWS_OF_THREAD = (HEAD_DIM + TY - 1u) / TY;

// TY keys at once.
var<workgroup> weights: array<f32, TY * HEAD_DIM>; // sigma(k) [key][channel]
var<workgroup> values: array<vec4<f32>, TY * 16u>; // v, less what m returns already [key][column]
// z as the segment reads it. Every workgroup of a head has its own, since none waits for another.
var<workgroup> norm: array<f32, HEAD_DIM>;

// Element at which a key, or a value, begins.
fn key_place(t: Tensor, s: Stream, x: u32, kv_head: u32) -> u32 {
    var row = s.first_row + x;
    if (size(IsRing) == 1u) {
        row = (row + size(RingRows)) % size(RingRows);
    }
    return place(t, s.slot, 0u, row, kv_head);
}

fn key(at: u32, channel: u32) -> f32 {
    return element(DTYPE, k[word(DTYPE, at + channel)], at + channel);
}

fn is_column(column: u32, j: u32) -> bool {
    return 4u * column + j < HEAD_DIM;
}

@compute @workgroup_size(16, TY)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let number = group_number(workgroup);
    let n = number / (CHUNKS * size(KvHeads));
    if (n >= size(Batch)) {
        return;
    }
    let s = stream(n);
    if (s.owns_slot == 0u) {
        return;
    }
    let chunk = number % CHUNKS;
    let kv_head = number / CHUNKS % size(KvHeads);
    let tx = local.x;
    let ty = local.y;
    let thread = ty * 16u + tx;
    let column = 16u * chunk + tx;
    let k_tensor = tensor(K);
    let v_tensor = tensor(V);
    let m_tensor = tensor(M);
    let z_tensor = tensor(Z);
    let block_len = size(BlockLen);
    let z_first = place(z_tensor, s.slot, s.state_entry, 0u, kv_head);
    for (var channel = thread; channel < HEAD_DIM; channel += THREADS) {
        norm[channel] = z[z_first + channel];
    }

    for (var i = 0u; i < s.blocks; i++) {
        // First token of the segment, from the call's first; its last token must be in the call.
        let base = i * block_len - s.in_block;
        if (i32(base + block_len) > i32(s.len)) {
            break;
        }
        // Behind the stream's first key, it is not whole: then its state is the one before.
        let is_whole = i > 0u || s.in_block <= s.before;
        let earlier = (s.state_entry + i) % m_tensor.blocks;
        let later = (earlier + 1u) % m_tensor.blocks;
        let m_from = place(m_tensor, s.slot, earlier, 0u, kv_head) + 4u * column;
        let m_to = place(m_tensor, s.slot, later, 0u, kv_head) + 4u * column;
        let z_to = place(z_tensor, s.slot, later, 0u, kv_head);

        var acc: array<vec4<f32>, ROWS_OF_THREAD>;
        for (var r = 0u; r < ROWS_OF_THREAD; r++) {
            acc[r] = vec4(0.0);
        }
        var sums: array<f32, (HEAD_DIM + THREADS - 1u) / THREADS>;
        for (var r = 0u; r < (HEAD_DIM + THREADS - 1u) / THREADS; r++) {
            sums[r] = 0.0;
        }
        for (var first = 0u; first < select(0u, block_len, is_whole); first += TY) {
            workgroupBarrier();
            let count = min(TY, block_len - first);
            var value = vec4(0.0);
            var most = -3.4028234e38;
            if (ty < count) {
                let k_at = key_place(k_tensor, s, base + first + ty, kv_head);
                for (var channel = tx; channel < HEAD_DIM; channel += 16u) {
                    weights[ty * HEAD_DIM + channel] = sigma(key(k_at, channel));
                }
                let v_at = key_place(v_tensor, s, base + first + ty, kv_head) + 4u * column;
                for (var j = 0u; j < 4u; j++) {
                    if (is_column(column, j)) {
                        value[j] = element(DTYPE, v[word(DTYPE, v_at + j)], v_at + j);
                    }
                }
                if (size(Rule) == 1u) {
                    // What m returns for the key already. Its weights are shifted where all are small; the ratio does not notice.
                    for (var channel = 0u; channel < HEAD_DIM; channel++) {
                        most = max(most, key(k_at, channel));
                    }
                    var read = vec4(0.0);
                    var denominator = 0.0;
                    var is_written = false;
                    for (var channel = 0u; channel < HEAD_DIM; channel++) {
                        let x = key(k_at, channel);
                        var w = exp_negative(x - most);
                        if (most > 0.0) {
                            w = sigma(x);
                        }
                        denominator += w * norm[channel];
                        is_written = is_written || norm[channel] != 0.0;
                        for (var j = 0u; j < 4u; j++) {
                            if (is_column(column, j)) {
                                read[j] += w * m[m_from + channel * m_tensor.row + j];
                            }
                        }
                    }
                    if (is_written) {
                        value -= read / denominator;
                    }
                }
            }
            values[ty * 16u + tx] = value;
            workgroupBarrier();
            for (var t = 0u; t < count; t++) {
                let x = values[t * 16u + tx];
                for (var r = 0u; r < ROWS_OF_THREAD; r++) {
                    let channel = ty + TY * r;
                    if (channel < HEAD_DIM) {
                        acc[r] += weights[t * HEAD_DIM + channel] * x;
                    }
                }
                for (var r = 0u; r * THREADS + thread < HEAD_DIM; r++) {
                    sums[r] += weights[t * HEAD_DIM + r * THREADS + thread];
                }
            }
        }
        // What the segment adds is summed apart and added once: a large m loses nothing to the number of keys.
        for (var r = 0u; r < ROWS_OF_THREAD; r++) {
            let channel = ty + TY * r;
            if (channel < HEAD_DIM) {
                for (var j = 0u; j < 4u; j++) {
                    if (is_column(column, j)) {
                        m[m_to + channel * m_tensor.row + j] = m[m_from + channel * m_tensor.row + j] + acc[r][j];
                    }
                }
            }
        }
        workgroupBarrier();
        for (var r = 0u; r * THREADS + thread < HEAD_DIM; r++) {
            let channel = r * THREADS + thread;
            norm[channel] += sums[r];
            if (chunk == 0u) {
                z[z_to + channel] = norm[channel];
            }
        }
        // The next segment reads what other threads have written.
        storageBarrier();
    }
}
