"""What the learner refuses to save or to load, and that every rank refuses alike."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from r2vpo_megatron.parallel.state import destroy_parallel
from tests.distributed.learner_state_runs import (
    DP2,
    ONE,
    TP2,
    Layout,
    Learned,
    Problem,
    assert_equal_bits,
    bf16,
    cloned,
    problems,
    saved,
    start,
    tied,
    trained_pieces,
    update,
)
from tests.distributed.ranks import run_ranks

__all__ = ["problems", "saved"]  # fixtures


def save_to_a_full_disk(
    rank: int, world_size: int, init_method: str, problem: Problem, full: Path, free: Path
) -> OSError:
    _, _, saver = start(rank, world_size, init_method, TP2, problem)
    saver.begin_save(full, {})
    with pytest.raises(OSError) as caught:
        saver.finish_save()
    saver.begin_save(free, {"num_updates": 7})
    saver.finish_save()
    assert saver.load(free) == {"num_updates": 7}
    destroy_parallel()
    return OSError(*caught.value.args, caught.value.filename)


@pytest.mark.parametrize("file", ["__1_0.distcp", "learner.json", ".metadata"])
def test_a_write_that_fails_raises_on_every_rank_and_the_next_one_works(
    file: str, problems: Callable[[str], Problem], tmp_path: Path
) -> None:
    full, free = tmp_path / "full", tmp_path / "free"
    full.mkdir()
    free.mkdir()
    (full / file).symlink_to("/dev/full")
    errors = run_ranks(2, save_to_a_full_disk, problems(TP2.checkpoint), full, free)
    assert [error.errno for error in errors] == [errno.ENOSPC, errno.ENOSPC]


def save_what_is_not_finite(
    rank: int, world_size: int, init_method: str, problem: Problem, folder: Path
) -> list[str]:
    """Rank 1 alone has it: in a weight, then in a moment."""
    actor, state, saver = start(rank, world_size, init_method, DP2, problem)
    update(actor, state, DP2, problem.mini_batches[0])
    messages = []
    moments = saver._optimizers[0].state
    for spoilt, value in (("exp_avg", math.nan), ("exp_avg_sq", math.inf)):
        tensor = next(iter(moments.values()))[spoilt]
        kept = tensor[-1].item()
        if rank == 1:
            tensor[-1] = value
        with pytest.raises(FloatingPointError) as caught:
            saver.begin_save(folder, {})
        messages.append(str(caught.value))
        tensor[-1] = kept
    if state.is_writer:
        next(actor._model.chunks[0].parameters()).data[3, 1] = math.nan
    with pytest.raises(FloatingPointError) as caught:
        saver.begin_save(folder, {})
    messages.append(str(caught.value))
    assert saver.is_saved()
    destroy_parallel()
    return messages


def test_what_is_not_finite_is_refused_on_every_rank(
    problems: Callable[[str], Problem], tmp_path: Path
) -> None:
    by_rank = run_ranks(2, save_what_is_not_finite, problems(DP2.checkpoint), tmp_path)
    assert by_rank[0] == by_rank[1]
    first, second, third = by_rank[0]
    assert first.startswith("optimizer.state.exp_avg.")
    assert second.startswith("optimizer.state.exp_avg_sq.")
    assert third.startswith("embedding.word_embeddings.weight (box at [0, 0] of sizes [256, 32])")
    assert list(tmp_path.iterdir()) == []


def lose_a_rank(
    rank: int, world_size: int, init_method: str, problem: Problem, folder: Path
) -> str:
    """Rank 1 ends between begin and finish."""
    _, _, saver = start(rank, world_size, init_method, DP2, problem)
    saver.begin_save(folder, {})
    if rank == 1:
        return ""
    with pytest.raises(RuntimeError) as caught:
        saver.finish_save()
    return str(caught.value)


def test_a_rank_that_is_gone_does_not_keep_the_others(
    problems: Callable[[str], Problem], tmp_path: Path
) -> None:
    message, _ = run_ranks(2, lose_a_rank, problems(DP2.checkpoint), tmp_path, timeout_seconds=45.0)
    assert message
    assert not (tmp_path / ".metadata").exists()


class MakesFolder:
    """Pickled as a call of os.mkdir."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def cut_short(folder: Path) -> None:
    path = folder / "__0_0.distcp"
    os.truncate(path, path.stat().st_size // 2)


def call_in_metadata(folder: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(MakesFolder(folder / "made")))


def call_in_tensor(folder: Path) -> None:
    """The class of a tensor's storage becomes another one of as many letters."""
    path = folder / "__0_0.distcp"
    data = path.read_bytes()
    assert b"ctorch\nFloatStorage\n" in data
    path.write_bytes(data.replace(b"ctorch\nFloatStorage\n", b"cosxxx\nmkdirStorage\n", 1))


def no_learner_file(folder: Path) -> None:
    (folder / "learner.json").unlink()


def other_learner_file(folder: Path) -> None:
    (folder / "learner.json").write_text('{"format": 1}')


def broken_generators(folder: Path) -> None:
    learner = json.loads((folder / "learner.json").read_text())
    learner["random_states"][0]["torch"]["cpu"] = "AAAA"
    (folder / "learner.json").write_text(json.dumps(learner))


def no_metadata(folder: Path) -> None:
    (folder / ".metadata").unlink()


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut_short": (
        cut_short,
        r"__0_0.distcp: has .* bytes, but tensor '.*' ends at byte .* cut short",
    ),
    "call_in_metadata": (call_in_metadata, r".metadata: .*'posix.mkdir'"),
    "call_in_tensor": (call_in_tensor, r"__0_0.distcp: .*'osxxx.mkdirStorage'"),
    "no_metadata": (no_metadata, r"has no .metadata"),
    "no_learner_file": (no_learner_file, r"No such file .*learner.json"),
    "other_learner_file": (other_learner_file, r"learner.json: is not what a learner writes"),
    "broken_generators": (broken_generators, r"random generators is broken"),
}


