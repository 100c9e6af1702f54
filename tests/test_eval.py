"""Statistics against known values; tables and pictures from runs; and the lines that say what is wrong."""

import dataclasses
import itertools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import PLOT, ROOT
from torch.utils.flop_counter import FlopCounterMode

import eval as evaluation
import occ
import rl
import train


def command(*argv):
    evaluation.main(evaluation.parse(list(argv)))


def fails(capsys, *argv):
    with pytest.raises(SystemExit) as exit, evaluation.reporting("eval.py"):
        command(*argv)
    captured = capsys.readouterr()
    assert exit.value.code == 2 and captured.err.startswith("eval.py: error: ") and captured.err.count("\n") == 1
    return captured.err


def test_pass_at_k_is_the_mean_over_all_choices():
    right = [1, 0, 0, 1, 0, 0]
    for k in range(1, 7):
        choices = list(itertools.combinations(right, k))
        assert evaluation.pass_at_k(6, 2, k) == pytest.approx(sum(any(c) for c in choices) / len(choices))
    assert evaluation.pass_at_k(6, 6, 3) == 1 and evaluation.pass_at_k(6, 0, 6) == 0


def test_interval():
    mean, half = evaluation.interval([0.0, 100.0, 100.0, 100.0])
    assert mean == 75 and half == pytest.approx(1.96 * 50 / 2)
    assert math.isnan(evaluation.interval([3.0])[1])


def test_table_weighs_suites_alike():
    rows = [("add", [100.0, 0.0], [[100.0, 0.0]], 0), ("mul", [50.0, 50.0, 50.0, 50.0], [[100.0] * 4], 0)]
    lines = evaluation.table(rows, 2)
    assert lines[0] == "| suite | problems | avg@2 | pass@2 |"
    assert lines[2] == "| add | 2 | 50.0 ± 98.0 | 50.0 ± 98.0 |"
    assert lines[4] == "| all | 6 | 50.0 ± 49.0 | 75.0 ± 49.0 |"
    lines = evaluation.table([*rows, ("minerva", [0.0, 0.0], [[0.0, 0.0]], 1)], 2)
    assert lines[0] == "| suite | problems | symbolic | avg@2 | pass@2 |"
    assert lines[4:] == ["| minerva | 2 | 1 | 0.0 ± 0.0 | 0.0 ± 0.0 |", "| all | 8 | 1 | 33.3 ± 32.7 | 50.0 ± 32.7 |"]


def test_series_over_seeds():
    runs = [
        [{"step": 0, "y": 1.0}, {"step": 1, "y": 2.0}, {"step": 2}],
        [{"step": 0, "y": 3.0}, {"step": 1, "y": 2.0}, {"step": 2, "y": 9}],
    ]
    steps, mean, half = evaluation.series(runs, lambda r: r.get("y"))
    assert (steps, mean) == ([0, 1], [2.0, 2.0])  # only steps that every run has
    assert half == pytest.approx([12.71 * math.sqrt(2) / math.sqrt(2), 0.0])
    assert all(math.isnan(h) for h in evaluation.series(runs[:1], lambda r: r.get("y"))[2])


def test_long_series_are_averaged_in_blocks_run_by_run():
    runs = [[{"step": s, "y": float(s % 2 + seed)} for s in range(120)] for seed in (0, 1)]
    steps, mean, half = evaluation.series(runs, lambda r: r["y"])
    assert steps == [2 * i + 0.5 for i in range(60)] and mean == [1.0] * 60
    assert half == pytest.approx([12.71 * math.sqrt(0.5) / math.sqrt(2)] * 60)


def test_the_two_terms_of_the_decomposition():
    record = {"occ/lam": 0.5, "occ/c": 3.0, "occ/v2": 8.0}
    eta, L = 0.1, 2.0
    total = eta * (1 - L * eta) * evaluation.first_order(record) - L * eta**2 * evaluation.second_order(record)
    assert total == pytest.approx(occ.delta_mtp(0.5, 3.0, 8.0, eta, L))
    assert evaluation.first_order({"step": 1}) is None


