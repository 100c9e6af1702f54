"""Scores, samples, explanations, curves, and the reproduction with its statistics."""

import itertools
import math
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import PLOT, SMALL, in_this_process, make_quick

import eval as evaluation
import mtp
import rl


def said(capsys, *argv):
    """The lines that a command prints."""
    capsys.readouterr()
    assert evaluation.main(evaluation.parse(argv)) == 0
    return capsys.readouterr().out.splitlines()


def test_pass_at_k_by_enumeration():
    for n, c, k in ((5, 2, 3), (6, 0, 2), (4, 4, 1), (7, 1, 7)):
        chosen = [any(x) for x in itertools.combinations([1] * c + [0] * (n - c), k)]
        assert evaluation.pass_at_k(n, c, k) == pytest.approx(sum(chosen) / len(chosen))


def test_intervals_are_students_t():
    found = evaluation.interval([1.0, 2.0, 3.0, math.nan])
    assert found == (2.0, pytest.approx(4.30 / math.sqrt(3)))
    half = evaluation.interval([0.0, 1.0] * 50)[1]
    assert half == pytest.approx(1.984 * math.sqrt(25 / 99) / 10, rel=1e-3)
    assert evaluation.interval([1.0])[0] == 1.0 and math.isnan(evaluation.interval([1.0])[1])
    assert evaluation.mean_of([(1.0, 3.0), (3.0, 4.0)]) == (2.0, 2.5)
    seeds = {0: {0: 1.0, 2: 3.0}, 1: {0: 2.0, 2: 5.0, 4: 9.0}}  # a band, at common steps
    rows = torch.tensor([[0, 1.5, 12.71 / 2], [2, 4.0, 12.71]])
    assert pytest.approx(rows.numpy()) == evaluation.averaged(seeds, 60).T


def test_cores_are_those_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr(evaluation.os, "sched_getaffinity", [{5, 7, 9}].__getitem__, raising=False)
    assert evaluation.cores() == 3


def test_score_sample_and_plot_of_two_seeds(trained, capsys, monkeypatch, tmp_path):
    task = dict(mtp_depth=2, task="add,sub")
    first, same = (trained(name, **task).out for name in "ab")
    second = trained("c", seed=1, steps=2, **task).out
    lines = said(capsys, "score", first, "--k=4", "--problems=3")
    assert lines[0] == "| suite | problems | avg@4 | pass@4 |"
    assert lines[2].startswith("| add | 3 | ") and lines[4].startswith("| all | 6 | ")
    lines = said(capsys, "sample", first, "-5+3=", "--k=2", "--temperature=0")
    assert lines[1].startswith("'-5+3=' -> '") and lines[1] == lines[2] and len(lines) == 3
    draft, seen = mtp.speculative_sample, ([49, 50, 51, 52, 256], [0, 1, 2, 0, 0])
    monkeypatch.setattr(mtp, "speculative_sample", lambda *args: draft(*args) and seen)
    lines = said(capsys, "sample", first, "--k=1", "--speculative")
    ends = [line.startswith("reward ") and line.endswith(" -> '1[23]4'") for line in lines]
    assert ends == [False, True, True, True, True]
    with pytest.raises(ValueError, match=r"^--temperature 1e-38: must be 0 .greedy., or 0.01"):
        said(capsys, "sample", first, "--temperature=1e-38")
    monkeypatch.setattr(evaluation, "plot", PLOT)
    lines = said(capsys, "plot", first, second, f"--out={tmp_path}/both.png")
    assert lines[0] == "occ: drawn up to step 2, the end of its shortest seed" and len(lines) == 2
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    (seeds,) = evaluation.group_runs([first, second]).values()
    assert list(seeds) == [0, 1]  # one line, with a band
    assert list(evaluation.group_runs([first, second, same])) == [first, "occ", same]


def test_explain_shows_where_lambda_comes_from(trained, capsys):
    cfg, single = trained(algo="drgrpo", mtp_depth=2), trained("single", updates_per_rollout=1)
    with pytest.raises(ValueError, match="every δ is 0: one update per rollout"):
        said(capsys, "explain", single.out)
    again, state = evaluation.load_run(evaluation.parse(["explain", cfg.out]))
    again.probe_every, tok, sums = 1, cfg.tok(), {}
    last = rl.step(again, *state, tok, 10**9)[2]
    product = last.deltas[0] * last.deltas[1]
    for row, column in product.nonzero().tolist():
        ids = last.mb["tokens"][row].tolist()
        text = tok.decode(ids[: column + 1])[-24:], tok.decode([ids[column + 1]])
        sums[text] = sums.get(text, 0) + product[row, column].item()
    *table, proxy, _ = said(capsys, "explain", cfg.out)
    shares = [100 * x / product.sum().item() for x in sorted(sums.values(), key=abs)[:-17:-1]]
    shown = [float(line.split(" | ")[-1].removesuffix(" % |")) for line in table[3:]]
    assert shown == pytest.approx(shares, abs=0.06)
    c, v2, lam = map(float, re.findall(r"= (-?\d\S*\d)", proxy))
    assert c == pytest.approx(product.sum().item(), rel=1e-3)
    assert lam == pytest.approx(c / v2, rel=2e-3, abs=1e-4)


