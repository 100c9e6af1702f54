"""Data sets and the verifier: what files may look like, what is said of a wrong one, fetching, splits, overlaps, answers.

The real sets are tried too where NANOOCC_DATA names a folder that has them.
"""

import json
import os
import random
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
SIZES = dict(gsm8k_train=7473, gsm8k_test=1319, svamp=1000, math500=500, aime24=30, aime25=30, amc23=40, minerva=272,
             olympiadbench=675)  # fmt: skip


@pytest.fixture(autouse=True)
def _no_file_is_remembered():
    for cached in (rl.read_problems, rl.side_of_split, rl.suites_of, rl.longest):
        cached.cache_clear()


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def sums(count, start=0):
    return [{"question": f"What is {i} and {i + 1}, please?", "answer": f"Add.\n#### {2 * i + 1}"}
            for i in range(start, start + count)]  # fmt: skip


@pytest.mark.parametrize(
    "record, prompt, answer, solution",
    [
        (
            {"question": "Two and two?", "answer": "It is <<2+2=4>>4.\n#### 1,004"},
            "Two and two?",
            "1,004",
            None,
        ),
        ({"question": "q", "answer": "#### 18\nThe answer is: 18"}, "q", "18", None),
        ({"problem": " Half? ", "answer": "\\frac12"}, "Half?", "\\frac12", "#### \\frac12"),
        ({"problem": "p", "question": "q", "answer": 27.0}, "p", "27", "#### 27"),
        ({"problem": "p", "answer": 0.5}, "p", "0.5", "#### 0.5"),
        (
            {"problem": "p", "solution": "so \\boxed{\\frac{1}{2}}"},
            "p",
            "\\frac{1}{2}",
            "so \\boxed{\\frac{1}{2}}",
        ),
        ({"problem": "p", "solution": "so $\\boxed 5$"}, "p", "5", "so $\\boxed 5$"),
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
        ("[" * 100_000, "not JSON (maximum recursion depth"),
        ('{"question": "q", "answer": "1", "id": ' + "7" * 5000 + "}", "not JSON (Exceeds the limit (4300 digits)"),
        ("7", "not a record with a problem and an answer: '7'"),
        ('{"answer": "1"}', 'no text in "problem" or "question"'),
        ('{"question": "  ", "answer": "1"}', 'no text in "problem" or "question"'),
        ('{"question": "q"}', 'no answer in "answer"'),
        ('{"question": "q", "answer": "think\\n####"}', 'no answer in "answer"'),
        ('{"question": "q", "answer": "#### 12 \\\\boxed{13} ####"}', "some.jsonl:3"),
        ('{"question": "q", "answer": [1]}', 'no answer in "answer"'),
        ('{"question": "q", "answer": true}', 'no answer in "answer"'),
    ],
)
def test_a_malformed_line_is_named_and_blank_ones_are_skipped(tmp_path, line, said):
    path = tmp_path / "some.jsonl"
    path.write_text('{"question": "q", "answer": "1"}\n\n' + line + "\n \n")
    if "boxed" in line:  # a box wins over "####": the gold is read as a response would be
        assert rl.read_problems(str(path))[1].answer == "13"
        return
    with pytest.raises(ValueError, match="some.jsonl:3: ") as error:
        rl.read_problems(str(path))
    assert said in str(error.value)


