"""Problems, advantages, losses and minibatches, each against arithmetic done by hand."""

import math
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import batch, shake, tiny

import model as gpt
import mtp
import occ
import rl

CFG = SimpleNamespace(temperature=1.0, logp_impl="naive", updates_per_rollout=2, num_generations=2, max_new_tokens=8,
                      mtp_depth=2, prompts_per_step=3, speculative=False)  # fmt: skip


def test_tokenizers(monkeypatch):
    tok = rl.get_tokenizer("bytes")
    text = "Größe: 3/4 <|endoftext|>"
    assert tok.encode_ordinary(text) == list(text.encode()) and tok.decode(tok.encode_ordinary(text)) == text
    assert tok.eot_token == 256 and tok.n_vocab == 257
    with pytest.raises(ValueError, match="--tokenizer words: unknown; allowed: bytes, gpt2"):
        rl.get_tokenizer("words")

    def offline(name):
        raise ConnectionError("offline")

    monkeypatch.setattr(rl.tiktoken, "get_encoding", offline)
    with pytest.raises(
        ValueError, match="--tokenizer gpt2: .*TIKTOKEN_CACHE_DIR .*vocab.bpe as 6d1cbeee0f20b3d9"
    ):
        rl.get_tokenizer.__wrapped__("gpt2")


# ----------------------------------------------------------------------------------------------------------------------
# Problems


def number(digits):
    return int(digits[::-1])


def solved(prompt):
    """The answer of a prompt by Python's own arithmetic; numbers stand lowest digit first."""
    body = prompt[:-1]
    if "x" in body:
        a, rest = body.split("x+")
        b, c = map(number, rest.split("="))
        return (c - b) // int(a)
    for sign, operation in (("-", int.__sub__), ("*", int.__mul__), ("%", int.__mod__)):
        if sign in body:
            return operation(*map(number, body.split(sign)))
    return sum(map(number, body.split("+")))


@pytest.mark.parametrize("suite", rl.SUITES)
@pytest.mark.parametrize("difficulty", (1, 2, 8))
def test_gold_answers_are_right_and_problems_have_one_width(suite, difficulty):
    rng, widths = random.Random(0), set()
    for _ in range(200):
        p = rl.draw_problem(suite, difficulty, rng)
        assert int(p.answer) == solved(p.prompt), p
        assert rl.is_right(p, p.solution)
        widths.add((len(p.prompt), len(p.solution)))
    assert widths == {rl.longest(suite, difficulty, None)[:2]}


def test_careless_solutions_are_wrong_about_as_often_as_said():
    rng = random.Random(0)
    for suite in rl.SUITES:
        wrong = {}
        for share in (0.5, 1.0):
            problems = [rl.draw_problem(suite, 2, rng, careless=share) for _ in range(1500)]
            wrong[share] = sum(not rl.is_right(p, p.solution) for p in problems) / 1500
        assert 0.1 < wrong[1.0] < 0.9  # each suite has a place to slip, and not every time
        assert wrong[0.5] == pytest.approx(wrong[1.0] / 2, abs=0.06)


def test_training_and_held_out_problems_are_disjoint():
    """47 + 85 and 85 + 47 are one problem."""
    for suite in rl.SUITES:
        rng = random.Random(1)
        train = {rl.draw_problem(suite, 2, rng).prompt for _ in range(5000)}
        held_out = {p.prompt for p in rl.held_out_problems(suite, 2, 64)}
        assert len(held_out) == 64 and not train & held_out
        if suite == "add":
            twins = {"+".join(reversed(p[:-1].split("+"))) + "=" for p in held_out}
            assert not train & twins
    assert rl.held_out_problems("add", 2, 8) == rl.held_out_problems("add", 2, 8)
    few = rl.held_out_problems("chain", 1, 100)  # a suite with few problems gives what it has
    assert 0 < len(few) < 81 and len({p.prompt for p in few}) == len(few)


