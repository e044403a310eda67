"""What is checked before an evaluation starts a process: nothing here starts one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from r2vpo_megatron.evaluation.model_folder import find_model, fingerprint_model
from r2vpo_megatron.evaluation.options import EvaluationOptions
from r2vpo_megatron.evaluation.response import ResponseRecord
from r2vpo_megatron.orchestration.evaluation_inputs import PreparedEvaluation, prepare_evaluation
from r2vpo_megatron.testbed.tiny_model import make_tiny_model

POSITIONS = 1024  # of the tiny model


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "pangu"
    make_tiny_model(folder, "pangu", warm_start=False)
    return folder


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    path = tmp_path / "sums.jsonl"
    rows = [{"id": f"s{i}", "problem": f"{i}+{i}=?", "answer": str(2 * i)} for i in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def options(model: Path, problems: Path) -> EvaluationOptions:
    return EvaluationOptions(
        model=str(model),
        benchmarks=("sums",),
        benchmark_files=(("sums", str(problems)),),
        num_samples=2,
        device="cpu",
    )


@pytest.fixture
def prepare(tmp_path: Path) -> Callable[..., PreparedEvaluation]:
    def call(options: EvaluationOptions, resume: bool = False) -> PreparedEvaluation:
        with prepare_evaluation(options, tmp_path / "out", resume=resume) as prepared:
            return prepared

    return call


def test_what_is_sampled(options: Any, prepare: Any, model: Path, tmp_path: Path) -> None:
    prepared = prepare(replace(options, system="Be brief.", max_response_tokens=7))
    (part,) = prepared.benchmarks
    assert [prompt.prompt_id for prompt in part.prompts] == ["s0", "s1", "s2", "s3", "s4"]
    prompt = part.prompts[3]
    assert prompt.ground_truth == "6"
    assert "\n\n3+3=?\n\nRemember to put" in prompt.text
    tokenizer = AutoTokenizer.from_pretrained(model)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": prompt.text},
    ]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    expected = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert list(prompt.token_ids) == expected
    longest = max(len(prompt.token_ids) for prompt in part.prompts)
    assert prepared.config.rollout.max_prompt_tokens == longest
    assert prepared.config.rollout.max_response_tokens == 7
    assert len(prepared.evaluation.remaining) == 10
    written = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert written["deciding"]["--system"] == "Be brief."
    assert written["options"]["num_engines"] == 1
    assert list((tmp_path / "out").iterdir()) == [tmp_path / "out" / "settings.json"]  # no lock


def test_responses_may_take_what_the_positions_leave(options: Any, prepare: Any) -> None:
    rollout = prepare(options).config.rollout
    assert rollout.max_prompt_tokens + rollout.max_response_tokens == POSITIONS


@pytest.mark.parametrize(
    ("positions", "tokens"),
    # The prompts are a few hundred tokens; whole multiples of 1024 are what is left.
    [(8192, 7 * 1024), (32768, 31 * 1024), (131072, 32 * 1024)],
)
def test_longer_models_get_a_round_limit(
    options: Any, prepare: Any, model: Path, positions: int, tokens: int
) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": positions}))
    assert prepare(options).config.rollout.max_response_tokens == tokens


def test_limit_takes_the_first_problems(options: Any, prepare: Any) -> None:
    (part,) = prepare(replace(options, limit=2)).benchmarks
    assert [prompt.prompt_id for prompt in part.prompts] == ["s0", "s1"]


def longer_problem(problems: Path, repeats: int) -> None:
    row = {"id": "long", "problem": "1+1=? " * repeats, "answer": "2"}
    problems.write_text(problems.read_text() + json.dumps(row) + "\n")


def test_lengths_that_do_not_fit_name_the_problem(
    options: Any, prepare: Any, problems: Path, tmp_path: Path
) -> None:
    longer_problem(problems, 60)
    longest = prepare(options).config.rollout.max_prompt_tokens
    shutil.rmtree(tmp_path / "out")
    room = POSITIONS - longest
    with pytest.raises(ValueError) as error:
        prepare(replace(options, max_response_tokens=room + 1))
    assert str(error.value) == (
        f"--max-response-tokens {room + 1}: with the {longest} tokens of problem 'long' of sums "
        f"more than the model's 1024 positions; valid: at most {room}"
    )
    with pytest.raises(ValueError, match="problem 'long' of sums has"):
        prepare(replace(options, max_prompt_tokens=longest - 1))
    assert not (tmp_path / "out").exists()
    prepare(replace(options, max_response_tokens=room, max_prompt_tokens=longest))


def test_a_prompt_longer_than_the_model_is_named(
    options: Any, prepare: Any, problems: Path
) -> None:
    longer_problem(problems, 400)
    with pytest.raises(ValueError, match="problem 'long' of sums has .* positions for prompt and"):
        prepare(options)


def test_a_tokenizer_without_chat_template_says_what_to_do(
    options: Any, prepare: Any, model: Path
) -> None:
    (model / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((model / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no chat template.*--chat-template.*plain"):
        prepare(options)
    (part,) = prepare(replace(options, chat_template="plain")).benchmarks
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert tokenizer.decode(list(part.prompts[0].token_ids)).endswith(part.prompts[0].text)


def test_a_template_that_the_reward_does_not_read_is_refused(options: Any, prepare: Any) -> None:
    strict = replace(options, reward="math_dapo_strict_box")
    with pytest.raises(ValueError, match="benchmark sums: .*answer_line.*--no-check-answer-form"):
        prepare(strict)
    prepare(replace(strict, check_answer_form=False))


def test_a_model_without_all_its_weights_is_refused(
    options: Any, prepare: Any, model: Path
) -> None:
    weights = load_file(model / "model.safetensors")
    gone = sorted(weights)[3]
    del weights[gone]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"--model .*{gone}"):
        prepare(options)


def test_a_tensor_parallel_size_that_does_not_divide_the_heads(options: Any, prepare: Any) -> None:
    with pytest.raises(ValueError, match="--tensor-parallel 3: .* 4 attention heads"):
        prepare(replace(options, tensor_parallel=3))


# Models


def as_run(folder: Path, model: dict[str, str]) -> Path:
    folder.mkdir()
    config = {"recipe": "r.py:f", "config": {"model": model}, "provenance": {}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_training_run_is_its_final_weights(
    options: Any, prepare: Any, model: Path, tmp_path: Path
) -> None:
    run = as_run(tmp_path / "run-7", {"path": "/models/Qwen", "testbed": ""})
    with pytest.raises(ValueError, match="a training run without final weights: .*run-7/hf is mis"):
        prepare(replace(options, model=str(run)))
    shutil.copytree(model, run / "hf")
    found = prepare(replace(options, model=str(run))).model
    assert (found.name, found.checkpoint, found.base) == ("run-7", "hf", "Qwen")
    assert found.folder == run / "hf"
    named = find_model(run / "hf")  # the folder itself is as good, and still the run's
    assert (named.name, named.folder) == ("run-7", run / "hf")
    other = as_run(tmp_path / "run-8", {"path": "", "testbed": "pangu"})
    shutil.copytree(model, other / "hf")
    assert find_model(other).base == "tiny pangu"
    config = json.loads((other / "config.json").read_text()) | {"model_dir": "/cache/tiny-pangu-4"}
    (other / "config.json").write_text(json.dumps(config))
    assert find_model(other).base == "tiny-pangu-4"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "has no config.json"),
        ("{", "config.json: not JSON"),
        ("[]", "config.json: got list; valid: a JSON object"),
    ],
)
def test_a_folder_that_is_no_model(tmp_path: Path, content: str | None, expected: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=expected):
        find_model(tmp_path)
    with pytest.raises(ValueError, match="--model /no/such: no such folder"):
        find_model("/no/such")


def test_a_fingerprint_tells_models_apart(model: Path) -> None:
    first = fingerprint_model(model)
    assert len(first) == 64
    (model / "README.md").write_text("of no effect")
    assert fingerprint_model(model) == first
    weights = load_file(model / "model.safetensors")
    before = weights["model.norm.weight"].clone()
    weights["model.norm.weight"] += 1e-3
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    changed = fingerprint_model(model)
    weights["model.norm.weight"] = before
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    (model / "generation_config.json").write_text('{"eos_token_id": 3}')
    assert len({first, changed, fingerprint_model(model)}) == 3


def test_the_files_of_a_slow_tokenizer_count_where_they_are_read(tmp_path: Path) -> None:
    (tmp_path / "merges.txt").write_text("a b")
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    slow = fingerprint_model(tmp_path)
    (tmp_path / "vocab.json").write_text('{"b": 0}')
    assert fingerprint_model(tmp_path) != slow
    (tmp_path / "tokenizer.json").write_text("{}")
    fast = fingerprint_model(tmp_path)
    (tmp_path / "vocab.json").unlink()
    assert fingerprint_model(tmp_path) == fast


def test_a_large_file_is_sampled_over_its_whole_length(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    size = 64 << 20
    content = torch.zeros(size, dtype=torch.uint8)
    path.write_bytes(content.numpy().tobytes())
    prints = {fingerprint_model(tmp_path)}
    for position in (0, size // 2, size - 1):
        with path.open("rb+") as file:
            file.seek(position)
            file.write(b"\x01" * (1 << 21))  # training changes all; this is more than is left out
            file.truncate(size)
        prints.add(fingerprint_model(tmp_path))
    assert len(prints) == 4


# Output folder


def test_going_on_needs_the_same_evaluation(
    options: Any, prepare: Any, model: Path, problems: Path
) -> None:
    first = prepare(options)
    record = ResponseRecord(
        problem_id="s0",
        sample_index=1,
        seed=first.evaluation.remaining[1].seed,
        num_tokens=3,
        finish_reason="stop",
        acc=True,
        pred="0",
        parsed=True,
        failure="",
        text="Answer: 0",
    )
    first.log.append("sums", [record])
    other_machines = replace(options, num_engines=3, max_num_seqs=4, device="auto")
    resumed = prepare(other_machines, resume=True)
    assert resumed.evaluation.done == {"sums": 1}
    assert len(resumed.evaluation.remaining) == 9

    with pytest.raises(ValueError, match="exists and is not empty; name a new one; --resume goes"):
        prepare(options)
    with pytest.raises(ValueError) as error:
        prepare(replace(options, temperature=0.7, seed=3, template="boxed"), resume=True)
    for difference in ("--temperature: 0.6 there, 0.7 here", "--seed: 0 there, 3 here"):
        assert difference in str(error.value)
    assert "--template: 'dapo' there, 'boxed' here" in str(error.value)

    content = problems.read_text()
    problems.write_text(content.replace('"2"', '"3"'))
    with pytest.raises(ValueError, match=r"settings: benchmarks \(sha256\): \{'sums': "):
        prepare(options, resume=True)
    problems.write_text(content)
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] += 1e-3
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"settings: model \(sha256\): "):
        prepare(options, resume=True)


def test_going_on_where_nothing_was_begun_begins(options: Any, prepare: Any) -> None:
    assert len(prepare(options, resume=True).evaluation.remaining) == 10
    assert len(prepare(options, resume=True).evaluation.remaining) == 10


def test_going_on_with_an_edited_reward_is_refused(
    options: Any, prepare: Any, tmp_path: Path
) -> None:
    """Its verdicts would be mixed with those of the file as it was."""
    file = tmp_path / "own.py"
    text = "from r2vpo_megatron.rewards import RewardResult\n\n"
    text += "def reward(prompt, text):\n    return RewardResult(1.0, True, text, True)\n"
    file.write_text(text)
    own = replace(options, reward=f"{file}:reward", check_answer_form=False)
    prepare(own)
    prepare(own, resume=True)
    file.write_text(text.replace("True, text", "False, text"))
    with pytest.raises(ValueError, match=r"settings: --reward \(sha256\): '"):
        prepare(own, resume=True)


def test_two_processes_do_not_write_one_folder(options: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    again = prepare_evaluation(options, out, resume=True)
    with (
        prepare_evaluation(options, out, resume=False),
        pytest.raises(ValueError, match="another process is at work there"),
        again,
    ):
        pass


def test_a_folder_of_the_user_s_is_left_alone(options: Any, prepare: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    for resume in (False, True):
        with pytest.raises(ValueError):
            prepare(options, resume=resume)
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]
