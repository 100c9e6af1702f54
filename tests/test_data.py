"""Data sets and the verifier: what files may look like, what is said of wrong ones, fetching, splits, answers.

The real sets are tried too where NANOOCC_DATA names a folder that has them.
"""

import json
import os
import random
import re

import pytest
import torch
from conftest import ROOT

import eval as evaluation
import rl
import train

REAL = os.environ.get("NANOOCC_DATA")
SIZES = dict(
    gsm8k_train=7473, gsm8k_test=1319, svamp=1000, math500=500, aime24=30, aime25=30, amc23=40,
    minerva=272, olympiadbench=675,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _no_file_is_remembered():
    for cached in (rl.read_problems, rl.side_of_split, rl.suites_of, rl.longest):
        cached.cache_clear()


def write(path, *records):
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


def sums(count, start=0, working="Add."):
    records = []
    for i in range(start, start + count):
        answer = f"{working}\n#### {2 * i + 1}"
        records.append({"question": f"What is {i} and {i + 1}, please?", "answer": answer})
    return records


@pytest.mark.parametrize("record, prompt, answer", [  # a record, its problem, and its answer
    ({"question": "Two?", "answer": "It is <<1+1=2>>2.\n#### 1,004"}, "Two?", "1,004"),
    ({"question": "a\u2028b", "answer": "#### 18\nAnswer: 18"}, "a\u2028b", "18"),  # no line's end
    ({"problem": " Half? ", "answer": "\\frac12"}, "Half?", "\\frac12"),
    ({"problem": "p", "question": "q", "answer": 27.0}, "p", "27"),
    ({"problem": "p", "solution": "so \\boxed{\\frac{1}{2}}"}, "p", "\\frac{1}{2}"),
    ({"problem": "p", "answer": "3", "solution": "so \\boxed{4}"}, "p", "3"),
    ({"question": "q", "final_answer": ["$2$"], "solution": ["long"]}, "q", "$2$"),
    ({"Body": "I have 3", "Question": "How many?", "Answer": 3.0}, "I have 3. How many?", "3"),
])  # fmt: skip
def test_what_a_record_may_look_like(tmp_path, record, prompt, answer):
    path = write(tmp_path / "some.jsonl", record)
    (problem,) = rl.read_problems(path)
    assert problem[:3] == (path, f"{prompt}\n", answer) and rl.is_right(problem, problem.solution)
    (tmp_path / "array.jsonl").write_text(json.dumps([record], indent=1))
    assert rl.read_problems(str(tmp_path / "array.jsonl"))[0][1:] == problem[1:]


GOOD = '{"question": "q", "answer": "1"}\n \n'  # with a blank line
MALFORMED = [  # what a file has, and what is said of it
    (GOOD + '{"question": "q"', ":3: not JSON"),
    (GOOD + "[" * 100_000, ":3: not JSON (maximum recursion depth"),
    (GOOD + '{"id": ' + "7" * 5000 + "}", ":3: not JSON (Exceeds the limit (4300 digits)"),
    (GOOD + "7", ":3: not a record with a problem and an answer: '7'"),
    (GOOD + '{"question": "  ", "answer": "1"}', ':3: no text in "problem" or "question"'),
    (GOOD + '{"question": "q"}', ':3: no answer in "answer"'),
    (GOOD + '{"question": "q", "answer": "think\\n####"}', ':3: no answer in "answer"'),
    (GOOD + '{"question": "q", "answer": [1]}', ':3: no answer in "answer"'),
    ("\n", ": no problems"),
    ("[1, 2", ": not JSON"),
    ("\xff\xfe", ": cannot be read: "),  # not UTF-8
]


@pytest.mark.parametrize("content, said", MALFORMED, ids=[said for _, said in MALFORMED])
def test_a_malformed_line_is_named_and_blank_ones_are_skipped(tmp_path, content, said):
    path = tmp_path / "some.jsonl"
    with pytest.raises(ValueError, match="some.jsonl: cannot be read: .*No such file"):
        rl.suites_of(str(path))
    path.write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=re.escape(f"{path}{said}")):
        rl.suites_of(str(path))


