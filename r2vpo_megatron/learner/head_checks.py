"""What must hold of the LM head in every update, checked while a run goes on.

    log-probs   none is above 0
    one pass    backward brought the slopes that forward was told to expect
    plain path  every few updates a sample of log-probs equals log_softmax of whole logits

The checks stay on the device during the schedule; one small all-reduce per update settles them,
so every rank stops, or none.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from r2vpo_megatron.parallel.vocab_softmax import VocabularyShard

SAMPLE_TOKENS = 256  # of a micro-batch, for the plain path
PLAIN_TOKENS = 64  # whose whole logits are there at a time
# Of the largest logit: a product of another number of rows may add up in another order, and in
# bf16 round to the next number, 2^-7 of it at most. A temperature divides logits and tolerance.
PLAIN_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
SLOPE_TOLERANCE = 1e-3  # autograd of a surrogate against its closed form, both fp32


@dataclass
class HeadChecks:
    """The checks of one update on one rank; values stay on the device until `settle`.

    Attributes:
        device: of the rank.
        compare_plain: whether the next micro-batch is to be compared with the plain path.
    """

    device: torch.device
    compare_plain: bool = False
    _logprobs: list[Tensor] = field(default_factory=list)
    _slopes: list[Tensor] = field(default_factory=list)
    _plain: list[Tensor] = field(default_factory=list)
    _plain_of_logit: list[Tensor] = field(default_factory=list)

    def report_slopes(self, mismatch: Tensor) -> None:
        """Take the relative difference of `ExpectedSlopes.report_mismatch`."""
        self._slopes.append(mismatch)

    def report_logprobs(self, logprobs_N: Tensor) -> None:
        """Take a micro-batch's log-probs, of which the largest counts."""
        if len(logprobs_N):
            self._logprobs.append(logprobs_N.detach().amax())

    def report_plain(
        self,
        logprobs_N: Tensor,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        targets_N: Tensor,
        shard: VocabularyShard,
        temperature: float,
        vocab_size: int,
    ) -> None:
        """Compare a sample of log-probs with the plain path, once for each `compare_plain`.

        Collective: every rank of `shard.group` must call, with the same tokens.
        """
        if not self.compare_plain or len(logprobs_N) == 0:
            return
        self.compare_plain = False
        chosen = _spread(len(logprobs_N), SAMPLE_TOKENS, logprobs_N.device)
        for part in chosen.split(PLAIN_TOKENS):
            plain, largest_logit = plain_logprobs(
                hidden_NH[part], weight_VH, targets_N[part], shard, temperature, vocab_size
            )
            difference = (plain - logprobs_N.detach()[part]).abs().amax()
            self._plain.append(difference)
            self._plain_of_logit.append(difference * temperature / largest_logit.clamp(min=1.0))

    def settle(self, dtype: torch.dtype) -> dict[str, float]:
        """Reduce the checks over all ranks and stop where one failed.

        Collective: every rank must call, also those without the head.

        Args:
            dtype: of the model's parameters.

        Returns:
            `head_check/max`: largest difference from the plain path; empty where none was made.

        Raises:
            RuntimeError: on every rank alike.
        """
        nothing = torch.full((), -torch.inf, device=self.device)
        worst = torch.stack(
            [
                torch.stack([nothing, *(value.float() for value in values)]).amax()
                for values in (self._logprobs, self._slopes, self._plain, self._plain_of_logit)
            ]
        ).nan_to_num(nan=torch.inf, neginf=-torch.inf)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        largest, slopes, plain, plain_of_logit = worst.tolist()
        if largest > 0.0:
            raise RuntimeError(f"the LM head gave a log-prob above 0: {largest:g}")
        if slopes > SLOPE_TOLERANCE:
            raise RuntimeError(
                f"backward brought the LM head other slopes than its forward pass was told to "
                f"expect, by {slopes:.2g} of the largest (allowed: {SLOPE_TOLERANCE:g})"
            )
        if plain_of_logit > PLAIN_TOLERANCE[dtype]:
            raise RuntimeError(
                f"the LM head's log-probs differ from log_softmax by {plain:.2g}, "
                f"{plain_of_logit:.2g} of the largest logit (allowed: {PLAIN_TOLERANCE[dtype]:g} "
                f"in {dtype})"
            )
        return {} if plain == -torch.inf else {"head_check/max": plain}


@torch.no_grad()
def plain_logprobs(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    shard: VocabularyShard,
    temperature: float,
    vocab_size: int,
) -> tuple[Tensor, Tensor]:
    """[N] fp32 log-probs by log_softmax of the whole logits, which every rank gathers.

    Beside them a scalar, the largest absolute logit before the temperature.

    Collective: every rank of `shard.group` must call, with the same N.

    Args:
        hidden_NH, weight_VH, targets_N, shard, temperature: as for `vocab_parallel_logprobs`.
        vocab_size: columns that stand for a token, over all shards.
    """
    logits_NV = hidden_NH @ weight_VH.t()
    if shard.group is not None and dist.get_world_size(shard.group) > 1:
        parts = [torch.empty_like(logits_NV) for _ in range(dist.get_world_size(shard.group))]
        dist.all_gather(parts, logits_NV, group=shard.group)
        logits_NV = torch.cat(parts, dim=1)
    logits_NV = logits_NV[:, :vocab_size].float()
    log_softmax_NV = (logits_NV / temperature).log_softmax(dim=1)
    return log_softmax_NV.gather(1, targets_N.unsqueeze(1)).squeeze(1), logits_NV.abs().amax()


def _spread(num_tokens: int, num_chosen: int, device: torch.device) -> Tensor:
    """At most `num_chosen` positions, evenly over the tokens."""
    if num_tokens <= num_chosen:
        return torch.arange(num_tokens, device=device)
    return torch.arange(num_chosen, device=device) * num_tokens // num_chosen
