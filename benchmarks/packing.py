"""How full and how even micro-batches get with long-tailed responses, for 1 to 64 ranks.

Prompts are uniform in 100 to 300 tokens; responses log-normal, cut at 16,384. Sides:
    ours         `data.partition.partition_balanced`, which `pack_trajectories` packs by
    round-robin  responses sorted by length are dealt to the ranks in turn; each rank packs its own
                 in that order and opens a micro-batch when the next does not fit
    padding      dealt likewise; a micro-batch is a rectangle as wide as its longest response
All have one budget of tokens a micro-batch. A rank with fewer micro-batches than another waits for
it: it gets empty ones, as collectives demand.
Fails where ours loses a response or exceeds a budget.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from r2vpo_megatron.data.partition import partition_balanced

# [rank][micro-batch] indices of responses.
Plan = list[list[list[int]]]
LONGEST_RESPONSE = 16384
USE_TARGET, IMBALANCE_TARGET = 0.97, 0.02
NUM_TIMED = 5


@dataclass(frozen=True)
class Quality:
    """One plan's figures."""

    budget_use: float  # share of all micro-batches' budgets that holds tokens of samples
    fitted_use: float  # the same, were the budget its largest micro-batch
    imbalance: float  # of tokens processed per rank, padding included: largest / mean - 1
    micro_batches: int  # of one rank
    seconds: float


