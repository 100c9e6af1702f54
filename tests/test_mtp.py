"""Heads score the tokens they say they score, and linear_logp is the log-softmax it replaces."""

import os

import pytest
import torch
import torch.nn.functional as F
from conftest import batch, plain_logp, tiny, wider
from torch.utils._python_dispatch import TorchDispatchMode

import mtp

DESIGNS = ("sequential", "parallel")
IMPLS = ("naive", "chunked")
if os.environ.get("TRITON_INTERPRET") == "1":  # see test_triton.py
    IMPLS = ("triton",)


def reference(model, heads, tokens, temperature, offset=0):
    """Aligned log-probs (B, K, T-1) by the definition of each design, one sequence and one depth at a time.

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
    _, logp, _ = mtp.logprobs(model, heads, tokens, mask, 0.7)  # the trunk's temperature is theirs
    scored = mask[:, None] & (torch.arange(mask.size(1)) >= torch.tensor([1, 2, 3])[:, None])
    assert torch.equal(logp != 0, scored)
    expected = reference(model, heads, tokens, 0.7)
    torch.testing.assert_close(logp, expected * scored, rtol=0, atol=1e-5)
    off_by_one = reference(model, heads, tokens, 0.7, offset=1)
    noticed = ((logp - off_by_one).abs() > 1e-3)[scored].sum()
    assert noticed > 10 or design == "parallel"  # a head that reads one token too far would be seen


@pytest.mark.parametrize("design", DESIGNS)
def test_heads_see_no_further_than_they_may(design):
    """By gradients: depth k in column t depends on tokens ≤ t (parallel: ≤ t-k), never on the target t+1."""
    model, heads = tiny(depth=3, design=design, vocab=20)
    tokens, mask = torch.arange(1, 11), torch.ones(1, 9, dtype=torch.bool)
    _, logp, _ = mtp.logprobs(model, heads, tokens[None], mask)

    def size_of_gradient(k, t, weight):
        grad = torch.autograd.grad(logp[0, k - 1, t], weight, retain_graph=True)[0]
        return grad.norm(dim=-1)

    below = size_of_gradient(3, 8, heads.heads[0].norm.weight)
    assert (below > 0) == (design == "sequential")  # a deeper loss trains the heads below
    for k in (1, 2, 3):
        for t in range(k, 9):
            last = t if design == "sequential" else t - k
            seen = size_of_gradient(k, t, model.wte.weight)[tokens] > 0
            assert seen.tolist() == [i <= last for i in range(10)]


def test_the_trunks_logprobs_do_not_depend_on_heads_or_padding():
    model, heads = tiny()
    tokens, mask = batch()
    logp, _, _ = mtp.logprobs(model, heads, tokens, mask, temperature=0.8)
    expected = plain_logp(model, tokens, 0.8) * mask
    torch.testing.assert_close(logp, expected, rtol=0, atol=1e-5)
    alone, none, _ = mtp.logprobs(model, None, tokens, mask, temperature=0.8)
    torch.testing.assert_close(logp, alone)
    assert none.shape == (4, 0, mask.size(1))  # no heads are zero depths
    more = wider({"tokens": tokens, "mask": mask})
    padded, _, _ = mtp.logprobs(model, heads, more["tokens"], more["mask"], temperature=0.8)
    torch.testing.assert_close(padded, F.pad(logp, (0, 3)), rtol=0, atol=1e-5)


# linear_logp


def exact(h, W, targets, upstream, temperature=1.0):
    """Values and gradients in float64."""
    h, W = h.detach().double().requires_grad_(), W.detach().double().requires_grad_()
    logp = (h @ W.T / temperature).log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    return logp.detach(), *torch.autograd.grad(logp, (h, W), upstream.double())


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    """Several chunks and tiles, with ragged edges. The trial of the kernels has the tiles of a GPU."""
    for dtype, _ in PRECISIONS if IMPLS == ("triton",) else ():
        assert mtp.why_no_triton("cpu", dtype) == ""
    tile = dict(ROWS=16, COLUMNS=32, CHANNELS=16)
    monkeypatch.setattr(mtp, "CHUNK_LOGITS", 64)  # 64 columns at a time
    monkeypatch.setattr(mtp, "TILES", {2: tile, 4: tile})
    monkeypatch.setattr(mtp, "PROGRAMS", 6)
    monkeypatch.setattr(mtp, "DZ_BYTES", 4 * 37 * 70)


CASES = {  # N, C, V, scale of the logits, temperature, scale of the upstream gradients
    "small logits, ragged": (37, 20, 203, 0.1, 1.0, 1.0),
    "a multiple of every tile": (32, 32, 128, 1.0, 1.0, 1.0),
    "temperature": (16, 24, 150, 1.0, 0.7, 1.0),
    "large logits": (16, 8, 150, 80.0, 1.0, 1.0),
    "a mean over many tokens": (40, 16, 70, 1.0, 1.0, 1e-6),
    "one token, two words": (1, 3, 2, 1.0, 1.3, 1.0),
    "no token": (0, 4, 9, 1.0, 1.0, 1.0),
}
PRECISIONS = ((torch.float32, 2**-24), (torch.float16, 2**-11), (torch.bfloat16, 2**-8))


@pytest.mark.parametrize("dtype, rounding", PRECISIONS)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", CASES)
def test_linear_logp_against_float64(impl, case, dtype, rounding):
    """Upstream gradients are signed, and a third of them zero. Half precision is accumulated in float32."""
    N, C, V, scale, temperature, upstream_scale = CASES[case]
    h = (torch.randn(N, C) * scale / C**0.5).to(dtype).requires_grad_()
    W = torch.randn(V, C).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (N,))
    upstream = torch.randn(N) * (torch.rand(N) > 0.3) * upstream_scale
    logp = mtp.linear_logp(h, W, targets, temperature, impl)
    expected, *gradients = exact(h, W, targets, upstream, temperature)
    assert logp.dtype == torch.float32
    allowed = 1e-4 if scale > 1 else 1e-5
    torch.testing.assert_close(logp.detach().double(), expected, rtol=0, atol=allowed)
    # a logit's error, some 2^-24 of its size, is the relative one of its softmax
    relative = 2 * rounding + 2**-20 * max(scale, 1)
    for got, want in zip(torch.autograd.grad(logp, (h, W), upstream), gradients):
        assert got.dtype == dtype
        if dtype == torch.float16:  # below 6e-5 it has fewer digits
            want = want.half().double()
        assert (got.double() - want).norm() <= relative * want.norm()


@pytest.mark.parametrize("impl", IMPLS)
def test_linear_logp_loses_no_digits(impl):
    """No digits are lost to a common offset of all logits, nor of the log-prob of a nearly certain token.

    These logits are exact in float32. At 2^20 its numbers are 1/8 apart, and at 100 far enough to blur 4e-4.
    """
    large, certain = 2.0**20 + torch.arange(100) % 5, torch.tensor([100.5, 92.0, 92.0])
    for logits, target, allowed in ((large, 3, {"abs": 1e-3}), (certain, 0, {"rel": 1e-3})):
        inputs = torch.ones(1, 1), logits[:, None].requires_grad_(), torch.tensor([target])
        logp = mtp.linear_logp(*inputs, impl=impl)
        want, _, want_dW = exact(*inputs, torch.ones(1))
        expected = pytest.approx(want.item(), **allowed)
        assert logp.item() == expected
        dW = torch.autograd.grad(logp, inputs[1])[0].double()
        torch.testing.assert_close(dW, want_dW, rtol=1e-3, atol=0)
        loses_them = logits[target] - logits.logsumexp(0)  # the plausible formula
        assert loses_them.item() != expected


@pytest.mark.parametrize("impl", IMPLS)
def test_linear_logp_of_strided_inputs(impl):
    """The shape of the targets, many of them equal, is kept, and gradients are the same bits each time."""
    h = torch.randn(8, 5, 4).transpose(0, 1)[..., ::2].requires_grad_()
    W = torch.randn(2, 150).T.requires_grad_()
    targets, upstream = torch.randint(0, 9, (8, 5)).T, torch.randn(5, 16)[:, ::2]
    assert not any(x.is_contiguous() for x in (h, W, targets, upstream))
    results = []
    for _ in range(2):
        logp = mtp.linear_logp(h, W, targets, impl=impl)
        results.append((logp.detach(), *torch.autograd.grad(logp, (h, W), upstream)))
    for first, second, want in zip(*results, exact(h, W, targets, upstream)):
        assert torch.equal(first, second)
        torch.testing.assert_close(first.double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_linear_logp_refuses_targets_out_of_range(impl):
    h, W = torch.ones(2, 4), torch.ones(3, 4)
    for wrong in (-100, 3):
        with pytest.raises(ValueError, match=f"targets: {wrong} is out of range; allowed: 0 to 2"):
            mtp.linear_logp(h, W, torch.tensor([0, wrong]), impl=impl)


class LargestTensor(TorchDispatchMode):
    """Notes how many elements the largest tensor has that any operation returns."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            self.size = max(self.size, x.numel() if isinstance(x, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize("impl, elements", (("naive", 100 * 1000), ("chunked", 1000 * 8)))
def test_chunked_never_holds_the_logits(impl, elements):
    h, W = torch.randn(100, 8, requires_grad=True), torch.randn(1000, 8, requires_grad=True)
    targets = torch.zeros(100, dtype=torch.long)
    with LargestTensor() as largest:
        mtp.linear_logp(h, W, targets, impl=impl).sum().backward()
    assert largest.size == elements  # of chunked, W's gradient is the largest thing left
