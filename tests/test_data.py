"""Data sets: what files may look like, what is said of one that is wrong, fetching, splits, overlaps; and the verifier.

The real sets are tried too where NANOOCC_DATA names a folder that has them.
"""

import http.client
import json
import os
import time
import urllib.error
from pathlib import Path

import pytest
from conftest import ROOT

import eval as evaluation
import rl
import train

REAL = os.environ.get("NANOOCC_DATA")
real = pytest.mark.skipif(not REAL, reason="skipped: NANOOCC_DATA names no folder with the real sets")
SIZES = dict(gsm8k_train=7473, gsm8k_test=1319, svamp=1000, math500=500, aime24=30, aime25=30, amc23=40, minerva=272)
SIZES |= dict(olympiadbench=675)


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def sums(count, start=0):
    """So many problems; texts differ in a word, since only letters and digits tell problems apart."""
    return [{"question": f"What is {i} and {i + 1}, please?", "answer": f"Add.\n#### {2 * i + 1}"}
            for i in range(start, start + count)]  # fmt: skip


@pytest.mark.parametrize(
    "record, prompt, answer, solution",
    [
        ({"question": "Two and two?", "answer": "It is <<2+2=4>>4.\n#### 1,004"}, "Two and two?", "1,004", None),
        ({"problem": " Half? ", "answer": "\\frac12"}, "Half?", "\\frac12", "#### \\frac12"),
        ({"problem": "p", "question": "q", "answer": 27.0}, "p", "27", "#### 27"),
        ({"problem": "p", "answer": 0.5}, "p", "0.5", "#### 0.5"),
        ({"problem": "p", "solution": "so \\boxed{\\frac{1}{2}}"}, "p", "\\frac{1}{2}", "so \\boxed{\\frac{1}{2}}"),
        ({"problem": "p", "answer": "3", "solution": "so \\boxed{4}"}, "p", "3", "so \\boxed{4}\n\\boxed{3}"),
        ({"question": "q", "final_answer": ["$2$"], "solution": ["long"]}, "q", "$2$", "#### $2$"),
        ({"Body": "I have 3", "Question": "How many?", "Answer": 3.0}, "I have 3. How many?", "3", "#### 3"),
    ],
)
def test_what_a_record_may_look_like(tmp_path, record, prompt, answer, solution):
    path = write(tmp_path / "some.jsonl", record)
    (problem,) = rl.read_problems(path)
    assert problem == rl.Problem(path, f"{prompt}\n", answer, solution or record["answer"])
    assert rl.is_right(problem, problem.solution)
    (tmp_path / "array.jsonl").write_text(json.dumps([record], indent=1))
    assert rl.read_problems(str(tmp_path / "array.jsonl"))[0][1:] == problem[1:]