def test_answers_are_read_lowest_digit_first():
    problem = rl.Problem("add", "50+50=", "10")
    assert rl.is_right(problem, "####010") and rl.is_right(problem, "####01")
    assert not rl.is_right(problem, "####10") and not rl.is_right(problem, "010")


# ----------------------------------------------------------------------------------------------------------------------
# Advantages


def test_advantages_by_hand():
    reward = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 0.0]])
    by_hand = {"group_std": [], "group": [], "batch": []}
    for row in reward.tolist():
        mean = sum(row) / 4
        std = math.sqrt(sum((r - mean) ** 2 for r in row) / 3)
        by_hand["group_std"].append([(r - mean) / (std + 1e-6) for r in row])
        by_hand["group"].append([r - mean for r in row])
        by_hand["batch"].append([r - 5 / 8 for r in row])
    for kind, expected in by_hand.items():
        torch.testing.assert_close(rl.advantages(reward, kind), torch.tensor(expected))


@pytest.mark.parametrize("value", (0.0, 0.01, 0.3, 1.0))
@pytest.mark.parametrize("kind", ("group_std", "group"))
def test_equal_groups_get_exactly_zero(kind, value):
    reward = torch.full((3, 12), value)
    reward[2, 0] += 1
    adv = rl.advantages(reward, kind)
    assert (adv[:2] == 0).all() and (adv[2] != 0).all()


def test_dividing_rounding_noise_by_epsilon_would_not_be_zero():
    reward = torch.full((12,), 0.3)
    naive = (reward - reward.mean()) / (reward.std(correction=0) + 1e-8)
    assert naive.abs().max() > 0.01  # why `advantages` tests max == min


# ----------------------------------------------------------------------------------------------------------------------
# Losses

LENGTHS = (5, 1, 3, 4)


def loss_by_hand(name, logp, old, ref, adv, max_new_tokens=8):
    """The loss of each method, token by token, from its paper; sequences start in column 0."""
    algo, B, loss = rl.ALGOS[name], len(LENGTHS), 0.0
    for b, n in enumerate(LENGTHS):
        sequence_ratio = torch.exp(sum(logp[b, t] - old[b, t] for t in range(n)) / n)
        for t in range(n):
            a = adv[b]
            ratio = sequence_ratio if name == "gspo" else torch.exp(logp[b, t] - old[b, t])
            high = 0.28 if name == "dapo" else 4e-4 if name == "gspo" else 0.2
            low = 3e-4 if name == "gspo" else 0.2
            objective = min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a)
            if a < 0:
                objective = max(objective, 10 * a)
            if name == "reinforce":
                objective = a * logp[b, t]
            if name == "grpo":
                r = torch.exp(ref[b, t] - logp[b, t])
                objective = objective - 0.04 * (r - 1 - torch.log(r))
            weight = {"token": 1 / sum(LENGTHS), "sequence": 1 / n / B, "constant": 1 / (B * max_new_tokens)}
            loss = loss - weight[algo.loss_agg] * objective
    return loss


def loss_case(spread=1.5):
    g = torch.Generator().manual_seed(0)
    old = -torch.rand(4, 5, generator=g) * 3
    logp = (old + spread * torch.randn(4, 5, generator=g)).requires_grad_()
    ref = old + 0.3 * torch.randn(4, 5, generator=g)
    mask = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
    return {"logp": logp, "old": old, "ref": ref, "adv": torch.tensor([1.0, -0.5, -1.2, 0.7]), "mask": mask}


def whole_loss(name, case, weight=None):
    algo = rl.ALGOS[name]
    weight = rl.token_weights(case["mask"][:, None], algo.loss_agg, 8)[:, 0] if weight is None else weight
    case = case | {"weight": weight}
    loss = rl.policy_loss(case["logp"], case["old"], case["adv"], case["mask"], weight, algo)
    return loss + algo.kl_coef * rl.kl_to_base(case["logp"], case)