def test_what_is_missing_is_fetched_and_half_a_file_is_not_kept(tmp_path, monkeypatch):
    home, data = tmp_path / "home.jsonl", tmp_path / "data"
    write(home, *sums(3))
    monkeypatch.setattr(rl, "GITHUB", "")
    monkeypatch.setitem(rl.PUBLISHED, "gsm8k_train", home.as_uri())
    assert rl.suites_of("gsm8k", str(data)) == [str(data / "gsm8k_train.jsonl")]
    assert (data / "gsm8k_train.jsonl").read_bytes() == home.read_bytes()
    (data / "gsm8k_train.jsonl").unlink()
    home.write_text('{"question": "q", "ans')
    rl.suites_of.cache_clear()
    said = "not fetched .*:1: not JSON.*; put it there by hand, from file:"
    with pytest.raises(ValueError, match=said):
        rl.suites_of("gsm8k", str(data))
    assert os.listdir(data) == []


def test_one_problem_in_eight_is_held_out_whatever_the_file(tmp_path):
    a = write(tmp_path / "a.jsonl", *sums(400))
    b = write(tmp_path / "b.jsonl", *sums(400, start=200))
    out, rest = ({p.prompt for p in rl.side_of_split(a, held_out)} for held_out in (True, False))
    assert len(out) + len(rest) == 400 and 25 < len(out) < 80
    assert not out & {p.prompt for p in rl.side_of_split(b, False)}
    rng = random.Random(0)
    assert {rl.draw_problem(a, 2, rng).prompt for _ in range(500)} <= rest
    assert {p.prompt for p in rl.held_out_problems(a, 2, 1000)} == out


def test_problems_in_common_are_counted_and_refused(tmp_path):
    trained = write(tmp_path / "trained.jsonl", *sums(10))
    changed = sums(4, start=7)
    for record in changed:
        record["question"] = record["question"].upper().replace(", ", "  ")
    other = write(tmp_path / "other.jsonl", *changed)
    said = "3 of its 4 problems are in .*trained.jsonl, which the run was"
    with pytest.raises(ValueError, match=said):
        rl.check_apart(["add", trained], ["mul", other])
    rl.check_apart([trained], [write(tmp_path / "apart.jsonl", *sums(4, start=10)), "add"])


SAME = [("What is 2, please?", "what is  2 please"), ("Find $x$.", "Find x"), ("1 - 3", "1\u22123")]
DIFFERENT = [
    ("Compute 12-3.", "Compute 1-23."), ("gcd(1, 23)", "gcd(12, 3)"), ("-5", "5"), ("x y", "xy"),
    ("1.25+3", "12.5+3"), ("f(1,25)", "f(12,5)"), ("a/b", "a b"), ("x^{12}", "x^{1}2"),
    ("1 000", "10 00"),
]  # fmt: skip


@pytest.mark.parametrize("a, b", SAME + DIFFERENT)
def test_which_problems_are_the_same(a, b):
    assert (rl.normal(a) == rl.normal(b)) == ((a, b) in SAME)


def test_a_run_on_a_file_and_its_scores(small, tmp_path):
    trained = write(tmp_path / "trained.jsonl", *sums(60))
    other = write(tmp_path / "minerva.jsonl", *sums(3, start=60))
    cfg = small(task=f"{trained},add", difficulty=1, max_new_tokens=24)
    train.main(cfg)
    assert {"eval/trained", "eval/add"} < set(evaluation.read_metrics(cfg.out)[1][-1])

    def score(*flags):
        args = evaluation.parse(["score", cfg.out, "--k", "2", *flags])
        return "\n".join(evaluation.score(args))

    own = score("--problems", "2")
    assert "| trained | 2 | " in own and "| add | 2 | " in own and "Competition" not in own
    others = score("--suite", f"{other},mul", "--problems", "2", "--max_new_tokens", "8")
    assert "| minerva | 2 | " in others and "| mul | 2 | " in others
    assert "Competition problems are far" in others
    with pytest.raises(ValueError, match="60 of its 60 problems are in"):
        score("--suite", trained)
    long = write(tmp_path / "long.jsonl", {"problem": "word " * 200, "answer": "7"})
    assert "long: 1 prompts are longer than the" in score("--suite", long)  # only its end is read


def test_a_base_is_shared_by_regimes_and_by_nothing_else(small, tmp_path):
    def bases(working="Add.", **changes):
        task = write(tmp_path / "a.jsonl", *sums(40, working=working))
        cfg = small(task=task, max_new_tokens=32, **changes)
        train.pretrained(cfg, torch.device("cpu"))
        return len(list((tmp_path / "base").iterdir()))

    assert bases() == bases(regime="detach", lr=1e-5) == 1
    assert bases(seed=1) == 2
    assert bases(careless=0.1) == 3
    assert bases(working="First, add.") == 4


