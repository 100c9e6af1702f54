"""Heads score the tokens they say they score, and linear_logp is the log-softmax it replaces."""

import pytest
import torch
import torch.nn.functional as F
from conftest import batch, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import eval as evaluation
import mtp

DESIGNS = ("sequential", "parallel")


def reference(model, heads, tokens, offset=0):
    """{(k, b, token index): log-prob} by the definition of each design, one sequence and one depth at a time.

    offset shifts the embedding that a sequential head reads: the classic off-by-one.
    """
    out, T = {}, tokens.size(1)
    for b, row in enumerate(tokens):
        below = model.hidden(row[None])
        for k, head in enumerate(heads.heads, start=1):
            n = T - 1 - k  # positions t = 0..n-1 predict token t+1+k
            if heads.sequential:
                emb = model.wte(row[[min(t + k + offset, T - 1) for t in range(n)]])[None]
                below = head(below[:, :n], emb, model.rope(n))
            else:
                below = head(model.hidden(row[None])[:, :n], None, model.rope(n))
            logp = model.logits(below).log_softmax(-1)[0]
            out |= {(k, b, t + 1 + k): logp[t, row[t + 1 + k]].item() for t in range(n)}
    return out


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("depth", (1, 2, 3))
def test_alignment(design, depth):
    model, heads = tiny(depth=depth, design=design)
    tokens, mask = batch()
    _, logp, valid, _ = mtp.logprobs(model, heads, tokens, mask)
    right, off_by_one = reference(model, heads, tokens), reference(model, heads, tokens, offset=1)
    assert logp.shape == valid.shape == (depth, *mask.shape)
    shifted = 0
    for k in range(1, depth + 1):
        for b, t in mask.nonzero().tolist():
            assert valid[k - 1, b, t] == (t >= k)
            if t >= k:
                assert logp[k - 1, b, t].item() == pytest.approx(right[k, b, t + 1], abs=1e-5)
                shifted += abs(logp[k - 1, b, t].item() - off_by_one[k, b, t + 1]) > 1e-3
    assert (logp[~valid] == 0).all() and not valid[:, ~mask].any()
    if design == "sequential":
        assert shifted > 10  # a head that reads one token too far would be noticed


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("depth", (1, 2, 3))
def test_heads_see_no_further_than_they_may(design, depth):
    """By gradients: depth k in column t depends on tokens ≤ t (parallel: ≤ t-k), the target t+1 never."""
    model, heads = tiny(depth=depth, design=design, vocab=20)
    tokens, mask = torch.arange(1, 11)[None], torch.ones(1, 9, dtype=torch.bool)
    _, logp, valid, _ = mtp.logprobs(model, heads, tokens, mask)
    for k in range(1, depth + 1):
        for t in range(k, 9):
            grad = torch.autograd.grad(logp[k - 1, 0, t], model.wte.weight, retain_graph=True)[0].norm(dim=1)
            last = t if design == "sequential" else t - k
            assert [bool(g > 0) for g in grad[tokens[0]]] == [i <= last for i in range(10)]


def test_main_logprobs_do_not_depend_on_heads_or_padding():
    model, heads = tiny()
    tokens, mask = batch()
    logp, *_ = mtp.logprobs(model, heads, tokens, mask, temperature=0.8)
    expected = (model(tokens)[:, :-1] / 0.8).log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1) * mask
    torch.testing.assert_close(logp, expected, rtol=0, atol=1e-5)
    assert torch.equal(logp, mtp.logprobs(model, None, tokens, mask, temperature=0.8)[0])
    wider = mtp.logprobs(model, heads, F.pad(tokens, (0, 4)), F.pad(mask, (0, 4)), temperature=0.8)
    torch.testing.assert_close(wider[0][:, : mask.size(1)], logp, rtol=0, atol=1e-5)


