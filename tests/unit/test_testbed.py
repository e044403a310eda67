"""The testbed: arithmetic task, warm start, tiny model folders and their cache."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from r2vpo_megatron.models.pangu_hf import PanguEmbeddedForCausalLM, register_with_transformers
from r2vpo_megatron.testbed import tiny_model
from r2vpo_megatron.testbed.arithmetic import (
    Problem,
    generate_problems,
    solve_with_slips,
    split_of,
)
from r2vpo_megatron.testbed.tiny_model import ensure_tiny_model, is_intact, make_tiny_model
from r2vpo_megatron.testbed.tokenizer import prompt_token_ids
from r2vpo_megatron.testbed.warm_start import (
    IGNORED_TARGET,
    WarmStartSettings,
    is_correct,
    measure_accuracy,
    supervised_tensors,
    train,
)

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random-weight openPangu folder."""
    path = tmp_path_factory.mktemp("testbed") / "pangu"
    make_tiny_model(path, "pangu", warm_start=False)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


# The task


def test_the_seed_decides_the_problems() -> None:
    assert generate_problems("train", 50, seed=3) == generate_problems("train", 50, seed=3)
    assert generate_problems("train", 50, seed=3) != generate_problems("train", 50, seed=4)
    # Recorded once: a silent change of the task would change every result.
    assert generate_problems("train", 1, seed=0)[0] == Problem(
        prompt_id="arithmetic-2318d9750bfd8fa1",
        question="2+5-7+2=?",
        solution="2+5=7\n7-7=0\n0+2=2\nAnswer: 2",
        ground_truth="2",
    )


def test_splits_are_disjoint_for_any_seeds() -> None:
    train_questions = {
        p.question for seed in (0, 1, 2) for p in generate_problems("train", 3000, seed)
    }
    held_out = {p.question for seed in (0, 5) for p in generate_problems("held_out", 400, seed)}
    assert not train_questions & held_out
    assert all(split_of(question) == "held_out" for question in held_out)
    assert len(generate_problems("train", 4096, 0)) == len(
        {p.prompt_id for p in generate_problems("train", 4096, 0)}
    )


def test_every_line_of_every_solution_is_true() -> None:
    for problem in generate_problems("train", 500, 0) + generate_problems("held_out", 256, 0):
        *steps, answer = problem.solution.split("\n")
        for step in steps:
            left, sign, right, result = re.fullmatch(r"(\d+)([+-])(\d+)=(\d+)", step).groups()  # type: ignore[union-attr]
            assert int(left) + (1 if sign == "+" else -1) * int(right) == int(result)
        terms = re.findall(r"[+-]?\d+", problem.question)
        assert problem.question == "".join(terms) + "=?"
        assert answer == f"Answer: {sum(map(int, terms))}"
        assert problem.ground_truth == str(sum(map(int, terms)))
        assert is_correct(problem.solution, problem.ground_truth)


def test_slips_come_at_the_stated_rate_and_carry_on() -> None:
    problems = generate_problems("train", 1000, 0)
    assert all(solve_with_slips(p, 0.0, random.Random(0)) == p.solution for p in problems[:50])
    rng = random.Random(0)
    num_slips = 0
    for problem in problems:
        *steps, answer = solve_with_slips(problem, 0.2, rng).split("\n")
        totals = [int(step.split("=")[1]) for step in steps]
        assert answer == f"Answer: {totals[-1]}"
        for step, before in zip(steps[1:], totals, strict=False):
            assert int(re.match(r"\d+", step).group()) == before  # type: ignore[union-attr]
        errors = [
            total - sum(map(int, re.findall(r"[+-]?\d+", step.split("=")[0])))
            for step, total in zip(steps, totals, strict=True)
        ]
        assert set(errors) <= {0, 1, 2, 3}
        num_slips += sum(error > 0 for error in errors)
    assert 0.18 < num_slips / 3000 < 0.22  # 2.7 standard deviations about 0.2


def test_grading_reads_the_last_answer_line() -> None:
    right = ["1+2=3\nAnswer: 3", "Answer: 4\nAnswer: 3"]
    wrong = ["Answer: 3\nAnswer: 4", "Answer: 33", "1+2=3", "so Answer: 3", ""]
    assert [is_correct(response, "3") for response in right + wrong] == [True] * 2 + [False] * 5