def test_score_prints_a_table(small, capsys):
    cfg = small(task="add,mod")
    train.main(cfg)
    capsys.readouterr()
    command("score", cfg.out, "--k", "4", "--problems", "3")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| suite | problems | avg@4 | pass@4 |"
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| add", "| mod", "| all"]
    tok, problems = rl.get_tokenizer("bytes"), rl.held_out_problems("add", cfg.difficulty, 3)
    _, _, model, _ = evaluation.load_run(cfg.out, torch.device("cpu"))
    right = evaluation.accuracy(model, tok, problems, 4, cfg.max_new_tokens).mean(1)
    mean, half = evaluation.interval((100 * right).tolist())
    assert lines[2].startswith(f"| add | 3 | {mean:.1f} ± {half:.1f} |") and 0 < mean < 100


def test_score_rebuilds_the_trained_model(small):
    cfg = small(tied=True, mtp_design="parallel", mtp_depth=2)
    train.main(cfg)
    _, _, model, _ = evaluation.load_run(cfg.out, torch.device("cpu"))
    saved = torch.load(Path(cfg.out) / "ckpt.pt", weights_only=True)["model"]
    assert all(torch.equal(p, saved[name]) for name, p in model.state_dict().items())


def test_plot_groups_seeds_and_reads_nothing_but_metrics(small, capsys, tmp_path, monkeypatch):
    folders = []
    for name, changes in (("a", {}), ("b", dict(seed=1)), ("c", dict(regime="detach")), ("d", dict(regime="off"))):
        cfg = small(name, **changes)
        train.main(cfg)
        (Path(cfg.out) / "ckpt.pt").unlink()
        folders.append(cfg.out)
    assert {label: len(runs) for label, runs in evaluation.group_runs(folders).items()} == {
        "occ": 2,
        "detach": 1,
        "off": 1,
    }
    other = small("e", lr=1e-3)
    train.main(other)
    assert set(evaluation.group_runs([folders[0], other.out])) == {"occ lr=0.0003", "occ lr=0.001"}
    with pytest.raises(ValueError, match="seed 0 of 'occ' is there already; a band needs different seeds"):
        evaluation.group_runs([folders[0], folders[0]])
    monkeypatch.setattr(evaluation, "plot", PLOT)
    command("plot", *folders, "--out", str(tmp_path / "all.png"))
    assert (tmp_path / "all.png").read_bytes()[:4] == b"\x89PNG"
    command("plot", folders[3])
    assert capsys.readouterr().out.splitlines()[-1] == str(Path(folders[3]) / "curves.png")


def test_a_torn_last_line_is_left_out_and_a_torn_other_line_is_named(small):
    cfg = small()
    train.main(cfg)
    path = Path(cfg.out) / "metrics.jsonl"
    whole = evaluation.read_metrics(cfg.out)
    text = path.read_text()
    path.write_text(text + '{"step": 5, "rew')
    assert evaluation.read_metrics(cfg.out) == whole
    path.write_text(text.replace('{"step": 2', '{"step" 2'))
    with pytest.raises(ValueError, match="metrics.jsonl:4: not JSON"):
        evaluation.read_metrics(cfg.out)


def test_mistakes_are_one_line(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "plot", PLOT)
    assert "not a run: it has no metrics.jsonl" in fails(capsys, "score", str(tmp_path))
    assert "not a run" in fails(capsys, "plot", str(tmp_path / "nowhere"))
    assert "--k 0: must be 1 or more" in fails(capsys, "score", "x", "--k", "0")
    assert "--temperature nan" in fails(capsys, "score", "x", "--temperature", "nan")
    assert "invalid choice: 'draw'" in fails(capsys, "draw")
    assert "required" in fails(capsys, "score")
    if not torch.cuda.is_available():
        assert "--device cuda: must be cpu here" in fails(capsys, "score", "x", "--device", "cuda")
    cfg = small()
    train.main(cfg)
    text = (Path(cfg.out) / "metrics.jsonl").read_text()
    (Path(cfg.out) / "metrics.jsonl").write_text(text + "3\n")
    assert "metrics.jsonl:7: not the record of a step" in fails(capsys, "plot", cfg.out)
    (Path(cfg.out) / "metrics.jsonl").write_text(text.replace('"n_layer": 1, ', ""))
    assert "a run of another version: its config has no n_layer" in fails(capsys, "score", cfg.out)
    (Path(cfg.out) / "metrics.jsonl").write_text("\n".join(text.splitlines()[:2]) + "\n")
    (Path(cfg.out) / "ckpt.pt").unlink()
    assert f"no checkpoint yet; go on with python train.py --resume {cfg.out}" in fails(capsys, "score", cfg.out)
    header = (Path(cfg.out) / "metrics.jsonl").read_text().splitlines()[0]
    (Path(cfg.out) / "metrics.jsonl").write_text(header + "\n")
    assert "nothing logged yet" in fails(capsys, "plot", cfg.out)
    assert json.loads(header)["seed"] == 0


