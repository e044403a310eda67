"""Rows of a data set on the Hugging Face hub, or of a local copy of its repository."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_ROWS_PER_BATCH = 4096
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_LOCAL_FILE = "or give a local .parquet or .jsonl file of it"


def read_hub_rows(
    hub_id: str, split: str, config_name: str | None = None, revision: str | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (row number from 1, row) of one split.

    The files are downloaded once, into the cache of `datasets`, and mapped from there: memory stays
    bounded. With `HF_HUB_OFFLINE=1` that cache is all that is asked. No code of the repository is
    run.

    Args:
        hub_id: `owner/name`, or a local folder laid out as such a repository.
        split: Such as "train".
        config_name: Of a data set with several configurations.
        revision: Branch, tag or commit; the main branch by default.

    Raises:
        ValueError: The package `datasets` is missing, the hub cannot be reached, or it has no such
            data set, configuration or split; says what to do instead.
    """
    name = hub_id if config_name is None else f"{hub_id} ({config_name})"
    if not _HUB_ID.fullmatch(hub_id) and not Path(hub_id).is_dir():
        raise ValueError(
            f"data set {hub_id!r}: neither a folder nor a hub id; valid: owner/name, {_LOCAL_FILE}"
        )
    dataset = _load(hub_id, split, config_name, revision, name)
    if len(dataset) == 0:
        raise ValueError(f"data set {name}, split {split}: empty; valid: at least one row")
    return _rows(dataset)


def _rows(dataset: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    for table in dataset.with_format("arrow").iter(_ROWS_PER_BATCH):
        for row in table.to_pylist():
            number += 1
            yield number, row


def _load(hub_id: str, split: str, config_name: str | None, revision: str | None, name: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"data set {name}: the hub is read through the package datasets, which cannot be "
            f"imported ({_short(error)}): pip install 'r2vpo-megatron[data]', {_LOCAL_FILE}"
        ) from error
    try:
        return datasets.load_dataset(hub_id, name=config_name, split=split, revision=revision)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise ValueError(
            f"data set {name}: the hub has none of this name that is open to you "
            f"({_short(error)}); valid: a public owner/name, after `hf auth login` a private "
            f"or gated one to which you were admitted, {_LOCAL_FILE}"
        ) from error
    except datasets.exceptions.DatasetGenerationError as error:
        cause = error.__cause__ or error
        raise ValueError(f"data set {name}: its files cannot be read: {_short(cause)}") from error
    except (ConnectionError, TimeoutError) as error:
        raise ValueError(
            f"data set {name}: the hub cannot be reached ({_short(error)}); valid: a network "
            "and no HF_HUB_OFFLINE=1 (with it, only what an earlier run has downloaded), "
            f"{_LOCAL_FILE}"
        ) from error
    except (ValueError, OSError) as error:  # no such split or configuration; an empty folder
        raise ValueError(f"data set {name}, split {split!r}: {_short(error)}") from error


def _short(error: BaseException) -> str:
    """The first two lines: the second often names what is there."""
    return " ".join((str(error).strip() or repr(error)).splitlines()[:2])
