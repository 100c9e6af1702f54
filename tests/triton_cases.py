"""The Triton kernels on a CPU, by Triton's interpreter: run in a process of its own by test_triton.py.

TRITON_INTERPRET=1 must be set before Triton is first imported. The interpreter is slow: sizes are small, and tiles are
made small too, so that there are several of them, with ragged edges.
"""

import pytest
import torch
from conftest import batch, tiny
from test_mtp import exact

import mtp

CASES = {  # N, C, V, scale of the logits, temperature
    "ragged, small logits": (37, 20, 203, 0.1, 1.0),
    "a multiple of every tile": (32, 32, 128, 1.0, 1.0),
    "two words": (5, 16, 2, 1.0, 1.0),
    "temperature": (16, 24, 50, 1.0, 0.7),
    "large logits": (16, 8, 50, 80.0, 1.0),
    "one token": (1, 3, 17, 1.0, 1.3),
    "no token": (0, 4, 9, 1.0, 1.0),
}
ROUNDING = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(mtp, "TILES", {size: dict(ROWS=16, COLUMNS=32, CHANNELS=16) for size in (2, 4)})
    monkeypatch.setattr(mtp, "PROGRAMS", 6)
    monkeypatch.setattr(mtp, "DZ_BYTES", 4 * 37 * 70)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_against_float64(case, dtype):
    N, C, V, scale, temperature = CASES[case]
    h = (torch.randn(N, C) * scale / C**0.5).to(dtype).requires_grad_()
    W = torch.randn(V, C).to(dtype).requires_grad_()
    targets, upstream = torch.randint(0, V, (N,)), torch.randn(N) * (torch.rand(N) > 0.3)
    logp, entropy = mtp.linear_logp(h, W, targets, temperature, "triton", entropy=True)
    assert logp.dtype == torch.float32 and not entropy.requires_grad
    expected, dh, dW = exact(h, W, targets, upstream, temperature)
    torch.testing.assert_close(logp.detach().double(), expected, rtol=0, atol=1e-5 if scale <= 1 else 1e-4)
    log_p = (h.detach().double() @ W.detach().double().T / temperature).log_softmax(-1)
    torch.testing.assert_close(entropy.double(), -(log_p.exp() * log_p).sum(-1), rtol=1e-5, atol=1e-4)
    for got, want in zip(torch.autograd.grad(logp, (h, W), upstream), (dh, dW)):
        assert got.dtype == dtype
        # rounding of the inputs' dtype, and in float32 of exp(z - lse), whose relative error is that of z
        allowed = 2 * ROUNDING[dtype] + 2**-24 * 10 * max(scale, 1)
        assert (got.double() - want).norm() <= allowed * want.norm()


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("scale", (1e-6, 1.0, 1e5))
def test_any_upstream_gradient(scale, dtype):
    """That of a mean over a million tokens is no less exact than one of size 1."""
    h, W = (torch.randn(n, 16).to(dtype).requires_grad_() for n in (20, 50))
    targets, upstream = torch.randint(0, 50, (20,)), torch.randn(20) * scale
    _, dh, dW = exact(h, W, targets, upstream, 1.0)
    grads = torch.autograd.grad(mtp.linear_logp(h, W, targets, impl="triton"), (h, W), upstream)
    if dtype == torch.float16:  # its own range ends at 65504, and below 6e-5 it has fewer digits
        dh, dW = dh.half().double(), dW.half().double()
    for got, want in zip(grads, (dh, dW)):
        ok = want.isfinite()
        assert (got.double() - want)[ok].norm() <= (2 * ROUNDING[dtype] + 2**-20) * want[ok].norm() and ok.any()


def test_targets_in_every_tile_and_repeated():
    h, W = torch.randn(140, 16, requires_grad=True), torch.randn(70, 16, requires_grad=True)
    targets, upstream = torch.arange(140) % 70, torch.randn(140)
    logp = mtp.linear_logp(h, W, targets, impl="triton")
    expected, dh, dW = exact(h, W, targets, upstream, 1.0)
    torch.testing.assert_close(logp.detach().double(), expected, rtol=0, atol=1e-5)
    for got, want in zip(torch.autograd.grad(logp, (h, W), upstream), (dh, dW)):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def test_strides_and_the_gradient_of_the_rest():
    """Transposed inputs; and rows from n on have their gradient of W apart, as the heads' passes a door of its own."""
    h, W = torch.randn(16, 30).T[:, ::2].requires_grad_(), torch.randn(8, 41).T
    W1, W2 = (W.clone().requires_grad_() for _ in range(2))
    targets, upstream = torch.randint(0, 41, (30,)), torch.randn(30)
    logp = mtp.linear_logp(h, W1, targets, impl="triton", rest=(11, W2))
    dh, *grads = torch.autograd.grad(logp, (h, W1, W2), upstream)
    torch.testing.assert_close(dh.double(), exact(h, W, targets, upstream, 1.0)[1], rtol=1e-4, atol=1e-5)
    for got, rows in zip(grads, (slice(0, 11), slice(11, None))):
        expected, _, dW = exact(h[rows], W, targets[rows], upstream[rows], 1.0)
        torch.testing.assert_close(logp[rows].detach().double(), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(got.double(), dW, rtol=1e-4, atol=1e-5)


def test_main_and_heads_of_a_model():
    model, heads = tiny()
    tokens, mask = batch()
    naive, triton = (mtp.logprobs(model, heads, tokens, mask, impl=impl) for impl in ("naive", "triton"))
    for a, b in zip(naive[:2], triton[:2]):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
