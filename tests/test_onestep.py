"""What one step gains (eval.py onestep), against closed forms and simulated optimizers."""

import json
import math

import pytest
import torch

import eval as evaluation
import train


def gradients(n, mean_g, mean_m, noise_g, noise_m):
    """n minibatches: g and m (n, P), normal, the noises of g and m independent."""
    g = mean_g + noise_g * torch.randn(n, len(mean_g))
    return g, mean_m + noise_m * torch.randn(n, len(mean_m))


def test_the_gain_of_normal_gradients_has_a_closed_form():
    """At every size of minibatch, without knowing more than minibatches of size 1."""
    G, M = torch.randn(50) / 3, torch.randn(50) / 3
    g, m = gradients(4000, G, M, 1.0, 2.0)
    for lam in (-0.5, 0.0, 0.5):
        for size in (0.25, 1.0, 16.0):
            U, variance = G + lam * M, (1 + 4 * lam**2) / size
            adam = (G * U / (U.square() + variance).sqrt()).sum().item()
            product = (G @ U).item()
            plain = product * abs(product) / (U @ U + 50 * variance).item()
            u = g + lam * m
            found = evaluation.step_gains(g, u, "adam", size, leave_out=False)
            assert found[0] == pytest.approx(adam, rel=0.03, abs=0.05)
            found = evaluation.step_gains(g, u, "plain", size, leave_out=False)
            assert found[0] == pytest.approx(plain, rel=0.05, abs=0.02)


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_the_gain_is_that_of_a_simulated_adam(lam):
    """torch's Adam on gradients of one distribution, clipped to norm 1: its progress along E g, a step and unit of lr."""
    G, M, lr, steps = torch.randn(20) / 20, torch.randn(20) / 20, 1e-3, 12000
    scale = torch.logspace(-2, 0, 20)  # noise differs by coordinate: Adam's direction is not that of u
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
    found = evaluation.step_gains(g, u, "adam", leave_out=False)[0]
    assert found == pytest.approx(late.mean().item(), abs=4 * error)
    assert 4 * error < 0.3 * abs(found)  # or the comparison would say nothing


def test_what_is_chosen_on_noise_gains_nothing_elsewhere():
    """E m = 0, noises independent: every λ but 0 dilutes the step. Choosing and valuing on the same samples hides that."""
    honest, same = [], []
    for _ in range(40):
        g, m = gradients(24, torch.full((60,), 0.3), torch.zeros(60), 1.0, 1.0)
        honest.append(evaluation.chosen_on_one_half(g, m, clip=False)["gain"][0])
        gains = [evaluation.step_gains(g, g + lam * m, leave_out=False)[0] for lam in evaluation.LAMS]
        same.append(max(gains) / evaluation.step_gains(g, g, leave_out=False)[0] - 1)
    honest, same = torch.tensor(honest), 100 * torch.tensor(same)
    assert honest.mean() < 0 <= same.min() < 0.1 < same.mean()


def test_noise_that_m_shares_with_g_is_taken_out():
    """m = the noise of g alone is a control variate: λ = -0.5 halves the noise, and the gain has a closed form."""
    noise = torch.randn(400, 30)
    g, m = 0.1 + noise, noise
    found = evaluation.chosen_on_one_half(g, m, clip=False)
    expected = 100 * ((0.01 + 1) ** 0.5 / (0.01 + 0.25) ** 0.5 - 1)
    mean, half = found["gain"]
    assert found["lam"] == -0.5 and mean == pytest.approx(expected, abs=max(2 * half, 15)) and mean > half
    product = evaluation.relative_gain(g, m, -0.5, "plain", clip=False)[0]
    assert product == pytest.approx(100 * ((0.01 + 1) / (0.01 + 0.25) - 1), rel=0.3)


def test_a_step_backwards_is_a_loss():
    """E g · E u < 0: the square of a product would have made a gain of it."""
    g, m = gradients(50, torch.ones(10), torch.ones(10) * 10, 0.1, 0.1)
    assert evaluation.relative_gain(g, m, -0.5, "plain", clip=False)[0] == pytest.approx(-200, abs=2)
    assert evaluation.relative_gain(g, m, -0.5, "adam", clip=False)[0] == pytest.approx(-200, abs=2)


def test_curvature_needs_fresh_samples():
    """J of a sample is θᵀH θ/2 with a random H: along its own gradient it curves more than samples that come fresh."""
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
    assert evaluation.predicted_difference({0: 0.0, 250: 0.0}, 250) == 0
    half = evaluation.predicted_difference({0: -50.0, 60: -50.0, 250: -50.0}, 250)
    assert half == pytest.approx(b * math.log(0.5))
    late = evaluation.predicted_difference({0: 0.0, 200: 0.0, 201: -50.0, 250: -50.0}, 250)
    assert b * math.log(0.9) < late < 0  # it has lived 200 + t/2
    assert math.isnan(evaluation.predicted_difference({0: -120.0, 250: 50.0}, 250))


def test_onestep_of_a_run(small, capsys):
    cfg = small(regime="occ", keep="2", prompts_per_step=8)
    train.main(cfg)
    capsys.readouterr()
    arguments = ["onestep", cfg.out, "--rollouts", "12", "--checkpoint", "ckpt-2"]
    assert evaluation.main(evaluation.parse(arguments)) == 0
    said = capsys.readouterr().out
    assert "| 0.0 | 0.0 ± 0.0 | 0.0 ± 0.0 | 0.0 ± 0.0 | 0.0 ± 0.0 |" in said
    assert said.count("Would MTP help this run") == 2 and "Lη of Adam's steps on fresh samples" in said
    found = json.loads((evaluation.Path(cfg.out) / "onestep-ckpt-2.json").read_text(encoding="utf-8"))
    assert found["responses"] == 16
    with pytest.raises(ValueError, match="which are too few"):
        evaluation.main(evaluation.parse(["onestep", cfg.out, "--rollouts", "2"]))
