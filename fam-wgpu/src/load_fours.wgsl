// Rows that begin at a multiple of four elements, and have as many: a `Word` is all that four channels are, and read at once. It is `vec4<u32>` in
// f32, `vec2<u32>` in 16 bits.

alias Words = Word;

fn both(i: Word, j: Word) -> Words {
    return i;
}

fn is_odd(at: u32) -> bool {
    return false;
}

fn ask(which: u32, in_memory: bool, at: u32, column: u32) -> vec4<u32> {
    let i = at / 4u + column;
    return padded(words2(which, in_memory, i, i));
}
