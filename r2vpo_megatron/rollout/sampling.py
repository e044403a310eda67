"""How responses are drawn from the policy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingSettings:
    """Sampling distribution and length limit of a generation call.

    Attributes:
        max_response_tokens: limit on the response, in tokens, the stop token included.
        temperature: divides the logits, in [0.01, 2]; the reported log-probs are those after it.
        top_p: nucleus mass; 1.0 is off.
        top_k: candidates kept; 0 is off.
        stop_token_ids: a response ends with the first of these, which it keeps.
        greedy: take the most probable token instead; log-probs are then those at temperature 1.

    Raises:
        ValueError: a field is out of range, or greedy is combined with another choice.
    """

    max_response_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_token_ids: tuple[int, ...] = ()
    greedy: bool = False

    def __post_init__(self) -> None:
        if self.max_response_tokens < 1:
            raise ValueError(f"max_response_tokens={self.max_response_tokens}: must be at least 1")
        # vLLM refuses temperatures above 2, and raises small ones to 0.01 or takes them for greedy,
        # so that log-probs would silently belong to another temperature.
        if not 0.01 <= self.temperature <= 2.0:
            raise ValueError(
                f"temperature={self.temperature}: must be in [0.01, 2] "
                "(for the most probable token use greedy=True)"
            )
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p={self.top_p}: must be in (0, 1]; 1 is off")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: must be at least 0; 0 is off")
        if any(token_id < 0 for token_id in self.stop_token_ids):
            raise ValueError(f"stop_token_ids={self.stop_token_ids}: must not be negative")
        if self.greedy and (self.temperature, self.top_p, self.top_k) != (1.0, 1.0, 0):
            raise ValueError(
                f"greedy=True with temperature={self.temperature}, top_p={self.top_p}, "
                f"top_k={self.top_k}: leave these three at their defaults"
            )

    @classmethod
    def for_training(
        cls,
        max_response_tokens: int,
        stop_token_ids: tuple[int, ...],
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
    ) -> SamplingSettings:
        """Settings whose reported log-probs are those of the sampling distribution.

        Raises:
            ValueError: as the constructor, and as `require_trainable`.
        """
        settings = cls(max_response_tokens, temperature, top_p, top_k, stop_token_ids)
        settings.require_trainable()
        return settings

    def require_trainable(self) -> None:
        """Refuse what the learner cannot recompute: truncated or greedy sampling.

        The importance ratio divides by the probability with which a token was drawn. Truncation
        renormalises over a set of tokens that the learner does not know.

        Raises:
            ValueError: top_p below 1, top_k set, or greedy.
        """
        if self.top_p < 1.0:
            raise ValueError(f"top_p={self.top_p}: training samples need top_p 1.0")
        if self.top_k > 0:
            raise ValueError(f"top_k={self.top_k}: training samples need top_k 0 (off)")
        if self.greedy:
            raise ValueError("greedy=True: training samples must be drawn at random")
