// Rows of queries, keys and values as vectors of four channels. `load_unaligned.wgsl` or `load_aligned.wgsl` gives `ask`, which reads them.

// The elements that `ask` has read; channels beyond the head are 0.
fn widen(words: vec4<u32>, at: u32, column: u32) -> vec4<f32> {
    var x = bitcast<vec4<f32>>(words);
    if (DTYPE != F32) {
        let odd = is_odd(at);
        let low = select(words.x, (words.x >> 16u) | (words.y << 16u), odd);
        let high = select(words.y, (words.y >> 16u) | (words.z << 16u), odd);
        x = vec4(half(DTYPE, low, 0u), half(DTYPE, low, 1u), half(DTYPE, high, 0u), half(DTYPE, high, 1u));
    }
    if (HEAD_DIM % 4u == 0u) {
        return x;
    }
    return select(vec4(0.0), x, vec4(4u * column) + vec4(0u, 1u, 2u, 3u) < vec4(HEAD_DIM));
}

// Four channels of the row at element `at`; 0 where it is not there.
fn load4(which: u32, in_memory: bool, at: u32, column: u32, is_there: bool) -> vec4<f32> {
    if (!is_there) {
        return vec4(0.0);
    }
    return widen(ask(which, in_memory, at, column), at, column);
}
