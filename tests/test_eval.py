"""Scores, samples, explanations, curves, and the reproduction with its statistics."""

import csv
import itertools
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import PLOT

import eval as evaluation
import train


def run_command(*argv):
    return evaluation.main(evaluation.parse(list(argv)))


def test_pass_at_k_by_enumeration():
    for n, c, k in ((5, 2, 3), (6, 0, 2), (4, 4, 1), (7, 1, 7)):
        chosen = list(itertools.combinations([1] * c + [0] * (n - c), k))
        share = sum(any(x) for x in chosen) / len(chosen)
        assert evaluation.pass_at_k(n, c, k) == pytest.approx(share)


def test_intervals():
    mean, half = evaluation.interval([0.0, 100.0, 100.0, 0.0])
    assert (mean, half) == (50.0, pytest.approx(3.18 * math.sqrt(4 * 2500 / 3) / 2))
    mean, half = evaluation.interval([1.0, 2.0, 3.0, math.nan])
    assert (mean, half) == (2.0, pytest.approx(4.30 / math.sqrt(3)))  # Student's t
    _, half = evaluation.interval([0.0, 1.0] * 50)
    assert half == pytest.approx(1.984 * math.sqrt(25 / 99) / 10, rel=1e-3)
    assert evaluation.interval([1.0])[0] == 1.0 and math.isnan(evaluation.interval([1.0])[1])
    assert math.isnan(evaluation.interval([])[0])
    assert evaluation.mean_of([(1.0, 3.0), (3.0, 4.0)]) == (2.0, 2.5)


def test_score_sample_and_plot_of_a_run(small, capsys, monkeypatch, tmp_path):
    cfg, other = (small(f"s{seed}", mtp_depth=2, task="add,sub", seed=seed) for seed in (0, 1))
    train.main(cfg)
    train.main(other)
    losses = [evaluation.read_metrics(run.out)[1][1]["actor/loss"] for run in (cfg, other)]
    assert losses[0] != losses[1]

    def said(*argv):
        capsys.readouterr()
        run_command(*argv)
        return capsys.readouterr().out.splitlines()

    lines = said("score", cfg.out, "--k", "4", "--problems", "3", "--speculative")
    assert lines[0] == "| suite | problems | avg@4 | pass@4 |"
    assert lines[2].startswith("| add | 3 | ")
    assert lines[4].startswith("| all | 6 | ") and "spec/accept_rate_2" in lines[5]
    lines = said("sample", cfg.out, "47+85=", "--k", "2")
    assert "lowest digit first" in lines[0] and len(lines) == 3
    assert lines[1].startswith("'47+85=' -> '")
    lines = said("sample", cfg.out, "--k", "2", "--speculative")
    assert len(lines) == 2 + 2 * 2 * 2 and "[Brackets]" in lines[1]
    assert lines[2].startswith("reward ")
    monkeypatch.setattr(evaluation, "plot", PLOT)
    said("plot", cfg.out, other.out, "--out", str(tmp_path / "both.png"))
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    groups = evaluation.group_runs([cfg.out, other.out])
    assert list(groups) == ["occ"] and len(groups["occ"]) == 2  # two seeds are one line
    with pytest.raises(ValueError, match="seed 0 of 'occ' is there already"):
        evaluation.group_runs([cfg.out, cfg.out])


def test_explain_shows_where_lambda_comes_from(small, capsys):
    cfg = small(algo="drgrpo", num_generations=8, mtp_depth=2)
    train.main(cfg)
    run_command("explain", cfg.out)
    out = capsys.readouterr().out
    assert (Path(cfg.out) / "explain.png").read_bytes().startswith(b"\x89PNG")
    c, v2 = (float(re.search(rf"{name} = ([-\d.e+]+)", out)[1]) for name in ("ĉ", "v̂²"))
    lam = float(re.search(r"ratio of sums \(paper\): +([-\d.]+)", out)[1])
    assert v2 > 0 and lam == pytest.approx(c / v2, rel=1e-2, abs=1e-3)
    assert "mean of ratios" in out and "(released code)" in out and "exact gradients" in out


def test_math_verify_is_asked_about_formulas_only(monkeypatch):
    asked = []
    fake = SimpleNamespace(parse=lambda text, parsing_timeout: asked.append(text) or text,
                           verify=lambda a, b, timeout_seconds: True)  # fmt: skip
    monkeypatch.setitem(evaluation.sys.modules, "math_verify", fake)
    assert evaluation.equal_by_algebra("$2n-2$", "2(n-1)") and asked == ["$2n-2$", "$2(n-1)$"]
    asked.clear()
    assert not evaluation.equal_by_algebra("7", "8")
    for candidate in ("9**9**9", "9^{9^9}", "99999n", "9!", "n+" * 101):
        assert not evaluation.equal_by_algebra("n", candidate)
    assert asked == []


def test_products_across_rollouts_are_without_noise():
    G, M = torch.randn(40), torch.randn(40)
    free, seen = [], []
    for _ in range(200):
        noise = torch.randn(20, 40)
        g, m = G + noise, M + noise
        free.append(evaluation.across(g, m))
        seen.append((g * m).sum(1).mean().item())
    error = torch.tensor(free).std().item() / math.sqrt(200)
    assert abs(sum(free) / 200 - (G @ M).item()) < 4 * error
    assert sum(seen) / 200 - (G @ M).item() == pytest.approx(40, rel=0.1)  # what a minibatch sees


