// Rows that begin at any element, read word by word.

alias Load = u32;
alias Loads = vec2<u32>;

fn pair(i: Load, j: Load) -> Loads {
    return vec2(i, j);
}

// Whether a row of 16 bits begins with the second element of a word.
fn is_odd(at: u32) -> bool {
    return (at & 1u) == 1u;
}

// The words of four channels of the row at element `at`: nothing is made of them yet, so that many can be on their way. Words beyond the row are
// not read.
fn ask(which: u32, in_memory: bool, at: u32, column: u32) -> vec4<u32> {
    let last = word(DTYPE, at + HEAD_DIM - 1u);
    let first = word(DTYPE, at + 4u * column);
    let words = vec4(load2(which, in_memory, first, min(first + 1u, last)), 0u, 0u);
    // Two elements to a word, a row that begins with the second of one has a third.
    if (DTYPE == F32 || is_odd(at)) {
        return vec4(words.xy, load2(which, in_memory, min(first + 2u, last), min(first + 3u, last)));
    }
    return words;
}
