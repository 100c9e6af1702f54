"""Problems, verifier, advantages and losses, each against arithmetic done by hand."""

import math
import random
import re
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import batch, tiny

import eval as evaluation
import mtp
import occ
import rl

CFG = SimpleNamespace(
    temperature=1.0,
    logp_impl="naive",
    mtp_base="mtp",
    mtp_learn=None,
    updates_per_rollout=2,
    num_generations=2,
    max_new_tokens=8,
)


def test_tokenizers(monkeypatch):
    tok = rl.get_tokenizer("bytes")
    text = "Größe: 3/4 <|endoftext|>"
    assert tok.encode_ordinary(text) == list(text.encode()) and tok.decode(tok.encode_ordinary(text)) == text
    assert tok.eot_token == 256 and tok.n_vocab == 257
    with pytest.raises(ValueError, match="tokenizer: 'words' is unknown; allowed: bytes, gpt2"):
        rl.get_tokenizer("words")
    monkeypatch.setattr(rl.tiktoken, "get_encoding", lambda name: (_ for _ in ()).throw(ConnectionError("offline")))
    with pytest.raises(ValueError, match="--tokenizer gpt2: its vocabulary could not be fetched"):
        rl.get_tokenizer.__wrapped__("gpt2")


# Problems


def solved(prompt):
    """The answer of a prompt by Python's own arithmetic; numbers stand lowest digit first."""
    n = lambda digits: int(digits[::-1])  # noqa: E731
    body = prompt[:-1]
    if "How many" in body:
        total, *events = re.findall(r"(has|gets|gives) (\d+)( times)?", body)
        total = int(total[1])
        for verb, x, times in events:
            total = total * int(x) if times else total + int(x) if verb == "gets" else total - int(x)
        return total
    if "x" in body:
        a, rest = body.split("x+")
        b, c = map(n, rest.split("="))
        return (c - b) // int(a)
    for sign, f in (("-", int.__sub__), ("*", int.__mul__), ("%", int.__mod__)):
        if sign in body:
            return f(*map(n, body.split(sign)))
    return sum(map(n, body.split("+")))


@pytest.mark.parametrize("suite", rl.SUITES)
@pytest.mark.parametrize("difficulty", (1, 2, 4))
def test_gold_answers_are_right(suite, difficulty):
    rng = random.Random(0)
    for _ in range(200):
        p = rl.draw_problem(suite, difficulty, rng)
        assert int(p.answer) == solved(p.prompt), p
        assert rl.is_right(p, p.solution)


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
    rng, rng_wrong = random.Random(1), random.Random(2)
    for suite in rl.SUITES:
        train = {rl.draw_problem(suite, 2, rng).prompt for _ in range(2000)}
        held_out = {p.prompt for p in rl.held_out_problems(suite, 2, 64)}
        assert len(held_out) == 64 and not train & held_out
        draw, solve, n = rl.SUITES[suite].draw, rl.SUITES[suite].solve, rl.SUITES[suite].n(2)
        careless_split = {solve(draw(rng_wrong, n), n, lambda: False)[0] for _ in range(2000)}
        assert careless_split & held_out or suite == "words"  # drawing from another seed is no split
    assert rl.held_out_problems("add", 2, 8) == rl.held_out_problems("add", 2, 8)


def test_twins_are_on_the_same_side():
    """47 + 85 and 85 + 47 are one problem."""
    rng = random.Random(1)
    train = {rl.draw_problem("add", 2, rng).prompt for _ in range(20_000)}
    held_out = [p.prompt for p in rl.held_out_problems("add", 2, 64)]
    assert not {"+".join(reversed(p[:-1].split("+"))) + "=" for p in held_out} & train


def test_every_problem_of_a_suite_is_written_at_one_width():
    rng = random.Random(0)
    for suite in rl.ARITHMETIC:
        for difficulty in (1, 3, 8):
            widths = {
                (len(p.prompt), len(p.solution)) for p in (rl.draw_problem(suite, difficulty, rng) for _ in range(50))
            }
            assert widths == {rl.longest([suite], difficulty, None)[:2]}


