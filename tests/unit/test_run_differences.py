"""What a run may differ in from the one that it goes on from."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file

from r2vpo_megatron.checkpoint.run_differences import (
    FIXED,
    FREE,
    LAYOUT,
    check_differences,
    find_differences,
    fingerprint_model,
    fingerprint_tokenizer,
)
from r2vpo_megatron.config import RunConfig

PRINTS = {"model": "m", "tokenizer": "t", "train_prompts": "p"}


def facts(changes=None, **prints):
    """Of a run with default values but for `changes`, as a manifest brings them back."""
    config = RunConfig().to_dict()
    for field, value in (changes or {}).items():
        section, name = field.split(".")
        assert name in config[section]
        config[section][name] = value
    return json.loads(json.dumps({"config": config, "fingerprints": {**PRINTS, **prints}}))


def test_the_same_run_differs_in_nothing():
    assert (
        find_differences(facts(), {"config": RunConfig().to_dict(), "fingerprints": PRINTS}) == []
    )
    assert check_differences(facts(), facts(), ()) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("train.num_iterations", 7),
        ("output.dir", "elsewhere"),
        ("evaluation.num_prompts", 3),
        ("checkpoint.keep_last", 9),
        ("guard.ratio_alarm", 1.0),
        ("runtime.timeout_seconds", 9.0),
        ("rollout.hang_seconds", 9.0),
        ("data.held_out_prompts", "other.jsonl"),
        ("model.path", "moved"),
        ("model.weights", "moved"),
        ("data.train_prompts", "moved.jsonl"),
    ],
)
def test_what_changes_nothing_is_accepted_without_a_word(field, value):
    assert check_differences(facts(), facts({field: value}), ()) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("parallel.tensor", 2),
        ("runtime.device", "cuda"),
        ("rollout.num_engines", 5),
        ("weight_sync.bucket_bytes", 1),
        ("optimizer.distributed", False),
    ],
)
def test_another_layout_is_accepted_and_said(field, value):
    (line,) = check_differences(facts(), facts({field: value}), ())
    assert "not bit-exact" in line and field in line and repr(value) in line


def test_all_other_changes_are_refused_at_once_with_the_way_to_allow_them():
    now = facts({"optimizer.lr": 1e-5, "optimizer.weight_decay": 4, "parallel.data": 2})
    with pytest.raises(ValueError) as caught:
        check_differences(facts(), now, ())
    message = str(caught.value)
    assert "optimizer.lr: saved 1e-06, now 1e-05" in message
    assert "optimizer.weight_decay: saved 0.01, now 4" in message
    assert message.endswith("--checkpoint.allow-changes optimizer.lr,optimizer.weight_decay")
    assert "parallel" not in message


def test_each_change_must_be_allowed_by_its_own_name():
    now = facts({"optimizer.lr": 1e-5, "optimizer.weight_decay": 4})
    with pytest.raises(ValueError, match="optimizer.weight_decay") as caught:
        check_differences(facts(), now, ["optimizer.lr"])
    assert "optimizer.lr: saved" not in str(caught.value)
    lines = check_differences(facts(), now, ["optimizer.lr", "optimizer.weight_decay"])
    assert [line.split(": saved")[0] for line in lines] == [
        "changed, as allowed: optimizer.lr",
        "changed, as allowed: optimizer.weight_decay",
    ]


def test_a_name_where_nothing_differs_passes() -> None:
    (line,) = check_differences(
        facts(),
        facts({"optimizer.weight_decay": 4}),
        ["optimizer.lr", "optimizer.weight_decay"],
    )
    assert "optimizer.weight_decay" in line


@pytest.mark.parametrize("name", ["optimizer.lrr", "optimizer"])
def test_a_name_that_is_none_does_not_pass(name):
    with pytest.raises(ValueError, match=f"allow_changes names {name}; valid: .*section.name"):
        check_differences(
            facts(), facts({"optimizer.weight_decay": 4}), [name, "optimizer.weight_decay"]
        )


@pytest.mark.parametrize("name", ["model", "tokenizer"])
def test_another_fingerprint_is_refused_unless_allowed(name):
    now = facts(**{name: "other"})
    with pytest.raises(ValueError, match=f"{name}: not what the saved run had"):
        check_differences(facts(), now, ())
    assert len(check_differences(facts(), now, [name])) == 1


@pytest.mark.parametrize(
    "field",
    [
        "train.seed",
        "train.prompts_per_iteration",
        "train.responses_per_prompt",
        "replay.capacity_iterations",
        "train_prompts",
    ],
)
def test_what_samples_are_named_by_cannot_be_allowed(field):
    """The state would not load, or names of samples would occur twice."""
    now = facts(train_prompts="other") if field == "train_prompts" else facts({field: 3})
    with pytest.raises(ValueError, match=rf"cannot go on from it:\n  {field}: .*\n.*model.weights"):
        check_differences(facts(), now, [field])


def test_a_path_counts_where_what_lies_there_is_another():
    now = facts({"model.path": "other"}, model="other")
    assert [found.field for found in find_differences(facts(), now)] == ["model", "model.path"]


def test_a_fingerprint_that_only_one_of_them_has_counts():
    without = facts()
    del without["fingerprints"]["tokenizer"]
    for saved, now in ((without, facts()), (facts(), without)):
        assert [found.field for found in find_differences(saved, now)] == ["tokenizer"]


def test_a_field_that_only_one_version_of_the_code_has_is_named():
    older = copy.deepcopy(facts())
    del older["config"]["algorithm"]["overlong_buffer_tokens"]
    del older["config"]["guard"]
    with pytest.raises(ValueError, match=r"overlong_buffer_tokens: saved '\(no such field\)'"):
        check_differences(older, facts(), ())
    assert len(check_differences(older, facts(), ["algorithm.overlong_buffer_tokens"])) == 1


def test_every_pattern_names_a_field_that_there_is():
    config = RunConfig().to_dict()
    for pattern in (*FREE, *LAYOUT, *(name for name in FIXED if "." in name)):
        section, name = pattern.split(".")
        assert not name or name in config[section], pattern
        assert section in config


def test_a_changed_section_is_found_through_the_dataclasses():
    config = RunConfig()
    other = replace(config, algorithm=replace(config.algorithm, overlong_buffer_tokens=1))
    found = find_differences(facts(), {"config": other.to_dict(), "fingerprints": PRINTS})
    assert [(item.field, item.current) for item in found] == [
        ("algorithm.overlong_buffer_tokens", 1)
    ]


@pytest.fixture
def model_dir(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("tokens")
    save_file({"a": np.zeros((2, 3), np.float32)}, folder / "model.safetensors")
    return folder


def test_a_models_fingerprint_is_of_its_configuration_and_its_tensors_shapes(model_dir, tmp_path):
    first = fingerprint_model(model_dir, "")
    moved = model_dir.rename(tmp_path / "moved")
    assert fingerprint_model(moved, "") == first
    (moved / "README.md").write_text("words")
    assert fingerprint_model(moved, "") == first
    weights = moved / "model.safetensors"
    save_file({"a": np.zeros((3, 2), np.float32)}, weights)  # as many bytes, another shape
    turned = fingerprint_model(moved, "")
    save_file({"b": np.zeros((2, 3), np.float32)}, weights)
    renamed = fingerprint_model(moved, "")
    save_file({"a": np.zeros((2, 3), np.float32)}, weights)
    assert fingerprint_model(moved, "") == first
    (moved / "config.json").write_text('{"x": 1}')
    assert len({first, turned, renamed, fingerprint_model(moved, "")}) == 4


def test_other_weights_of_the_model_are_seen_in_the_folder_of_their_iteration(model_dir, tmp_path):
    weights = tmp_path / "megatron"
    (weights / "iter_0000001").mkdir(parents=True)
    first = fingerprint_model(model_dir, str(weights))
    (weights / "iter_0000001" / "__0_0.distcp").write_bytes(b"12")
    second = fingerprint_model(model_dir, str(weights))
    (weights / "iter_0000001" / ".metadata").write_bytes(b"1")
    third = fingerprint_model(model_dir, str(weights))
    assert len({fingerprint_model(model_dir, ""), first, second, third}) == 4


def test_other_values_of_the_same_weights_are_another_model(model_dir):
    path = model_dir / "model.safetensors"
    first = fingerprint_model(model_dir, "")
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    assert fingerprint_model(model_dir, "") != first


def test_a_tokenizers_fingerprint_is_of_its_files_bytes(model_dir):
    first = fingerprint_tokenizer(model_dir)
    (model_dir / "config.json").write_text('{"x": 1}')
    assert fingerprint_tokenizer(model_dir) == first
    (model_dir / "tokenizer.json").write_text("tokenS")
    second = fingerprint_tokenizer(model_dir)
    (model_dir / "chat_template.jinja").write_text("")
    assert len({first, second, fingerprint_tokenizer(model_dir)}) == 3
