"""The sections of a run's configuration on how it survives: checkpoints and guards."""

from __future__ import annotations

from dataclasses import dataclass

from r2vpo_megatron.config.checks import require, require_positive


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints of the whole run, from which it goes on as if it had not been interrupted."""

    every_iterations: int = 10
    """Write one after every so many iterations; 0: only when a signal asks, and at the end."""
    keep_last: int = 2
    """The newest ones that are kept."""
    keep_every_iterations: int = 0
    """Those of iterations that this divides are kept for good; 0: none."""
    asynchronous: bool = True
    """Write while training goes on, from a copy in host memory; else training waits."""
    grace_seconds: float = 120.0
    """After SIGTERM or Ctrl-C: time for the checkpoint and the end of all processes, in seconds."""
    resume: str = ""
    """auto: go on where the run of output.run_name stopped, or begin; a folder: of a run or of one
    checkpoint; empty: begin a new run."""
    allow_changes: str = ""
    """Differences from the saved run that are accepted, as its refusal lists them, with commas."""
    export_every_iterations: int = 0
    """Also write the weights in Hugging Face format every so many iterations; 0: only when SIGUSR2
    asks, and at the end."""

    def __post_init__(self) -> None:
        for name in ("every_iterations", "keep_every_iterations", "export_every_iterations"):
            value = getattr(self, name)
            require(value >= 0, f"checkpoint.{name}", value, "at least 0")
        require_positive("checkpoint", self, "keep_last")
        grace = self.grace_seconds
        require(grace > 0, "checkpoint.grace_seconds", grace, "above 0")

    @property
    def allowed_changes(self) -> frozenset[str]:
        """`allow_changes`, one by one."""
        names = (name.strip() for name in self.allow_changes.split(","))
        return frozenset(name for name in names if name)


@dataclass(frozen=True)
class GuardConfig:
    """What is done about updates that are not sound."""

    max_skipped_updates: int = 3
    """Updates in a row that may be skipped because loss, gradient or log-probs are not finite;
    one more ends the run."""
    gradient_norm_alarm: float = 0.0
    """Gradient norm above which a warning is printed; 0: none."""
    ratio_alarm: float = 0.0
    """E[(rho - 1)^2] of an update above which a warning is printed; 0: none."""

    def __post_init__(self) -> None:
        for name in ("max_skipped_updates", "gradient_norm_alarm", "ratio_alarm"):
            value = getattr(self, name)
            require(value >= 0, f"guard.{name}", value, "at least 0")
