//! Deliberate errors in the shaders, to prove that the conformance tests see them: pieces of WGSL and what takes their place. Compiled only under
//! `--cfg fam_mutants`.

use fam_core::mutants::{id, is_selected};

/// Name, right, wrong.
pub const MUTANTS: &[(&str, &str, &str)] = &[
    ("attend-next-token", "(x < (*four).end)", "(x <= (*four).end)"),
    ("attend-first-token", "(x >= (*four).first)", "(x > (*four).first)"),
    ("attend-mem-rows", "(x < vec4(keys.mem_rows))", "(x <= vec4(keys.mem_rows))"),
    ("attend-maximum-kept", "(*four).row_max = row_max;", "(*four).row_max = before;"),
    ("attend-sum-not-rescaled", "(*four).row_sum * factor", "(*four).row_sum"),
    ("attend-values-not-rescaled", "chunk + 2u * i + 1u] * factor[i]", "chunk + 2u * i + 1u]"),
    ("attend-lane-lost", "return max(four, subgroupShuffleXor(four, 4u));", "return four;"),
    ("attend-scale-unsigned", "let sign = bitcast<f32>(size(Sign));", "let sign = 1.0;"),
    ("attend-last-key", "let count = u32(clamp(load.y - keys.x0, 0, n));", "let count = u32(clamp(load.y - keys.x0, 0, n - 1));"),
    ("attend-window-block", "var first = -i32(size(WindowBlocks));", "var first = 1 - i32(size(WindowBlocks));"),
    ("attend-window-tokens", "position + 1 - i32(size(WindowTokens))", "position - i32(size(WindowTokens))"),
    ("attend-mem-sees-end", "return vec2(max(0, piece.oldest), piece.end);", "return vec2(max(0, piece.oldest), piece.end - 1);"),
    ("attend-mem-entry", "(s.mem_entry + piece.i) % t.blocks", "s.mem_entry % t.blocks"),
    ("attend-sink", "fma(sum, before, exp_negative(sink - most))", "sum * before"),
    ("attend-lse", "bitcast<u32>(row_max + ln(sum))", "bitcast<u32>(row_max)"),
    ("attend-odd-row", "odd);\n        let high", "false);\n        let high"),
    ("attend-aligned", "let i = at / 4u + column;", "let i = at / 4u + max(column, 1u) - 1u;"),
    ("few-sum", "row_sum = fma(row_sum, factor, p);", "row_sum = row_sum + p;"),
    (
        "few-split-lost",
        "for (var split = 0u; split < size(Splits); split++) {\n        let at = part_place(number, row, split);\n        if (part(at + 1u) > 0.0) {\n            let",
        "for (var split = 0u; split < 1u; split++) {\n        let at = part_place(number, row, split);\n        if (part(at + 1u) > 0.0) {\n            let",
    ),
    ("few-split-weight", "let weight = exp2_negative((part(at) - row_max) * unit);", "let weight = 1.0;"),
    ("few-last-block", "i = select(all, all + i - blocks, all + i > blocks);", "i = all;"),
    ("append-odd", "(low >> 16u) | (high << 16u)", "low >> 16u"),
    (
        "append-wrap",
        "let ring_row = (s.first_row + row) % size(RingRows);",
        "let ring_row = min(s.first_row + row, size(RingRows) - 1u);",
    ),
    ("call-origin", "start.y - origin.y - u32(start.x < origin.x)", "start.y - origin.y"),
    ("call-bad-slot", "slot >= size(Slots) || ", ""),
    ("infini-gate", "select(vec2(e, 1.0), vec2(1.0, e), beta >= 0.0)", "select(vec2(1.0, e), vec2(e, 1.0), beta >= 0.0)"),
    ("infini-read-shift", "if (most > 0.0) {\n        return sigma(x);", "if (true) {\n        return sigma(x);"),
    ("infini-read-empty", "acc[4u * chunk + r] / denominator[r], is_written", "acc[4u * chunk + r] / denominator[r], true"),
    (
        "infini-read-block",
        "let entry = (s.state_entry + piece.i) % m_tensor.blocks;",
        "let entry = s.state_entry % m_tensor.blocks;",
    ),
    ("infini-write-norm", "norm[channel] += sums[r];", "norm[channel] = sums[r];"),
    ("infini-write-first-block", "let is_whole = i > 0u || s.in_block <= s.before;", "let is_whole = true;"),
    ("infini-write-delta", "value -= read / denominator;", ""),
    (
        "infini-write-first-delta",
        "if (is_written) {\n                        value",
        "if (true) {\n                        value",
    ),
    ("merge-empty", "if (shares.x > 0.0) {", "if (true) {"),
    ("merge-lse", "bitcast<u32>(most + ln(w.x + w.y))", "bitcast<u32>(most)"),
    ("exp2", "p = fma(p, r, 5.550332471162809e-2);", "p = fma(p, r, 5.57e-2);"),
    ("ln", "fma(exponent, 0.693359375, m + y)", "fma(exponent, 0.6933, m + y)"),
    ("narrow-bf16-truncates", "(a + 0x7fffu + ((a >> 16u) & 1u)) >> 16u", "a >> 16u"),
    ("narrow-f16-truncates", "(a + 0xfffu + ((a >> 13u) & 1u) - 0x38000000u) >> 13u", "(a - 0x38000000u) >> 13u"),
];

/// A shader with the error that is selected.
pub(crate) fn planted(text: String) -> String {
    match MUTANTS.iter().find(|(name, ..)| is_selected(id(name))) {
        Some((_, right, wrong)) => text.replace(right, wrong),
        None => text,
    }
}