# Benchmark


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """A benchmark of models small enough for a test, all in this process."""
    base = dict(pretrain_steps=2, pretrain_batch=8, cache_dir=str(tmp_path))
    shape = dict(n_layer=2, n_head=2, n_embd=16, prompts_per_step=4, num_generations=2, updates_per_rollout=2)
    monkeypatch.setattr(evaluation, "SETTINGS", {"default": dict(device="cpu", **shape, **base)})
    monkeypatch.setattr(evaluation, "GROWTH", {"prompts_per_step": (4, 8), "mtp_depth": (1, 2)})
    monkeypatch.setattr(evaluation, "in_new_process", lambda function, changes, n: function({**shape, **changes}, n))
    monkeypatch.setattr(rl, "is_right", rl.is_right)  # put back at the end
    peaks = itertools.count(1)
    monkeypatch.setattr(evaluation, "memory_peak", lambda reset=False: next(peaks) * 2**20)
    return shape


def test_bench_prints_its_tables_and_draws(bench, capsys, tmp_path):
    evaluation.main(evaluation.parse(["bench", "--repeats", "2", "--out", str(tmp_path / "growth.png")]))
    out = capsys.readouterr().out
    phases, ratios = (line for line in out.splitlines() if line.startswith("| default"))
    shares = [float(cell.strip(" %")) for cell in phases.split("|")[4:9]]
    assert len(shares) == 5 and all(0 <= share <= 100 for share in shares) and min(shares[:3]) > 0
    assert ratios.startswith("| default | 1.000 (1.00 to 1.00) |") and ratios.count("|") == 2 + len(evaluation.VARIANTS)
    assert "Sampling 48 tokens with the KV cache, times as fast as without:" in out
    assert (tmp_path / "growth.png").stat().st_size > 10_000
    drafts = [line.split(" | ") for line in out.splitlines() if line.startswith(("| 4 x 2", "| 4 x 1"))]
    assert len(drafts) == 6 and all(1 <= float(tokens) <= 1 + int(k) for _, k, tokens, _ in drafts)


def test_regimes_take_turns_over_the_same_samples(bench):
    learners = [evaluation.bench_learner({**bench, "regime": regime}) for regime in ("detach", "occ", "exact")]
    for step in range(3):
        sums = [evaluation.bench_step(learner, step)[1]["response_length/sum"] for learner in learners]
        assert sums[0] == sums[1] == sums[2]


def test_useful_flops_are_those_that_torch_counts_without_padding_and_attention(bench):
    learner = evaluation.bench_learner({**bench, "logp_impl": "naive", "task": "add", "max_new_tokens": 30})
    with FlopCounterMode(display=False) as counted:
        _, record = evaluation.bench_step(learner, 1)
    useful = evaluation.useful_flops(learner, record["response_length/sum"])
    assert 0.8 * counted.get_total_flops() < useful <= counted.get_total_flops()


def test_bench_logp_times_everyone_on_the_same_inputs(capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "LOGP_SHAPES", {"cpu": ((70, 8, 40),)})
    monkeypatch.setattr(evaluation, "in_new_process", lambda function, name, shape: 3 * 2**20)
    monkeypatch.setattr(evaluation, "matmul_peak", lambda device, repeats: 1e12)
    peers = evaluation.logp_peers(torch.device("cpu"))
    peers.pop("naive, torch.compile")  # takes long to compile
    peers["broken"] = lambda h, W, targets: (_ for _ in ()).throw(RuntimeError("out of memory\nand more"))
    monkeypatch.setattr(evaluation, "logp_peers", lambda device: peers)
    command("bench", "--logp", "--repeats", "2")
    out = capsys.readouterr().out
    assert (
        "(N, C, V) = (70, 8, 40); auto picks naive" in out and "| broken | failed: RuntimeError: out of memory |" in out
    )
    rows = [line.split("|")[1:-1] for line in out.splitlines() if line.startswith(("| naive", "| chunked", "| torch"))]
    assert len(rows) == 3 and all(float(row[-1]) < 1e-5 and float(row[-2]) < 1e-5 for row in rows)
    assert float(rows[0][3]) == 1.0


