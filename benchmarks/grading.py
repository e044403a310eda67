r"""Verdicts of the four math_dapo modes on gold answers, and how many verdicts a second.

Confusion: each gold answer against itself in ten spellings, where a spelling applies, and against
the gold answers of other problems of the same data set. Pairs of different problems whose answers
are the same are left out: equal without spaces and \left, \right, d of \dfrac, or as numbers.
Throughput of `symbolic`: on its workers, cold and from its cache, beside
    math-verify   the library called in one process, without a limit on time or memory
    strings       `minerva`, the comparison of normalised strings: what extraction alone costs
Fails where `symbolic` accepts too few spellings, rejects too few others, or is too slow.
Needs the data sets' files; without them it prints where it looked and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path

from r2vpo_megatron.rewards.equivalence import EquivalenceJudge
from r2vpo_megatron.rewards.math_dapo import MODES, STRING_MODES, MathDapoReward
from r2vpo_megatron.rewards.worker_pool import WorkerPool

DATA_FOLDER = Path(__file__).resolve().parents[1].parent / "shared" / "data"
DATA_SETS = {
    "MATH-500": ("math500__simpleRL.jsonl",),
    "AIME24": ("aime24__Qwen.jsonl",),
    "AIME25": ("aime25__Klear.jsonl",),
    "AMC23": ("amc23__Qwen.jsonl",),
    "HMMT": ("hmmt_feb_2025__Klear.jsonl",),
    "OlymMATH-EN": ("OlymMATH-EN-EASY.jsonl", "OlymMATH-EN-HARD.jsonl"),
    "OlymMATH-ZH": ("OlymMATH-ZH-EASY.jsonl", "OlymMATH-ZH-HARD.jsonl"),
}
TRUE_TARGET, FALSE_TARGET, RATE_TARGET = 0.99, 0.995, 2000.0
REASONING = "We count the cases one by one and add them up.\n\n"

_INTEGER = re.compile(r"-?\d+")
_NUMBER = re.compile(r"-?\d+(\.\d+)?")
_SIMPLE_FRACTION = re.compile(r"(-?)\\d?frac\{(-?\d+)\}\{(\d+)\}")


def load_golds(data_folder: Path, name: str) -> list[str]:
    """The gold answers of a data set, in its order."""
    golds = []
    for file_name in DATA_SETS[name]:
        for line in (data_folder / file_name).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if "answer" not in row:
                row = {"answer": row["meta"]["solution"]}
            golds.append(str(row["answer"]).strip())
    return golds


def _answer(text: str) -> str:
    return f"{REASONING}Answer: {text}"


def _spell_dfrac(gold: str) -> str | None:
    return _answer(gold.replace("\\frac", "\\dfrac")) if "\\frac" in gold else None


def _spell_slash(gold: str) -> str | None:
    slashed = _SIMPLE_FRACTION.sub(r"\1\2/\3", gold)
    applies = "frac" not in slashed and _SIMPLE_FRACTION.fullmatch(gold)
    return _answer(slashed) if applies else None


def _spell_thousands(gold: str) -> str | None:
    if not _INTEGER.fullmatch(gold) or len(gold.lstrip("-")) < 4:
        return None
    return _answer(f"{int(gold):,}")


def _spell_leading_zero(gold: str) -> str | None:
    if not _NUMBER.fullmatch(gold):
        return None
    return _answer(gold.replace("-", "-0") if gold.startswith("-") else "0" + gold)


def _spell_degrees(gold: str) -> str | None:
    if _NUMBER.fullmatch(gold) or gold.endswith(("\\circ", "\\circ}")):
        return _answer(re.sub(r"\^\{?\\circ\}?$", "", gold) + "^\\circ")
    return None


def _spell_unit(gold: str) -> str | None:
    is_quantity = _NUMBER.fullmatch(gold) or _SIMPLE_FRACTION.fullmatch(gold)
    return _answer(f"{gold} \\text{{ cm}}") if is_quantity else None


SPELLINGS: dict[str, Callable[[str], str | None]] = {
    "\\boxed{}": lambda gold: f"{REASONING}So it is $\\boxed{{{gold}}}$.",
    "$...$": lambda gold: _answer(f"${gold}$"),
    "\\dfrac": _spell_dfrac,
    "1/2": _spell_slash,
    "full stop": lambda gold: _answer(f"{gold}."),
    "**Answer:**": lambda gold: f"{REASONING}**Answer:** {gold}",
    "\\text{} unit": _spell_unit,
    "1,234": _spell_thousands,
    "034": _spell_leading_zero,
    "degrees": _spell_degrees,
}


def same_answer(one: str, other: str) -> bool:
    """Whether two problems have the same answer, told without the code that is measured."""
    bare = [
        re.sub(r"\s|\\left|\\right|\\!|\$", "", text).replace("dfrac", "frac")
        for text in (one, other)
    ]
    bare = [
        text.removeprefix("\\").replace("^\\circ", "").replace("^{\\circ}", "") for text in bare
    ]
    if bare[0] == bare[1]:
        return True
    values = [_to_fraction(text) for text in bare]
    return values[0] is not None and values[0] == values[1]


def _to_fraction(text: str) -> Fraction | None:
    text = re.sub(r"^(-?)\\?frac\{?(\d+?)\}?\{?(\d+)\}?$", r"\1\2/\3", text).replace(",", "")
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        return None


def draw_other_golds(golds: Sequence[str], per_gold: int, seed: int) -> Iterator[tuple[str, str]]:
    """(answer of another problem, gold) pairs with different answers."""
    generator = random.Random(seed)
    for gold in golds:
        others = [other for other in golds if not same_answer(gold, other)]
        for other in generator.sample(others, min(per_gold, len(others))):
            yield other, gold


def spelled_pairs(golds: Sequence[str], spelling: str) -> list[tuple[str, str]]:
    """(response, gold) of the gold answers that have this spelling."""
    return [
        (response, gold) for gold in golds if (response := SPELLINGS[spelling](gold)) is not None
    ]


def accepted(mode: MathDapoReward, pairs: Sequence[tuple[str, str]]) -> list[bool]:
    """Verdicts of one mode on (response, gold) pairs."""
    responses, golds = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    return [result.acc for result in mode.judge_texts(responses, golds)]


def print_spellings(modes: dict[str, MathDapoReward], golds: dict[str, list[str]]) -> float:
    """Accepted share by spelling and mode; returns the share over all of `symbolic`."""
    print(f"gold answer against itself: accepted, %\n{'':<14}{'pairs':>7}", end="")
    print("".join(f"{name:>16}" for name in modes))
    totals = dict.fromkeys(modes, 0)
    num_all = 0
    for spelling in SPELLINGS:
        pairs = [pair for answers in golds.values() for pair in spelled_pairs(answers, spelling)]
        num_all += len(pairs)
        row = ""
        for name, mode in modes.items():
            verdicts = accepted(mode, pairs)
            totals[name] += sum(verdicts)
            row += f"{100 * sum(verdicts) / len(pairs):>16.1f}"
            if name == "symbolic":
                rejected = [pair for pair, right in zip(pairs, verdicts, strict=True) if not right]
        print(f"{spelling:<14}{len(pairs):>7}{row}")
        for response, gold in rejected[:5]:
            print(f"    rejected: {response.removeprefix(REASONING)!r} for {gold!r}")
    print(f"{'all':<14}{num_all:>7}", end="")
    print("".join(f"{100 * total / num_all:>16.2f}" for total in totals.values()))
    return totals["symbolic"] / num_all


def print_data_sets(
    modes: dict[str, MathDapoReward], golds: dict[str, list[str]], args: argparse.Namespace
) -> float:
    """Confusion by data set and mode; returns the rejected share of others over all."""
    print("\nby data set: own answer accepted in all spellings, another's answer rejected, %")
    print(f"{'':<14}{'own':>7}{'other':>7}" + "".join(f"{name:>16}" for name in modes))
    num_others = num_rejected = 0
    for data_set, answers in golds.items():
        own = [pair for spelling in SPELLINGS for pair in spelled_pairs(answers, spelling)]
        drawn = list(draw_other_golds(answers, args.others, args.seed))
        others = [(_answer(other), gold) for other, gold in drawn]
        others += [(SPELLINGS["\\boxed{}"](other) or "", gold) for other, gold in drawn]
        row = ""
        for name, mode in modes.items():
            right = sum(accepted(mode, own)) / len(own)
            verdicts = accepted(mode, others)
            row += f"{100 * right:>8.2f}{100 * (1 - sum(verdicts) / len(others)):>8.2f}"
            if name == "symbolic":
                num_others += len(others)
                num_rejected += len(others) - sum(verdicts)
                wrong = {pair for pair, yes in zip(drawn * 2, verdicts, strict=True) if yes}
        print(f"{data_set:<14}{len(own):>7}{len(others):>7}{row}")
        for other, gold in sorted(wrong)[:5]:
            print(f"    accepted: {other!r} for {gold!r}")
    print(f"rejected of another problem's answers: {num_rejected / num_others:.3%}")
    return num_rejected / num_others


def make_ordinary(
    golds: dict[str, list[str]], num_verdicts: int, seed: int
) -> list[tuple[str, str]]:
    """Responses as in training: 8 to a gold answer, half right in some spelling, half wrong."""
    generator = random.Random(seed)
    flat = [gold for answers in golds.values() for gold in answers]
    pairs: list[tuple[str, str]] = []
    while len(pairs) < num_verdicts:
        gold = generator.choice(flat)
        for index in range(8):
            spelling = SPELLINGS[generator.choice(list(SPELLINGS))]
            answer = gold if index % 2 else generator.choice(flat)
            pairs.append((spelling(answer) or _answer(answer), gold))
    return pairs[:num_verdicts]


def measure_rate(
    judge: Callable[[Sequence[tuple[str, str]]], object], pairs: Sequence[tuple[str, str]]
) -> float:
    """Verdicts a second of one call."""
    start = time.perf_counter()
    judge(pairs)
    return len(pairs) / (time.perf_counter() - start)


def judge_by_strings(pairs: Sequence[tuple[str, str]]) -> None:
    """The `minerva` mode."""
    for response, gold in pairs:
        STRING_MODES["minerva"](response, gold)


def judge_by_math_verify(pairs: Sequence[tuple[str, str]]) -> None:
    """The peer, as its users call it, but without its alarm signals."""
    from math_verify import parse, verify

    for response, gold in pairs:
        verify(
            parse(f"${gold}$", parsing_timeout=None),
            parse(response, parsing_timeout=None),
            timeout_seconds=None,
        )


def print_rates(golds: dict[str, list[str]], args: argparse.Namespace) -> float:
    """Throughput on ordinary answers; returns the cold one of `symbolic`."""
    pairs = make_ordinary(golds, args.verdicts, args.seed)
    integers = {
        name: [gold for gold in answers if _INTEGER.fullmatch(gold)]
        for name, answers in golds.items()
    }
    integer_pairs = make_ordinary(integers, args.verdicts, args.seed)
    print(f"\n{args.verdicts:,} ordinary answers, {args.workers} workers: verdicts a second")
    print(f"{'':<34}{'all golds':>12}{'integers':>12}")
    rates: dict[str, list[float]] = {}
    for chosen in (pairs, integer_pairs):
        with WorkerPool(args.workers) as pool:
            judge = EquivalenceJudge(pool)
            judge.judge([("\\pi", "e")])  # start-up is not a verdict's
            mode = MathDapoReward("symbolic", judge)
            for label in ("symbolic, nothing known", "symbolic, seen before"):
                rate = measure_rate(partial(accepted, mode), chosen)
                rates.setdefault(label, []).append(rate)
        few = chosen[: args.verdicts // 10]
        judge_by_math_verify(few[:50])
        rate = measure_rate(judge_by_math_verify, few)
        rates.setdefault("math-verify in this process", []).append(rate)
        rate = measure_rate(judge_by_strings, chosen)
        rates.setdefault("strings alone (minerva)", []).append(rate)
    for label, values in rates.items():
        print(f"{label:<34}" + "".join(f"{value:>12,.0f}" for value in values))
    return rates["symbolic, nothing known"][0]


def parse_arguments() -> argparse.Namespace:
    """Defaults that take about a minute."""
    parser = argparse.ArgumentParser(description="Confusion and throughput of the graders.")
    sizes = {"others": 5, "verdicts": 20000, "workers": 2, "seed": 0}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--data", type=Path, default=DATA_FOLDER, help="folder of the data sets")
    return parser.parse_args()


def main() -> None:
    """Print all tables; fail where a target is missed."""
    args = parse_arguments()
    if not args.data.is_dir():
        print(f"no data sets at {args.data}; name their folder with --data")
        return
    golds = {name: load_golds(args.data, name) for name in DATA_SETS}
    with WorkerPool(args.workers) as pool:
        judge = EquivalenceJudge(pool)
        modes = {mode: MathDapoReward(mode, judge) for mode in MODES}
        true_share = print_spellings(modes, golds)
        false_share = print_data_sets(modes, golds, args)
        print(f"verdicts of workers: {dict(pool.counts)}")
    rate = print_rates(golds, args)
    if true_share < TRUE_TARGET or false_share < FALSE_TARGET or rate < RATE_TARGET:
        raise RuntimeError(
            f"missed: {true_share:.2%} of {TRUE_TARGET:.1%} true, {false_share:.2%} of "
            f"{FALSE_TARGET:.1%} false, {rate:,.0f} of {RATE_TARGET:,.0f} verdicts a second"
        )


if __name__ == "__main__":
    main()