def test_stories_are_no_longer_than_there_is_room_for():
    rng = random.Random(0)
    for difficulty in (1, 2, 8):
        prompt, solution, _ = rl.longest(["words"], difficulty, None)
        problems = [rl.draw_problem("words", difficulty, rng, careless=0.8) for _ in range(1000)]
        longest = max(len(p.prompt) for p in problems), max(len(p.solution) for p in problems)
        assert 0.8 * prompt <= longest[0] <= prompt and 0.8 * solution <= longest[1] <= solution


def test_answers_are_read_lowest_digit_first():
    problem = rl.Problem("add", "50+50=", "10")
    assert rl.is_right(problem, "####010") and rl.is_right(problem, "####01")
    assert not rl.is_right(problem, "####10") and not rl.is_right(problem, "010")


def test_a_suite_with_few_problems_gives_what_it_has():
    problems = rl.held_out_problems("chain", 1, 100)
    assert 0 < len(problems) < 81 and len({p.prompt for p in problems}) == len(problems)


def test_unknown_suite():
    assert rl.suites_of("add,mul") == ["add", "mul"]
    with pytest.raises(ValueError, match="--task: unknown suite 'gsm'; allowed: arithmetic, or some of add,sub"):
        rl.suites_of("add,gsm")


# Verifier


@pytest.mark.parametrize(
    "text, answer",
    [
        ("3+4 = 7\n#### 7", "7"),
        ("#### 1\n#### 2 \nthanks", "2"),  # the last one
        ("so \\boxed{\\frac{1}{2}} and #### 3", "\\frac{1}{2}"),  # a box wins; braces match
        ("\\boxed{1} then \\boxed{2}", "2"),
        ("\\boxed{1", None),
        ("\\boxed{}", None),
        ("Answer: 12\nAnswer: 13", "13"),
        ("the answer is 7", None),  # never the whole text
        ("####", None),
        ("", None),
    ],
)
def test_extract_answer(text, answer):
    assert rl.extract_answer(text) == answer


EQUAL = [
    ("7", "7"),
    ("7", " 7. "),
    ("1,234", "1234"),
    ("1234", "$1,234.00"),
    ("0.5", "1/2"),
    ("-3/4", "3/-4"),
    ("-3", "\u22123"),
    ("+5", "5"),
    ("007", "7"),
    (".5", "0.50"),
    ("2/4", "0.5"),
    ("1.5/3", "1/2"),
    ("Blue  Whale", "blue whale"),
    ("1e3", "1000"),
]
UNEQUAL = [
    ("7", "8"),
    ("7", "-7"),
    ("1,23", "123"),
    ("0.333", "1/3"),
    ("1", "1/0"),
    ("7", "7 apples"),
    ("7", ""),
    ("7", None),
    (None, None),
    (None, "7"),
    ("12", "1 2"),
    ("7", "6.9999999999999999999"),
    ("1234", "1,2,34"),
    ("10", "٣"),
    ("4", "2**2"),
    ("4", "2+2"),
]


def test_answers_equal():
    for gold, candidate in EQUAL:
        assert rl.answers_equal(gold, candidate) and rl.answers_equal(candidate, gold), (gold, candidate)
    for gold, candidate in UNEQUAL:
        assert not rl.answers_equal(gold, candidate), (gold, candidate)


def test_hostile_text_is_neither_evaluated_nor_slow():
    hostile = [
        "9**9**9**9",
        "1e999999999",
        "__import__('os').system('false')",
        "{" * 10_000,
        "1" * 1_000_000,
        "1," * 100_000,
        "-" * 100_000,
        "{}" * 500_000,
        "1/" * 50_000,
        "\\boxed{" * 10_000,
        "#" * 100_000,
        "0." + "0" * 1_000_000 + "1",
    ]
    for text in hostile:
        began = time.perf_counter()
        assert not rl.answers_equal("7", text)
        assert not rl.answers_equal("7", rl.extract_answer(f"\\boxed{{{text}"))
        assert not rl.answers_equal("7", rl.extract_answer(f"#### {text}"))
        assert time.perf_counter() - began < 0.2, text[:20]


# Advantages


