"""Attention with a memory in plain PyTorch, one file to copy: TransformerFAM (arXiv 2404.09173) and
Infini-attention (arXiv 2404.07143), differentiable throughout, on any device and in any float type.

    model = TransformerFAM(2, 64, heads=4, kv_heads=2, block_len=16, window_blocks=1, mem_len=8)
    y, state = model(torch.randn(3, 64, 64))           # a whole sequence; y.mean().backward() trains it
    y, state = model(torch.randn(3, 64, 64), state)    # the stream goes on, in constant memory

`attend`, `merge`, `infini_read`, `infini_write` and `infini` are the attention alone, for layers of your own.
They go block by block, so a call takes time and memory in proportion to its tokens.

Tensors are [batch, tokens, heads, head_dim], of memory rows [batch, blocks, rows, heads, head_dim]. Query
head h reads kv head h // (heads / kv_heads). 16-bit inputs are computed in float32, `o` is rounded back once.
"""
import torch
from torch import nn


def wide(*tensors):
    """At least float32: sums over many keys lose too much in 16 bits."""
    return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]


def weigh(logits):
    """Soft-max over the last axis, and ln Σ exp. A row of -inf only is empty: weights 0, -inf, gradient 0."""
    peak = logits.detach().amax(-1, keepdim=True)
    weights = (logits - peak.masked_fill(peak == -torch.inf, 0)).exp()
    total = weights.sum(-1, keepdim=True)
    total = total.masked_fill(total == 0, 1)
    return weights / total, (peak + total.log()).squeeze(-1)