@pytest.mark.parametrize("spread", (0.05, 3.0))  # inside the clip, and far beyond it and the dual clip
@pytest.mark.parametrize("name", rl.ALGOS)
def test_losses_by_hand(name, spread):
    case = loss_case(spread)
    loss, expected = (
        whole_loss(name, case),
        loss_by_hand(name, case["logp"], case["old"], case["ref"], case["adv"]),
    )
    torch.testing.assert_close(loss, expected)
    grads = [torch.autograd.grad(x, case["logp"])[0] for x in (loss, expected)]
    torch.testing.assert_close(*grads)


def test_the_cases_reach_every_clip_and_the_metrics_count_them():
    case, algo = loss_case(spread=3.0), rl.ALGOS["dapo"]
    metrics = rl.ratio_metrics("actor", case["logp"], case["old"], case["adv"], case["mask"], algo)
    ratio, adv, low, high = (case["logp"] - case["old"]).exp(), case["adv"], 0, 0
    for b, n in enumerate(LENGTHS):
        for t in range(n):
            low += bool(ratio[b, t] < 0.8 and adv[b] < 0)
            high += bool(ratio[b, t] > 1.28 and adv[b] > 0)
    assert metrics["actor/clip_frac_low"] == low / 13 > 0 and metrics["actor/clip_frac_high"] == high / 13 > 0
    assert (
        metrics["actor/ratio_max"] == pytest.approx(ratio[case["mask"]].max().item())
        and (ratio[adv < 0] > 10).any()
    )


@pytest.mark.parametrize("name", rl.ALGOS)
def test_losses_do_not_depend_on_padding_order_or_shares(name):
    case = loss_case()
    loss = whole_loss(name, case)
    padded = {k: F.pad(x, (0, 3), value=-7.0 if x.dtype == torch.float else False) if x.ndim > 1 else x
              for k, x in case.items()}  # fmt: skip
    torch.testing.assert_close(whole_loss(name, padded), loss)
    torch.testing.assert_close(whole_loss(name, {k: x[[2, 0, 3, 1]] for k, x in case.items()}), loss)
    weight = rl.token_weights(case["mask"][:, None], rl.ALGOS[name].loss_agg, 8)[:, 0]
    shares = [{k: x[rows] for k, x in case.items()} for rows in ([0], [1, 2], [3])]
    weights = [weight[rows] for rows in ([0], [1, 2], [3])]
    parts = sum(whole_loss(name, share, w) for share, w in zip(shares, weights))
    torch.testing.assert_close(parts, loss)
    if rl.ALGOS[name].loss_agg == "token":  # a mean of the shares' own means is another loss
        assert abs(sum(whole_loss(name, share) for share in shares) / 3 - loss) > 1e-3


@pytest.mark.parametrize("name", rl.ALGOS)
def test_neither_an_empty_response_nor_a_runaway_ratio_is_nan(name):
    case = loss_case()
    one_empty = case["mask"] & torch.tensor([[True], [False], [True], [True]])
    for changes in ({"mask": one_empty}, {"mask": torch.zeros_like(one_empty)}, {"old": case["old"] - 1000}):
        loss = whole_loss(name, case | changes)
        assert torch.isfinite(loss) and torch.isfinite(torch.autograd.grad(loss, case["logp"])[0]).all()


def test_k3_is_the_kl_on_average_never_negative_and_finite():
    def k3(logp, ref):
        return rl.kl_to_base(logp, {"ref": ref, "weight": torch.ones(len(logp))})

    p, q = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.2, 0.2, 0.6]).log()
    each = torch.stack([k3(p[i : i + 1], q[i : i + 1]) for i in range(3)])
    assert (each >= 0).all() and k3(p, p) == 0
    torch.testing.assert_close((p.exp() * each).sum(), (p.exp() * (p - q)).sum())
    assert torch.isfinite(k3(torch.tensor([-1000.0]), torch.zeros(1)))


