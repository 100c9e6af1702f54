"""The paper's equations, and which part of the trunk each regime lets the MTP gradient reach."""

import pytest
import torch
from conftest import CFG, config, minibatch, rows_of, tiny, wider

import mtp
import occ
import rl

ALGO = rl.ALGOS["dapo"]


@pytest.mark.parametrize("lam", (2.5, -1.0, 0.0))
def test_scale_grad(lam):
    """λ as a number, and as a tensor that is filled in after the forward."""
    x, late = torch.randn(3, requires_grad=True), torch.ones(())
    for value in (lam, late):
        y = occ.scale_grad(x, value)
        assert torch.equal(y, x)
        late.fill_(lam)
        if value == 0 and value is not late:
            assert not y.requires_grad  # the number 0 cuts the graph
        else:
            torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], lam * 2 * x)


def test_lambda_zero_stops_what_is_not_finite():
    x = torch.zeros(3, requires_grad=True)
    y = occ.scale_grad(x, torch.zeros(())).sqrt().sum()  # its gradient is inf at 0
    assert torch.equal(torch.autograd.grad(y, x)[0], torch.zeros(3))  # 0 · inf would be nan


def test_lambda_is_the_least_squares_coefficient():
    a, b = torch.randn(200), torch.randn(200)
    delta_rl, delta_mtp = a + 0.4 * b, b
    expected = torch.linalg.lstsq(delta_mtp[:, None], delta_rl[:, None]).solution.item()
    lam = occ.logprob_coefficient(delta_rl, delta_mtp, lam_plus=0.5).item()
    assert lam == pytest.approx(expected / 2, rel=1e-5)
    assert occ.logprob_coefficient(-delta_rl, delta_mtp, 0.5).item() == -lam  # it may be negative
    other_way_round = occ.logprob_coefficient(delta_mtp, delta_rl, 0.5).item()
    assert abs(other_way_round - lam) > 0.01
    # gradients at hidden states are small, and their ε smaller
    of_small = occ.hidden_coefficient(1e-6 * delta_rl, 1e-6 * delta_mtp, lam_plus=0.5).item()
    assert of_small == pytest.approx(expected / 2, rel=1e-5)
    for coefficient in (occ.logprob_coefficient, occ.hidden_coefficient):
        assert coefficient(0 * a, 0 * b) == 0  # nothing has changed


def test_the_released_code_averages_ratios_of_pairs():
    delta_rl, delta_mtp = torch.randn(4, 5), torch.randn(4, 5)
    mask = torch.arange(5) < torch.tensor([5, 2, 4, 1])[:, None]
    lam = occ.released_coefficient(delta_rl * mask, delta_mtp * mask, mask, lam_plus=0.1)
    ratios = delta_rl * delta_mtp / (delta_mtp.square() + 1e-8)
    for pair in (slice(0, 2), slice(2, 4)):
        expected = 0.1 * ratios[pair][mask[pair]].mean()
        torch.testing.assert_close(lam[pair], expected.expand(2), rtol=1e-4, atol=0)


