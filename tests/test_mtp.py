"""Heads score the tokens they say they score, and linear_logp is the log-softmax it replaces."""

import os

import pytest
import torch
import torch.nn.functional as F
from conftest import batch, plain_logp, tiny, wider
from torch.utils._python_dispatch import TorchDispatchMode

import mtp

DESIGNS, INTERPRETED = ("sequential", "parallel"), os.environ.get("TRITON_INTERPRET") == "1"
IMPLS = ("triton",) if INTERPRETED else ("naive", "chunked")  # see test_triton.py


def reference(model, heads, tokens, temperature, offset=0):
    """Aligned log-probs (B, K, T-1), by each design's definition, a sequence and a depth at a time.

    offset shifts the embedding that a sequential head reads: the classic off-by-one.
    """
    T = tokens.size(1)
    out = torch.zeros(len(tokens), len(heads.heads), T - 1)
    for b, row in enumerate(tokens):
        h = below = model.hidden(row[None])
        for k, head in enumerate(heads.heads, start=1):
            n = T - 1 - k  # positions t = 0..n-1 predict token t+1+k, of which column t+k speaks
            if heads.sequential:
                read = (torch.arange(n) + k + offset).clamp(max=T - 1)
                both = (head.norm_h(below[:, :n]), head.norm_e(model.wte(row[None, read])))
                below = head.norm(head.block(head.proj(torch.cat(both, -1))))
            else:
                below = head.norm(head.block(h[:, :n]))
            logp = (model.logits(below[0]) / temperature).log_softmax(-1)
            out[b, k - 1, k:] = logp[torch.arange(n), row[k + 1 :]]
    return out


@pytest.mark.parametrize("design", DESIGNS)
def test_alignment(design):
    model, heads = tiny(depth=3, design=design)
    tokens, mask = batch(lengths=((3, 5), (2, 2), (4, 1), (3, 6), (1, 1)))  # some below the depth
    _, logp = mtp.logprobs(model, heads, tokens, mask, 0.7)  # the trunk's temperature is theirs
    scored = mask[:, None] & (torch.arange(mask.size(1)) >= torch.tensor([1, 2, 3])[:, None])
    assert torch.equal(logp != 0, scored)
    expected = reference(model, heads, tokens, 0.7)
    torch.testing.assert_close(logp, expected * scored, rtol=0, atol=1e-5)
    off_by_one = (logp - reference(model, heads, tokens, 0.7, offset=1))[scored].abs()
    assert (off_by_one > 1e-3).sum() > 10 or design == "parallel"  # reading too far would be seen


@pytest.mark.parametrize("design", DESIGNS)
def test_heads_see_no_further_than_they_may(design):
    """By gradients: depth k in column t depends on tokens ≤ t (parallel: ≤ t-k), never t+1."""
    model, heads = tiny(depth=3, design=design, vocab=20)
    tokens, mask = torch.arange(1, 11), torch.ones(1, 9, dtype=torch.bool)
    _, logp = mtp.logprobs(model, heads, tokens[None], mask)
    weights = model.wte.weight, heads.heads[0].norm.weight
    for k in (1, 2, 3):
        for t in range(k, 9):
            of = torch.autograd.grad(logp[0, k - 1, t], weights, None, True, materialize_grads=True)
            last = t if design == "sequential" else t - k
            assert (of[0][tokens].norm(dim=1) > 0).tolist() == [i <= last for i in range(10)]
            # A deeper loss trains the sequential heads below.
            assert (of[1].norm() > 0) == (k == 1 or design == "sequential")


def test_the_trunks_logprobs_do_not_depend_on_heads_or_padding():
    model, heads = tiny()
    tokens, mask = batch()
    logp, _ = mtp.logprobs(model, heads, tokens, mask, 0.8)
    torch.testing.assert_close(logp, plain_logp(model, tokens, 0.8) * mask, rtol=0, atol=1e-5)
    none = logp.new_zeros(4, 0, mask.size(1))
    torch.testing.assert_close(mtp.logprobs(model, None, tokens, mask, 0.8), (logp, none))
    more = wider({"tokens": tokens, "mask": mask})
    padded, _ = mtp.logprobs(model, heads, more["tokens"], more["mask"], 0.8)
    torch.testing.assert_close(padded, F.pad(logp, (0, 3)), rtol=0, atol=1e-5)