def test_overlong_penalty():
    lengths = torch.tensor([0, 15, 16, 18, 20])
    torch.testing.assert_close(rl.overlong_penalty(lengths, 20), torch.tensor([0.0, 0.0, 0.0, -0.5, -1.0]))


# ----------------------------------------------------------------------------------------------------------------------
# Rollout


def scripted(monkeypatch, rewards, algo):
    """rl.rollout on numbered problems, with a sampler whose rewards follow the script."""
    rewards = iter(rewards)

    def sample(model, tok, problems, G, R, temperature, generator, heads):
        tokens = torch.tensor([[int(p.answer), 9, 9] for p in problems]).repeat_interleave(G, 0)
        mask = torch.ones(len(tokens), 2, dtype=torch.bool)
        reward = torch.tensor([next(rewards) for _ in problems]).flatten()
        return {"tokens": tokens, "mask": mask, "logp": mask * -0.5, "reward": reward}, ["text"] * len(tokens)

    monkeypatch.setattr(rl, "sample", sample)
    problems = (rl.Problem("", "p", str(i)) for i in range(100))
    cfg = SimpleNamespace(**{**vars(CFG), "max_new_tokens": 10})
    return rl.rollout(None, None, None, problems, rl.ALGOS[algo], cfg, None)


def test_dynamic_sampling_replaces_groups_without_gradient(monkeypatch):
    script = [[1.0, 1.0], [1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 0.0]]
    kept, record, _ = scripted(monkeypatch, script, "dapo")
    assert kept["tokens"][::2, 0].tolist() == [1, 3, 5]  # problems 0, 2 and 4 were all right or all wrong
    assert kept["reward"].tolist() == [1.0, 0.0, 0.0, 1.0, 1.0, 0.0]
    assert record["reward/frac_zero_std"] == 0.5 and record["reward/mean"] == pytest.approx(5 / 12)
    assert record["actor/entropy"] == pytest.approx(0.5) and record["response_length/mean"] == 2


def test_dynamic_sampling_gives_up_after_some_rounds(monkeypatch):
    kept, record, _ = scripted(monkeypatch, [[0.0, 0.0]] * 100, "dapo")
    assert len(kept["tokens"]) == 0 and record["reward/frac_zero_std"] == 1.0
    adv = rl.advantages(kept["reward"].view(-1, 2), "group_std").flatten()
    assert rl.minibatches(None, None, kept, adv, rl.ALGOS["dapo"], CFG) == []


def test_the_overlong_penalty_is_in_the_reward_but_does_not_make_a_group_informative(monkeypatch):
    monkeypatch.setattr(rl, "overlong_penalty", lambda length_B, R: -torch.arange(len(length_B)) / 10)
    script = [[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]] + [[0.0, 0.0]] * 9
    kept, record, _ = scripted(monkeypatch, script, "dapo")
    assert kept["tokens"][::2, 0].tolist() == [1, 2] and record["reward/mean"] < 4 / 12
    torch.testing.assert_close(kept["reward"], torch.tensor([0.8, -0.3, -0.4, 0.5]))


def test_without_dynamic_sampling_every_group_stays(monkeypatch):
    kept, _, _ = scripted(monkeypatch, [[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]], "grpo")
    assert kept["tokens"][::2, 0].tolist() == [0, 1, 2]


def test_a_sample_is_scored_by_its_text(monkeypatch):
    model, _ = tiny(vocab=257, block=40)
    tok, problems = rl.get_tokenizer("bytes"), rl.held_out_problems("add", 2, 3)
    asked = []
    monkeypatch.setattr(rl, "is_right", lambda problem, text: asked.append((problem, text)) or len(text) % 2)
    samples, texts = rl.sample(model, tok, problems, 4, 10, 1.0, torch.Generator().manual_seed(0))
    assert [problem for problem, _ in asked] == [p for p in problems for _ in range(4)]
    assert samples["reward"].tolist() == [len(text) % 2 for text in texts]
    for tokens, mask, text in zip(samples["tokens"][:, 1:], samples["mask"], texts):
        assert tok.decode([t for t in tokens[mask].tolist() if t != 256]) == text
    again, same = rl.sample(model, tok, problems, 4, 10, 1.0, torch.Generator().manual_seed(0))
    assert same == texts and torch.equal(again["tokens"], samples["tokens"])


