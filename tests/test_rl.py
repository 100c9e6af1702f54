"""Problems, advantages, losses, minibatches and one step, each against arithmetic done by hand."""

import math
import random
import re

import pytest
import torch
from conftest import batch, coin, config, minibatches, rows_of, small_config, tiny, wider
from torch.testing import assert_close as close

import mtp
import occ
import rl


def solved(prompt):
    """The answer by Python's own arithmetic; numbers stand lowest digit first."""
    text = re.sub(r"\d+", lambda number: str(int(number[0][::-1])), prompt[:-1])
    if "x" not in text:
        return eval(text)
    a, b, c = map(int, re.findall(r"\d+", text))  # a x + b = c
    return (c - b) // a


@pytest.mark.parametrize("suite", rl.SUITES)
@pytest.mark.parametrize("difficulty", (1, 2, 8))
def test_suites(suite, difficulty):
    """Golds are right, widths equal, training problems not held out, as many careless as said."""
    some = [rl.SUITES[suite](random.Random(i).randrange, difficulty, int)[0] for i in range(300)]
    sides = [rl.is_held_out(prompt) for prompt in some]
    assert 0 < sum(sides) < 100  # else what follows would never end
    for side, prompt in zip(sides, some):  # 47+85 is on the side of 85+47
        assert side == rl.is_held_out(re.sub(r"(\d+)\+(\d+)=", r"\2+\1=", prompt))
    rng, wrong, held_out = random.Random(0), {}, rl.held_out_problems(suite, difficulty, 32)
    problems = held_out + [rl.draw_problem(suite, difficulty, rng) for _ in range(300)]
    assert len({p.prompt for p in held_out}) == len(held_out) <= 32
    assert len({(len(p.prompt), len(p.solution)) for p in problems}) == 1
    for p in problems:
        assert int(p.answer) == solved(p.prompt) and rl.is_right(p, p.solution), p
        assert rl.is_held_out(p.prompt) == (p in held_out)
    for share in (0.5, 1.0):
        drawn = [rl.draw_problem(suite, difficulty, rng, careless=share) for _ in range(1000)]
        wrong[share] = sum(not rl.is_right(p, p.solution) for p in drawn) / 1000
    assert wrong[1.0] > 0.1 or (suite, difficulty) == ("sub", 1)  # which has nothing to borrow
    assert wrong[0.5] == pytest.approx(wrong[1.0] / 2, abs=0.06)


def test_advantages_by_hand():
    """Groups of equal rewards get exactly 0, also where their mean is not exactly the reward."""
    reward = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 0.0]])
    group = torch.tensor([[0.5, -0.5, -0.5, 0.5], [0.25, 0.25, 0.25, -0.75]])
    others = torch.tensor([[2 / 3, -2 / 3, -2 / 3, 2 / 3], [1 / 3, 1 / 3, 1 / 3, -1]])
    std, by_hand = torch.tensor([[3**-0.5], [0.5]]), {"group": group, "others": others}
    by_hand |= {"group_std": group / (std + 1e-6), "batch": reward - 5 / 8}
    for kind, expected in by_hand.items():
        close(rl.advantages(reward, kind), expected)
        equal = rl.advantages(torch.tensor([[0.01], [0.3], [1.0]]).expand(3, 12), kind)
        assert (equal == 0).all() or kind == "batch"


LENGTHS, ADV = (5, 1, 3, 4), torch.tensor([1.0, -0.5, -1.2, 0.7])
PAPERS = {  # advantage; what the loss is a mean over; clip below and above
    "reinforce": ("batch", "token", 0.0, 0.0),
    "rloo": ("others", "token", 0.2, 0.2),
    "grpo": ("group_std", "sequence", 0.2, 0.2),
    "drgrpo": ("group", "constant", 0.2, 0.2),
    "dapo": ("group_std", "token", 0.2, 0.28),
    "gspo": ("group_std", "sequence", 3e-4, 4e-4),
    "cispo": ("group_std", "token", 1.0, 0.28),
}


