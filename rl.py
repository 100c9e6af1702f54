"""Reinforcement learning with verifiable rewards: tokenizer, problems, verifier, rollout, advantages, losses.

    r_i = 1 if the answer of sample i equals the gold                (plus DAPO's overlong penalty, if on)
    A_i = (r_i - mean of its group) / std of its group               (GRPO; others in ALGOS)
    ratio_t = exp(logp_t - old_t)
    loss = -sum_t weight_t min(ratio_t A, clip(ratio_t, 1 - eps_low, 1 + eps_high) A)

The problems are six suites of arithmetic and data sets in JSONL. In the suites, all numbers are written least
significant digit first and at a fixed width, as one computes on paper, from the right (Lee et al. 2023, arXiv
2307.03381): 58 + 67 = 125 is "85+76=####521". Each suite has one place where care is needed, the carry. A careful
solution never forgets it; a careless one forgets each carry with probability 1/2. A base model pretrained on both has
the skill but shows it half of the time; RL, which can hardly teach a new skill in minutes, brings it out.

A batch is a dict of tensors whose first axis is the sequence, so that {k: x[rows] for k, x in batch.items()} is some of
its sequences.

Dimension key: B sequences · P prompts · G samples a prompt (B = P·G) · T positions · K MTP depth · R new tokens

Left out: a verifier for formulas. `answers_equal` knows numbers and equal text; eval.py score can ask math-verify.
"""

import functools
import hashlib
import itertools
import json
import math
import operator
import os
import random
import re
import unicodedata
import urllib.request
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F

import mtp
import occ
from model import autocast, gather, generate, share, total

EOS = "<|endoftext|>"
ROUNDS = 4  # of dynamic sampling: with half of the groups informative, 1 in 16 is still missing after these
GPT2_HELP = (
    "its files could not be fetched; connect to a network once, or set TIKTOKEN_CACHE_DIR to a folder that has these "
    "files of https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/ under the names that tiktoken looks for: "
    "vocab.bpe as 6d1cbeee0f20b3d9449abfede4726ed8212e3aee and "
    "encoder.json as 6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"
)


@functools.cache
def get_tokenizer(name):
    """A tiktoken.Encoding: "bytes" has a token a byte, "gpt2" is fetched at first use. ValueError else."""
    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
        pieces = {"pat_str": r"[\s\S]", "mergeable_ranks": ranks, "special_tokens": {EOS: 256}}
        return tiktoken.Encoding(name, **pieces)
    if name != "gpt2":
        raise ValueError(f"--tokenizer {name}: unknown; allowed: bytes, gpt2")
    try:
        return tiktoken.get_encoding("gpt2")
    except OSError as error:
        raise ValueError(f"--tokenizer gpt2: {GPT2_HELP}") from error


# ----------------------------------------------------------------------------------------------------------------------
# Problems that are made up as needed


class Problem(NamedTuple):
    suite: str  # a name in SUITES, or the path of a data set
    prompt: str
    answer: str  # the gold, as people write it
    solution: str = ""  # for pretraining: working and answer


def write(x, n):
    """x in n digits, the lowest first."""
    return f"{x:0{n}}"[::-1]


def kept(carry, slips):
    """The carry, or 0 where it is forgotten. slips: None in careful work, else the random.Random that tosses a coin."""
    forgotten = carry and slips and slips.random() < 0.5
    return 0 if forgotten else carry


def columns(operation, a, b, n, slips):
    """The n lowest digits of a and b, column by column: what the operation makes of two digits, and the carry."""
    written, carry = "", 0
    for i, j in zip(write(a, n), write(b, n)):
        s = operation(int(i), int(j)) + kept(carry, slips)
        written += str(s % 10)
        carry = s // 10
    return written


# A suite draws the operands of size n and solves them: solve(operands, n, slips) -> prompt, working, answer.


def draw_two(rng, n):
    return rng.randrange(10**n), rng.randrange(10**n)


def solve_add(operands, n, slips):
    a, b = operands
    return f"{write(a, n)}+{write(b, n)}=", "", columns(operator.add, a, b, n + 1, slips)


def solve_sub(operands, n, slips):
    a, b = max(operands), min(operands)
    return f"{write(a, n)}-{write(b, n)}=", "", columns(operator.sub, a, b, n, slips)


def solve_mul(operands, n, slips):
    a, b = operands
    b_everywhere = int(str(b) * (n + 1))  # it meets every digit of a
    return f"{write(a, n)}*{b}=", "", columns(operator.mul, a, b_everywhere, n + 1, slips)


def solve_mod(operands, n, slips):
    """Horner's rule from the highest digit; the working is the remainder so far, which plays the carry."""
    a, m = operands
    remainder, working = 0, ""
    for digit in reversed(write(a, n)):
        remainder = (10 * kept(remainder, slips) + int(digit)) % m
        working += str(remainder)
    return f"{write(a, n)}%{m}=", working[:-1], working[-1]


def draw_chain(rng, n):
    return [rng.randrange(1, 10) for _ in range(n + 1)]


