"""Writes the case files beside it: what fam computes as expected_*, and as x_theirs_* what another reading of the papers gives.

    scripts/python --torch testdata/differences/make.py          # writes them
    scripts/python --torch testdata/differences/make.py fam      # reads them: the program fam must find ours right and theirs wrong

`Infini` and `Attend` are what fam computes, written the long way; each class below is that but for one method, and says whose
reading it is (repository, commit, file:line). docs/papers.md tells the reasons.
"""
import json
import pathlib
import re
import subprocess
import sys
import tempfile

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

FOLDER = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1] / "examples" / "python"))
import fam_torch  # noqa: E402


class Infini:
    """Infini-attention over [batch, heads, tokens, dim], one segment after the other."""
    rule, tokens, block_len, heads, kv_heads, dim, start = "linear", 12, 4, 2, 2, 4, 0
    sizes = ("rule", "tokens", "block_len", "heads", "kv_heads", "start")

    def __init__(self):
        self.random = torch.Generator().manual_seed(0)
        q, k, v = (self.draw(self.tokens, h, self.dim) for h in (self.heads, self.kv_heads, self.kv_heads))
        self.inputs = {"q": q, "k": k, "v": v, "beta": torch.tensor([0.5, -1.0, 2.0, 0.0][:self.heads])}
        self.change(self.inputs)

    def draw(self, *shape):
        return torch.randn(1, *shape, generator=self.random)

    def change(self, inputs):
        """The problem, where it needs other tensors."""

    def ours(self, t):
        t = {"m": t.get("m0"), "z": t.get("z0"), **{x: y for x, y in t.items() if x not in ("m0", "z0")}}
        return dict(zip(("o", "lse", "mem_o", "mem_lse", "m", "z"), fam_torch.infini(**t, **self.options())))

    def options(self):
        return {"block_len": self.block_len, "rule": self.rule}

    def split(self, x):
        return x.transpose(1, 2)

    def join(self, x):
        return x.transpose(1, 2)

    def sigma(self, x):
        return torch.where(x > 0, x + 1, x.exp())

    def share(self, x):
        """Each kv head for the query heads that read it."""
        return x.repeat_interleave(self.heads // self.kv_heads, 1)

    def share_state(self, x):
        return self.share(x)

    def local(self, q, k, v):
        logits = q @ k.mT * self.dim**-0.5
        return logits.masked_fill(torch.ones_like(logits).triu(1) > 0, -torch.inf).softmax(-1) @ v

    def state(self, t):
        none = torch.zeros(1, self.kv_heads, self.dim, self.dim, dtype=torch.float64)
        return t.get("m0", none), t.get("z0", none[..., 0])

    def ratio(self, s, m, z):
        total = s @ z[..., None]
        return (s @ m / total).where(total != 0, 0)

    def gate(self, a, o, beta, is_first):
        g = beta.sigmoid()[:, None, None]
        return g * a + (1 - g) * o

    def write(self, q, k, v, m, z):
        s = self.sigma(k)
        if self.rule == "delta":
            v = v - self.ratio(s, m, z)
        return m + s.mT @ v, z + s.sum(2)

    def is_written(self, tokens):
        return tokens == self.block_len

    def run(self, t):
        q, k, v, memory_q, memory_k = (
            self.split(t[x]) for x in ("q", "k", "v", *(x if x in t else x[-1] for x in ("infini_q", "infini_k"))))
        (m, z), o, first = self.state(t), [], 0
        while first < self.tokens:
            end = min((self.start + first) // self.block_len * self.block_len + self.block_len - self.start, self.tokens)
            s = slice(first, end)
            a = self.ratio(self.sigma(memory_q[:, :, s]), self.share_state(m), self.share_state(z))
            local = self.local(q[:, :, s], self.share(k[:, :, s]), self.share(v[:, :, s]))
            o.append(self.join(self.gate(a, local, t["beta"], first == 0)))
            if self.is_written(end - first):
                m, z = self.write(memory_q[:, :, s], memory_k[:, :, s], v[:, :, s], m, z)
            first = end
        return {"o": torch.cat(o, 1), "m": m, "z": z}


class FirstSegmentNotGated(Infini):
    """lucidrains/infini-transformer-pytorch@5774bb3, infini_transformer.py:134: before anything is stored the local attention is the output."""

    def gate(self, a, o, beta, is_first):
        return o if is_first else super().gate(a, o, beta, is_first)


class GateOnTheLocalBranch(Infini):
    """lucidrains/infini-transformer-pytorch@5774bb3, infini_transformer.py:153: the sigmoid multiplies the local attention."""

    def gate(self, a, o, beta, is_first):
        return super().gate(a, o, -beta, is_first)


class HeadsWithoutTranspose(Infini):
    """dingo-actual/infini-transformer@08d0a12, compressive_memory.py:103: [tokens, heads, dim] viewed as [heads, tokens, dim]."""

    def split(self, x):
        return x.reshape(1, self.heads, self.tokens, self.dim)

    def join(self, x):
        return x.reshape(1, self.block_len, self.heads, self.dim)


class NormaliserStartsAboveZero(Infini):
    """dingo-actual/infini-transformer@08d0a12, compressive_memory.py:100: z starts at 1 / dim."""

    def state(self, t):
        m, z = super().state(t)
        return m, z + 1 / self.dim


class NormaliserBroadcast(Infini):
    """vmarinowski/infini-attention@a47242b, infini_attention.py:95: [dim, 1] + [1, dim] makes z a matrix, and every channel its own denominator."""

    def state(self, t):
        m, z = super().state(t)
        return m, z[..., None]

    def ratio(self, s, m, z):
        return s @ m / (s @ z + 1e-6)

    def write(self, q, k, v, m, z):
        s = self.sigma(k)
        return m + s.mT @ v, z + s.sum(2, keepdim=True)


class KvHeadModulo(Infini):
    """Beomi/InfiniTransformer@045f4eb, modeling_infini_llama.py:1113: query head h reads the memory of kv head h mod Hkv."""
    heads = 4

    def share_state(self, x):
        return x.repeat(1, self.heads // self.kv_heads, *[1] * (x.dim() - 2))


class RotaryInMemory(Infini):
    """jlamprou/Infini-Attention@3a86dd5, infiniAttention.py:82: the memory is read and written with rotary positions."""

    def change(self, inputs):
        inputs["infini_q"], inputs["infini_k"] = inputs["q"], inputs["k"]
        for x in "qk":
            inputs[x] = fam_torch.rotate(inputs[x][0], torch.arange(self.tokens))[None]

    def run(self, t):
        return super().run({x: t[x] for x in ("q", "k", "v", "beta")})


class KeysAndValuesSwapped(Infini):
    """alexzhang13/InfiniAttention@783c0b5, infini_attn.py:211: the update is called with (q, v, k)."""
    rule = "delta"

    def write(self, q, k, v, m, z):
        return super().write(q, v, k, m, z)


class SoftmaxOverQueries(Infini):
    """alexzhang13/InfiniAttention@783c0b5, infini_attn.py:202: the soft-max runs over queries."""

    def local(self, q, k, v):
        logits = q @ k.mT * self.dim**-0.5
        return logits.masked_fill(torch.ones_like(logits).triu(1) > 0, -torch.inf).softmax(-2) @ v


class DeltaReadsWithQueries(Infini):
    """claCase/Infini-Attention@221f988, layers.py:87: delta subtracts what the queries read."""
    rule = "delta"

    def write(self, q, k, v, m, z):
        s = self.sigma(k)
        return m + s.mT @ (v - self.ratio(self.sigma(q), m, z)), z + s.sum(2)


class DeltaTokenByToken(Infini):
    """No public implementation of Infini-attention: delta as in fast weights, every key after the one before."""
    rule = "delta"

    def write(self, q, k, v, m, z):
        for t in range(k.shape[2]):
            m, z = super().write(q, k[:, :, t:t + 1], v[:, :, t:t + 1], m, z)
        return m, z


class EluWithoutOne(Infini):
    """muradhub/infini_attention@4af15d2, infini_attention.py:6: sigma is ELU, which is negative for negative keys."""

    def sigma(self, x):
        return F.elu(x)


class EluThenPlusOne(Infini):
    """lucidrains/infini-transformer-pytorch@5774bb3, infini_transformer.py:141, and most others: F.elu(x) + 1, in float32 0 from -17.33 on: 0 / 0."""

    def change(self, inputs):
        inputs["q"][0, 8, :] -= 22.0

    def sigma(self, x):
        return (F.elu(x.float()) + 1).double()

    def ratio(self, s, m, z):
        return super().ratio(s, m, z) if not z.any() else s @ m / (s @ z[..., None])


class EpsilonInTheDenominator(Infini):
    """vmarinowski/infini-attention@a47242b, infini_attention.py:76: 1e-6 is added to the denominator (elsewhere 1e-10 to 1e-8)."""

    def change(self, inputs):
        inputs["q"][0, 8, :] -= 22.0

    def ratio(self, s, m, z):
        return s @ m / (s @ z[..., None] + 1e-6)


class ScaleByModelWidth(Infini):
    """claCase/Infini-Attention@221f988, layers.py:96, and Eq. 6 as printed: logits over the root of d_model, here heads x dim."""

    def local(self, q, k, v):
        return super().local(q * self.heads**-0.5, k, v)


class MaskTooSmall(Infini):
    """muradhub/infini_attention@4af15d2, infini_attention.py:41: the causal mask is +1e-9: every row sees its whole segment."""

    def local(self, q, k, v):
        logits = q @ k.mT * self.dim**-0.5
        return (logits + 1e-9 * torch.ones_like(logits).triu(1)).softmax(-1) @ v


class PartialSegmentWritten(Infini):
    """huggingface/nanotron@0d99cfb, llama.py:601: the last, shorter segment is written too."""
    tokens = 10

    def is_written(self, tokens):
        return True


class SegmentFromBeforeTheCall(Infini):
    """No public implementation: with m0, z0 and a start inside a block, the rest of that block is written."""
    start, tokens = 3, 9

    def change(self, inputs):
        inputs["start"] = torch.tensor([self.start])
        inputs["m0"], inputs["z0"] = self.draw(self.kv_heads, self.dim, self.dim), self.draw(self.kv_heads, self.dim).exp()

    def is_written(self, tokens):
        return True


class StateInFloat16(Infini):
    """Beomi/InfiniTransformer@045f4eb, modeling_infini_llama.py:1140, and its issue 21: the state has the model's type, here float16."""
    dtype, z0, tokens, block_len = torch.float16, 65_504.0, 16, 16

    def change(self, inputs):
        inputs["k"] = inputs["k"].abs() + 3
        inputs["m0"] = torch.zeros(1, self.kv_heads, self.dim, self.dim)
        inputs["z0"] = torch.full((1, self.kv_heads, self.dim), self.z0)

    def write(self, q, k, v, m, z):
        return [x.to(self.dtype).double() for x in super().write(q, k, v, m, z)]


class StateInBfloat16(StateInFloat16):
    """Beomi/InfiniTransformer@045f4eb, modeling_infini_llama.py:1140: the state has the model's type, here bfloat16: z no longer counts."""
    dtype, z0 = torch.bfloat16, 65_536.0


class Attend:
    """TransformerFAM's attention: rows of blocks of 4 tokens over a window of one block, two memory rows, and the block itself."""
    tokens, block_len, window, rows, heads, dim, start = 14, 4, 1, 2, 2, 4, 0
    sizes = ("tokens", "start")

    def __init__(self):
        random = torch.Generator().manual_seed(0)
        blocks = -(-(self.start % self.block_len + self.tokens) // self.block_len)
        tokens = {x: torch.randn(1, self.tokens, self.heads, self.dim, generator=random) for x in "qkv"}
        memory = {f"mem_{x}": torch.randn(1, blocks, self.rows, self.heads, self.dim, generator=random) for x in "qkv"}
        self.inputs = {**tokens, **memory, "start": torch.tensor([self.start])}

    def options(self):
        return {"block_len": self.block_len, "window_blocks": self.window}

    def ours(self, t):
        return dict(zip(("o", "lse", "mem_o", "mem_lse"), fam_torch.attend(**t, **self.options())))

    def position(self):
        """Of every row, and of every key."""
        rows = torch.arange(self.start, self.start + self.tokens)
        return rows, rows

    def keys(self, t):
        return t["k"], t["v"]

    def sees(self, i, j):
        """Which keys of tokens the rows of tokens see."""
        return (j <= i) & (j // self.block_len >= i // self.block_len - self.window)

    def memory_sees(self, block, j):
        return j // self.block_len == block

    def run(self, t):
        (row_at, key_at), (k, v) = self.position(), self.keys(t)
        outputs = {x: [] for x in ("o", "lse", "mem_o", "mem_lse")}
        for entry, block in enumerate(row_at.div(self.block_len, rounding_mode="floor").unique()):
            rows = row_at // self.block_len == block
            keys, values = (torch.cat([x, t[y][:, entry]], 1) for x, y in ((k, "mem_k"), (v, "mem_v")))
            memory = torch.ones(1, self.rows, dtype=torch.bool)
            visible = torch.cat([self.sees(row_at[rows, None], key_at), memory.expand(int(rows.sum()), -1)], 1)
            mem_visible = torch.cat([self.memory_sees(block, key_at)[None], memory], 1).expand(self.rows, -1)
            for prefix, q, seen in (("", t["q"][:, rows], visible), ("mem_", t["mem_q"][:, entry], mem_visible)):
                o, lse = fam_torch.masked_attention(q, keys, values, seen[None])
                outputs[prefix + "o"].append(o)
                outputs[prefix + "lse"].append(lse)
        return {x: torch.stack(y, 1) if x.startswith("mem_") else torch.cat(y, 1) for x, y in outputs.items()}


class WindowSlidesByTokens(Attend):
    """Transformer-XL's mask (TransformerFAM, Table 8): a row sees the 4 tokens before it, not the whole block before."""

    def sees(self, i, j):
        return (j <= i) & (j >= i - self.window * self.block_len)


class MemoryRowsSeeTheWindow(Attend):
    """Another reading of Algorithm 2: memory rows see the past blocks too."""

    def memory_sees(self, block, j):
        return (j // self.block_len <= block) & (j // self.block_len >= block - self.window)


class ZeroKeysBeforeTheStream(Attend):
    """Another reading of Algorithm 1: a window that is not full yet holds keys of zero, which take weight."""

    def position(self):
        rows, _ = super().position()
        return rows, torch.cat([torch.arange(-self.window * self.block_len, 0), rows])

    def keys(self, t):
        return (F.pad(x, (0, 0, 0, 0, self.window * self.block_len, 0)) for x in super().keys(t))


class BlocksFromTheCallsStart(Attend):
    """Another reading of a case file: blocks begin at the call's first token, not at multiples of 4; two entries of memory, not three."""
    start, tokens = 3, 6

    def position(self):
        rows = torch.arange(self.tokens)
        return rows, rows


def readings():
    """All classes that are another reading, with their files."""
    queue = [*Infini.__subclasses__(), *Attend.__subclasses__()]
    while queue:
        reading = queue.pop(0)
        queue += reading.__subclasses__()
        yield reading, FOLDER / (re.sub(r"(?<!^)(?=[A-Z])", "_", reading.__name__).lower() + ".safetensors")


def differs(a, b):
    return not torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-6)


def write(reading, path):
    base = Infini if issubclass(reading, Infini) else Attend
    problem, plain = reading(), base()
    vars(plain).update({x: getattr(reading, x) for x in base.sizes})
    inputs = {x: y.double() if y.is_floating_point() else y for x, y in problem.inputs.items()}
    ours, again, theirs = problem.ours(inputs), plain.run(inputs), problem.run(inputs)
    assert not any(differs(again[x], ours[x]) for x in again), f"{path.stem}: the long way is not fam_torch's"
    wrong = {x: y for x, y in theirs.items() if y.shape == ours[x].shape and differs(y, ours[x])}
    assert wrong, f"{path.stem}: theirs is ours"
    tensors = {**problem.inputs, **{f"expected_{x}": y.float() for x, y in ours.items() if y.numel()},
               **{f"x_theirs_{x}": y.float() for x, y in wrong.items()}}
    metadata = {"op": base.__name__.lower(), "window_blocks": 0, **problem.options(), "format": 1, "source": reading.__doc__}
    save_file({x: y.contiguous() for x, y in tensors.items()}, path, {x: str(y) for x, y in metadata.items()})
    sort_metadata(path)
    return wrong


def sort_metadata(path):
    """So that a file's bytes are the same whenever it is written: the library gives metadata in any order."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    path.write_bytes(data[:8] + text.ljust(length) + data[8 + length:])
    path.chmod(0o644)


def judge(fam, path):
    """fam's verdicts: right on its own results, wrong on theirs."""
    subprocess.run([fam, "run", path], check=True, stdout=subprocess.DEVNULL)
    theirs = {x.removeprefix("x_theirs_"): y for x, y in load_file(path).items() if x.startswith("x_theirs_")}
    with tempfile.TemporaryDirectory() as folder:
        for name, tensor in theirs.items():
            save_file({name: tensor}, f"{folder}/output")
            verdict = subprocess.run([fam, "check", path, f"{folder}/output"], capture_output=True, text=True)
            assert re.search("^wrong: ", verdict.stdout, re.M), f"{path.stem}: {name}: {verdict.stdout}{verdict.stderr}"
    return set(theirs)


def main():
    for reading, path in readings():
        wrong = judge(sys.argv[1], path) if len(sys.argv) > 1 else write(reading, path)
        print(f"{path.stem:32}{', '.join(sorted(wrong)):20}{safe_open(path, 'pt').metadata()['source']}")


if __name__ == "__main__":
    main()