def test_advantages_by_hand():
    reward = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 0.0]])
    by_hand = {"group_std": [], "group": [], "loo": [], "batch": []}
    for row in reward.tolist():
        mean = sum(row) / 4
        std = math.sqrt(sum((r - mean) ** 2 for r in row) / 3)
        by_hand["group_std"].append([(r - mean) / (std + 1e-6) for r in row])
        by_hand["group"].append([r - mean for r in row])
        by_hand["loo"].append([r - (sum(row) - r) / 3 for r in row])
        by_hand["batch"].append([r - 5 / 8 for r in row])
    for kind, expected in by_hand.items():
        torch.testing.assert_close(rl.advantages(reward, kind), torch.tensor(expected))


@pytest.mark.parametrize("value", (0.0, 0.01, 0.3, 1.0))
@pytest.mark.parametrize("kind", ("group_std", "group", "loo"))
def test_equal_groups_get_exactly_zero(kind, value):
    reward = torch.full((3, 12), value)
    reward[2, 0] += 1
    adv = rl.advantages(reward, kind)
    assert (adv[:2] == 0).all() and (adv[2] != 0).all()


def test_dividing_rounding_noise_by_epsilon_would_not_be_zero():
    reward = torch.full((12,), 0.3)
    naive = (reward - reward.mean()) / (reward.std(correction=0) + 1e-8)
    assert naive.abs().max() > 0.01  # why `advantages` tests max == min


# Losses


def by_hand(name, logp, old, ref, adv, lengths, max_new_tokens=8):
    """The loss of each method, token by token, from its paper; sequences start in column 0."""
    algo, B = rl.ALGOS[name], len(lengths)
    total, tokens = 0.0, sum(lengths)
    for b, n in enumerate(lengths):
        if name == "gspo":
            ratio = torch.exp(sum(logp[b, t] - old[b, t] for t in range(n)) / n)
        for t in range(n):
            a = adv[b]
            if name != "gspo":
                ratio = torch.exp(logp[b, t] - old[b, t])
            high = 0.28 if name == "dapo" else 4e-4 if name == "gspo" else 0.2
            low = 3e-4 if name == "gspo" else 0.2
            clipped = min(max(ratio, 1 - low), 1 + high)
            objective = min(ratio * a, clipped * a)
            if a < 0:
                objective = max(objective, 10 * a)
            if name == "reinforce":
                objective = a * logp[b, t]
            if name == "grpo":
                r = torch.exp(ref[b, t] - logp[b, t])
                objective = objective - 0.04 * (r - 1 - torch.log(r))
            weight = {"token": 1 / tokens, "sequence": 1 / n / B, "constant": 1 / (B * max_new_tokens)}[algo.loss_agg]
            total = total - weight * objective
    return total


LENGTHS = (5, 1, 3, 4)


def loss_case(seed=0, spread=1.5):
    g = torch.Generator().manual_seed(seed)
    old = -torch.rand(4, 5, generator=g) * 3
    logp = (old + spread * torch.randn(4, 5, generator=g)).requires_grad_()
    ref = old + 0.3 * torch.randn(4, 5, generator=g)
    mask = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
    return logp, old, ref, torch.tensor([1.0, -0.5, -1.2, 0.7]), mask


def whole_loss(name, logp, old, ref, adv, mask, weight=None):
    algo = rl.ALGOS[name]
    weight = rl.token_weights(mask, algo.loss_agg, 8) if weight is None else weight
    loss, stats = rl.policy_loss(logp, old, adv, mask, weight, algo)
    return loss + algo.kl_coef * rl.k3_kl(logp, ref, weight), stats


@pytest.mark.parametrize("spread", (0.05, 3.0))  # inside the clip, and far beyond it and the dual clip
@pytest.mark.parametrize("name", rl.ALGOS)
def test_losses_by_hand(name, spread):
    logp, old, ref, adv, mask = loss_case(spread=spread)
    expected = by_hand(name, logp, old, ref, adv, LENGTHS)
    loss, _ = whole_loss(name, logp, old, ref, adv, mask)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, logp)[0] for x in (loss, expected)))


