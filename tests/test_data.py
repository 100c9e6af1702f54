"""Data sets and the verifier: what files may look like, which problems are whose, answers.

The real sets are tried too where NANOOCC_DATA names a folder that has them.
"""

import itertools
import json
import os
import re
import time

import pytest
import torch
from conftest import ROOT

import eval as evaluation
import rl
import train

REAL = os.environ.get("NANOOCC_DATA")
SIZES = [7473, 1319, 1000, 2065, 500, 30, 30, 40, 272, 675]  # of rl.PUBLISHED


def forget():
    """Files are remembered for as long as a program runs."""
    for cached in (rl.read_problems, rl.side_of_split, rl.suites_of, rl.held_out_problems):
        cached.cache_clear()


_each_test_forgets = pytest.fixture(autouse=True)(forget)


def sums(path, count, start=0, working="Add."):
    """A file of sums. Returns its text."""
    line = '{"question": "What is %d and 1, please?", "answer": "%s#### %d"}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line % (i, working, i) for i in range(start, start + count)))
    return path.read_text()


@pytest.mark.parametrize("record, prompt, answer", [  # a record, its problem, and its answer
    ({"question": "Two?", "answer": "It is <<1+1=2>>2.\n#### 1,004"}, "Two?", "1,004"),
    ({"question": "a\u2028b", "answer": "#### 18\nAnswer: 18"}, "a\u2028b", "18"),  # no line's end
    ({"problem": "p", "question": "q", "answer": 27.0}, "p", "27"),
    ({"problem": "p", "solution": "so \\boxed{\\frac{1}{2}}"}, "p", "\\frac{1}{2}"),
    ({"question": "q", "final_answer": ["$2$"], "solution": ["long"]}, "q", "$2$"),
    ({"question": "q", "final_answer": ["$(0,1) \\cup\\{2\\}$."]}, "q", "$(0,1) \\cup\\{2\\}$."),
    ({"input": " Joan has 2 . ", "target": 43.5}, "Joan has 2 .", "43.5"),  # mawps
    ({"Body": "I have 3", "Question": "How many?", "Answer": 3.0}, "I have 3. How many?", "3"),
    ({"problem": "p", "answer": "∅"}, "p", "∅"), ({"problem": "p", "answer": "<"}, "p", "<"),
    ({"problem": "p", "answer": ">"}, "p", ">"), ({"problem": "p", "answer": "-"}, "p", "-"),
])  # fmt: skip
def test_what_a_record_may_look_like_and_the_same_text_is_right(tmp_path, record, prompt, answer):
    lines, array = tmp_path / "lines.jsonl", tmp_path / "array.jsonl"
    lines.write_text(json.dumps(record))
    array.write_text(json.dumps([record], indent=1))
    (problem,), (same,) = rl.read_problems(str(lines)), rl.read_problems(str(array))
    assert problem[1:3] == (f"{prompt}\n", answer) and problem[1:] == same[1:]
    for right in (problem.solution, f"\\boxed{{{answer}}}", f"#### {answer}"):
        assert rl.is_right(problem, right)
    assert not rl.is_right(problem, f"#### 1{answer}") and not rl.is_right(problem, answer)


@pytest.mark.parametrize("said, content", [  # what is said of a third line
    (":3: not JSON (maximum recursion", "[" * 100_000), (":3: not a record", "7"),
    (":3: not JSON (Exceeds the limit (4300 digits)", '{"id": ' + "7" * 5000 + "}"),
    (':3: no text in "problem", "question" or "input"', '{"question": "  ", "answer": "1"}'),
    (':3: no answer in "answer"', '{"question": "q", "answer": "think\\n####"}'),
    (':3: "answer" is nan; allowed: finite numbers', '{"question": "q", "answer": NaN}'),
    (':3: "answer" is inf; ', '{"question": "q", "answer": 1e400}'), (": cannot be read", "\xff"),
], ids=itertools.count())  # fmt: skip
def test_a_malformed_line_is_named_and_blank_ones_are_skipped(tmp_path, said, content):
    path = tmp_path / "some.jsonl"
    path.write_text('{"question": "q", "answer": "1"}\n \n' + content, encoding="latin-1")
    with pytest.raises(ValueError, match=re.escape(f"{path}{said}")):
        rl.suites_of(str(path))