def solve_chain(operands, n, slips):
    """Running sums of one-digit terms; the working is the sums before the last."""
    sums = [write(operands[0], 2)]
    for term in operands[1:]:
        so_far = int(sums[-1][::-1])
        sums.append(columns(operator.add, so_far, term, 2, slips))
    return "+".join(map(str, operands)) + "=", ",".join(sums[1:-1]), sums[-1]


def draw_linear(rng, n):
    a, x = rng.randrange(2, 6), rng.randrange(1, 10)
    return a, x, rng.randrange(10**n - a * x)


def solve_linear(operands, n, slips):
    """Solve a·x + b = c for the digit x; the working is c - b."""
    a, x, b = operands
    c = a * x + b
    difference = columns(operator.sub, c, b, n, slips)
    return f"{a}x+{write(b, n)}={write(c, n)}:", difference, str(int(difference[::-1]) // a % 10)


class Suite(NamedTuple):
    draw: Callable
    solve: Callable
    more: int = 0  # the size n is the difficulty plus this,
    least: int = 1  # and never less than this
    commutes: bool = False  # problems with the same operands in another order are the same problem


SUITES = {
    "add": Suite(draw_two, solve_add, commutes=True),
    "sub": Suite(draw_two, solve_sub, commutes=True),
    "mul": Suite(lambda rng, n: (rng.randrange(10**n), rng.randrange(2, 7)), solve_mul, more=1),
    "mod": Suite(lambda rng, n: (rng.randrange(10**n), rng.randrange(3, 8)), solve_mod, more=1),
    "chain": Suite(draw_chain, solve_chain, commutes=True),
    "linear": Suite(draw_linear, solve_linear, least=2),
}


def one_in_eight(key):
    """Whether a problem is held out, decided by the problem itself: training and evaluation cannot share any."""
    return hashlib.blake2b(key.encode(), digest_size=1).digest()[0] % 8 == 0


def draw_problem(suite, difficulty, rng, held_out=False, careless=0.0):
    """One random problem of the wanted side of the split.

    Its `solution` is careless with that probability; a data set has only its own solutions.
    """
    if suite not in SUITES:
        return rng.choice(side_of_split(suite, held_out))
    kind = SUITES[suite]
    n = max(difficulty + kind.more, kind.least)
    while True:
        operands = kind.draw(rng, n)
        key = sorted(operands) if kind.commutes else list(operands)
        if one_in_eight(f"{suite} {key}") == held_out:
            break
    prompt, working, right = kind.solve(operands, n, None)
    written = right
    if rng.random() < careless:
        _, working, written = kind.solve(operands, n, rng)
    return Problem(suite, prompt, str(int(right[::-1])), f"{working}####{written}")


def problem_stream(suites, difficulty, rng, careless=0.0):
    """Training problems without end, of suites at random."""
    while True:
        yield draw_problem(rng.choice(suites), difficulty, rng, careless=careless)


def training_problems(cfg, step):
    """The problems of one step of RL, as many as it asks for."""
    rng = random.Random(f"{cfg.seed}/rl/{step}")
    return problem_stream(suites_of(cfg.task, cfg.data_dir), cfg.difficulty, rng)


def held_out_problems(suite, difficulty, count):
    """Up to count different held-out problems of a suite: fewer where the suite has no more at this difficulty."""
    rng = random.Random(f"0/held out/{label(suite)}")
    if suite not in SUITES:
        side = side_of_split(suite, held_out=True)
        return rng.sample(side, min(count, len(side)))
    problems = {}  # by prompt
    for _ in range(100 * count):
        problem = draw_problem(suite, difficulty, rng, held_out=True)
        problems[problem.prompt] = problem
        if len(problems) == count:
            break
    return list(problems.values())


@functools.cache
def longest(suite, difficulty, tok):
    """Most tokens of a prompt and of a solution, and tokens that a response must have room for, its end left out."""
    if suite in SUITES:
        problem = draw_problem(suite, difficulty, random.Random(0))
        return len(problem.prompt), len(problem.solution), len(problem.solution)
    problems = read_problems(suite)
    prompts = map(len, tok.encode_ordinary_batch([p.prompt for p in problems]))
    solutions = list(map(len, tok.encode_ordinary_batch([p.solution for p in problems])))
    return max(prompts), max(solutions), min(solutions)


# ----------------------------------------------------------------------------------------------------------------------
# Data sets: JSONL, a problem a line

GITHUB = "https://raw.githubusercontent.com/"
QWEN = "QwenLM/Qwen2.5-Math/a45202bd16f1ec06f433442dc1152d0074773465/evaluation/data/"
PUBLISHED = {  # name: its file at the commit that was read
    "gsm8k_train": "openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/train.jsonl",
    "gsm8k_test": "openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/test.jsonl",
    "svamp": "arkilpatel/SVAMP/689d7ccac74b9983a2ac7cc3b264f441b99e7c53/SVAMP.json",
    "math500": "hkust-nlp/simpleRL-reason/cf1c7858bfc145a27aa733e75d930d34f0d318a6/examples/simplelr_math_eval/data/math500/test.jsonl",
    "aime24": QWEN + "aime24/test.jsonl",
    "aime25": "armenjeddi/mcd/76771f969048ebd77a1b4261b0a3469192c6f92a/evaluation/data/aime25/test.jsonl",
    "amc23": QWEN + "amc23/test.jsonl",
    "minerva": QWEN + "minerva_math/test.jsonl",
    "olympiadbench": QWEN + "olympiadbench/test.jsonl",
}
TRAIN = {"gsm8k": "gsm8k_train"}  # the sets with a part to train on
SCORE = {"gsm8k": "gsm8k_test"} | {name: name for name in PUBLISHED if not name.startswith("gsm8k")}
COMPETITION = "aime24 aime25 amc23 math500 minerva olympiadbench".split()  # the paper's


def label(suite):
    """The name of a suite in logs and tables."""
    return suite if suite in SUITES else Path(suite).stem


@functools.cache
def suites_of(task, data_dir="data", scoring=False):
    """Suites from a comma list: names in SUITES, known data sets (as their path, fetched if need be), files *.jsonl.

    "arithmetic" is the six, "competition" the paper's sets. scoring: the parts that are there to be scored on, else
    those to train on. ValueError on anything else.
    """
    flag, known, groups = "--task", TRAIN, {"arithmetic": SUITES}
    if scoring:
        flag, known, groups = "--suite", SCORE, groups | {"competition": COMPETITION}
    names, suites = [], {}  # suites by their label
    for name in task.split(","):
        names += groups.get(name, [name])
    for name in names:
        if name in known:
            name = data_file(known[name], data_dir)
        elif name in [*SCORE, "competition"]:
            advice = f"a set to score on: python eval.py score RUN --suite {name}"
            raise ValueError(f"{flag} {name}: {advice}")
        if name.endswith(".jsonl"):
            read_problems(name)
        elif name not in SUITES:
            allowed = f"{', '.join(groups)}, or some of {','.join([*SUITES, *known])},FILE.jsonl"
            raise ValueError(f"{flag}: unknown suite {name!r}; allowed: {allowed}")
        tag = label(name)
        if tag in ("score", "all") or suites.setdefault(tag, name) != name:
            taken = f"the name {tag} is taken in logs and tables"
            raise ValueError(f"{flag}: {name}: {taken}; rename the file")
    return list(suites.values())


def data_file(name, data_dir):
    """Path of a published data set in data_dir, fetched where it is not there. ValueError if that fails."""
    path, url = Path(data_dir) / f"{name}.jsonl", GITHUB + PUBLISHED[name]
    if path.exists():
        return str(path)
    try:
        with urllib.request.urlopen(url, timeout=30) as source:
            content = source.read()
        problems_in(content.decode("utf-8-sig"), url)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_bytes(content)
        os.replace(temporary, path)  # other processes see all of the file or none
    except Exception as error:  # no network, no such folder, not a data set, ...
        reason = f"not there, and not fetched ({error})"
        raise ValueError(f"{path}: {reason}; put it there by hand, from {url}") from None
    return str(path)


@functools.cache
def read_problems(path):
    """The problems of a file. ValueError names what is wrong with it, and where."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    return problems_in(text, path)


def problems_in(text, path):
    """The problems of a text, JSONL or a JSON array. ValueError names path:line, of an array path:item."""
    if text.lstrip().startswith("["):
        records = dict(enumerate(parse_json(text, path), 1))
    else:  # not splitlines: a text may contain other separators
        lines = enumerate(text.split("\n"), 1)
        records = {i: parse_json(line, f"{path}:{i}") for i, line in lines if line.strip()}
    if not records:
        raise ValueError(f"{path}: no problems in it")
    return [problem_of(record, path, f"{path}:{i}") for i, record in records.items()]


def parse_json(text, where):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error}): {text[:40]!r}") from None


def problem_of(record, path, where):
    """A record of a data set as a Problem. ValueError says what it lacks.

    The text is in `problem` or `question` (SVAMP: Body and Question). The gold is in `answer`, which may be a solution
    that ends in "#### gold", or in `final_answer`, a list of one, or it is what `solution` gives as its answer.
    """
    if not isinstance(record, dict):
        start = str(record)[:40]
        raise ValueError(f"{where}: not a record with a problem and an answer: {start!r}")
    fields = defaultdict(str)  # its texts, and its numbers as people write them
    for name, value in record.items():
        if name == "final_answer" and isinstance(value, list) and len(value) == 1:
            value = value[0]
        if type(value) in (int, float):
            value = str(value).removesuffix(".0")
        if isinstance(value, str) and value.strip():
            fields[name] = value.strip()
    text = fields["problem"] or fields["question"]
    if not text and fields["Body"] and fields["Question"]:
        text = f"{fields['Body'].removesuffix('.')}. {fields['Question']}"
    if not text:
        raise ValueError(f'{where}: no text in "problem" or "question"')
    solution = fields["solution"]
    answer = fields["answer"] or fields["Answer"] or fields["final_answer"]
    answer = answer or extract_answer(solution) or ""
    if "####" in answer:
        answer, solution = extract_answer(answer) or "", answer
    if not answers_equal(answer, extract_answer(solution)):
        solution = f"{solution}\n\\boxed{{{answer}}}" if solution else f"#### {answer}"
    if not answers_equal(answer, extract_answer(solution)):
        allowed = 'a text, a number, or a solution with "#### N"'
        raise ValueError(f'{where}: no answer in "answer": {allowed}')
    return Problem(path, f"{text}\n", answer, solution)


def normal(text):
    """Words, numbers and signs of a text, a space between them: problems that agree in this are the same.

    Left out is what changes no problem: case, white space, dollars around formulas, punctuation of sentences.
    """
    text = unicodedata.normalize("NFKC", text).translate(UNICODE).casefold()
    tokens = re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?|\.\d+|[^\W\d_]+|[^\w\s]", text)
    return " ".join(token for token in tokens if token not in ".,;:!?\"'$`")


@functools.cache
def side_of_split(path, held_out):
    """One problem in eight of a file is held out, decided by its text: the same in any file. ValueError if none is."""
    problems = [p for p in read_problems(path) if one_in_eight(normal(p.prompt)) == held_out]
    if not problems:
        side = "held out" if held_out else "left to train on"
        raise ValueError(f"{path}: too few problems: none is {side}")
    return problems


def check_apart(training, scored):
    """ValueError if a data set to be scored shares problems with one that was trained on."""
    for trained in set(training) - set(SUITES):
        known = {normal(p.prompt) for p in read_problems(trained)}
        for suite in set(scored) - set(SUITES):
            problems = read_problems(suite)
            shared = sum(normal(p.prompt) in known for p in problems)
            if shared:
                known_ones = f"{shared} of its {len(problems)} problems are in {trained}"
                raise ValueError(f"--suite {suite}: {known_ones}, which the run was trained on")


# ----------------------------------------------------------------------------------------------------------------------
# Verifier: exact numbers, else equal text. Text is never evaluated.

LONGEST = 500  # characters: a longer answer is none
UNICODE = str.maketrans("\u2212\u2013\u2010\u2044", "---/", "\u200b") | {0xD7: r"\times "}
UNITS = "dollars?|miles?|km(?:/h)?|cm|mm|m|kg|g|hours?|minutes?|seconds?|s|erg s|inches|feet|degrees|units"
TIDY = (  # pattern, by what it is replaced
    (r"\*\*([^*]*)\*\*", r"\1"),  # bold
    (r"\*\*", "^"),
    (r"\\\$|\$|\\[()\[\]]|\\(?:left|right|displaystyle)(?![a-zA-Z])", ""),  # dollars, and brackets of formulas
    (r"(?<=\d)(?:,\\!|\{,\}|\\[,;!])\s*(?=\d{3}(?!\d))", ","),  # within thousands
    (r"(?:\\[!,;: ]|~|\s)+", " "),
    (r" ?([^\w\s,.+-]) ?", r"\1"),
    (r"^ | $", ""),
    (r"^\\(?:mathbf|mathrm|textbf|text|boxed)\{([^{}]*)\}$", r"\1"),  # all of it in bold
    (rf"\\(?:text|mathrm)\{{(?:{UNITS})\}}(?:\^\{{?-?\d\}}?)?$", ""),
    (r"(?<=.) ?\bdollars?$|^=", ""),
    (r"\\%|\\text\{percent\}$| ?\bpercent$", "%"),
    (r"\\[dt]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\frac ?(\d) ?", r"\\frac{\1}"),
    (r"(\\frac\{[^{}]*\}) ?(\d) ?", r"\1{\2}"),
    (r"^\{([^{},]*)\}$", r"\1"),
)  # fmt: skip
DECIMAL = r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)"
SPELLINGS = (  # of numbers
    (rf"\\frac\{{(-?) ?({DECIMAL})\}}\{{({DECIMAL})\}}", r" \2/\1\3 "),
    (r"\^\{([+-]?\d+)\}", r"^\1"),
    (r" ?(?:\\times|\\cdot|\*|x) ?10\^", "e"),
    (r"^([+-]?)10\^", r"\g<1>1e"),
)  # fmt: skip
FRACTION = rf"(?:(\d+) )?({DECIMAL})/(-?{DECIMAL})"
SPACED = r" ?([^\w\s]) ?"
NUMBER = rf"([+-]?) ?(?:{FRACTION}|({DECIMAL}(?:[eE][+-]?\d{{1,4}})?)) ?%?"


def extract_answer(text):
    """What a completion gives as its answer, never the whole text, and None when there is none.

    It is the last \\boxed{...}, else the last "\\boxed 5", else the line after the last "####", else after "Answer:".
    """
    starts = [match.end() for match in re.finditer(r"\\boxed\s*\{", text)]
    for start in reversed(starts[-10:]):  # the last ones may be cut off, or only mention a box
        depth, rest = 1, text[start : start + LONGEST]
        for end, c in enumerate(rest):
            depth += (c == "{") - (c == "}")
            if depth == 0:
                break
        if depth == 0 and any(map(str.isalnum, rest[:end])):
            return rest[:end].strip()
    bare = re.findall(r"\\boxed\s*(-?\d+(?:[.,/]\d+)*)", text)
    if bare:
        return bare[-1]
    parts = text.rsplit("####", 1)
    if len(parts) == 1:
        parts = re.split(r"(?i)answer[*_]{0,3}\s{0,3}:", text)
    if len(parts) == 1:
        return None
    line = parts[-1].lstrip("*_` \t\r\n").partition("\n")[0]
    return line.rstrip("*_`. \t\r") or None


def read_number(text):
    """(exact value, whether in percent) of a tidied text, None if it is no number."""
    for pattern, by in SPELLINGS:
        text = re.sub(pattern, by, text, flags=re.ASCII)
    match = re.fullmatch(NUMBER, text.strip().rstrip("., "), re.ASCII)
    if not match:
        return None
    sign, whole, top, bottom, decimal = [part.replace(",", "") for part in match.groups("")]
    bottom = Fraction(bottom or 1)
    if bottom == 0:
        return None
    value = int(whole or 0) + Fraction(decimal or top) / bottom
    value = -value if sign == "-" else value
    return (value / 100, True) if "%" in text else (value, False)


def tidied(text):
    """A text without what changes no answer: bold, dollars around formulas, spellings of fractions and of signs."""
    # Raised digits become an exponent, and "two and a half" two numbers.
    text = re.sub("([\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207b]+)", r"^{\1}", text)
    text = re.sub("(?<=[0-9])(?=[\u00bc-\u00be\u2150-\u215e])", " ", text)
    text = unicodedata.normalize("NFKC", text).translate(UNICODE)
    for pattern, by in TIDY:
        text = re.sub(pattern, by, text)
    return text.strip()


def answers_equal(gold, candidate):
    """Whether two answers are the same: numbers exactly (1\\frac45, 9/5, 1.8, 180%), else text, after light tidying.

    A gold in percent may be answered without the sign. None is no answer. Never raises.
    """
    if gold is None or candidate is None or max(len(gold), len(candidate)) > LONGEST:
        return False
    # Nearly all of training, where it saves time.
    if re.fullmatch("[0-9]+ [0-9]+", f"{gold} {candidate}"):
        return int(gold) == int(candidate)
    gold, candidate = tidied(gold), tidied(candidate)
    a, b = read_number(gold), read_number(candidate)
    if a and b:
        return a[0] == b[0] or (a[1] and not b[1] and 100 * a[0] == b[0])
    if a or b:
        return False
    gold, candidate = [re.sub(SPACED, r"\1", text).rstrip(".") for text in (gold, candidate)]
    if re.fullmatch("[a-zA-Z ]{4,}", gold):  # words, not a product of variables
        gold, candidate = gold.casefold(), candidate.casefold()
    return gold == candidate != ""


def is_right(problem, text):
    """Whether a completion answers the problem. The suites answer lowest digit first."""
    answer = extract_answer(text)
    if problem.suite in SUITES and answer is not None:
        answer = answer[::-1]
    return answers_equal(problem.answer, answer)


# ----------------------------------------------------------------------------------------------------------------------
# Rollout


def sample(model, tok, problems, G, max_new_tokens, temperature, generator, heads=None):
    """G completions of each problem: the dict of model.generate with reward (B,), and their texts.

    With heads, they draft (mtp.speculative_generate). Of several processes each samples for its share of the problems,
    and all of them get everything. The random numbers are those of all problems, so the samples do not depend on it.
    """
    device, mine = model.wte.weight.device, share(len(problems))
    shape = [len(problems) * G, max_new_tokens] + ([3] if heads else [])
    u = torch.rand(shape, generator=generator)[mine.start * G : mine.stop * G]
    room = max(model.cfg.block_size - max_new_tokens, 1)  # of a prompt too long, its end
    prompts = [tok.encode_ordinary(p.prompt)[-room:] for p in problems[mine]]
    part = None
    if prompts:
        args = prompts, G, max_new_tokens, tok.eot_token, temperature, u
        with autocast(device):
            if heads:
                part = mtp.speculative_generate(model, heads, *args)
            else:
                part = generate(model, *args)
        part = {k: x.cpu() for k, x in part.items()}
    batch = concatenate([part for part in gather(part) if part])
    texts, right = [], []
    for i, (tokens, mask) in enumerate(zip(batch["tokens"][:, 1:], batch["mask"])):
        texts.append(tok.decode(tokens[mask].tolist()).removesuffix(EOS))
        right.append(is_right(problems[i // G], texts[-1]))
    batch["reward"] = torch.tensor(right, dtype=torch.float)
    return {k: x.to(device) for k, x in batch.items()}, texts


def concatenate(batches):
    """Several batches as one, padded to the longest."""
    T = max(batch["tokens"].size(1) for batch in batches)
    padded = []
    for batch in batches:
        room = (0, T - batch["tokens"].size(1))
        padded.append({k: F.pad(x, room) if x.ndim > 1 else x for k, x in batch.items()})
    return {k: torch.cat([batch[k] for batch in padded]) for k in padded[0]}


def overlong_penalty(length_B, max_new_tokens):
    """DAPO's soft penalty (arXiv 2503.14476 §3.4): 0, falling to -1 over the last fifth of the allowed length."""
    buffer = max_new_tokens / 5
    return ((max_new_tokens - buffer - length_B) / buffer).clamp(-1, 0)


def informative(reward_PG):
    """(P,) True where the samples of a prompt differ in reward: else advantages relative to the group are zero."""
    return reward_PG.amax(1) > reward_PG.amin(1)


def rollout(model, heads, tok, problems, algo, cfg, generator):
    """The samples of one step. With dynamic sampling (DAPO §3.2) prompts without a gradient are replaced by new ones
    from the iterator `problems`. It draws at most ROUNDS times; what is missing then stays missing.

    Returns the batch of the prompts kept, metrics over all prompts sampled, and examples to read.
    """
    G, R = cfg.num_generations, cfg.max_new_tokens
    drafters = heads if cfg.speculative else None
    batches, examples, missing = [], [], cfg.prompts_per_step
    while missing and len(batches) < (ROUNDS if algo.dynamic_sampling else 1):
        drawn = list(itertools.islice(problems, missing))
        batch, texts = sample(model, tok, drawn, G, R, cfg.temperature, generator, drafters)
        prompts, rewards = [p.prompt for p in drawn], batch["reward"].view(-1, G)
        examples += zip(prompts, texts[::G], rewards[:, 0].tolist())
        has_gradient_P = informative(rewards)  # by correctness alone, before the penalty
        batch["has_gradient"] = has_gradient_P.repeat_interleave(G)
        if algo.overlong:
            batch["reward"] += overlong_penalty(batch["mask"].sum(1), R)
        batches.append(batch)
        missing -= int(has_gradient_P.sum())
    batch = concatenate(batches)
    length_B = batch["mask"].sum(1).float()
    means = {
        "reward/mean": batch["reward"],
        "reward/frac_zero_std": ~batch["has_gradient"],
        "response_length/mean": length_B,
        "response_length/clip_ratio": length_B == R,
    }
    record = {name: x.float().mean().item() for name, x in means.items()}
    record["response_length/sum"] = int(length_B.sum())
    # The mean of -log p over tokens sampled from p.
    record["actor/entropy"] = -(batch["logp"].sum() / length_B.sum()).item()
    if "draft" in batch:
        record |= mtp.speculation_metrics(batch["mask"], batch["draft"], cfg.mtp_depth)
    if algo.dynamic_sampling:
        batch = {k: x[batch["has_gradient"]] for k, x in batch.items()}
    return batch, record, examples[:8]


def evaluate(model, tok, cfg):
    """During training: {eval/score, eval/<suite>}, avg@eval_k on held-out problems in points of 100.

    The score is the mean of the suites. The same problems and the same random numbers every time.
    """
    generator, record = torch.Generator().manual_seed(0), {}
    sampling = cfg.eval_k, cfg.max_new_tokens, cfg.temperature
    for suite in suites_of(cfg.task, cfg.data_dir):
        problems = held_out_problems(suite, cfg.difficulty, cfg.eval_problems)
        batch, _ = sample(model, tok, problems, *sampling, generator)
        record[f"eval/{label(suite)}"] = 100 * batch["reward"].mean().item()
    return {"eval/score": sum(record.values()) / len(record)} | record


# ----------------------------------------------------------------------------------------------------------------------
# Advantages and losses


@dataclass(frozen=True)
class Algo:
    """What tells one policy-gradient method from another."""

    # group_std: (r - mean)/std of the group · group: r - mean · batch: r - mean of all
    advantage: str = "group_std"
    # token: all tokens alike · sequence: mean a sequence first · constant: sum / (B·max_new_tokens)
    loss_agg: str = "token"
    # token · sequence: geometric mean over the sequence · none: plain -A log p
    ratio: str = "token"
    clip_eps_low: float = 0.2
    clip_eps_high: float = 0.2
    # with A < 0 the objective is never below dual_clip·A (Ye et al. 2019, arXiv 1912.09729)
    dual_clip: float = 10.0
    kl_coef: float = 0.0  # weight of the k3 estimate of KL(policy, frozen base)
    dynamic_sampling: bool = False  # replace groups of samples that are all alike by new prompts
    overlong: bool = False  # punish responses that come near max_new_tokens


ALGOS = {
    # Williams 1992; nothing is clipped
    "reinforce": Algo("batch", ratio="none", clip_eps_low=math.inf, clip_eps_high=math.inf),
    "grpo": Algo(loss_agg="sequence", kl_coef=0.04),  # arXiv 2402.03300
    "drgrpo": Algo(advantage="group", loss_agg="constant"),  # arXiv 2503.20783
    "dapo": Algo(clip_eps_high=0.28, dynamic_sampling=True, overlong=True),  # arXiv 2503.14476
    # arXiv 2507.18071
    "gspo": Algo(loss_agg="sequence", ratio="sequence", clip_eps_low=3e-4, clip_eps_high=4e-4),
}


def advantages(reward_PG, kind):
    """(P, G) rewards -> (P, G) advantages.

    Groups of equal rewards get exactly 0, unless the kind is "batch", whose baseline is the mean of all rewards.
    """
    if kind == "batch":
        return reward_PG - reward_PG.mean()
    adv_PG = reward_PG - reward_PG.mean(1, keepdim=True)
    if kind == "group_std":
        variance_P1 = adv_PG.square().sum(1, keepdim=True) / (reward_PG.size(1) - 1)
        adv_PG = adv_PG / (variance_P1.sqrt() + 1e-6)
    # The mean of equal floats need not be that float: test the rewards, not their spread.
    return torch.where(informative(reward_PG)[:, None], adv_PG, 0.0)


def token_weights(mask_BKT, loss_agg, max_new_tokens):
    """How much each token counts in a loss, (weight * x).sum(): (B, K, T-1), 0 off the mask.

    At each depth the weights add up to 1, except for "constant". They are made once for the whole minibatch, so that
    cutting it into shares, or padding it, changes nothing.
    """
    m, B = mask_BKT.float(), len(mask_BKT)
    if loss_agg == "token":
        return m / m.sum((0, 2), keepdim=True).clamp(min=1)
    if loss_agg == "sequence":
        return m / m.sum(2, keepdim=True).clamp(min=1) / B
    return m / (B * max_new_tokens)


def importance_ratio(logp, old, mask, algo):
    """π_θ/π_old of each token; for "sequence" the geometric mean over the sequence, the same for all of its tokens."""
    log_ratio = torch.where(mask, logp - old, 0.0)
    if algo.ratio == "sequence":  # GSPO
        log_ratio = log_ratio.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1) * mask
    # A finite ratio, so that a branch not taken has no NaN gradient.
    return log_ratio.clamp(-20, 20).exp()


