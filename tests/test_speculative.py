"""Speculative sampling changes how often the trunk runs, and nothing else."""

import random

import pytest
import torch
from conftest import tiny

import eval as evaluation
import mtp
import rl
import train
from model import generate

KINDS = [("sequential", 1, 2), ("sequential", 2, 2), ("sequential", 2, 5), ("parallel", 2, 2), ("sequential", 3, 1)]


def taught(design, depth):
    """A tiny trunk, prompts, what it says to them greedily, and heads that have learnt most of that."""
    model, heads = tiny(vocab=5, depth=depth, design=design, seed=5)  # a trunk whose responses are of all lengths
    prompts = [[random.Random(i).randrange(1, 5) for _ in range(1 + i % 6)] for i in range(60)]
    plain = generate(model, prompts, 1, 10, eos=0, temperature=0, keep_hidden=True)
    optimizer = torch.optim.Adam(heads.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        _, logp_KBT, mask_KBT, _ = mtp.logprobs(model, heads, plain.tokens_BT, plain.mask_BT[:, 1:])
        (-logp_KBT.sum() / mask_KBT.sum()).backward()
        optimizer.step()
    return model, heads, prompts, plain


@pytest.mark.parametrize("design, depth, drafts", KINDS)
def test_greedy_is_plain_greedy(design, depth, drafts, monkeypatch):
    """Ragged prompts, ends inside drafts, and the length limit; log-probs and hidden states are the trunk's."""
    model, heads, prompts, plain = taught(design, depth)
    spec, accepts, ends = mtp.Speculator(heads, drafts), mtp.accepts, []

    def count_ends(log_p, log_q, draft, *rest):
        good = accepts(log_p, log_q, draft, *rest)
        ends.append((good.long().cumprod(1).bool() & (draft == 0)).sum().item())
        return good

    monkeypatch.setattr(mtp, "accepts", count_ends)
    drafted = spec.generate(model, prompts, 1, 10, 0, 0, torch.rand(60, 10, 3), keep_hidden=True)
    assert torch.equal(plain.tokens_BT, drafted.tokens_BT) and torch.equal(plain.mask_BT, drafted.mask_BT)
    assert 1 < plain.mask_BT.sum(1).float().mean() < 10  # some end, some run to the limit
    torch.testing.assert_close(plain.logp_BT, drafted.logp_BT, rtol=0, atol=1e-5)
    assert spec.metrics()["spec/accept_len"] > 1.2 and sum(ends) > 5  # and some end with a draft
    continued = torch.nn.functional.pad(plain.mask_BT[:, 1:], (0, 1))  # states of tokens that something follows
    torch.testing.assert_close(plain.h_BTC[continued], drafted.h_BTC[continued], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("design, depth, drafts", KINDS)
def test_drafts_come_from_the_true_tokens(design, depth, drafts, monkeypatch):
    """After rejections too, every head drafts what it would from scratch: no state of a rejected draft is left in its
    cache. A wrong one would still be lossless, only a worse drafter."""
    model, heads, prompts, _ = taught(design, depth)
    spec, accepts, rounds = mtp.Speculator(heads, drafts), mtp.accepts, []
    monkeypatch.setattr(mtp, "accepts", lambda *args: rounds.append((*args[1:3], accepts(*args))) or rounds[-1][2])
    for prompt in prompts[:8]:
        rounds.clear()
        tokens = spec.generate(model, [prompt], 1, 12, 99, 1.0, torch.rand(1, 12, 3)).tokens_BT[0]  # 99: no end
        last, rejected = len(prompt), 0
        for log_q_BKV, draft_BK, good_BK in rounds:
            row = torch.cat((tokens[: last + 1], draft_BK[0]))[None]
            with torch.no_grad():
                states = heads(model.hidden(row), model.wte(row), model.rope(row.size(1)))
                for k in range(min(depth, drafts)):
                    expected = model.logits(states[k][0, last - 1]).log_softmax(-1)
                    torch.testing.assert_close(log_q_BKV[0, k], expected, rtol=0, atol=1e-4)
            accepted = int(good_BK.long().cumprod(1).sum())
            rejected += drafts - accepted
            last += accepted + 1
        assert rejected > 0 and len(rounds) > 2


def test_greedy_on_every_suite_with_scrambled_heads():
    """2004 different problems over all suites, of a base that has learnt a little; heads that know, and that do not."""
    cfg = train.Config(n_layer=2, pretrain_steps=150, pretrain_batch=64, device="cpu", mtp_depth=2)
    tok = rl.get_tokenizer("bytes")
    model, heads = evaluation.build(cfg, tok, "cpu")
    train.pretrain(cfg, tok, model, heads, torch.device("cpu"), ())
    stream, problems = rl.problem_stream(rl.suites_of(cfg.task), cfg.difficulty, random.Random(0)), {}
    while len(problems) < 2004:
        problem = next(stream)
        problems[problem.prompt] = problem.suite
    assert set(problems.values()) == set(rl.ARITHMETIC)
    prompts = [tok.encode_ordinary(prompt) for prompt in problems]
    plain = generate(model, prompts, 1, cfg.max_new_tokens, tok.eot_token, temperature=0)
    lengths = []
    for scrambled in (False, True):
        if scrambled:
            for p in heads.parameters():
                torch.nn.init.normal_(p)
        spec = mtp.Speculator(heads, 2)
        drafted = spec.generate(
            model, prompts, 1, cfg.max_new_tokens, tok.eot_token, 0, torch.rand(2004, cfg.max_new_tokens, 3)
        )
        assert torch.equal(plain.tokens_BT, drafted.tokens_BT) and torch.equal(plain.mask_BT, drafted.mask_BT)
        lengths.append(spec.metrics()["spec/accept_len"])
    assert lengths[0] > lengths[1] + 0.2


def sequences(samples, prompt, R, V):
    """A number for each sample, 0 standing for what comes after its end."""
    tokens, mask = (torch.nn.functional.pad(x, (0, prompt + R - x.size(1)))[:, prompt:] for x in samples[:2])
    return (torch.where(mask, tokens + 1, 0) * (V + 1) ** torch.arange(R)).sum(1)


def p_value(a, b, bins):
    """Of the χ² test that two samples of numbers below `bins` have one distribution; rare ones count together."""
    counts = torch.stack([torch.bincount(x, minlength=bins).double() for x in (a, b)])
    common = counts.sum(0) >= 10
    counts = torch.cat((counts[:, common], counts[:, ~common].sum(1, keepdim=True)), 1)
    counts = counts[:, counts.sum(0) > 0]
    chi2 = ((counts[0] - counts[1]) ** 2 / counts.sum(0)).sum()  # samples of one size
    return torch.special.gammaincc(torch.tensor((counts.size(1) - 1) / 2).double(), chi2 / 2).item()


def frequencies(design, depth, drafts, temperature, n=100_000, V=4, R=3):
    """p-values of speculative against plain sampling, for the second token and for whole sequences of up to R, and how
    often a first draft came out."""
    model, heads = tiny(vocab=V, depth=depth, design=design, block=12)
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    plain = sequences(generate(model, [[1, 2, 3]], n, R, 0, temperature), 3, R, V)
    spec = mtp.Speculator(heads, drafts)
    drafted = sequences(spec.generate(model, [[1, 2, 3]], n, R, 0, temperature, torch.rand(n, R, 3)), 3, R, V)
    # the second token is the first that a head drafts
    second = [x // (V + 1) % (V + 1) for x in (plain, drafted)]
    return p_value(*second, V + 1), p_value(plain, drafted, (V + 1) ** R), spec.metrics()["spec/accept_rate_1"]


@pytest.mark.parametrize(
    "design, depth, drafts, temperature",
    [(*kind, 1.0) for kind in (*KINDS[:2], KINDS[3])] + [("sequential", 1, 3, 0.6)],
)
def test_sampling_has_the_distribution_of_plain_sampling(design, depth, drafts, temperature):
    token, sequence, accepted = frequencies(design, depth, drafts, temperature)
    assert token > 0.001 and sequence > 0.001 and 0.05 < accepted < 0.95


def test_exact_match_is_told_apart(monkeypatch):
    """Accepting a draft because the trunk likes it best is not lossless at a temperature above 0."""
    monkeypatch.setattr(mtp, "accepts", lambda log_p, log_q, draft, *_: draft == log_p.argmax(-1))
    token, sequence, _ = frequencies(*KINDS[0], 1.0)
    assert token < 1e-6 and sequence < 1e-6


def test_the_residual_and_acceptance_give_the_trunks_distribution():
    """Leviathan et al., theorem 1, by adding up: q min(1, p/q) + P(rejected) · residual = p."""
    p, q = torch.rand(20, 6, dtype=torch.float64), torch.rand(20, 6, dtype=torch.float64)
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    accept = torch.minimum(torch.ones(()), p / q)
    u = torch.linspace(0, 1, 4001)[:-1].double().expand(6, -1) + 1 / 8000
    for v in range(6):  # `accepts` says yes for this share of uniform numbers
        yes = mtp.accepts(p.log()[:1, None], q.log()[:1, None], torch.full((1, 1), v), 1.0, u[v][:, None, None])
        assert yes.double().mean().item() == pytest.approx(accept[0, v].item(), abs=1e-3)
    residual = mtp.after_rejection(p.log(), q.log()).softmax(1)
    rejected = 1 - (q * accept).sum(1, keepdim=True)
    torch.testing.assert_close(q * accept + rejected * residual, p)
    torch.testing.assert_close(mtp.after_rejection(p.log(), p.log()), p.log())  # nothing left: p


def test_a_sample_does_not_depend_on_its_batch():
    model, heads = tiny(vocab=7, depth=1)
    prompts, u = [[1, 2, 3], [4], [5, 6, 5, 4, 3], [2, 2]], torch.rand(8, 9, 3)
    spec = mtp.Speculator(heads, 3)
    together = spec.generate(model, prompts, 2, 9, 0, 1.0, u)
    for i, prompt in enumerate(prompts):
        alone = spec.generate(model, [prompt], 2, 9, 0, 1.0, u[2 * i : 2 * i + 2])
        for row in range(2):
            tokens, mask = together.tokens_BT[2 * i + row], together.mask_BT[2 * i + row]
            assert tokens[mask].tolist() == alone.tokens_BT[row][alone.mask_BT[row]].tolist()
    length = torch.tensor([len(p) for p in prompts]).repeat_interleave(2)
    past = torch.arange(together.tokens_BT.size(1)) >= (length + together.mask_BT.sum(1))[:, None]
    assert (together.tokens_BT[past] == 0).all() and together.mask_BT.sum(1).max() <= 9  # no draft is left behind


def test_logprobs_of_a_sample_are_the_trunks_at_its_temperature():
    model, heads = tiny(vocab=7, depth=1)
    drafted = mtp.Speculator(heads, 2).generate(model, [[1, 2, 3], [4]], 8, 9, 0, 0.6, torch.rand(16, 9, 3))
    logp = mtp.logprobs(model, None, drafted.tokens_BT, drafted.mask_BT[:, 1:], 0.6)[0]
    torch.testing.assert_close(drafted.logp_BT[:, 1:], logp, rtol=0, atol=1e-5)


def test_metrics_count_the_bonus_token_and_start_again():
    model, heads = tiny(vocab=5, depth=1)
    spec = mtp.Speculator(heads, 2)
    samples = spec.generate(model, [[1, 2]] * 50, 1, 8, 0, 1.0, torch.rand(50, 8, 3))
    *accepted, rounds, tokens, firsts = spec.counts.tolist()
    metrics = spec.metrics()
    assert tokens + firsts == samples.mask_BT.sum() and firsts == 50
    assert metrics["spec/accept_len"] == tokens / rounds > 1
    assert metrics["spec/tokens_per_call"] == pytest.approx((tokens + 50) / (rounds + 50))
    assert metrics["spec/accept_rate_2"] == accepted[1] / rounds <= metrics["spec/accept_rate_1"]
    # a round's tokens are its drafts that came out and one of the trunk's, unless the row ended with a draft
    ended_with_a_draft = 1 + sum(accepted) / rounds - metrics["spec/accept_len"]
    assert 0 <= ended_with_a_draft < 50 / rounds
    assert spec.counts.sum() == 0


def test_runs_with_speculation_train_and_score(small, capsys):
    cfg = small(speculative=2, mtp_depth=1, regime="occ")
    assert train.main(cfg) == 0
    _, records = evaluation.read_metrics(cfg.out)
    assert all(1 <= r["spec/accept_len"] <= 3 and r["rollout/logp_gap"] < 1e-4 for r in records if r["step"] > 0)
    args = evaluation.parse(["score", cfg.out, "--k", "2", "--problems", "2", "--speculative", "1"])
    evaluation.main(args)
    assert "spec/accept_rate_1" in capsys.readouterr().out
    for changes, line in (
        (dict(regime="off"), "--speculative 2: must be at most 0"),
        (dict(mtp_design="parallel"), "--speculative 2: must be at most 1"),
    ):
        with pytest.raises(ValueError, match=line):
            small("other", speculative=2, **changes)
    off = small("off", regime="off", steps=1)
    train.main(off)
    with pytest.raises(ValueError, match="has no heads to draft with"):
        evaluation.main(evaluation.parse(["score", off.out, "--speculative", "1"]))