def test_files_that_are_none(tmp_path):
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "array.jsonl").write_text("[1, 2")
    for name, said in (("bytes", "cannot be read"), ("none", "cannot be read: .*No such file"), ("empty", "no problems"),
                       ("array", "not JSON")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            rl.suites_of(str(tmp_path / f"{name}.jsonl"))


def test_a_line_separator_within_a_text_is_no_end_of_a_line(tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text('{"question": "a\u2028b", "answer": "1"}\n', encoding="utf-8")
    assert rl.read_problems(str(path))[0].prompt == "a\u2028b\n"


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
    rl.read_problems.cache_clear()
    with pytest.raises(ValueError, match="not fetched .*:1: not JSON.*; put it there by hand, from file:"):
        rl.suites_of("gsm8k", str(data))
    assert os.listdir(data) == []


def test_without_a_network_it_is_said_what_to_put_where(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(rl.urllib.request, "urlopen", no_network)
    with pytest.raises(
        ValueError, match="aime24.jsonl: not there, and not fetched .*; put it there by hand, from https"
    ):
        rl.suites_of("aime24", str(tmp_path / "data"), scoring=True)


def test_names_of_suites(tmp_path):
    assert rl.suites_of("add,mul,add") == ["add", "mul"] and rl.suites_of("arithmetic") == list(rl.SUITES)
    with pytest.raises(
        ValueError, match="--task: unknown suite 'gsm'; allowed: arithmetic, or some of add,sub"
    ):
        rl.suites_of("add,gsm")
    with pytest.raises(
        ValueError, match="--task aime24: a set to score on: python eval.py score RUN --suite aime24"
    ):
        rl.suites_of("add,aime24")
    (tmp_path / "b").mkdir()
    paths = [write(tmp_path / part / "a.jsonl", *sums(1)) for part in ("", "b")]
    with pytest.raises(ValueError, match="the name a is taken"):
        rl.suites_of(",".join(paths))


def test_one_problem_in_eight_is_held_out_whatever_the_file(tmp_path):
    a, b = write(tmp_path / "a.jsonl", *sums(400)), write(tmp_path / "b.jsonl", *sums(400, start=200))
    out, rest = ({p.prompt for p in rl.side_of_split(a, held_out)} for held_out in (True, False))
    assert len(out) + len(rest) == 400 and 25 < len(out) < 80
    assert not out & {p.prompt for p in rl.side_of_split(b, False)}
    rng = random.Random(0)
    assert {rl.draw_problem(a, 2, rng).prompt for _ in range(500)} <= rest
    assert {p.prompt for p in rl.held_out_problems(a, 2, 1000)} == out and len(
        rl.held_out_problems(a, 2, 5)
    ) == 5
    one_side = [s for s in sums(20) if f"{s['question']}\n" in rest]
    with pytest.raises(ValueError, match="too few problems: none is held out"):
        rl.side_of_split(write(tmp_path / "c.jsonl", *one_side[:2]), True)


def test_problems_in_common_are_counted_and_refused(tmp_path):
    trained = write(tmp_path / "trained.jsonl", *sums(10))
    changed = [{**s, "question": s["question"].upper().replace(", ", "  ")} for s in sums(4, start=7)]
    other = write(tmp_path / "other.jsonl", *changed)
    with pytest.raises(
        ValueError, match="3 of its 4 problems are in .*trained.jsonl, which the run was trained on"
    ):
        rl.check_apart(["add", trained], ["mul", other])
    rl.check_apart([trained], [write(tmp_path / "apart.jsonl", *sums(4, start=10)), "add"])


@pytest.mark.parametrize("a, b", [("Compute 12-3.", "Compute 1-23."), ("gcd(1, 23)", "gcd(12, 3)"), ("-5", "5"),
                                  ("1.25+3", "12.5+3"), ("f(1,25)", "f(12,5)"), ("x y", "xy"), ("a/b", "a b"),
                                  ("2^3", "23"), ("x^{12}", "x^{1}2"), ("|x|", "x"), ("1 000", "10 00")])  # fmt: skip
def test_other_problems_are_not_taken_for_the_same(a, b):
    assert rl.normal(a) != rl.normal(b)


@pytest.mark.parametrize("a, b", [("What is 2, please?", "what is  2 please"), ("Find $x$.", "Find x"),
                                  ("12 - 3", "12\u22123"), ('He said "no".', "He said no!")])  # fmt: skip
def test_the_same_problem_may_be_written_differently(a, b):
    assert rl.normal(a) == rl.normal(b)


def test_a_run_on_a_file_and_its_scores(small, tmp_path):
    trained, other = (
        write(tmp_path / "trained.jsonl", *sums(60)),
        write(tmp_path / "minerva.jsonl", *sums(3, start=60)),
    )
    cfg = small(task=f"{trained},add", difficulty=1, max_new_tokens=24)
    assert train.main(cfg) == 0
    records = evaluation.read_metrics(cfg.out)[1]
    assert {"eval/trained", "eval/add"} < set(records[-1])

    def score(*flags):
        return "\n".join(evaluation.score(evaluation.parse(["score", cfg.out, "--k", "2", *flags])))

    own = score("--problems", "2")
    assert "| trained | 2 | " in own and "| add | 2 | " in own and "Competition" not in own
    text = score("--suite", f"{other},mul", "--problems", "2", "--max_new_tokens", "8")
    assert (
        "| minerva | 2 | " in text
        and "| mul | 2 | " in text
        and "Competition problems are far beyond" in text
    )
    with pytest.raises(ValueError, match="60 of its 60 problems are in"):
        score("--suite", trained)
    long = write(tmp_path / "long.jsonl", {"problem": "word " * 200, "answer": "7"})
    assert "long: 1 prompts are longer than the" in score("--suite", long)
    with pytest.raises(ValueError, match="--max_new_tokens 999: must be below"):
        score("--max_new_tokens", "999")
    with pytest.raises(ValueError, match="must be .* or more for this task"):
        small(task=trained, max_new_tokens=8)


def test_the_cached_base_is_of_what_is_in_the_file(small, tmp_path):
    path = write(tmp_path / "a.jsonl", *sums(40))
    train.main(small("a", task=path, max_new_tokens=32))
    write(tmp_path / "a.jsonl", *[{**s, "answer": f"First, {s['answer']}"} for s in sums(40)])
    rl.read_problems.cache_clear()
    train.main(small("b", task=path, max_new_tokens=32))
    assert len(list((tmp_path / "base").glob("*.pt"))) == 2


# ----------------------------------------------------------------------------------------------------------------------
# Verifier


@pytest.mark.parametrize(
    "text, answer",
    [
        ("3+4 = 7\n#### 7", "7"),
        ("#### 1\n#### 2 \nthanks", "2"),  # the last one
        ("12#####3", "3"),
        ("so \\boxed{\\frac{1}{2}} and #### 3", "\\frac{1}{2}"),  # a box wins; braces match
        ("\\boxed{1} then \\boxed{2}", "2"),
        ("\\boxed{1} then \\boxed{2", "1"),  # the last one is cut off
        ("\\boxed{5}. One puts it in \\boxed{}, or \\boxed as here", "5"),  # which only mentions one
        ("One puts it in \\boxed{...}.\n#### 4", "4"),
        ("so $\\boxed 5$", "5"),
        ("\\boxed{1", None),
        ("\\boxed{}", None),
        ("Answer: 12\nAnswer: 13", "13"),
        ("**Answer:** 7", "7"),
        ("***Answer***: 42", "42"),
        ("Answer: **73**.", "73"),
        ("#### **73**.", "73"),
        ("Answer: **$42$**.", "$42$"),
        ("_Answer_: `7`", "7"),
        ("the answer is 7", None),  # never the whole text
        ("####", None),
        ("", None),
    ],
)
def test_extract_answer(text, answer):
    assert rl.extract_answer(text) == answer


ANSWERS = [
    json.loads(line) for line in (ROOT / "tests" / "answers.jsonl").read_text(encoding="utf-8").splitlines()
]


def test_no_wrong_answer_is_accepted():
    assert len(ANSWERS) >= 400 and sum(not right for _, _, right, _ in ANSWERS) >= 150
    accepted = [
        (gold, answer) for gold, answer, right, _ in ANSWERS if not right and rl.answers_equal(gold, answer)
    ]
    assert accepted == []


def test_numbers_are_equal_however_they_are_written():
    numeric = [row for row in ANSWERS if rl.read_number(rl.tidied(row[0]))]
    wrong = [row for row in numeric if rl.answers_equal(row[0], row[1]) != row[2]]
    assert len(numeric) >= 200 and len(wrong) <= 0.01 * len(numeric), wrong


@pytest.mark.parametrize(
    "gold, candidate", [("Blue  Whale", "blue whale"), ("(3,4)", "$(3,4)$"), ("x+1", "x+1.")]
)
def test_other_answers_are_compared_as_text(gold, candidate):
    assert rl.answers_equal(gold, candidate)
    assert not rl.answers_equal(gold, candidate + "0") and not rl.answers_equal(gold, None)


HOSTILE = [
    "9**9**9**9", "(" * 10_000, "[" * 10_000 + "]" * 10_000, "1e999999999", "1E-999999999", "10^{999999999}",
    "9" * 1_000_000, "0." + "0" * 1_000_000 + "1", "9" * 499, "__import__('os').system('false')", "exec('x=1')",
    "1," * 249, "\\frac" * 99, "{" * 20 + "\\frac" * 50, "10\u2075", "x\u2074", "\u2460", "\ufdfa" * 400, "\u00bd" * 400,
    "\u0663", "\\text{" * 80, "1 1/1 " * 80, "a" * 499, "1" + " " * 497 + "/", "\\boxed{" * 10_000, "^{" * 10 + "1" * 400,
    "\x00" * 499, "\ud800", "*" * 499, "**" * 240, "#" * 100_000, "answer" * 20_000, "Answer:" * 10_000, "1e9999", "$" * 499,
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: f"{text[:12]!r} {len(text)}")
def test_hostile_text_is_neither_accepted_nor_evaluated(text):
    for gold in ("7", "\\frac{1}{2}", "(3,4]", "x"):
        assert not rl.answers_equal(gold, text)
        assert not rl.answers_equal(gold, rl.extract_answer(f"\\boxed{{{text}"))
        assert not rl.answers_equal(gold, rl.extract_answer(f"#### {text}"))
    began = time.process_time()
    rl.answers_equal(text, text[:-1])
    rl.extract_answer(text)
    assert (
        time.process_time() - began < 5
    )  # a regular expression that backtracks without end would take minutes


@real
def test_the_real_sets_judge_themselves_and_share_nothing():
    for name, size in SIZES.items():
        problems = rl.read_problems(f"{REAL}/{name}.jsonl")
        assert len(problems) == size and all(rl.is_right(p, p.solution) for p in problems)
        if name != "gsm8k_train":
            rl.check_apart([f"{REAL}/gsm8k_train.jsonl"], [f"{REAL}/{name}.jsonl"])


@real
def test_other_layouts_of_the_real_sets_read_alike(tmp_path):
    """As their homes have them: without the fields that a copy may have added."""
    for name, added in (
        ("minerva", ["answer"]),
        ("olympiadbench", ["problem", "answer"]),
        ("svamp", ["problem", "answer"]),
    ):
        records = [
            json.loads(line) for line in Path(f"{REAL}/{name}.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        bare = [{key: value for key, value in record.items() if key not in added} for record in records]
        ours = rl.read_problems(write(tmp_path / f"{name}.jsonl", *bare))
        assert [p[1:3] for p in ours] == [p[1:3] for p in rl.read_problems(f"{REAL}/{name}.jsonl")]
