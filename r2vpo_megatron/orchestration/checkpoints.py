"""Checkpoints of the whole run: what goes into one, how one is written, how a run goes on.

    RUN_DIR/checkpoints/iteration-000012/run_state.*    progress, lambda, guard, prompts, metrics
                                        /replay.*       the buffer, with all behaviour log-probs
                                        /learner/       weights, optimizer, random numbers, by rank
                                        /manifest.json  sizes, hashes, and what the run was

The learner's ranks copy their state and write it while training goes on; the driver's is small. A
checkpoint has its name only once all of it is on the disk, so a kill at any moment costs the one
that was being written.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from ray.exceptions import RayError

from r2vpo_megatron.checkpoint.position import Position
from r2vpo_megatron.checkpoint.run_folder import (
    CheckpointNotWritten,
    begin_checkpoint,
    discard_checkpoint,
    retain,
    seal_checkpoint,
)
from r2vpo_megatron.checkpoint.state_file import load_state, save_state
from r2vpo_megatron.config import CheckpointConfig
from r2vpo_megatron.orchestration.cluster import NoAnswer
from r2vpo_megatron.orchestration.progress import Progress, is_due
from r2vpo_megatron.replay import ReplayBuffer

LEARNER_FOLDER = "learner"


class Stateful(Protocol):
    """A part of the run that a checkpoint has."""

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        ...

    def load_state_dict(self, state: Any) -> None:
        """Continue where `state_dict` was taken."""
        ...


class SavedLearner(Protocol):
    """The learner, as LearnerGroup is one."""

    def begin_save_state(self, folder: Path) -> None:
        """Copy, and begin to write."""
        ...

    def is_state_saved(self) -> bool:
        """Whether all has been written."""
        ...

    def finish_save_state(self) -> None:
        """Wait until it has; OSError if it could not be."""
        ...


@dataclass(frozen=True)
class _Sealed:
    """A checkpoint that is on the disk."""

    folder: Path
    fault: str = ""  # why old ones are still there


@dataclass
class _Pending:
    """A checkpoint that is being written."""

    folder: Path
    position: Position
    written: Future[None]  # the driver's files
    sealed: Future[_Sealed] | None = None


class RunCheckpoints:
    """Writes the run's checkpoints while its block lasts.

    What is being written when the block ends still becomes a checkpoint, unless a signal wants the
    run to end at once, or the learner's part is not complete and a rank has failed.

    Args:
        config: when, and how many are kept.
        root: folder of the run's checkpoints.
        facts: what the run is, for the manifest; JSON values.
        learner: all its ranks.
        replay: the buffer.
        parts: of the driver, by name.
        progress: of the loop.
        say: is told what was written, and what could not be, in a line.
        resumed: checkpoint that the run has gone on from, if any.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        root: Path,
        facts: Mapping[str, Any],
        learner: SavedLearner,
        replay: ReplayBuffer,
        parts: Mapping[str, Stateful],
        progress: Progress,
        say: Callable[[str], None],
        resumed: Path | None = None,
    ) -> None:
        self._config, self._root, self._facts = config, root, facts
        self._learner, self._replay, self._parts = learner, replay, parts
        self._progress, self._say = progress, say
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: _Pending | None = None
        self._saved_at = Position.parse(resumed.name) if resumed else None
        self._is_given_up = threading.Event()
        self.seconds = 0.0  # that training has waited, since `metrics`

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            self._is_given_up.set()
        try:
            if not self._is_given_up.is_set() and not isinstance(error, NoAnswer | RayError):
                self.conclude()  # the learner is there to end its part
            self._writer.shutdown(wait=True)
        except BaseException:  # a signal: the thread would keep the process
            self._is_given_up.set()
            raise
        if self._pending is not None and self._pending.sealed is None:
            discard_checkpoint(self._pending.folder)
            self._pending = None
        self.conclude()  # says what became of it

    def after_iteration(self) -> None:
        """Write one if it is due; an iteration has just been completed."""
        if is_due(self._progress.iteration - 1, self._config.every_iterations):
            self.save()

    def save(self, *, wait: bool = False, is_asked_for: bool = False) -> bool:
        """Write one, if there is none of this position yet.

        Args:
            wait: until it is on the disk; without, and with `checkpoint.asynchronous`, only until
                the state has been copied.
            is_asked_for: by a person, who is told where there is one already.

        Returns:
            Whether all that was begun is on the disk, as far as that was waited for. If the disk is
            full or fails, what was there before stays, and `say` is told.

        Raises:
            FloatingPointError: weights or optimizer state are not finite.
        """
        start = time.perf_counter()
        is_written = self.conclude()
        position = self._progress.position
        if position == self._saved_at and is_written:
            if is_asked_for:
                self._say(f"checkpoint: {self._root / position.name} (it is there already)")
        else:
            try:
                self._begin(position)
                is_written = self._conclude(wait=wait or not self._config.asynchronous)
            except NoAnswer:  # an OSError, too
                raise
            except OSError as error:
                self._say(f"checkpoint {position.name} was not written: {error}")
                is_written = False
        self.seconds += time.perf_counter() - start
        return is_written

    def poll(self) -> None:
        """Go on with one that is being written, without waiting."""
        start = time.perf_counter()
        self._conclude(wait=False)
        self.seconds += time.perf_counter() - start

    def conclude(self) -> bool:
        """Wait for one that is being written; whether it could be, or there was none."""
        return self._conclude(wait=True)

    def metrics(self) -> dict[str, float]:
        """How long training has waited for checkpoints since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return {"time/checkpoint_seconds": seconds}

    def _begin(self, position: Position) -> None:
        folder = begin_checkpoint(self._root, position.name)
        try:
            (folder / LEARNER_FOLDER).mkdir()
            self._learner.begin_save_state(folder / LEARNER_FOLDER)
            replay = self._progress.undrawn or self._replay.state_dict()
            state = {name: part.state_dict() for name, part in self._parts.items()}
            state["progress"] = self._progress.state_dict()
        except BaseException:
            discard_checkpoint(folder)
            raise

        def write() -> None:
            save_state(folder, "run_state", state)
            save_state(folder, "replay", replay)

        self._pending = _Pending(folder, position, self._writer.submit(write))

    def _conclude(self, *, wait: bool) -> bool:
        """Take the pending checkpoint as far as it has come; False if it could not be written."""
        pending = self._pending
        if pending is None:
            return True
        try:
            if pending.sealed is None:
                if not wait and not (pending.written.done() and self._learner.is_state_saved()):
                    return True
                self._learner.finish_save_state()
                pending.written.result()
                pending.sealed = self._writer.submit(self._seal, pending)
            if not wait and not pending.sealed.done():
                return True
            sealed = pending.sealed.result()
        except NoAnswer:
            raise
        except (OSError, CheckpointNotWritten) as error:
            self._pending = None
            pending.written.exception()  # nothing is written there any more
            discard_checkpoint(pending.folder)
            self._say(f"checkpoint {pending.position.name} was not written: {error}")
            return False
        self._pending, self._saved_at = None, pending.position
        self._say(f"checkpoint: {sealed.folder}")
        if sealed.fault:
            self._say(f"old checkpoints were not removed: {sealed.fault}")
        return True

    def _seal(self, pending: _Pending) -> _Sealed:
        """Name it, then remove those that it makes old."""
        facts = {**self._facts, "written_at": time.time()}
        name, is_given_up = pending.position.name, self._is_given_up.is_set
        folder = seal_checkpoint(pending.folder, name, facts, is_given_up)
        try:
            retain(self._root, self._config.keep_last, self._config.keep_every_iterations)
        except OSError as error:
            return _Sealed(folder, fault=str(error))
        return _Sealed(folder)


def restore(
    folder: Path, replay: ReplayBuffer, parts: Mapping[str, Stateful], progress: Progress
) -> None:
    """Bring the driver's parts where they were when the checkpoint was written.

    Args:
        folder: of the checkpoint, which has been verified.
        replay: the buffer, empty.
        parts: as RunCheckpoints had them.
        progress: of the loop to come.

    Raises:
        ValueError: the state is not of such a run.
    """
    state = load_state(folder, "run_state")
    missing = sorted({*parts, "progress"} - state.keys())
    if missing:
        raise ValueError(f"{folder}: its run_state lacks {', '.join(missing)}")
    progress.load_state_dict(state["progress"])
    replay.load_state_dict(load_state(folder, "replay"))
    if progress.collected is not None:
        progress.undrawn = replay.state_dict()
    for name, part in parts.items():
        part.load_state_dict(state[name])
