"""The trunk sees no future, the cache changes nothing, samples are from what they say they are."""

from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from conftest import chi_square, plain_logp, tiny

from model import choose, generate, matmul_dtype


def positions_seen(model, t):
    """Which of 8 positions the logits at t depend on, by gradients: each has a token of its own."""
    loss = model(torch.arange(8)[None])[0, t].square().sum()
    return [row.norm() > 0 for row in torch.autograd.grad(loss, model.wte.weight)[0][:8]]


def test_causality_by_gradients(monkeypatch):
    model, _ = tiny()
    for t in range(8):
        assert positions_seen(model, t) == [i <= t for i in range(8)]
    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **_: attention(q, k, v))
    assert all(positions_seen(model, 3))  # the future is seen: this test can fail


def test_logits_are_float32_under_autocast():
    model, h = tiny()[0], torch.randn(5, 16).bfloat16()
    expected = h.float() @ model.lm_head.weight.T
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model.logits(h), expected)


def test_bfloat16_only_where_it_is_fast(monkeypatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    for capability in ((7, 5), (8, 0), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", Mock(return_value=capability))
        low = [matmul_dtype(*x) == torch.bfloat16 for x in ((cuda, 256), (cuda, 255), (cpu, 256))]
        assert low == [capability[0] >= 8, False, False]


@pytest.mark.parametrize("temperature", (0, 0.6, 1.0))
def test_samples_are_those_of_forward_passes_of_their_own_row(temperature):
    """Without cache, whichever rows share the batch, how long their prompts are, when they end."""
    model, u, prompts = tiny()[0], torch.rand(90, 9), [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    out = generate(model, prompts, 30, 9, 9, temperature, u)  # most rows end early
    tokens, mask = out["tokens"], out["mask"]
    logp = plain_logp(model, tokens, temperature or 1.0)
    torch.testing.assert_close(out["logp"][mask], logp[mask], rtol=0, atol=1e-5)
    likeliest = model(tokens)[:, :-1].argmax(-1)
    assert (likeliest == tokens[:, 1:])[mask].all() == (temperature == 0)
    for row in range(0, 90, 4):
        alone = generate(model, [prompts[row // 30]], 1, 9, 9, temperature, u[row : row + 1])
        assert tokens[row, : alone["tokens"].size(1)].tolist() == alone["tokens"][0].tolist()


def test_eos_is_inside_the_mask_and_nothing_follows_it():
    out = generate(tiny()[0], [[1, 2, 3], [4]], 100, 8, eos=5)
    token, mask, column = out["tokens"][:, 1:], out["mask"], torch.arange(out["mask"].size(1))
    behind = column - torch.tensor([2, 0]).repeat_interleave(100)[:, None]  # the prompt
    is_eos = (token == 5) & (behind >= 0)
    over = (behind >= 8) | (is_eos.cumsum(1) - is_eos.long() > 0)
    assert torch.equal(mask, (behind >= 0) & ~over) and is_eos.sum() > 20
    assert not token[(behind >= 0) & ~mask].any() and not out["logp"][~mask].any()


def test_generated_tokens_follow_the_tempered_distribution_and_are_never_impossible():
    model, _ = tiny(vocab=5)
    tokens = generate(model, [[1, 2, 3]], 20_000, 1, eos=0, temperature=0.5)["tokens"][:, 3]
    logits = model(torch.tensor([[1, 2, 3]]))[0, -1]
    assert chi_square(tokens, (logits / 0.5).softmax(0)) < 18.5  # the 99.9 % point of 4 degrees
    assert chi_square(tokens, logits.softmax(0)) > 100  # whoever forgets the temperature is seen
    logp = torch.tensor([0, 0.4, 0, 0.6, 0]).log().expand(3, 5)
    assert choose(logp, 1.0, torch.tensor([0.0, 0.5, 1 - 2**-24])).tolist() == [3, 3, 1]
