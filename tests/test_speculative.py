"""Speculative sampling changes how often the trunk runs, and nothing else."""

import random

import pytest
import torch
from conftest import chi_square, plain_logp, tiny

import mtp
from model import generate
from mtp import speculative_generate

KINDS = [("sequential", 1), ("sequential", 2), ("parallel", 2), ("sequential", 3), ("parallel", 3)]


def taught(design, depth, steps=50):
    """A tiny trunk, prompts, what it says to them greedily, and heads that have learnt most of that."""
    model, _ = tiny(vocab=5, depth=1, seed=33)  # a trunk whose responses are of all lengths
    _, heads = tiny(vocab=5, depth=depth, design=design)
    prompts = [random.Random(i).choices(range(1, 5), k=1 + i % 6) for i in range(60)]
    plain = generate(model, prompts, 1, 10, eos=0, temperature=0)
    optimizer = torch.optim.Adam(heads.parameters(), 0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        _, logp_BKT, _ = mtp.logprobs(model, heads, plain["tokens"], plain["mask"])
        (-logp_BKT.sum() / mtp.aligned_mask(plain["mask"], depth).sum()).backward()
        optimizer.step()
    return model, heads, prompts, plain


@pytest.mark.parametrize("design, depth", KINDS)
def test_greedy_is_plain_greedy(design, depth):
    """With ragged prompts, ends inside drafts, and the length limit; log-probs are the trunk's."""
    model, heads, prompts, plain = taught(design, depth)
    drafted = speculative_generate(model, heads, prompts, 1, 10, eos=0, temperature=0)
    assert torch.equal(plain["tokens"], drafted["tokens"])
    assert torch.equal(plain["mask"], drafted["mask"])
    torch.testing.assert_close(plain["logp"], drafted["logp"], rtol=0, atol=1e-5)
    lengths = plain["mask"].sum(1)
    assert lengths.min() < 5 and lengths.max() == 10  # some end, some run to the limit
    drafted_ends = (drafted["draft"] > 0) & (drafted["tokens"][:, 1:] == 0)
    assert drafted_ends.sum() > 5


@pytest.mark.parametrize("design, depth", KINDS)
def test_drafts_are_what_the_heads_say_of_the_true_tokens(design, depth):
    """No rejected draft stays in the heads' caches. That would still be lossless, with a worse drafter."""
    model, heads, prompts, _ = taught(design, depth, steps=8)
    out = speculative_generate(model, heads, prompts, 1, 10, eos=0, temperature=0)
    tokens, rejected = out["tokens"], 0
    said = model.logits(heads(model.hidden(tokens), model.wte(tokens))).argmax(-1)  # (B, K, T-1)
    for b in range(len(prompts)):
        response = (1 + out["mask"][b].nonzero().flatten()).tolist()
        k = 1  # the head whose turn it is; behind the last one's draft the trunk speaks
        for t in response[1:]:
            accepted = k <= depth and bool(said[b, k - 1, t - 1] == tokens[b, t])
            assert out["draft"][b, t - 1] == (k if accepted else 0)
            rejected += k <= depth and not accepted
            k = k + 1 if accepted else 1
    assert rejected > 20 and (out["draft"] == depth).sum() > 10


def chi2_against_the_trunk(design, depth, temperature, n=60_000):
    """χ² of samples against the trunk's probabilities of all 3^3 responses; how often a first draft came out."""
    model, heads = tiny(vocab=3, depth=depth, design=design)
    prompt, no_end = torch.tensor([[1, 2, 1]]), 99
    out = speculative_generate(model, heads, prompt.tolist(), n, 3, no_end, temperature)
    responses = torch.cartesian_prod(*[torch.arange(3)] * 3)  # ordered as numbers in base 3
    rows = torch.cat((prompt.expand(27, 3), responses), 1)
    probs = plain_logp(model, rows, temperature)[:, 2:].sum(1).exp()
    assert n * probs.min() > 5  # what the test needs
    chi2 = chi_square(out["tokens"][:, 3:] @ torch.tensor([9, 3, 1]), probs)
    return chi2, mtp.speculation_metrics(out["mask"], out["draft"], depth)["spec/accept_rate_1"]


@pytest.mark.parametrize("design, depth, temperature", [
    ("sequential", 1, 1.0), ("sequential", 2, 1.4), ("parallel", 2, 1.0),
])  # fmt: skip
def test_samples_have_the_trunks_distribution(design, depth, temperature):
    chi2, accepted = chi2_against_the_trunk(design, depth, temperature)
    assert chi2 < 54.1  # the 99.9 % point of chi-square with 3^3 - 1 degrees of freedom
    assert 0.05 < accepted < 0.95


def test_exact_match_is_told_apart(monkeypatch):
    """Accepting a draft because the trunk likes it best is not lossless at a temperature above 0."""
    monkeypatch.setattr(mtp, "accepts", lambda log_p, log_q, draft, *_: draft == log_p.argmax(-1))
    assert chi2_against_the_trunk("sequential", 1, 1.0)[0] > 1000


def test_the_residual_and_acceptance_give_the_trunks_distribution():
    """Leviathan et al., theorem 1, by adding up: q min(1, p/q) + P(rejected) · residual = p."""
    p, q = torch.rand(2, 20, 6, dtype=torch.float64).log().softmax(-1)
    accept = torch.minimum(torch.ones(()), p / q)
    u = (torch.arange(4000, dtype=torch.float64)[:, None] + 0.5) / 4000
    for v in range(6):  # `accepts` says yes for this share of uniform numbers
        yes = mtp.accepts(p.log()[:1, None], q.log()[:1, None], torch.full((1, 1), v), 1.0, u)
        assert yes.double().mean().item() == pytest.approx(accept[0, v].item(), abs=1e-3)
    residual = mtp.after_rejection(p.log(), q.log()).softmax(1)
    rejected = 1 - (q * accept).sum(1, keepdim=True)
    torch.testing.assert_close(q * accept + rejected * residual, p)
    torch.testing.assert_close(mtp.after_rejection(p.log(), p.log()), p.log())  # nothing left: p


@pytest.mark.parametrize("speculative", (False, True))
def test_a_sample_depends_on_its_own_prompt_and_uniform_numbers_only(speculative):
    """Not on which other rows share its batch, how long their prompts are, or when they end."""
    model, heads = tiny(vocab=7, depth=3)
    prompts, u = [[1, 2, 3], [4], [5, 6, 5, 4, 3], [2, 2]], torch.rand(40, 9, 3)

    def sample(prompts, n, u):
        if speculative:
            return speculative_generate(model, heads, prompts, n, 9, 0, 0.6, u)
        return generate(model, prompts, n, 9, 0, 0.6, u[..., 0])

    together = sample(prompts, 10, u)
    assert together["mask"].sum(1).max() == 9  # no draft goes over the limit
    logp, _, _ = mtp.logprobs(model, None, together["tokens"], together["mask"], 0.6)
    torch.testing.assert_close(together["logp"], logp, rtol=0, atol=1e-5)
    for row in range(40):
        alone = sample([prompts[row // 10]], 1, u[row : row + 1])
        for name, x in alone.items():
            torch.testing.assert_close(together[name][row, : x.size(1)], x[0], rtol=0, atol=1e-5)
            assert not together[name][row, x.size(1) :].any()  # no draft is left behind


def test_metrics_of_three_samples_counted_by_hand():
    """-1 is outside of the response. A round gives drafts 1, 2, .. and, if the row goes on, one more."""
    drafts = torch.tensor([
        [-1, 0, 1, 2, 0, 0, 1, 0],  # the prompt's token, then rounds of two drafts, none, and one
        [0, 1, -1, -1, -1, -1, -1, -1],  # the prompt's token; an end in the first draft
        [-1, -1, 0, -1, -1, -1, -1, -1],  # an end at once: no round
    ])  # fmt: skip
    metrics = mtp.speculation_metrics(drafts >= 0, drafts.clamp(min=0), 2)
    expected = {"spec/accept_rate_1": 3 / 4, "spec/accept_rate_2": 1 / 4, "spec/accept_len": 7 / 4}
    assert metrics == pytest.approx(expected | {"spec/tokens_per_call": 10 / (4 + 3)})
