"""Properties of fam_torch that need no case files: python examples/python/test_fam_torch.py"""
import itertools
import unittest

import torch
from torch.autograd import gradcheck

import fam_torch
from fam_torch import attend, infini, infini_read, infini_write, merge

INF = torch.inf


def random(*shape, seed=0, grad=False):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(grad)


def qkv(*shape, heads=4, kv_heads=2, dim=3, seed=0, grad=False):
    return [random(*shape, h, dim, seed=seed + i, grad=grad)
            for i, h in enumerate((heads, kv_heads, kv_heads))]


def dense(q, k, v, visible, scale, sink=None):
    """Soft-max attention by its definition, a row and a head at a time."""
    o, lse = torch.zeros_like(q), q.new_full(q.shape[:-1], -INF)
    for n, i, h in itertools.product(*map(range, q.shape[:3])):
        seen, kv = visible[n, i], h // (q.shape[2] // k.shape[2])
        weights = (scale * k[n, seen, kv] @ q[n, i, h]).exp()
        total = weights.sum() + (0 if sink is None else sink[h].exp())
        if total > 0:
            o[n, i, h], lse[n, i, h] = weights @ v[n, seen, kv] / total, total.log()
    return o, lse


class Attend(unittest.TestCase):
    def close(self, a, b, tolerance=1e-13):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)

    def test_equals_the_dense_mask_over_the_whole_sequence(self):
        for length, block_len, window, rows, sink, start in itertools.product(
                (1, 5, 11), (1, 4), (0, 1, 3), (0, 1, 3), (None, random(6)), (0, 3)):
            with self.subTest(length=length, block_len=block_len, window=window, rows=rows, start=start):
                block = (start + torch.arange(length)) // block_len
                first, blocks = int(block[0]), int(block[-1] - block[0]) + 1
                q, k, v = qkv(2, length, heads=6, kv_heads=3)
                mem_q, mem_k, mem_v = qkv(2, blocks, rows, heads=6, kv_heads=3, seed=3)
                got = attend(q, k, v, mem_q, mem_k, mem_v, block_len=block_len, window_blocks=window,
                             sink=sink, scale=0.7, start=start)
                entry = torch.arange(first, first + blocks).repeat_interleave(rows)
                i, j = torch.arange(length)[:, None], torch.arange(length)[None]
                tokens = (j <= i) & (block[None] >= block[:, None] - window)
                visible = torch.cat([tokens, block[:, None] == entry[None]], 1).expand(2, -1, -1)
                mem_visible = torch.cat([entry[:, None] == block[None], entry[:, None] == entry[None]], 1)
                keys, values = torch.cat([k, mem_k.flatten(1, 2)], 1), torch.cat([v, mem_v.flatten(1, 2)], 1)
                for have, want in zip(got[:2], dense(q, keys, values, visible, 0.7, sink)):
                    self.close(have, want)
                want = dense(mem_q.flatten(1, 2), keys, values, mem_visible.expand(2, -1, -1), 0.7, sink)
                for have, want in zip(got[2:], want):
                    self.close(have.flatten(1, 2), want)

    def test_steps_and_single_tokens_with_a_cache_equal_one_call(self):
        block_len, window, length = 4, 2, 19
        (q, k, v), memory = qkv(2, length), qkv(2, 5, 2, seed=3)
        options = dict(block_len=block_len, window_blocks=window)
        whole = attend(q, k, v, *memory, **options)
        for size in (block_len, 1):
            parts = []
            for at in range(0, length, size):
                end, block = min(at + size, length), at // block_len
                cached, entry = slice(max(block - window, 0) * block_len, end), slice(block, block + 1)
                parts.append(attend(q[:, at:end], k[:, cached], v[:, cached], *(x[:, entry] for x in memory),
                                    start=at, **options))
            self.close(torch.cat([part[0] for part in parts], 1), whole[0])
            self.close(torch.cat([part[1] for part in parts], 1), whole[1])
            ends = [part for at, part in zip(range(0, length, size), parts)
                    if (at + size) % block_len == 0 or at + size >= length]  # where a block is complete
            self.close(torch.cat([part[2] for part in ends], 1), whole[2])
            self.close(torch.cat([part[3] for part in ends], 1), whole[3])

    def test_ragged_streams_equal_each_alone_and_unread_bytes_have_no_effect(self):
        start, lengths, block_len = torch.tensor([0, 6, 3, 9]), torch.tensor([7, 3, 0, 1]), 4
        touched = [2, 2, 0, 1]  # blocks
        tokens, memory = qkv(4, 7), qkv(4, 2, 2, seed=3)
        spoiled = [x.clone() for x in (*tokens, *memory)]
        for n in range(4):
            for x in spoiled[:3]:
                x[n, lengths[n]:] = torch.nan
            for x in spoiled[3:]:
                x[n, touched[n]:] = torch.nan
        spoiled = [x.requires_grad_() for x in spoiled]
        got = attend(*spoiled, block_len=block_len, window_blocks=1, start=start, lengths=lengths)
        for n in range(4):
            alone = attend(*(x[n:n + 1, :lengths[n]] for x in tokens), *(x[n:n + 1] for x in memory),
                           block_len=block_len, window_blocks=1, start=start[n])
            for have, want, rows in zip(got, alone, (lengths[n], lengths[n], touched[n], touched[n])):
                self.close(have[n:n + 1, :rows], want[:, :rows])
        gradients = torch.autograd.grad(got, spoiled, [torch.ones_like(x) for x in got])
        self.assertTrue(all(x.isfinite().all() for x in gradients))

    def test_window_of_tokens(self):
        q, k, v = qkv(1, 13)
        i, j = torch.arange(13)[:, None], torch.arange(13)[None]
        for tokens, block_len in itertools.product((1, 2, 4, 5, 20), (1, 4, 13)):
            got = attend(q, k, v, block_len=block_len, window_tokens=tokens, scale=1.0)[:2]
            for have, want in zip(got, dense(q, k, v, ((j <= i) & (j > i - tokens))[None], 1.0)):
                self.close(have, want)

    def test_empty_rows(self):
        q, k, v = random(1, 1, 2, 3, grad=True), random(1, 0, 1, 3), random(1, 0, 1, 3)
        nothing = torch.zeros(1, 1, 0, dtype=torch.bool)
        for sink in (None, torch.tensor([-INF, -INF]), torch.tensor([0.5, -2.0])):
            o, lse = fam_torch.masked_attention(q, k, v, nothing, 1.0, sink)
            self.assertEqual(o.count_nonzero() + o.signbit().sum(), 0)
            want = torch.full((2,), -INF, dtype=lse.dtype) if sink is None else sink.to(lse.dtype)
            self.assertTrue(torch.equal(lse[0, 0], want))
            (gradient,) = torch.autograd.grad((o, lse), q, (torch.ones_like(o), torch.ones_like(lse)))
            self.assertEqual(gradient.count_nonzero(), 0)

    def test_one_visible_key_gives_its_value_exactly(self):
        q, k, v = (x.float() for x in qkv(1, 4))
        o = attend(q, k, v, block_len=1)[0]
        self.assertTrue(torch.equal(o, v.repeat_interleave(2, 2)))

    def test_a_sink_scales_by_the_sigmoid_of_what_it_lacks(self):
        (q, k, v), sink = qkv(2, 6), random(4)
        o, lse, _, _ = attend(q, k, v, block_len=4)
        with_sink = attend(q, k, v, block_len=4, sink=sink)
        self.close(with_sink[0], o * (lse - sink).sigmoid()[..., None])
        self.close(with_sink[1], torch.logaddexp(lse, sink.expand_as(lse)))

    def test_sixteen_bits_round_the_result_only(self):
        for dtype in (torch.float16, torch.bfloat16):
            q, k, v = (x.to(dtype) for x in qkv(1, 9))
            o, lse, _, _ = attend(q, k, v, block_len=4)
            want = attend(q.float(), k.float(), v.float(), block_len=4)
            self.assertEqual((o.dtype, lse.dtype), (dtype, torch.float32))
            self.assertTrue(torch.equal(o, want[0].to(dtype)))

    def test_gradients(self):
        (_, k, v), memory = qkv(2, 7, grad=True), qkv(2, 2, 2, seed=3, grad=True)  # two keys are older than q
        inputs = [random(2, 5, 4, 3, grad=True), k, v, *memory, random(4, grad=True)]
        options = dict(block_len=4, window_blocks=1, start=torch.tensor([2, 5]), lengths=torch.tensor([5, 2]))

        def outputs(*inputs):
            return [x.masked_fill(x == -INF, 0) for x in attend(*inputs[:6], sink=inputs[6], **options)]

        self.assertTrue(gradcheck(outputs, inputs))
        self.assertTrue(gradcheck(lambda *x: attend(*x, block_len=2)[:2], qkv(1, 5, grad=True)))


