"""Random cases: sizes, padding, masks, seeds. What must hold for all of them, against loops in plain Python."""

import functools
import math
import random

import numpy as np
import pytest
import torch
from conftest import tiny

import model as gpt
import mtp
import occ
import rl


def cases(n):
    """Run a test n times with a random.Random of its own each; on failure its seed is named."""

    def decorate(test):
        @functools.wraps(test)
        def run_all(*args, **kwargs):
            for seed in range(n):
                torch.manual_seed(seed)
                try:
                    test(random.Random(seed), *args, **kwargs)
                except Exception as error:
                    raise AssertionError(f"seed {seed} of {test.__name__}: {error}") from error

        del run_all.__wrapped__  # or pytest would look for a fixture called rng
        return run_all

    return decorate


def random_batch(rng, B=None, vocab=11, longest=9):
    """Right-padded tokens (B, T) and mask (B, T-1) of responses of 0 to some tokens, with columns of padding behind."""
    B = B or rng.randint(1, 5)
    prompts = [rng.randint(1, 4) for _ in range(B)]
    lengths = [p + rng.choice((0, rng.randint(1, longest - 4))) for p in prompts]
    T = max(max(lengths), 2) + rng.choice((0, 0, 3))
    t = torch.arange(T)
    tokens = torch.randint(1, vocab, (B, T)) * (t < torch.tensor(lengths)[:, None])
    mask = (t >= torch.tensor(prompts)[:, None]) & (t < torch.tensor(lengths)[:, None])
    return tokens, mask[:, 1:]


def test_a_failure_names_its_seed():
    @cases(5)
    def test_odd(rng):
        assert rng.random() < 0.8

    with pytest.raises(AssertionError, match="seed [0-4] of test_odd"):  # random.Random(0).random() is 0.84
        test_odd()


# Losses


def loss_by_loop(logp, old, adv, mask, weight, algo):
    """-sum w min(r A, clip(r) A) with dual clipping, one token after the other."""
    total = 0.0
    for b in range(len(adv)):
        columns = [t for t in range(mask.size(1)) if mask[b, t]]
        mean = sum((logp[b, t] - old[b, t]).item() for t in columns) / max(len(columns), 1)
        for t in columns:
            A, log_ratio = adv[b].item(), mean if algo.ratio == "sequence" else (logp[b, t] - old[b, t]).item()
            r = math.exp(log_ratio)
            objective = min(r * A, min(max(r, 1 - algo.clip_eps_low), 1 + algo.clip_eps_high) * A)
            objective = max(objective, algo.dual_clip * A) if A < 0 else objective
            objective = A * logp[b, t].item() if algo.ratio == "none" else objective
            total -= weight[b, t].item() * objective
    return total


@cases(250)
def test_policy_loss(rng):
    _, mask = random_batch(rng)
    B, S = mask.shape
    algo = rl.ALGOS[rng.choice(list(rl.ALGOS))]
    spread = rng.choice((1e-3, 0.3, 5.0))
    old = -3 * torch.rand(B, S, dtype=torch.double)
    logp = (old + spread * torch.randn(B, S, dtype=torch.double)).requires_grad_()
    adv = torch.randn(B, dtype=torch.double) * rng.choice((0.0, 1.0, 1.0))
    weight = rl.token_weights(mask, algo.loss_agg, 10).double()
    loss, stats = rl.policy_loss(logp, old, adv, mask, weight, algo)
    assert loss.item() == pytest.approx(loss_by_loop(logp, old, adv, mask, weight, algo), rel=1e-9, abs=1e-12)
    (grad,) = torch.autograd.grad(loss, logp)
    assert torch.isfinite(grad).all() and (grad[~mask] == 0).all()
    assert 0 <= stats["clip_frac_low"] <= 1 and 0 <= stats["clip_frac_high"] <= 1
    # what lies outside the mask does not count
    noise = torch.where(mask, 0.0, torch.randn(B, S, dtype=torch.double) * 9)
    assert rl.policy_loss(logp + noise, old - noise, adv, mask, weight, algo)[0].item() == pytest.approx(loss.item())
    # shares of a minibatch add up to the whole
    cut, count = rng.randint(0, B), mask.sum()
    shares = [
        rl.policy_loss(logp[r], old[r], adv[r], mask[r], weight[r], algo, count) for r in (slice(cut), slice(cut, None))
    ]
    assert sum(share.item() for share, _ in shares) == pytest.approx(loss.item(), abs=1e-12)
    for name in ("clip_frac_low", "clip_frac_high"):
        assert sum(s[name].item() for _, s in shares) == pytest.approx(stats[name].item(), abs=1e-6)
    assert max(s["ratio_max"] for _, s in shares) == stats["ratio_max"]