def score(cfg, *flags):
    args = evaluation.parse(["score", cfg.out, "--k", "2", "--problems", "2", *flags])
    return "\n".join(evaluation.score(args))


def test_known_sets_are_fetched_and_what_was_trained_on_is_not_scored(small, tmp_path, monkeypatch):
    for i, path in enumerate(rl.PUBLISHED.values()):
        sums(tmp_path / "github" / path, 60, 100 * i)
    (tmp_path / "github" / rl.PUBLISHED["aime25"]).unlink()
    monkeypatch.setattr(rl, "GITHUB", f"{tmp_path.as_uri()}/github/")
    data = tmp_path / "data"
    files = [f"{data}/{name}.jsonl" for name in ("gsm8k_train", "svamp", "mawps")]
    assert rl.suites_of("gsm8k,svamp,mawps", str(data)) == files
    with pytest.raises(ValueError, match=r"--task aime24: .* score RUN --suite aime24"):
        rl.suites_of("competition", str(data))
    with pytest.raises(ValueError, match=r"aime25.jsonl: not there, and not fetched .* by hand"):
        rl.suites_of("competition", str(data), scoring=True)
    cfg = small(task="svamp,add", data_dir=str(data), max_new_tokens=14, steps=2)
    train.main(cfg)
    header, records = evaluation.read_metrics(cfg.out)
    assert header["data"] == {files[1]: rl.digest(files[1])}
    assert {"eval/svamp", "eval/add"} < set(records[-1]) and "| svamp | 2 | " in score(cfg)
    others = score(cfg, "--suite", "gsm8k,mawps,mul,aime24", "--max_new_tokens", "8")
    for name in ("gsm8k_test", "mawps", "mul", "aime24"):
        assert f"| {name} | 2 | " in others
    other = tmp_path / "other.jsonl"
    other.write_text(sums(other, 4, 257).replace("What", "WHAT "))  # svamp has 200 to 259
    with pytest.raises(ValueError, match=r"other.jsonl: 3 of its problems are in .*svamp.jsonl"):
        score(cfg, "--suite", str(other))


def test_a_run_is_bound_to_its_data(small, tmp_path, capsys):
    path = tmp_path / "own.jsonl"
    text, cfg = sums(path, 60), small(task=str(path), max_new_tokens=14, steps=2)
    train.main(cfg)
    for changed in (text + text.splitlines()[0], text.replace("What", "Whut"), None):
        path.write_text(changed) if changed else path.unlink()
        forget()
        with pytest.raises(ValueError, match=f"{path}: [^\n]+$"):
            train.main(*train.command_line(["--resume", cfg.out]))
        with pytest.raises(ValueError, match=f"{path}: [^\n]+$"):
            score(cfg)
        evaluation.main(evaluation.parse(["sample", cfg.out, "1+1=", "--k", "1"]))
        assert "'1+1=' -> " in capsys.readouterr().out


def test_solutions_that_are_cut_off_are_counted_and_most_are_refused(tmp_path, small, capsys):
    path, other = tmp_path / "own.jsonl", tmp_path / "other.jsonl"
    longer = sums(other, 19, 30, "Add these numbers.").replace("What", "Tell me what", 1)
    path.write_text(sums(path, 30) + longer + sums(other, 1, 9, "Add both of these numbers."))
    train.main(small(task=str(path), max_new_tokens=12, steps=1))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "longest" in line]
    at, count = re.escape(str(path)), "20 of 50 solutions"
    assert re.search(f"prompt .*34 tokens .{at}:31., .*solution 33 .{at}:50.; {count}", line)
    with pytest.raises(ValueError, match=f"--max_new_tokens 11: must be 33 or more .*{at}"):
        train.main(small("few", task=str(path), max_new_tokens=11))


def test_a_base_is_shared_by_regimes_and_by_nothing_else(small, tmp_path, monkeypatch):
    def bases(working="Add.", **changes):
        forget()
        sums(tmp_path / "a.jsonl", 40, working=working)
        cfg = small(task=str(tmp_path / "a.jsonl"), pretrain_steps=1, **changes)
        train.pretrained(cfg, train.gpt.GPTConfig(257, 64, 1, 2, 16), torch.device("cpu"))
        return len(list((tmp_path / "base").iterdir()))

    assert bases() == bases(regime="detach", lr=1e-5) == bases(regime="off", algo="gspo") == 1
    assert bases(seed=1) == 2 and bases(careless=0.1) == 3 and bases(working="Sum.") == 4
    monkeypatch.setattr(train.gpt, "matmul_dtype", lambda device, channels: torch.bfloat16)
    assert bases() == 5


