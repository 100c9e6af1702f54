"""The paper's equations, and which part of the trunk each regime lets the MTP gradient reach."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import batch, tiny

import mtp
import occ
import rl

# scale_grad


@pytest.mark.parametrize("lam", (2.5, -1.0, 1.0, 0.0))
def test_scale_grad(lam):
    x = torch.randn(3, requires_grad=True)
    y = occ.scale_grad(x, lam)
    assert torch.equal(y, x)
    if lam == 0:
        assert not y.requires_grad  # the graph is cut
    else:
        assert torch.equal(torch.autograd.grad(y.square().sum(), x)[0], lam * 2 * x)


def test_scale_grad_reads_a_tensor_in_the_backward():
    x, lam = torch.randn(3, requires_grad=True), torch.ones(())
    y = occ.scale_grad(x, lam).square().sum()
    lam.fill_(-0.3)
    torch.testing.assert_close(torch.autograd.grad(y, x)[0], -0.6 * x)


def test_lambda_zero_stops_what_is_not_finite():
    x, lam = torch.zeros(3, requires_grad=True), torch.zeros(())
    y = occ.scale_grad(x, lam).sqrt().sum()  # gradient inf at 0
    assert torch.equal(torch.autograd.grad(y, x)[0], torch.zeros(3))
    assert torch.isnan(torch.full((3,), torch.inf) * lam).all()  # multiplying would not


# Coefficients


def test_lambda_is_the_least_squares_coefficient():
    rl_, mtp_ = torch.randn(200), torch.randn(200)
    rl_ = rl_ + 0.4 * mtp_
    expected = torch.linalg.lstsq(mtp_[:, None], rl_[:, None]).solution.item()
    assert occ.logprob_coefficient(rl_, mtp_).item() == pytest.approx(expected, rel=1e-5)
    assert occ.logprob_coefficient(rl_, mtp_, lam_plus=0.5).item() == pytest.approx(expected / 2, rel=1e-5)
    assert occ.logprob_coefficient(-rl_, mtp_) < 0  # λ may be negative
    assert occ.hidden_coefficient(rl_, mtp_).item() == pytest.approx(expected, rel=1e-5)


def test_lambda_without_change_is_zero():
    zero = torch.zeros(10)
    assert occ.logprob_coefficient(zero, zero) == 0 and occ.hidden_coefficient(zero, zero) == 0
    assert occ.logprob_coefficient(zero[:0], zero[:0]) == 0
    assert occ.logprob_coefficient(zero[:0], zero[:0], average="ratios") == 0


def test_hidden_gradients_are_small_and_epsilon_smaller():
    a = 1e-6 * torch.randn(100)
    assert occ.hidden_coefficient(a, a).item() == pytest.approx(1.0)


def test_mean_of_ratios_is_the_released_code_and_is_noisier():
    deltas = [(torch.randn(300), torch.randn(300)) for _ in range(200)]
    a, b = deltas[0]
    by_hand = sum(x * y / (y * y + 1e-8) for x, y in zip(a.tolist(), b.tolist())) / 300
    assert occ.logprob_coefficient(a, b, average="ratios").item() == pytest.approx(by_hand, rel=1e-4)
    spread = {
        how: torch.stack([occ.logprob_coefficient(a, b, average=how) for a, b in deltas]).std()
        for how in ("sums", "ratios")
    }
    assert spread["ratios"] > 10 * spread["sums"]


# The decomposition


def quadratic(L, g, step):
    """J(θ + step) - J(θ) of the quadratic with gradient g and curvature -L everywhere: L-smooth, with equality."""
    return (g @ step - L / 2 * step @ step).item()


@pytest.mark.parametrize("lam", (-0.5, 0.0, 0.3, 2.0))
def test_decomposition_equals_a_measured_step(lam):
    torch.set_default_dtype(torch.float64)
    try:
        g, m, eta, L = torch.randn(20), torch.randn(20), 0.1, 3.0
        measured = quadratic(L, g, eta * (g + lam * m)) - quadratic(L, g, eta * g)
        c, v2 = (g @ m).item(), (m @ m).item()
        assert occ.delta_mtp(lam, c, v2, eta, L) == pytest.approx(measured, rel=1e-9, abs=1e-12)
        if lam:  # without the factor 1 - Lη it is another number
            assert eta * lam * c - L * eta**2 * lam**2 / 2 * v2 != pytest.approx(measured, rel=1e-3)
    finally:
        torch.set_default_dtype(torch.float32)


def test_lam_star_is_the_top_of_the_parabola():
    c, v2, eta, L = -0.7, 2.0, 0.1, 3.0
    best = occ.lam_star(c, v2, eta, L)
    top = occ.delta_mtp(best, c, v2, eta, L)
    assert best < 0 < top
    assert all(occ.delta_mtp(best + d, c, v2, eta, L) < top for d in (-0.1, -0.01, 0.01, 0.1))


def test_split_halves_remove_the_covariance_of_the_noise():
    G, M = torch.randn(50), torch.randn(50)
    plain, split, v2, v2_split = [], [], [], []
    for _ in range(2000):  # each half contributes half of the gradient, with noise that g and m share
        noise = [torch.randn(50) for _ in range(2)]
        (g_a, m_a), (g_b, m_b) = ((G / 2 + n, M / 2 + n + 0.5 * torch.randn(50)) for n in noise)
        terms, halves = occ.exact_terms(g_a + g_b, m_a + m_b), occ.split_terms(g_a, m_a, g_b, m_b)
        (
            plain.append(terms["c"]),
            split.append(halves["c_split"]),
            v2.append(terms["v2"]),
            v2_split.append(halves["v2_split"]),
        )
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    error = lambda values: torch.tensor(values).std().item() / math.sqrt(len(values))  # noqa: E731
    c, m2 = (G @ M).item(), (M @ M).item()
    assert abs(mean(split) - c) < 4 * error(split) and abs(mean(v2_split) - m2) < 4 * error(v2_split)
    quarter = occ.split_terms(G / 4, M / 4, 3 * G / 4, 3 * M / 4, share=0.25)
    assert quarter == pytest.approx(
        {"c_split": c, "v2_split": m2, "g2_split": (G @ G).item()}, rel=1e-5
    )  # parts need not be halves
    assert mean(plain) - c == pytest.approx(100, rel=0.1) and mean(v2) - m2 == pytest.approx(125, rel=0.1)


def test_exact_terms():
    g, m = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0])
    assert occ.exact_terms(g, m, 2.0) == pytest.approx(
        {"c": 1, "v2": 10, "g2": 5, "cos": 1 / math.sqrt(50), "lam_star": 0.2}
    )
    assert occ.exact_terms(g, 0 * m)["lam_star"] == 0


# Isolation: regime × tied or not × implementation × design × part of the trunk


def parts_of(model):
    named = dict(model.named_parameters())
    if model.cfg.tied:
        return {
            "shared matrix": [named["wte.weight"]],
            "blocks": list(model.blocks.parameters()),
            "norms": [named["norm_in.weight"], named["norm_out.weight"]],
        }
    return {
        "embedding": [named["wte.weight"]],
        "blocks": list(model.blocks.parameters()),
        "norms": [named["norm_in.weight"], named["norm_out.weight"]],
        "unembedding": [named["lm_head.weight"]],
    }


def setting(tied, design, impl, regime, **changes):
    model, heads = tiny(tied=tied, design=design)
    tokens, mask = batch()
    cfg = SimpleNamespace(
        **{
            **dict(
                temperature=1.0,
                logp_impl=impl,
                mtp_base="mtp",
                mtp_learn=None,
                regime=regime,
                lam=0.5,
                lam_plus=1.0,
                occ_proxy="logprob",
                occ_average="sums",
                updates_per_rollout=1,
                num_generations=2,
                max_new_tokens=8,
            ),
            **changes,
        }
    )
    samples = rl.Samples(*(torch.nn.functional.pad(x, (1, 0)) for x in (tokens[:, 1:], mask, mask * -1.0)))
    samples = samples._replace(tokens_BT=tokens)
    adv, objective = torch.tensor([1.0, -1.0, 0.5, -0.5]), occ.REGIMES[regime].objective
    (mb,), _ = rl.minibatches(model, heads, samples, adv, rl.ALGOS["dapo"], cfg)
    with torch.no_grad():
        for p in [*model.parameters(), *heads.parameters()]:
            p.add_(0.01 * torch.randn_like(p))
    return model, heads, mb, cfg, objective


@pytest.mark.parametrize("design", ("sequential", "parallel"))
@pytest.mark.parametrize("impl", ("naive", "chunked"))
@pytest.mark.parametrize("tied", (False, True))
@pytest.mark.parametrize("regime", ("detach", "ce", "policy", "occ", "exact"))
def test_what_the_mtp_gradient_reaches(regime, tied, impl, design):
    model, heads, mb, cfg, objective = setting(tied, design, impl, regime)
    trunk, lam = list(model.parameters()), torch.ones(())
    cut = occ.REGIMES[regime].rule == "cut"
    out = rl.losses(model, heads, mb, rl.ALGOS["dapo"], objective, cfg, False, 0.0 if cut else lam)
    value, _ = occ.coefficient(out, trunk, cfg)
    lam.fill_(value)
    phi = torch.autograd.grad(out.mtp, list(heads.parameters()), retain_graph=True)
    assert all(g.norm() > 0 for g in phi)  # the heads learn in every regime
    for name, params in parts_of(model).items():
        got = occ.flat_grad(out.mtp, params)
        if cut:
            assert (got == 0).all(), name
            continue
        opened = rl.losses(model, heads, mb, rl.ALGOS["dapo"], objective, cfg, False, 1.0)
        full = occ.flat_grad(opened.mtp, params)
        if design == "sequential" or name != "embedding":
            assert full.norm() > 0, name
        torch.testing.assert_close(got, value * full, rtol=1e-3, atol=1e-7)
        head_grads = torch.autograd.grad(opened.mtp, list(heads.parameters()))
        assert all(
            torch.allclose(a, b, atol=1e-6) for a, b in zip(phi, head_grads)
        )  # λ does not touch their own learning


def test_heads_may_learn_from_another_loss_than_the_trunk():
    """--mtp_learn ce: the heads get the gradient of `detach`, the trunk that of `policy`."""
    grads = {}
    for regime, learn in (("detach", None), ("policy", None), ("policy", "ce")):
        model, heads, mb, cfg, objective = setting(False, "sequential", "naive", regime, mtp_learn=learn)
        out = rl.losses(model, heads, mb, rl.ALGOS["dapo"], objective, cfg, False, 0.5)
        loss = out.mtp if out.heads is None else out.heads
        grads[regime, learn] = [occ.flat_grad(out.mtp, list(model.parameters())),
                                occ.flat_grad(loss, list(heads.parameters()))]  # fmt: skip
    torch.testing.assert_close(grads["policy", "ce"][0], grads["policy", None][0])
    torch.testing.assert_close(grads["policy", "ce"][1], grads["detach", None][1])
    assert (grads["policy", "ce"][1] - grads["policy", None][1]).norm() > 0.01


def test_coefficient_of_each_regime():
    for regime, changes in (
        ("ce", {}),
        ("policy", {}),
        ("detach", {}),
        ("occ", {}),
        ("occ", {"occ_proxy": "hidden"}),
        ("exact", {}),
    ):
        model, heads, mb, cfg, objective = setting(False, "sequential", "naive", regime, **changes)
        trunk = list(model.parameters())
        out = rl.losses(model, heads, mb, rl.ALGOS["dapo"], objective, cfg, False, torch.ones(()))
        lam, terms = occ.coefficient(out, trunk, cfg)
        if regime == "exact":
            g, m = occ.flat_grad(out.rl, trunk), occ.flat_grad(out.mtp, trunk)
            expected = (g @ m / (m @ m)).item()
        elif changes:
            a, b = (torch.autograd.grad(x, out.h_BTC, retain_graph=True)[0].flatten() for x in (out.rl, out.mtp))
            expected = (a @ b / (b @ b)).item()
        else:
            least_squares = occ.logprob_coefficient(out.delta_rl_N, out.delta_mtp_N).item()
            expected = {"ce": 0.5, "policy": 0.5, "detach": 0.0, "occ": least_squares}[regime]
        assert lam == terms["occ/lam"] == pytest.approx(expected, rel=1e-4)
        if regime != "exact":
            assert terms["occ/v2_hat"] > 0


def test_probe_measures_whole_and_halves():
    model, heads, mb, cfg, objective = setting(False, "sequential", "naive", "policy")
    trunk, last = list(model.parameters()), list(model.blocks[-1:].parameters())
    run = lambda part: lambda: rl.losses(model, heads, part, rl.ALGOS["dapo"], objective, cfg, False, 1.0)  # noqa: E731
    (halves, g, m), (whole, *_) = (
        occ.probe([run(part) for part in parts], trunk, last) for parts in (mb.halves(), [mb])
    )
    for name in "c v2 cos lam_star lam_hidden lam_blocks lam_sums lam_ratios".split():
        name = f"occ/{name}"
        assert halves[name] == pytest.approx(whole[name], rel=1e-3)
    assert "occ/c_split" in halves and "occ/c_split" not in whole
    out = run(mb)()
    torch.testing.assert_close(g, occ.flat_grad(out.rl, trunk), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(m, occ.flat_grad(out.mtp, trunk), rtol=1e-3, atol=1e-6)
    assert halves["occ/c"] == pytest.approx((g @ m).item(), rel=1e-3)
    a, b = occ.flat_grad(out.rl, last), occ.flat_grad(out.mtp, last)
    assert halves["occ/lam_blocks"] == pytest.approx((a @ b / (b @ b)).item(), rel=1e-3)
    for proxy, changes in (("sums", {}), ("ratios", dict(occ_average="ratios")), ("hidden", dict(occ_proxy="hidden"))):
        lam, _ = occ.coefficient(out, trunk, SimpleNamespace(**{**vars(cfg), "regime": "occ", **changes}))
        assert halves[f"occ/lam_{proxy}"] == pytest.approx(float(lam), rel=1e-3)


def test_step_terms_of_a_quadratic():
    """f = x·A x/2 has the smoothness d·A d/‖d‖² along d, whatever the optimizer that made the step d."""
    A, x, d = torch.diag(torch.tensor([1.0, 3.0, -2.0])), torch.ones(3), torch.tensor([0.1, -0.2, 0.1])
    terms = occ.step_terms(2 * A @ x, A @ x, A @ (x + d), d)
    assert terms["occ/L"] == pytest.approx((0.01 + 0.12 - 0.02) / 0.06, rel=1e-5)
    assert terms["occ/eta"] == pytest.approx((0.06 / (4 * 14)) ** 0.5, rel=1e-5)


def test_depths_need_no_weights_of_their_own():
    """The heads register nothing of the trunk: what the optimiser of φ moves is φ."""
    model, heads = tiny()
    assert not {id(p) for p in model.parameters()} & {id(p) for p in heads.parameters()}
    assert isinstance(heads, mtp.MTPHeads)


@pytest.mark.parametrize("tied", (False, True))
@pytest.mark.parametrize("design", ("sequential", "parallel"))
def test_the_coefficient_at_the_doors_is_that_of_two_more_backwards(tied, design):
    """And the gradients of the one backward are g + λ m: nothing was let through before λ was known."""
    model, heads, mb, cfg, objective = setting(tied, design, "naive", "occ", occ_proxy="hidden")
    trunk = list(model.parameters())
    lam, terms = torch.full((), 1e6), {}
    watch = occ.hidden_watch(lam, terms, cfg)

    def run(lam, watch=None):
        return rl.losses(model, heads, mb, rl.ALGOS["dapo"], objective, cfg, False, lam, watch)

    watched, plain = run(lam, watch), run(torch.ones(()))
    value, expected = occ.coefficient(plain, trunk, cfg)
    gradient = occ.flat_grad(watched.rl + watched.mtp, trunk)
    assert abs(value) > 1e-3 and lam.item() == pytest.approx(value.item(), rel=1e-4)
    assert {k: float(v) for k, v in terms.items()} == pytest.approx(
        {k: float(v) for k, v in expected.items()}, rel=1e-4
    )
    by_hand = occ.flat_grad(plain.rl, trunk) + value * occ.flat_grad(plain.mtp, trunk)
    torch.testing.assert_close(gradient, by_hand.float(), rtol=1e-3, atol=1e-5)
