"""The trunk sees no future, the cache changes nothing, and the sampler samples from what it says it does."""

import pytest
import torch
import torch.nn.functional as F
from conftest import batch, tiny

import model as gpt
from model import KVCache, choose, generate, pad


def reach(model, t, T=8):
    """Which positions the logits at t depend on, by gradients: every position has a token of its own."""
    logits = model(torch.arange(T)[None])
    grad = torch.autograd.grad(logits[0, t].square().sum(), model.wte.weight)[0]
    return grad[:T].norm(dim=1) > 0


def test_causality_by_gradients(monkeypatch):
    model, _ = tiny()
    for t in range(8):
        assert reach(model, t).tolist() == [i <= t for i in range(8)]
    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(gpt.F, "scaled_dot_product_attention", lambda *a, is_causal, **k: attention(*a, **k))
    assert reach(model, 3).all()  # without the mask, the future is seen: this test can fail


def test_padding_changes_nothing():
    model, _ = tiny()
    tokens, _ = batch()
    alone = model(tokens[1:2, :4])
    torch.testing.assert_close(model(tokens)[1:2, :4], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tied", (False, True))
def test_cache_equals_no_cache(tied):
    model, _ = tiny(tied=tied)
    prompts = [[1, 2, 3, 4], [5, 6], [7, 8, 9]]
    rest = torch.randint(0, 11, (3, 5))
    tokens, length = pad(prompts, "cpu")
    cache = KVCache(model.cfg, 3, 9, "cpu", torch.float32)
    model.hidden(tokens, cache, torch.arange(4).expand(3, 4), end=4)
    for step in range(5):  # row b's new token goes behind its own prompt
        h = model.hidden(rest[:, step : step + 1], cache, length[:, None] + step, end=5 + step)
        for b, prompt in enumerate(prompts):
            whole = model.hidden(torch.tensor([prompt + rest[b, : step + 1].tolist()]))
            torch.testing.assert_close(h[b, 0], whole[0, -1], rtol=0, atol=1e-5)


def test_greedy_equals_a_loop_without_cache():
    model, _ = tiny()
    prompts = [[1, 2, 3, 4, 5], [6, 7], [8]]
    samples = generate(model, prompts, 1, 8, eos=0, temperature=0)
    for b, prompt in enumerate(prompts):
        row = list(prompt)
        while len(row) < len(prompt) + 8 and (len(row) == len(prompt) or row[-1] != 0):
            row.append(int(model(torch.tensor([row]))[0, -1].argmax()))
        assert samples.tokens_BT[b, : len(row)].tolist() == row
        assert samples.mask_BT[b].nonzero().flatten().tolist() == list(range(len(prompt), len(row)))


@pytest.mark.parametrize("temperature", (1.0, 0.6))
def test_sampled_logprobs_equal_a_forward_pass(temperature):
    model, _ = tiny()
    samples = generate(model, [[1, 2, 3], [4]], 50, 9, eos=0, temperature=temperature)
    logp = (model(samples.tokens_BT)[:, :-1] / temperature).log_softmax(-1)
    logp = logp.gather(-1, samples.tokens_BT[:, 1:, None]).squeeze(-1)
    mask = samples.mask_BT[:, 1:]
    torch.testing.assert_close(samples.logp_BT[:, 1:][mask], logp[mask], rtol=0, atol=1e-5)
    assert not torch.allclose(samples.logp_BT[:, :-1][mask], logp[mask])  # shifted by one they are not


def test_eos_is_inside_the_mask_and_nothing_follows_it():
    model, _ = tiny()
    samples = generate(model, [[1, 2, 3], [4]], 100, 8, eos=5)
    ended = 0
    for tokens, mask, logp, first in zip(*samples[:3], [3] * 100 + [1] * 100):
        columns = mask.nonzero().flatten().tolist()
        response = tokens[mask].tolist()
        assert columns == list(range(first, first + len(response)))  # contiguous, right behind the prompt
        assert 5 not in response[:-1]
        assert len(response) == 8 or response[-1] == 5
        assert (tokens[columns[-1] + 1 :] == 0).all() and (logp[~mask] == 0).all() and (logp[mask] < 0).all()
        ended += response[-1] == 5
    assert ended > 20


def test_dropping_finished_rows_changes_nothing(monkeypatch):
    model, _ = tiny()
    runs, u = [], torch.rand(80, 10)
    for share in (0.0, 0.9, 1.1):  # never, by default, whenever one has finished
        monkeypatch.setattr(gpt, "COMPACT", share)
        runs.append(generate(model, [[1, 2, 3], [4]], 40, 10, eos=5, u_BR=u, keep_hidden=True))
        tokens, mask, _, h = runs[-1]
        seen = (mask[:, 1:] | (tokens[:, :-1] > 0)) & (tokens[:, 1:] > 0)  # positions that something follows
        torch.testing.assert_close(h[:, :-1][seen], model.hidden(tokens)[:, :-1][seen], rtol=1e-4, atol=1e-4)
    for other in runs[1:]:
        assert torch.equal(runs[0].tokens_BT, other.tokens_BT) and torch.equal(runs[0].mask_BT, other.mask_BT)
        torch.testing.assert_close(runs[0].logp_BT, other.logp_BT, rtol=0, atol=1e-5)


def test_samples_of_a_prompt_differ_from_the_first_token_on():
    model, _ = tiny()
    samples = generate(model, [[1, 2, 3]], 64, 4, eos=0)
    assert len(set(samples.tokens_BT[:, 3].tolist())) > 3


def chi2(temperature_of_sampler, draws=20_000):
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.0])
    u = torch.rand(draws, generator=torch.Generator().manual_seed(0))
    token, _ = choose(logits.expand(draws, 5), temperature_of_sampler, u)
    expected = draws * (logits / 0.7).softmax(0)
    return ((torch.bincount(token, minlength=5) - expected).square() / expected).sum().item()


def test_samples_follow_the_tempered_distribution():
    assert chi2(0.7) < 18.5  # the 99.9 % point of chi-square with 4 degrees of freedom
    assert chi2(1.0) > 100  # a sampler that forgets the temperature is found out


def test_impossible_tokens_are_never_chosen():
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]).expand(3, 5)
    tokens, _ = choose(logits, 1.0, torch.tensor([0.0, 0.5, 1 - 2**-24]))
    assert set(tokens.tolist()) <= {1, 3}


def test_too_long_a_prompt_is_refused():
    model, _ = tiny(block=8)
    with pytest.raises(ValueError, match=r"prompt of 5 tokens \+ max_new_tokens 4 = 9 exceeds block_size 8"):
        generate(model, [[1] * 5], 1, 4, eos=0)


def test_tied_means_one_matrix():
    for tied in (False, True):
        model, _ = tiny(tied=tied)
        assert (model.lm_head.weight is model.wte.weight) == tied
        assert model(torch.arange(6)[None]).std() < 3  # and logits start at an ordinary scale