def test_memory_peak_sees_what_was_allocated():
    before = evaluation.memory_peak(reset=True)
    torch.ones(2**24).sum()  # 64 MiB, freed again
    assert 60 * 2**20 < evaluation.memory_peak() - before < 200 * 2**20


# The reproduction


FIXTURE = ROOT / "tests" / "reproduce"  # metrics of small runs, cut down to what is drawn


def test_every_figure_and_table_from_the_fixture(tmp_path):
    shutil.copytree(FIXTURE, tmp_path / "out")
    evaluation.draw(tmp_path / "out")
    made = {p.name for p in (tmp_path / "out").iterdir() if p.is_file() and p.suffix != ".json"}
    figures = {f"{name}.{kind}" for name in evaluation.FIGURES for kind in ("png", "txt")}
    tables = {f"{name}.{kind}" for name in ("scores", "differences", "claims", "proxies") for kind in ("md", "csv")}
    assert made == figures | tables | {"figures.png"}
    for name in evaluation.FIGURES:
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 10_000
        caption = (tmp_path / "out" / f"{name}.txt").read_text()
        assert "Look at" in caption or name == "6-speed"
        assert "n = " in caption and "nan" not in caption
    claims = (tmp_path / "out" / "claims.csv").read_text().splitlines()
    assert len(claims) == 1 + 14 and all(line.rsplit(",", 1)[1] in VERDICTS for line in claims[1:])
    (speed,) = (line for line in claims if line.startswith("H5,"))
    assert '"seconds a step, occ / detach",' in speed and ",2,below 1.02," in speed  # of two repeats
    scores = (tmp_path / "out" / "scores.md").read_text().splitlines()
    assert scores[0] == "| regime | n | score | add | sub |" and scores[2].startswith("| detach | 2 | ")


VERDICTS = ("reproduced", "not", "undecided")


def test_one_seed_has_no_band_and_says_so(tmp_path):
    for label in ("detach", "occ"):
        shutil.copytree(FIXTURE / f"{label}-s0", tmp_path / f"{label}-s0")
    runs, plt = evaluation.finished_runs(tmp_path)[0], evaluation.pyplot()
    caption = evaluation.draw_scores(plt.figure(), runs, {})
    assert "(n = 1)" in caption and "±" not in caption
    evaluation.write_tables(tmp_path, runs, {})
    assert "(n = 1)" in (tmp_path / "differences.md").read_text()
    verdicts = {line.split(" | ")[-1] for line in (tmp_path / "claims.md").read_text().splitlines()[2:]}
    assert verdicts == {"undecided |"}
    axis = plt.figure().subplots()
    evaluation.draw_lines(axis, {"occ": [[{"step": 1, "x": 1.0}, {"step": 2, "x": 3.0}]]}, lambda r: r["x"])
    (band,) = axis.collections
    assert all(math.isnan(y) or len(path.vertices) == 0 for path in band.get_paths() for _, y in path.vertices)


def test_an_unfinished_run_is_left_out(tmp_path):
    for label in ("detach", "occ"):
        shutil.copytree(FIXTURE / f"{label}-s0", tmp_path / f"{label}-s0")
    path = tmp_path / "occ-s0" / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    runs, left_out = evaluation.finished_runs(tmp_path)
    assert list(runs) == ["detach"] and left_out == [f"{tmp_path}/occ-s0: not at step 10"]
    (tmp_path / "ce-s0").mkdir()
    (tmp_path / "ce-s0" / "metrics.jsonl").touch()  # damaged
    shutil.copytree(FIXTURE / "detach-s1", tmp_path / "policy-s1")  # not what it says it is
    (tmp_path / "mine-s0").mkdir()
    (tmp_path / "mine-s0" / "metrics.jsonl").touch()  # somebody else's
    runs, left_out = evaluation.finished_runs(tmp_path, steps=10)
    assert list(runs) == ["detach"] and len(left_out) == 3
    assert any("ce-s0/metrics.jsonl: empty" in line for line in left_out)
    assert any("policy-s1: its settings are not those of policy" in line for line in left_out)
    assert evaluation.finished_runs(tmp_path, steps=500)[0] == {}
    with pytest.raises(ValueError, match="no finished run to draw"):
        evaluation.draw(tmp_path / "detach-s0")


