"""What the README says exists: its commands parse, its keys are those that runs log, its code and tests are there."""

import json
import re
import shlex
from pathlib import Path

from conftest import ROOT

import eval as evaluation
import mtp
import occ
import rl
import train

README = (ROOT / "README.md").read_text()


def commands():
    blocks = re.findall(r"^```\n(.*?)^```", README, re.M | re.S)
    lines = [line.split("  #")[0] for block in blocks for line in block.splitlines()]
    parts = [part for line in lines for part in re.split(r" && ", line)]
    return [shlex.split(part) for part in parts if part.startswith(("python", "pip", "torchrun"))]


def test_every_command_parses(small, monkeypatch, tmp_path):
    (tmp_path / "some.jsonl").write_text('{"question": "2 + 2?", "answer": "#### 4"}\n')  # for what would be fetched
    monkeypatch.setattr(rl, "data_file", lambda name, data_dir: str(tmp_path / "some.jsonl"))
    monkeypatch.setattr(rl, "get_tokenizer", lambda name, get=rl.get_tokenizer: get("bytes"))
    rl.suites_of.cache_clear()
    cfg = small()
    train.main(cfg)
    monkeypatch.setattr(evaluation, "read_run", lambda folder, read=evaluation.read_run: read(cfg.out))
    seen = set()
    for command in commands():
        if command[0] == "pip":
            assert command == ["pip", "install", "-r", "requirements.txt"] and (ROOT / "requirements.txt").exists()
        elif "train.py" in command[1:3]:
            assert command[0] == "python" or command[:2] == ["torchrun", "--nproc_per_node=2"]
            train.command_line(command[command.index("train.py") + 1 :])
        elif command[1] == "eval.py":
            evaluation.parse(command[2:])
        else:
            assert command == ["python", "-m", "pytest", "-q", "tests"]
        seen.add(command[1])
    assert seen == {"install", "train.py", "--nproc_per_node=2", "eval.py", "-m"}
    rl.suites_of.cache_clear()


def test_every_logged_key_is_in_the_table_and_the_other_way_round(small):
    cfg = small(algo="grpo", speculative=1)  # the method with a KL
    train.main(cfg)
    records = [json.loads(line) for line in (Path(cfg.out) / "metrics.jsonl").read_text().splitlines()[1:]]
    logged = {re.sub(r"_1$", "_k", key) for record in records for key in record}
    logged = {key if key not in {f"eval/{s}" for s in rl.SUITES} else "eval/<suite>" for key in logged}
    table = README[README.index("## What a run logs") : README.index("## Differences")]
    written = set()
    for row in re.findall(r"^\| (`.*?) \|", table, re.M):
        keys = re.findall(r"`(.*?)`", row)
        written |= {keys[0].rsplit("/", 1)[0] + key if key.startswith("/") else key for key in keys}
    assert logged == written


def test_paper_code_and_test_names_exist():
    table = README[README.index("## Paper, code, test") : README.index("## Commands")]
    modules = {"occ": occ, "rl": rl, "mtp": mtp, "eval": evaluation}
    named = re.findall(r"`(occ|rl|mtp|eval)\.(?!py`)(\w+)`", table)
    assert len(named) >= 9 and all(hasattr(modules[file], name) for file, name in named)
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", table)
    assert len(named) >= 9 and all(f"def {name}(" in tests for name in named)


def test_regimes_and_methods_of_the_readme_are_those_of_the_code():
    assert set(re.findall(r"^\| `(\w+)` \| ", README, re.M)) >= set(occ.REGIMES)
    assert " ".join(occ.REGIMES) in README and " ".join(rl.ALGOS) in README


def test_the_top_level_is_what_it_should_be():
    allowed = "README.md requirements.txt model.py mtp.py rl.py occ.py train.py eval.py tests LICENSE out data"
    names = {path.name for path in ROOT.iterdir() if not path.name.startswith((".", "__"))}
    assert names <= set(allowed.split()) and names >= set(allowed.split()) - {"out", "data"}


def test_importing_runs_nothing_and_nothing_imports_the_trainer():
    for name in ("model", "mtp", "rl", "occ", "eval"):
        source = (ROOT / f"{name}.py").read_text()
        assert not re.search("^import train", source, re.M)
    assert set(re.findall(r"^import (\w+)|^from (\w+)", (ROOT / "occ.py").read_text(), re.M)) == {
        ("torch", ""),
        ("", "typing"),
    }