class Merge(unittest.TestCase):
    def test_any_split_of_the_keys(self):
        q, (_, k, v) = random(2, 3, 4, 3), qkv(2, 8)

        def part(begin, end):
            visible = torch.ones(2, 3, end - begin, dtype=torch.bool)
            return fam_torch.masked_attention(q, k[:, begin:end], v[:, begin:end], visible)

        for at in range(9):
            for have, want in zip(merge(*part(0, at), *part(at, 8)), part(0, 8)):
                torch.testing.assert_close(have, want, rtol=1e-13, atol=1e-13)

    def test_gradients_and_empty_parts(self):
        o_a, o_b, lse_a, lse_b = random(3, 2, 4), random(3, 2, 4, seed=1), random(3, 2), random(3, 2, seed=1)
        inputs = [x.requires_grad_() for x in (o_a, lse_a, o_b, lse_b)]
        self.assertTrue(gradcheck(merge, inputs))
        for a, b in ((0.5, -INF), (-INF, 0.5), (-INF, -INF)):
            o = [torch.full((1, 2), x, dtype=torch.float64).requires_grad_() for x in (3.0, 5.0)]
            lse = [torch.full((1,), x, dtype=torch.float64).requires_grad_() for x in (a, b)]
            o[0].data *= a > -INF
            o[1].data *= b > -INF
            merged, total = merge(o[0], lse[0], o[1], lse[1])
            self.assertTrue(torch.equal(merged, o[0] + o[1]))
            self.assertEqual(total.item(), max(a, b))
            gradients = torch.autograd.grad((merged, total), (*o, *lse), (torch.ones(1, 2), torch.ones(1)))
            self.assertTrue(all(x.isfinite().all() for x in gradients))


