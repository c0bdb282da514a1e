// Rows of keys and values from one place to another, as they are; `append.rs` says which. A thread copies a word of a row, of keys and of values.

@group(1) @binding(0) var<storage, read_write> from_k: array<u32>;
@group(1) @binding(1) var<storage, read_write> from_v: array<u32>;
@group(1) @binding(2) var<storage, read_write> to_k: array<atomic<u32>>;
@group(1) @binding(3) var<storage, read_write> to_v: array<atomic<u32>>;

const TO_RING = 0u;
const TO_MEMORY = 1u;
const FROM_RING = 2u;

const WORDS = select((HEAD_DIM + 1u) / 2u, HEAD_DIM, DTYPE == F32);

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    var number = group_number(group) * 64u + local;
    let w = number % WORDS;
    number /= WORDS;
    let head = number % size(KvHeads);
    number /= size(KvHeads);
    let row = number % size(MostRows);
    number /= size(MostRows);
    let i = number % size(Blocks);
    let n = number / size(Blocks);
    if (n >= size(Batch)) {
        return;
    }
    let s = stream(n);
    if (KIND == TO_MEMORY) {
        if (row >= s.mem_rows || i >= max(s.blocks, 1u) || s.owns_slot == 0u) {
            return;
        }
        let entry = (s.mem_entry + i) % tensor(MemK).blocks;
        copy(false, place(tensor(MemQ), n, i, row, head), place(tensor(MemK), s.slot, entry, row, head), w);
        copy(true, place(tensor(Gated), n, i, row, head), place(tensor(MemV), s.slot, entry, row, head), w);
        return;
    }
    if (row >= s.len || s.owns_slot == 0u) {
        return;
    }
    let ring_row = (s.first_row + row) % size(RingRows);
    let k_at = place(tensor(Q), n, 0u, row, head);
    let v_at = place(tensor(InfiniQ), n, 0u, row, head);
    let ring_k_at = place(tensor(K), s.slot, 0u, ring_row, head);
    let ring_v_at = place(tensor(V), s.slot, 0u, ring_row, head);
    if (KIND == TO_RING) {
        copy(false, k_at, ring_k_at, w);
        copy(true, v_at, ring_v_at, w);
    } else {
        copy(false, ring_k_at, k_at, w);
        copy(true, ring_v_at, v_at, w);
    }
}

fn fetch(is_value: bool, i: u32) -> u32 {
    if (is_value) {
        return from_v[i];
    }
    return from_k[i];
}

fn put(is_value: bool, i: u32, w: u32) {
    if (is_value) {
        atomicStore(&to_v[i], w);
    } else {
        atomicStore(&to_k[i], w);
    }
}

// Half of a word whose other half may be another thread's, or not of this call at all.
fn put_half(is_value: bool, i: u32, bits: u32) {
    let shift = 16u * (i & 1u);
    if (is_value) {
        atomicAnd(&to_v[i >> 1u], ~(0xffffu << shift));
        atomicOr(&to_v[i >> 1u], bits << shift);
    } else {
        atomicAnd(&to_k[i >> 1u], ~(0xffffu << shift));
        atomicOr(&to_k[i >> 1u], bits << shift);
    }
}

// Word w of the row at `from_row`: one element, or two of 16 bits.
fn copy(is_value: bool, from_row: u32, to_row: u32, w: u32) {
    if (DTYPE == F32) {
        put(is_value, to_row + w, fetch(is_value, from_row + w));
        return;
    }
    let i = from_row + 2u * w;
    let to = to_row + 2u * w;
    let has_second = 2u * w + 1u < HEAD_DIM;
    let low = fetch(is_value, i >> 1u);
    let high = fetch(is_value, (i + u32(has_second)) >> 1u);
    let bits = select(low, (low >> 16u) | (high << 16u), (i & 1u) == 1u);
    if (has_second && (to & 1u) == 0u) {
        put(is_value, to >> 1u, bits);
        return;
    }
    put_half(is_value, to, bits & 0xffffu);
    if (has_second) {
        put_half(is_value, to + 1u, bits >> 16u);
    }
}