def plan_ours(lengths: Sequence[int], budget: int, num_ranks: int) -> Plan:
    """What `pack_trajectories` does before it copies tokens."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    bins = partition_balanced(
        [lengths[index] for index in order], capacity=budget, num_ranks=num_ranks
    )
    return [[[order[place] for place in members] for members in rank] for rank in bins]


def plan_round_robin(lengths: Sequence[int], budget: int, num_ranks: int) -> Plan:
    """Packed: a micro-batch is full when its tokens and the next response exceed the budget."""
    return _deal_and_fill(
        lengths, num_ranks, lambda members: sum(lengths[index] for index in members) <= budget
    )


def plan_padding(lengths: Sequence[int], budget: int, num_ranks: int) -> Plan:
    """Padded: a micro-batch of n responses takes n times its longest."""
    return _deal_and_fill(lengths, num_ranks, lambda members: rectangle(lengths, members) <= budget)


def rectangle(lengths: Sequence[int], members: Sequence[int]) -> int:
    """Tokens of a micro-batch padded to its longest response."""
    return len(members) * max((lengths[index] for index in members), default=0)


def _deal_and_fill(
    lengths: Sequence[int], num_ranks: int, fits: Callable[[list[int]], bool]
) -> Plan:
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    plan: Plan = []
    for rank in range(num_ranks):
        bins: list[list[int]] = [[]]
        for index in order[rank::num_ranks]:
            if not fits([*bins[-1], index]):
                bins.append([])
            bins[-1].append(index)
        plan.append(bins)
    most = max(map(len, plan))
    return [bins + [[]] * (most - len(bins)) for bins in plan]


SIDES = {"ours": plan_ours, "round-robin": plan_round_robin, "padding": plan_padding}


def measure(side: str, lengths: Sequence[int], budget: int, num_ranks: int) -> Quality:
    """Plan, check and describe; the time is the fastest of a few."""
    seconds = []
    for _ in range(NUM_TIMED if side == "ours" else 1):
        start = time.perf_counter()
        plan = SIDES[side](lengths, budget, num_ranks)
        seconds.append(time.perf_counter() - start)
    flat = [members for bins in plan for members in bins]
    if sorted(index for members in flat for index in members) != list(range(len(lengths))):
        raise RuntimeError(f"{side}: a response is lost or repeated")
    processed = [
        [
            rectangle(lengths, members)
            if side == "padding"
            else sum(lengths[index] for index in members)
            for members in bins
        ]
        for bins in plan
    ]
    if max(map(max, processed)) > budget or len({len(bins) for bins in plan}) > 1:
        raise RuntimeError(f"{side}: a budget is exceeded, or ranks have unequally many")
    per_rank = np.array([sum(bins) for bins in processed], dtype=np.float64)
    return Quality(
        budget_use=sum(lengths) / (len(flat) * budget),
        fitted_use=sum(lengths) / (len(flat) * max(map(max, processed))),
        imbalance=float(per_rank.max() / per_rank.mean()) - 1.0,
        micro_batches=len(plan[0]),
        seconds=min(seconds),
    )


def draw_lengths(args: argparse.Namespace, seed: int) -> tuple[list[int], int]:
    """Tokens of prompt and response together, and how many responses the limit cut."""
    generator = np.random.default_rng(seed)
    responses = generator.lognormal(np.log(args.median), args.sigma, args.responses)
    prompts = generator.integers(100, 301, args.responses)
    lengths = responses.clip(1, LONGEST_RESPONSE).astype(int) + prompts
    return [int(n) for n in lengths], int((responses > LONGEST_RESPONSE).sum())


def parse_arguments() -> argparse.Namespace:
    """Defaults that take a few seconds."""
    parser = argparse.ArgumentParser(description="Fill and balance of packed micro-batches.")
    sizes = {"responses": 1024, "budget": 32768, "median": 2000, "seeds": 10}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--sigma", type=float, default=1.0, help="of the log-normal, default 1.0")
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], help="1 to 64 by default"
    )
    args = parser.parse_args()
    if args.budget < LONGEST_RESPONSE + 300:
        parser.error(f"--budget {args.budget}: must hold the longest sample, 16,684 tokens")
    return args


def print_table(args: argparse.Namespace, samples: Sequence[Sequence[int]]) -> None:
    """One row a number of ranks; the worst of all seeds."""
    group = "".join(f"{side:>12}" for side in SIDES)
    print(f"{'':>13} |{'budget use':^44} |{'imbalance of ranks':^36} |{'':^19} |")
    print(
        f"{'DP':>4}{'possible':>9} |{group}{'fitted':>8} |{group} |{'micro-batches':^19} |"
        f"{'plan, ms':>9}"
    )
    for num_ranks in args.ranks:
        worst: dict[str, Quality] = {}
        possible = []
        for lengths in samples:
            fewest = -(-sum(lengths) // (args.budget * num_ranks)) * num_ranks
            possible.append(sum(lengths) / (fewest * args.budget))
            for side in SIDES:
                found = measure(side, lengths, args.budget, num_ranks)
                so_far = worst.get(side, found)
                worst[side] = Quality(
                    min(found.budget_use, so_far.budget_use),
                    min(found.fitted_use, so_far.fitted_use),
                    max(found.imbalance, so_far.imbalance),
                    max(found.micro_batches, so_far.micro_batches),
                    max(found.seconds, so_far.seconds),
                )
        uses = "".join(f"{worst[side].budget_use:>12.1%}" for side in SIDES)
        imbalances = "".join(f"{worst[side].imbalance:>12.2%}" for side in SIDES)
        counts = " / ".join(f"{worst[side].micro_batches}" for side in SIDES)
        ours = worst["ours"]
        marks = ("*" if ours.budget_use < USE_TARGET else " ") + (
            "!" if ours.imbalance > IMBALANCE_TARGET else " "
        )
        print(
            f"{num_ranks:>4}{min(possible):>9.1%} |{uses}{ours.fitted_use:>8.1%} |"
            f"{imbalances} |{counts:^19} |"
            f"{1e3 * ours.seconds:>9.1f} {marks}".rstrip()
        )


def main() -> None:
    """Draw the lengths of every seed, plan on all sides, print the table."""
    args = parse_arguments()
    draws = [draw_lengths(args, seed) for seed in range(args.seeds)]
    samples = [lengths for lengths, _ in draws]
    share_cut = sum(num_cut for _, num_cut in draws) / (args.seeds * args.responses)
    print(
        f"{args.responses:,} responses, log-normal of median {args.median:,} and sigma "
        f"{args.sigma:g}, {share_cut:.1%} cut at {LONGEST_RESPONSE:,};\nprompts of 100 to 300 "
        f"tokens; {np.mean(samples):,.0f} tokens a sample; budget {args.budget:,}\n"
        f"worst of {args.seeds} draws\n"
    )
    print_table(args, samples)
    print(
        "\npossible: use with the fewest micro-batches that hold all tokens and are equally many on"
        "\nevery rank. fitted: ours, were the budget no more than its largest micro-batch.\n"
        f"micro-batches: of a rank, {' / '.join(SIDES)}. "
        f"*: use below {USE_TARGET:.0%}. !: imbalance above {IMBALANCE_TARGET:.0%}."
    )


if __name__ == "__main__":
    main()