def test_the_cases_reach_every_clip():
    logp, old, _, adv, mask = loss_case(spread=3.0)
    _, stats = rl.policy_loss(logp, old, adv, mask, mask / mask.sum(), rl.ALGOS["dapo"])
    assert stats["clip_frac_low"] > 0 and stats["clip_frac_high"] > 0
    assert ((logp - old)[adv < 0].exp() > 10).any() and stats["ratio_max"] > 10


@pytest.mark.parametrize("name", rl.ALGOS)
def test_losses_do_not_depend_on_padding_order_or_micro_batches(name):
    logp, old, ref, adv, mask = loss_case()
    args = logp, old, ref, adv, mask
    loss, _ = whole_loss(name, *args)
    grad = torch.autograd.grad(loss, logp)[0]

    padded = [F.pad(x, (0, 3), value=v) if x.ndim == 2 else x for x, v in zip(args, (-7.0, -1.0, -2.0, 0, False))]
    torch.testing.assert_close(whole_loss(name, *padded)[0], loss)
    order = [2, 0, 3, 1]
    torch.testing.assert_close(whole_loss(name, *(x[order] for x in args))[0], loss)

    weight = rl.token_weights(mask, rl.ALGOS[name].loss_agg, 8)
    parts = [whole_loss(name, *(x[rows] for x in args), weight[rows])[0] for rows in ([0], [1, 2], [3])]
    torch.testing.assert_close(sum(parts), loss)
    torch.testing.assert_close(torch.autograd.grad(sum(parts), logp)[0], grad)
    if rl.ALGOS[name].loss_agg == "token":  # a mean of the micro-batches' own means is another loss
        wrong = sum(whole_loss(name, *(x[rows] for x in args))[0] for rows in ([0], [1, 2], [3])) / 3
        assert abs(wrong - loss) > 1e-3


@pytest.mark.parametrize("name", rl.ALGOS)
def test_an_empty_response_or_an_empty_batch_is_no_nan(name):
    logp, old, ref, adv, mask = loss_case()
    mask = mask & torch.tensor([[True], [False], [True], [True]])
    for m in (mask, torch.zeros_like(mask)):
        loss, _ = whole_loss(name, logp, old, ref, adv, m)
        assert torch.isfinite(loss) and torch.isfinite(torch.autograd.grad(loss, logp)[0]).all()


@pytest.mark.parametrize("name", rl.ALGOS)
def test_a_runaway_ratio_is_no_nan(name):
    logp, old, ref, adv, mask = loss_case()
    loss, _ = whole_loss(name, (logp + 1000).detach().requires_grad_(), old, ref, adv, mask)
    far = torch.full_like(logp, 0.0, requires_grad=True)
    loss, _ = whole_loss(name, far, old - 1000, ref, adv, mask)
    assert torch.isfinite(torch.autograd.grad(loss, far)[0]).all()


def test_k3_is_finite_however_far_the_policy_has_gone():
    logp = torch.tensor([-1000.0], requires_grad=True)
    kl = rl.k3_kl(logp, torch.zeros(1), torch.ones(1))
    assert torch.isfinite(kl) and torch.isfinite(torch.autograd.grad(kl, logp)[0]).all()


def test_k3_is_the_kl_on_average_and_never_negative():
    p, q = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.2, 0.2, 0.6]).log()
    each = torch.stack([rl.k3_kl(p[i : i + 1], q[i : i + 1], torch.ones(1)) for i in range(3)])
    assert (each >= 0).all() and rl.k3_kl(p, p, torch.ones(3)) == 0
    torch.testing.assert_close((p.exp() * each).sum(), (p.exp() * (p - q)).sum())


def test_overlong_penalty():
    lengths = torch.tensor([0, 15, 16, 18, 20])
    torch.testing.assert_close(rl.overlong_penalty(lengths, 20), torch.tensor([0.0, 0.0, 0.0, -0.5, -1.0]))


# Rollout


class Numbered(int):
    """A problem that is its own number, and its only token."""

    prompt = "p"