def test_formulas_are_for_math_verify(trained, capsys, monkeypatch, tmp_path):
    """It is asked about formulas only; without it problems with such answers are left out."""
    asked, fake = [], SimpleNamespace(verify=lambda a, b, timeout_seconds: True)
    fake.parse = lambda text, parsing_timeout: asked.append(text)
    monkeypatch.setitem(sys.modules, "math_verify", fake)
    assert evaluation.equal_by_algebra("$2n-2$", "2(n-1)") and asked == ["$2n-2$", "$2(n-1)$"]
    assert not evaluation.equal_by_algebra("7", "8")
    for candidate in (None, "9**9**9", "9^{9^9}", "99999n", "9!", "n+" * 101):
        assert not evaluation.equal_by_algebra("n", candidate)
    assert len(asked) == 2
    cfg, suite = trained(task="add"), tmp_path / "aime24.jsonl"
    lines = '{"problem": "One?", "answer": "1"}', '{"problem": "Root?", "answer": "n+1"}'
    suite.write_text("\n".join(lines), encoding="utf-8")
    for module, count in ((None, 1), (fake, 2)):
        monkeypatch.setattr(evaluation.importlib.util, "find_spec", {"math_verify": module}.get)
        lines = said(capsys, "score", cfg.out, f"--suite={suite}", "--k=2")
        assert lines[2].startswith(f"| aime24 | {count} | ")
        assert any("1 answers are no numbers" in line for line in lines) == (module is None)


def runs_of(**scores):
    """{regime: scores of the seeds} as runs, whose first-order term falls; step 0 is another world."""
    runs = {}
    for label, step in itertools.product(scores, range(10)):
        for seed, score in enumerate(scores[label]):
            first = 5.5 + 0.01 * seed - 0.1 * step if step else 900.0
            record = {"step": step, "eval/score": score + step, "occ/lam": 1 / max(step, 1)}
            record |= {"onestep/first/1": (first, 1.0, 0.5), "onestep/lam_t": (0.5, 1.0, 0.0)}
            runs.setdefault(label, {}).setdefault(seed, []).append(record)
    return runs


def claims_of(**scores):
    """Those of {regime: scores of the seeds}, by their quantity."""
    return {row[1]: row[2:] for row in evaluation.claims(runs_of(**scores))}


def test_claims_are_paired_by_seed():
    """Seeds differ by 50 points and regimes by 1: only a difference seed by seed tells."""
    rows = claims_of(detach=[0, 50, 100], occ=[1, 51.1, 101.2], ce=[-1, 51, 99])
    assert rows["occ − detach, points"] == ["1.100 ± 0.248", 3, "0 to inf", "reproduced"]
    assert rows["ce − detach, points"][-1] == "undecided"
    assert rows["ce: first order, %"] == ["5.010 ± 0.025", 3, "-15 to 15", "reproduced"]
    assert rows["occ: λ_t, first third − last"][-1] == "reproduced"
    assert rows["occ − policy, points"] == ["–", 0, "0 to inf", "undecided"]
    decay = claims_of(policy=[0, 50, 100])["policy: first order, early − late, %"]
    assert decay == ["0.550 ± 0.000", 3, "0 to inf", "reproduced"]
    rows = claims_of(detach=[0, 50, 100], occ=[-1, 49, 99, 5000])  # the last has no partner
    assert rows["occ − detach, points"] == ["-1.000 ± 0.000", 3, "0 to inf", "not"]


def test_tables_keep_step_0_apart():
    found = evaluation.tables(runs_of(detach=[0, 50, 100], ce=[-1, 49, 99]))
    assert "| ce | 3 | 49.0 ± 124.1 | 57.5 ± 124.1 | -1.0 ± 0.0 |" in found["scores"][3]
    rows = [line.split(" | ")[:4] for line in found["terms"]]
    assert ["| ce", "0", "3", "900 ± 0"] in rows and ["| ce", "later than 0", "3", "5 ± 0"] in rows


def test_thirds_ends_and_gaps():
    seeds = {7: [{"step": step, "x/y": float(step)} for step in range(10)], 8: [{"step": 9}]}
    for first, last, mean in ((0, 1 / 3, 1.5), (2 / 3, 1, 7.5), (0.8, 1, 8.5), (0, 0, 0.0)):
        found = evaluation.over(seeds, "x/y", first, last)
        assert found.keys() == {7} and evaluation.pooled(found)[0] == mean
    assert evaluation.minus({0: 5.0, 10: 7.0, 20: 9.0}, {0: 4.0, 20: 10.0}) == {0: 1.0, 20: -1.0}