def test_token_deltas_are_means_over_the_depths_that_score_the_token():
    change, change_mtp = torch.randn(2, 4), torch.randn(2, 3, 4)
    mask = mtp.aligned_mask(torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]]).bool(), 3)
    before, before_mtp = torch.randn(2, 4), torch.randn(2, 3, 4)
    logp, logp_mtp = before + change, before_mtp + change_mtp
    delta_rl, delta_mtp = occ.token_deltas(logp, before, logp_mtp, before_mtp, mask)
    mean = torch.where(mask, change_mtp, torch.nan).nanmean(1).nan_to_num(0)
    torch.testing.assert_close(delta_mtp, mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(delta_rl, change * mask.any(1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("lam", (-0.5, 0.0, 0.3, 2.0))
def test_decomposition_equals_a_measured_step(lam):
    """On the quadratic with gradient g and curvature -L everywhere, which is L-smooth with equality."""
    g, m = torch.randn(2, 20, dtype=torch.double)
    eta, L = 0.1, 3.0

    def gain(step):
        return (g @ step - L / 2 * step @ step).item()

    measured = gain(eta * (g + lam * m)) - gain(eta * g)
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


def forward(model, heads, mb, kind, door=1.0, impl="naive"):
    """(loss_rl, loss_mtp), (δ_RL, δ_MTP) and the hidden states of a minibatch."""
    logp, logp_mtp, h = mtp.logprobs(model, heads, mb["tokens"], mb["mask"], 1.0, impl, door)
    loss_rl = rl.policy_loss(logp, mb["old"], mb["adv"], mb["mask"], mb["weight"], ALGO)
    loss_mtp = rl.mtp_loss(kind, logp_mtp, mb, mb["adv"], ALGO)
    deltas = occ.token_deltas(logp, mb["old"], logp_mtp, mb["old_mtp"], mb["mask_mtp"])
    return (loss_rl, loss_mtp), deltas, h


@pytest.mark.parametrize("design", ("sequential", "parallel"))
@pytest.mark.parametrize("impl", ("naive", "chunked"))
@pytest.mark.parametrize("tied", (False, True))
@pytest.mark.parametrize("regime", ("detach", "ce", "policy", "occ", "exact"))
def test_what_the_mtp_gradient_reaches(regime, tied, impl, design):
    """In detach nothing, else λ times what open doors let through. What the heads learn does not depend on λ."""
    model, heads = tiny(tied=tied, design=design)
    assert (model.lm_head.weight is model.wte.weight) == tied
    mb, row = minibatch(model, heads), occ.REGIMES[regime]
    lam, phi = torch.ones(()), list(heads.parameters())
    door = 0.0 if row.rule == "cut" else lam
    losses, deltas, h = forward(model, heads, mb, row.trunk_loss, door, impl)
    lam.fill_(occ.coefficient(row.rule, CFG, deltas, losses, h, list(model.parameters())))
    assert row.rule == "cut" or abs(lam) > 1e-3
    (_, opened), _, _ = forward(model, heads, mb, row.trunk_loss, 1.0, impl)
    got, full = occ.flat_grad(losses[1], phi), occ.flat_grad(opened, phi)
    torch.testing.assert_close(got, full, rtol=1e-3, atol=1e-6)
    assert full.norm() > 0
    for name, module in model.named_children():  # in `tied`, the embedding is the unembedding
        got, full = (occ.flat_grad(x, list(module.parameters())) for x in (losses[1], opened))
        assert full.norm() > 0, name
        if row.rule == "cut":
            assert (got == 0).all(), name
        else:
            torch.testing.assert_close(got, lam * full, rtol=1e-3, atol=1e-7)


def by_hand(model, losses, deltas, h):
    """λ by each rule that measures, c and the cosine, from one forward pass."""
    g, m = (occ.flat_grad(loss, list(model.parameters())) for loss in losses)
    a, b = (torch.autograd.grad(loss, h, retain_graph=True)[0].flatten() for loss in losses)
    delta_rl, delta_mtp = deltas
    found = {
        "c": g @ m,
        "cos": g @ m / (g.norm() * m.norm()),
        "lam_exact": g @ m / (m @ m),
        "lam_hidden": a @ b / (b @ b),
        "lam_logprob": (delta_rl * delta_mtp).sum() / delta_mtp.square().sum(),
    }
    return {name: x.item() for name, x in found.items()}


@pytest.mark.parametrize("regime", ("detach", "policy", "occ", "exact", "hidden"))
def test_coefficient_of_each_regime(regime):
    model, heads = tiny()
    mb, trunk = minibatch(model, heads), list(model.parameters())
    losses, deltas, h = forward(model, heads, mb, "policy", torch.ones(()))
    measured = by_hand(model, losses, deltas, h)
    expected = {"detach": 0.0, "policy": CFG.lam, "exact": measured["lam_exact"]}
    expected |= {"occ": measured["lam_logprob"], "hidden": measured["lam_hidden"]}
    proxy = "hidden" if regime == "hidden" else "logprob"
    rule = "proxy" if regime == "hidden" else occ.REGIMES[regime].rule
    lam = float(occ.coefficient(rule, config(occ_proxy=proxy), deltas, losses, h, trunk))
    assert lam == pytest.approx(expected[regime], rel=1e-3)
    assert lam != 0 or regime == "detach"


def test_the_probe_measures_the_real_gradients():
    model, heads = tiny()
    mb, row = minibatch(model, heads), occ.REGIMES["policy"]
    losses, deltas, h = forward(model, heads, mb, "policy")
    terms, g, m = rl.probe(model, heads, mb, deltas, row, ALGO, CFG, heads)
    expected = by_hand(model, losses, deltas, h)
    expected["lam_frozen"] = expected["lam_logprob"]  # here the heads have not moved
    for name, value in expected.items():
        assert terms[f"occ/{name}"] == pytest.approx(value, rel=1e-3), name
    _, other_heads = tiny(seed=1)  # as if they had
    moved, _, _ = rl.probe(model, heads, mb, deltas, row, ALGO, CFG, other_heads)
    assert moved["occ/v2_frozen"] != pytest.approx(terms["occ/v2_frozen"], rel=1e-2)
    assert moved["occ/c"] == terms["occ/c"] == pytest.approx((g @ m).item(), rel=1e-3)


def test_lambda_does_not_depend_on_padding_or_order():
    model, heads = tiny()
    mb = minibatch(model, heads)

    def lam(mb):
        _, deltas, _ = forward(model, heads, mb, "policy")
        return occ.logprob_coefficient(*deltas)

    whole = lam(mb)
    assert abs(whole) > 1e-3
    for other in (wider(mb), rows_of(mb, [2, 0, 3, 1])):
        torch.testing.assert_close(lam(other), whole, rtol=1e-3, atol=0)
    halves = lam(rows_of(mb, [0, 1])), lam(rows_of(mb, [2, 3]))
    assert abs(sum(halves) / 2 - whole) > 1e-3 * abs(whole)  # a λ a micro-batch is another number
