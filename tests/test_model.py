"""The trunk sees no future, the cache changes nothing, and the sampler samples from what it says it does."""

import pytest
import torch
import torch.nn.functional as F
from conftest import chi_square, plain_logp, tiny

import model as gpt
from model import choose, generate


def positions_seen(model, t, T=8):
    """Which positions the logits at t depend on, by gradients: every position has a token of its own."""
    logits = model(torch.arange(T)[None])
    grad = torch.autograd.grad(logits[0, t].square().sum(), model.wte.weight)[0]
    return (grad[:T].norm(dim=1) > 0).tolist()


def test_causality_by_gradients(monkeypatch):
    model, _ = tiny()
    for t in range(8):
        assert positions_seen(model, t) == [i <= t for i in range(8)]
    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **_: attention(q, k, v))
    assert all(positions_seen(model, 3))  # the future is seen: this test can fail


def test_logits_are_float32_under_autocast():
    model, _ = tiny()
    h = torch.randn(5, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.logits(h)
    torch.testing.assert_close(logits, h.float() @ model.lm_head.weight.T, rtol=0, atol=1e-5)


@pytest.mark.parametrize("temperature", (0, 0.6, 1.0))
def test_samples_and_their_logprobs_are_those_of_a_forward_pass_without_cache(temperature):
    """New tokens go behind each row's own prompt, over the padding that was read with the prompts."""
    model, _ = tiny()
    out = generate(model, [[1, 2, 3], [4], [5, 6, 7, 8, 9]], 30, 9, eos=0, temperature=temperature)
    tokens, mask = out["tokens"], out["mask"]
    logp = plain_logp(model, tokens, temperature or 1.0)
    torch.testing.assert_close(out["logp"][mask], logp[mask], rtol=0, atol=1e-5)
    by_one_column = out["logp"].roll(1, dims=1)
    assert (by_one_column - logp)[mask].abs().max() > 0.1
    likeliest = model(tokens)[:, :-1].argmax(-1)
    assert (likeliest == tokens[:, 1:])[mask].all() == (temperature == 0)


def test_eos_is_inside_the_mask_and_nothing_follows_it():
    model, _ = tiny()
    out = generate(model, [[1, 2, 3], [4]], 100, 8, eos=5)
    token, mask = out["tokens"][:, 1:], out["mask"]  # column t speaks of token t+1
    column = torch.arange(mask.size(1))
    start = torch.tensor([2, 0]).repeat_interleave(100)[:, None]  # the first column of a response
    is_eos = (token == 5) & (column >= start)
    eos_before = is_eos.cumsum(1) - is_eos.long() > 0
    assert torch.equal(mask, (column >= start) & (column < start + 8) & ~eos_before)
    assert not token[(column >= start) & ~mask].any() and not out["logp"][~mask].any()
    assert is_eos.sum() > 20


def test_samples_follow_the_tempered_distribution():
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.0])
    chi2 = {}
    for temperature in (0.7, 1.0):
        logp = gpt.tempered(logits, temperature).expand(20_000, 5)
        tokens = choose(logp, temperature, torch.rand(20_000))
        chi2[temperature] = chi_square(tokens, (logits / 0.7).softmax(0))
    assert chi2[0.7] < 18.5  # the 99.9 % point of chi-square with 4 degrees of freedom
    assert chi2[1.0] > 100  # a sampler that forgets the temperature is found out


def test_impossible_tokens_are_never_chosen():
    logp = torch.tensor([-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]).log_softmax(0).expand(3, 5)
    chosen = choose(logp, 1.0, torch.tensor([0.0, 0.5, 1 - 2**-24]))
    assert set(chosen.tolist()) == {1, 3}