def scripted(monkeypatch, rewards, algo):
    """rl.collect on numbered problems, with a sampler whose rewards follow the script."""
    rewards = iter(rewards)

    def rollout(model, tok, problems, G, R, temperature, generator, keep_hidden, spec):
        reward = torch.tensor([next(rewards) for _ in problems])
        tokens = torch.tensor([[int(p), 9, 9] for p in problems]).repeat_interleave(G, 0)
        mask = torch.tensor([[False, True, True]]).expand_as(tokens)
        return rl.Samples(tokens, mask, mask * -0.5), ["text"] * len(tokens), reward

    monkeypatch.setattr(rl, "rollout", rollout)
    cfg = SimpleNamespace(num_generations=2, max_new_tokens=10, prompts_per_step=3, temperature=1.0)
    return rl.collect(None, None, map(Numbered, range(100)), rl.ALGOS[algo], cfg, None)


def test_dynamic_sampling_replaces_groups_without_gradient(monkeypatch):
    script = [[1.0, 1.0], [1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 0.0]]
    samples, reward, metrics, _ = scripted(monkeypatch, script, "dapo")
    assert samples.tokens_BT[::2, 0].tolist() == [1, 3, 5]  # problems 0, 2 and 4 were all right or all wrong
    assert reward.tolist() == [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]
    assert metrics["reward/frac_zero_std"] == 0.5 and metrics["reward/mean"] == pytest.approx(5 / 12)
    assert metrics["actor/entropy"] == pytest.approx(0.5) and metrics["response_length/mean"] == 2


def test_dynamic_sampling_gives_up_after_some_rounds(monkeypatch):
    samples, reward, metrics, _ = scripted(monkeypatch, [[0.0, 0.0]] * 100, "dapo")
    assert len(reward) == len(samples.tokens_BT) == 0 and metrics["reward/frac_zero_std"] == 1.0
    adv = rl.advantages(reward, "group_std").flatten()
    assert rl.minibatches(None, None, samples, adv, rl.ALGOS["dapo"], CFG) == ([], {})


def test_the_overlong_penalty_is_in_the_reward_but_does_not_make_a_group_informative(monkeypatch):
    monkeypatch.setattr(rl, "overlong_penalty", lambda length_B, R: -torch.arange(len(length_B)) / 10)
    samples, reward, metrics, _ = scripted(monkeypatch, [[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]] + [[0.0, 0.0]] * 9, "dapo")
    assert samples.tokens_BT[::2, 0].tolist() == [1, 2] and metrics["reward/mean"] < 4 / 12
    torch.testing.assert_close(reward, torch.tensor([[0.8, -0.3], [-0.4, 0.5]]))


def test_without_it_every_group_stays(monkeypatch):
    samples, reward, _, _ = scripted(monkeypatch, [[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]], "grpo")
    assert samples.tokens_BT[::2, 0].tolist() == [0, 1, 2] and reward.shape == (3, 2)


# The minibatch of an update


def whole_batch(objective="policy", algo="dapo", depth=2, **changes):
    """A model, its heads and one rollout of 4 sequences (2 groups) as minibatches."""
    model, heads = tiny(depth=depth)
    tokens, mask = batch()
    logp, *_ = mtp.logprobs(model, None, tokens, mask)
    samples = rl.Samples(tokens, F.pad(mask, (1, 0)), F.pad(logp.detach(), (1, 0)))
    cfg = SimpleNamespace(**{**vars(CFG), **changes})
    adv = torch.tensor([1.0, -1.0, 0.5, -0.5])
    parts, metrics = rl.minibatches(model, heads, samples, adv, rl.ALGOS[algo], cfg)
    return model, heads, parts, metrics, cfg


def test_minibatches_are_whole_groups_and_old_logprobs_are_those_of_the_rollout():
    model, heads, parts, metrics, _ = whole_batch()
    tokens, mask = batch()
    assert [len(mb.adv_B) for mb in parts] == [2, 2]
    logp, logp_k, _, _ = mtp.logprobs(model, heads, tokens, mask)
    for mb, rows, T in zip(parts, (slice(0, 2), slice(2, 4)), (8, 9)):  # each cut to its own longest sequence
        assert torch.equal(mb.tokens_BT, tokens[rows, :T]) and not mask[rows, T - 1 :].any()
        torch.testing.assert_close(mb.logp_old_BT, logp[rows, : T - 1])
        torch.testing.assert_close(mb.logp_old_KBT, logp_k[:, rows, : T - 1])
    assert all(
        mb.weight_BT.sum() == pytest.approx(1) and mb.weight_KBT.sum((1, 2)).allclose(torch.ones(2)) for mb in parts
    )