def test_a_run_without_heads_is_drawn(tmp_path, recwarn):
    """Regime off logs no λ, c or v²; an axis must do without numbers, and without a warning."""
    figure, axes = evaluation.panels_of(len(evaluation.PANELS))
    for axis, panel in zip(axes, evaluation.PANELS.values()):
        evaluation.draw_lines(axis, {"off": {0: {}}}, panel)
    evaluation.save(figure, tmp_path / "x.png")
    assert not recwarn.list


def test_seeds_are_pooled_as_quotients_of_means():
    """One without a bottom would otherwise outshout the rest."""
    pairs = {seed: (0.5 + seed / 8, 2.0 + seed) for seed in range(4)} | {9: (-4e-9, 1e-9)}
    seeds = {}
    for seed, pair in pairs.items():
        seeds[seed] = [{"step": 1, "onestep/lam_t": (*pair, 1.0)}]
    mean, half = evaluation.pooled(evaluation.over(seeds, "onestep/lam_t"))
    tops, bottoms = zip(*pairs.values())
    assert mean == pytest.approx(sum(tops) / sum(bottoms)) and 0 < half < 2
    assert evaluation.interval([top / bottom for top, bottom in pairs.values()])[1] > 2
    less = {seed: (top, bottom - 2.0, 1.0) for seed, (top, bottom) in pairs.items()}
    assert all(map(math.isnan, evaluation.pooled(less)))  # the mean is above 0, and may be 0
    seeds[0].append({"step": 2, "onestep/lam_t": (4.0, 1.0, 1.0)})
    assert evaluation.measured(seeds) == [1, 2]  # a state that one seed has is not hidden by others
    plain = {seed: (top, 1.0, 0.0) for seed, top in enumerate(tops)}
    assert evaluation.pooled(plain) == pytest.approx(evaluation.interval(tops))
    assert evaluation.pooled(plain, {1: (1.0, 2.0, 0.0)})[0] == tops[1] - 0.5
    for half, known in ((0.5, True), (1.5, False)):  # of one seed the bottom's own interval
        mean, spread = evaluation.pooled({0: (4.0, 1.0, half)})
        assert math.isnan(spread) and (mean == 4.0 if known else math.isnan(mean))


def test_a_small_reproduction_goes_on_and_names_what_failed(tmp_path, capsys, monkeypatch):
    make_quick(monkeypatch)
    monkeypatch.setattr(evaluation, "subprocess", SimpleNamespace(run=in_this_process))
    monkeypatch.setattr(evaluation, "PARTS", 4)
    out, flags = tmp_path / "out", {**SMALL, "task": "add,sub", "difficulty": 1, "keep": 0}
    command = f"reproduce --regimes detach,occ --seeds 1 --first_seed 3 --jobs 1 --out {out}"
    command = [*command.split(), "--rollouts=16", "--", *(f"--{k}={v}" for k, v in flags.items())]
    assert "2 of 2 runs in " in said(capsys, *command)[-1]
    for name in ("overview", "1-scores", "2-decomposition", "3-coefficient"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "| H4 | occ − detach, points |" in (out / "claims.md").read_text(encoding="utf-8")
    detach, occ = (evaluation.finished_runs(out)[label][3] for label in ("detach", "occ"))
    assert detach[0]["eval/score"] == occ[0]["eval/score"]
    assert len(list(out.glob("base/*.pt"))) == 1  # for both
    assert [record["step"] for record in occ if "onestep/rl" in record] == [0, SMALL["steps"]]
    texts = {path: path.read_bytes() for path in out.glob("*/metrics.jsonl")}
    times = {path: path.stat().st_mtime_ns for path in out.glob("occ-s3/onestep*.json")}
    (out / "occ-s3" / "ckpt.pt").write_bytes(b"damaged")
    (out / "detach-s3" / "ckpt-0.pt").write_bytes(b"damaged")
    for path in out.glob("detach-s3/onestep*.json"):
        path.unlink()
    (out / "scores.md").unlink()
    assert evaluation.main(evaluation.parse(command)) == 1
    captured = capsys.readouterr()
    assert "0 of 2 runs in " in captured.out and captured.err.count("failed: ") == 2
    for path in ("occ-s3/ckpt.pt", "detach-s3/ckpt-0.pt"):
        assert f"{path}: not a readable checkpoint" in captured.err
    again = out / "detach-s3" / "onestep-ckpt.json"
    assert again.exists()  # one checkpoint that fails keeps no other from being measured
    assert "| detach | 1 | " in (out / "scores.md").read_text(encoding="utf-8")
    assert texts == {path: path.read_bytes() for path in texts}  # nothing is repeated
    assert times == {path: path.stat().st_mtime_ns for path in times}
    wrong = evaluation.parse([*command, "--lr=0"])
    assert "another command" in evaluation.reproduce_one(wrong, "detach", 3, 1)
    assert "error: --lr 0.0: must be above 0" in evaluation.reproduce_one(wrong, "ce", 3, 1)
    again.write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"onestep-ckpt.json: not what onestep writes today"):
        evaluation.finished_runs(out)
