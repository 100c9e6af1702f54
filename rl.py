"""Reinforcement learning with verifiable rewards: tokenizer, problems, verifier, rollout, advantages, policy losses.

    r_i = 1 if the answer of sample i equals the gold                  (plus DAPO's overlong penalty, if on)
    A_i = (r_i - mean of its group) / std of its group                 (GRPO; others in ALGOS)
    ratio_t = exp(logp_t - logp_old_t)
    J = sum_t w_t min(ratio_t A, clip(ratio_t, 1 - eps_low, 1 + eps_high) A)        the objective; losses are -J

The problems are six suites of arithmetic, a suite of word problems, and data sets in JSONL. In the six, all numbers are
written least significant digit first and at a fixed width, as one computes on paper, from the right (Lee et al. 2023,
arXiv 2307.03381): 47 + 85 = 132 is "74+58=####231". Each suite has one place where care is needed, the carry. A careful
solution never forgets it; a careless one forgets each carry with probability 1/2. A base model pretrained on both has
the skill but shows it half of the time; RL, which can hardly teach a new skill in minutes, brings it out.

Dimension key: B sequences · P prompts · G samples a prompt (B = P·G) · T positions · K MTP depth
"""

import contextlib
import functools
import hashlib
import http.client
import importlib.util
import itertools
import json
import math
import os
import random
import re
import sys
import unicodedata
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import tiktoken
import torch
import torch.nn.functional as F
from tqdm import tqdm

import mtp
import occ
from model import Samples, gather, generate, share, total, world

EOS = "<|endoftext|>"
ROUNDS = 4  # of dynamic sampling: with half of the groups informative, 1 in 16 is still missing after these


@functools.cache
def get_tokenizer(name):
    """A tiktoken.Encoding: "bytes" has a token a byte, "gpt2" is fetched at first use. ValueError else."""
    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
        return tiktoken.Encoding("bytes", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens={EOS: 256})
    if name == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except OSError as error:
            raise ValueError(
                "--tokenizer gpt2: its vocabulary could not be fetched; connect to a network once, or set "
                "TIKTOKEN_CACHE_DIR to a folder that has it"
            ) from error
    raise ValueError(f"tokenizer: {name!r} is unknown; allowed: bytes, gpt2")


# ----------------------------------------------------------------------------------------------------------------------
# Problems


class Problem(NamedTuple):
    suite: str  # a name in SUITES, or the path of a data set
    prompt: str
    answer: str  # the gold, as people write it
    solution: str = ""  # for pretraining: working and answer, as the suite writes them


def digit(x, i):
    return x // 10**i % 10


def write(x, n):
    """The n lowest digits of x, least significant first."""
    return "".join(str(digit(x, i)) for i in range(n))


def columns(column_sum, width, forget):
    """Column arithmetic: the digits of sum_i column_sum(i)·10^i, lowest first. A carry is lost when forget()."""
    digits, carry = "", 0
    for i in range(width):
        s = column_sum(i) + (carry if carry and not forget() else 0)
        digits += str(s % 10)
        carry = s // 10
    return digits


# A suite is two functions of the difficulty n. draw(rng, n) -> operands; solve(operands, n, forget) -> prompt, working,
# answer, where forget() is asked at every carry and says whether this one is lost.


def draw_pair(rng, n):
    return rng.randrange(10**n), rng.randrange(10**n)


def solve_add(operands, n, forget):
    a, b = operands
    return f"{write(a, n)}+{write(b, n)}=", "", columns(lambda i: digit(a, i) + digit(b, i), n + 1, forget)


def solve_sub(operands, n, forget):
    a, b = max(operands), min(operands)
    return f"{write(a, n)}-{write(b, n)}=", "", columns(lambda i: digit(a, i) - digit(b, i), n, forget)


def solve_mul(operands, n, forget):
    a, b = operands
    return f"{write(a, n)}*{b}=", "", columns(lambda i: digit(a, i) * b, n + 1, forget)


def solve_mod(operands, n, forget):
    """Horner's rule from the highest digit; the working is the remainder so far, which plays the carry."""
    a, m = operands
    r, remainders = 0, ""
    for i in reversed(range(n)):
        r = ((10 * r if r and not forget() else 0) + digit(a, i)) % m
        remainders += str(r)
    return f"{write(a, n)}%{m}=", remainders[:-1], remainders[-1]


def solve_chain(operands, n, forget):
    """Running sums of one-digit terms; the working is the sums before the last."""
    total, sums = operands[0], []
    for term in operands[1:]:
        sums.append(columns(lambda i: digit(total, i) + (term if i == 0 else 0), 2, forget))
        total = int(sums[-1][::-1])
    return "+".join(map(str, operands)) + "=", ",".join(sums[:-1]), sums[-1]


