"""What the pages say exists: commands parse, and what they name and link to is there."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, metrics

import eval as evaluation
import rl
import train

FILES = "model occ mtp rl eval train".split()  # each imports only from those before it
PAGES = ["README.md", *(f".github/{x}.md" for x in ("RESULTS", "EXERCISES", "CONTRIBUTING"))]
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
# What is below this line in RESULTS is of older commits, and so are its commands.
TODAY = {page: text.split("\n# Older commits", 1)[0] for page, text in TEXTS.items()}


def commands():
    """What the blocks and lines of code of all pages run, as lists of words."""
    runs = re.findall(
        r"(?:^|&& |`)((?:python|pip|torchrun) .*?)(?= && |`|$)", "\n".join(TODAY.values()), re.M
    )
    return [shlex.split(run, comments=True) for run in dict.fromkeys(runs)]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_parses(command, trained, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # with a file of one problem, which stands for every data set
    Path("FILE.jsonl").write_text('{"question": "1+1", "answer": "2"}\n', encoding="utf-8")
    monkeypatch.setattr(rl, "data_file", lambda name, folder: "FILE.jsonl")
    monkeypatch.setattr(rl, "suites_of", rl.suites_of.__wrapped__)  # without its cache
    file = next(word for word in command if word.endswith((".py", ".txt", "tests")))
    arguments = command[command.index(file) + 1 :]
    assert (ROOT / file).exists()
    if "--resume" in command:
        cfg, read = trained(), evaluation.read_run
        monkeypatch.setattr(evaluation, "read_run", lambda folder: read(cfg.out))
    if file in ("train.py", "eval.py"):
        (train.command_line if file == "train.py" else evaluation.parse)(arguments)


def anchors(page):
    """Those that GitHub makes of headings: lower case, no punctuation, hyphens for blanks."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!http)([^)]*)\)", TEXTS[page])
    assert links or page.endswith("EXERCISES.md")
    for link in links:
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES)
def test_what_is_named_exists(page, trained):
    """Functions, tests, files of .github, and keys of the log."""
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py"))
    exist = {f"{name}.{x}" for name in FILES for x in vars(__import__(name))}
    exist |= set(re.findall(r"^def (test_\w+)\(", tests, re.M))
    names = rf"`((?:{'|'.join(FILES)})\.(?!py\b)\w+|test_\w+)`"
    named = set(re.findall(names, TODAY[page]))
    assert named <= exist, named - exist
    assert page != "README.md" or len(named) >= 10
    for path in re.findall(r"`((?:\.github|tests)/[^`\s]+)`", TODAY[page]):
        assert (ROOT / path).exists(), path
    logged = set().union(*metrics(trained(algo="grpo"), clock=True))
    for key in re.findall(r"`(?!out/|tests/)([a-z_]+/[\w<>]+)`", TODAY[page]):  # <suite>, _k: any
        pattern = re.sub(r"<\w+>|_k$", r"\\w+", key)
        assert any(re.fullmatch(pattern, name) for name in logged), key


@pytest.mark.parametrize("name", FILES)
def test_sources_import_downwards_and_name_encodings(name):
    """Without an encoding a file has the machine's; torch reads OMP_WAIT_POLICY when imported."""
    source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):  # inside functions, too
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imported = {alias.name for alias in node.names} | {getattr(node, "module", "")}
            assert not imported & set(FILES[FILES.index(name) :]), ast.unparse(node)
        elif isinstance(node, ast.Call):
            opens = re.search(r"\b(open|read_text|write_text)$", ast.unparse(node.func))
            assert not opens or "encoding" in {keyword.arg for keyword in node.keywords}
    first = source.find('"OMP_WAIT_POLICY", "PASSIVE"')
    assert name not in ("eval", "train") or 0 < first < source.index("\nimport torch")


def test_importing_runs_nothing(tmp_path):
    code = f"import sys; sys.path.append({str(ROOT)!r}); import {', '.join(FILES)}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr, [*tmp_path.iterdir()]) == (0, b"", b"", [])


def test_the_reference_can_be_drawn_beside_a_run():
    (seeds,) = evaluation.group_runs([ROOT / ".github" / "reference"]).values()
    scores = evaluation.curves(seeds, "eval/score")[0]
    assert len(scores) >= 10 and scores[0] < 70 < 90 < scores[250]
