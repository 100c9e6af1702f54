"""The paper's equations, and which part of the trunk each regime lets the MTP gradient reach."""

import itertools

import pytest
import torch
from conftest import config, minibatch, rows_of, tiny, wider

import mtp
import occ
import rl

ALGO = rl.ALGOS["dapo"]


@pytest.mark.parametrize("lam", (2.5, -1.0, 0.0, None))
def test_scale_grad(lam):
    """λ may be filled in late; 0 lets nothing through, not even 0 · inf; None leaves gradients."""
    x, late = torch.tensor([0.0, 4.0], requires_grad=True), None if lam is None else torch.ones(())
    y = occ.scale_grad(x, late)
    assert torch.equal(y, x)
    late is None or late.fill_(lam)
    (grad,) = torch.autograd.grad(y.sqrt().sum(), x)  # inf at 0, and 1/4
    assert grad[1] == 0.25 * (1 if lam is None else lam)
    assert grad[0] == (0 if lam == 0 else torch.inf * grad[1])


def test_lambda_is_the_least_squares_coefficient():
    delta_rl, delta_mtp = torch.tensor([[1.0, 0.4], [0.0, 1.0]]) @ torch.randn(2, 200)
    expected = torch.linalg.lstsq(delta_mtp[:, None], delta_rl[:, None]).solution.item()
    lam = occ.logprob_coefficient(delta_rl, delta_mtp, lam_plus=0.5).item()
    assert lam == pytest.approx(expected / 2, rel=1e-5)
    assert occ.logprob_coefficient(-delta_rl, delta_mtp, 0.5).item() == -lam  # it may be negative
    assert abs(occ.logprob_coefficient(delta_mtp, delta_rl, 0.5).item() - lam) > 0.01
    assert occ.logprob_coefficient(0 * delta_rl, 0 * delta_mtp) == 0  # nothing has changed


def test_token_deltas_are_means_over_the_depths_that_score_the_token():
    change, change_mtp = torch.randn(2, 4), torch.randn(2, 3, 4)
    mask = mtp.aligned_mask(torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]]).bool(), 3)
    mb = {"old": torch.randn(2, 4), "old_mtp": torch.randn(2, 3, 4), "mask_mtp": mask}
    deltas = occ.token_deltas(mb["old"] + change, mb["old_mtp"] + change_mtp, mb)
    mean = torch.where(mask, change_mtp, torch.nan).nanmean(1).nan_to_num(0)
    torch.testing.assert_close(deltas, (change * mask.any(1), mean), rtol=0, atol=1e-6)


@pytest.mark.parametrize("lam", (-0.5, 0.0, 0.3, 2.0))
def test_decomposition_equals_a_measured_step(lam):
    """On the quadratic with gradient g and curvature -L, which is L-smooth with equality."""
    g, m = torch.randn(2, 20, dtype=torch.double)
    eta, L, c, v2 = 0.1, 3.0, (g @ m).item(), (m @ m).item()
    alone, both = (g @ step - L / 2 * step @ step for step in (eta * g, eta * (g + lam * m)))
    found, best = occ.delta_mtp(lam, c, v2, eta, L), occ.lam_star(c, v2, eta, L)
    assert found == pytest.approx((both - alone).item(), rel=1e-9, abs=1e-12)
    for d in (-0.01, 0.01):
        assert occ.delta_mtp(best + d, c, v2, eta, L) < occ.delta_mtp(best, c, v2, eta, L)
    of_exact_gradients = c, L * c, L * v2  # what noisy_terms takes, of H = L·1
    assert sum(occ.noisy_terms(lam, *of_exact_gradients, eta)) == pytest.approx(found, rel=1e-9)


@pytest.mark.parametrize("lam", (-0.5, 0.7))
@pytest.mark.parametrize("shared", (-0.9, 0.0, 0.9))  # the correlation of the noises of g and m
def test_noisy_terms_are_the_mean_gain_of_simulated_steps(shared, lam):
    """Of plain ones: how much lower a quadratic loss gets, whose Hessian is not a multiple of 1."""
    n, eta, (G, M), A = 20_000, 0.2, torch.randn(2, 6), torch.randn(6, 6)
    H, noise, other = A @ A.T / 6 + torch.eye(6), torch.randn(n, 6), torch.randn(n, 6)
    g, m = G + 1.5 * noise, M + 2 * (shared * noise + (1 - shared**2) ** 0.5 * other)
    steps = -eta * g, -eta * (g + lam * m)
    alone, both = (-step @ G - (step @ H * step).sum(1) / 2 for step in steps)
    mean, error = (both - alone).mean().item(), (both - alone).std().item() / n**0.5
    c, of_means, trace = (G @ M).item(), (G @ H @ M).item(), H.trace().item()
    ghm, mhm = of_means + 3 * shared * trace, (M @ H @ M).item() + 4 * trace
    terms = occ.noisy_terms(lam, c, ghm, mhm, eta)
    assert sum(terms) == pytest.approx(mean, abs=4 * error)
    assert terms[0] == eta * lam * c and terms[2] == occ.noisy_terms(-lam, c, ghm, mhm, eta)[2] < 0
    independent = occ.noisy_terms(lam, c, of_means, mhm, eta)
    assert (abs(sum(independent) - mean) > 4 * error) == (shared != 0)
    best = (c - eta * ghm) / (eta * mhm)
    left, top, right = (sum(occ.noisy_terms(best + d, c, ghm, mhm, eta)) for d in (-0.01, 0, 0.01))
    assert left < top > right