def loss_by_hand(name, case):
    """The loss of each method, token by token, from its paper; sequences start in column 0."""
    _, mean_over, low, high = PAPERS[name]
    logp, loss = case["logp"], 0.0
    for b, (n, a) in enumerate(zip(LENGTHS, ADV)):
        log_ratio = (logp - case["old"])[b, :n]
        weight = {"token": 1 / 13, "sequence": 1 / n / 4, "constant": 1 / (4 * 8)}[mean_over]
        for t in range(n):
            ratio = torch.exp(log_ratio.mean() if name == "gspo" else log_ratio[t])
            clipped = ratio.clamp(1 - low, 1 + high)
            objective = max(min(ratio * a, clipped * a), 10 * min(a, 0 * a))
            if name in ("reinforce", "cispo"):
                objective = a * logp[b, t] * (clipped.detach() if name == "cispo" else 1)
            if name == "grpo":
                r = torch.exp(case["ref"][b, t] - logp[b, t])
                objective = objective - 0.04 * (r - 1 - torch.log(r))
            loss = loss - weight * objective
    return loss


def loss_case(spread=1.5):
    old = -torch.rand(4, 5) * 3
    logp = (old + spread * torch.randn(4, 5)).requires_grad_()
    case = {"logp": logp, "old": old, "ref": old + 0.3 * torch.randn(4, 5), "adv": ADV}
    return case | {"mask": torch.arange(5) < torch.tensor(LENGTHS)[:, None]}


def weights_of(name, case):
    return rl.token_weights(case["mask"][:, None], rl.ALGOS[name].loss_agg, 8)[:, 0]


def whole_loss(name, case):
    return rl.trunk_loss(case["logp"], {"weight": weights_of(name, case)} | case, rl.ALGOS[name])


@pytest.mark.parametrize("spread", (0.05, 3.0))  # inside the clip; far beyond it and the dual clip
@pytest.mark.parametrize("name", rl.ALGOS)
def test_losses_by_hand(name, spread):
    """Independent of padding, order and shares; finite where nothing is, or too much."""
    case, algo = loss_case(spread), rl.ALGOS[name]
    loss, expected = whole_loss(name, case), loss_by_hand(name, case)
    got, by_hand = (torch.autograd.grad(x, case["logp"])[0] for x in (loss, expected))
    close((loss, got), (expected, by_hand))
    assert algo.advantage == PAPERS[name][0]
    assert name != "cispo" or (got[case["mask"]] != 0).all()  # of clipped tokens, too
    for other in (wider(case), rows_of(case, [2, 0, 3, 1])):
        close(whole_loss(name, other), loss)
    weighted, shares = case | {"weight": weights_of(name, case)}, ([0], [1, 2], [3])
    close(sum(whole_loss(name, rows_of(weighted, x)) for x in shares), loss)
    if algo.loss_agg == "token":  # a mean of the shares' own means is another loss
        assert abs(sum(whole_loss(name, rows_of(case, x)) for x in shares) / 3 - loss) > 1e-3
    some = case["mask"] & (torch.arange(4) != 1)[:, None]
    for key, x in ("mask", some), ("mask", some & False), ("old", case["old"] - 1e3), ("old", 1e3):
        loss = whole_loss(name, case | {key: x})
        assert loss.isfinite() and torch.autograd.grad(loss, case["logp"])[0].isfinite().all()


def test_k3_goes_on_along_its_tangent():
    """From log r = 10 on it is a line: far from the base the pull back to it is needed most."""
    log_r = torch.tensor([-29.0, -10.0, 0.001, 0.5, 10.0, 10.01, 29.0])
    logp, slope = (-log_r).requires_grad_(), torch.expm1(log_r.clamp(max=10))
    k3 = slope - log_r + (log_r > 10) * (slope + 1) * (log_r - 10)
    for i, one in enumerate(torch.eye(7)):
        value = rl.kl_to_base(logp, {"ref": 0 * log_r, "weight": one})
        close((value, torch.autograd.grad(value, logp)[0]), (k3[i], -slope * one))