def test_verdicts():
    for mean, half, above, below, said in (
        (1, 0.5, 0, math.inf, "reproduced"),
        (1, 2, 0, math.inf, "undecided"),
        (-1, 0.5, 0, math.inf, "not"),
        (0, 0.01, -0.05, 0.05, "reproduced"),
    ):
        assert evaluation.verdict(mean, half, above, below) == said


def test_claims_are_paired_by_seed():
    """Seeds differ by 50 points and regimes by 1: only a difference seed by seed tells."""
    runs = {"detach": {}, "occ": {}}
    for seed in range(4):
        for label, score in (("detach", 50.0 * seed), ("occ", 50.1 * seed + 1)):
            records = [{"step": s, "eval/score": score, "occ/lam": 1.0 / s} for s in range(1, 11)]
            runs[label][seed] = [{"step": 0, "eval/score": 1.0}, *records]
    rows = {row[1]: row for row in evaluation.judged_claims(runs) if row[3]}
    points = rows["occ − detach, points"]
    assert points[-1] == "reproduced" and points[2].startswith("1.150 ±")
    assert rows["occ: λ_t, first third − last"][3] == 4


def test_gaps_proxies_and_predictions_of_two_runs():
    start = {"step": 0, "eval/score": 1.0}
    for name, lam, gain in (("lam_logprob", 0.3, -40.0), ("policy/best", 0.1, 2.0)):
        start |= {f"onestep/{name}/lam": lam, f"onestep/{name}/gain": gain}
    runs = {"detach": {7: [{"step": 0, "eval/score": 1.0}, {"step": 10, "eval/score": 50.0}]}}
    runs["occ"] = {7: [start, {"step": 10, "eval/score": 53.0}]}
    assert evaluation.gaps_to_detach(runs) == {"occ": {7: {0: 0.0, 10: 3.0}}}
    proxies = {row[0]: row[1:] for row in evaluation.judged_proxies(runs)}
    assert proxies["log-probs (paper)"] == [1, "0.20 (n = 1)", "-40.0 (n = 1)"]
    assert proxies["hidden states"] == [0, "–", "–"]
    predicted = evaluation.predicted_difference({0: -30.0}, 10)  # in three of four updates λ acts
    occ = next(row for row in evaluation.predictions(runs, 10) if row[0] == "occ")
    assert occ[1:4] == [1, f"{predicted:.1f} (n = 1)", "3.0 (n = 1)"]


def test_thirds_and_ends():
    records = [{"step": s, "x": float(s)} for s in range(1, 10)]
    expected = {"mean": 5.0, "early - late": -6.0, "middle - late": -3.0}
    expected["log2 of late over early"] = 2.0
    for name, value in expected.items():
        assert evaluation.statistic(records, name, "x") == value
    assert evaluation.statistic([{"step": 0, "x": 1.0}, *records], "middle - start", "x") == 4.0
    assert math.isnan(evaluation.statistic(records, "early - late", "never logged"))
    assert evaluation.final(records, "x") == 8.5  # steps 8 and 9 are at least 0.8 · 9


def test_a_run_that_goes_on_is_measured_again(small, monkeypatch):
    cfg = small(regime="occ")
    train.main(cfg)
    path = Path(cfg.out) / "onestep-ckpt.json"
    path.write_text("{}")
    monkeypatch.setattr(evaluation, "run_script", lambda *args: "")
    for steps in (cfg.steps, cfg.steps + 1):
        assert path.exists()
        assert evaluation.train_one({"out": cfg.out, "steps": steps}, threads=1) == ""
    assert not path.exists()


def test_a_small_reproduction_goes_on_and_names_what_failed(tmp_path, capsys, monkeypatch):
    """Two regimes, real processes; a run that broke down is named, the other is drawn."""
    out = tmp_path / "out"
    flags = "--fast --first_seed 3 --seeds 1 --steps 4 --regimes detach,occ"
    arguments = f"reproduce {flags} --out {out}".split()
    assert run_command(*arguments) == 0
    said = capsys.readouterr().out
    assert said.startswith("2 of 2 runs in ")
    assert said.endswith(f"figures and tables are in {out}\n")
    names = ["1-scores", "2-terms", "3-decomposition", "4-proxies", "5-noise"]
    assert all((out / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in names)
    rows = list(csv.DictReader((out / "scores.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["regime"] for row in rows] == ["detach", "occ"] and rows[0]["n"] == "1"
    assert "| H4 | occ − detach, points |" in (out / "claims.md").read_text(encoding="utf-8")
    _, detach = evaluation.read_metrics(out / "detach-s3")
    _, occ = evaluation.read_metrics(out / "occ-s3")
    assert detach[0]["eval/score"] == occ[0]["eval/score"]
    assert len(list((out / "base").glob("*.pt"))) == 1  # for both

    (out / "occ-s3" / "ckpt.pt").write_bytes(b"damaged")
    monkeypatch.setattr(evaluation.subprocess, "run", None)  # nothing is trained again
    assert run_command(*arguments) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith("1 of 2 runs in ")
    assert "occ-s3/ckpt.pt: not a readable checkpoint" in captured.err