@pytest.mark.parametrize(
    "line, said",
    [
        ('{"question": "q"', "not JSON"),
        ("", "not JSON: ''"),
        ("[" * 100_000, "not JSON"),
        ("7", "not a record with a problem and an answer: '7'"),
        ('{"answer": "1"}', 'no text in "problem" or "question"'),
        ('{"question": "  ", "answer": "1"}', 'no text in "problem" or "question"'),
        ('{"question": "q"}', 'no answer in "answer"'),
        ('{"question": "q", "answer": "think\\n####"}', 'no answer in "answer"'),
        ('{"question": "q", "answer": [1]}', 'no answer in "answer"'),
        ('{"question": "q", "answer": true}', 'no answer in "answer"'),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, said):
    path = tmp_path / "some.jsonl"
    path.write_text('{"question": "q", "answer": "1"}\n' + line + "\n")
    with pytest.raises(ValueError, match="some.jsonl:2: ") as error:
        rl.read_problems(str(path))
    assert said in str(error.value)


def test_files_that_are_none(tmp_path):
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "array.jsonl").write_text("[1, 2")
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    for name, said in (("bytes", "cannot be read"), ("none", "cannot be read: No such file"), ("empty", "1: not JSON"),
                       ("array", "not a JSON array"), ("deep", "not a JSON array")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            rl.suites_of(str(tmp_path / f"{name}.jsonl"))


def test_a_line_separator_within_a_text_is_no_end_of_a_line(tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text('{"question": "a\u2028b", "answer": "1"}\n', encoding="utf-8")
    assert rl.read_problems(str(path))[0].prompt == "a\u2028b\n"


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A data set with a home in another folder; returns that file."""
    home = tmp_path / "home.jsonl"
    write(home, *sums(3))
    known = rl.Published(home.as_uri(), rl.sha256(rl.read_problems(str(home))))
    monkeypatch.setitem(rl.PUBLISHED, "gsm8k_train", known)
    monkeypatch.setattr(rl, "GITHUB", "")
    rl.suites_of.cache_clear()
    yield home
    rl.suites_of.cache_clear()


def test_what_is_missing_is_fetched(tmp_path, published):
    (path,) = rl.suites_of("gsm8k", str(tmp_path / "data"))
    assert Path(path) == tmp_path / "data" / "gsm8k_train.jsonl" and Path(path).read_bytes() == published.read_bytes()
    published.unlink()  # and not fetched again
    rl.suites_of.cache_clear()
    assert rl.suites_of("gsm8k", str(tmp_path / "data")) == [path]
    assert os.listdir(tmp_path / "data") == ["gsm8k_train.jsonl"]


def test_half_a_file_is_not_kept(tmp_path, published):
    published.write_text('{"question": "q", "ans')
    with pytest.raises(ValueError, match="not fetched .*:1: not JSON.*; put it there by hand"):
        rl.suites_of("gsm8k", str(tmp_path / "data"))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file/gsm8k_train.jsonl: not there, and not fetched .*exists"):
        rl.suites_of("gsm8k", str(tmp_path / "file"))
    assert os.listdir(tmp_path / "data") == []


def test_what_is_not_as_published_is_not_kept(tmp_path, published, capsys):
    write(published, *sums(4))
    with pytest.raises(ValueError, match="what is there is not as it was published.; put it there by hand, from file:"):
        rl.suites_of("gsm8k", str(tmp_path / "data"))
    assert os.listdir(tmp_path / "data") == []
    path = write(tmp_path / "data" / "gsm8k_train.jsonl", *sums(5))  # the user's own is taken, and said to be
    assert rl.suites_of("gsm8k", str(tmp_path / "data")) == [path]
    assert capsys.readouterr().err == f"note: {path} is not gsm8k_train as it was published\n"


@pytest.mark.parametrize("error", (urllib.error.URLError("no network"), TimeoutError(), http.client.BadStatusLine("?")))
def test_without_a_network_it_is_said_what_to_put_where(tmp_path, monkeypatch, error):
    monkeypatch.setattr(rl.urllib.request, "urlopen", lambda *_, **__: (_ for _ in ()).throw(error))
    with pytest.raises(ValueError) as said:
        rl.suites_of("aime24", str(tmp_path / "data"), scoring=True)
    line = str(said.value)
    assert line.startswith(f"{tmp_path}/data/aime24.jsonl: not there, and not fetched (")
    assert line.endswith(f"put it there by hand, from {rl.GITHUB}{rl.PUBLISHED['aime24'].home}")
    assert os.listdir(tmp_path / "data") == []


def test_sets_to_score_on_are_not_trained_on(tmp_path):
    with pytest.raises(ValueError, match="--task aime24: a set to score on, not to train on: python eval.py score RUN"):
        rl.suites_of("add,aime24")
    with pytest.raises(
        ValueError, match="--suite: unknown suite 'gsm'; allowed: arithmetic, competition, or some of add"
    ):
        rl.suites_of("gsm", scoring=True)
    (tmp_path / "b").mkdir()
    paths = [write(tmp_path / part / "a.jsonl", *sums(1)) for part in ("", "b")]
    with pytest.raises(ValueError, match="would have one name, a"):
        rl.suites_of(",".join(paths))


def test_one_problem_in_eight_is_held_out_whatever_the_file(tmp_path):
    a, b = write(tmp_path / "a.jsonl", *sums(400)), write(tmp_path / "b.jsonl", *sums(400, start=200))
    out, rest = ({p.prompt for p in rl.side(a, held_out)} for held_out in (True, False))
    assert len(out) + len(rest) == 400 and 25 < len(out) < 80
    assert not out & {p.prompt for p in rl.side(b, False)} and not rest & {p.prompt for p in rl.side(b, True)}
    assert {p.prompt for p in rl.held_out_problems(a, 2, 1000)} == out and len(rl.held_out_problems(a, 2, 5)) == 5
    rng = rl.random.Random(0)
    assert {rl.draw_problem(a, 2, rng).prompt for _ in range(500)} <= rest
    with pytest.raises(ValueError, match="too few problems: none is held out"):
        rl.side(write(tmp_path / "c.jsonl", *[s for s in sums(20) if f"{s['question']}\n" in rest][:2]), True)


def test_problems_in_common_are_counted_and_refused(tmp_path):
    trained = write(tmp_path / "trained.jsonl", *sums(10))
    changed = [{**s, "question": s["question"].upper().replace(", ", " - ")} for s in sums(4, start=7)]
    other = write(tmp_path / "other.jsonl", *changed)
    with pytest.raises(ValueError, match=f"--suite {other}: 3 of its 4 problems are in {trained}, which the run was"):
        rl.check_apart(["add", trained], ["mul", other])
    rl.check_apart([trained], [write(tmp_path / "apart.jsonl", *sums(4, start=10)), "add"])


def test_a_run_on_a_file_and_its_scores(small, tmp_path, capsys):
    trained, other = write(tmp_path / "trained.jsonl", *sums(60)), write(tmp_path / "minerva.jsonl", *sums(3, start=60))
    cfg = small(task=f"{trained},words", difficulty=1, max_new_tokens=64)
    assert train.main(cfg) == 0
    records = evaluation.read_metrics(cfg.out)[1]
    assert {"eval/trained", "eval/words"} < set(records[-1])
    capsys.readouterr()
    score = lambda *flags: "\n".join(evaluation.score(evaluation.parse(["score", cfg.out, "--k", "2", *flags])))
    own = score("--problems", "2")
    assert "| trained | 2 | " in own and "| words | 2 | " in own and "Competition" not in own
    text = score("--suite", f"{other},add", "--problems", "2", "--max_new_tokens", "8")
    assert "| minerva | 2 | " in text and "| add | 2 | " in text and "Competition problems are far beyond" in text
    with pytest.raises(ValueError, match="60 of its 60 problems are in"):
        score("--suite", trained)
    with pytest.raises(ValueError, match="must be .* or more for this task"):
        small(task=trained, max_new_tokens=8)


def test_a_file_that_has_changed_is_noticed(small, tmp_path):
    path = write(tmp_path / "a.jsonl", *sums(60))
    train.main(small(task=path, max_new_tokens=32))
    write(tmp_path / "a.jsonl", *sums(60, start=60))
    rl.read_problems.cache_clear()
    other = write(tmp_path / "b.jsonl", *sums(60))
    with pytest.raises(ValueError, match="a.jsonl: its problems have changed since the run was trained on it"):
        evaluation.score(evaluation.parse(["score", small(task="add").out, "--suite", other]))
    with pytest.raises(ValueError, match="a.jsonl: its problems have changed"):
        train.command_line(["--resume", small(task="add").out])


def test_a_file_may_have_the_name_of_another_that_was_pretrained_on(small, tmp_path):
    (tmp_path / "b").mkdir()
    a, b = (write(tmp_path / folder / "a.jsonl", *sums(40, start=start)) for folder, start in (("", 0), ("b", 40)))
    cfg = small(task=a, pretrain_task=b, max_new_tokens=32)
    train.main(cfg)
    with pytest.raises(ValueError, match="40 of its 40 problems are in"):
        evaluation.score(evaluation.parse(["score", cfg.out, "--suite", b]))
    write(tmp_path / "score.jsonl", *sums(3))
    with pytest.raises(ValueError, match="score is the name of a mean in logs and tables; rename the file"):
        rl.suites_of(str(tmp_path / "score.jsonl"))


def test_a_prompt_longer_than_in_training_is_read(small, tmp_path):
    cfg = small(task="add")
    train.main(cfg)
    long = write(tmp_path / "long.jsonl", {"problem": "word " * 200, "answer": "\\sqrt{2}"})
    lines = evaluation.score(evaluation.parse(["score", cfg.out, "--k", "1", "--suite", long]))
    assert lines[0] == "| suite | problems | symbolic | avg@1 |" and lines[2].startswith("| long | 1 | 1 | ")
    assert any("only algebra can judge" in line for line in lines)


def test_pretraining_is_of_what_is_in_the_file(small, tmp_path):
    path = write(tmp_path / "a.jsonl", *sums(40))
    train.main(small("a", task=path, max_new_tokens=32))
    longer = [{**s, "answer": f"First, {s['answer']}"} for s in sums(40)]  # only the working differs
    write(tmp_path / "a.jsonl", *longer)
    for cached in (rl.read_problems, rl.side, rl.token_lengths, rl.suites_of):
        cached.cache_clear()
    train.main(small("b", task=path, max_new_tokens=32))
    assert len(list((tmp_path / "base").glob("*.pt"))) == 2
    train.main(small("c", task="add", pretrain_task=path, max_new_tokens=32))  # what is pretrained on is the same
    assert len(list((tmp_path / "base").glob("*.pt"))) == 2


# Verifier


ANSWERS = [json.loads(line) for line in (ROOT / "tests" / "answers.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("category", sorted({row[3] for row in ANSWERS}))
def test_answers_in_the_ways_they_are_written(category, monkeypatch):
    monkeypatch.setattr(rl, "has_algebra", lambda: False)
    wrong = [row for row in ANSWERS if row[3] == category and rl.answers_equal(*row[:2]) != row[2]]
    assert not wrong


def test_the_list_of_answers_is_long_and_has_both_kinds():
    assert len(ANSWERS) >= 300 and 0.4 < sum(row[2] for row in ANSWERS) / len(ANSWERS) < 0.6


HOSTILE = [
    "9**9**9**9", "(" * 10_000, "[" * 10_000 + "]" * 10_000, "(1" * 20 + ")" * 20, "1e999999999", "1E-999999999",
    "10^{999999999}", "9" * 1_000_000, "0." + "0" * 1_000_000 + "1", "9" * 499, "__import__('os').system('false')",
    "exec('x=1')", "1," * 249, "or1" * 160, "]{" * 249, "\\frac" * 99, "{" * 20 + "\\frac" * 50, "\\pm" * 160,
    "x\\pmod 5", "10\u2075", "x\u2074", "\u2460", "\ufdfa" * 400, "\u00bd" * 400, "\u0663", "\\pm," * 120,
    "\\text{" * 80, "\\cup" * 120, "1 1/1 " * 80, "a" * 499, "a b" * 160, "1" + " " * 497 + "/", "\\boxed{" * 70,
    "and or " * 70, "^{" * 10 + "1" * 400, "\x02" * 499, "\x04" * 499, "\\\\&" * 160, "\\begin{pmatrix}" * 30, "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: f"{text[:12]!r} {len(text)}")
def test_hostile_text_is_refused_in_time(text):
    for gold in ("7", "\\frac{1}{2}", "(3,4]", "\\{1\\pm\\sqrt{5},-2\\}", "864 \\mbox{ inches}^2", "\\text{(C)}"):
        began = time.perf_counter()
        assert not rl.answers_equal(gold, text)
        assert time.perf_counter() - began < 0.05
    rl.answers_equal(text, text[:-1]), rl.is_symbolic(text), rl.extract_answer(text)


def test_algebra_is_asked_only_where_it_is_needed_and_safe(monkeypatch):
    asked = []

    class MathVerify:
        parse = staticmethod(lambda text, parsing_timeout: asked.append(text) or text)
        verify = staticmethod(lambda a, b, timeout_seconds: True)

    monkeypatch.setattr(rl, "has_algebra", lambda: True)
    monkeypatch.setitem(rl.sys.modules, "math_verify", MathVerify)
    assert rl.answers_equal("($2n-2$, 7)", "(2(n-1), 7)") and asked == ["$2n-2$", "$2(n-1)$"]  # the part that needs it
    asked.clear()
    for gold, candidate in (("7", "8"), ("(3,4]", "[3,4]"), ("$n$", "9**9**9"), ("$n$", "9^{9^9}"), ("$n$", "99999^2"),
                            ("$n$", "9!"), ("$n$", "9^{999}"), ("$n$", "__import__('os')"), ("$n$", "n+" * 101),
                            ("(-n, n)", "-n, n"), ("(-n, n)", "\\{-n, n\\}"), ("n", "7=n")):  # fmt: skip
        assert not rl.answers_equal(gold, candidate)
    assert asked == []
    monkeypatch.setattr(MathVerify, "parse", lambda *_, **__: 1 / 0)
    assert not rl.answers_equal("$n$", "m")


@real
def test_the_real_sets_are_those_published_and_judge_themselves():
    symbolic = {}
    for name, size in SIZES.items():
        problems = rl.read_problems(f"{REAL}/{name}.jsonl")
        assert len(problems) == size and rl.sha256(problems) == rl.PUBLISHED[name].sha256
        assert all(rl.answers_equal(p.answer, f" {p.answer} ") and rl.is_right(p, p.solution) for p in problems)
        read = [rl.read_answer(p.answer) for p in problems]
        assert all(rl.same(a, a) for a in read)
        symbolic[name] = sum(rl.is_symbolic(p.answer) for p in problems)
        if name.startswith("gsm8k"):
            assert all(answer.kind == "number" for answer in read)
    assert [name for name in symbolic if symbolic[name]] == ["math500", "minerva", "olympiadbench"]


@real
def test_other_layouts_of_the_real_sets_read_alike(tmp_path):
    """As their homes have them: without the fields that a copy may have added."""
    for name, added in (
        ("minerva", ["answer"]),
        ("olympiadbench", ["problem", "answer"]),
        ("svamp", ["problem", "answer"]),
    ):
        records = [json.loads(line) for line in open(f"{REAL}/{name}.jsonl", encoding="utf-8")]
        bare = [{key: value for key, value in record.items() if key not in added} for record in records]
        assert rl.sha256(rl.read_problems(write(tmp_path / f"{name}.jsonl", *bare))) == rl.PUBLISHED[name].sha256


@real
def test_no_real_set_shares_problems_with_what_is_trained_on(monkeypatch):
    monkeypatch.setattr(rl, "data_file", lambda name, data_dir: f"{REAL}/{name}.jsonl")
    rl.suites_of.cache_clear()
    trained, scored = rl.suites_of("gsm8k"), rl.suites_of("competition,gsm8k,svamp", scoring=True)
    rl.check_apart(trained, scored)
    with pytest.raises(ValueError, match="60[05] of its 60[05]|600 of its 600 problems are in"):
        rl.check_apart([f"{REAL}/mawps.jsonl"], [f"{REAL}/multiarith.jsonl"])
    rl.suites_of.cache_clear()