def test_a_deeper_loss_trains_the_sequential_heads_below_it():
    for design in DESIGNS:
        model, heads = tiny(depth=2, design=design)
        tokens, mask = batch()
        _, logp, _, _ = mtp.logprobs(model, heads, tokens, mask)
        grad = torch.autograd.grad(logp[1].sum(), heads.heads[0].block.qkv.weight, allow_unused=True)[0]
        assert (grad is not None and grad.norm() > 0) == (design == "sequential")


def test_heads_are_scored_at_the_same_temperature():
    model, heads = tiny()
    tokens, mask = batch()
    hot, cold = (mtp.logprobs(model, heads, tokens, mask, temperature=T)[1] for T in (1.0, 0.5))
    assert (hot - cold)[mtp.logprobs(model, heads, tokens, mask)[2]].abs().min() > 0


def test_a_prompt_shorter_than_the_depth():
    model, heads = tiny(depth=3)
    tokens, mask = batch(lengths=((1, 3), (1, 1)))
    logp, logp_k, valid, _ = mtp.logprobs(model, heads, tokens, mask)
    assert valid.sum((1, 2)).tolist() == [2, 1, 0] and torch.isfinite(logp_k).all()


# linear_logp


def exact(h, W, targets, upstream, temperature):
    """Values and gradients in float64."""
    h, W = h.detach().double().requires_grad_(), W.detach().double().requires_grad_()
    logp = (h @ W.T / temperature).log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    return logp.detach(), *torch.autograd.grad(logp, (h, W), upstream.double())


CASES = {  # N, C, V, scale of the logits, temperature
    "small logits, ragged": (37, 9, 203, 0.1, 1.0),
    "two words": (5, 4, 2, 1.0, 1.0),
    "temperature": (16, 8, 50, 1.0, 0.7),
    "large logits": (16, 8, 50, 80.0, 1.0),
    "one token": (1, 3, 7, 1.0, 1.3),
    "no token": (0, 4, 9, 1.0, 1.0),
}


@pytest.mark.parametrize("impl", ("naive", "chunked"))
@pytest.mark.parametrize("case", CASES)
def test_linear_logp_against_float64(impl, case, monkeypatch):
    N, C, V, scale, temperature = CASES[case]
    monkeypatch.setattr(mtp, "CHUNK_LOGITS", 64 * N)  # 64 columns at a time: chunks, and a ragged last one
    h = (torch.randn(N, C) * scale / C**0.5).requires_grad_()
    W = torch.randn(V, C, requires_grad=True)
    targets = torch.randint(0, V, (N,))
    upstream = torch.randn(N) * (torch.rand(N) > 0.3)  # signed, a third of them zero
    logp = mtp.linear_logp(h, W, targets, temperature, impl)
    got = logp.detach(), *torch.autograd.grad(logp, (h, W), upstream)
    for a, b in zip(got, exact(h, W, targets, upstream, temperature)):
        torch.testing.assert_close(a.double(), b, rtol=0 if a is got[0] else 1e-4, atol=1e-4 if scale > 1 else 1e-5)


@pytest.mark.parametrize("dtype, rounding", ((torch.bfloat16, 2**-8), (torch.float16, 2**-11)))
@pytest.mark.parametrize("impl", ("naive", "chunked"))
def test_linear_logp_of_half_precision_is_accumulated_in_float32(impl, dtype, rounding, monkeypatch):
    monkeypatch.setattr(mtp, "CHUNK_LOGITS", 64 * 37)  # eight chunks
    h, W = torch.randn(37, 33).to(dtype).requires_grad_(), torch.randn(503, 33).to(dtype).requires_grad_()
    targets, upstream = torch.randint(0, 503, (37,)), torch.randn(37) * (torch.rand(37) > 0.3)
    logp = mtp.linear_logp(h, W, targets, impl=impl)
    expected, dh, dW = exact(h, W, targets, upstream, 1.0)
    assert logp.dtype == torch.float32
    torch.testing.assert_close(logp.double(), expected, rtol=0, atol=1e-4)
    if dtype == torch.bfloat16:
        in_bf16 = (h @ W.T).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
        assert (in_bf16.double() - expected).abs().max() > 1e-2  # what logits in bfloat16 would cost
    for got, want in zip(torch.autograd.grad(logp, (h, W), upstream), (dh, dW)):
        assert got.dtype == dtype and (got.double() - want).norm() < 2 * rounding * want.norm()