def test_statistics_over_seeds():
    mean, half = evaluation.over_seeds([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and half == pytest.approx(2.776 * 2.5**0.5 / 5**0.5, rel=2e-3)
    mean, half = evaluation.over_seeds([7.0])
    assert mean == 7 and math.isnan(half)
    assert evaluation.paired({0: 3.0, 1: 5.0, 7: 1.0}, {1: 1.0, 0: 2.0, 2: 9.0}) == {0: 1.0, 1: 4.0}


def test_correlations():
    assert evaluation.ranks([10.0, 30.0, 20.0, 20.0]).tolist() == [1, 4, 2.5, 2.5]
    x = [1.0, 2.0, 3.0, 4.0, 5.0]
    assert evaluation.spearman(x, [y**3 for y in x]) == pytest.approx(1)
    assert evaluation.pearson(x, [y**3 for y in x]) < 0.95
    assert evaluation.spearman(x, [5.0, 6.0, 7.0, 8.0, 7.0]) == pytest.approx(0.8208, abs=1e-4)  # a textbook's ties
    assert evaluation.pearson(x, [5.0, 4.0, 3.0, 2.0, 1.0]) == pytest.approx(-1)
    assert math.isnan(evaluation.pearson(x, [1.0] * 5))


@pytest.mark.parametrize(
    "intervals, expected",
    [
        ([(1.0, 0.5)], "reproduced"),
        ([(1.0, 1.5)], "undecided"),
        ([(-1.0, 0.5)], "not"),
        ([(1.0, 0.5), (2.0, 3.0)], "undecided"),
        ([(1.0, 0.5), (-2.0, 1.0)], "not"),
        ([(1.0, math.nan)], "undecided"),
        ([], "undecided"),
    ],
)
def test_verdict(intervals, expected):
    assert evaluation.verdict(intervals, 0, math.inf) == expected


def run_of(scores, **logged):
    """Records of a run of 9 steps: a score each, and constants or lists."""
    values = {f"occ/{name}": v if isinstance(v, list) else [v] * 9 for name, v in logged.items()}
    return [{"step": 0, "eval/score": scores[0], "eval/add": scores[0]}] + [
        {"step": i + 1, "eval/score": s, "eval/add": s, **{name: v[i] for name, v in values.items()}}
        for i, s in enumerate(scores[1:])
    ]


def test_claims_are_decided_by_their_rules():
    falls, steady = [0.3] * 3 + [0.1] * 3 + [0.01] * 3, [0.5] * 9
    runs = {"detach": {}, "ce": {}, "policy": {}, "occ": {}, "policy-0.1": {}}
    for seed in range(4):
        e = 0.1 * seed  # differences between seeds that pairing removes
        runs["detach"][seed] = run_of([10 + e] + [50 + e] * 9)
        runs["ce"][seed] = run_of([10 + e] + [40 + 1.5 * e] * 9, cos=0.01 + e / 100, v2=2 + e, c_split=0.0)
        scores = [10 + e] + [20 + e] * 3 + [45 + e] * 3 + [30 + 2 * e] * 3
        runs["policy"][seed] = run_of(scores, c_split=[x + e / 10 for x in falls], v2=[1.0] * 3 + [2.0 + e] * 6)
        runs["occ"][seed] = run_of([10 + e] + [53 + 1.5 * e] * 9, lam=[x * (1 + e) for x in falls])
        runs["policy-0.1"][seed] = run_of([10 + e] + [52 + 1.4 * e] * 9)
    rows = evaluation.claims(runs, {"occ": [1.00, 1.01, 1.00, 1.005]})
    assert [row[-1] for row in rows] == ["reproduced"] * (len(rows) - 1) + ["undecided"]  # not every λ has been run
    for label in evaluation.SWEEP.values():
        runs.setdefault(label, runs["policy-0.1"])
    rows = evaluation.claims(runs, {"occ": [1.00, 1.01, 1.00, 1.005]})
    assert [row[-1] for row in rows] == ["reproduced"] * len(rows)
    assert [(name, n) for name, _, _, n, _, _ in rows if name in ("H1", "H5")] == [("H1", 4)] * 3 + [("H5", 4)]
    runs["occ"] = {seed: run_of([10.0] + [45.0 + seed / 10] * 9, lam=steady) for seed in range(4)}
    worse = {row[1]: row[-1] for row in evaluation.claims(runs, {"occ": [1.2, 1.3, 1.25]})}
    assert worse["occ − detach, points"] == worse["occ − detach on each suite, points"] == "not"
    assert worse["seconds a step, occ / detach"] == "not" and worse["occ: λ_t, first third − last"] == "not"


def test_the_ceiling_is_the_bound_at_its_best_lambda():
    """Δ_MTP(λ*) over η ‖g‖² (1 - Lη/2), the bound's gain of RL alone."""
    c, v2, g2, eta, L = 0.3, 4.0, 0.5, 0.2, 1.5
    best = occ.delta_mtp(occ.lam_star(c, v2, eta, L), c, v2, eta, L)
    expected = best / (eta * g2 * (1 - L * eta / 2))
    assert evaluation.ceiling(c / (v2 * g2) ** 0.5, L * eta) == pytest.approx(expected)
    assert evaluation.ceiling(1.0, 1 - 1e-12) == pytest.approx(0) and math.isnan(evaluation.ceiling(0.5, 1.5))


def test_products_across_rollouts_are_without_noise():
    """20,000 rollouts whose g and m share most of their noise: on average the products are those of what is behind."""
    signal_g, signal_m = torch.tensor([1.0, 0.0, 0.5]).double(), torch.tensor([0.2, 1.0, 0.0]).double()
    noise = 3 * torch.randn(20_000, 3).double()
    g, m = signal_g + noise, signal_m + 0.9 * noise
    assert evaluation.across(g, m) == pytest.approx((signal_g @ signal_m).item(), abs=0.1)
    assert evaluation.across(g, g) == pytest.approx((signal_g @ signal_g).item(), abs=0.1)
    assert (g * m).sum(1).mean() > 20  # what a minibatch sees
    assert evaluation.across(g[:2], m[:2]) == pytest.approx((g[0] @ m[1] + g[1] @ m[0]).item() / 2)


def test_a_second_look_helps_against_noise_only():
    free = [1.0, 0.5, 2.0]
    assert evaluation.second_gain(0.0, free, free) == 1 and evaluation.best_second_look(free, free) == 0
    assert evaluation.second_gain(0.3, free, free) < 1  # without noise nothing beats g
    seen = [free[0] + 3, free[1], free[2] + 3]  # independent noise: two measurements of what they have in common
    best = evaluation.best_second_look(free, seen)
    gains = {lam: evaluation.second_gain(lam, free, seen) for lam in (best - 0.05, best, best + 0.05)}
    assert max(gains, key=gains.get) == best > 0 and gains[best] > 1.05
    u2 = seen[0] + 2 * best * seen[1] + best**2 * seen[2]  # by the definition: <E g, E u>²/E‖u‖², over that of λ = 0
    assert gains[best] == pytest.approx((free[0] + best * free[1]) ** 2 / u2 / (free[0] ** 2 / seen[0]))
    assert math.isnan(evaluation.cosine(-0.1, 1.0, 1.0)) and evaluation.cosine(4.0, 1.0, 1.0) == 0.5


def test_terms_of_the_decomposition_use_the_mean_curvature_of_the_run():
    probe = {"occ/lam": 0.5, "occ/c": 2.0, "occ/c_split": 1.5, "occ/v2": 4.0, "occ/eta": 0.1}
    probes = [{"step": s, "occ/L": L, **probe} for s, L in ((2, 1.0), (4, 3.0))]
    first, second = evaluation.with_terms([{"step": 1}, *probes])
    assert first["paper"] == pytest.approx(0.1 * 0.5 * (1 - 0.2) * 2) and first["second"] == pytest.approx(0.01)
    assert first["first"] == pytest.approx(0.1 * 0.5 * (1.5 - 0.2 * 2))  # the slope across halves, the step's own noise
    assert second["net"] == pytest.approx(2 * (first["first"] - first["second"])) and second["step"] == 4


@pytest.mark.parametrize("label", ("detach", "occ", "policy-0.1"))
def test_any_regime_can_be_drawn_alone(label, tmp_path):
    shutil.copytree(FIXTURE / f"{label}-s0", tmp_path / f"{label}-s0")
    runs, plt = evaluation.finished_runs(tmp_path)[0], evaluation.pyplot()
    for draw in evaluation.FIGURES.values():
        assert "Runs: " in draw(plt.figure(), runs, {}) or draw in (evaluation.draw_speed, evaluation.draw_second_look)
    plt.close("all")
    evaluation.write_tables(tmp_path, runs, {})
    assert (tmp_path / "claims.md").exists()


def test_a_measurement_is_made_once_and_again_when_it_is_another(tmp_path, monkeypatch):
    calls, path = [], tmp_path / "speed.json"
    monkeypatch.setattr(evaluation, "in_new_process", lambda function, *what: calls.append(what) or len(calls))
    for what in ([1], [1], [2]):
        evaluation.measure_once(path, None, what)
    assert calls == [(1,), (2,)] and json.loads(path.read_text()) == {"of": [2], "found": 2}
    path.write_text('{"of": [2], "fou')  # cut short
    evaluation.measure_once(path, None, [2])
    assert json.loads(path.read_text())["found"] == 3


def test_reproduce_resumes_what_died_and_names_what_failed(tmp_path, capsys, monkeypatch):
    """The smoke version with a run cut short and another one broken. What is drawn, the fixture tells."""
    drawn = []
    monkeypatch.setattr(evaluation, "draw", lambda *what: drawn.append(what))
    here = lambda f, *what: {"occ": [1.0]} if f is evaluation.step_ratios else f(*what)  # not in a new process
    monkeypatch.setattr(evaluation, "in_new_process", here)
    out = tmp_path / "out"
    command = ["reproduce", "--fast", "--seeds", "1", "--regimes", "detach", "occ", "ce", "--out", str(out)]
    args = evaluation.parse(command)
    (half,) = [cfg for cfg in evaluation.plan(args) if cfg.regime == "occ"]
    assert evaluation.train_one(dataclasses.replace(half, steps=5), []) is None  # as if killed after half of its steps
    began = (out / "occ-s0" / "metrics.jsonl").read_text()
    (out / "ce-s0").mkdir()
    (out / "ce-s0" / "ckpt.pt").touch()  # another program's file: train.py refuses the folder
    assert evaluation.main(args) == 1
    err = capsys.readouterr().err
    assert "failed:" in err and "ce-s0: has a ckpt.pt" in err and "look-end-ce-s0: ValueError" in err
    whole = (out / "occ-s0" / "metrics.jsonl").read_text()
    assert whole.startswith(began) and len(whole.splitlines()) == 2 + 10
    assert drawn == [(str(out), 10)]
    probes = [json.loads(line) for line in whole.splitlines() if '"occ/c"' in line]
    assert len(probes) == 5 and all(math.isfinite(r["occ/L"]) and r["occ/eta"] > 0 for r in probes)
    points = json.loads((out / "parabola.json").read_text())["found"]
    assert [p["step"] for p in points] == [1, 5, 9]
    for p in points:  # the quadratic, fitted at three lengths of the step, meets what was measured at one of them
        predicted = 100 * (p["eta"] * p["slope_g"] - p["L"][0] * p["eta"] ** 2 * p["g2"] / 2)
        assert 0.5 < predicted / p["plain"]["alone"][0] < 1.5
    looks = {path.stem: json.loads(path.read_text())["found"] for path in out.glob("look-*.json")}
    assert set(looks) == {"look-end-occ-s0", "look-start-ce-s0"}
    assert all(len(x["free"]) == 3 and x["seen"][0] > x["free"][0] for x in looks.values())
    zero = evaluation.LAMBDAS.index(0.0)
    assert all(p[kind]["more"][zero] == [0, 0] for p in points for kind in ("plain", "adam"))
    (out / "ce-s0" / "ckpt.pt").unlink()
    stamp = (out / "occ-s0" / "metrics.jsonl").stat().st_mtime_ns
    assert evaluation.main(args) == 0  # nothing is repeated
    assert (out / "occ-s0" / "metrics.jsonl").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="detach-s0: a run with --task add,sub, not arithmetic"):
        evaluation.plan(evaluation.parse([*command[:1], *command[2:]]))
