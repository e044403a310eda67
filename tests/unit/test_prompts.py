"""Prompt files and the prompt stream."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r2vpo_megatron.data.prompts import PromptStream, RawPrompt, load_prompts

GOOD: dict[str, Any] = {"prompt_id": "g", "prompt": "1+1?", "ground_truth": "2"}


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "file.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_both_forms_of_a_line_and_the_dapo_schema(tmp_path: Path) -> None:
    user = {"role": "user", "content": "1+1?"}
    system = {"role": "system", "content": ""}
    dapo = {
        "data_source": "math_dapo",
        "prompt": [user],
        "reward_model": {"ground_truth": "34", "style": "rule"},
        "extra_info": {"index": "u"},
    }
    path = write(
        tmp_path, GOOD, "", {"messages": [system, user], "ground_truth": 7, "level": 3}, dapo
    )
    first, second, third = load_prompts(path)
    assert first == RawPrompt("g", (user,), "2", {})
    assert second == RawPrompt("file-0000003", (system, user), "7", {"level": 3})
    assert second.text == "1+1?"
    assert third.ground_truth == "34"
    assert third.messages == (user,)
    assert third.extra["data_source"] == "math_dapo"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": ', "not a JSON object: .* at column"),
        ("[1]", r"got \[1\] \(list\); valid: a JSON object"),
        ({"prompt": "q"}, "field ground_truth: got nothing; valid: a non-empty string or an int"),
        ({"prompt": "q", "ground_truth": " "}, "field ground_truth: got ' '"),
        ({"prompt": "q", "ground_truth": True}, r"field ground_truth: got True \(bool\)"),
        ({"prompt": "q", "ground_truth": 0.5}, r"field ground_truth: got 0.5 \(float\)"),
        ({"prompt": "q", "ground_truth": [2]}, r"field ground_truth: got \[2\] \(list\)"),
        ({"prompt": "q", "reward_model": {}}, "field reward_model.ground_truth: got nothing"),
        ({"ground_truth": "1"}, "field messages, prompt: got neither; valid: exactly one"),
        ({"prompt": "q", "messages": [], "ground_truth": "1"}, ".*got both; valid: exactly one"),
        ({"messages": [], "ground_truth": "1"}, "field messages: got .*valid: a non-empty list"),
        ({"messages": ["q"], "ground_truth": "1"}, r"field messages\[0\]: got 'q'"),
        (
            {"messages": [{"role": "usr", "content": "q"}], "ground_truth": "1"},
            r"field messages\[0\].role: got 'usr' \(str\); valid: system \| user \| assistant",
        ),
        (
            {"messages": [{"role": "user", "content": 1}], "ground_truth": "1"},
            r"field messages\[0\].content: got 1 \(int\); valid: a string",
        ),
        (
            {"messages": [{"role": "assistant", "content": "q"}], "ground_truth": "1"},
            "field messages: .*valid: the last message is the user's",
        ),
        ({"prompt_id": "", "prompt": "q", "ground_truth": "1"}, "field prompt_id: got ''"),
        (
            {"prompt": "q\ud800", "ground_truth": "1"},
            r"field prompt\[0\].content: got 'q.*valid: text that UTF-8 can hold",
        ),
        ({"prompt": "q", "ground_truth": "\udfff"}, "field ground_truth: .*text that UTF-8 can"),
        ({**GOOD, "prompt_id": "\udfff"}, "field prompt_id: .*text that UTF-8 can hold"),
        ({**GOOD, "ground_truth": "3"}, "field prompt_id: 'g' is taken by line 1"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, row: Any, message: str) -> None:
    path = write(tmp_path, GOOD, row)
    with pytest.raises(ValueError, match=f"^{path}:2: {message}"):
        load_prompts(path)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="empty; valid: at least one"):
        load_prompts(write(tmp_path, ""))
    with pytest.raises(ValueError, match="no such file"):
        load_prompts(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"type '.csv'; valid: .jsonl, .parquet"):
        load_prompts(tmp_path / "none.csv")
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match=r"bad.jsonl:1: not UTF-8 \(byte 12\)"):
        load_prompts(bad)


def test_parquet_without_pyarrow_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    path = tmp_path / "p.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="p.parquet: reading .parquet needs the package pyarrow"):
        load_prompts(path)


def test_parquet_rows_go_through_the_same_checks(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    user = {"role": "user", "content": "1+1?"}
    rows = [{"prompt": [user], "reward_model": {"ground_truth": "2"}, "data_source": "d"}]
    path = tmp_path / "p.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    (prompt,) = load_prompts(path)
    assert prompt == RawPrompt(
        "p-0000001",
        (user,),
        "2",
        {"reward_model": {"ground_truth": "2"}, "data_source": "d"},
    )


def test_a_parquet_column_of_float_answers_is_read_as_integers(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "p.parquet"
    table = pyarrow.table({"prompt": ["a", "b", "c"], "ground_truth": [27.0, -3.0, 0.5]})
    parquet.write_table(table.slice(0, 2), path)
    assert [prompt.ground_truth for prompt in load_prompts(path)] == ["27", "-3"]
    parquet.write_table(table, path)
    with pytest.raises(ValueError, match=f"^{path}:3: field ground_truth: got 0.5"):
        load_prompts(path)


def prompts(count: int) -> list[RawPrompt]:
    message = {"role": "user", "content": "q"}
    return [RawPrompt(f"p{i:03d}", (message,), "1") for i in range(count)]


def ids(stream: PromptStream[RawPrompt], num_batches: int) -> list[str]:
    return [p.prompt_id for _ in range(num_batches) for p in stream.next_batch()]


@given(
    count=st.integers(1, 12),
    batch=st.integers(1, 30),
    seed=st.integers(0, 5),
    cut=st.integers(0, 8),
)
def test_stream_visits_each_prompt_once_an_epoch_and_resumes(
    count: int, batch: int, seed: int, cut: int
) -> None:
    stream = PromptStream(prompts(count), seed, batch)
    served = ids(stream, 10)
    assert len(served) == 10 * batch
    for start in range(0, len(served) - count + 1, count):
        assert sorted(served[start : start + count]) == [p.prompt_id for p in prompts(count)]
    partial = PromptStream(prompts(count), seed, batch)
    ids(partial, cut)
    state = json.loads(json.dumps(partial.state_dict()))
    resumed = PromptStream(prompts(count), seed, batch)
    resumed.load_state_dict(state)
    assert ids(resumed, 10 - cut) == served[cut * batch :]


@given(
    count=st.integers(1, 9),
    seed=st.integers(0, 3),
    sizes=st.lists(st.integers(0, 11), max_size=6),
    number=st.integers(0, 60),
)
def test_prompt_number_n_is_the_same_whatever_was_served_before(
    count: int, seed: int, sizes: list[int], number: int
) -> None:
    reference = ids(PromptStream(prompts(count), seed, 61), 1)
    stream = PromptStream(prompts(count), seed, 4)
    served: list[str] = []
    for size in sizes:  # resumed at any prompt, not at a batch's end only
        state = json.loads(json.dumps(stream.state_dict()))
        stream = PromptStream(prompts(count), seed, 7)
        stream.load_state_dict(state)
        served += [prompt.prompt_id for prompt in stream.take(size)]
        assert stream.prompt_at(number).prompt_id == reference[number]
    assert stream.num_served == len(served) == sum(sizes)
    assert served == reference[: len(served)]


@given(
    count=st.integers(1, 9),
    batch=st.integers(1, 10),
    num_workers=st.integers(1, 5),
    other_workers=st.integers(1, 5),
)
def test_any_number_of_workers_serves_the_same_sequence(
    count: int, batch: int, num_workers: int, other_workers: int
) -> None:
    reference = ids(PromptStream(prompts(count), 1, batch), 6)
    served: list[str] = []
    state = PromptStream(prompts(count), 1, batch).state_dict()
    for number_now in (num_workers, other_workers):  # a run goes on with another number of them
        streams = [PromptStream(prompts(count), 1, batch) for _ in range(number_now)]
        for stream in streams:
            stream.load_state_dict(state)
        for _ in range(3):
            shares = [stream.next_batch(w, number_now) for w, stream in enumerate(streams)]
            dealt = [shares[i % number_now][i // number_now] for i in range(batch)]
            assert sum(map(len, shares)) == batch
            served += [prompt.prompt_id for prompt in dealt]
        states = [stream.state_dict() for stream in streams]
        assert all(other == states[0] for other in states)
        state = states[0]
    assert served == reference


def test_the_stream_refuses_what_is_no_position() -> None:
    stream = PromptStream(prompts(3), 0, 2)
    with pytest.raises(ValueError, match="number: -1; valid: 0 or more"):
        stream.prompt_at(-1)
    with pytest.raises(ValueError, match="count: -2; valid: 0 or more"):
        stream.take(-2)
    for worker, num_workers in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"worker: {worker}; valid: 0 to num_workers - 1"):
            stream.next_batch(worker, num_workers)
    state = stream.state_dict()
    with pytest.raises(ValueError, match="saved position is -1; valid: 0 or more"):
        stream.load_state_dict({**state, "position": -1})
    with pytest.raises(ValueError, match="saved epoch is None; valid: 0 or more"):
        stream.load_state_dict({**state, "epoch": None})
    with pytest.raises(ValueError, match="the saved run had None"):
        stream.load_state_dict({})


def test_epochs_and_seeds_differ_in_order() -> None:
    orders = {tuple(ids(PromptStream(prompts(20), seed, 20), 1)) for seed in range(5)}
    stream = PromptStream(prompts(20), 0, 20)
    orders |= {tuple(ids(stream, 1)) for _ in range(5)}
    assert len(orders) == 9  # seed 0's first epoch is in both sets
    assert [p.prompt_id for p in prompts(20)] not in map(list, orders)


def test_stream_refuses_what_it_cannot_serve_or_resume() -> None:
    with pytest.raises(ValueError, match="prompts: empty"):
        PromptStream(prompts(0), 0, 1)
    with pytest.raises(ValueError, match="prompts_per_iteration: 0"):
        PromptStream(prompts(1), 0, 0)
    with pytest.raises(ValueError, match="id occurs twice"):
        PromptStream(prompts(1) * 2, 0, 1)
    state = PromptStream(prompts(3), 0, 1).state_dict()
    with pytest.raises(ValueError, match="seed is 1, the saved run had 0"):
        PromptStream(prompts(3), 1, 1).load_state_dict(state)
    # Ids made of row numbers are the same in another file: the contents count, too.
    message = {"role": "user", "content": "q"}
    for others in (
        prompts(4),
        [*prompts(2), RawPrompt("p002", ({"role": "user", "content": "r"},), "1")],
        [*prompts(2), RawPrompt("p002", (message,), "2")],
    ):
        with pytest.raises(ValueError, match="prompts_sha256"):
            PromptStream(others, 0, 1).load_state_dict(state)
    PromptStream([*prompts(2), RawPrompt("p002", (message,), "1")], 0, 1).load_state_dict(state)
