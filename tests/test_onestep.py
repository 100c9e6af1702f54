"""What MTP adds to one step (eval.py onestep), against closed forms and simulated steps."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import coin
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils import parameters_to_vector as flat

import eval as evaluation
import occ
import rl

PARTS, P, ETA = evaluation.PARTS, 6, 0.3
G, M = torch.tensor([[0.5, 0.6, 0.7, 0.8, 0.9, 1.0], [1.0, 0.7, 0.4, 0.2, -0.2, -0.4]]).double()
H = torch.diag(torch.linspace(0.5, 1.5, P)).double()


def draw(n, shared, noise=1.0, mean_g=G, mean_m=M):
    """g and m (n, P) of n minibatches, whose noises have the correlation `shared`."""
    a, b = noise * torch.randn(2, n, len(mean_g), dtype=torch.double)
    return mean_g + a, mean_m + shared * a + (1 - shared**2) ** 0.5 * b


def means_of(g, m, H=H):
    """What `eval.part_means` makes of minibatches of a quadratic and steps of length ETA."""
    length = (ETA * g.square().sum(1).mean().sqrt()).expand(len(g))
    rows = {"g": g, "m": m, "Hg": g @ H, "Hm": m @ H, "length": length}
    rows |= {"lam_t": torch.full((len(g),), 0.5), "L_eta": torch.zeros(len(g))}
    return evaluation.part_means({name: x.unflatten(0, (PARTS, -1)) for name, x in rows.items()})


def numbers(*of):
    found = evaluation.one_step(means_of(*of), list(range(PARTS)))
    return {key: top / bottom for key, (top, bottom) in found.items()}


@pytest.mark.parametrize("shared", [0.0, 0.8, -0.8])
def test_terms_and_best_lambda_count_the_noise(shared):
    """By closed forms, and by minibatches of eight times the samples."""
    g, m = draw(96_000, shared)
    found, eight = numbers(g, m), numbers(*(x.view(-1, 8, P).mean(1) for x in (g, m)))
    c, ghm, mhm = G @ M, G @ H @ M + shared * H.trace(), M @ H @ M + H.trace()
    for lam in (-0.5, 1.0):
        terms = [(100 * x / (ETA * G @ G)).item() for x in occ.noisy_terms(lam, c, ghm, mhm, ETA)]
        for name, x in zip(("first", "shared", "penalty", "sum"), (*terms, sum(terms))):
            assert found[f"{name}/{lam:g}"] == pytest.approx(x, abs=2)
            assert found[f"{name}8/{lam:g}"] == pytest.approx(eight[f"{name}/{lam:g}"], abs=2)
    best, blind = (((c - ETA * x) / (ETA * mhm)).item() for x in (ghm, G @ H @ M))
    assert found["lam_star"] == pytest.approx(best, abs=0.01)
    assert found["lam_plus"] == pytest.approx(found["lam_star"] / 0.5)
    assert found["cos"] == pytest.approx((c / (G.norm() * M.norm())).item(), abs=0.02)
    assert found["noise_m"] == pytest.approx(100 * P / (M @ M + P).item(), abs=1)
    assert found["lam_star8"] == pytest.approx(eight["lam_star"], abs=0.03)
    assert shared == 0 or abs(best - blind) > 0.3 < abs(found["lam_star8"] - best)


def test_without_noise_it_is_the_decomposition_of_the_paper():
    found = numbers(G.expand(24, -1), M.expand(24, -1), 1.4 * torch.eye(P).double())
    c, v2, g2 = (x.item() for x in (G @ M, M @ M, G @ G))
    for lam in evaluation.LAMS:
        paper = 100 * occ.delta_mtp(lam, c, v2, ETA, 1.4) / (ETA * g2)
        assert found[f"sum/{lam:g}"] == pytest.approx(paper) == found[f"sum8/{lam:g}"]
    assert found["lam_star"] == pytest.approx(occ.lam_star(c, v2, ETA, 1.4)) == found["lam_star8"]
    assert found["rl"] == pytest.approx(100 - 50 * ETA * 1.4)
    assert found["cos"] == pytest.approx(c / (g2 * v2) ** 0.5)


def test_intervals_hold_the_truth_and_products_share_no_noise(monkeypatch):
    """In 95 % of 400 sets; and noise alone gains nothing, though g and m have it in common."""
    monkeypatch.setattr(evaluation, "LAMS", [0.0, 1.0])
    c, g2, ghm, mhm = G @ M, G @ G, G @ H @ M + H.trace() / 8, M @ H @ M + H.trace() / 4
    truth = {"first/1": 100 * c / g2, "sum/1": 100 * (c - ETA * ghm - ETA / 2 * mhm) / g2}
    truth["lam_star"] = (c - ETA * ghm) / (ETA * mhm)
    kept = [[i for i in range(PARTS) if i != part] for part in range(PARTS + 1)]  # the last: all
    held, free, own = dict.fromkeys(truth, 0), [], []
    for _ in range(400):
        means = means_of(*draw(24, 0.5, 0.5))
        sets = [evaluation.one_step(means, some) for some in kept]
        for key in truth:
            *parts, whole = (top / bottom for top, bottom in (found[key] for found in sets))
            mean, half = evaluation.jackknife(whole, parts)
            held[key] += int(abs(mean - truth[key]) < half)
        g, m = draw(24, 0.9, 1.0, 0 * G, 0 * M)
        found = evaluation.one_step(means_of(g, m), list(range(PARTS)))
        free.append([found["first/1"][1], found["cos"][0], found["adam/1"][1]])  # η g², c, D(0)
        own.append(g.mean(0) @ m.mean(0))
    assert all(0.92 <= count / 400 <= 0.98 for count in held.values()), held
    free, own = torch.tensor(free), torch.tensor(own)
    assert (free.mean(0).abs() < free.std(0) / 5).all() and own.mean() > own.std()


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_the_gain_is_that_of_a_simulated_adam(lam):
    """Its progress along E g over lr, on clipped gradients of one distribution."""
    mean_g, mean_m, scale = torch.randn(20) / 20, torch.randn(20) / 20, torch.logspace(-2, 0, 20)
    g, m = mean_g + scale * torch.randn(7200, 20) / 4, mean_m + scale * torch.randn(7200, 20)
    p, progress = torch.nn.Parameter(torch.zeros(20)), []
    adam = torch.optim.Adam([p], 1e-3, fused=True)
    for gradient in g + lam * m:
        before, p.grad = p.detach().clone(), gradient.clone()
        clip_grad_norm_([p], 1.0)
        adam.step()
        progress.append((before - p.detach()) @ mean_g / 1e-3)
    blocks = torch.stack(progress[1600:]).view(-1, 200).mean(1)  # second moments have converged
    error = 4 * blocks.std() / len(blocks) ** 0.5
    means = means_of(g, m, torch.eye(20))
    more, gain = evaluation.one_step(means, list(range(PARTS)))[f"adam/{lam:g}"]
    gain += more / 100
    assert abs(gain - blocks.mean()) < error < 0.3 * abs(gain)  # or this would say nothing


def test_minibatches_stand_at_one_point_and_curvature_needs_fresh_samples(monkeypatch):
    """Of losses b·θ + θᵀHθ/2: along its own gradient one curves more than others do."""
    n, model, start = 480, torch.nn.Linear(P, 1, bias=False).double(), torch.ones(P).double()
    A, (b, m) = torch.randn(n, P, P).double() / 2, draw(n, 0.0)
    hessians, model.weight.data = H + (A + A.mT) / 2, start[None].clone()
    g, first = b + hessians @ start, 0.1 * G

    def step(cfg, model, heads, optimizer, tok, number):
        """A rollout of one or two updates, of which the last is seen."""
        updates = cfg.updates_per_rollout
        i = number - updates * 10**9  # other samples for each number of updates
        assert cfg.prompts_per_step == 2 * updates  # of training's size
        assert flat(model.parameters()).equal(start)  # each from the checkpoint
        theta = start - (updates - 1) * first
        seen = b[i] + hessians[i] @ theta
        model.weight.data = (theta - 0.1 * seen)[None]
        return {}, [], SimpleNamespace(mb=i, deltas=(seen, m[i]), g=seen, m=m[i], theta=theta)

    monkeypatch.setattr(rl, "step", step)
    monkeypatch.setattr(rl, "logprobs", lambda model, *_: (flat(model.parameters()), 0))
    monkeypatch.setattr(rl, "trunk_loss", lambda x, i, _: b[i] @ x + x @ hessians[i] @ x / 2)
    cfg = dict(prompts_per_step=9, updates_per_rollout=4, tokenizer="bytes", algo="dapo")
    rows = evaluation.measure(SimpleNamespace(**cfg), (model, None, None), n)
    assert rows["g"].shape == (PARTS, n // PARTS, P)
    rows = {name: x.flatten(0, 1) for name, x in rows.items()}
    torch.testing.assert_close((rows["g"], rows["m"]), (g, m))
    # The Hessian is that of the next minibatch of the part, of the last one that of the first.
    others = hessians[torch.arange(n).view(PARTS, -1).roll(-1, 1).flatten()]
    for name, v in (("Hg", g), ("Hm", m)):
        torch.testing.assert_close(rows[name], torch.einsum("npq,nq->np", others, v))
    own = torch.einsum("np,npq,nq->n", g, hessians, g)
    fresh = (g * rows["Hg"]).sum(1)
    assert abs(fresh.sum() - (g @ H * g).sum()) < 4 * n**0.5 * own.std() < (own - fresh).sum() / 2
    some = slice(2 * PARTS)  # the second updates that are measured: they give η, λ_t and Lη
    second = (b + hessians @ (start - first))[some]
    torch.testing.assert_close(rows["length"], 0.1 * second.norm(dim=1))
    lam = (second * m[some]).sum(1) / m[some].square().sum(1)
    torch.testing.assert_close(rows["lam_t"], lam)
    neighbours = hessians[some].view(PARTS, 2, P, P).flip(1).flatten(0, 1)
    along = torch.einsum("np,npq,nq->n", second, neighbours, second)
    torch.testing.assert_close(rows["L_eta"], 0.1 * along / second.square().sum(1))


@pytest.mark.parametrize("algo", ["grpo", "drgrpo", "gspo"])
def test_onestep_of_a_run(algo, trained, monkeypatch):
    """Some minibatches have no gradient: their groups are all alike."""
    cfg, step, moments = trained(algo=algo, regime="ce", keep="2"), rl.step, set()

    def watched(cfg, model, heads, optimizer, *rest):
        moments.add(sum(state["exp_avg"].sum().item() for state in optimizer.state.values()))
        return step(cfg, model, heads, optimizer, *rest)

    monkeypatch.setattr(rl, "step", watched)
    monkeypatch.setattr(rl, "is_right", lambda *x: x[0].suite in ("add", "mul", "mod") and coin(*x))
    monkeypatch.setattr(evaluation, "PARTS", 4)
    command, path = ["onestep", cfg.out, "--checkpoint=ckpt-2"], Path(cfg.out, "ckpt-2.pt")
    weights = path.read_bytes()
    with pytest.raises(ValueError, match="nowhere: cannot be used here"):
        evaluation.main(evaluation.parse([*command, "--device=nowhere"]))
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="8: 0 first and 0 second"):
        patch.setattr(rl, "is_right", lambda *x: False)
        evaluation.main(evaluation.parse([*command, "--rollouts=8"]))
    evaluation.main(evaluation.parse([*command, "--rollouts=16", "--device=cpu"]))
    text = path.with_name("onestep-ckpt-2.json").read_text(encoding="utf-8")
    found = json.loads(text, parse_constant=pytest.fail)  # no NaN
    assert 0 < found["noise_g"][0] < 100 and found["noise_g"][1:] == [1.0, 0.0]
    assert found["rl"][1] == found["sum/1"][1] != 0 < found["sum/1"][2]
    assert path.with_name("onestep-ckpt-2.png").read_bytes().startswith(b"\x89PNG")
    # Optimizer.load_state_dict keeps the tensors it is given: loaded again, moments would drift.
    assert path.read_bytes() == weights and len(moments) == 1 and moments != {0.0}
