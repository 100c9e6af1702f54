"""The paper's equations, and which part of the trunk each regime lets the MTP gradient reach."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import batch, shake, tiny

import mtp
import occ
import rl

# ----------------------------------------------------------------------------------------------------------------------
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
    y = occ.scale_grad(x, lam).sqrt().sum()  # its gradient is inf at 0
    assert torch.equal(torch.autograd.grad(y, x)[0], torch.zeros(3))
    assert torch.isnan(torch.full((3,), torch.inf) * lam).all()  # multiplying would not


# ----------------------------------------------------------------------------------------------------------------------
# Coefficients


def test_lambda_is_the_least_squares_coefficient():
    delta_rl, delta_mtp = torch.randn(200), torch.randn(200)
    delta_rl = delta_rl + 0.4 * delta_mtp
    expected = torch.linalg.lstsq(delta_mtp[:, None], delta_rl[:, None]).solution.item()
    assert occ.logprob_coefficient(delta_rl, delta_mtp).item() == pytest.approx(expected, rel=1e-5)
    assert occ.logprob_coefficient(delta_rl, delta_mtp, lam_plus=0.5).item() == pytest.approx(
        expected / 2, rel=1e-5
    )
    assert occ.logprob_coefficient(-delta_rl, delta_mtp) < 0  # λ may be negative
    assert occ.hidden_coefficient(delta_rl, delta_mtp).item() == pytest.approx(expected, rel=1e-5)
    assert (
        abs(occ.logprob_coefficient(delta_mtp, delta_rl).item() - expected) > 0.01
    )  # the other way round is another


def test_lambda_without_change_is_zero():
    zero = torch.zeros(10)
    assert occ.logprob_coefficient(zero, zero) == 0 and occ.hidden_coefficient(zero, zero) == 0
    assert occ.logprob_coefficient(zero[:0], zero[:0]) == 0


def test_gradients_at_hidden_states_are_small_and_epsilon_smaller():
    a = 1e-6 * torch.randn(100)
    assert occ.hidden_coefficient(a, a).item() == pytest.approx(1.0)


def test_the_released_code_averages_ratios_of_pairs():
    """Four responses, the second of each pair shorter; padding does not count, and pairs do not mix."""
    delta_rl, delta_mtp = torch.randn(4, 5), torch.randn(4, 5)
    mask = torch.arange(5) < torch.tensor([5, 2, 4, 1])[:, None]
    lam = occ.released_coefficient(delta_rl * mask, delta_mtp * mask, mask, lam_plus=0.1)
    for pair in ((0, 1), (2, 3)):
        ratios = []
        for b in pair:
            for t in mask[b].nonzero().flatten().tolist():
                a, m = delta_rl[b, t].item(), delta_mtp[b, t].item()
                ratios.append(a * m / (m * m + 1e-8))
        for b in pair:
            assert lam[b].item() == pytest.approx(0.1 * sum(ratios) / len(ratios), rel=1e-4)


def test_a_mean_of_ratios_is_noisier_than_a_ratio_of_sums():
    sums, ratios, mask = [], [], torch.ones(2, 150, dtype=torch.bool)
    for _ in range(200):
        a, b = torch.randn(2, 150), torch.randn(2, 150)
        sums.append(occ.logprob_coefficient(a, b))
        ratios.append(occ.released_coefficient(a, b, mask).mean())
    assert torch.stack(ratios).std() > 10 * torch.stack(sums).std()


def test_token_deltas_are_means_over_the_depths_that_score_the_token():
    logp, old = torch.randn(2, 4), torch.randn(2, 4)
    logp_mtp, old_mtp = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    mask = mtp.aligned_mask(torch.tensor([[False, True, True, True], [True, True, False, False]]), 3)
    delta_rl, delta_mtp = occ.token_deltas(logp, old, logp_mtp, old_mtp, mask)
    for b in range(2):
        for t in range(4):
            depths = [k for k in range(3) if mask[b, k, t]]
            changes = [(logp_mtp - old_mtp)[b, k, t].item() for k in depths]
            assert delta_mtp[b, t].item() == pytest.approx(sum(changes) / max(len(changes), 1), abs=1e-6)
            assert delta_rl[b, t].item() == pytest.approx(
                (logp - old)[b, t].item() if depths else 0.0, abs=1e-6
            )
    assert mask.any() and not mask[:, 2].all()


# ----------------------------------------------------------------------------------------------------------------------
# The decomposition


def quadratic(L, g, step):
    """J(θ + step) - J(θ) of the quadratic with gradient g and curvature -L everywhere: L-smooth, with equality."""
    return (g @ step - L / 2 * step @ step).item()


@pytest.mark.parametrize("lam", (-0.5, 0.0, 0.3, 2.0))
def test_decomposition_equals_a_measured_step(lam):
    g, m = torch.randn(20, dtype=torch.double), torch.randn(20, dtype=torch.double)
    eta, L = 0.1, 3.0
    measured = quadratic(L, g, eta * (g + lam * m)) - quadratic(L, g, eta * g)
    c, v2 = (g @ m).item(), (m @ m).item()
    assert occ.delta_mtp(lam, c, v2, eta, L) == pytest.approx(measured, rel=1e-9, abs=1e-12)
    if lam:  # without the factor 1 - Lη it is another number
        assert eta * lam * c - L * eta**2 * lam**2 / 2 * v2 != pytest.approx(measured, rel=1e-3)


def test_lam_star_is_the_top_of_the_parabola():
    c, v2, eta, L = -0.7, 2.0, 0.1, 3.0
    best = occ.lam_star(c, v2, eta, L)
    top = occ.delta_mtp(best, c, v2, eta, L)
    assert best < 0 < top
    for d in (-0.1, -0.01, 0.01, 0.1):
        assert occ.delta_mtp(best + d, c, v2, eta, L) < top


def test_exact_terms():
    g, m = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0])
    expected = {"c": 1, "v2": 10, "g2": 5, "cos": 1 / math.sqrt(50), "lam_star": 0.2}
    assert occ.exact_terms(g, m, 2.0) == pytest.approx(expected)
    assert occ.exact_terms(g, 0 * m)["lam_star"] == 0


# ----------------------------------------------------------------------------------------------------------------------
# Isolation: regime × tied or not × implementation × design × part of the trunk


CFG = SimpleNamespace(temperature=1.0, logp_impl="naive", num_generations=2, updates_per_rollout=1, max_new_tokens=8,
                      lam=0.5, lam_plus=1.0, occ_proxy="logprob")  # fmt: skip
ALGO = rl.ALGOS["dapo"]


def minibatch(model, heads, cfg=CFG):
    """One minibatch of two groups, with the log-probs from before an update that then happens."""
    tokens, mask = batch()
    logp, logp_mtp, _ = mtp.logprobs(model, heads, tokens, mask)
    samples = {"tokens": tokens, "mask": mask, "logp": logp.detach()}
    (mb,) = rl.minibatches(model, heads, samples, torch.tensor([1.0, -1.0, 0.5, -0.5]), ALGO, cfg)
    mb |= {"old": logp.detach(), "old_mtp": logp_mtp.detach()}
    shake(model, heads)
    return mb


def losses(model, heads, mb, regime, door, impl="naive"):
    """loss_rl, the loss whose gradient enters the trunk, δ and the hidden states."""
    logp, logp_mtp, h = mtp.logprobs(model, heads, mb["tokens"], mb["mask"], 1.0, impl, door)
    loss_rl = rl.policy_loss(logp, mb["old"], mb["adv"], mb["mask"], mb["weight"], ALGO)
    loss_mtp = rl.mtp_loss(regime.trunk_loss, logp_mtp, mb, mb["adv"], ALGO)
    return loss_rl, loss_mtp, (occ.token_deltas(logp, mb["old"], logp_mtp, mb["old_mtp"], mb["mask_mtp"]), h)


def parts_of(model):
    named = dict(model.named_parameters())
    parts = {
        "embedding": [named["wte.weight"]],
        "positions": [named["wpe.weight"]],
        "blocks": list(model.blocks.parameters()),
        "norms": [named["norm_in.weight"], named["norm_out.weight"]],
    }
    if not model.cfg.tied:
        parts["unembedding"] = [named["lm_head.weight"]]
    return parts


@pytest.mark.parametrize("design", ("sequential", "parallel"))
@pytest.mark.parametrize("impl", ("naive", "chunked"))
@pytest.mark.parametrize("tied", (False, True))
@pytest.mark.parametrize("regime", ("detach", "ce", "policy", "occ", "exact"))
def test_what_the_mtp_gradient_reaches(regime, tied, impl, design):
    """Nothing in detach; elsewhere λ times what open doors let through. What the heads learn does not depend on λ."""
    model, heads = tiny(tied=tied, design=design)
    mb, row, trunk = minibatch(model, heads), occ.REGIMES[regime], list(model.parameters())
    lam = torch.ones(())
    loss_rl, loss_mtp, (deltas, h) = losses(model, heads, mb, row, 0.0 if row.rule == "cut" else lam, impl)
    lam.fill_(occ.coefficient(row.rule, CFG, deltas, (loss_rl, loss_mtp), h, trunk))
    _, opened, _ = losses(model, heads, mb, row, 1.0, impl)
    phi = list(heads.parameters())
    torch.testing.assert_close(occ.flat_grad(loss_mtp, phi), occ.flat_grad(opened, phi), rtol=1e-3, atol=1e-6)
    assert occ.flat_grad(opened, phi).norm() > 0
    for name, params in parts_of(model).items():
        got, full = occ.flat_grad(loss_mtp, params), occ.flat_grad(opened, params)
        assert full.norm() > 0, name
        if row.rule == "cut":
            assert (got == 0).all(), name
        else:
            torch.testing.assert_close(got, lam * full, rtol=1e-3, atol=1e-7)
    assert row.rule == "cut" or abs(lam) > 1e-3


@pytest.mark.parametrize("regime, changes", [("ce", {}), ("policy", {}), ("detach", {}), ("occ", {}), ("exact", {}),
                                             ("occ", {"occ_proxy": "hidden"})])  # fmt: skip
def test_coefficient_of_each_regime(regime, changes):
    model, heads = tiny()
    mb, row, trunk = minibatch(model, heads), occ.REGIMES[regime], list(model.parameters())
    cfg = SimpleNamespace(**{**vars(CFG), **changes})
    loss_rl, loss_mtp, (deltas, h) = losses(model, heads, mb, row, torch.ones(()))
    lam = float(occ.coefficient(row.rule, cfg, deltas, (loss_rl, loss_mtp), h, trunk))
    if changes:
        a, b = (torch.autograd.grad(x, h, retain_graph=True)[0].flatten() for x in (loss_rl, loss_mtp))
        expected = (a @ b / (b @ b)).item()
    elif regime == "exact":
        g, m = occ.flat_grad(loss_rl, trunk), occ.flat_grad(loss_mtp, trunk)
        expected = (g @ m / (m @ m)).item()
    elif regime == "occ":
        expected = ((deltas[0] * deltas[1]).sum() / deltas[1].square().sum()).item()
    else:
        expected = {"ce": 0.5, "policy": 0.5, "detach": 0.0}[regime]
    assert lam == pytest.approx(expected, rel=1e-4) and (expected != 0 or regime == "detach")


def test_the_probe_measures_the_real_gradients():
    model, heads = tiny()
    mb, row, trunk = minibatch(model, heads), occ.REGIMES["policy"], list(model.parameters())
    loss_rl, loss_mtp, (deltas, h) = losses(model, heads, mb, row, 1.0)
    terms, g, m = rl.probe(model, heads, mb, deltas, row, ALGO, CFG, heads)
    for found, loss in ((g, loss_rl), (m, loss_mtp)):
        assert torch.allclose(found, occ.flat_grad(loss, trunk), rtol=1e-3, atol=1e-6)
    a, b = (torch.autograd.grad(x, h, retain_graph=True)[0].flatten() for x in (loss_rl, loss_mtp))
    assert terms["occ/c"] == pytest.approx((g @ m).item(), rel=1e-3)
    assert terms["occ/lam_star"] == pytest.approx((g @ m / (m @ m)).item(), rel=1e-3)
    assert terms["occ/lam_hidden"] == pytest.approx((a @ b / (b @ b)).item(), rel=1e-3)
    assert terms["occ/lam_logprob"] == pytest.approx(occ.logprob_coefficient(*deltas).item(), rel=1e-6)
    assert terms["occ/lam_frozen"] == pytest.approx(
        terms["occ/lam_logprob"], rel=1e-4
    )  # these heads have not moved
    before = copy.deepcopy(heads)
    shake(before)
    moved, _, _ = rl.probe(model, heads, mb, deltas, row, ALGO, CFG, before)
    assert moved["occ/v2_frozen"] != pytest.approx(terms["occ/v2_frozen"], rel=1e-2)
    assert moved["occ/c"] == terms["occ/c"]


def test_heads_register_nothing_of_the_trunk():
    model, heads = tiny()
    assert not {id(p) for p in model.parameters()} & {id(p) for p in heads.parameters()}


def test_lambda_does_not_depend_on_padding_or_order():
    model, heads = tiny()
    mb = minibatch(model, heads)
    row = occ.REGIMES["occ"]
    wider = {k: F.pad(x, (0, 3)) if x.ndim > 1 else x for k, x in mb.items()}
    shuffled = {k: x[[2, 0, 3, 1]] for k, x in mb.items()}
    halves = [{k: x[rows] for k, x in mb.items()} for rows in (slice(0, 2), slice(2, 4))]
    _, _, (deltas, _) = losses(model, heads, mb, row, 1.0)
    whole = occ.logprob_coefficient(*deltas)
    assert abs(whole) > 1e-3
    for other in (wider, shuffled):
        _, _, (deltas, _) = losses(model, heads, other, row, 1.0)
        torch.testing.assert_close(occ.logprob_coefficient(*deltas), whole, rtol=1e-3, atol=0)
    by_half = [occ.logprob_coefficient(*losses(model, heads, half, row, 1.0)[2][0]) for half in halves]
    assert abs(sum(by_half) / 2 - whole) > 1e-3 * abs(whole)  # a λ for each micro-batch is another number