@pytest.mark.parametrize("text, answer", [
    ("3+4 = 7\n#### 7", "7"),
    ("#### 1\n#### 2 \nthanks", "2"),  # the last one
    ("12#####3", "3"),
    ("so \\boxed{\\frac{1}{2}} and #### 3", "\\frac{1}{2}"),  # a box wins; braces match
    ("\\boxed{1} then \\boxed{2}", "2"),
    ("\\boxed{1} then \\boxed{2", "1"),  # the last one is cut off
    ("\\boxed{5}. One puts it in \\boxed{}, or \\boxed as here", "5"),  # which only mentions one
    ("so $\\boxed 5$", "5"),
    ("Answer: 12\nAnswer: 13", "13"),
    ("***Answer***: **$42$**.", "$42$"),
    ("the answer is 7", None),  # never the whole text
    ("####", None),
])  # fmt: skip
def test_extract_answer(text, answer):
    assert rl.extract_answer(text) == answer


def test_no_wrong_answer_is_accepted_and_numbers_are_equal_however_they_are_written():
    lines = (ROOT / "tests" / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    wrong, numbers, misjudged = 0, 0, []
    for gold, answer, right, kind in map(json.loads, lines):
        equal = rl.answers_equal(gold, answer)
        assert right or not equal, (gold, answer)
        wrong += not right
        if rl.read_number(rl.tidied(gold)):
            numbers += 1
            misjudged += [(gold, answer)] if equal != right else []
    assert len(lines) >= 400 and wrong >= 150 and numbers >= 200
    assert len(misjudged) <= 0.01 * numbers, misjudged
    assert rl.read_number("2 -1/3") is None  # a difference


@pytest.mark.parametrize("gold, same", (
    ("Blue  Whale", "blue whale"), ("(3,4)", "$(3,4)$"), ("x+1", "x+1."),  # compared as text
    ("2/3", "-6/-9"), ("1/3", r"-\frac{-1}{3}"), ("-2/3", "2/-3"), ("-1/3", r"\frac{-1}{3}"),
))  # fmt: skip
def test_equal_answers_and_their_neighbours(gold, same):
    """A minus below the line counts."""
    assert rl.answers_equal(gold, same)
    for different in (f"-{gold}", f"{same}0", None):
        assert not rl.answers_equal(gold, different)


@pytest.mark.parametrize("text", [
    "9**9**9**9", "(" * 10_000, "[" * 10_000 + "]" * 10_000, "1e999999999", "1E-999999999",
    "10^{999999999}", "9" * 1_000_000, "0." + "0" * 1_000_000 + "1", "9" * 499, "exec('x=1')",
    "__import__('os').system('false')", "1," * 249, "\\frac" * 99, "{" * 20 + "\\frac" * 50,
    "10\u2075", "x\u2074", "\u2460", "\ufdfa" * 400, "\u00bd" * 400, "\u0663", "\\text{" * 80,
    "1 1/1 " * 80, "a" * 499, "1" + " " * 497 + "/", "\\boxed{" * 10_000, "^{" * 10 + "1" * 400,
    "\x00" * 499, "\ud800", "*" * 499, "**" * 240, "#" * 100_000, "answer" * 20_000,
    "Answer:" * 10_000, "1e9999", "$" * 499,
], ids=lambda text: f"{text[:12]!r} {len(text)}")  # fmt: skip
def test_hostile_text_is_neither_accepted_nor_evaluated(text):
    """A regular expression that backtracks without end, or a number that is written out, would never return."""
    for gold in ("7", "\\frac{1}{2}", "(3,4]", "x"):
        assert not rl.answers_equal(gold, text)
        assert not rl.answers_equal(gold, rl.extract_answer(f"\\boxed{{{text}"))
        assert not rl.answers_equal(gold, rl.extract_answer(f"#### {text}"))
    rl.answers_equal(text, text[:-1])
    rl.extract_answer(text)


@pytest.mark.skipif(not REAL, reason="NANOOCC_DATA names no folder with the real sets")
def test_the_real_sets_judge_themselves_and_share_nothing():
    for name, size in SIZES.items():
        problems = rl.read_problems(f"{REAL}/{name}.jsonl")
        assert len(problems) == size and all(rl.is_right(p, p.solution) for p in problems)
        if name != "gsm8k_train":
            rl.check_apart([f"{REAL}/gsm8k_train.jsonl"], [f"{REAL}/{name}.jsonl"])
