"""Compares fam_torch, in float64, with the results in case files: check_cases.py [--strict] FILE_OR_FOLDER...

A case file holds the inputs of one call and, as `expected_X`, its outputs X; the format is on the page of
`CaseFile` (cargo doc --open -p fam-testkit). Read here beside it, where present:

- `d_X`: a gradient that arrives at output X. `expected_d_Y`: what then arrives at the file's tensor Y, in its
  shape; 0 for rows that no row sees.
- op = "merge": `o_a`, `lse_a`, `o_b`, `lse_b`; outputs `o`, `lse`.
- op = "layer": `x` [N, L, width], `prompt` [F, width] and weights named as in TransformerFAM's state_dict
  (`layers.0.w_q`, ...); metadata block_len, window_blocks, heads, kv_heads, optionally offset; outputs `y`
  [N, L, width] and `memory` [depth, N, F, width], what each layer feeds back after the last block.

Expected tensors in F64 must agree to 1e-12 of their largest entry (of 1, where that is larger), those in F32
to half an ulp more. Where large terms cancel, rounding alone does worse: such a tensor may be off by 16 times
as much as the result here moves when every input moves by an ulp. Infinities, NaN and the zeros of empty rows
must agree exactly. --strict also fails where an expected tensor is not in F64 or a case brings no gradients.
Exit status: 0 all agree, 1 something differs, 2 nothing to compare, or a file that can't be read.
"""
import argparse
import collections
import pathlib
import sys

import torch
from safetensors import SafetensorError, safe_open

import fam_torch

ROWS = ("o", "lse", "mem_o", "mem_lse")
OUTPUTS = {"attend": ROWS, "infini": (*ROWS, "m", "z"), "merge": ("o", "lse"), "layer": ("y", "memory")}
ATTEND = ("q", "k", "v", "mem_q", "mem_k", "mem_v", "sink", "lengths", "start")
INPUTS = {"attend": ATTEND, "infini": (*ATTEND, "infini_q", "infini_k", "beta", "m0", "z0"),
          "merge": ("o_a", "lse_a", "o_b", "lse_b"), "layer": ("x", "prompt")}


def read(path):
    """A file's metadata, inputs and upstream gradients (floats widened to float64), and expected tensors."""
    with safe_open(path, "pt") as file:
        meta, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    op = meta.get("op")
    if meta.get("format") != "1" or op not in OUTPUTS:
        raise ValueError(f"not a case that is known here: format {meta.get('format')}, op {op}")
    inputs, upstream, expected = {}, {}, {}
    for name, x in tensors.items():
        if name.startswith("expected_"):
            expected[name.removeprefix("expected_")] = x
        elif name.startswith("d_") and name[2:] in OUTPUTS[op]:
            upstream[name[2:]] = x.double()
        elif name in INPUTS[op] or op == "layer" and name.startswith("layers."):
            inputs[name] = x.double() if x.is_floating_point() else x
        elif not name.startswith("x_"):
            raise ValueError(f"unknown tensor {name}")
    return meta, inputs, upstream, expected


def run(meta, inputs):
    """fam_torch's outputs for a case, in the order of OUTPUTS."""
    op, t = meta["op"], dict(inputs)
    if op == "merge":
        return fam_torch.merge(*(t[name] for name in INPUTS[op]))
    sizes = ("block_len", "window_blocks", "window_tokens", "heads", "kv_heads")
    sizes = {name: int(meta[name]) for name in sizes if name in meta}
    scale = float(meta["scale"]) if "scale" in meta else None
    if op == "layer":
        x, depth = t.pop("x"), len({name.split(".")[1] for name in t if name.startswith("layers.")})
        model = fam_torch.TransformerFAM(
            depth, x.shape[-1], mem_len=t["prompt"].shape[0], ff_width=t["layers.0.w_up"].shape[1],
            head_dim=t["layers.0.w_q"].shape[1] // sizes["heads"],
            feedback_norm="layers.0.feedback_norm" in t, scale=scale, **sizes)
        options = {"offset": int(meta.get("offset", 0))}
        y, (_, memory, _) = torch.func.functional_call(model, t, (x,), options, strict=True)
        return y, torch.stack(memory)
    if op == "infini":
        t = {"m": t.pop("m0", None), "z": t.pop("z0", None), "rule": meta["rule"], **t}
    # A kernel takes its scale as an f32, of which the file gives the shortest decimal form.
    scale = inputs["q"].shape[-1] ** -0.5 if scale is None else scale
    scale = torch.tensor(scale, dtype=torch.float32).item()
    return getattr(fam_torch, op)(**t, **sizes, scale=scale)


def specified(name, meta, inputs, shape):
    """Which entries of an output are defined: rows of tokens that exist, and of blocks that they touch."""
    if meta["op"] not in ("attend", "infini") or name not in ROWS:
        return torch.ones(shape, dtype=torch.bool)
    (batch, tokens), block_len = inputs["q"].shape[:2], int(meta["block_len"])
    length = inputs.get("lengths", torch.full((batch,), tokens))
    start = inputs.get("start", torch.zeros_like(length))
    touched = (start + length + block_len - 1) // block_len - start // block_len
    count = touched.where(length > 0, 0) if name.startswith("mem") else length
    exist = torch.arange(shape[1]) < count[:, None]
    return exist.reshape(*exist.shape, *[1] * (len(shape) - 2)).expand(shape)