def exact(h, W, targets, upstream, temperature=1.0):
    """Values and gradients in float64."""
    h, W = (x.detach().double().requires_grad_() for x in (h, W))
    logp = (h @ W.T / temperature).log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    return logp.detach(), *torch.autograd.grad(logp, (h, W), upstream.double())


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    """Several chunks and tiles, with ragged edges; the trial of the kernels has those of a GPU."""
    assert not INTERPRETED or mtp.why_no_triton("cpu") == ""
    monkeypatch.setattr(mtp, "CHUNK_LOGITS", 37 * 70)  # 70 columns of 37 tokens at a time
    monkeypatch.setattr(mtp, "TILE", {"ROWS": 16, "COLUMNS": 32, "CHANNELS": 16})


CASES = {  # N, C, V, scale of the logits, temperature, scale of the upstream gradients
    "small logits, ragged": (37, 20, 203, 0.1, 1.0, 1.0),
    "a multiple of every tile": (32, 32, 128, 1.0, 1.0, 1.0),
    "temperature": (16, 24, 150, 1.0, 0.7, 1.0),
    "large logits": (16, 8, 150, 80.0, 1.0, 1.0),
    "a mean over many tokens": (40, 16, 70, 1.0, 1.0, 1e-6),
    "one token, two words": (1, 3, 2, 1.0, 1.3, 1.0),
    "no token": (0, 4, 9, 1.0, 1.0, 1.0),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", CASES)
def test_linear_logp_against_float64(impl, case):
    """Strided inputs, pairs of targets on both sides of ragged edges, signed upstream gradients."""
    N, C, V, scale, temperature, upstream_scale = CASES[case]
    h, W = (torch.randn(C, N) * scale / C**0.5).T[:, None], torch.randn(C, V).T
    targets = (torch.arange(N)[:, None] // 2 + 55) % V  # of 37 tokens a chunk ends with 69
    upstream = (torch.randn(2 * N) * (torch.rand(2 * N) > 0.3) * upstream_scale)[::2, None]
    want, seen = exact(h, W, targets, upstream, temperature), {}
    for dtype in (torch.float32, torch.float32, torch.float64):
        inputs = [x.to(dtype).requires_grad_() for x in (h, W)]
        logp = mtp.linear_logp(*inputs, targets, temperature, impl)
        got = logp.detach(), *torch.autograd.grad(logp, inputs, upstream.to(dtype))
        for x, y in zip(got, want):
            precision = max(scale, 1) * 2 ** (-20 if dtype == torch.float32 else -46)
            assert x.dtype == dtype and (x - y).norm() <= precision * y.norm()
        assert all(map(torch.equal, got, seen.setdefault(dtype, got)))  # the same bits each time


@pytest.mark.parametrize("impl", IMPLS)
def test_linear_logp_loses_no_digits(impl):
    """Not to a common offset of all logits, 2^20, where float32's numbers are 1/8 apart, nor of the
    log-prob of a nearly certain token, -4e-4. These logits themselves are exact in float32."""
    large, certain = 2.0**20 + torch.arange(100) % 5, torch.tensor([100.5, 92.0, 92.0])
    for logits, target, allowed in ((large, 3, {"abs": 1e-3}), (certain, 0, {"rel": 1e-3})):
        inputs = torch.ones(1, 1), logits[:, None].requires_grad_(), torch.tensor([target])
        logp = mtp.linear_logp(*inputs, impl=impl)
        want, _, want_dW = exact(*inputs, torch.ones(1))
        assert logp.item() == pytest.approx(want.item(), **allowed)
        (dW,) = torch.autograd.grad(logp, inputs[1])
        torch.testing.assert_close(dW.double(), want_dW, rtol=1e-3, atol=0)
        plausible = logits[target] - logits.logsumexp(0)  # loses them
        assert plausible.item() != pytest.approx(want.item(), **allowed)


@pytest.mark.parametrize("impl", IMPLS)
def test_linear_logp_refuses_targets_out_of_range(impl):
    for wrong in (-100, 3):
        with pytest.raises(ValueError, match=f"targets: {wrong} is out of range; allowed: 0 to 2"):
            mtp.linear_logp(torch.ones(1, 4), torch.ones(3, 4), torch.tensor([wrong]), impl=impl)


class LargestTensor(TorchDispatchMode):
    """Notes how many elements the largest tensor has that any operation returns."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            self.size = max(self.size, x.numel() if isinstance(x, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize("impl, elements", [("naive", 100 * 1000), ("chunked", 1000 * 8)])
def test_chunked_never_holds_the_logits(impl, elements):
    h, W = torch.randn(100, 8, requires_grad=True), torch.randn(1000, 8, requires_grad=True)
    with LargestTensor() as largest:
        mtp.linear_logp(h, W, torch.zeros(100, dtype=torch.long), impl=impl).sum().backward()
    assert largest.size == elements  # of chunked, W's gradient is the largest thing left