def masked_attention(q, k, v, visible, scale=None, sink=None):
    """`o` and `lse` of rows q over those keys that `visible` [batch, rows, keys] shows them."""
    q, k, v = wide(q, k, v)
    q = q.unflatten(2, (k.shape[2], -1))  # [batch, rows, kv head, query head of its group, channel]
    logits = torch.einsum("nrgjd,nkgd->ngjrk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    logits = logits.masked_fill(~visible[:, None, None], -torch.inf)
    # A sink is one more key, whose value is 0; at -inf it weighs nothing, and yet no row is without a logit.
    sink = logits.new_full(q.shape[2:4], -torch.inf) if sink is None else sink.to(q.dtype)
    sink = sink.view(1, *q.shape[2:4], 1, 1).expand(*logits.shape[:-1], 1)
    weights, lse = weigh(torch.cat([logits, sink], -1))
    o = torch.einsum("ngjrk,nkgd->nrgjd", weights[..., :-1], v)
    return o.flatten(2, 3), lse.flatten(1, 2).transpose(1, 2)


class Span:
    """The tokens of a call: positions start .. start + length - 1 of each stream.

    Streams may start anywhere in a block. `align` moves their rows so that all cross block boundaries at the
    same rows, `block` says which rows those are, `restore` moves results back.
    """

    def __init__(self, q, start, lengths, block_len):
        (batch, self.tokens), self.block_len = q.shape[:2], block_len
        self.start, length = (torch.as_tensor(x, device=q.device).expand(batch)[:, None]
                              for x in (start, self.tokens if lengths is None else lengths))
        self.end, lag = self.start + length, self.start % block_len
        self.head = min(lag.flatten().tolist(), default=0)  # tokens of the first block that come before row 0
        self.shift = lag - self.head
        self.width = self.tokens + max(self.shift.flatten().tolist(), default=0)
        self.blocks = max(-(-(self.head + self.width) // block_len), 1)

    def position(self, past=0):
        """The position of every aligned row, `past` of them before row 0; and whether that token exists."""
        position = self.start - self.shift + torch.arange(-past, self.width, device=self.start.device)
        return position, (position >= self.start - past) & (position < self.end)

    def align(self, x):
        """Aligned rows, 0 where there is no token: not even a NaN there reaches a result or a gradient."""
        past, place = x.shape[1] - self.tokens, self.shift + torch.arange(x.shape[1], device=x.device)
        stream = torch.arange(x.shape[0], device=x.device)[:, None]
        rows = x.new_zeros(x.shape[0], past + self.width, *x.shape[2:]).index_put((stream, place), x)
        return torch.where(self.position(past)[1][:, :, None, None], rows, 0)

    def restore(self, rows):
        stream = torch.arange(rows.shape[0], device=rows.device)[:, None]
        return rows[stream, self.shift + torch.arange(self.tokens, device=rows.device)]

    def block(self, number, window=0, past=0):
        """The aligned rows of a block, counted from the first, and of the `window` blocks before it."""
        begin, end = (x * self.block_len - self.head + past for x in (number - window, number + 1))
        return slice(max(begin, 0), max(end, 0))

    def begin(self, number):
        """The position of a block's first token."""
        return (self.start // self.block_len + number) * self.block_len


def attend(q, k, v, mem_q=None, mem_k=None, mem_v=None, *, block_len, window_blocks=0, window_tokens=None,
           sink=None, scale=None, start=0, lengths=None):
    """One joint soft-max over the window, the memory and the current block. Returns o, lse, mem_o, mem_lse.

    rows | keys   past blocks            the block's memory   the block itself
    q             window_blocks of them  all                  up to the row
    mem_q         none                   all                  all

    k and v may begin before q, as a cache does; they end with it. The first row of q is at position `start`,
    and only `lengths` rows of a stream exist; both are one number, or one for each stream. Entry i of the
    memory belongs to block start // block_len + i; a batch or block axis of 1 is shared by all. Without mem_q
    the memory is frozen, without mem_k there is none. `window_tokens`, if given, counts the row itself.
    `sink` [heads]: a logit in every denominator, with value 0. A row that sees nothing: o = 0, lse = -inf.
    """
    dtype, batch, past = q.dtype, q.shape[0], k.shape[1] - q.shape[1]
    memory = [like.new_zeros(1, 1, 0, *like.shape[2:]) if x is None else x
              for x, like in ((mem_q, q), (mem_k, k), (mem_v, v))]
    window = window_blocks if window_tokens is None else (window_tokens + block_len - 2) // block_len
    span = Span(q, start, lengths, block_len)
    q, k, v = (span.align(x) for x in (q, k, v))
    (row_at, row_exists), (key_at, key_exists) = span.position(), span.position(past)

    results = []
    for block in range(max([span.blocks, *(x.shape[1] for x in memory)])):
        rows, keys, begin = span.block(block), span.block(block, window, past), span.begin(block)
        touched = (begin < span.end) & (span.start < span.end)
        entry = [x[:, min(block, x.shape[1] - 1)].expand(batch, -1, -1, -1) for x in memory]
        mem_q, mem_k, mem_v = (torch.where(touched[..., None, None], x, 0) for x in entry)
        row, key = row_at[:, rows, None], key_at[:, None, keys]
        tokens, n_keys = row.shape[1], key.shape[2]
        row_there = torch.cat([row_exists[:, rows], touched.expand(batch, mem_q.shape[1])], 1)
        key_there = torch.cat([key_exists[:, keys], touched.expand(batch, mem_k.shape[1])], 1)
        # The table above: `keys` are those of the past blocks and the block itself; all see the memory.
        visible = row_there[:, :, None] & key_there[:, None, :]
        visible[:, :tokens, :n_keys] &= key <= row
        if window_tokens is not None:
            visible[:, :tokens, :n_keys] &= key > row - window_tokens
        visible[:, tokens:, :n_keys] &= key >= begin[:, :, None]
        o, lse = masked_attention(torch.cat([q[:, rows], mem_q], 1), torch.cat([k[:, keys], mem_k], 1),
                                  torch.cat([v[:, keys], mem_v], 1), visible, scale, sink)
        results.append((o[:, :tokens], lse[:, :tokens], o[:, tokens:].to(dtype), lse[:, tokens:]))
    o, lse, mem_o, mem_lse = zip(*results)
    o, lse = (span.restore(torch.cat(x, 1)) for x in (o, lse))
    return o.to(dtype), lse, torch.stack(mem_o, 1), torch.stack(mem_lse, 1)


def merge(o_a, lse_a, o_b, lse_b):
    """Attention over two disjoint sets of keys from the attention over each; an empty part has lse -inf."""
    weights, lse = weigh(torch.stack([lse_a, lse_b], -1))
    o_a, o_b = (torch.where(x[..., None] > -torch.inf, o, 0) for o, x in ((o_a, lse_a), (o_b, lse_b)))
    return weights[..., :1] * o_a + weights[..., 1:] * o_b, lse


def sigma(x, shift=0):
    """ELU(x) + 1, its exponential branch divided by exp(shift). In float32 expm1(x) + 1 is 0 from -17 on."""
    return torch.where(x > 0, x + 1, (x.where(x <= 0, 0) - shift).exp())  # both branches stay finite


def infini_read(q, m, z):
    """σ(q) m / (σ(q)·z): what a state m [batch, kv_heads, dim, dim], z [batch, kv_heads, dim] holds for q.

    0 while nothing is stored. The ratio does not depend on the length of σ(q), so where no entry of q is
    positive σ(q) is divided by its largest entry: so the denominator can't underflow.
    """
    q, m, z = wide(q, m, z)
    q = q.unflatten(2, (m.shape[1], -1))
    s = sigma(q, q.detach().amax(-1, keepdim=True).clamp(max=0))
    nothing = (z == 0).all(-1)[:, None, :, None, None]
    total = torch.einsum("nrgjd,ngd->nrgj", s, z)[..., None].masked_fill(nothing, 1)
    return (torch.einsum("nrgjd,ngde->nrgje", s, m) / total).masked_fill(nothing, 0).flatten(2, 3)


def infini_write(k, v, m, z, rule="linear"):
    """The state after a segment. The delta rule stores only what the old state does not return for k yet."""
    k, v = wide(k, v)
    if rule == "delta":
        v = v - infini_read(k, m, z)
    s = sigma(k)
    return m + torch.einsum("nrgd,nrge->ngde", s, v), z + s.sum(1)


def infini(q, k, v, beta, m=None, z=None, *, infini_q=None, infini_k=None, rule="linear", block_len, start=0,
           lengths=None, **local):
    """Infini-attention over the segments (blocks) of a stream. Returns o, lse, mem_o, mem_lse, m, z.

    Local attention is `attend` with all its options. Every row reads the state of the segments before it; the
    gate sigmoid(beta) [heads] multiplies what it read. A segment is written if all of it is in the call.
    infini_q and infini_k are q and k without rotary positions.
    """
    dtype, tokens = q.dtype, dict(start=start, lengths=lengths, block_len=block_len)
    o, *rest = attend(*wide(q, k, v), **tokens, **local)
    span, (batch, _, kv_heads, dim) = Span(q, **tokens), k.shape
    m = o.new_zeros(batch, kv_heads, dim, dim) if m is None else m
    z = o.new_zeros(batch, kv_heads, dim) if z is None else z
    q, k = q if infini_q is None else infini_q, k if infini_k is None else infini_k
    q, k, v = (span.align(x) for x in wide(q, k, v))
    a = []
    for block in range(span.blocks):
        rows, begin = span.block(block), span.begin(block)
        a.append(infini_read(q[:, rows], m, z))
        m_next, z_next = infini_write(k[:, rows], v[:, rows], m, z, rule)
        whole = (span.start <= begin) & (begin + block_len <= span.end)
        m, z = torch.where(whole[..., None, None], m_next, m), torch.where(whole[..., None], z_next, z)
    exists = span.position()[1][:, :, None, None]
    a = span.restore(torch.where(exists, torch.cat(a, 1), 0))
    gate = beta.to(o.dtype).sigmoid()[:, None]
    return (gate * a + (1 - gate) * o).to(dtype), *rest, m, z


def rms_norm(x, gain, eps=1e-6):
    (y,) = wide(x)
    return (y * (y.square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype) * gain


def rotate(x, position, theta=10000.0):
    """Rotary positions: channel c turns with channel c + dim // 2; the last of an odd number stays."""
    (y,), half = wide(x), x.shape[-1] // 2
    speed = theta ** (-2 * torch.arange(half, dtype=y.dtype, device=x.device) / x.shape[-1])
    angle = position[:, None, None] * speed  # [rows, 1 for all heads, pairs]
    (a, b, rest), cos, sin = y.split([half, half, x.shape[-1] % 2], -1), angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], -1).to(x.dtype)


class FAMLayer(nn.Module):
    """Algorithm 2: tokens and memory rows go through the same norms, projections and feed-forward."""

    def __init__(self, width, *, heads, kv_heads=None, head_dim=None, ff_width=None, block_len,
                 window_blocks=0, scale=None, feedback_norm=False):
        super().__init__()
        kv_heads, head_dim, ff_width = kv_heads or heads, head_dim or width // heads, ff_width or 4 * width
        self.head_dim, self.scale = head_dim, scale
        self.block_len, self.window_blocks = block_len, window_blocks

        def matrix(rows, columns):  # for x @ w
            return nn.Parameter(torch.randn(rows, columns) * rows ** -0.5)

        self.attend_norm, self.ff_norm = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))
        self.w_q, self.w_o = matrix(width, heads * head_dim), matrix(heads * head_dim, width)
        self.w_k, self.w_v = matrix(width, kv_heads * head_dim), matrix(width, kv_heads * head_dim)
        self.w_gate, self.w_up = matrix(width, ff_width), matrix(width, ff_width)
        self.w_down = matrix(ff_width, width)
        self.feedback_norm = nn.Parameter(torch.ones(width)) if feedback_norm else None

    def forward(self, x, memory, past=None, start=0, offset=0):
        """One block: x [batch, tokens, width], memory [batch, rows, width], past: the window's keys, values.

        Returns the new rows of both, and the past of the next block. Memory rows have the last positions of
        the block before, -rows .. -1 at the first block; `offset` is added to all rotary positions.
        """
        tokens, rows = x.shape[1], torch.cat([x, memory], 1)
        position = torch.cat([torch.arange(tokens), torch.arange(-memory.shape[1], 0)]) + start + offset
        position = position.to(x.device)
        h = rms_norm(rows, self.attend_norm)
        q, k, v = ((h @ w).unflatten(-1, (-1, self.head_dim)) for w in (self.w_q, self.w_k, self.w_v))
        (q, mem_q), (k, mem_k), (v, mem_v) = (
            (y[:, :tokens], y[:, None, tokens:]) for y in (rotate(q, position), rotate(k, position), v))
        if past is not None:
            k, v = torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)
        o, _, mem_o, _ = attend(q, k, v, mem_q, mem_k, mem_v, block_len=self.block_len,
                                window_blocks=self.window_blocks, scale=self.scale, start=start)
        # The first update has no residual: the memory that goes in is a prompt, not something that was seen.
        residual = rows if start > 0 else torch.cat([x, torch.zeros_like(memory)], 1)
        rows = residual + torch.cat([o, mem_o[:, 0]], 1).flatten(2) @ self.w_o
        h = rms_norm(rows, self.ff_norm)
        rows = rows + (nn.functional.silu(h @ self.w_gate) * (h @ self.w_up)) @ self.w_down
        kept = slice(max(k.shape[1] - self.window_blocks * self.block_len, 0), None)
        return rows[:, :tokens], rows[:, tokens:], (k[:, kept], v[:, kept])

    def feed_back(self, memory):
        """The memory as this layer takes it at the next block. Without the norm it grows with every block."""
        return memory if self.feedback_norm is None else rms_norm(memory, self.feedback_norm)


