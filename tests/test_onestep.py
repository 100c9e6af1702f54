"""What one step gains (eval.py onestep), against closed forms and simulated optimizers."""

import math

import pytest
import torch
from conftest import CFG, minibatch, tiny

import eval as evaluation
import mtp
import train


def gradients(n, mean_g, mean_m, noise_g, noise_m):
    """n minibatches: g and m (n, P), normal, the noises of g and m independent."""
    g = mean_g + noise_g * torch.randn(n, len(mean_g))
    return g, mean_m + noise_m * torch.randn(n, len(mean_m))


def gain(g, u, size=1.0):
    return evaluation.step_gains(g, u, [size])[0, 0].item()


def halves_of(g, m):
    """Without the clip, to which closed forms do not apply."""
    halves = [(g[rows], m[rows]) for rows in evaluation.HALVES]
    return [evaluation.gains_by_lam(*half, clip=False)[:, 0] for half in halves]


def test_the_gain_of_normal_gradients_has_a_closed_form():
    """At every size of minibatch, without knowing more than minibatches of size 1."""
    G, M = torch.randn(50) / 3, torch.randn(50) / 3
    g, m = gradients(4000, G, M, 1.0, 2.0)
    for lam in (-0.5, 0.0, 0.5):
        for size in (0.25, 1.0, 16.0):
            U, variance = G + lam * M, (1 + 4 * lam**2) / size
            adam = (G * U / (U.square() + variance).sqrt()).sum().item()
            assert gain(g, g + lam * m, size) == pytest.approx(adam, rel=0.03, abs=0.05)


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_the_gain_is_that_of_a_simulated_adam(lam):
    """torch's Adam on gradients of one distribution, clipped to norm 1: its progress along E g over lr."""
    G, M, lr, steps = torch.randn(20) / 20, torch.randn(20) / 20, 1e-3, 12000
    scale = torch.logspace(-2, 0, 20)  # of the noise: else Adam's direction would be that of u
    p = torch.nn.Parameter(torch.zeros(20))
    adam = torch.optim.Adam([p], lr=lr, betas=(0.9, 0.999))
    g, m = G + scale * torch.randn(steps, 20) / 2, M + scale * torch.randn(steps, 20) / 2
    u = evaluation.clipped(g + lam * m)
    assert 0.15 < (u.norm(dim=1) > 0.999).float().mean() < 1  # the clip binds often
    progress = []
    for i in range(steps):
        before = p.detach().clone()
        p.grad = u[i].clone()
        adam.step()
        progress.append(((before - p.detach()) @ G).item() / lr)
    late = torch.tensor(progress[2000:])  # second moments have converged
    blocks = late.view(-1, 200).mean(1)
    error = blocks.std().item() / len(blocks) ** 0.5
    assert gain(g, u) == pytest.approx(late.mean().item(), abs=4 * error)
    assert 4 * error < 0.3 * abs(gain(g, u))  # or the comparison would say nothing


@pytest.mark.parametrize("n", [8, 48])
def test_intervals_hold_the_truth_as_often_as_they_say(n):
    """Of fewer minibatches than the jackknife usually has parts, too."""
    G, M = torch.full((30,), 0.3), torch.full((30,), 0.1)
    truth = 100 * (((0.3 * 0.4 / (0.4**2 + 2) ** 0.5) / (0.3 * 0.3 / (0.3**2 + 1) ** 0.5)) - 1)
    held = 0
    for _ in range(200):
        g, m = gradients(n, G, M, 1.0, 1.0)
        along_u, along_g = evaluation.step_gains(g, g + m)[0], evaluation.step_gains(g, g)[0]
        mean, half = evaluation.relative_gain(along_u, along_g)
        held += abs(mean - truth) < half
    assert 0.85 < held / 200 < 0.995


def test_no_gain_over_a_step_that_may_gain_nothing():
    sure, unsure = torch.tensor([2.0, 1.9, 2.1]), torch.tensor([0.1, 0.3, -0.1])
    assert all(map(math.isnan, evaluation.relative_gain(sure, unsure)))
    assert evaluation.relative_gain(unsure, sure)[0] == pytest.approx(-95)


def test_what_is_chosen_on_noise_gains_nothing_elsewhere():
    """E m = 0, noises independent: every λ but 0 dilutes the step. To choose and value on the same samples hides it."""
    honest, same = [], []
    for _ in range(40):
        g, m = gradients(24, torch.full((60,), 0.3), torch.zeros(60), 1.0, 1.0)
        honest.append(evaluation.chosen_on_one_half(*halves_of(g, m))[1][0])
        same.append(max(gain(g, g + lam * m) for lam in evaluation.LAMS) / gain(g, g) - 1)
    honest, same = torch.tensor(honest), 100 * torch.tensor(same)
    assert honest.mean() < 0 <= same.min() < 0.1 < same.mean()


def test_noise_that_m_shares_with_g_is_taken_out():
    """m = the noise of g alone is a control variate: λ = -0.5 halves the noise, and the gain has a closed form."""
    noise = torch.randn(400, 30)
    g, m = 0.1 + noise, noise
    lam, (mean, half) = evaluation.chosen_on_one_half(*halves_of(g, m))
    expected = 100 * ((0.01 + 1) ** 0.5 / (0.01 + 0.25) ** 0.5 - 1)
    assert lam == -0.5 and mean == pytest.approx(expected, abs=max(2 * half, 15)) and mean > half