def test_agreement_is_the_overlap_of_the_two_distributions():
    model, heads = tiny(depth=1)
    with torch.no_grad():
        model.lm_head.weight *= 2
    tokens, _ = batch(lengths=((4, 1),) * 4000)
    p_logits = model(tokens)[:, 3]
    tokens[:, 4] = torch.multinomial(p_logits.softmax(-1), 1).squeeze(-1)  # on-policy
    mask = torch.zeros(4000, 4, dtype=torch.bool)
    mask[:, 3] = True
    logp, logp_k, _, h = mtp.logprobs(model, heads, tokens, mask)
    samples = rl.Samples(tokens, F.pad(mask, (1, 0)), F.pad(logp.detach(), (1, 0)))
    _, metrics = rl.minibatches(model, heads, samples, torch.zeros(4000), rl.ALGOS["dapo"], CFG)
    q_logits = model.logits(heads(h, model.wte(tokens), model.rope(5))[0][:, 2])
    overlap = torch.minimum(p_logits.softmax(-1), q_logits.softmax(-1)).sum(-1).mean().item()
    assert 0.2 < overlap < 0.95 and metrics["mtp/agreement_1"] == pytest.approx(overlap, abs=0.02)


def test_right_after_a_rollout_ratios_are_one_and_lambda_is_exactly_zero():
    model, heads, parts, _, cfg = whole_batch()
    out = rl.losses(model, heads, parts[0], rl.ALGOS["dapo"], "policy", cfg, True, 1.0)
    assert out.stats["actor/ratio_max"] == out.stats["mtp/ratio_max_1"] == 1
    assert (out.delta_rl_N == 0).all() and (out.delta_mtp_N == 0).all()
    assert occ.logprob_coefficient(out.delta_rl_N, out.delta_mtp_N) == 0
    cfg.mtp_base = "main"  # the released code's base: the heads' ratio does not start at 1
    out = rl.losses(model, heads, parts[0], rl.ALGOS["dapo"], "policy", cfg, True, 1.0)
    assert (out.delta_rl_N == 0).all() and out.delta_mtp_N.abs().min() > 0 and out.stats["mtp/ratio_max_1"] > 1
    assert occ.logprob_coefficient(out.delta_rl_N, out.delta_mtp_N) == 0


@pytest.mark.parametrize("objective", ("ce", "policy"))
def test_mtp_loss_and_deltas_by_hand(objective):
    model, heads, parts, _, cfg = whole_batch(objective, updates_per_rollout=1)
    with torch.no_grad():  # an update happened in between
        for p in [*model.parameters(), *heads.parameters()]:
            p.add_(0.02 * torch.randn_like(p))
    mb = parts[0]
    out = rl.losses(model, heads, mb, rl.ALGOS["dapo"], objective, cfg, False, 1.0)
    logp, logp_k, valid, _ = mtp.logprobs(model, heads, mb.tokens_BT, mb.mask_BT)
    for k in range(2):
        if objective == "ce":
            expected = -logp_k[k][valid[k]].mean()
        else:
            weight = valid[k] / valid[k].sum()  # its own count, not the main loss's
            expected, _ = rl.policy_loss(logp_k[k], mb.logp_old_KBT[k], mb.adv_B, valid[k], weight, rl.ALGOS["dapo"])
        torch.testing.assert_close(out.stats[f"mtp/loss_{k + 1}"], expected.detach())
    torch.testing.assert_close(out.mtp, (out.stats["mtp/loss_1"] + out.stats["mtp/loss_2"]) / 2)
    delta = [
        [(logp_k - mb.logp_old_KBT)[k, b, t].item() for k in range(2) if valid[k, b, t]]
        for b, t in mb.mask_BT.nonzero()
    ]
    torch.testing.assert_close(out.delta_mtp_N, torch.tensor([sum(d) / len(d) for d in delta if d]))
    assert len(out.delta_rl_N) == sum(map(bool, delta))