@pytest.mark.parametrize("algo, script, kept", [  # two samples a problem, three problems
    ("dapo", "11 10 00 01 00 10 01", [1, 3, 5]),  # two are missing: four more, the first three
    ("dapo", "11 10 00 00 00 01 11", [1, 5]),  # what is missing then stays missing
    ("dapo", "01 10 01", [0, 1, 2]),
    ("rloo", "11 10 00", [0, 1, 2]),  # neither dynamic sampling nor a penalty
])  # fmt: skip
def test_dynamic_sampling_replaces_equal_groups_once(monkeypatch, algo, script, kept):
    """Equal by correctness: the overlong penalty, here of samples of 5 to 8 tokens, comes after."""
    right = torch.tensor([[*map(float, pair)] for pair in script.split()])
    scripted, length = iter(right.flatten()), torch.arange(right.numel()) % 4 + 5
    problems = (rl.Problem("", "p", str(i)) for i in range(100))

    def sample(model, tok, problems, *_):
        number = torch.tensor([int(p.answer) for p in problems]).repeat_interleave(2)
        rows = 2 * number + torch.arange(len(number)) % 2
        mask = torch.arange(8) < length[rows, None]
        out = {"tokens": number[:, None].expand(-1, 9), "mask": mask, "logp": mask * -0.5}
        return out | {"right": torch.stack([next(scripted) for _ in rows])}, ["text"] * len(rows)

    monkeypatch.setattr(rl, "sample", sample)
    samples, record, _ = rl.rollout(None, None, problems, rl.ALGOS[algo], config(), None)
    assert samples["tokens"][::2, 0].tolist() == kept and not [*scripted]
    penalty = torch.tensor([0.0, 0.0, 0.6 / 1.6, 1.0])[length - 5].view(-1, 2) * (algo == "dapo")
    reward, alike = right - penalty, (right[:, 0] == right[:, 1]).float()
    close(samples["reward"], reward[kept].flatten())
    for name, x in (("right", right), ("mean", reward), ("frac_zero_std", alike)):
        assert record[f"reward/{name}"] == pytest.approx(x.mean().item())