def policy_loss(logp, old, adv_B, mask, weight, algo):
    """The clipped policy-gradient loss, of the trunk (arrays are (B, T-1)) or of the MTP heads (B, K, T-1)."""
    adv = adv_B.view(-1, *[1] * (logp.ndim - 1))
    if algo.ratio == "none":
        return -(weight * adv * logp).sum()
    ratio = importance_ratio(logp, old, mask, algo)
    clipped = ratio.clamp(1 - algo.clip_eps_low, 1 + algo.clip_eps_high)
    surrogate = torch.minimum(ratio * adv, clipped * adv)
    surrogate = torch.where(adv < 0, torch.maximum(surrogate, algo.dual_clip * adv), surrogate)
    return -(weight * surrogate).sum()


def kl_to_base(logp_BT, mb):
    """KL(policy, frozen base) by Schulman's k3 = r - 1 - log r ≥ 0, r = p_base/p; 0 for a method without a base."""
    if "ref" not in mb:
        return torch.zeros(())
    log_r = (mb["ref"] - logp_BT).clamp(-20, 20)
    return (mb["weight"] * (log_r.exp() - 1 - log_r)).sum()


def trunk_policy_loss(logp_BT, mb, algo):
    """The policy loss of the trunk, and where the method has one the KL to its base."""
    loss = policy_loss(logp_BT, mb["old"], mb["adv"], mb["mask"], mb["weight"], algo)
    return loss + algo.kl_coef * kl_to_base(logp_BT, mb)


