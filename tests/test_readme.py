"""What the README says exists: its commands parse, its keys are those that runs log, its code and tests are there."""

import re
import shlex

import pytest
from conftest import ROOT, metrics

import eval as evaluation
import mtp
import occ
import rl
import train

README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands():
    """The lines of its code blocks that run something, as lists of words."""
    found = []
    for block in re.findall(r"^```\n(.*?)^```", README, re.M | re.S):
        for line in block.splitlines():
            for part in line.split("  #")[0].split(" && "):
                if part.startswith(("python", "pip", "torchrun")):
                    found.append(shlex.split(part))
    return found


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_parses(command, trained, monkeypatch):
    if "train.py" in command:
        if "--resume" in command:
            cfg, read = trained(), evaluation.read_run
            monkeypatch.setattr(evaluation, "read_run", lambda folder: read(cfg.out))
        train.command_line(command[command.index("train.py") + 1 :])
    elif "eval.py" in command:
        evaluation.parse(command[2:])
    elif command[0] == "pip":
        assert (ROOT / command[-1]).exists()
    else:
        assert command == "python -m pytest -q tests".split() or (ROOT / command[1]).exists()


def test_every_logged_key_is_in_the_table_and_the_other_way_round(trained):
    logged = set()
    for record in metrics(trained(algo="grpo", speculative=True), clock=True):
        for key in record:
            key = re.sub(r"_1$", "_k", key)
            logged.add("eval/<suite>" if key.removeprefix("eval/") in rl.SUITES else key)
    table = README[README.index("## What a run logs") : README.index("## Differences")]
    written = set()
    for row in re.findall(r"^\| (`.*?) \|", table, re.M):
        written |= set(re.findall(r"`(.*?)`", row))
    assert logged == written


def test_paper_code_and_test_names_exist():
    table = README[README.index("## Paper, code, test") : README.index("## Commands")]
    modules = {"occ": occ, "rl": rl, "mtp": mtp, "eval": evaluation, "train": train}
    named = re.findall(r"`(occ|rl|mtp|eval|train)\.(?!py`)(\w+)`", table)
    assert len(named) >= 9 and all(hasattr(modules[file], name) for file, name in named)
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", table)
    assert len(named) >= 8 and all(f"def {name}(" in tests for name in named)


def test_nothing_imports_upwards_and_sources_do_not_depend_on_the_machine():
    """Files opened without an encoding take the machine's, and torch reads OMP_WAIT_POLICY when it is imported."""
    order = ["model", "occ", "mtp", "rl", "eval", "train"]
    for i, name in enumerate(order):
        source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        imported = set(re.findall(r"^\s*(?:import|from) (\w+)", source, re.M)) & set(order)
        assert imported <= set(order[:i]), name
        for line in source.splitlines():
            if re.search(r" open\(|\.read_text\(|\.write_text\(", line):
                assert "encoding=" in line, f"{name}.py: {line}"
        if name in ("eval", "train"):
            assert source.index('"OMP_WAIT_POLICY", "PASSIVE"') < source.index("\nimport torch")