class Infini(unittest.TestCase):
    def state(self, grad=False):
        return random(2, 2, 3, 3, grad=grad), random(2, 2, 3).abs().requires_grad_(grad)

    def test_the_linear_rule_is_normalised_linear_attention_over_earlier_segments(self):
        (q, k, v), beta = qkv(2, 11), random(4)
        local = attend(q, k, v, block_len=4)[0]
        o, _, _, _, m, z = infini(q, k, v, beta, block_len=4)
        s_q, s_k = fam_torch.sigma(q), fam_torch.sigma(k).repeat_interleave(2, 2)
        weights = torch.einsum("nihd,njhd->nijh", s_q, s_k)
        earlier = torch.arange(11)[None, :] // 4 < torch.arange(11)[:, None] // 4
        weights = weights * earlier[None, :, :, None]
        a = torch.einsum("nijh,njhd->nihd", weights, v.repeat_interleave(2, 2))
        a = a / weights.sum(2)[..., None].where(earlier.any(1)[None, :, None, None], torch.ones(()).double())
        gate = beta.sigmoid()[:, None]
        torch.testing.assert_close(o, gate * a + (1 - gate) * local, rtol=1e-13, atol=1e-13)
        # The state does not depend on how the stream was cut into segments.
        whole = infini_write(k[:, :8], v[:, :8], torch.zeros_like(m), torch.zeros_like(z))
        for have, want in zip((m, z), whole):
            torch.testing.assert_close(have, want, rtol=1e-13, atol=1e-13)

    def test_delta_leaves_what_is_already_stored(self):
        k, (m, z) = random(2, 5, 2, 3), self.state()
        m_next, z_next = infini_write(k, infini_read(k, m, z), m, z, "delta")
        torch.testing.assert_close(m_next, m, rtol=1e-13, atol=1e-13)
        self.assertTrue((z_next > z).all())

    def test_far_negative_queries(self):
        (m, z), q = self.state(), random(2, 5, 4, 3)
        for shift in (-50.0, -1000.0):
            a = infini_read(q.abs().neg() + shift, m, z)
            torch.testing.assert_close(a, infini_read(q.abs().neg(), m, z), rtol=1e-10, atol=1e-10)

    def test_gradients(self):
        (q, k, v), (m, z) = qkv(2, 3, grad=True), self.state(True)
        q.data[0, 0] = q.data[0, 0].abs().neg()
        self.assertTrue(gradcheck(infini_read, (q, m, z)))
        for rule in ("linear", "delta"):
            self.assertTrue(gradcheck(lambda *x: infini_write(*x, rule), (k, v, m, z)))
            q, k, v = qkv(2, 7, grad=True)
            tokens = dict(block_len=3, start=torch.tensor([0, 2]), lengths=torch.tensor([7, 5]), rule=rule)
            self.assertTrue(gradcheck(lambda *x: [infini(*x, **tokens)[i] for i in (0, 4, 5)],
                                      (q, k, v, random(4, grad=True), m, z), fast_mode=True))

    def test_nothing_stored_reads_zero_and_has_no_gradient(self):
        q, k, v = qkv(1, 3, grad=True)
        m, z = ((0 * random(*shape)).requires_grad_() for shape in ((1, 2, 3, 3), (1, 2, 3)))
        a = infini_read(q, m, z)
        self.assertEqual(a.count_nonzero(), 0)
        for x in torch.autograd.grad(a.sum(), (q, m, z)):
            self.assertEqual(x.count_nonzero(), 0)
        written = infini_write(k, v, m, z, "delta")
        gradients = torch.autograd.grad([x.sum() for x in written], (k, v, m, z))
        self.assertTrue(all(x.isfinite().all() for x in gradients))