def mtp_loss(kind, logp_BKT, mb, adv_B, algo):
    """A loss of the heads, mean over depths: "ce" cross-entropy on the sampled tokens, "policy" the clipped loss."""
    if kind == "policy":
        mask, weight = mb["mask_mtp"], mb["weight_mtp"]
        loss = policy_loss(logp_BKT, mb["old_mtp"], adv_B, mask, weight, algo)
    else:
        loss = -(mb["weight_ce"] * logp_BKT).sum()
    return loss / max(logp_BKT.size(1), 1)  # without heads the arrays are empty, and the loss is 0


# ----------------------------------------------------------------------------------------------------------------------
# The minibatch of an update


def logprobs(model, heads, mb, cfg, door=1.0):
    """mtp.logprobs of a minibatch: logp (B, T-1), logp_mtp (B, K, T-1), and the hidden states."""
    tokens, mask = mb["tokens"], mb["mask"]
    return mtp.logprobs(model, heads, tokens, mask, cfg.temperature, cfg.logp_impl, door)


@torch.no_grad()
def minibatches(model, heads, batch, adv_B, algo, cfg, reference=None):
    """A rollout cut into updates_per_rollout minibatches of whole groups, fewer if there are fewer groups.

    Each is a dict of this process's share of it: tokens (B, T); logp as sampled, mask and weight (B, T-1); adv (B,);
    mask_mtp, weight_mtp and weight_ce (B, K, T-1); with a reference, its log-probs ref. Losses of the shares add up to
    those of the whole. All but the first have old and old_mtp, the log-probs before any update, by a forward pass; in
    the first update they are those of its own forward pass.
    """
    G, R, K = cfg.num_generations, cfg.max_new_tokens, len(heads.heads) if heads else 0
    groups = torch.arange(len(adv_B)).view(-1, G)
    cuts = min(cfg.updates_per_rollout, len(groups))
    parts = []
    for part in groups.tensor_split(cuts) if cuts else []:
        rows = slice(int(part[0, 0]), int(part[-1, -1]) + 1)
        T = 2 + int(batch["mask"][rows].any(0).nonzero().max())  # the longest ends here
        mask_BT = batch["mask"][rows, : T - 1]
        mask_BKT = mtp.aligned_mask(mask_BT, K)
        mb = {
            "tokens": batch["tokens"][rows, :T],
            "mask": mask_BT,
            "logp": batch["logp"][rows, : T - 1],
            "adv": adv_B[rows],
            "weight": token_weights(mask_BT[:, None], algo.loss_agg, R)[:, 0],
            "mask_mtp": mask_BKT,
            "weight_mtp": token_weights(mask_BKT, algo.loss_agg, R),
            "weight_ce": token_weights(mask_BKT, "token", R),
        }
        mine = share(len(part))
        mb = {k: x[mine.start * G : mine.stop * G] for k, x in mb.items()}
        if parts:
            mb["old"], mb["old_mtp"], _ = logprobs(model, heads, mb, cfg)
        if reference:
            mb["ref"], _, _ = logprobs(reference, None, mb, cfg)
        parts.append(mb)
    return parts


