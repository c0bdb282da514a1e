"""A case of `fam perf --serve` as one dense attention: what the peers are given."""
import math

import torch
from safetensors.torch import load_file

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# Of the largest expected value. 16-bit peers round logits and weights: some ulps of each.
TOLERANCE = {"f32": 2e-5, "f16": 8e-3, "bf16": 6e-2}
# Decode goes round copies of keys and values that together take at least so many bytes, as fam's does.
ROTATED_BYTES = 256 << 20


def heads_first(x):
    """[N, rows, heads, D] as [N, heads, rows, D]."""
    return x.transpose(1, 2).contiguous()


class Problem:
    """Rows: those of the block, then those of the memory. Keys: the memory's, then the tokens'. All lie ready, packed as peers like them
    and concatenated: appending, which is inside fam's time, they are spared."""

    def __init__(self, prepared):
        self.__dict__.update(prepared)
        file = load_file(prepared["path"])
        self.tensors, self.torch_dtype = file, DTYPES[self.dtype]
        self.group, self.scale = self.heads // self.kv_heads, 1 / math.sqrt(self.head_dim)
        self.has_memory_rows = self.mem_len > 0 and self.rows == self.block_len

        def join(*names):
            present = [file[name] for name in names if file[name].shape[1]]
            return heads_first(torch.cat(present, 1))

        visible = self.mask()
        seen = visible.any(0)  # With no window, the tokens before the block are not.
        self.visible = visible[:, seen]
        rows, keys = self.visible.shape
        of_rows = lambda name, of_memory: join(name, of_memory) if self.has_memory_rows else join(name)
        of_keys = lambda of_memory, name: join(of_memory, name)[:, :, seen]
        cast = lambda x: x.to(self.torch_dtype).contiguous()
        self.q, self.k, self.v = cast(of_rows("q", "mem_q")), cast(of_keys("mem_k", "k")), cast(of_keys("mem_v", "v"))
        if self.backward:
            self.d_o = cast(of_rows("d_o", "d_mem_o"))
            self.expected = [of_rows("d_q", "d_mem_q"), of_keys("d_mem_k", "d_k"), of_keys("d_mem_v", "d_v")]
        else:
            self.expected = [of_rows("o", "mem_o")]
        if self.rule:
            self.expected += [file["new_m"], file["new_z"]]
        self.is_causal = rows == keys and bool((self.visible == torch.ones(rows, keys).tril().bool()).all())

        bytes_of_keys = 2 * self.k.numel() * self.k.element_size()
        copies = math.ceil(ROTATED_BYTES / bytes_of_keys) if self.bound == "memory" else 1
        self.copies = [(self.k, self.v)] + [(self.k.clone(), self.v.clone()) for _ in range(copies - 1)]

    def mask(self):
        """Which keys each row sees, [rows, keys]."""
        token = torch.arange(self.history + self.rows)
        row = token[self.history:, None]
        of_block = (token <= row) & (token // self.block_len >= row // self.block_len - self.window_blocks)
        of_memory = (token >= self.history).expand(self.mem_len, -1)
        rows = torch.cat([of_block, of_memory]) if self.has_memory_rows else of_block
        return torch.cat([torch.ones(rows.shape[0], self.mem_len, dtype=torch.bool), rows], 1)

    def bias(self, visible):
        """The mask as a term of the logits; none where all is visible."""
        if visible.all():
            return None
        return torch.zeros(visible.shape, dtype=self.torch_dtype).masked_fill(~visible, -torch.inf)

    def folded(self):
        """Query heads of a group as further rows of their kv head, and the mask of those rows: keys are read once for all of them."""
        n, _, rows, d = self.q.shape
        return (lambda x: x.reshape(n, self.kv_heads, self.group * rows, d)), self.visible.repeat(self.group, 1)

    def fault(self, results):
        """Why results are wrong, or None."""
        for got, expected in zip(results, self.expected, strict=True):
            got, allowed = got.float().reshape(expected.shape), TOLERANCE[self.dtype] * expected.abs().max()
            off = (got - expected).abs().max()
            if not off <= allowed:  # NaN too
                return f"off by {off:.2g}, allowed {allowed:.2g}"
        return None
