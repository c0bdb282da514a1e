//! What a suite has covered: distribution × dtype × op, and every axis of the cases.

use crate::case::{Case, KeySource, Strides, Style};
use crate::distribution::Distribution;
use crate::draw;
use crate::wild;
use fam_core::{Dtype, Op, Window};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// Counts of executed cases.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Coverage {
    cases: u64,
    /// Those of them with two blocks or more, ring wrap, GQA and memory keys at once.
    dense: u64,
    by_input: BTreeMap<(Distribution, &'static str, &'static str), u64>,
    /// By op and axis.
    by_axis: BTreeMap<(&'static str, &'static str), Values>,
}

/// Counts of an axis's values, which sort as numbers where they are.
type Values = BTreeMap<(u64, String), u64>;

impl Coverage {
    /// Counts a case.
    pub fn add(&mut self, case: &Case) {
        self.cases += 1;
        self.dense += u64::from(case.is_dense());
        *self.by_input.entry((case.distribution, case.op.name(), case.shape.dtype().name())).or_default() += 1;
        let s = &case.shape;
        let axes = [
            ("D", number(s.head_dim())),
            ("heads", heads(s.heads(), s.kv_heads())),
            ("batch", number(case.batch())),
            ("B", number(s.block_len())),
            ("window", window(s.window())),
            ("F", number(s.mem_len())),
            ("blocks", number(case.blocks())),
            (
                "keys",
                name(match (case.keys, case.wraps()) {
                    (KeySource::Linear, _) => "linear",
                    (KeySource::Ring, false) => "ring",
                    (KeySource::Ring, true) => "ring, wraps",
                }),
            ),
            ("strides", name(case.strides.name())),
            ("style", name(case.style.name())),
            ("out", name(case.out_dtype.name())),
            ("sink", flag(case.sink)),
            ("lse", flag(case.lse)),
            ("d_lse", flag(case.gradients.d_lse)),
            ("o_local", flag(case.fused && case.o_local)),
            ("fused infini", flag(case.fused)),
            (
                "device spans",
                name(match (case.device_spans, wild::spans(case)) {
                    (false, _) => "no",
                    (true, Ok(spans)) if spans != case.spans => "to be clamped",
                    _ => "yes",
                }),
            ),
            ("2^32 from the origin", flag(case.is_far())),
            (
                "row groups",
                name(match (case.rows, case.mem_rows) {
                    (true, true) => "both",
                    (true, false) => "block",
                    (false, true) => "memory",
                    (false, false) => "none",
                }),
            ),
            (
                "origin",
                name(match case.spans.iter().map(|s| s.origin).max() {
                    None | Some(0) => "0",
                    Some(o) if o % s.block_len() as u64 == 0 => "aligned",
                    _ => "unaligned",
                }),
            ),
            ("absent memory rows", flag(case.spans.iter().any(|p| (p.mem_rows as usize) < s.mem_len()))),
            ("empty streams", flag(case.spans.iter().any(|p| p.len == 0))),
            ("shuffled slots", flag(case.spans.iter().enumerate().any(|(n, p)| p.slot as usize != n))),
        ];
        for (axis, value) in axes.into_iter().filter(|(axis, _)| concerns(case.op, axis)) {
            *self.by_axis.entry((case.op.name(), axis)).or_default().entry(value).or_default() += 1;
        }
        for span in &case.spans {
            *self.by_axis.entry((case.op.name(), "len")).or_default().entry(number(span.len as usize)).or_default() += 1;
        }
    }

    /// Op, dtype, distribution, and how many cases had them.
    pub fn inputs(&self) -> impl Iterator<Item = (&'static str, &'static str, Distribution, u64)> {
        self.by_input.iter().map(|((distribution, op, dtype), cases)| (*op, *dtype, *distribution, *cases))
    }

    /// Op, axis, value, and how many cases had it; of axis `len`, how many streams.
    pub fn axes(&self) -> impl Iterator<Item = (&'static str, &'static str, &str, u64)> {
        self.by_axis
            .iter()
            .flat_map(|(&(op, axis), values)| values.iter().map(move |((_, value), count)| (op, axis, value.as_str(), *count)))
    }

    /// The share of cases with two blocks or more, ring wrap, GQA and memory keys, all at once. At least 0.3 in a suite.
    pub fn dense_share(&self) -> f64 {
        self.dense as f64 / (self.cases as f64).max(1.0)
    }

    /// Pairs of op and dtype that any case had.
    pub fn ops_and_dtypes(&self) -> usize {
        self.by_input.keys().map(|(_, op, dtype)| (op, dtype)).collect::<BTreeSet<_>>().len()
    }

    /// What no case of `ops` had, though it says something about them: pairs of distribution and dtype, and values of every axis.
    pub fn gaps(&self, ops: &[Op]) -> Vec<String> {
        let mut gaps = Vec::new();
        for &op in ops {
            for distribution in Distribution::of(op) {
                for dtype in Dtype::ALL {
                    if !self.by_input.contains_key(&(distribution, op.name(), dtype.name())) {
                        gaps.push(format!("{distribution} x {op} x {dtype}"));
                    }
                }
            }
            for (axis, values) in axes().into_iter().filter(|(axis, _)| concerns(op, axis)) {
                let seen = self.by_axis.get(&(op.name(), axis));
                // `append` writes a ring and nothing else; gradients are those of linear caches, which end where memory does.
                let is_backward = Op::BACKWARD.contains(&op);
                let is_possible = |value: &str| match axis {
                    "keys" if is_backward => value == "linear",
                    "keys" => op != Op::Append || value != "linear",
                    "2^32 from the origin" if is_backward => value == "no",
                    _ => true,
                };
                let values = values.into_iter().filter(|(_, value)| is_possible(value));
                let missing = values.filter(|value| !seen.is_some_and(|seen| seen.contains_key(value)));
                gaps.extend(missing.map(|(_, value)| format!("{op} {axis}: {value}")));
            }
        }
        gaps
    }
}