def largest(x):
    """The largest number of all processes, none of them negative; 0 of an empty share."""
    return total(F.pad(x.flatten(), (0, 1)).max(), dist.ReduceOp.MAX).item()


def ratio_metrics(name, logp, old, adv_B, mask, algo):
    """Largest importance ratio, and share of tokens that the clip takes out below (A < 0) and above (A > 0)."""
    ratio = importance_ratio(logp, old, mask, algo)
    adv = adv_B.view(-1, *[1] * (logp.ndim - 1))
    low = mask & (ratio < 1 - algo.clip_eps_low) & (adv < 0)
    high = mask & (ratio > 1 + algo.clip_eps_high) & (adv > 0)
    count, low, high = total(torch.stack((mask.sum(), low.sum(), high.sum()))).tolist()
    return {
        f"{name}/ratio_max": largest(ratio * mask),
        f"{name}/clip_frac_low": low / max(count, 1),
        f"{name}/clip_frac_high": high / max(count, 1),
    }


@torch.no_grad()
def update_metrics(logp_BT, logp_BKT, mb, adv_mtp_B, algo, first):
    """What the forward pass of an update tells of trunk and heads; first: of the first update after the rollout."""
    metrics = {}
    if first:
        # The gap is to the sampler's log-probs, in this minibatch. The agreement is the share of tokens that a
        # speculative sampler would accept from head k: the mean of min(1, q/p), which is expected to be Σ_v min(p_v, q_v).
        metrics["rollout/logp_gap"] = largest((logp_BT - mb["logp"]).abs() * mb["mask"])
        accepted_BKT = (logp_BKT - logp_BT[:, None]).exp().clamp(max=1) * mb["mask_mtp"]
        scored_K = total(mb["mask_mtp"].sum((0, 2))).clamp(min=1)
        shares_K = total(accepted_BKT.sum((0, 2))) / scored_K
        for k, value in enumerate(shares_K.tolist(), 1):
            metrics[f"mtp/agreement_{k}"] = value
    if logp_BKT.size(1):
        metrics |= ratio_metrics("mtp", logp_BKT, mb["old_mtp"], adv_mtp_B, mb["mask_mtp"], algo)
    return metrics | ratio_metrics("actor", logp_BT, mb["old"], mb["adv"], mb["mask"], algo)