def test_samples_are_scored_by_their_texts_and_share_no_random_numbers(monkeypatch):
    """A trunk that finds all tokens alike says what its random numbers say."""
    model, said, asked = tiny(vocab=257, block=40)[0], set(), []
    torch.nn.init.zeros_(model.lm_head.weight)
    problems, generator = rl.held_out_problems("add", 2, 3), torch.Generator().manual_seed(0)
    monkeypatch.setattr(rl, "is_right", lambda *args: asked.append(args) or len(args[1]) % 2)
    for _ in range(2):
        out, texts = rl.sample(model, rl.get_tokenizer("bytes"), problems, 4, 10, 1.0, generator)
        assert asked[-12:] == [(problems[i // 4], text) for i, text in enumerate(texts)]
        assert out["right"].tolist() == [len(text) % 2 for text in texts]
        for tokens, mask, text in zip(out["tokens"][:, 1:], out["mask"], texts):
            said.add(tuple(tokens[mask][:3].tolist()))
            assert bytes(t for t in tokens[mask] if t < 256).decode(errors="replace") == text
    assert len(said) == 24


@pytest.mark.parametrize("algo, of_5, of_2, of_1", [  # the weights of the tokens of a sequence
    ("dapo", 5 / 7, 2 / 7, 1 / 6), ("grpo", 0.5, 0.5, 0.5), ("drgrpo", 5 / 16, 2 / 16, 1 / 16),
])  # fmt: skip
def test_minibatches(algo, of_5, of_2, of_1):
    """Whole groups, cut to the longest, weighed as the algorithm says: for trunk and heads."""
    model, heads = tiny()
    parts, (tokens, mask) = minibatches(model, heads, algo), batch()
    logp, logp_mtp = mtp.logprobs(model, heads, tokens, mask)
    for mb, rows, T in zip(parts, (slice(0, 2), slice(2, 4)), (8, 9), strict=True):
        assert torch.equal(mb["tokens"], tokens[rows, :T]) and not mask[rows, T - 1 :].any()
        close(mb["logp"], logp[rows, : T - 1])
    close((mb["old"], mb["old_mtp"]), (logp[2:], logp_mtp[2:]))
    assert "old" not in parts[0]  # the first update takes those of its own forward pass
    of_5_beside_1 = 5 / 6 if algo == "dapo" else of_5  # depth 2 scores 5 and 1 tokens
    by_hand = {"weight": [of_5, of_2], "weight_mtp": [[of_5, of_5_beside_1], [of_2, of_1]]}
    for name, expected in (by_hand | {"weight_ce": [[5 / 7, 5 / 6], [2 / 7, 1 / 6]]}).items():
        close(parts[0][name].sum(-1), torch.tensor(expected))
    logp_mtp = (mb["old_mtp"] + 1).requires_grad_()  # ratios are e: clipped where A > 0
    policy = mb["weight_mtp"] * math.e * mb["adv"].clamp(max=0)[:, None, None]
    for kind, weight in (("policy", policy), ("ce", mb["weight_ce"])):
        loss = rl.mtp_loss(kind, logp_mtp, mb, rl.ALGOS[algo])
        close(torch.autograd.grad(loss, logp_mtp), (-weight / 2,))


def test_metrics_by_hand():
    """Of head k's drafts a share min(1, q/p), on average over the tokens it scores, is accepted."""
    case = loss_case(spread=3.0)
    logp, old, mask = case["logp"].detach(), case["old"], case["mask"]
    q, valid = torch.rand(4, 2, 5).log(), mtp.aligned_mask(mask, 2)
    mb = {"old_mtp": q, "mask_mtp": valid, "weight": 0.0, "logp": old + 9 - 8.5 * mask}
    metrics = rl.update_metrics(logp, q, case | mb, rl.ALGOS["dapo"])
    ratio, worse, better = (logp - old).exp(), mask & (ADV < 0)[:, None], mask & (ADV > 0)[:, None]
    expected = {"mtp/ratio_max": 1.0, "actor/ratio_max": ratio[mask].max(), "rollout/logp_gap": 0.5}
    expected["actor/clip_frac_low"] = (ratio[worse] < 0.8).sum() / 13
    expected["actor/clip_frac_high"] = (ratio[better] > 1.28).sum() / 13
    for k in (0, 1):
        expected[f"mtp/agreement_{k + 1}"] = (q[:, k] - old)[valid[:, k]].exp().clamp(max=1).mean()
    for name, value in expected.items():
        assert metrics[name].item() == pytest.approx(float(value)) != 0, name


@pytest.mark.parametrize("updates", (1, 2))
@pytest.mark.parametrize("regime", ("detach", "ce", "policy", "occ", "exact"))
def test_the_last_update_of_a_step_by_hand(regime, updates, tmp_path, monkeypatch):
    """The λ used, g and m; trunk and heads clipped apart: large rewards make large gradients."""
    monkeypatch.setattr(rl, "is_right", lambda problem, text: 100 * coin(problem, text))
    (model, heads), (kind, rule) = tiny(vocab=257, block=40, layers=1), occ.REGIMES[regime]
    options = {"algo": "rloo", "probe_every": 1, "lam": 0.7, "lam_plus": 0.9, "regime": regime}
    cfg = small_config(tmp_path, updates_per_rollout=updates, **options)
    theta, phi, algo = [*model.parameters()], [*heads.parameters()], rl.ALGOS["rloo"]
    optimizer = torch.optim.Adam([{"params": theta}, {"params": phi, "lr": 0.0}], 0.01)
    record, _, last = rl.step(cfg, model, heads, optimizer, rl.get_tokenizer("bytes"), 1)
    torch.nn.utils.vector_to_parameters(last.theta, theta)  # the heads have not moved
    logp, logp_mtp = mtp.logprobs(model, heads, last.mb["tokens"], last.mb["mask"])
    loss_mtp = rl.mtp_loss(kind, logp_mtp, last.mb, algo)
    g, m = (occ.flat_grad(x, theta) for x in (rl.trunk_loss(logp, last.mb, algo), loss_mtp))
    proxy = occ.logprob_coefficient(*occ.token_deltas(logp, logp_mtp, last.mb), 0.9)
    lam = {"zero": 0, "fixed": 0.7, "proxy": proxy, "exact": 0.9 * (g @ m) / (m @ m)}[rule]
    assert record["occ/lam"] == pytest.approx(float(lam), rel=1e-3)
    assert (lam == 0) == (rule == "zero" or (rule, updates) == ("proxy", 1))  # exactly
    expected = g + lam * m, occ.flat_grad(loss_mtp, phi)
    assert all(x.norm() > 2 or kind == "ce" for x in expected)  # the clip binds
    clipped = [x / x.norm().clamp(min=1) for x in expected]
    used = [torch.cat([p.grad.flatten() for p in part]) for part in (theta, phi)]
    close((last.g, last.m, *used), (g, m, *clipped), rtol=1e-3, atol=1e-5)