fn number(n: usize) -> (u64, String) {
    (n as u64, n.to_string())
}

fn name(name: &str) -> (u64, String) {
    (0, name.to_owned())
}

fn flag(is_set: bool) -> (u64, String) {
    name(if is_set { "yes" } else { "no" })
}

fn heads(heads: usize, kv_heads: usize) -> (u64, String) {
    (heads as u64, format!("{heads}/{kv_heads}"))
}

fn window(window: Window) -> (u64, String) {
    match window {
        Window::Blocks(m) => (m as u64, format!("{m} blocks")),
        Window::Tokens(w) => (1 << 32 | w as u64, format!("{w} tokens")),
        other => name(&format!("{other:?}")),
    }
}

/// The values that each axis must have had; of those not here (lengths, blocks) any will do.
fn axes() -> Vec<(&'static str, Vec<(u64, String)>)> {
    let numbers = |values: &[usize]| values.iter().map(|n| number(*n)).collect();
    let names = |values: &[&str]| values.iter().map(|n| name(n)).collect();
    let windows = draw::TOKEN_WINDOWS.map(Window::Tokens).into_iter().chain(draw::BLOCK_WINDOWS.map(Window::Blocks));
    let mut axes = vec![
        ("D", numbers(&draw::HEAD_DIMS)),
        ("heads", draw::HEADS.map(|(h, kv)| heads(h, kv)).into()),
        ("batch", numbers(&[0, 1, 2, 5])),
        ("B", numbers(&draw::BLOCK_LENS)),
        ("window", windows.map(window).collect()),
        ("F", numbers(&draw::MEM_LENS)),
        ("keys", names(&["linear", "ring", "ring, wraps"])),
        ("strides", names(&Strides::ALL.map(Strides::name))),
        ("style", names(&Style::ALL.map(Style::name))),
        ("out", names(&Dtype::ALL.map(Dtype::name))),
        ("device spans", names(&["no", "yes", "to be clamped"])),
        ("row groups", names(&["both", "block", "memory", "none"])),
        ("origin", names(&["0", "aligned", "unaligned"])),
    ];
    let flags = [
        "sink",
        "lse",
        "d_lse",
        "o_local",
        "fused infini",
        "2^32 from the origin",
        "absent memory rows",
        "empty streams",
        "shuffled slots",
    ];
    axes.extend(flags.map(|axis| (axis, vec![flag(false), flag(true)])));
    axes
}

/// Whether the axis is anything to the op.
fn concerns(op: Op, axis: &str) -> bool {
    let is_merge = matches!(op, Op::Merge | Op::MergeBackward);
    let is_attend = matches!(op, Op::Attend | Op::AttendBackward);
    match axis {
        "D" | "heads" | "batch" | "blocks" | "strides" => true,
        "B" | "style" | "device spans" | "2^32 from the origin" | "origin" | "empty streams" | "shuffled slots" => !is_merge,
        "keys" => matches!(op, Op::Append | Op::InfiniWrite | Op::InfiniWriteBackward) || is_attend,
        "window" | "F" | "absent memory rows" | "row groups" => op == Op::Append || is_attend,
        "out" => !matches!(op, Op::Append | Op::InfiniWrite | Op::InfiniWriteBackward),
        "lse" => matches!(op, Op::Attend | Op::Merge),
        "d_lse" => matches!(op, Op::AttendBackward | Op::MergeBackward),
        "sink" => is_attend,
        _ => op == Op::Attend,
    }
}

impl fmt::Display for Coverage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} cases; {:.0} % with two blocks or more, ring wrap, GQA and memory keys at once",
            self.cases,
            100.0 * self.dense_share()
        )?;
        write!(f, "{:18}", "distribution")?;
        let ops: Vec<Op> = Op::ALL.into_iter().filter(|op| self.by_input.keys().any(|(_, seen, _)| *seen == op.name())).collect();
        for op in &ops {
            write!(f, "{:>23}", op.name())?;
        }
        writeln!(f)?;
        for distribution in Distribution::ALL {
            write!(f, "{:18}", distribution.name())?;
            for op in &ops {
                let count = |dtype: Dtype| self.by_input.get(&(distribution, op.name(), dtype.name())).copied().unwrap_or(0);
                let [a, b, c] = Dtype::ALL.map(count);
                write!(f, "{:>23}", if a + b + c == 0 { "-".into() } else { format!("{a} {b} {c}") })?;
            }
            writeln!(f)?;
        }
        writeln!(f, "(counts: f32 f16 bf16)")?;
        for ((op, axis), values) in &self.by_axis {
            if values.len() > 1 {
                write!(f, "{op} {axis}:")?;
                for ((_, value), count) in values {
                    write!(f, " {value}={count}")?;
                }
                writeln!(f)?;
            }
        }
        Ok(())
    }
}