@pytest.mark.parametrize("impl", ("naive", "chunked"))
@pytest.mark.parametrize("n", (0, 3, 10))
def test_the_gradient_of_the_rest_is_apart(impl, n, monkeypatch):
    """Rows from n on are scored by the same matrix; what they say about it is another tensor's gradient."""
    monkeypatch.setattr(mtp, "CHUNK_LOGITS", 10 * 64)
    h, W = torch.randn(10, 6), torch.randn(150, 6)
    W1, W2 = W.clone().requires_grad_(), W.clone().requires_grad_()
    targets, upstream = torch.randint(0, 150, (10,)), torch.randn(10)
    logp = mtp.linear_logp(h.requires_grad_(), W1, targets, 0.9, impl, rest=(n, W2))
    dh, *grads = torch.autograd.grad(logp, (h, W1, W2), upstream, allow_unused=True)
    expected, expected_dh, _ = exact(h, W, targets, upstream, 0.9)
    torch.testing.assert_close(logp.detach().double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(dh.double(), expected_dh, rtol=1e-4, atol=1e-6)
    for got, rows in zip(grads, (slice(0, n), slice(n, None))):
        want = exact(h[rows], W, targets[rows], upstream[rows], 0.9)[2]
        torch.testing.assert_close(torch.zeros_like(W) if got is None else got, want.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", ("naive", "chunked"))
def test_entropy(impl, monkeypatch):
    monkeypatch.setattr(mtp, "CHUNK_LOGITS", 5 * 64)
    h, W, targets = torch.randn(5, 4) * 3, torch.randn(200, 4), torch.arange(5)
    logp, entropy = mtp.linear_logp(h, W, targets, 0.8, impl, entropy=True)
    log_p = (h.double() @ W.double().T / 0.8).log_softmax(-1)
    torch.testing.assert_close(entropy.double(), -(log_p.exp() * log_p).sum(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logp, mtp.linear_logp(h, W, targets, 0.8, impl))
    torch.testing.assert_close(
        mtp.linear_logp(h * 0, W, targets, 1.0, impl, entropy=True)[1], torch.full((5,), 200.0).log()
    )


def test_rows_without_a_gradient_are_left_out_of_the_backward():
    """Half of the tokens clipped: half of the FLOPs of the backward, and the same gradients."""
    h, W = torch.randn(40, 8, requires_grad=True), torch.randn(300, 8, requires_grad=True)
    targets, g = torch.randint(0, 300, (40,)), torch.randn(40)
    flops, few = [], g * (torch.arange(40) % 2)
    for upstream in (g, few):
        logp = mtp.linear_logp(h, W, targets, impl="chunked")
        with FlopCounterMode(display=False) as counted:
            grads = torch.autograd.grad(logp, (h, W), upstream)
        flops.append(counted.get_total_flops())
    assert flops[0] == 4 * 40 * 8 * 300 and flops[1] == flops[0] / 2  # of z and dW; dh grows in place, not counted
    for got, want in zip(grads, exact(h, W, targets, few, 1.0)[1:]):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)
    none = torch.autograd.grad(mtp.linear_logp(h, W, targets, impl="chunked"), (h, W), g * 0)
    assert all((x == 0).all() for x in none)


def peak(V):
    """MiB that forward and backward take at their peak, of chunked and of naive."""
    peaks = {}
    for impl in ("chunked", "naive"):
        h, W = torch.randn(2048, 16, requires_grad=True), torch.randn(V, 16, requires_grad=True)
        before = evaluation.memory_peak(reset=True)
        mtp.linear_logp(h, W, torch.zeros(2048, dtype=torch.long), impl=impl).sum().backward()
        peaks[impl] = (evaluation.memory_peak() - before) / 2**20
    return peaks


def test_memory_stays_bounded_as_the_vocabulary_grows():
    """A buffer of CHUNK_LOGITS (16 MiB) in each pass, and a few tensors of N or of V numbers."""
    for V in (8192, 65536):
        peaks = evaluation.in_new_process(peak, V)
        assert peaks["chunked"] < 2 * 16 + 24 and peaks["naive"] > 2 * 2048 * V * 4 / 2**20


def test_chunked_gradcheck(monkeypatch):
    monkeypatch.setattr(mtp, "CHUNK_LOGITS", 64 * 4)  # two chunks
    h, W = torch.randn(4, 3, dtype=torch.float64), torch.randn(70, 3, dtype=torch.float64)
    f = lambda h, W: mtp.linear_logp(h, W, torch.tensor([0, 69, 2, 2]), 0.7, "chunked", rest=(2, W * 1))  # noqa: E731
    assert torch.autograd.gradcheck(f, (h.requires_grad_(), W.requires_grad_()))


def test_one_pass_over_the_unembedding_for_trunk_and_heads(monkeypatch):
    calls, statistics = [], mtp.chunked_statistics
    monkeypatch.setattr(mtp, "chunked_statistics", lambda h, *rest: calls.append(len(h)) or statistics(h, *rest))
    model, heads = tiny(depth=2)
    tokens, mask = batch()
    _, _, valid, _ = mtp.logprobs(model, heads, tokens, mask, impl="chunked")
    assert calls == [int(mask.sum() + valid.sum())]


def test_gradients_are_the_same_bits_each_time(monkeypatch):
    monkeypatch.setattr(mtp, "CHUNK_LOGITS", 64 * 50)
    h, W = torch.randn(50, 8, requires_grad=True), torch.randn(300, 8, requires_grad=True)
    targets, upstream = torch.randint(0, 9, (50,)), torch.randn(50)  # many rows share a target
    first, second = (
        torch.autograd.grad(mtp.linear_logp(h, W, targets, impl="chunked"), (h, W), upstream) for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("impl", ("naive", "chunked"))
def test_linear_logp_keeps_the_shape_and_takes_strides(impl, monkeypatch):
    monkeypatch.setattr(mtp, "CHUNK_LOGITS", 64 * 40)
    h, W = torch.randn(8, 5, 4).transpose(0, 1)[..., ::2], torch.randn(2, 150).T
    targets, upstream = torch.randint(0, 150, (8, 5)).T, torch.randn(5, 16)[:, ::2]
    h.requires_grad_(), W.requires_grad_()
    assert not any(x.is_contiguous() for x in (h, W, targets, upstream))
    logp = mtp.linear_logp(h, W, targets, impl=impl)
    assert logp.shape == (5, 8)
    for got, want in zip((logp, *torch.autograd.grad(logp, (h, W), upstream)), exact(h, W, targets, upstream, 1.0)):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.size = max(getattr(self, "size", 0), t.numel())
        return out


def test_chunked_never_holds_the_logits(monkeypatch):
    monkeypatch.setattr(mtp, "CHUNK_LOGITS", 4000)
    h, W = torch.randn(100, 8, requires_grad=True), torch.randn(1000, 8, requires_grad=True)
    largest = {}
    for impl in ("naive", "chunked"):
        with Largest() as seen:
            mtp.linear_logp(h, W, torch.zeros(100, dtype=torch.long), impl=impl).sum().backward()
        largest[impl] = seen.size
    assert largest == {"naive": 100 * 1000, "chunked": 1000 * 8}  # W's gradient is the largest thing left


def test_auto_picks_by_size_and_others_are_refused():
    assert mtp.pick_impl("auto", 1000, 257) == "naive" and mtp.pick_impl("auto", 1000, 50257) == "chunked"
    assert mtp.pick_impl("chunked", 1, 2) == "chunked"
    with pytest.raises(ValueError, match="impl: 'fast' is unknown; allowed: auto, naive, chunked, triton"):
        mtp.linear_logp(torch.ones(1, 2), torch.ones(3, 2), torch.tensor([0]), impl="fast")