def test_log_probs_are_those_of_the_temperature_that_sampled():
    for temperature in (1.0, 0.5):
        model, heads, parts, _, cfg = whole_batch("ce", updates_per_rollout=1, temperature=temperature)
        mb = parts[0]
        out = rl.losses(model, heads, mb, rl.ALGOS["dapo"], "ce", cfg, True, 1.0)
        main, deep, valid, _ = mtp.logprobs(model, heads, mb.tokens_BT, mb.mask_BT, temperature)
        torch.testing.assert_close(mb.logp_old_BT, main)
        torch.testing.assert_close(out.stats["mtp/loss_2"], -deep[1][valid[1]].mean().detach())


def test_the_samplers_eos_is_in_the_minibatch_with_a_weight():
    model, heads = tiny()
    samples = rl.generate(model, [[1, 2, 3]] * 2, 2, 8, eos=5)
    (mb,), _ = rl.minibatches(
        model,
        heads,
        samples,
        torch.ones(4),
        rl.ALGOS["dapo"],
        SimpleNamespace(**{**vars(CFG), "updates_per_rollout": 1}),
    )
    ends = (mb.tokens_BT[:, 1:] == 5) & mb.mask_BT
    assert ends.any() and (mb.weight_BT[ends] > 0).all() and (mb.weight_KBT[0][ends] > 0).any()


def test_eos_is_trained():
    model, heads, parts, _, cfg = whole_batch(updates_per_rollout=1)
    tokens, mask = batch()
    last = mask.float().cumsum(1).argmax(1)  # the column whose target ends each response
    logp = torch.full(mask.shape, -1.0, requires_grad=True)
    loss, _ = rl.policy_loss(logp, logp.detach(), parts[0].adv_B, mask, parts[0].weight_BT, rl.ALGOS["dapo"])
    assert (torch.autograd.grad(loss, logp)[0][torch.arange(4), last] != 0).all()


def test_groups_without_gradient_have_none():
    model, heads, parts, _, cfg = whole_batch(updates_per_rollout=1)
    mb = parts[0]._replace(adv_B=torch.zeros(4))
    out = rl.losses(model, heads, mb, rl.ALGOS["dapo"], "policy", cfg, True, 1.0)
    assert all((g == 0).all() for g in torch.autograd.grad(out.rl + out.mtp, list(model.parameters())))