def results(meta, inputs, upstream, expected):
    """The outputs by name and, if gradients arrive at some, as d_Y what then arrives at the inputs Y."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items() if x.is_floating_point()}
    got = dict(zip(OUTPUTS[meta["op"]], run(meta, inputs | leaves)))
    for name in got.keys() & expected.keys():
        if name.startswith("mem_"):
            got[name] = got[name][:, :expected[name].shape[1]]  # a file may stop after the last touched block
    reached = [name for name in upstream if got[name].requires_grad]
    if reached:
        arriving = [torch.where(specified(name, meta, inputs, upstream[name].shape), upstream[name], 0)
                    for name in reached]
        gradients = torch.autograd.grad([got[name] for name in reached], list(leaves.values()), arriving,
                                        allow_unused=True, materialize_grads=True)
        got.update({f"d_{name}": gradient for name, gradient in zip(leaves, gradients)})
    return {name: x.detach() for name, x in got.items()}


def nudged(tensors):
    """Every entry moved by an ulp, up or down."""
    random = torch.Generator().manual_seed(0)
    return {name: x * (1 + 2**-52 * (2 * torch.randint(2, x.shape, generator=random).double() - 1))
            if x.is_floating_point() else x for name, x in tensors.items()}


def share(got, want, rounding=0.0):
    """The worst error as a share of what is allowed; infinite where infinities or NaN differ."""
    finite = want.isfinite()
    if not torch.allclose(got.to(want.dtype)[~finite], want[~finite], equal_nan=True):
        return torch.inf
    got, want, stored = got[finite], want[finite].double(), want.dtype
    if want.numel() == 0:
        return 0.0
    allowed = max(1e-12 * max(1.0, want.abs().max().item()), rounding)
    if stored == torch.float32:
        allowed = allowed + 2**-24 * want.abs() + 2**-150
    return ((got - want).abs() / allowed).nan_to_num(torch.inf).max().item()


def compare(path):
    """(name, worst share of the allowed error, whether stored in F64) of every expected tensor of a file."""
    meta, inputs, upstream, expected = read(path)
    got, moved = results(meta, inputs, upstream, expected), {}
    for name, want in expected.items():
        if name not in got or got[name].shape != want.shape:
            ours = list(got[name].shape) if name in got else "missing"
            raise ValueError(f"expected_{name} is {list(want.shape)}, the result here {ours}")
        rows = specified(name, meta, inputs, want.shape)
        worst = share(got[name][rows], want[rows])
        if 1 < worst < torch.inf:
            moved = moved or results(meta, nudged(inputs), nudged(upstream), expected)
            rounding = (moved[name] - got[name])[rows].nan_to_num(0, 0, 0).abs().max().item()
            worst = share(got[name][rows], want[rows], 16 * rounding)
        lse = expected.get(name.removesuffix("o") + "lse")
        if name in ("o", "mem_o") and meta["op"] != "infini" and lse is not None:  # a gate adds to empty rows
            empty = got[name][rows & (lse == -torch.inf)[..., None]]
            worst = torch.inf if empty.count_nonzero() or empty.signbit().any() else worst
        yield name, worst, want.dtype == torch.float64


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("paths", nargs="+", type=pathlib.Path, metavar="FILE_OR_FOLDER")
    parser.add_argument("--strict", action="store_true", help="insist on F64 and on gradients")
    args = parser.parse_args()
    files = [file for path in args.paths
             for file in (sorted(path.rglob("*.safetensors")) if path.is_dir() else [path])]

    torch.set_num_threads(1)  # the tensors are small: more threads only wait for each other
    worst, count, differ, with_gradients = {}, collections.Counter(), 0, 0
    for i, file in enumerate(files, 1):
        if sys.stderr.isatty():
            print(f"{i} of {len(files)}", end="\r", file=sys.stderr)
        try:
            compared = list(compare(file))
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            print(f"{file}: {error}", file=sys.stderr)
            return 2
        has_gradients = any(name.startswith("d_") for name, *_ in compared)
        faults = [f"{name}: {worst:.3g} of the allowed error" for name, worst, _ in compared if worst > 1]
        if args.strict:
            faults += [f"expected_{name} is not in F64" for name, _, exact in compared if not exact]
            faults += [] if has_gradients else ["no gradients"]
        for fault in faults:
            print(f"{file}: {fault}")
        differ, with_gradients = differ + bool(faults), with_gradients + has_gradients
        for name, ratio, _ in compared:
            worst[name] = max(worst.get(name, 0.0), ratio)
            count[name] += 1

    if not count:
        print("no case file with expected tensors", file=sys.stderr)
        return 2
    print(f"{'tensor':28}compared  worst error, as a share of what is allowed")
    for name in sorted(worst):
        print(f"{name:28}{count[name]:8}  {worst[name]:.3g}")
    total = count.total()
    print(f"{len(files)} cases, {with_gradients} with gradients, {total} tensors; {differ} cases differ")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