def forward(model, heads, mb, kind, lam=None, impl="naive"):
    """(loss_rl, loss_mtp) and (δ_RL, δ_MTP) of a minibatch."""
    logp, logp_mtp = rl.logprobs(model, heads, mb, config(logp_impl=impl), lam)
    losses = rl.trunk_loss(logp, mb, ALGO), rl.mtp_loss(kind, logp_mtp, mb, ALGO)
    return losses, occ.token_deltas(logp, logp_mtp, mb)


@pytest.mark.parametrize("design", ("sequential", "parallel"))
@pytest.mark.parametrize("impl", ("naive", "chunked"))
@pytest.mark.parametrize("tied", (False, True))
@pytest.mark.parametrize("regime", ("detach", "ce", "policy", "occ", "exact"))
def test_what_the_mtp_gradient_reaches(regime, tied, impl, design, monkeypatch):
    """λ times what open doors let through, in detach nothing; what heads learn is not scaled."""
    monkeypatch.setattr(mtp, "CHUNK_LOGITS", 4)  # chunks of the vocabulary
    model, heads = tiny(vocab=80, tied=tied, design=design)
    assert (model.lm_head.weight is model.wte.weight) == tied
    mb, lam, (kind, rule) = minibatch(model, heads), torch.ones(()), occ.REGIMES[regime]
    losses, deltas = forward(model, heads, mb, kind, lam, impl)
    gradients = [occ.flat_grad(loss, list(model.parameters())) for loss in losses]
    lam.fill_(occ.coefficient(rule, config(), deltas, occ.exact_terms(*gradients)))
    assert abs(lam) > 1e-3 if regime != "detach" else lam == 0
    (_, opened), _ = forward(model, heads, mb, kind, None, impl)
    for module in (heads, *model.children()):  # in `tied`, the embedding is the unembedding
        got, full = (occ.flat_grad(x, list(module.parameters())) for x in (losses[1], opened))
        assert full.norm() > 0
        expected = full if module is heads else lam * full
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-6 * bool(expected.any()))


@pytest.mark.parametrize("door, reached", [
    (0, {"wte", "wpe", "norm_in", "blocks", "norm_out"}), (1, {"wte"}), (2, {"lm_head"}),
])  # fmt: skip
def test_each_door_matters(door, reached, monkeypatch):
    """Where one of the three is forgotten, with λ = 0, this is what the MTP gradient reaches."""
    model, heads = tiny()
    mb, doors = minibatch(model, heads), itertools.count()

    def forgets_one(x, lam):
        return x if next(doors) == door else occ.scale_grad(x, lam)

    monkeypatch.setattr(mtp, "scale_grad", forgets_one)
    (_, loss), _ = forward(model, heads, mb, "policy", torch.zeros(()))
    parts = {name: list(module.parameters()) for name, module in model.named_children()}
    assert {name for name in parts if occ.flat_grad(loss, parts[name]).norm() > 0} == reached
    assert next(doors) == 3


def test_exact_terms_by_hand():
    g, m = torch.tensor([3.0, 0.0]), torch.tensor([1.0, -2.0])
    expected = {"c": 3, "v2": 5, "g2": 9, "cos": 1 / 5**0.5, "lam_exact": 0.5 * 3 / 5}
    assert occ.exact_terms(g, m, 0.5) == pytest.approx(expected)
    assert [*occ.exact_terms(g, 0 * m).values()] == [0, 0, 9, 0, 0]  # nothing is nan


def test_lambda_does_not_depend_on_padding_or_order():
    model, heads = tiny()
    mb = minibatch(model, heads)

    def lam(mb):
        return occ.logprob_coefficient(*forward(model, heads, mb, "policy")[1])

    whole = lam(mb)
    assert abs(whole) > 1e-3
    for other in (wider(mb), rows_of(mb, [2, 0, 3, 1])):
        torch.testing.assert_close(lam(other), whole, rtol=1e-3, atol=0)
    halves = lam(rows_of(mb, [0, 1])), lam(rows_of(mb, [2, 3]))
    assert abs(sum(halves) / 2 - whole) > 1e-3 * abs(whole)  # a λ a micro-batch is another number
