// The splits of few rows become one softmax: a thread has four channels of a row, and takes its parts, which are bound as q, in their order.

fn part(i: u32) -> f32 {
    return bitcast<f32>(load2(Q, false, i, i).x);
}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    var number = group_number(workgroup) * 64u + thread;
    let column = number % COLUMNS;
    number /= COLUMNS;
    let row = number % size(FewRows);
    number /= size(FewRows);
    let piece = few_rows_of(number, 0u);
    if (row >= piece.rows || !is_few(piece)) {
        return;
    }
    let unit = bitcast<f32>(size(UnitLog2));
    var row_max = 0.0;
    var has_keys = false;
    for (var split = 0u; split < size(Splits); split++) {
        let at = part_place(number, row, split);
        if (part(at + 1u) > 0.0) {
            row_max = select(part(at), max(row_max, part(at)), has_keys);
            has_keys = true;
        }
    }
    var sum = 0.0;
    var x = vec4(0.0);
    for (var split = 0u; split < size(Splits); split++) {
        let at = part_place(number, row, split);
        if (part(at + 1u) > 0.0) {
            let weight = exp2_negative((part(at) - row_max) * unit);
            sum = fma(weight, part(at + 1u), sum);
            for (var c = 0u; c < min(4u, HEAD_DIM - 4u * column); c++) {
                x[c] = fma(weight, part(at + 2u + 4u * column + c), x[c]);
            }
        }
    }
    write_row(piece, row, column, x, has_keys, row_max, sum);
}

// Four channels of a row, whose other threads have the others.
fn write_row(piece: Piece, row: u32, column: u32, x: vec4<f32>, has_keys: bool, row_max: f32, sum: f32) {
    let end = row_end(piece, row, has_keys, row_max, sum);
    if (column == 0u) {
        write_lse(piece, row, end);
    }
    let out = tensor(O);
    store4(O, out.dtype, row_place(out, piece, row), column, select(vec4(0.0), x * end.weight, has_keys));
}