class TransformerFAM(nn.Module):
    """Layers that feed their memory back to themselves, block after block; the first is a learned prompt.

    In the first block the prompt goes up: each layer takes the rows that the one below made of it. Those have
    seen the whole block, so above the lowest layer its tokens are not causal: leave them out of a loss.
    """

    def __init__(self, depth, width, *, mem_len, **layer):
        super().__init__()
        self.layers = nn.ModuleList(FAMLayer(width, **layer) for _ in range(depth))
        self.prompt = nn.Parameter(torch.randn(mem_len, width))

    def forward(self, x, state=None, offset=0):
        """x [batch, tokens, width] → y, and the state from which the stream goes on at a block's boundary.

        The state carries gradients; detach it to train on a long stream piece by piece.
        """
        block_len, depth = self.layers[0].block_len, len(self.layers)
        start, memory, past = state or (0, [None] * depth, [None] * depth)
        if start % block_len:
            raise ValueError(f"a stream goes on at a block's boundary (of {block_len}), not at token {start}")
        memory, past, y = list(memory), list(past), []
        for block in x.split(block_len, 1):
            up = self.prompt.expand(x.shape[0], -1, -1)
            for i, layer in enumerate(self.layers):
                block, up, past[i] = layer(block, up if start == 0 else memory[i], past[i], start, offset)
                memory[i] = layer.feed_back(up)
            y.append(block)
            start += block.shape[1]
        return torch.cat(y, 1), (start, memory, past)