def test_lambda_does_not_depend_on_padding_or_order():
    model, heads, parts, _, cfg = whole_batch(updates_per_rollout=1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    mb = parts[0]

    def lam(mb):
        out = rl.losses(model, heads, mb, rl.ALGOS["dapo"], "policy", cfg, False, 1.0)
        return out, occ.logprob_coefficient(out.delta_rl_N, out.delta_mtp_N)

    _, whole = lam(mb)
    wider = mb._replace(**{n: F.pad(x, (0, 3)) for n, x in mb._asdict().items() if n.endswith("T")})
    halves = [lam(half)[0] for half in mb.halves()]
    c = sum(occ.inner(out.delta_rl_N, out.delta_mtp_N) for out in halves)
    v2 = sum(occ.inner(out.delta_mtp_N, out.delta_mtp_N) for out in halves)
    assert abs(whole) > 1e-3
    for other in (lam(wider)[1], lam(mb.rows([2, 0, 3, 1]))[1], c / (v2 + 1e-8)):
        torch.testing.assert_close(other, whole, rtol=1e-4, atol=0)
    mean_of_lambdas = sum(occ.logprob_coefficient(o.delta_rl_N, o.delta_mtp_N) for o in halves) / 2
    assert abs(mean_of_lambdas - whole) > 1e-3 * abs(whole)  # λ per micro-batch is another number
    assert torch.isclose(sum(out.rl for out in halves), lam(mb)[0].rl)


def test_rollout_scores_what_was_sampled():
    model, _ = tiny(vocab=257, block=40)
    tok = rl.get_tokenizer("bytes")
    problems = rl.held_out_problems("add", 2, 3)
    samples, texts, reward = rl.rollout(model, tok, problems, 4, 10, generator=torch.Generator().manual_seed(0))
    assert reward.shape == (3, 4) and len(texts) == 12
    for row, mask, text in zip(samples.tokens_BT, samples.mask_BT, texts):
        assert tok.decode([t for t in row[mask].tolist() if t != 256]) == text
    right = rl.rollout(model, tok, [p._replace(answer=texts[0]) for p in problems], 4, 10)[2]
    assert not right.any()  # the whole text is never an answer
    twice = rl.rollout(model, tok, [problems[0]] * 2, 4, 10, generator=torch.Generator().manual_seed(0))
    assert twice[2].shape == (2, 4) and twice[1][:4] != twice[1][4:]  # groups are by place, not by prompt


def test_evaluation_uses_the_same_numbers_every_time_whatever_the_seed_of_torch():
    model, _ = tiny(vocab=257, block=40)
    tok, problems = rl.get_tokenizer("bytes"), rl.held_out_problems("mod", 1, 6)
    first = evaluation.accuracy(model, tok, problems, 16, 6)
    torch.manual_seed(5)
    assert first.shape == (6, 16) and torch.equal(first, evaluation.accuracy(model, tok, problems, 16, 6))
    assert evaluation.accuracy(model, tok, problems[:2], 20, 6, rows=8).shape == (2, 20)
    assert evaluation.accuracy(model, tok, problems[:2], 20, 6, temperature=0).shape == (2, 20)


def test_old_logprobs_from_the_samplers_hidden_states_equal_those_of_a_forward_pass():
    model, heads = tiny()
    samples = rl.generate(model, [[1, 2, 3], [4, 5]], 4, 8, eos=5, keep_hidden=True)
    args = torch.ones(8), rl.ALGOS["dapo"], CFG
    kept, _ = rl.minibatches(model, heads, samples, *args)
    again, _ = rl.minibatches(model, heads, samples._replace(h_BTC=None), *args)
    for a, b in zip(kept, again):
        torch.testing.assert_close(a.logp_old_BT, b.logp_old_BT, rtol=0, atol=1e-5)
        torch.testing.assert_close(a.logp_old_KBT, b.logp_old_KBT, rtol=0, atol=1e-4)
        assert a.logp_old_KBT.abs().sum() > 1
    off, _ = rl.minibatches(model, None, samples, *args)  # no heads, nothing to run
    assert torch.equal(off[0].logp_old_BT, off[0].logp_sampled_BT)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_under_autocast_old_logprobs_are_made_again():
    """bfloat16 may round sampling and training differently: the sampler's log-probs could be ratios far from 1."""
    model, heads = tiny(vocab=257, block=40)
    problems = rl.problem_stream(["add"], 2, random.Random(0))
    cfg = SimpleNamespace(**{**vars(CFG), "prompts_per_step": 4, "updates_per_rollout": 1})
    with torch.autocast("cpu", torch.bfloat16):
        samples, reward, _, _ = rl.collect(model, rl.get_tokenizer("bytes"), problems, rl.ALGOS["grpo"], cfg, None)
        samples = samples._replace(logp_BT=samples.logp_BT - 0.5)
        (mb,), _ = rl.minibatches(model, heads, samples, torch.ones(8), rl.ALGOS["grpo"], cfg)
        logp, _, _, _ = mtp.logprobs(model, heads, mb.tokens_BT, mb.mask_BT)
        out = rl.losses(model, heads, mb, rl.ALGOS["grpo"], "policy", cfg, True, 1.0)
    assert samples.h_BTC is None and samples.logp_BT.dtype == torch.float32
    torch.testing.assert_close(mb.logp_old_BT, logp, rtol=0, atol=1e-6)
    assert out.stats["rollout/logp_gap"].item() == pytest.approx(0.5, abs=0.2)  # and the log says how far they are


def test_rows_the_tokenizer_lacks_read_as_no_answer():
    tok = rl.get_tokenizer("bytes")
    tokens = torch.tensor([[52, *b"####7", 300, 256]])
    samples = rl.Samples(tokens, torch.tensor([[False] + [True] * 7]), torch.zeros(1, 8))
    assert rl.completions(tok, samples) == ["####7\ufffd"]
    problem = rl.Problem("add", "4", "7")
    assert rl.is_right(problem, "####7") and not rl.is_right(problem, "####7\ufffd")
