// Tensors of one row group: block rows, or memory rows under the same names. With the call block eight, as many as any device binds.

@group(1) @binding(0) var<storage, read_write> q: array<Load>;
@group(1) @binding(1) var<storage, read_write> o: array<atomic<u32>>;
@group(1) @binding(2) var<storage, read_write> lse: array<u32>;
@group(1) @binding(3) var<storage, read_write> k: array<Load>;
@group(1) @binding(4) var<storage, read_write> v: array<Load>;
@group(1) @binding(5) var<storage, read_write> mem_k: array<Load>;
@group(1) @binding(6) var<storage, read_write> mem_v: array<Load>;

// Loads i and j of q, or of k or v: of memory rows, or of tokens.
fn load2(which: u32, in_memory: bool, i: u32, j: u32) -> Loads {
    if (which == Q) {
        return pair(q[i], q[j]);
    }
    if (which == K) {
        if (in_memory) {
            return pair(mem_k[i], mem_k[j]);
        }
        return pair(k[i], k[j]);
    }
    if (in_memory) {
        return pair(mem_v[i], mem_v[j]);
    }
    return pair(v[i], v[j]);
}

fn put(which: u32, i: u32, w: u32) {
    atomicStore(&o[i], w);
}

// Half of a word whose other half may be another thread's, or not of this call at all.
fn put_half(which: u32, i: u32, bits: u32) {
    let shift = 16u * (i & 1u);
    atomicAnd(&o[i >> 1u], ~(0xffffu << shift));
    atomicOr(&o[i >> 1u], bits << shift);
}

fn put_lse(which: u32, i: u32, bits: u32) {
    lse[i] = bits;
}
