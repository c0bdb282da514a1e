// Attention over two disjoint key sets becomes attention over their union; `merge.rs` says how. A thread has four channels of a row and head.

@group(1) @binding(0) var<storage, read_write> o_a: array<u32>;
@group(1) @binding(1) var<storage, read_write> lse_a: array<u32>;
@group(1) @binding(2) var<storage, read_write> o_b: array<u32>;
@group(1) @binding(3) var<storage, read_write> lse_b: array<u32>;
@group(1) @binding(4) var<storage, read_write> o: array<atomic<u32>>;
@group(1) @binding(5) var<storage, read_write> lse: array<u32>;

const COLUMNS = (HEAD_DIM + 3u) / 4u;
const EMPTY = 0xff800000u;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let number = group_number(group) * 64u + local;
    let column = number % COLUMNS;
    let head = number / COLUMNS % size(Heads);
    let row = number / COLUMNS / size(Heads) % size(MostRows);
    let block = number / COLUMNS / size(Heads) / size(MostRows) % size(Blocks);
    let n = number / COLUMNS / size(Heads) / size(MostRows) / size(Blocks);
    if (n >= size(Batch)) {
        return;
    }
    let a = lse_a[place(tensor(MemK), n, block, row, head)];
    let b = lse_b[place(tensor(MemV), n, block, row, head)];
    // Shares of the two parts. An empty one is not looked at.
    var shares = vec2(0.0);
    var joined = EMPTY;
    if (a == EMPTY && b != EMPTY) {
        shares = vec2(0.0, 1.0);
        joined = b;
    } else if (b == EMPTY && a != EMPTY) {
        shares = vec2(1.0, 0.0);
        joined = a;
    } else if (a != EMPTY) {
        let x = bitcast<f32>(a);
        let y = bitcast<f32>(b);
        let most = max(x, y);
        let w = vec2(exp_negative(x - most), exp_negative(y - most));
        shares = w / (w.x + w.y);
        joined = bitcast<u32>(most + ln(w.x + w.y));
    }
    let a_at = place(tensor(K), n, block, row, head);
    let b_at = place(tensor(V), n, block, row, head);
    let at = place(tensor(O), n, block, row, head);
    let a_dtype = tensor(K).dtype;
    let b_dtype = tensor(V).dtype;
    for (var j = 0u; j < 4u; j++) {
        let channel = 4u * column + j;
        if (channel >= HEAD_DIM) {
            break;
        }
        var x = 0.0;
        // A part of weight 0 may hold anything.
        if (shares.x > 0.0) {
            x = shares.x * element(a_dtype, o_a[word(a_dtype, a_at + channel)], a_at + channel);
        }
        if (shares.y > 0.0) {
            x = fma(shares.y, element(b_dtype, o_b[word(b_dtype, b_at + channel)], b_at + channel), x);
        }
        store(tensor(O).dtype, at + channel, x);
    }
    if (size(HasLse) == 1u && column == 0u) {
        lse[place(tensor(Lse), n, block, row, head)] = joined;
    }
}

fn store(dtype: u32, i: u32, x: f32) {
    if (dtype == F32) {
        atomicStore(&o[i], bitcast<u32>(x));
    } else {
        // The other half of the word may be another thread's, or not of this call at all.
        let shift = 16u * (i & 1u);
        atomicAnd(&o[i >> 1u], ~(0xffffu << shift));
        atomicOr(&o[i >> 1u], narrow(dtype, x) << shift);
    }
}