def load_and_be_refused(
    rank: int,
    world_size: int,
    init_method: str,
    layout: Layout,
    problem: Problem,
    folders: Sequence[Sequence[Path]],
) -> list[str]:
    """Messages, one for each entry of `folders`, of which each rank has one of its own.

    What is trained is as it was, but where a tensor's own bytes are wrong.
    """
    _, _, saver = start(rank, world_size, init_method, layout, problem)
    messages = []
    for by_rank in folders:
        before = cloned(trained_pieces(saver))
        with pytest.raises((ValueError, OSError)) as caught:
            saver.load(by_rank[rank])
        messages.append(str(caught.value))
        if rank == 0 and by_rank[0].name != "call_in_tensor":
            assert_equal_bits(trained_pieces(saver), before)
    destroy_parallel()
    return messages


def test_what_is_damaged_is_refused_by_name_on_every_rank(
    saved: Callable[[Layout], tuple[Path, list[Learned]]],
    problems: Callable[[str], Problem],
    tmp_path: Path,
) -> None:
    good, _ = saved(DP2)
    folders = []
    for name, (damage, _) in DAMAGES.items():
        shutil.copytree(good, tmp_path / name)
        damage(tmp_path / name)
        folders.append((tmp_path / name, good))  # rank 1 sees nothing of it
    problem = problems(DP2.checkpoint)
    first, second = run_ranks(2, load_and_be_refused, DP2, problem, folders)
    assert first == second
    for message, (_, expected) in zip(first, DAMAGES.values(), strict=True):
        assert re.search(expected, message), message
    assert not (tmp_path / "call_in_metadata" / "made").exists()


def test_another_model_or_dtype_is_refused(
    saved: Callable[[Layout], tuple[Path, list[Learned]]], problems: Callable[[str], Problem]
) -> None:
    folder, _ = saved(ONE)
    tied_folder, _ = saved(tied(ONE))
    ((dtype,),) = run_ranks(1, load_and_be_refused, bf16(ONE), problems(ONE.checkpoint), [[folder]])
    assert re.search(r"is torch.float32 \[256, 32\], not torch.bfloat16 \[256, 32\]", dtype)
    ((model,),) = run_ranks(1, load_and_be_refused, ONE, problems(ONE.checkpoint), [[tied_folder]])
    assert re.search(r"has no tensor 'output_layer.weight'", model)