def test_bad_arguments_of_the_generator_are_named() -> None:
    with pytest.raises(ValueError, match="split='test'; valid: train, held_out"):
        generate_problems("test", 1, 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_problems=0"):
        generate_problems("train", 0, 0)


# Supervised training


def test_only_the_response_and_its_stop_token_are_targets(tokenizer: Any) -> None:
    problems = [
        Problem("a", "1+2=?", "1+2=3\nAnswer: 3", "3"),
        Problem("b", "9+8=?", "9+8=17\nAnswer: 17", "17"),
    ]
    token_ids, targets = supervised_tensors(tokenizer, problems, 0.0, random.Random(0))
    assert token_ids.shape == targets.shape
    for row, problem in enumerate(problems):
        kept = targets[row][targets[row] != IGNORED_TARGET].tolist()
        assert tokenizer.decode(kept) == problem.solution + "[unused10]"
        assert kept[-1] == 4
        prompt = prompt_token_ids(tokenizer, [{"role": "user", "content": problem.question}])
        assert token_ids[row, : len(prompt) + len(kept)].tolist() == prompt + kept
        assert (targets[row, : len(prompt)] == IGNORED_TARGET).all()


class _ScriptedModel:
    """Answers each prompt with the given text; stands in for `generate`."""

    def __init__(self, tokenizer: Any, responses: list[str]) -> None:
        rows = [
            tokenizer(r + "[unused10]", add_special_tokens=False)["input_ids"] for r in responses
        ]
        longest = max(map(len, rows))
        self._rows = torch.tensor([row + [0] * (longest - len(row)) for row in rows])

    def eval(self) -> None: ...

    def generate(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.cat([input_ids, self._rows], dim=1)


def test_measured_accuracy_counts_right_answers(tokenizer: Any) -> None:
    problems = [Problem(str(i), f"{i}+1=?", "", str(i + 1)) for i in range(4)]
    model = _ScriptedModel(tokenizer, ["Answer: 1", "1+1=2\nAnswer: 2", "Answer: 9", "3+1=4"])
    assert measure_accuracy(model, tokenizer, problems) == 0.5


def test_training_is_deterministic_lowers_the_loss_and_stops_at_the_target(
    folder: Path, tokenizer: Any
) -> None:
    register_with_transformers()
    problems = generate_problems("train", 64, 0)
    run = WarmStartSettings(target_accuracy=0.0, batch_size=16)
    losses, weights = [], []
    for first_probe_step in (20, 20, 40):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        result = train(
            model,
            tokenizer,
            problems,
            problems[:4],
            dataclasses.replace(run, first_probe_step=first_probe_step),
            seed=7,
        )
        assert result.num_steps == first_probe_step
        losses.append(result.last_loss)
        weights.append(model.model.norm.weight.detach())
    assert torch.equal(weights[0], weights[1])
    assert losses[0] == losses[1]
    assert losses[2] < losses[0] < 6.0  # ln(384) = 5.95 is the loss of a uniform guess


def test_training_that_never_gets_there_says_so(folder: Path, tokenizer: Any) -> None:
    register_with_transformers()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    problems = generate_problems("train", 32, 0)
    never = WarmStartSettings(max_steps=2, first_probe_step=1, probe_every_steps=1)
    with pytest.raises(RuntimeError, match=r"reached accuracy 0\.00 in 2 steps; wanted 0\.24"):
        train(model, tokenizer, problems, problems[:2], never, seed=0)


# Model folders


def test_pangu_config_has_the_published_keys(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["PanguEmbeddedForCausalLM"]
    assert config["model_type"] == "PanguEmbedded"
    assert config["bias"] is True
    assert config["rope_theta"] == 50000.0
    assert config["torch_dtype"] == "float32"
    assert not {"head_dim", "rope_parameters", "attention_bias", "auto_map"} & set(config)
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 4, 0)
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 4, "pad_token_id": 0}


@pytest.mark.parametrize("architecture", ["pangu", "qwen2", "llama"])
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_opens_every_variant(tmp_path: Path, architecture: str, tied: bool) -> None:
    register_with_transformers()
    path = tmp_path / "model"
    manifest = make_tiny_model(path, architecture, tied, seed=1, warm_start=False)
    stored = safetensors.torch.load_file(path / "model.safetensors")
    biases = {name.split(".")[-2] for name in stored if name.endswith("bias")}
    expected = {"pangu": {"q_proj", "k_proj", "v_proj", "o_proj"}, "llama": set()}
    assert biases == expected.get(architecture, {"q_proj", "k_proj", "v_proj"})
    assert all(tensor.dtype == torch.float32 for tensor in stored.values())
    assert all(tensor.std() > 0 for tensor in stored.values())  # no constant bias or norm
    assert ("lm_head.weight" in stored) is not tied

    model, report = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.num_parameters() == manifest["num_parameters"]
    assert AutoConfig.from_pretrained(path).rope_parameters["rope_theta"] == 50000.0
    for name, tensor in stored.items():
        assert torch.equal(model.state_dict()[name], tensor)
    shared = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert shared is tied
    assert isinstance(model, PanguEmbeddedForCausalLM) is (architecture == "pangu")


def test_prompt_files(folder: Path) -> None:
    for split, num_lines in (("train", 4096), ("held_out", 256)):
        text = (folder / f"{split}.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines()]
        assert len(rows) == num_lines
        for row in rows:
            assert set(row) == {"prompt_id", "messages", "ground_truth"}
            (message,) = row["messages"]
            assert message["role"] == "user"
            assert split_of(message["content"]) == split


def test_seed_changes_the_weights_but_not_the_task(folder: Path, tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "again", "pangu", seed=0, warm_start=False)
    make_tiny_model(tmp_path / "other", "pangu", seed=1, warm_start=False)

    def files(path: Path) -> dict[str, str]:
        return dict(json.loads((path / "manifest.json").read_text())["files"])

    assert files(tmp_path / "again") == files(folder)
    assert {n for n, d in files(tmp_path / "other").items() if d != files(folder)[n]} == {
        "model.safetensors"
    }


def test_bad_arguments_are_named_and_leave_nothing_behind(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="architecture='gpt2'; valid: pangu, qwen2, llama"):
        make_tiny_model(tmp_path / "x", "gpt2", warm_start=False)
    with pytest.raises(FileExistsError, match="exists; give a new folder"):
        make_tiny_model(folder, "pangu", warm_start=False)
    assert not list(tmp_path.iterdir())


# The cache


def test_second_call_is_a_hit_and_other_arguments_miss(tmp_path: Path) -> None:
    first = ensure_tiny_model(tmp_path, "llama", warm_start=False)
    before = (first / "model.safetensors").stat()
    assert ensure_tiny_model(tmp_path, "llama", warm_start=False) == first
    assert (first / "model.safetensors").stat() == before
    assert ensure_tiny_model(tmp_path, "llama", seed=1, warm_start=False) != first
    assert ensure_tiny_model(tmp_path, "llama", tied=True, warm_start=False) != first
    assert all(not path.name.startswith(".") for path in tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["flipped byte", "missing file", "no manifest", "no digests"])
def test_damaged_folder_is_made_again(tmp_path: Path, damage: str) -> None:
    path = ensure_tiny_model(tmp_path, "llama", warm_start=False)
    weights = path / "model.safetensors"
    original = weights.read_bytes()
    if damage == "flipped byte":
        weights.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    elif damage == "missing file":
        (path / "tokenizer.json").unlink()
    elif damage == "no manifest":
        (path / "manifest.json").unlink()
    else:
        (path / "manifest.json").write_text('{"files": {}}')
    assert not is_intact(path)
    assert ensure_tiny_model(tmp_path, "llama", warm_start=False) == path
    assert is_intact(path)
    assert weights.read_bytes() == original


def test_changed_source_misses_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = ensure_tiny_model(tmp_path, "llama", warm_start=False)
    copies = tmp_path / "sources"
    shutil.copytree(Path(tiny_model.__file__).parent, copies)
    (copies / "warm_start.py").write_text("# another warm start\n")
    monkeypatch.setattr(tiny_model, "__file__", str(copies / "tiny_model.py"))
    assert ensure_tiny_model(tmp_path, "llama", warm_start=False) != path


def test_interrupted_making_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny_model, "_write_weights", fail)
    with pytest.raises(KeyboardInterrupt):
        make_tiny_model(tmp_path / "model", "llama", warm_start=False)
    assert not list(tmp_path.iterdir())


# The tool


def test_tool_makes_a_folder_and_refuses_an_existing_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["make_tiny_model.py", *arguments])
        monkeypatch.setattr(sys, "path", list(sys.path))
        with pytest.raises(SystemExit) as leaving:
            runpy.run_path(str(REPOSITORY / "tools/make_tiny_model.py"), run_name="__main__")
        return int(leaving.value.code or 0)

    output = str(tmp_path / "model")
    made = run("--architecture", "qwen2", "--tied", "--no-warm-start", "--output", output)
    assert made == 0
    printed = capsys.readouterr().out
    assert "qwen2" in printed and "tied embeddings" in printed
    assert is_intact(Path(output))
    assert run("--output", output) == 2
    error = capsys.readouterr().err.strip()
    assert error == f"error: output_dir={output!r} exists; give a new folder"
