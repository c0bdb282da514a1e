"""What PyTorch offers for a problem: each peer a name and a function that makes (run, results)."""
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention


def peers(p):
    if p.rule:
        return {"torch infini": lambda: infini(p, lambda f: f), "torch infini, compiled": lambda: infini(p, torch.compile)}
    found = {}
    if p.is_causal:
        found["torch SDPA is_causal"] = lambda: attention(p, sdpa(p, None, is_causal=True))
    else:
        found["torch SDPA"] = lambda: attention(p, sdpa(p, p.bias(p.visible), enable_gqa=p.group > 1))
    fold, visible = p.folded()
    if p.group > 1:
        found["torch SDPA, groups folded"] = lambda: attention(p, sdpa(p, p.bias(visible)), fold)
    found["torch naive"] = lambda: attention(p, naive(p, p.bias(visible)), fold)
    found["torch naive, compiled"] = lambda: attention(p, torch.compile(naive(p, p.bias(visible), is_compiled=True)), fold)
    if not p.backward:  # On a CPU it has none.
        found["torch flex, compiled"] = lambda: attention(p, flex(p))
    return found


def attention(p, attend, fold=lambda x: x):
    """One sample: the calls forward, or the backward pass of one call whose forward pass is done."""
    q = fold(p.q)
    if p.backward:
        leaves = [x.clone().requires_grad_() for x in (q, p.k, p.v)]
        o, d_o = attend(*leaves), fold(p.d_o)
        run = lambda: torch.autograd.grad(o, leaves, d_o, retain_graph=True)
        return run, lambda: run()
    turn = 0

    @torch.inference_mode()
    def run():
        nonlocal turn
        turn += 1
        for _ in range(p.calls):
            o = attend(q, *p.copies[turn % len(p.copies)])
        return o

    return run, lambda: [run()]


def sdpa(p, bias, **options):
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=p.scale, **options)


def naive(p, bias, is_compiled=False):
    def attend(q, k, v):
        logits = (q * p.scale) @ k.mT
        if bias is not None:
            logits = logits + bias if is_compiled or p.backward else logits.add_(bias)
        return logits.softmax(-1) @ v

    return attend


def flex(p):
    visible, (rows, keys) = p.visible, p.visible.shape
    mask = None
    if not visible.all():
        mask = create_block_mask(lambda b, h, i, j: visible[i, j], None, None, rows, keys, device="cpu")
    compiled = torch.compile(flex_attention)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, scale=p.scale, enable_gqa=p.group > 1)


def infini(p, compiled):
    """Infini-attention's segment: local attention, read and gate, write. The memory's part is in float32, as the state is."""
    m, z, gate = p.tensors["m"], p.tensors["z"][:, None], torch.sigmoid(p.tensors["beta"])[:, None, None]
    is_delta = p.rule == "delta"

    def segment(q, k, v, m, z):
        local = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=p.scale)
        of_q, of_k, v = F.elu(q.float()) + 1, F.elu(k.float()) + 1, v.float()
        o = gate * (of_q @ m) / (of_q * z).sum(-1, keepdim=True) + (1 - gate) * local
        if is_delta:
            v = v - (of_k @ m) / (of_k * z).sum(-1, keepdim=True)
        return o.to(q.dtype), m + of_k.mT @ v, z + of_k.sum(-2, keepdim=True)

    call = compiled(segment)

    @torch.inference_mode()
    def run():
        return call(p.q, p.k, p.v, m, z)

    return run, run