def test_a_prompt_longer_than_the_positions_is_read_from_its_end():
    model, _ = tiny(vocab=257, block=12)
    tok, problem = rl.get_tokenizer("bytes"), rl.Problem("", "0123456789", "")
    samples, _ = rl.sample(model, tok, [problem], 1, 8, 1.0, torch.Generator())
    assert tok.decode(samples["tokens"][0, :4].tolist()) == "6789"


# ----------------------------------------------------------------------------------------------------------------------
# The minibatch of an update


def rolled_out(algo="dapo", **changes):
    """A model, its heads and one rollout of 4 sequences (2 groups) as minibatches."""
    model, heads = tiny()
    tokens, mask = batch()
    logp, _, _ = mtp.logprobs(model, None, tokens, mask)
    samples = {"tokens": tokens, "mask": mask, "logp": logp.detach()}
    cfg = SimpleNamespace(**{**vars(CFG), **changes})
    return (
        model,
        heads,
        rl.minibatches(model, heads, samples, torch.tensor([1.0, -1.0, 0.5, -0.5]), rl.ALGOS[algo], cfg),
    )


def test_minibatches_are_whole_groups_and_old_logprobs_are_those_of_the_rollout():
    model, heads, parts = rolled_out()
    tokens, mask = batch()
    assert [len(mb["adv"]) for mb in parts] == [2, 2]
    logp, logp_mtp, _ = mtp.logprobs(model, heads, tokens, mask)
    for mb, rows, T in zip(parts, (slice(0, 2), slice(2, 4)), (8, 9)):  # each cut to its own longest sequence
        assert torch.equal(mb["tokens"], tokens[rows, :T]) and not mask[rows, T - 1 :].any()
        torch.testing.assert_close(mb["logp"], logp[rows, : T - 1])
        assert mb["weight"].sum() == pytest.approx(1)
        torch.testing.assert_close(mb["weight_mtp"].sum((0, 2)), torch.ones(2))
    assert "old" not in parts[0]  # the first update takes those of its own forward pass
    torch.testing.assert_close(parts[1]["old"], logp[2:])
    torch.testing.assert_close(parts[1]["old_mtp"], logp_mtp[2:])


def test_token_weights_by_hand():
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 0]]).bool()
    expected = {"token": [[1 / 4] * 3 + [0], [0, 1 / 4, 0, 0]], "sequence": [[1 / 6] * 3 + [0], [0, 1 / 2, 0, 0]],
                "constant": [[1 / 20] * 3 + [0], [0, 1 / 20, 0, 0]]}  # fmt: skip
    for agg, weights in expected.items():
        torch.testing.assert_close(rl.token_weights(mask[:, None], agg, 10)[:, 0], torch.tensor(weights))


@pytest.mark.parametrize("kind", ("ce", "policy"))
@pytest.mark.parametrize("algo", ("dapo", "gspo"))
def test_mtp_loss_is_the_mean_over_depths(kind, algo):
    model, heads, (mb,) = rolled_out(algo, updates_per_rollout=1)
    _, old, _ = mtp.logprobs(model, heads, mb["tokens"], mb["mask"])
    mb["old_mtp"] = old.detach()
    shake(model, heads)
    _, logp_mtp, _ = mtp.logprobs(model, heads, mb["tokens"], mb["mask"])
    expected = 0.0
    for k in range(2):
        valid = mb["mask_mtp"][:, k]
        if kind == "ce":
            expected += -logp_mtp[:, k][valid].mean() / 2
        else:
            weight = rl.token_weights(valid[:, None], rl.ALGOS[algo].loss_agg, 8)[
                :, 0
            ]  # its own, not the trunk's
            args = logp_mtp[:, k], mb["old_mtp"][:, k], mb["adv"], valid, weight, rl.ALGOS[algo]
            expected += rl.policy_loss(*args) / 2
    torch.testing.assert_close(rl.mtp_loss(kind, logp_mtp, mb, mb["adv"], rl.ALGOS[algo]), expected)


