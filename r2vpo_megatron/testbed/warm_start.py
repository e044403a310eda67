"""Supervised warm start of a tiny model, and the sampled accuracy that it reaches.

Reinforcement learning needs room to show: the model should answer 15-35% of the held-out questions
at temperature 1.0. Two things make that room. Training stops before the model has mastered the
task, and some steps of its demonstrations are wrong, as people's are, so that it knows better than
it samples. Accuracy climbs at another step for each architecture and seed, so the stop is decided
by measuring accuracy on questions of the training split, not by a number of steps.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from r2vpo_megatron.testbed.arithmetic import Problem, solve_with_slips
from r2vpo_megatron.testbed.tokenizer import TURN_END, prompt_token_ids

IGNORED_TARGET = -100  # what transformers' loss skips
MAX_RESPONSE_TOKENS = 48  # a worked solution takes at most 34
_ANSWER = re.compile(r"^Answer: (\d+)$", re.MULTILINE)


@dataclass(frozen=True)
class WarmStartSettings:
    """How hard the supervised training is, and where it stops."""

    target_accuracy: float = 0.24  # at temperature 1.0, on probe questions
    slip_probability: float = 0.25  # per step of a demonstration; bounds accuracy by 0.75 ** 3
    max_steps: int = 1000
    batch_size: int = 32
    learning_rate: float = 2e-3
    num_warmup_steps: int = 20
    max_gradient_norm: float = 1.0
    num_problems: int = 8192
    first_probe_step: int = 300
    probe_every_steps: int = 20
    num_probe_problems: int = 512


@dataclass(frozen=True)
class WarmStartResult:
    """Where the supervised training stopped."""

    num_steps: int
    last_loss: float  # nats a response token
    probe_accuracy: float  # at temperature 1.0, on questions of the training split


def train(
    model: Any,
    tokenizer: Any,
    problems: Sequence[Problem],
    probe_problems: Sequence[Problem],
    settings: WarmStartSettings,
    seed: int,
) -> WarmStartResult:
    """Train `model` in place on worked solutions until it is right often enough.

    AdamW at a constant learning rate after a linear warm-up. The loss counts response tokens
    only, the end-of-turn token included, so the model learns to stop.

    Args:
        model: a transformers causal language model, fp32.
        tokenizer: its tokenizer.
        problems: what to learn from, each once an epoch.
        probe_problems: training-split questions that decide when to stop.
        settings: batch size, learning rate, where to stop.
        seed: order of the problems and of the probes' sampling. The same seed gives the same
            weights on one machine with one number of threads.

    Raises:
        RuntimeError: if the target accuracy is not reached within `settings.max_steps`.
    """
    token_ids, targets = supervised_tensors(
        tokenizer, problems, settings.slip_probability, random.Random(seed)
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.01
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / settings.num_warmup_steps)
    )
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    accuracy = 0.0
    for step in range(1, settings.max_steps + 1):
        if len(order) < settings.batch_size:
            order = torch.randperm(len(token_ids), generator=generator)
        batch, order = order[: settings.batch_size], order[settings.batch_size :]
        model.train()
        # Padding is on the right and never a target, and attention is causal: no mask needed.
        loss = model(input_ids=token_ids[batch], labels=targets[batch]).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_gradient_norm)
        optimizer.step()
        scheduler.step()
        if step >= settings.first_probe_step and step % settings.probe_every_steps == 0:
            accuracy = measure_accuracy(model, tokenizer, probe_problems, seed=step)
            if accuracy >= settings.target_accuracy:
                return WarmStartResult(step, float(loss.detach()), accuracy)
    raise RuntimeError(
        f"the warm start reached accuracy {accuracy:.2f} in {settings.max_steps} steps; "
        f"wanted {settings.target_accuracy:.2f}"
    )


def measure_accuracy(
    model: Any,
    tokenizer: Any,
    problems: Sequence[Problem],
    seed: int = 0,
    greedy: bool = False,
    samples_per_problem: int = 1,
) -> float:
    """Return the share of responses whose `Answer: N` line is right; leaves the RNG as it was.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer, padding on the left.
        problems: what to ask.
        seed: seed of the sampling at temperature 1.0; unused if `greedy`.
        greedy: take the likeliest token instead of sampling.
        samples_per_problem: responses to each question.
    """
    prompts = [_prompt(tokenizer, problem) for problem in problems]
    prompts = [ids for ids in prompts for _ in range(samples_per_problem)]
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    sampling = {"do_sample": False} if greedy else {"do_sample": True, "top_k": 0, "top_p": 1.0}
    config = GenerationConfig(
        max_new_tokens=MAX_RESPONSE_TOKENS,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )
    model.eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        output = model.generate(**batch, generation_config=config)
    responses = tokenizer.batch_decode(
        output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
    )
    truths = [problem.ground_truth for problem in problems for _ in range(samples_per_problem)]
    return sum(is_correct(*pair) for pair in zip(responses, truths, strict=True)) / len(truths)


def is_correct(response: str, ground_truth: str) -> bool:
    """Whether the last `Answer: N` line of a response gives the ground truth."""
    answers = _ANSWER.findall(response)
    return bool(answers) and answers[-1] == ground_truth


def _prompt(tokenizer: Any, problem: Problem) -> list[int]:
    return prompt_token_ids(tokenizer, [{"role": "user", "content": problem.question}])


def supervised_tensors(
    tokenizer: Any, problems: Sequence[Problem], slip_probability: float, rng: random.Random
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the supervised loss needs.

    Args:
        tokenizer: a transformers tokenizer.
        problems: one row each.
        slip_probability: of each step of a demonstration, see `solve_with_slips`.
        rng: decides the slips.

    Returns:
        Token ids and targets, both [problems, longest] int64, padded on the right; a target is
        the row's own token at a response position and IGNORED_TARGET elsewhere.
    """
    prompts = [_prompt(tokenizer, problem) for problem in problems]
    texts = [solve_with_slips(p, slip_probability, rng) + TURN_END for p in problems]
    responses = tokenizer(texts, add_special_tokens=False)["input_ids"]
    longest = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    token_ids = torch.full((len(problems), longest), tokenizer.pad_token_id)
    targets = torch.full((len(problems), longest), IGNORED_TARGET)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        start, end = len(prompt), len(prompt) + len(response)
        token_ids[row, :end] = torch.tensor(prompt + response)
        targets[row, start:end] = torch.tensor(response)
    return token_ids, targets