def test_a_proxy_is_worth_what_its_lambdas_gain():
    """g = signal - a m, another a in each minibatch: the proxy that says a takes all noise out, the mean of a some."""
    m, a = torch.randn(400, 30) / 30, torch.rand(400)
    g = 0.02 - a[:, None] * m  # short enough for the clip not to bind
    zero, mean, own = [evaluation.gain_of_a_proxy(g, m, lam)[0] for lam in (0 * a, 0 * a + 0.5, a)]
    # What is left of a step: mean over √E[g²], where E a² = 1/3.
    noise = 0.02 / (0.02**2 + (1 / 3) / 30**2) ** 0.5
    assert zero == 0 < mean < own and own == pytest.approx(100 * (1 / noise - 1), rel=0.05)


def test_a_step_backwards_is_a_loss():
    """E g · E u < 0, as for λ = -0.3 where c = 10 ‖E g‖² : a step along -g gains as much less as one along g gains."""
    g, m = gradients(50, torch.ones(10), torch.ones(10) * 10, 0.1, 0.1)
    assert gain(g, g - 0.5 * m) == pytest.approx(-gain(g, g), rel=0.02)


def test_curvature_needs_fresh_samples():
    """J of a sample is θᵀH θ/2 with a random H: along its own gradient it curves more than samples that come fresh."""
    torch.manual_seed(0)
    P, n, eta = 12, 3000, 0.1
    A = torch.randn(n, P, P) / P**0.5
    H = torch.eye(P) + (A + A.transpose(1, 2)) / 2
    theta = torch.ones(P)
    g = H @ theta
    delta = eta * g
    after = (theta - delta)[:, :, None]
    own = [evaluation.curvature(g[i], (H[i] @ after[i])[:, 0], delta[i], g[i]) for i in range(n)]
    fresh = []
    for i in range(n - 1):
        g_after = (H[i + 1] @ after[i])[:, 0]
        fresh.append(evaluation.curvature(g[i + 1], g_after, delta[i], g[i]))
    error = torch.tensor(fresh).std().item() / n**0.5
    assert sum(fresh) / (n - 1) == pytest.approx(eta, abs=4 * error)  # E H is the identity: L = 1
    assert sum(own) / n > eta + 20 * error


def test_a_prediction_of_whole_runs():
    """A step that gains half as much makes τ = t/2, hence b ln ½ points; a step backwards predicts nothing."""
    b = evaluation.GROWTH
    predicted = evaluation.predicted_difference
    assert predicted({0: 0.0, 250: 0.0}, 250) == 0
    assert predicted({0: -50.0, 60: -50.0, 250: -50.0}, 250) == pytest.approx(b * math.log(0.5))
    late = predicted({0: 0.0, 200: 0.0, 201: -50.0, 250: -50.0}, 250)
    assert b * math.log(0.9) < late < 0  # it has lived 200 + t/2
    assert math.isnan(predicted({0: -120.0, 250: 50.0}, 250))


def test_onestep_of_a_run(small, capsys, monkeypatch):
    cfg = small(regime="occ", keep="2", prompts_per_step=8)
    train.main(cfg)
    capsys.readouterr()
    last_update, moments = evaluation.last_update, []

    def watched(cfg, model, heads, optimizer, seed):
        moments.append(sum(state["exp_avg"].norm().item() for state in optimizer.state.values()))
        return last_update(cfg, model, heads, optimizer, seed)

    monkeypatch.setattr(evaluation, "last_update", watched)
    weights = (evaluation.Path(cfg.out) / "ckpt.pt").read_bytes()
    arguments = ["onestep", cfg.out, "--rollouts", "12", "--checkpoint", "ckpt-2"]
    assert evaluation.main(evaluation.parse(arguments)) == 0
    said = capsys.readouterr().out
    assert "| 0.0 | 0.0 ± 0.0 | 0.0 ± 0.0 |" in said
    assert said.count("Would MTP help this run") == 2
    assert "Lη of Adam's steps on fresh samples" in said
    found = evaluation.measured_at(cfg.out, "ckpt-2")
    assert found["responses"] == 16 and 8 <= found["minibatches"] <= 12
    # Optimizer.load_state_dict keeps the tensors that it is given: loaded again and again, moments would drift.
    assert len(moments) == 12 and moments[0] > 0 and len(set(moments)) == 1
    lams = {found[f"{proxy}/lam"] for proxy in evaluation.PROXIES}
    assert len(lams) == len(evaluation.PROXIES)  # after a real update no δ is 0
    assert (evaluation.Path(cfg.out) / "ckpt.pt").read_bytes() == weights
    with pytest.raises(ValueError, match="which are too few"):
        evaluation.main(evaluation.parse(["onestep", cfg.out, "--rollouts", "2"]))


def test_the_released_lambda_has_the_trunks_old_log_probs_as_base():
    model, heads = tiny()
    mb = minibatch(model, heads)
    (delta_rl, delta_mtp), released = evaluation.deltas_of(model, heads, mb, CFG)
    with torch.no_grad():
        logp, logp_mtp, _ = mtp.logprobs(model, heads, mb["tokens"], mb["mask"])
    gaps, scored = (logp_mtp - mb["old"][:, None]) * mb["mask_mtp"], mb["mask_mtp"].any(1)
    gap = gaps.sum(1) / mb["mask_mtp"].sum(1).clamp(min=1)
    ratio = (logp - mb["old"]) * gap / (gap.square() + 1e-8) * scored
    pairs = (slice(0, 2), slice(2, 4))  # of responses
    by_hand = [0.05 * (ratio[pair].sum() / scored[pair].sum()).item() for pair in pairs]
    assert released == pytest.approx(sum(by_hand) / 2, rel=1e-4)
    assert not torch.allclose(gap, delta_mtp)
    assert (delta_rl[scored] == (logp - mb["old"])[scored]).all()