def solve_linear(operands, n, forget):
    """Solve a·x + b = c for the digit x; the working is c - b."""
    a, x, b = operands
    c = a * x + b
    difference = columns(lambda i: digit(c, i) - digit(b, i), n, forget)
    return f"{a}x+{write(b, n)}={write(c, n)}:", difference, str(int(difference[::-1]) // a % 10)


def draw_linear(rng, n):
    a, x = rng.randrange(2, 6), rng.randrange(1, 10)
    return a, x, rng.randrange(10**n - a * x)


PEOPLE = "Ana Ben Eva Ian Kim Leo Max Mia Sam Zoe".split()
THINGS = "beads books boxes cakes cards coins games pears rings shell stamp toys".split()
WORD_DIGITS = 4  # of the largest number in a story
EVENTS = {"+": "{a} gets {x} more.", "-": "{a} gives {x} to {b}.", "*": "Then {a} has {x} times as many."}


def draw_words(rng, n):
    a, b = rng.sample(PEOPLE, 2)
    thing, start, events = rng.choice(THINGS), rng.randrange(2, 100), []
    total = start
    for _ in range(n):
        sign = rng.choice("-" if total >= 1000 else "+*" if total == 1 else "+-*")
        x = {"+": rng.randrange(1, 100), "-": rng.randrange(1, max(min(total, 100), 2)), "*": rng.randrange(2, 6)}[sign]
        total = {"+": total + x, "-": total - x, "*": total * x}[sign]
        events.append((sign, x))
    return a, b, thing, start, *events


def solve_words(operands, n, forget):
    """A story of n events; the working is as in GSM8K, an annotated equation a line (Cobbe et al. 2021, arXiv
    2110.14168)."""
    a, b, thing, total, *events = operands
    story = " ".join(EVENTS[sign].format(a=a, b=b, x=x) for sign, x in events)
    prompt, working = f"{a} has {total} {thing}. {story} How many {thing} does {a} have?\n", ""
    for sign, x in events:
        column = {"+": lambda i: digit(total, i) + digit(x, i), "-": lambda i: digit(total, i) - digit(x, i),
                  "*": lambda i: digit(total, i) * x}[sign]  # fmt: skip
        result = int(columns(column, WORD_DIGITS, forget)[::-1])
        working += f"{total}{sign}{x}=<<{total}{sign}{x}={result}>>{result}\n"
        total = result
    return prompt, working, str(total)


def longest_words(n):
    events = [("*", 10**2 - 1)] * n
    prompt, _, _ = solve_words((PEOPLE[0], PEOPLE[1], max(THINGS, key=len), 99, *events), n, lambda: False)
    line = len("9999*99=<<9999*99=9999>>9999\n")
    return len(prompt), n * line + len("#### 9999")


class Suite(NamedTuple):
    draw: Callable
    solve: Callable
    n: Callable  # difficulty -> digits (terms - 1 for chain, events for words)
    commutes: bool = False  # problems with the same operands in another order are the same problem
    backwards: bool = True  # numbers are written lowest digit first
    longest: Callable | None = None  # n -> most characters of a prompt and of a solution; None: all are as long


SUITES = {
    "add": Suite(draw_pair, solve_add, lambda d: d, commutes=True),
    "sub": Suite(draw_pair, solve_sub, lambda d: d, commutes=True),
    "mul": Suite(lambda rng, n: (rng.randrange(10**n), rng.randrange(2, 7)), solve_mul, lambda d: d + 1),
    "mod": Suite(lambda rng, n: (rng.randrange(10**n), rng.randrange(3, 8)), solve_mod, lambda d: d + 1),
    "chain": Suite(
        lambda rng, n: tuple(rng.randrange(1, 10) for _ in range(n + 1)), solve_chain, lambda d: d, commutes=True
    ),
    "linear": Suite(draw_linear, solve_linear, lambda d: max(d, 2)),
    "words": Suite(draw_words, solve_words, lambda d: d, backwards=False, longest=longest_words),
}
ARITHMETIC = [name for name, suite in SUITES.items() if suite.backwards]


def is_held_out(suite, operands):
    """One problem in eight, decided by the problem itself: training and evaluation cannot share any, nor its twin."""
    return _one_in_eight(f"{suite} {sorted(operands) if SUITES[suite].commutes else list(operands)}")


def _one_in_eight(key):
    return hashlib.blake2b(key.encode(), digest_size=1).digest()[0] % 8 == 0


def draw_problem(suite, difficulty, rng, held_out=False, careless=0.0):
    """One random problem of the wanted side of the split; its `solution` is careless with that probability (a data set
    has but its own solutions)."""
    if suite not in SUITES:
        return rng.choice(side(suite, held_out))
    kind, n = SUITES[suite], SUITES[suite].n(difficulty)
    while True:
        operands = kind.draw(rng, n)
        if is_held_out(suite, operands) == held_out:
            break
    prompt, _, right = kind.solve(operands, n, lambda: False)
    forget = (lambda: rng.random() < 0.5) if rng.random() < careless else (lambda: False)
    _, working, written = kind.solve(operands, n, forget)
    if not kind.backwards:
        return Problem(suite, prompt, right, f"{working}#### {written}")
    return Problem(suite, prompt, str(int(right[::-1])), f"{working}####{written}")


def problem_stream(suites, difficulty, rng, **kwargs):
    """Training problems without end, of suites at random."""
    while True:
        yield draw_problem(rng.choice(suites), difficulty, rng, **kwargs)


def training_problems(cfg, seed):
    """problem_stream of what a config trains on."""
    return problem_stream(suites_of(cfg.task, cfg.data_dir), cfg.difficulty, random.Random(seed))


def held_out_problems(suite, difficulty, count, seed=0):
    """Up to count different held-out problems of a suite: fewer where the suite has no more at this difficulty."""
    rng, found = random.Random(f"{seed}/held out/{label(suite)}"), {}
    if suite not in SUITES:
        some = side(suite, held_out=True)
        return rng.sample(some, min(count, len(some)))
    for _ in range(100 * count):
        problem = draw_problem(suite, difficulty, rng, held_out=True)
        found.setdefault(problem.prompt, problem)
        if len(found) == count:
            break
    return list(found.values())


def longest(suites, difficulty, tok):
    """Tokens of the longest prompt and of the longest solution, and how many a response must have room for: a solution
    of a suite, the shortest of a data set. For suites these are characters, of which there are never fewer."""
    prompts, solutions, least = [], [], 0
    for suite in suites:
        kind = SUITES.get(suite)
        if kind and kind.longest:
            lengths = [kind.longest(kind.n(difficulty))]
        elif kind:
            problem = draw_problem(suite, difficulty, random.Random(0))
            lengths = [(len(problem.prompt), len(problem.solution))]
        else:
            lengths = token_lengths(suite, tok)
        prompts += [prompt for prompt, _ in lengths]
        solutions += [solution for _, solution in lengths]
        least = max(least, min(solution for _, solution in lengths))
    return max(prompts), max(solutions), least


# ----------------------------------------------------------------------------------------------------------------------
# Data sets: JSONL, a problem a line


class Published(NamedTuple):
    home: str  # owner/repository/HEAD/path below GITHUB
    sha256: str  # of what it says (see the function sha256)


GITHUB = "https://raw.githubusercontent.com/"
PUBLISHED = {
    "gsm8k_train": Published(
        "openai/grade-school-math/HEAD/grade_school_math/data/train.jsonl",
        "b614825d97818fb852875a0ee7fe28ee32fa666eed52be0fdf093a4f7a9f8efc",
    ),
    "gsm8k_test": Published(
        "openai/grade-school-math/HEAD/grade_school_math/data/test.jsonl",
        "af4debaff949dc3b6753fdfac09e7fafa01c6af36e26823dc594eb1a65830fc5",
    ),
    "svamp": Published(
        "arkilpatel/SVAMP/HEAD/SVAMP.json",
        "5dbb0cb06ced5249b21cd1660cc3e4fbef1ab9e0ad49947971d00fd9faf888b2",
    ),
    "math500": Published(
        "hkust-nlp/simpleRL-reason/HEAD/examples/simplelr_math_eval/data/math500/test.jsonl",
        "2e1a00cf085a4661bbd4700a4bd4b227dc039ae9b075eeb2c4f4879cb0c66900",
    ),
    "aime24": Published(
        "QwenLM/Qwen2.5-Math/HEAD/evaluation/data/aime24/test.jsonl",
        "ce968cb269e9a7d93e27859ddc90fd9581ec89292fb75774dd7dac497da55da0",
    ),
    "aime25": Published(
        "armenjeddi/mcd/HEAD/evaluation/data/aime25/test.jsonl",
        "d53999615c0f30df67e135ea92d598a19e202ac7694036ba130a5f7275268f71",
    ),
    "amc23": Published(
        "QwenLM/Qwen2.5-Math/HEAD/evaluation/data/amc23/test.jsonl",
        "3ae81c6e6d9bce3659c81bb8dc27ecf07d3b3945afaea526b218a27626ff230e",
    ),
    "minerva": Published(
        "QwenLM/Qwen2.5-Math/HEAD/evaluation/data/minerva_math/test.jsonl",
        "b3e8c41937690bff24c5254e26cc4c444ff2461756b57c304702ea4c62a23467",
    ),
    "olympiadbench": Published(
        "QwenLM/Qwen2.5-Math/HEAD/evaluation/data/olympiadbench/test.jsonl",
        "9b05df87d62db5a1ec7b28df2d833a2699efca736476f772d14c5bb6b67d3d45",
    ),
}
TRAIN = {"gsm8k": "gsm8k_train"}  # the sets with a part to train on
SCORE = {"gsm8k": "gsm8k_test"} | {name: name for name in PUBLISHED if not name.startswith("gsm8k")}
COMPETITION = "aime24 aime25 amc23 math500 minerva olympiadbench".split()  # the paper's


@functools.cache
def suites_of(task, data_dir="data", scoring=False):
    """Suites from a comma list: names in SUITES, known data sets (their path, fetched if need be), files *.jsonl.

    "arithmetic" is the six, "competition" the paper's sets. scoring: the parts that are there to be scored on, else
    those to train on. ValueError on anything else.
    """
    several = {"arithmetic": ARITHMETIC} | ({"competition": COMPETITION} if scoring else {})
    flag, known, found = "--suite" if scoring else "--task", SCORE if scoring else TRAIN, {}
    for name in itertools.chain.from_iterable(several.get(name, [name]) for name in task.split(",")):
        if name in SUITES:
            suite = name
        elif name in known:
            suite = data_file(known[name], data_dir)
        elif name.endswith(".jsonl"):
            suite = name
            read_problems(suite)
        elif name in SCORE:
            raise ValueError(
                f"{flag} {name}: a set to score on, not to train on: python eval.py score RUN --suite {name}"
            )
        else:
            allowed = ",".join([*SUITES, *known])
            raise ValueError(
                f"{flag}: unknown suite {name!r}; allowed: {', '.join(several)}, or some of {allowed},FILE.jsonl"
            )
        if suite not in SUITES and label(suite) in ("score", "all"):
            raise ValueError(
                f"{flag}: {suite}: {label(suite)} is the name of a mean in logs and tables; rename the file"
            )
        if found.setdefault(label(suite), suite) != suite:
            raise ValueError(f"{flag}: {found[label(suite)]} and {suite} would have one name, {label(suite)}")
    return list(found.values())


def label(suite):
    """The name of a suite in logs and tables."""
    return suite if suite in SUITES else Path(suite).stem


def data_file(name, data_dir):
    """Path of a published data set in data_dir. Where it is not there it is fetched: to a temporary file, checked, then
    renamed. ValueError, saying which file to put where, if that fails."""
    path, home, expected = Path(data_dir) / f"{name}.jsonl", GITHUB + PUBLISHED[name].home, PUBLISHED[name].sha256
    if path.exists():
        if sha256(read_problems(str(path))) != expected:
            print(f"note: {path} is not {name} as it was published", file=sys.stderr)
        return str(path)
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(home, timeout=30) as source, open(aside, "wb") as f:
            size = int(source.headers.get("Content-Length") or 0) or None
            with tqdm(total=size, desc=path.name, unit="B", unit_scale=True, disable=None) as bar:
                while block := source.read(2**16):
                    bar.update(f.write(block))
        if sha256(read_problems.__wrapped__(str(aside))) != expected:
            raise ValueError("what is there is not as it was published")
        os.replace(aside, path)
    except (OSError, ValueError, http.client.HTTPException) as error:
        what = str(error).replace(aside.name, "what is there")
        raise ValueError(f"{path}: not there, and not fetched ({what}); put it there by hand, from {home}") from None
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()
    return str(path)


def sha256(problems):
    """Of problems, answers and solutions as they were read, whatever else a file holds and however it is laid out."""
    lines = "".join(json.dumps([p.prompt, p.answer, p.solution]) + "\n" for p in problems)
    return hashlib.sha256(lines.encode()).hexdigest()


def check_unchanged(data):
    """ValueError if a data set is not what it was; data: {path: sha256 when a run began}."""
    for path, before in data.items():
        if sha256(read_problems(path)) != before:
            raise ValueError(f"{path}: its problems have changed since the run was trained on it")


def json_lines(path, lines):
    """What each line of a file says. ValueError names file:line."""
    for i, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except (ValueError, RecursionError):
            raise ValueError(f"{path}:{i}: not JSON: {line[:40]!r}") from None


@functools.cache
def read_problems(path):
    """The problems of a file: JSONL, or a JSON array. ValueError names file:line (or, of an array, file:item).

    A record has the text as `problem` or `question` (SVAMP: Body and Question) and the gold as `answer`, which may be a
    solution that ends in "#### gold", or `final_answer`, a list of one, or the box of `solution`.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    problems, is_array = [], text.lstrip().startswith("[")
    try:
        records = json.loads(text) if is_array else json_lines(path, text.removesuffix("\n").split("\n"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON array: {error}") from None
    for i, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise ValueError(f"{path}:{i}: not a record with a problem and an answer: {str(record)[:40]!r}")
        text, answer, solution = _text_of(record), _gold_of(record), record.get("solution")
        if not text:
            raise ValueError(f'{path}:{i}: no text in "problem" or "question"')
        if not answer:
            raise ValueError(f'{path}:{i}: no answer in "answer": a text, a number, or a solution with "#### N"')
        whole = record.get("answer")
        worked = whole if isinstance(whole, str) and "####" in whole else f"#### {answer}"
        if worked != whole and isinstance(solution, str):
            worked = solution.strip()
            if not answers_equal(answer, extract_answer(worked)):
                worked += f"\n\\boxed{{{answer}}}"
        problems.append(Problem(path, f"{text}\n", answer, worked))
    if not problems:
        raise ValueError(f"{path}: no problems in it")
    return problems


def _text_of(record):
    body, question = record.get("Body"), record.get("Question")
    text = record.get("problem") or record.get("question")
    if text is None and isinstance(body, str) and isinstance(question, str):  # SVAMP
        text = f"{body.strip().removesuffix('.')}. {question}"
    return text.strip() if isinstance(text, str) else ""


def _gold_of(record):
    answer = record.get("answer", record.get("Answer"))
    if answer is None and isinstance(record.get("final_answer"), list) and len(record["final_answer"]) == 1:
        answer = record["final_answer"][0]
    if answer is None and isinstance(record.get("solution"), str):
        answer = extract_answer(record["solution"])
    if isinstance(answer, float):
        answer = int(answer) if answer.is_integer() else answer if math.isfinite(answer) else None
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        answer = str(answer)
    return answer.rpartition("####")[2].strip() if isinstance(answer, str) else ""


def normal(text):
    """Letters, digits and signs of arithmetic of a text, in lower case: problems that agree in this are the same."""
    return "".join(c for c in text.casefold() if c.isalnum() or c in "+*/=^<>")


@functools.cache
def side(path, held_out):
    """One problem in eight of a file is held out, decided by its text: the same in any file. ValueError if none is."""
    problems = [p for p in read_problems(path) if _one_in_eight(normal(p.prompt)) == held_out]
    if not problems:
        raise ValueError(f"{path}: too few problems: none is {'held out' if held_out else 'left to train on'}")
    return problems


@functools.cache
def token_lengths(path, tok):
    """(tokens of the prompt, of the solution) of each problem."""
    problems = read_problems(path)
    both = [
        tok.encode_ordinary_batch(texts) for texts in ([p.prompt for p in problems], [p.solution for p in problems])
    ]
    return [(len(prompt), len(solution)) for prompt, solution in zip(*both)]


def check_apart(training, scored):
    """ValueError if a data set to be scored shares problems with one that was trained on."""
    for other in (suite for suite in training if suite not in SUITES):
        known = {normal(p.prompt) for p in read_problems(other)}
        for name in (suite for suite in scored if suite not in SUITES):
            shared = sum(normal(p.prompt) in known for p in read_problems(name))
            if shared:
                raise ValueError(f"--suite {name}: {shared} of its {len(read_problems(name))} problems are in {other}, "
                                 "which the run was trained on")  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Verifier


LONGEST = 500  # characters: a longer answer is none
DEEPEST = 20  # brackets within brackets, the same
_PLAIN = re.compile(r"-?\d{1,400}", re.ASCII)
_OPENED = re.compile(r"\s{0,9}\{")


def extract_answer(text):
    """What a completion gives as its answer: the last whole \\boxed{...}, else the line after the last "####", else
    after the last "Answer:" (in any case). None when there is none of them: never the whole text."""
    start = text.rfind("\\boxed")
    for _ in range(10):  # the last ones may be cut off
        if start < 0:
            break
        opened, depth = _OPENED.match(text, start + len("\\boxed")), 0
        for end in range(opened.end() - 1, min(len(text), start + LONGEST)) if opened else ():
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[opened.end() : end].strip() or None
        start = text.rfind("\\boxed", 0, start)
    _, found, tail = text.rpartition("####")
    if not found:
        ends = [m.end() for m in re.finditer(r"answer\*{0,2}:", text, re.IGNORECASE)]
        found, tail = bool(ends), text[ends[-1] :] if ends else ""
    line = tail.lstrip("* \t\r\n").partition("\n")[0]  # "**Answer:** 7"
    return line.strip("* \t\r") or None if found else None


_UNICODE = str.maketrans({
    "\u2212": "-", "\u2013": "-", "\u2010": "-", "\u2014": "-", "\u2044": "/", "\u200b": "", "\ufeff": "",
    "\u00a0": " ", "\u00d7": r"\times ", "\u00b7": r"\cdot ", "\u22c5": r"\cdot ",
    "\u03c0": r"\pi ", "\u221e": r"\infty ", "\u00b0": r"^\circ ", "\u221a": r"\sqrt ", "\u2264": r"\le ",
    "\u2265": r"\ge ", "\u222a": r"\cup ", "\u2208": r"\in ", "\u00b1": r"\pm ", "\u03b1": r"\alpha ",
    "\u00a2": r"\text{cents}", "\u2032": "'",
})  # fmt: skip
_RAISED = str.maketrans("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b", "0123456789-")
# While a text is rewritten, \x02 and \x03 stand around what was \text{...} and \x04 for dollars.
_REWRITES = [(re.compile(pattern), by) for pattern, by in (
    (r"[\x00-\x1f]", " "),
    (r"\\\\", r"\\newrow "),
    (r"\$\s*,\s*\$", ", "),  # "$1$,$2$": two answers
    (r"\\\$", "\x04"),  # dollars
    (r"\$|\\[()\[\]]", ""),  # of formulas
    (r"(?<=\d)(?:,\\!|\{,\}|\\[,;])\s*(?=\d{3}(?!\d))", ","),  # within thousands
    (r"\\[!,;: ]|\\q?quad(?![a-zA-Z])|(?<=\S)~|\{\}|\\displaystyle(?![a-zA-Z])", " "),
    (r"\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])", ""),
    (r"\\[dtc](?=(?:frac|binom)(?![a-zA-Z]))", r"\\"),
    (r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf|sf)|[mf]box|boxed|boldsymbol|operatorname)\s*\{([^{}]*)\}", "\x02\\1\x03"),
    (r"(?<![\d.,])\x02([^a-zA-Z\x02\x03]*)\x03", r"\1"),  # no words: a number in bold
    (r"\\big(cup|cap)", r"\\\1"),
    (r"(?<=[)\]])\s*U\s*(?=[(\[])", r"\\cup "),
    (r"(?<![a-zA-Z\\])inf(?:inity|ty)?(?![a-zA-Z])", r"\\infty "),
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))|\\degree(?![a-zA-Z])", "\x02degrees\x03"),
    (r"\(([^(),]*)\)(?=\x02degrees)", r"\1"),
    (r"\\%", "%"),
    (r"\\geq(?:slant)?(?![a-zA-Z])|>=", r"\\ge "),
    (r"\\leq(?:slant)?(?![a-zA-Z])|<=", r"\\le "),
    (r"\^\s*\{\s*\\prime\s*\}|'", r"^\\prime "),
    (r"\*\*", "^"),
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
    (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
    (r"\\frac\s*(\{[^{}]*\})\s*(\d)", r"\\frac\1{\2}"),
    (r"[.,]\s*$", ""),
)]  # fmt: skip
_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
_NUMBER = re.compile(rf"""\s*(?P<sign>[+-]?)\s*(?:
    (?:(?P<whole>\d+)\s*)?\\frac\s*\{{\s*(?P<top_sign>[+-]?)\s*(?P<top>{_DECIMAL})\s*\}}
                               \s*\{{\s*(?P<below_sign>[+-]?)\s*(?P<below>{_DECIMAL})\s*\}}
  | (?:(?P<plain_whole>\d+)\s+)?(?P<plain_top>{_DECIMAL})\s*/\s*(?P<plain_sign>[+-]?)(?P<plain_below>{_DECIMAL})
  | 10\s*\^\s*(?:(?P<power>[+-]?\d+)|\{{\s*(?P<power_>[+-]?\d+)\s*\}})
  | (?P<decimal>{_DECIMAL})(?:[eE](?P<e>[+-]?\d+)
      | \s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*(?:(?P<ten>[+-]?\d+)|\{{\s*(?P<ten_>[+-]?\d+)\s*\}}))?
  )\s*""", re.VERBOSE | re.ASCII)  # fmt: skip
_UNITS = {  # spellings -> one name; plurals in s are told apart by nothing else
    "in": "inch", "inches": "inch", "ft": "foot", "feet": "foot", "cm": "centimeter", "mm": "millimeter",
    "m": "meter", "km": "kilometer", "mi": "mile", "g": "gram", "kg": "kilogram", "deg": "degree", "hr": "hour",
    "min": "minute", "sec": "second", "s": "second",
}  # fmt: skip
_NO_UNITS = "hundred thousand million billion trillion dozen half".split()
_NO_UNITS += "is are was not or and if so no more less than wrong about".split()
_NAMES = "sqrt pi sin cos tan cot sec csc arcsin arccos arctan log ln exp infty".split()
_FUNCTIONS = set(_NAMES) - {"pi", "infty"}
_NAME = re.compile(  # x, x_1, f(x), (x, y)
    r"(?:[a-zA-Z]|\\[a-zA-Z]+)(?:_(?:\w|\{[^{}]*\}))?(?:\(\s*[a-zA-Z]\s*\))?"
    r"|\((?:\s*\\?[a-zA-Z]+\s*,)+\s*\\?[a-zA-Z]+\s*\)"
)
_TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|[a-zA-Z]+|\d+(?:\.\d*)?|\.\d+|\S", re.ASCII)


class Answer(NamedTuple):
    """An answer that was read. kind: number · words · list (any order) · tuple · union · matrix · named · text."""

    kind: str
    value: object  # Fraction · str · parts
    mark: str = ""  # unit of a number · brackets of a tuple · what is named · a text as it was written


def read_answer(text, units=False):
    """Text of an answer -> Answer. units: a number may carry any word as its unit, not only \\text{...}."""
    if not text.isascii():
        text = re.sub(f"[{''.join(map(chr, _RAISED))}]+", lambda m: f"^{{{m[0].translate(_RAISED)}}}", text)
        text = re.sub("(?<=[0-9])(?=[\u00bc-\u00be\u2150-\u215e])", " ", text)  # two and a half
        text = unicodedata.normalize("NFKC", text.translate(_UNICODE)).translate(_UNICODE)[:LONGEST]
    text = text.strip("*").lstrip().removeprefix("=")
    for pattern, by in _REWRITES:
        text = pattern.sub(by, text)
    return _read(text, units)


def _fits(text):
    """Whether the text is short and flat enough to be read."""
    if len(text) > LONGEST:
        return False
    depth = deepest = 0
    for c in text:
        depth += (c in "([{") - (c in ")]}")
        deepest = max(deepest, abs(depth))
    return deepest <= DEEPEST


def _read(s, units):
    s = s.strip()
    number = _read_number(s, units)
    if number:
        return number
    words = _unmarked(s).strip()
    if re.fullmatch(r"\(?[a-zA-Z](?:[a-zA-Z ]|\^\\prime )*\)?", words) and (
            s.startswith("\x02") or re.search("[a-zA-Z]{3}", words) and words not in _NAMES):  # fmt: skip
        words = " ".join(words.strip("() ").split())
        plain = s.startswith("\x02") and len(words) > 1 or re.search("[a-zA-Z]{4}", words)  # not a product of variables
        return Answer("words", words.casefold() if plain else words)
    unknown = re.match(r"([a-zA-Z])\s*\\in(?![a-zA-Z])\s*(?=[(\[\\])", s)
    if unknown:
        return Answer("named", _read(s[unknown.end() :], units), unknown[1])
    pieces = _split(s, r"\\cup(?![a-zA-Z])")
    if len(pieces) > 1:
        return Answer("union", [_read(piece, units) for piece in pieces])
    behind = {c[1:] for c in re.findall(",.", s)}  # commas with and without a space are two things: "1,000, 2,000"
    comma = r",\s" if " " in behind and len(behind) > 1 and "(" not in s else ","
    pieces = _split(s, comma + r"|;|\x02?\s*(?<![a-zA-Z])(?:and|or)(?![a-zA-Z])\s*\x03?")
    if len(pieces) > 1:
        return Answer("list", _spread(pieces, units))
    pieces = _split(s, r"\\pm(?![a-zA-Z])")
    if len(pieces) > 1:
        return Answer("list", [_read(sign.join(pieces), units) for sign in "+-"])
    matrix = re.fullmatch(r"\\begin\s*\{[bp]?matrix\}(.*)\\end\s*\{[bp]?matrix\}", s, re.DOTALL)
    if matrix:
        rows = [row.split("&") for row in matrix[1].split("\\newrow ") if row.strip()]
        return Answer("matrix", [Answer("tuple", [_read(cell, units) for cell in row]) for row in rows])
    inside = re.fullmatch(r"(\\\{|[(\[{])(.*?)(\\\}|[)\]}])", s, re.DOTALL)
    if inside and len(_split(s, r"(?<=[)\]}])(?=.)")) == 1:
        start, middle, end = inside.groups()
        pieces = _split(middle, ",")
        if start == r"\{" and end == r"\}":
            return Answer("list", _spread(pieces, units))
        if start + end == "{}":
            return _read(middle, units)
        if "{" not in start and "}" not in end:
            if len(pieces) > 1:
                return Answer("tuple", [_read(piece, units) for piece in pieces], start + end)
            if start + end == "()":
                return _read(middle, units)
    sides = _unmarked(s).split("=")
    if len(sides) == 2:
        for name, value in (sides, sides[::-1]):
            if _NAME.fullmatch(name.strip()):
                return Answer("named", _read(value, units), _canonical(name))
    return Answer("text", _canonical(s), s)


def _unmarked(s):
    """s without the signs around what was \\text{...}."""
    return s.replace("\x02", "").replace("\x03", "")


def _spread(pieces, units):
    """What the pieces of a list read as; those with ± are two."""
    parts = [_read(piece, units) for piece in pieces if piece.strip()]
    return [x for part in parts for x in (part.value if part.kind == "list" else [part])]


def _split(s, separator):
    """s cut at matches of the separator that are outside of all brackets."""
    depth, start, pieces, cuts = 0, 0, [], {m.start(): m.end() for m in re.finditer(separator, s)}
    for i, c in enumerate(s):
        if i in cuts and depth == 0 and i >= start:
            pieces.append(s[start:i])
            start = cuts[i]
        depth += (c in "([{") - (c in ")]}")
    return [*pieces, s[start:]]


def _read_number(s, units):
    dollars, s = "\x04" in s, s.replace("\x04", "", 1)
    match = _NUMBER.match(s)
    if not match:
        return None
    part = {name: text for name, text in match.groupdict().items() if text is not None}
    whole, below_sign = part.get("whole") or part.get("plain_whole"), part.get("below_sign") or part.get("plain_sign")
    top, below = part.get("top") or part.get("plain_top"), part.get("below") or part.get("plain_below")
    exponent = next((part[name] for name in ("power", "power_", "e", "ten", "ten_") if name in part), "0")
    if len(exponent) > 4 or whole and (part.get("top_sign") or below_sign):
        return None
    value = _decimal(top or part.get("decimal") or "1")
    if below:
        if not _decimal(below):
            return None
        value /= _decimal(below)
    value = (value + int(whole or 0)) * Fraction(10) ** int(exponent)
    minus = sum(part.get(name) == "-" for name in ("sign", "top_sign", "below_sign", "plain_sign"))
    unit = _unit(s[match.end() :].strip(), units)
    if unit is None or unit and dollars:
        return None
    if unit == "%":
        value /= 100
    return Answer("number", -value if minus % 2 else value, "dollar" if dollars else unit)


def _decimal(digits):
    return Fraction("0" + digits.replace(",", ""))


def _unit(s, plain):
    """The one name of a unit, "" for none, "%", or None if s is no unit: it is one in \\text{...}, and dollars, percent
    and (if plain) any other word are one without."""
    match = re.fullmatch(r"(?:\x02([a-zA-Z. /]*)(?:\^?(-?\d))?\x03|([a-zA-Z. ]*)|%)\s*(?:\^\s*\{?\s*(-?\d)\s*\}?)?", s)
    if not match:
        return None
    inside, words = match[1], (match[1] or match[3] or "").replace(".", "").casefold().split()
    if s == "%" or words in (["percent"], ["per", "cent"]):
        return "%"
    power = match[4] or match[2] or {"square": "2", "sq": "2", "cubic": "3"}.get(words[0] if words else "", "")
    words = [w.replace("metre", "meter") for w in words if w not in ("square", "sq", "cubic")]
    if not words:
        return None if power else ""
    if any(w in _NO_UNITS or len(w) < 3 and w not in _UNITS for w in words):
        return None
    names = [_UNITS.get(w, w.removesuffix("s") if len(w) > 2 else w) for w in words]
    if inside is None and not plain and names != ["dollar"]:
        return None
    return " ".join(names) + power


def _canonical(s):
    """A formula as one string, the same for what differs only in how it is written: spaces, braces, \\frac, dots."""
    s = _unmarked(s).replace("np.", "")
    if not _paired(s):
        return " ".join(_TOKEN.findall(s))
    tokens = []
    for t in _TOKEN.findall(s):
        if t[0].isalpha():
            tokens += ["\\" + t] if t in _NAMES else list(t)
        else:
            tokens.append(str(_decimal(t)) if re.match(r"\.?[0-9]", t) else t)
    out = _grouped(iter(tokens))
    times = (r"\times", r"\cdot", "*")
    number = lambda i: 0 <= i < len(out) and out[i][0].isdigit()
    sign = lambda i: i < len(out) and out[i] in "+-"
    kept = [
        ("*" if t in times else t)
        for i, t in enumerate(out)
        if t not in times or sign(i + 1) or number(i - 1) and number(i + 1)
    ]
    return " ".join(kept[1:] if kept[:1] == ["+"] else kept)


def _paired(s):
    """Whether every ( and { is closed by its like."""
    open_ = []
    for c in re.sub(r"\\[{}]", "", s):
        if c in "({":
            open_.append(c)
        elif c in ")}" and (not open_ or open_.pop() + c not in ("()", "{}")):
            return False
    return not open_


def _grouped(tokens):
    """Tokens up to the end of a group: groups in ( ), none around one token; \\frac{a}{b} as a / b."""
    out = []

    def group(t):
        inner = _grouped(tokens) if t in ("{", "(") else [t]
        argument = t == "(" and out[-1:] and len(out[-1]) == 1 and out[-1].isalpha()  # of f(2)
        return inner if len(inner) == 1 and not argument else ["(", *inner, ")"]

    for t in tokens:
        if t in ("}", ")"):
            break
        if t == r"\frac":
            top, below = group(next(tokens, "")), group(next(tokens, ""))
            inner = [*_bare(top, _PRODUCT), "/", *_bare(below, _POWER)]
            whole = out[-2:-1] == ["_"] or out and (out[-1] in ("/", "^", "_") or out[-1].lstrip("\\") in _FUNCTIONS)
            out += ["(", *inner, ")"] if whole else inner
        else:
            out += group(t)
    return [t for t in out if t]


_PART = r"(?:[^()\s]+|\( [^()]* \))"
_POWER = re.compile(rf"{_PART}(?: [\^_] {_PART})?|\\sqrt(?: \[ \S+ \])? {_PART}")
_PRODUCT = re.compile(r"(?:[^()+\-=\s]+|\( [^()]* \))(?: (?:[^()+\-=\s]+|\( [^()]* \)))*")


def _bare(group, shape):
    """A group without its brackets, if what they hold has the shape."""
    return group[1:-1] if group[:1] == ["("] and shape.fullmatch(" ".join(group[1:-1])) else group


def same(gold, candidate, algebra=False):
    """Whether two Answers are the same. A unit may be left out by either, but nobody takes cents for dollars, or N for
    N % unless the gold is in percent; a name too, where a list has not several."""
    if gold.kind == "named" or candidate.kind == "named":
        if gold.kind == candidate.kind and gold.mark != candidate.mark:
            return False
        return same(*(x.value if x.kind == "named" else x for x in (gold, candidate)), algebra)
    if gold.kind == "words" and candidate.kind == "text":
        return gold.value == candidate.value  # (C)
    if gold.kind != candidate.kind:
        return False
    if gold.kind == "number":
        values = [gold.value, 100 * gold.value] if gold.mark == "%" and not candidate.mark else [gold.value]
        return candidate.value in values and (
            candidate.mark in ("", gold.mark) or not gold.mark and candidate.mark != "cent"
        )
    if gold.kind in ("words", "text"):
        written_alike = gold.value == candidate.value
        return written_alike or algebra and gold.kind == "text" and equal_by_algebra(gold, candidate)
    if len(gold.value) != len(candidate.value) or gold.mark != candidate.mark:
        return False
    if gold.kind in ("tuple", "matrix"):
        return all(same(a, b, algebra) for a, b in zip(gold.value, candidate.value))
    left = list(candidate.value)  # in any order
    names = len({part.mark for part in gold.value if part.kind == "named"}) > 1
    for part in gold.value:
        match = next(
            (i for i, x in enumerate(left) if same(part, x, algebra) and (part.kind == x.kind or not names)), None
        )
        if match is None:
            return False
        left.pop(match)
    return True


def _has(answer, test):
    parts = answer.value if isinstance(answer.value, list) else [answer.value] if answer.kind == "named" else []
    return test(answer) or any(_has(part, test) for part in parts)


_AS_WRITTEN = re.compile(r"- \\infty|\d+ _ \d+|\S+")  # one symbol, or a number in a base


def is_symbolic(gold):
    """Whether only algebra can judge all ways to write this answer: it has variables, roots, functions."""
    return not _fits(gold) or _has(read_answer(gold), lambda x: x.kind == "text" and not _AS_WRITTEN.fullmatch(x.value))


def answers_equal(gold, candidate):
    """Whether two answers are the same: numbers exactly, the parts of lists in any order and of tuples in theirs, open
    ends of intervals apart from closed ones, formulas as written (`_canonical`), or, where math-verify is installed, by
    algebra if the gold needs that. None is no answer. Never raises, and never evaluates text."""
    if gold is None or candidate is None or not candidate.strip():
        return False
    if _PLAIN.fullmatch(gold) and _PLAIN.fullmatch(candidate):
        return int(gold) == int(candidate)
    if gold.strip() == candidate.strip():
        return True
    if not _fits(gold) or not _fits(candidate):
        return False
    wanted = read_answer(gold)
    given = read_answer(candidate, units=_has(wanted, lambda x: x.kind == "number" and x.mark != ""))
    one = lambda x: x.value[0] if x.kind == "list" and len(x.value) == 1 else x  # {5} is 5
    return same(one(wanted), one(given), algebra=has_algebra())


_TAME = re.compile(r"(?:(?!__|\d{5})[\w\s+\-*/^{}()\[\]\\.,|<>])*", re.ASCII)


@functools.cache
def has_algebra():
    """Whether math-verify is installed."""
    return importlib.util.find_spec("math_verify") is not None


def equal_by_algebra(gold, candidate):
    """What math-verify (an optional package) says of two Answers that are formulas. It computes with what it reads, up
    to a second: text with code, long numbers, factorials, equations or powers of powers is not shown to it."""
    text = candidate.mark
    if _AS_WRITTEN.fullmatch(gold.value) or len(text) > 200 or not _TAME.fullmatch(text):
        return False
    towers = len(re.findall(r"[\d)}]\s*\^", text)) > 1 or re.search(r"\^\s*\{?[^}]{0,9}\d\d\d", text)
    letters = [{t for t in x.value.split() if len(t) == 1 and t.isalpha()} for x in (gold, candidate)]  # m is not M
    if towers or letters[0] != letters[1]:
        return False
    import math_verify

    try:
        read = [math_verify.parse(f"${x}$", parsing_timeout=1) for x in (gold.mark, text)]
        return bool(math_verify.verify(*read, timeout_seconds=1))
    except Exception:  # whatever it meets in a text that it cannot read
        return False


def is_right(problem, text):
    """Whether a completion answers the problem. Some suites answer lowest digit first."""
    answer = extract_answer(text)
    if problem.suite in ARITHMETIC and answer is not None:
        answer = answer[::-1]
    return answers_equal(problem.answer, answer)


# ----------------------------------------------------------------------------------------------------------------------
# Rollout


def completions(tok, samples):
    """The sampled tokens of each row as text, without the end of sequence. A model may have more rows of vocabulary
    than the tokenizer has tokens (padding, for speed): those read as U+FFFD, which no right answer contains."""
    unknown = tok.encode_single_token(b"\xff")
    rows = zip(samples.tokens_BT.tolist(), samples.mask_BT.tolist())
    kept = [[t if t < tok.n_vocab else unknown for t, m in zip(*row) if m and t != tok.eot_token] for row in rows]
    return [tok.decode(row) for row in kept]


def join(parts):
    """Samples of several batches as one."""
    if len(parts) == 1:
        return parts[0]
    T = max(part.tokens_BT.size(1) for part in parts)
    wide = [part.map(lambda x: F.pad(x, (0, 0) * (x.ndim - 2) + (0, T - x.size(1)))) for part in parts]
    return Samples(*(None if field[0] is None else torch.cat(field) for field in zip(*wide)))


def rollout(model, tok, problems, num_generations, max_new_tokens, temperature=1.0, generator=None, keep_hidden=False,
            spec=None):  # fmt: skip
    """Samples (B = P·G rows), their texts, and reward_PG: 1.0 where the answer is right.

    keep_hidden: keep hidden states for `minibatches`, but under autocast, where those of training are not the same.
    spec: an mtp.Speculator, to sample by. Of several processes each samples for its share of the problems, and all of
    them get everything.
    """
    G, device, mine = num_generations, model.wte.weight.device, share(len(problems))
    keep_hidden = keep_hidden and not torch.is_autocast_enabled(device.type)
    sample = spec.generate if spec else generate
    numbers = (3,) if spec else ()  # of all problems: a sample is whoever's it is
    u_BR = torch.rand(len(problems) * G, max_new_tokens, *numbers, generator=generator)
    prompts, part = [tok.encode_ordinary(p.prompt) for p in problems[mine]], None
    if prompts:
        u_BR = u_BR[mine.start * G : mine.stop * G]
        samples = sample(model, prompts, G, max_new_tokens, tok.eot_token, temperature, u_BR, keep_hidden)
        texts = completions(tok, samples)
        asked = [p for p in problems[mine] for _ in range(G)]
        right = [float(is_right(problem, text)) for problem, text in zip(asked, texts)]
        if world()[1] > 1:
            samples = samples.map(torch.Tensor.cpu)
        part = samples, texts, right
    samples, texts, right = zip(*(part for part in gather(part) if part))
    samples = join(samples).map(lambda x: x.to(device))
    return samples, sum(texts, []), torch.tensor(sum(right, [])).view(len(problems), G)


def overlong_penalty(length_B, max_new_tokens):
    """DAPO's soft penalty (arXiv 2503.14476 §3.4): 0, falling to -1 over the last fifth of the allowed length."""
    buffer = max_new_tokens / 5
    return ((max_new_tokens - buffer - length_B) / buffer).clamp(-1, 0)


def informative(reward_PG):
    """(P,) True where the samples of a prompt differ in reward. The others have zero advantage, hence no gradient."""
    return reward_PG.amax(1) > reward_PG.amin(1)


def collect(model, tok, problems, algo, cfg, generator, spec=None):
    """The rollout of one step. With dynamic sampling (DAPO §3.2), prompts without a gradient are replaced by new ones
    from the iterator `problems`, at most ROUNDS times over; what is missing then stays missing.

    Returns Samples of the prompts kept, their reward_PG, metrics over all prompts sampled, and examples to read.
    """
    G, R = cfg.num_generations, cfg.max_new_tokens
    rounds, missing = [], cfg.prompts_per_step
    while missing and len(rounds) < (ROUNDS if algo.dynamic_sampling else 1):
        drawn = list(itertools.islice(problems, missing))
        samples, texts, reward_PG = rollout(model, tok, drawn, G, R, cfg.temperature, generator, True, spec)
        length_B, flat_P = samples.mask_BT.sum(1).cpu(), ~informative(reward_PG)
        if algo.overlong:
            reward_PG = reward_PG + overlong_penalty(length_B, R).view_as(reward_PG)
        keep_P = ~flat_P if algo.dynamic_sampling else torch.ones_like(flat_P)
        rounds.append((samples, reward_PG, keep_P, flat_P, length_B, drawn, texts))
        missing -= int(keep_P.sum())
    samples, rewards, keeps, flats, lengths, drawn, texts = zip(*rounds)
    keep_B = torch.cat(keeps).repeat_interleave(G).to(samples[0].tokens_BT.device)
    kept = join(samples).map(lambda x: x[keep_B])
    length_B, logp = torch.cat(lengths).float(), sum(part.logp_BT.sum() for part in samples)
    metrics = {
        "reward/mean": torch.cat(rewards).mean().item(),
        "reward/frac_zero_std": torch.cat(flats).float().mean().item(),
        "response_length/mean": length_B.mean().item(),
        "response_length/clip_ratio": (length_B == R).float().mean().item(),
        "response_length/sum": int(length_B.sum()),
        "actor/entropy": -logp.item() / length_B.sum().item(),  # the mean of -log p over tokens sampled from p
    }
    metrics |= spec.metrics(total) if spec else {}
    examples = [(p.prompt, t, r) for p, t, r in zip(drawn[0], texts[0][::G], rewards[0][:, 0].tolist())]
    return kept, torch.cat(rewards)[torch.cat(keeps)], metrics, examples[:8]


# ----------------------------------------------------------------------------------------------------------------------
# Advantages and losses


@dataclass(frozen=True)
class Algo:
    """What tells one policy-gradient method from another."""

    # group_std: (r - mean)/std of the group · group: r - mean · loo: r - mean of the others · batch: r - mean of all
    advantage: str = "group_std"
    # token: all tokens alike · sequence: mean a sequence first · constant: sum / (B·max_new_tokens)
    loss_agg: str = "token"
    ratio: str = "token"  # token · sequence: geometric mean over the sequence · none: plain -A log p
    clip_eps_low: float = 0.2
    clip_eps_high: float = 0.2
    dual_clip: float = 10.0  # with A < 0 the objective is never below dual_clip·A (Ye et al. 2019, arXiv 1912.09729)
    kl_coef: float = 0.0  # weight of the k3 estimate of KL(policy, frozen base)
    dynamic_sampling: bool = False  # draw new prompts in the place of groups whose samples all have the same reward
    overlong: bool = False  # punish responses that come near max_new_tokens


ALGOS = {
    "reinforce": Algo(advantage="batch", ratio="none"),  # Williams 1992
    "grpo": Algo(loss_agg="sequence", kl_coef=0.04),  # arXiv 2402.03300
    "drgrpo": Algo(advantage="group", loss_agg="constant"),  # arXiv 2503.20783
    "dapo": Algo(clip_eps_high=0.28, dynamic_sampling=True, overlong=True),  # arXiv 2503.14476
    "gspo": Algo(loss_agg="sequence", ratio="sequence", clip_eps_low=3e-4, clip_eps_high=4e-4),  # arXiv 2507.18071
}


def advantages(reward_PG, kind):
    """(P, G) rewards -> (P, G) advantages; see Algo.advantage.

    Groups of equal rewards get exactly 0 from all kinds but "batch", whose baseline is not theirs.
    """
    G = reward_PG.size(1)
    if kind == "batch":
        return reward_PG - reward_PG.mean()
    adv_PG = reward_PG - reward_PG.mean(1, keepdim=True)
    if kind == "group_std":
        adv_PG = adv_PG / ((adv_PG.square().sum(1, keepdim=True) / (G - 1)).sqrt() + 1e-6)
    elif kind == "loo":
        adv_PG = adv_PG * G / (G - 1)  # r - (sum - r)/(G - 1)
    # The mean of equal floats need not be that float: test the rewards, not their spread.
    return torch.where(informative(reward_PG)[:, None], adv_PG, 0.0)


def token_weights(mask_BT, loss_agg, max_new_tokens):
    """How much each token counts: (B, T-1), zero off the mask. loss = (token_weights * loss_BT).sum().

    Made once for the whole minibatch, so that cutting it into micro-batches, or padding it, changes nothing.
    """
    m = mask_BT.float()
    if loss_agg == "token":
        return m / m.sum().clamp(min=1)
    if loss_agg == "sequence":
        return m / m.sum(1, keepdim=True).clamp(min=1) / len(m)
    return m / (len(m) * max_new_tokens)


def policy_loss(logp_BT, logp_old_BT, adv_B, mask_BT, weight_BT, algo, count=None):
    """The clipped policy-gradient loss, and what happened to the ratio: for the trunk and, alike, for an MTP head.

    All (B, T-1) but adv_B. Returns loss (a scalar, -J) and clip_frac_low, clip_frac_high, ratio_max of masked tokens.
    count: tokens of the whole minibatch, where this is a part of it; loss and fractions are then shares of the whole's.
    """
    adv_BT = adv_B[:, None]
    log_ratio_BT = torch.where(mask_BT, logp_BT - logp_old_BT, 0.0)
    if algo.ratio == "sequence":  # GSPO: exp of the mean, the same for every token of the sequence
        log_ratio_BT = log_ratio_BT.sum(1, keepdim=True) / mask_BT.sum(1, keepdim=True).clamp(min=1) * mask_BT
    ratio_BT = log_ratio_BT.clamp(-20, 20).exp()  # a finite ratio, so that a branch not taken has no NaN gradient
    if algo.ratio == "none":
        surrogate_BT = adv_BT * logp_BT
        low_BT = high_BT = torch.zeros_like(mask_BT)
    else:
        clipped_BT = ratio_BT.clamp(1 - algo.clip_eps_low, 1 + algo.clip_eps_high)
        surrogate_BT = torch.minimum(ratio_BT * adv_BT, clipped_BT * adv_BT)
        surrogate_BT = torch.where(adv_BT < 0, torch.maximum(surrogate_BT, algo.dual_clip * adv_BT), surrogate_BT)
        low_BT = mask_BT & (ratio_BT < 1 - algo.clip_eps_low) & (adv_BT < 0)
        high_BT = mask_BT & (ratio_BT > 1 + algo.clip_eps_high) & (adv_BT > 0)
    loss = -(weight_BT * surrogate_BT).sum()
    n = (mask_BT.sum() if count is None else count).clamp(min=1)
    stats = {"clip_frac_low": low_BT.sum() / n, "clip_frac_high": high_BT.sum() / n}
    return loss, stats | {"ratio_max": largest(ratio_BT.detach() * mask_BT)}


def largest(x):
    """The largest element of x ≥ 0; 0 of none."""
    return F.pad(x.flatten(), (0, 1)).max()


def k3_kl(logp_BT, logp_ref_BT, weight_BT):
    """KL(policy, reference) on the policy's own samples, estimated by r - 1 - log r ≥ 0, r = p_ref/p (Schulman)."""
    log_r = (logp_ref_BT - logp_BT).clamp(-20, 20)
    return (weight_BT * (log_r.exp() - 1 - log_r)).sum()


# ----------------------------------------------------------------------------------------------------------------------
# The minibatch of an update


class Minibatch(NamedTuple):
    """What one update sees, or this process's share of it: losses of the shares add up to those of the whole.

    (B, T-1) arrays follow the shift convention of mtp.py: column t speaks of token t+1.
    """

    tokens_BT: torch.Tensor
    mask_BT: torch.Tensor
    adv_B: torch.Tensor
    logp_sampled_BT: torch.Tensor  # as the sampler saw it
    logp_old_BT: torch.Tensor
    logp_ref_BT: torch.Tensor  # of the frozen base; zeros without KL
    logp_old_KBT: torch.Tensor  # of each head, aligned
    weight_BT: torch.Tensor  # what each token counts in loss_rl
    weight_KBT: torch.Tensor  # and in the policy loss of each head
    counts: torch.Tensor  # (1+K,) tokens of the whole that the trunk and each head score
    half: int  # rows in the first of two halves of whole groups; 0 if there is but one group
    half_share: float  # of the whole minibatch, that this half is

    def rows(self, index):
        """The same for some of the sequences. Weights stay those of the whole."""
        axes = {"_B": index, "_BT": index, "_KBT": (slice(None), index)}
        cut = {n: x[axes["_" + n.split("_")[-1]]] for n, x in self._asdict().items() if n.endswith(tuple(axes))}
        return self._replace(**cut)

    def halves(self):
        return [self.rows(slice(0, self.half)), self.rows(slice(self.half, None))] if self.half_share else [self]


@torch.no_grad()
def minibatches(model, heads, samples, adv_B, algo, cfg, reference=None):
    """A rollout cut into updates_per_rollout minibatches, whole groups in each (fewer if there are fewer groups).

    Old log-probs of the trunk are the sampler's, and the heads are run on the hidden states that it kept. Where it kept
    none, because bfloat16 makes sampling and training differ, one forward pass gives both.
    Returns the minibatches, of each the rows that are this process's share, and the metrics mtp/logp_impl and
    mtp/agreement_k, the share of tokens that a speculative sampler drafting from head k would have accepted: the mean
    of min(1, q/p), whose expectation over tokens from p is sum_v min(p_v, q_v).
    """
    G, K, parts = cfg.num_generations, len(heads.heads) if heads else 0, []
    accepted_K, scored_K = torch.zeros(2, K, device=adv_B.device)
    P = len(adv_B) // G
    for groups in torch.arange(P).tensor_split(min(cfg.updates_per_rollout, P)) if P else ():
        first, n, half = int(groups[0]) * G, len(groups) * G, len(groups) // 2 * G
        a, b = share(half), share(n - half)  # every process has a part of both halves
        mine = torch.cat((torch.arange(a.start, a.stop), torch.arange(half + b.start, half + b.stop)))
        rows = first + mine
        whole_BT = samples.mask_BT[first : first + n, 1:]
        T = 2 + int((whole_BT * torch.arange(whole_BT.size(1), device=whole_BT.device)).max())  # the longest ends here
        masks = [mask[:, : T - 1] for mask in (whole_BT, *mtp.aligned_masks(whole_BT, K))]
        weights = [token_weights(m, algo.loss_agg, cfg.max_new_tokens)[mine] for m in masks]
        counts = torch.stack([m.sum() for m in masks])
        tokens_BT, mask_BT, logp_sampled_BT = samples.tokens_BT[rows, :T], masks[0][mine], samples.logp_BT[rows, 1:T]
        h_BTC = None if samples.h_BTC is None else samples.h_BTC[rows, :T]
        logp_BT, logp_KBT, mask_KBT, _ = mtp.logprobs(
            model, heads, tokens_BT, mask_BT, cfg.temperature, cfg.logp_impl, h_BTC=h_BTC
        )
        logp_old_BT = logp_BT if h_BTC is None else logp_sampled_BT
        logp_ref_BT = torch.zeros_like(logp_BT)
        if reference:
            logp_ref_BT = mtp.logprobs(reference, None, tokens_BT, mask_BT, cfg.temperature, cfg.logp_impl)[0]
        accepted_K += ((logp_KBT - logp_old_BT).exp().clamp(max=1) * mask_KBT).sum((1, 2))
        scored_K += counts[1:]
        weight_KBT = torch.stack(weights[1:]) if K else logp_KBT  # without heads, both are empty
        parts.append(Minibatch(tokens_BT, mask_BT, adv_B[rows], logp_sampled_BT, logp_old_BT, logp_ref_BT, logp_KBT,
                               weights[0], weight_KBT, counts, a.stop - a.start, half / n))  # fmt: skip
    if not parts:
        return [], {}
    shares = total(accepted_K) / scored_K.clamp(min=1)
    metrics = {f"mtp/agreement_{k}": value for k, value in enumerate(shares.tolist(), 1)}
    most = int(parts[0].counts.sum()) // world()[1]  # tokens of an update's call, or about so many
    metrics["mtp/logp_impl"] = mtp.pick_impl(cfg.logp_impl, most, model.cfg.vocab_size, adv_B.device)
    return parts, metrics


class Losses(NamedTuple):
    rl: torch.Tensor
    mtp: torch.Tensor  # of the heads, its gradient for the trunk; mean over depths
    heads: torch.Tensor | None  # what the heads learn, where cfg.mtp_learn makes that another loss
    delta_rl_N: torch.Tensor  # change of log-prob since the rollout, on the tokens that some head scores
    delta_mtp_N: torch.Tensor  # the same of the heads, mean over the depths that score the token
    h_BTC: torch.Tensor
    stats: dict  # of this share: to be summed over processes; of some the largest counts (is_maximum)


def is_maximum(name):
    """Whether a statistic is the largest of something, so that of several values the largest counts."""
    return "ratio_max" in name or "logp_gap" in name


def losses(model, heads, mb, algo, objective, cfg, on_policy, lam, watch=None):
    """Forward pass of a minibatch.

    objective: of the heads, as far as the trunk is concerned, "ce" or "policy". lam: what the backward will let through
    the doors of the trunk (occ.scale_grad); watch stands behind the doors (occ.hidden_watch).
    on_policy: nothing has been updated since the rollout, so old log-probs are those of this very pass; the ratio is
    exactly 1 and δ exactly 0, not rounding noise for OCC to divide.
    """
    door = functools.partial(occ.scale_grad, lam=lam)
    logp_BT, logp_KBT, mask_KBT, h_BTC = mtp.logprobs(
        model, heads, mb.tokens_BT, mb.mask_BT, cfg.temperature, cfg.logp_impl, door, watch
    )
    old_BT, old_KBT = (logp_BT.detach(), logp_KBT.detach()) if on_policy else (mb.logp_old_BT, mb.logp_old_KBT)
    if cfg.mtp_base == "main":
        old_KBT = old_BT.expand_as(logp_KBT)

    loss_rl, seen = policy_loss(logp_BT, old_BT, mb.adv_B, mb.mask_BT, mb.weight_BT, algo, mb.counts[0])
    if algo.kl_coef:
        seen["kl"] = k3_kl(logp_BT, mb.logp_ref_BT, mb.weight_BT)
        loss_rl = loss_rl + algo.kl_coef * seen["kl"]
    stats = {f"actor/{name}": value for name, value in seen.items()} | {"actor/loss": loss_rl}
    if on_policy:
        stats["rollout/logp_gap"] = largest((logp_BT - mb.logp_sampled_BT).abs() * mb.mask_BT)

    learn = cfg.mtp_learn or objective
    by_depth = {"policy": [], "ce": []}
    for k in range(len(logp_KBT)):
        count = mb.counts[1 + k].clamp(min=1)
        loss_k, seen = policy_loss(logp_KBT[k], old_KBT[k], mb.adv_B, mask_KBT[k], mb.weight_KBT[k], algo, count)
        by_depth["policy"].append(loss_k)
        by_depth["ce"].append(-(logp_KBT[k] * mask_KBT[k]).sum() / count)
        stats |= {f"mtp/loss_{k + 1}": by_depth[learn][-1], f"mtp/ratio_max_{k + 1}": seen["ratio_max"],
                  f"mtp/clip_frac_{k + 1}": seen["clip_frac_low"] + seen["clip_frac_high"]}  # fmt: skip
    mean = {kind: sum(losses) / max(len(losses), 1) for kind, losses in by_depth.items()}
    loss_mtp, loss_heads = mean[objective or "ce"], mean[learn] if learn != objective else None

    depths_BT = mask_KBT.sum(0)
    scored_BT = depths_BT > 0
    delta_mtp_BT = ((logp_KBT - old_KBT) * mask_KBT).sum(0) / depths_BT.clamp(min=1)
    deltas = ((logp_BT - old_BT)[scored_BT].detach(), delta_mtp_BT[scored_BT].detach())
    return Losses(
        loss_rl, loss_mtp, loss_heads, *deltas, h_BTC, {name: value.detach() for name, value in stats.items()}
    )