class Layers(unittest.TestCase):
    def model(self, **options):
        torch.manual_seed(0)
        sizes = dict(heads=4, kv_heads=2, head_dim=5, ff_width=24, block_len=4, window_blocks=1, mem_len=3)
        return fam_torch.TransformerFAM(2, 16, **(sizes | options)).double()

    def test_a_stream_equals_the_whole_sequence(self):
        for options in ({}, {"feedback_norm": True}, {"window_blocks": 0}, {"mem_len": 0}):
            model, x = self.model(**options), random(2, 23, 16)
            whole, state, parts = model(x)[0], None, []
            for part in x.split(8, 1):
                y, state = model(part, state)
                parts.append(y)
            torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-13, atol=1e-13)

    def test_a_constant_added_to_all_positions_changes_nothing(self):
        model, x = self.model(), random(2, 14, 16)
        torch.testing.assert_close(model(x, offset=1234)[0], model(x)[0], rtol=1e-10, atol=1e-10)

    def test_the_memory_carries_what_the_window_has_left_behind(self):
        model, x = self.model(window_blocks=0), random(1, 24, 16, grad=True)
        (gradient,) = torch.autograd.grad(model(x)[0][:, 20:].sum(), x)
        self.assertTrue((gradient[0, :4].abs().sum(-1) > 0).all())

    def test_no_token_sees_a_later_one_except_through_the_first_memory(self):
        model, x = self.model(), random(1, 12, 16)
        y = model(x)[0]
        for at in (3, 6, 11):
            changed = x.clone()
            changed[:, at] += 1
            same = (model(changed)[0] == y).all(-1)[0]
            self.assertTrue(same[:at].all() if at >= 4 else not same[:at].any())

    def test_the_first_update_has_no_residual_and_the_norm_is_on_what_is_fed_back_only(self):
        model, x = self.model(feedback_norm=True), random(1, 4, 16)
        model.layers[0].feedback_norm.data.fill_(2.0)
        _, (_, memory, _) = model(x)
        rms = memory[0].square().mean(-1).sqrt()
        torch.testing.assert_close(rms, torch.full_like(rms, 2.0), rtol=1e-5, atol=0)
        y = model(x)[0]
        model.layers[0].feedback_norm.data.fill_(3.0)
        self.assertTrue(torch.equal(model(x)[0], y))  # the norm is not on the way up
        for layer in model.layers:  # with the sublayers silent nothing is left of the prompt
            layer.w_o.data.zero_()
            layer.w_down.data.zero_()
            layer.feedback_norm = None
        self.assertEqual(model(x)[1][1][0].count_nonzero(), 0)

    def test_gradients(self):
        model = self.model(feedback_norm=True)
        names, weights = zip(*model.named_parameters())
        x = random(1, 10, 16)

        def loss(x, *weights):
            y, (_, memory, _) = torch.func.functional_call(model, dict(zip(names, weights)), (x,))
            return y, *memory

        inputs = (x.requires_grad_(), *(w.detach().requires_grad_() for w in weights))
        self.assertTrue(gradcheck(loss, inputs, fast_mode=True))

    def test_every_float_type(self):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            model, x = self.model().to(dtype), random(1, 9, 16).to(dtype)
            y = model(x)[0]
            self.assertEqual(y.dtype, dtype)
            self.assertTrue(y.isfinite().all())


if __name__ == "__main__":
    unittest.main()
