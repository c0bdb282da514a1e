//! What the backward ops refuse at the door, by name: each argument is broken in turn, and nothing else.

mod common;

use common::*;
use fam_core::*;

const N: usize = 2;
const L: usize = 4;
const F: usize = 3;
const D: usize = 8;

/// Tensors of a call by name, each a layout in memory of its own.
struct Tensors(Vec<(&'static str, Layout, Region)>);

impl Tensors {
    fn new(tensors: &[(&'static str, Dtype, [usize; 5])]) -> Self {
        let place = |(i, &(name, dtype, shape)): (usize, &(_, _, _))| {
            (name, Layout::packed(dtype, shape), Region { first: (i as u64) << 20, bytes: 1 << 20 })
        };
        Tensors(tensors.iter().enumerate().map(place).collect())
    }

    fn find(&mut self, name: &str) -> &mut (&'static str, Layout, Region) {
        self.0.iter_mut().find(|(n, ..)| *n == name).unwrap()
    }

    /// Hands out each tensor once, as an input or an output.
    fn take(&mut self) -> Taken<'_> {
        Taken(self.0.iter_mut().map(|(name, layout, region)| (*name, *layout, Some(region))).collect())
    }
}

struct Taken<'a>(Vec<(&'static str, Layout, Option<&'a mut Region>)>);

impl<'a> Taken<'a> {
    fn output(&mut self, name: &str) -> ViewMut<'a, Region> {
        let (_, layout, region) = self.0.iter_mut().find(|(n, ..)| *n == name).unwrap();
        ViewMut::new(region.take().unwrap(), *layout)
    }

    fn input(&mut self, name: &str) -> View<'a, Region> {
        let ViewMut { mem, layout } = self.output(name);
        View::new(mem, layout)
    }
}

/// Every tensor of `valid` is right, and each way of breaking one is refused under its name.
fn each_is_checked(valid: impl Fn() -> Tensors, outputs: &[&str], check: impl Fn(&mut Tensors) -> Result<()>) {
    check(&mut valid()).unwrap();
    let names: Vec<_> = valid().0.iter().map(|(name, ..)| *name).collect();
    for (i, &name) in names.iter().enumerate() {
        for (axis, size) in [(3, 5), (2, 0), (0, 0), (4, D + 1)] {
            let mut tensors = valid();
            tensors.find(name).1.shape[axis] = size;
            assert_eq!(field(check(&mut tensors).unwrap_err()), name, "axis {axis} of {name}");
        }
        let mut tensors = valid();
        tensors.find(name).2.bytes = 3;
        assert_eq!(field(check(&mut tensors).unwrap_err()), name, "bytes of {name}");
        let mut tensors = valid();
        tensors.find(name).1.dtype = Dtype::Bf16;
        assert_eq!(field(check(&mut tensors).unwrap_err()), name, "dtype of {name}");

        if outputs.contains(&name) {
            let mut tensors = valid();
            let layout = &mut tensors.find(name).1;
            layout.stride = layout.stride.map(|_| 0);
            assert_eq!(field(check(&mut tensors).unwrap_err()), name, "repeating {name}");
            for &other in names[..i].iter().chain(&names[i + 1..]) {
                let mut tensors = valid();
                tensors.find(name).2.first = tensors.find(other).2.first;
                let refused = field(check(&mut tensors).unwrap_err());
                assert!([name, other].contains(&&*refused), "{name} over {other}: {refused}");
            }
        }
    }
}

const F16: Dtype = Dtype::F16;
const F32: Dtype = Dtype::F32;

fn spans() -> [Span; N] {
    [Span::new(0, 0, L as u32).with_mem_rows(3), Span::new(1, 8, L as u32).with_mem_rows(2)]
}

#[test]
fn arguments_of_attend_backward() {
    let plan = plan(shape().dtype(F16).build().unwrap().spec(N, L).ops(&[Op::AttendBackward]));
    let (scratch, spans) = (region(200 << 20), spans());
    let (rows, mem) = ([N, 1, L, 4, D], [N, 1, F, 4, D]);
    let (keys, mem_keys) = ([N, 1, 12, 2, D], [N, 2, F, 2, D]);
    let per_row = |[n, b, r, h, _]: [usize; 5]| [n, b, r, h, 1];
    let valid = || {
        Tensors::new(&[
            ("q", F16, rows),
            ("o", F16, rows),
            ("lse", F32, per_row(rows)),
            ("d_o", F16, rows),
            ("d_lse", F32, per_row(rows)),
            ("d_q", F16, rows),
            ("mem_q", F16, mem),
            ("mem_o", F16, mem),
            ("mem_lse", F32, per_row(mem)),
            ("d_mem_o", F16, mem),
            ("d_mem_lse", F32, per_row(mem)),
            ("d_mem_q", F16, mem),
            ("k", F16, keys),
            ("v", F16, keys),
            ("d_k", F32, keys),
            ("d_v", F32, keys),
            ("mem_k", F16, mem_keys),
            ("mem_v", F16, mem_keys),
            ("d_mem_k", F32, mem_keys),
            ("d_mem_v", F32, mem_keys),
            ("sink", F32, [1, 1, 1, 4, 1]),
            ("d_sink", F32, [1, 1, 1, 4, 1]),
        ])
    };
    let check = |tensors: &mut Tensors| {
        let mut t = tensors.take();
        let rows = RowsBackward::new(t.input("q"), t.input("o"), t.input("lse"), t.input("d_o"), t.output("d_q"));
        let mem_rows =
            RowsBackward::new(t.input("mem_q"), t.input("mem_o"), t.input("mem_lse"), t.input("d_mem_o"), t.output("d_mem_q"));
        AttendBackward::new(Spans::Host(&spans), t.input("k"), t.input("v"))
            .rows(rows.d_lse(t.input("d_lse")))
            .mem_rows(mem_rows.d_lse(t.input("d_mem_lse")))
            .mem(t.input("mem_k"), t.input("mem_v"))
            .sink(t.input("sink"))
            .d_keys(t.output("d_k"), t.output("d_v"))
            .d_mem(t.output("d_mem_k"), t.output("d_mem_v"))
            .d_sink(t.output("d_sink"))
            .validate(&plan, &scratch)
    };
    each_is_checked(valid, &["d_q", "d_mem_q", "d_k", "d_v", "d_mem_k", "d_mem_v", "d_sink"], check);
    for name in ["mem_v", "d_mem_k", "d_mem_v"] {
        let mut tensors = valid();
        tensors.find(name).1.shape[1] = 3;
        assert_eq!(field(check(&mut tensors).unwrap_err()), name);
    }
    // Gradients of what is not there, and memory keys that a span names and nobody brings.
    let refused = |spans: &[Span], name: &str| {
        let mut tensors = valid();
        let mut t = tensors.take();
        let args = AttendBackward::new(Spans::Host(spans), t.input("k"), t.input("v"));
        let args = match name {
            "d_sink" => args.d_sink(t.output("d_sink")),
            "d_mem" => args.d_mem(t.output("d_mem_k"), t.output("d_mem_v")),
            _ => args,
        };
        assert_eq!(field(args.validate(&plan, &scratch).unwrap_err()), name);
    };
    refused(&[], "d_sink");
    refused(&[], "d_mem");
    refused(&spans, "mem");
}

#[test]
fn arguments_of_infini_read_backward() {
    let shape = shape().dtype(F16).infini(InfiniRule::Linear).build().unwrap();
    let plan = plan(shape.spec(N, L).ops(&[Op::InfiniReadBackward]).out_dtype(F32));
    let (scratch, spans) = (region(200 << 20), spans());
    let rows = [N, 1, L, 4, D];
    let valid = || {
        Tensors::new(&[
            ("infini_q", F16, rows),
            ("m", F32, [N, 2, D, 2, D]),
            ("z", F32, [N, 2, 1, 2, D]),
            ("beta", F32, [1, 1, 1, 4, 1]),
            ("o_local", F32, rows),
            ("d_o", F32, rows),
            ("d_infini_q", F32, rows),
            ("d_o_local", F32, rows),
            ("d_m", F32, [N, 2, D, 2, D]),
            ("d_z", F32, [N, 2, 1, 2, D]),
            ("d_beta", F32, [1, 1, 1, 4, 1]),
        ])
    };
    let check = |tensors: &mut Tensors| {
        let mut t = tensors.take();
        let state = InfiniState { q: t.input("infini_q"), m: t.input("m"), z: t.input("z"), beta: t.input("beta") };
        let (o_local, d_o) = (t.input("o_local"), t.input("d_o"));
        InfiniReadBackward::new(Spans::Host(&spans), state, o_local, d_o, t.output("d_infini_q"), t.output("d_o_local"))
            .d_state(t.output("d_m"), t.output("d_z"))
            .d_beta(t.output("d_beta"))
            .validate(&plan, &scratch)
    };
    each_is_checked(valid, &["d_infini_q", "d_o_local", "d_m", "d_z", "d_beta"], check);
    for name in ["d_m", "d_z"] {
        let mut tensors = valid();
        tensors.find(name).1.shape[1] = 3;
        assert_eq!(field(check(&mut tensors).unwrap_err()), name);
    }
}

#[test]
fn arguments_of_infini_write_backward() {
    let shape = shape().dtype(F16).infini(InfiniRule::Delta).build().unwrap();
    let plan = plan(shape.spec(N, L).ops(&[Op::InfiniWriteBackward]));
    let (scratch, spans) = (region(200 << 20), spans());
    let (keys, m, z) = ([N, 1, 12, 2, D], [N, 2, D, 2, D], [N, 2, 1, 2, D]);
    let valid = || {
        Tensors::new(&[
            ("k", F16, keys),
            ("v", F16, keys),
            ("m", F32, m),
            ("z", F32, z),
            ("d_m", F32, m),
            ("d_z", F32, z),
            ("d_k", F32, keys),
            ("d_v", F32, keys),
        ])
    };
    let check = |tensors: &mut Tensors| {
        let mut t = tensors.take();
        let (keys, state) = ([t.input("k"), t.input("v")], [t.input("m"), t.input("z")]);
        let d_state = [t.output("d_m"), t.output("d_z")];
        InfiniWriteBackward::new(Spans::Host(&spans), keys, state, d_state)
            .d_keys(t.output("d_k"), t.output("d_v"))
            .validate(&plan, &scratch)
    };
    each_is_checked(valid, &["d_m", "d_z", "d_k", "d_v"], check);
    // A segment writes the entry after the one that it reads.
    for name in ["m", "z", "d_m", "d_z"] {
        let mut tensors = valid();
        tensors.find(name).1.shape[1] = 1;
        assert_eq!(field(check(&mut tensors).unwrap_err()), name);
        tensors.find(name).1.shape[1] = 3;
        assert_eq!(field(check(&mut tensors).unwrap_err()), if name == "m" { "z" } else { name });
    }
}

#[test]
fn arguments_of_merge_backward() {
    let plan = plan(shape().dtype(F16).build().unwrap().spec(N, L).ops(&[Op::MergeBackward]));
    let scratch = region(200 << 20);
    let (wide, per_row) = ([N, 2, L, 4, D], [N, 2, L, 4, 1]);
    let valid = || {
        Tensors::new(&[
            ("o_a", F32, wide),
            ("lse_a", F32, per_row),
            ("o_b", F16, wide),
            ("lse_b", F32, per_row),
            ("d_lse", F32, per_row),
            ("d_o_a", F16, wide),
            ("d_lse_a", F32, per_row),
            ("d_o_b", F16, wide),
            ("d_lse_b", F32, per_row),
        ])
    };
    let check = |tensors: &mut Tensors| {
        let (d_o, d_o_region) = (Layout::packed(F16, wide), region(100 << 20));
        let mut t = tensors.take();
        let parts = [["o_a", "lse_a"], ["o_b", "lse_b"]].map(|[o, lse]| Partial { o: t.input(o), lse: t.input(lse) });
        let gradients = [["d_o_a", "d_lse_a"], ["d_o_b", "d_lse_b"]]
            .map(|[d_o, d_lse]| PartialGradients { d_o: t.output(d_o), d_lse: t.output(d_lse) });
        MergeBackward::new(parts, View::new(&d_o_region, d_o), gradients).d_lse(t.input("d_lse")).validate(&plan, &scratch)
    };
    each_is_checked(valid, &["d_o_a", "d_lse_a", "d_o_b", "d_lse_b"], check);
}

/// What a forward pass leaves for its backward pass; nothing where there is none.
#[test]
fn saved_bytes_count_what_is_not_an_output_already() {
    let forward = [Op::Append, Op::Attend];
    let training = [Op::Attend, Op::AttendBackward];
    let saved = |shape: ShapeBuilder, ops: &[Op]| shape.build().unwrap().spec(N, 6).ops(ops).build().unwrap().saved_bytes();
    assert_eq!(saved(shape(), &forward), 0);
    // lse of 6 tokens and, for 2 blocks, of 3 memory rows, in 4 heads.
    assert_eq!(saved(shape(), &training), (N * 4 * (6 + 2 * F) * 4) as u64);
    let o_local = N * 4 * 6 * D * 4;
    assert_eq!(saved(shape().infini(InfiniRule::Linear), &training), (N * 4 * (6 + 2 * F) * 4 + o_local) as u64);
    // m and z of 2 blocks, in 2 kv heads.
    let states = [Op::InfiniRead, Op::InfiniReadBackward, Op::InfiniWriteBackward];
    assert_eq!(saved(shape().infini(InfiniRule::Delta), &states), (N * 2 * 2 * (D * D + D) * 4) as u64);
    let plan = plan(shape().build().unwrap().spec(1, 4));
    let (k, v) = (region(0), region(1 << 20));
    let layout = Layout::tokens(F32, [1, 4, 2, D]);
    let args = AttendBackward::new(Spans::Host(&[]), View::new(&k, layout), View::new(&v, layout));
    assert_eq!(field(args.validate(&plan, &region(2 << 20)).unwrap_err()), "op of this plan");
}