def summary(updates):
    """One step's updates as one record: means, of ratio_max the largest, and of occ/ the last (the first λ_t is 0)."""
    values, record = {}, {}
    for metrics in updates:
        for name, value in metrics.items():
            values.setdefault(name, []).append(value)
    for name, numbers in values.items():
        if name.startswith("occ/"):
            record[name] = numbers[-1]
        elif name.endswith("ratio_max"):
            record[name] = max(numbers)
        else:
            record[name] = sum(numbers) / len(numbers)
    return record


def probe(model, heads, mb, deltas, regime, algo, cfg, heads_at_rollout):
    """The exact terms of one minibatch, whatever the regime, what each proxy makes of it, and its gradients g and m.

    deltas: (δ_RL, δ_MTP) of the minibatch. With the heads as they were at the rollout, δ_MTP is what the trunk's own
    movement changes: Δ_MTP of the paper knows no other.
    """
    logp, logp_mtp, h = logprobs(model, heads, mb, cfg)  # the doors open
    loss_mtp = mtp_loss(regime.trunk_loss, logp_mtp, mb, mb["adv"], algo)
    losses = [trunk_policy_loss(logp, mb, algo), loss_mtp]
    g, m = [occ.flat_grad(loss, list(model.parameters())) for loss in losses]
    at_h = [torch.autograd.grad(loss, h, retain_graph=True)[0] for loss in losses]
    with torch.no_grad():
        _, logp_frozen, _ = logprobs(model, heads_at_rollout, mb, cfg)
    _, frozen = occ.token_deltas(logp, mb["old"], logp_frozen, mb["old_mtp"], mb["mask_mtp"])
    terms = occ.exact_terms(g, m, cfg.lam_plus)
    terms["lam_logprob"] = occ.logprob_coefficient(*deltas, cfg.lam_plus)
    terms["lam_hidden"] = occ.hidden_coefficient(*at_h, cfg.lam_plus)
    terms["lam_frozen"] = occ.logprob_coefficient(deltas[0], frozen, cfg.lam_plus)
    terms["v2_frozen"] = occ.inner(frozen, frozen)
    return {f"occ/{name}": float(value) for name, value in terms.items()}, g, m
