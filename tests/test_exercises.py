"""The answers of .github/EXERCISES.md: each diff still fits the code, runs, and does what its answer says."""

import importlib
import re
import sys

import pytest
import torch
from conftest import ROOT, SMALL, coin
from test_readme import FILES

PAGE = (ROOT / ".github" / "EXERCISES.md").read_text(encoding="utf-8")
DIFFS = dict(re.findall(r"^## (\d+)\. (?:(?!^## ).)*?^```diff\n(.*?)^```$", PAGE, re.M | re.S))


def applied(diff, name, text):
    """The text of one file with the hunks of a diff that are its own; each must fit in exactly one place."""
    for path, hunks in re.findall(r"^\+\+\+ b/(.*)\n((?:(?!--- ).*\n)*)", diff, re.M):
        for hunk in re.split(r"^@@.*\n", hunks, flags=re.M)[1:] if path == name else []:
            lines = hunk.splitlines()
            old = "\n".join(line[1:] for line in lines if not line.startswith("+"))
            new = "\n".join(line[1:] for line in lines if not line.startswith("-"))
            assert text.count(old) == 1, f"{name}: {text.count(old)} times:\n{old}"
            text = text.replace(old, new)
    return text


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Train with a diff applied, in modules of their own: (records of the log, weights of the trunk)."""

    def run(diff="", **changes):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for name in FILES:
            text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
            path = folder / f"{name}.py"
            path.write_text(applied(diff, path.name, text), encoding="utf-8")
        with monkeypatch.context() as patch:
            patch.syspath_prepend(folder)
            for name in FILES:
                patch.delitem(sys.modules, name)
            rl, evaluation, train = map(importlib.import_module, ("rl", "eval", "train"))
            patch.setattr(rl, "is_right", coin)
            patch.setattr(evaluation, "plot", lambda folders, path: [])
            paths = dict(out=f"{folder}/out", cache_dir=f"{folder}/base")
            cfg = train.Config(**{**SMALL, **paths, "probe_every": 1, **changes})
            train.main(cfg)
            ckpt = torch.load(f"{cfg.out}/ckpt.pt", weights_only=True)
            records = evaluation.read_metrics(cfg.out)[1]
        return records[1:], torch.cat([x.flatten() for x in ckpt["model"].values()])

    return run


def lam(records):
    return torch.tensor([record["occ/lam"] for record in records])


def test_one_update_per_rollout_moves_as_detach(run):
    (records, occ), (_, detach) = (run(updates_per_rollout=1, regime=x) for x in ("occ", "detach"))
    assert lam(records).eq(0).all() and occ.equal(detach)


@pytest.mark.parametrize("number", DIFFS)
def test_an_answer_fits_and_changes_training(number, run):
    changes = {"lr": 3e-3, "regime": "exact" if number == "8" else "occ"}
    changes["lam_plus"] = -1.0 if number == "3" else 1.0  # of a positive λ nothing is clipped
    (before, weights), (after, changed) = run(**changes), run(DIFFS[number], **changes)
    assert not changed.equal(weights) and changed.isfinite().all()
    if number == "3":
        assert lam(before).min() < 0 <= lam(after).min()
    elif number == "6":  # only the heads learn otherwise
        assert after[0]["occ/lam"] != before[0]["occ/lam"]
    elif number == "7":
        assert lam(after).abs().max() < lam(before).abs().max()


def test_every_exercise_has_its_answer():
    assert list(DIFFS) == ["3", "4", "5", "6", "7", "8"]
