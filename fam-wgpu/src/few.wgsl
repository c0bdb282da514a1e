// Which rows are few, and what a split of their keys leaves of them; `few.rs` says how.

// Floats of a row's part: its largest logit and its sum of weights, then the sums of weighted values.
const PART = 2u + HEAD_DIM;

// Rows of a block that may have few: of a stream's first or of its last blocks in the call, which are numbered head by head.
fn few_rows_of(number: u32, first: u32) -> Piece {
    let blocks = size(FewBlocks);
    let head = number / blocks;
    let n = head / size(KvHeads);
    var i = number % blocks;
    if (i > 0u && n < size(Batch)) {
        let all = stream(n).blocks;
        i = select(all, all + i - blocks, all + i > blocks);
    }
    return rows_of(head, i, false, first);
}

// Element at which the part of a row and split begins.
fn part_place(number: u32, row: u32, split: u32) -> u32 {
    return tensor(Parts).offset + ((number * size(FewRows) + row) * size(Splits) + split) * PART;
}