@pytest.mark.parametrize("text, answer", [
    ("#### 1\n#### 2 \nthanks", "2"), ("the answer is 7", None), ("####", None),
    ("so \\boxed{\\frac{1}{2}} and #### 3", "\\frac{1}{2}"),  # a box wins; braces match
    ("\\boxed{1} then \\boxed{2}", "2"), ("\\boxed{1} then \\boxed{2", "1"),  # cut off
    ("\\boxed{5}. One puts it in \\boxed{}, or \\boxed as here", "5"),  # which only mentions one
    ("so $\\boxed 5$", "5"), ("Answer\uff1a42", "42"), ("***Answer***: **$42$**.", "$42$"),
])  # fmt: skip
def test_extract_answer(text, answer):
    assert rl.extract_answer(text) == answer


def test_no_wrong_answer_is_accepted_and_numbers_are_equal_however_they_are_written():
    lines = (ROOT / "tests" / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    numbers, misjudged = 0, []
    for gold, answer, right, _ in map(json.loads, lines):
        equal, number = rl.answers_equal(gold, answer), rl.read_number(gold) is not None
        assert right or not equal, (gold, answer)
        numbers += number
        misjudged += [answer] if number and equal != right else []
    # right, but refused: its degrees are a superscript, no unit
    assert numbers >= 200 and misjudged == [r"\frac{270}{7}^\circ"]


@pytest.mark.parametrize("gold, same", (
    ("(3,4)", "$(3,4)$"), ("x+1", " x+1"), ("2/3", "-6/-9"), ("1/3", r"-\frac{-1}{3}"),
    ("-2/3", "2/-3"), ("-1/3", r"\frac{-1}{3}"), ("-1/3", r"\frac{1}{-3}"),
    ("1500", "1.5⋅10^3"), ("2602", "2\u202f602"), ("2602", "2\u00a0602"),
))  # fmt: skip
def test_equal_answers_and_their_neighbours(gold, same):
    assert rl.answers_equal(gold, same)
    for different in (f"-{gold}", f"{same}0", None):
        assert not rl.answers_equal(gold, different)


@pytest.mark.parametrize("text", [
    "9**9**9**9", "(" * 10_000, "1e999999999", "10^{999999999}", "9" * 1_000_000, "1e9999",
    "0." + "0" * 1_000_000 + "1", "9" * 499, "__import__('os').system('false')", "1," * 249,
    "\\frac" * 99, "{" * 20 + "\\frac" * 50, "10\u2075", "x\u2074", "\u2460", "\ufdfa" * 400,
    "\u00bd" * 400, "\u0663", "\\text{" * 80, "1 1/1 " * 80, "1" + " " * 497 + "/", "\x00" * 499,
    "\\boxed{" * 10_000, "^{" * 10 + "1" * 400, "\ud800", "**" * 240, "#" * 100_000,
    "answer" * 20_000, "Answer:" * 10_000, "$" * 499,
], ids=itertools.count())  # fmt: skip
def test_hostile_text_is_neither_accepted_nor_evaluated_in_50_ms(text):
    began = time.process_time()
    for gold in ("7", "\\frac{1}{2}", "(3,4]"):
        assert not rl.answers_equal(gold, text)
        for mark in ("\\boxed{", "#### "):
            assert not rl.answers_equal(gold, rl.extract_answer(mark + text))
    rl.answers_equal(text, text[:-1])
    assert time.process_time() - began < 0.05


@pytest.mark.skipif(not REAL, reason="NANOOCC_DATA names no folder with the real sets")
def test_the_real_sets_judge_themselves_and_share_nothing():
    for name, size in zip(rl.PUBLISHED, SIZES, strict=True):
        problems = rl.read_problems(f"{REAL}/{name}.jsonl")
        assert len(problems) == size and all(rl.is_right(p, p.solution) for p in problems)
    first, *others = (f"{REAL}/{name}.jsonl" for name in rl.PUBLISHED)
    rl.check_apart([first], others)