def test_the_metrics_of_a_first_update():
    """The agreement of head and trunk is the overlap of their distributions; the gap is to the sampler's log-probs."""
    model, heads = tiny(depth=1)
    with torch.no_grad():
        model.lm_head.weight *= 2
    tokens, _ = batch(lengths=((4, 1),) * 4000)
    p = model(tokens)[:, 3].softmax(-1)
    tokens[:, 4] = torch.multinomial(p, 1).squeeze(-1)  # on-policy
    mask = torch.zeros(4000, 4, dtype=torch.bool)
    mask[:, 3] = True
    logp, logp_mtp, h = mtp.logprobs(model, heads, tokens, mask)
    mb = {"logp": logp.detach() - 0.5 * mask, "mask": mask, "mask_mtp": mtp.aligned_mask(mask, 1)}
    mb |= {"old": logp.detach(), "old_mtp": logp_mtp.detach(), "adv": torch.zeros(4000)}
    metrics = rl.update_metrics(logp, logp_mtp, mb, mb["adv"], rl.ALGOS["dapo"], first=True)
    assert metrics["actor/ratio_max"] == metrics["mtp/ratio_max"] == 1 and "rollout/logp_gap" in metrics
    q = model.logits(heads(h, model.wte(tokens))[0][:, 2]).softmax(-1)
    overlap = torch.minimum(p, q).sum(-1).mean().item()
    assert 0.2 < overlap < 0.95 and metrics["mtp/agreement_1"] == pytest.approx(overlap, abs=0.02)
    assert metrics["rollout/logp_gap"] == pytest.approx(0.5, abs=1e-4)


def test_eos_has_a_weight_and_a_gradient():
    model, heads = tiny()
    samples = gpt.generate(model, [[1, 2, 3]] * 2, 2, 8, eos=5)
    (mb,) = rl.minibatches(model, heads, samples, torch.ones(4), rl.ALGOS["dapo"],
                           SimpleNamespace(**{**vars(CFG), "updates_per_rollout": 1}))  # fmt: skip
    ends = (mb["tokens"][:, 1:] == 5) & mb["mask"]
    assert ends.any() and (mb["weight_mtp"][:, 0][ends] > 0).any()
    logp = mb["logp"].clone().requires_grad_()
    loss = rl.policy_loss(logp, mb["logp"], mb["adv"], mb["mask"], mb["weight"], rl.ALGOS["dapo"])
    assert (torch.autograd.grad(loss, logp)[0][ends] != 0).all()


def test_groups_without_gradient_have_none():
    model, heads, (mb,) = rolled_out(updates_per_rollout=1)
    zero = torch.zeros(4)
    logp, logp_mtp, _ = mtp.logprobs(model, heads, mb["tokens"], mb["mask"])
    mb["old_mtp"] = logp_mtp.detach()
    loss = rl.policy_loss(logp, logp.detach(), zero, mb["mask"], mb["weight"], rl.ALGOS["dapo"])
    loss = loss + rl.mtp_loss("policy", logp_mtp, mb, zero, rl.ALGOS["dapo"])
    assert (occ.flat_grad(loss, list(model.parameters())) == 0).all()


def test_the_updates_of_a_step_as_one_record():
    updates = [
        {"a": 1.0, "mtp/ratio_max": 5.0, "occ/lam": 0.0},
        {"a": 2.0, "mtp/ratio_max": 3.0, "occ/lam": 0.4},
    ]
    assert rl.summary(updates) == {"a": 1.5, "mtp/ratio_max": 5.0, "occ/lam": 0.4}
    assert rl.summary([]) == {}