@cases(150)
def test_token_weights_and_advantages(rng):
    _, mask = random_batch(rng)
    for agg in ("token", "sequence", "constant"):
        weight = rl.token_weights(mask, agg, 10)
        assert (weight[~mask] == 0).all() and (weight[mask] > 0).all()
    filled = mask.any(1).float().mean().item()
    assert rl.token_weights(mask, "token", 10).sum().item() == pytest.approx(float(mask.any()))
    assert rl.token_weights(mask, "sequence", 10).sum().item() == pytest.approx(filled)
    P, G = rng.randint(1, 5), rng.randint(2, 9)
    reward = torch.rand(P, G) if rng.random() < 0.5 else torch.rand(P, G).round()
    equal = rng.randrange(P)
    reward[equal] = rng.choice((0.1, 0.3, 1 / 3, 1.0))
    for kind in ("group_std", "group", "loo"):
        adv = rl.advantages(reward, kind)
        assert (adv[equal] == 0).all() and torch.isfinite(adv).all()
        torch.testing.assert_close(adv.sum(1), torch.zeros(P), rtol=0, atol=1e-4)
        moved = rl.advantages(reward + 2, kind)
        torch.testing.assert_close(moved, adv, rtol=1e-3, atol=1e-4)
        assert ((adv[:, :, None] < adv[:, None]) <= (reward[:, :, None] < reward[:, None])).all()  # order is kept
    logp, ref = -torch.rand(2, 3, 4)
    assert rl.k3_kl(logp, ref, torch.rand(3, 4)) >= 0 == rl.k3_kl(logp, logp, torch.rand(3, 4))


