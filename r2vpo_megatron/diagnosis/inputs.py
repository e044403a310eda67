"""Model, tokenizer and prompts of a run, and the room that its checkpoints take."""

from __future__ import annotations

from r2vpo_megatron.config import RunConfig
from r2vpo_megatron.diagnosis.findings import Finding, fault, ok
from r2vpo_megatron.models.spec import ModelSpec
from r2vpo_megatron.orchestration.inputs import RunInputs, read_inputs

OPTIMIZER_BYTES = 12  # per parameter: fp32 master weight and AdamW's two moments
BYTES = {"float32": 4, "bfloat16": 2}


def check_inputs(config: RunConfig) -> tuple[RunInputs | None, list[Finding]]:
    """Read what a run reads; None and the reason if that is refused."""
    try:
        inputs = read_inputs(config)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        return None, [fault("inputs", str(error), "correct the recipe or the files that it names")]
    spec, prompts = inputs.spec, inputs.train_prompts
    lengths = [len(prompt.token_ids) for prompt in prompts]
    largest = max(max(prompt.token_ids) for prompt in prompts)
    if largest >= spec.vocab_size:
        text = f"its token {largest} is beyond the model's vocabulary of {spec.vocab_size}"
        return inputs, [fault("tokenizer", text, "use the tokenizer of this very model")]
    return inputs, [
        ok("architecture", f"{spec.architecture}, {spec.num_parameters:,} parameters"),
        ok(
            "tokenizer",
            f"its ids fit the vocabulary of {spec.vocab_size:,}; responses end with "
            f"{', '.join(map(str, inputs.tokenizer.stop_token_ids))}",
        ),
        ok(
            "prompts",
            f"{len(prompts):,} to train on, of {min(lengths)} to {max(lengths)} tokens; "
            f"{len(inputs.held_out_prompts):,} held out",
        ),
    ]


def checkpoint_bytes(config: RunConfig, spec: ModelSpec) -> int:
    """What a run's checkpoints take at most at a time, and its final weights."""
    weights = spec.num_parameters * BYTES[config.model.dtype]
    of_optimizer = OPTIMIZER_BYTES if config.model.dtype != "float32" else OPTIMIZER_BYTES - 4
    state = weights + spec.num_parameters * of_optimizer
    every = config.checkpoint.keep_every_iterations
    num_kept = config.checkpoint.keep_last + (config.train.num_iterations // every if every else 0)
    return state * (num_kept + 1) + 2 * weights  # one is written before the oldest goes
