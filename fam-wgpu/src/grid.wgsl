// The task of a workgroup: rows of tiles of block rows, then of memory rows, head by head. Without rows: none.
fn find(number: u32) -> Piece {
    let blocks = size(Blocks);
    let row_tiles = select(0u, blocks * size(ROW_TILES), HAS_ROWS);
    let tiles = row_tiles + select(0u, blocks * size(MemTiles), HAS_MEM_ROWS);
    let head = number / tiles;
    let is_memory = number % tiles >= row_tiles;
    let tile = number % tiles - select(0u, row_tiles, is_memory);
    let each = select(size(ROW_TILES), size(MemTiles), is_memory);
    return rows_of(head, tile / each, is_memory, tile % each * BLOCK_M);
}
