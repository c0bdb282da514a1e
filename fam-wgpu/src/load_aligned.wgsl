// Rows that begin at a multiple of four elements, and have as many: a `Load` is all of four channels, `vec4<u32>` in f32 and `vec2<u32>` in 16 bits.

// The second load is the first again.
alias Loads = Load;

fn pair(i: Load, j: Load) -> Loads {
    return i;
}

fn is_odd(at: u32) -> bool {
    return false;
}

fn ask(which: u32, in_memory: bool, at: u32, column: u32) -> vec4<u32> {
    let i = at / 4u + column;
    return padded(load2(which, in_memory, i, i));
}