@cases(150)
def test_losses_of_shares_add_up_and_padding_does_not_matter(rng):
    """The joint loss, its gradients and its δ, with empty responses among the rows."""
    K, design = rng.randint(1, 3), rng.choice(("sequential", "parallel"))
    model, heads = tiny(vocab=11, layers=1, depth=K, design=design, seed=rng.randrange(99))
    G = 2
    tokens, mask = random_batch(rng, B=2 * G)
    algo, objective = rl.ALGOS[rng.choice(list(rl.ALGOS))], rng.choice(("ce", "policy"))
    cfg = type(
        "Cfg", (), dict(temperature=1.0, logp_impl=rng.choice(("naive", "chunked")), mtp_base="mtp", mtp_learn=None)
    )
    cfg.updates_per_rollout, cfg.num_generations, cfg.max_new_tokens = 1, G, 9
    pad = torch.nn.functional.pad
    samples = rl.Samples(tokens, pad(mask, (1, 0)), pad(mask * -1.0, (1, 0)))
    (mb,), _ = rl.minibatches(model, heads, samples, torch.randn(2 * G), algo, cfg)
    with torch.no_grad():
        for p in [*model.parameters(), *heads.parameters()]:
            p.add_(0.02 * torch.randn_like(p))

    def run(part):
        out = rl.losses(model, heads, part, algo, objective, cfg, False, 1.0)
        return out, occ.flat_grad(out.rl + out.mtp, [*model.parameters(), *heads.parameters()])

    whole, grad = run(mb)
    assert all(torch.isfinite(value).all() for value in (grad, *whole.stats.values()))
    wider = mb._replace(**{n: pad(x, (0, 2)) for n, x in mb._asdict().items() if n.endswith("T")})
    order = rng.sample(range(2 * G), 2 * G)
    cut = rng.randint(0, 2 * G)
    shares = [run(mb.rows(slice(cut))), run(mb.rows(slice(cut, None)))]
    for other in (run(wider), run(mb.rows(order))):
        torch.testing.assert_close(other[1], grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(shares[0][1] + shares[1][1], grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(
        torch.cat([out.delta_mtp_N for out, _ in shares]), whole.delta_mtp_N, rtol=1e-3, atol=1e-5
    )


# Alignment


@cases(200)
def test_alignment(rng):
    """Column t scores token t+1 from what each depth may see; a sequence gives the same in any batch."""
    K, design = rng.randint(1, 3), rng.choice(("sequential", "parallel"))
    model, heads = tiny(vocab=11, layers=1, depth=K, design=design, tied=rng.random() < 0.5, seed=rng.randrange(99))
    tokens, mask = random_batch(rng)
    with torch.no_grad():
        logp, logp_k, mask_k, _ = mtp.logprobs(model, heads, tokens, mask)
        b = rng.randrange(len(tokens))
        for t in mask[b].nonzero().flatten().tolist():
            seen = tokens[b : b + 1, : t + 1]
            expected = model(seen)[0, -1].log_softmax(-1)[tokens[b, t + 1]]
            torch.testing.assert_close(logp[b, t], expected, rtol=0, atol=1e-4)
            # one token more, for the heads to be asked about; what it is must not matter to them
            asked = torch.cat((seen, torch.full((1, 1), rng.randint(1, 10))), 1)
            depths = heads(model.hidden(asked), model.wte(asked), model.rope(asked.size(1)))
            for k in range(1, K + 1):
                assert mask_k[k - 1, b, t] == (t >= k)
                if t >= k:  # the last position of depth k predicts the last token
                    expected = model.logits(depths[k - 1])[0, -1].log_softmax(-1)[tokens[b, t + 1]]
                    torch.testing.assert_close(logp_k[k - 1, b, t], expected, rtol=0, atol=1e-4)
    assert (logp[~mask] == 0).all() and (logp_k[~mask_k] == 0).all() and not (mask_k & ~mask).any()


# λ


@cases(250)
def test_coefficients(rng):
    n = rng.randint(1, 60)
    scale = 10 ** rng.uniform(-3, 1)
    rl_, mtp_ = scale * torch.randn(2, n)
    rl_ = rl_ + rng.choice((0, 0.3, 1)) * mtp_
    for coefficient in (occ.logprob_coefficient, occ.hidden_coefficient):
        lam = coefficient(rl_, mtp_, eps=0.0).item()
        fit = np.linalg.lstsq(mtp_[:, None].double().numpy(), rl_.double().numpy(), rcond=None)[0][0]
        assert lam == pytest.approx(fit, rel=1e-9, abs=1e-12)
        assert coefficient(3 * rl_, mtp_, eps=0.0).item() == pytest.approx(3 * lam, rel=1e-5)
        assert coefficient(rl_, 2 * mtp_, eps=0.0).item() == pytest.approx(lam / 2, rel=1e-5)
        assert coefficient(rl_, mtp_, lam_plus=-0.5, eps=0.0).item() == pytest.approx(-lam / 2)
        order = torch.randperm(n)
        assert coefficient(rl_[order], mtp_[order], eps=0.0).item() == pytest.approx(lam, rel=1e-9, abs=1e-12)
        assert coefficient(torch.zeros(n), torch.zeros(n)).item() == 0
    ratios = occ.logprob_coefficient(rl_, mtp_, eps=1e-8, average="ratios").item()
    by_hand = sum(a * b / (b * b + 1e-8) for a, b in zip(rl_.double().tolist(), mtp_.double().tolist())) / n
    assert ratios == pytest.approx(by_hand, rel=1e-6)
    # the top of the parabola: no other λ gives more
    c, v2, eta, L = rng.uniform(-2, 2), rng.uniform(0.1, 5), 0.01, rng.uniform(1, 90)
    best = occ.lam_star(c, v2, eta, L)
    assert occ.delta_mtp(best, c, v2, eta, L) >= occ.delta_mtp(best + rng.uniform(-1, 1), c, v2, eta, L)
    terms = occ.exact_terms(rl_, mtp_)
    assert abs(terms["cos"]) <= 1 + 1e-6 and terms["lam_star"] == pytest.approx(
        occ.hidden_coefficient(rl_, mtp_).item()
    )


@cases(40)
def test_scale_grad_is_the_identity_forward_and_lambda_backward(rng):
    x, lam = torch.randn(rng.randint(1, 9), requires_grad=True), rng.choice((0.0, 1.0, rng.uniform(-2, 2)))
    for given in (lam, torch.tensor(lam)):
        y = occ.scale_grad(x, given)
        assert torch.equal(y, x)
        grad = torch.autograd.grad((y * x.detach()).sum() + 0 * x.sum(), x)[0]
        torch.testing.assert_close(grad, lam * x.detach())


# Sampler and log-probs


@cases(100)
def test_sampler(rng):
    """Log-probs are those of a forward pass, and a row's sample depends on its prompt and its numbers alone."""
    model, _ = tiny(vocab=7, layers=1, block=16, seed=rng.randrange(99))
    G, R, temperature, eos = rng.randint(1, 4), rng.randint(1, 8), rng.choice((0, 0.5, 1.0, 1.7)), rng.randrange(7)
    prompts = [[rng.randrange(7) for _ in range(rng.randint(1, 5))] for _ in range(rng.randint(1, 4))]
    u = torch.rand(len(prompts) * G, R)
    samples = gpt.generate(model, prompts, G, R, eos, temperature, u, keep_hidden=True)
    with torch.no_grad():
        logp = (model(samples.tokens_BT) / (temperature or 1)).log_softmax(-1)[:, :-1]
    logp = logp.gather(-1, samples.tokens_BT[:, 1:, None]).squeeze(-1)
    mask = samples.mask_BT[:, 1:]
    torch.testing.assert_close(samples.logp_BT[:, 1:][mask], logp[mask], rtol=0, atol=1e-4)
    assert (samples.logp_BT[~samples.mask_BT] == 0).all() and not samples.mask_BT[:, 0].any()
    for i, row in enumerate(samples.tokens_BT[samples.mask_BT].split(samples.mask_BT.sum(1).tolist())):
        assert 1 <= len(row) <= R and eos not in row[:-1] and (len(row) == R or row[-1] == eos)
        assert samples.tokens_BT[i, : len(prompts[i // G])].tolist() == prompts[i // G]
    b = rng.randrange(len(u))
    alone = gpt.generate(model, [prompts[b // G]], 1, R, eos, temperature, u[b : b + 1])
    assert torch.equal(alone.tokens_BT[alone.mask_BT], samples.tokens_BT[b][samples.mask_BT[b]])


@cases(100)
def test_linear_logp(rng):
    """Values and gradients of every implementation against float64, for any upstream gradient."""
    N, C, V, temperature = rng.randint(0, 40), rng.randint(1, 20), rng.randint(2, 90), rng.choice((1.0, 0.3, 2.0))
    h, W = torch.randn(N, C) * rng.choice((0.1, 1, 5)), torch.randn(V, C)
    target, upstream = torch.randint(V, (N,)), torch.randn(N) * (torch.rand(N) < 0.7)
    hd, Wd = h.double().requires_grad_(), W.double().requires_grad_()
    expected = (hd @ Wd.T / temperature).log_softmax(-1).gather(-1, target[:, None]).squeeze(-1)
    exact = torch.autograd.grad(expected, (hd, Wd), upstream.double())
    before, mtp.CHUNK_LOGITS = mtp.CHUNK_LOGITS, rng.choice((1, 50, 10_000))
    try:
        for impl in ("naive", "chunked"):
            hf, Wf = h.clone().requires_grad_(), W.clone().requires_grad_()
            logp = mtp.linear_logp(hf, Wf, target, temperature, impl)
            torch.testing.assert_close(logp.double(), expected, rtol=1e-5, atol=1e-4)
            for got, want in zip(torch.autograd.grad(logp, (hf, Wf), upstream), exact):
                torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-3)
    finally:
        mtp.CHUNK_LOGITS = before
