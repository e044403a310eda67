"""What a conversion does with broken input, full disks, changed sources and failed checks."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from r2vpo_megatron.conversion import carry_out as carrying_out
from r2vpo_megatron.conversion import journal
from r2vpo_megatron.conversion import to_megatron as converting
from r2vpo_megatron.conversion.hf_export import HfExport
from r2vpo_megatron.conversion.megatron_pieces import ParallelLayout
from r2vpo_megatron.conversion.to_megatron import plan_to_megatron
from tests.conversion_runs import files_of, to_hf, to_megatron
from tests.random_checkpoints import make_hf_folder, save_tensors


def damage(folder: Path, how: str) -> None:
    """Break a checkpoint of three files and an index."""
    shard = folder / "model-00002-of-00003.safetensors"
    index = folder / "model.safetensors.index.json"
    if how == "truncated":
        os.truncate(shard, shard.stat().st_size - 1)
    elif how == "corrupt header":
        data = bytearray(shard.read_bytes())
        data[20] ^= 0xFF
        shard.write_bytes(data)
    elif how == "missing shard":
        shard.unlink()
    elif how == "index entry without tensor":
        values = json.loads(index.read_text())
        values["weight_map"]["model.more.weight"] = shard.name
        index.write_text(json.dumps(values))
    elif how == "index without a shard's entries":
        values = json.loads(index.read_text())
        values["weight_map"] = {n: f for n, f in values["weight_map"].items() if f != shard.name}
        index.write_text(json.dumps(values))
    elif how == "no weights":
        for path in folder.glob("*.safetensors*"):
            path.unlink()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "model-00002-of-00003.safetensors"),
        ("corrupt header", "model-00002-of-00003.safetensors"),
        ("missing shard", "model-00002-of-00003.safetensors"),
        ("index entry without tensor", "model.more.weight"),
        ("index without a shard's entries", "unfilled"),
        ("no weights", "has neither model.safetensors nor"),
    ],
)
def test_a_broken_source_is_named_and_nothing_written(
    tmp_path: Path, how: str, message: str
) -> None:
    make_hf_folder(tmp_path / "hf", num_files=3)
    damage(tmp_path / "hf", how)
    before = files_of(tmp_path / "hf")
    with pytest.raises(ValueError, match=message):
        to_megatron(tmp_path / "hf", tmp_path / "out")
    assert os.listdir(tmp_path) == ["hf"]
    assert files_of(tmp_path / "hf") == before


@pytest.mark.parametrize("how", ["truncated", "missing", "no metadata"])
def test_a_broken_torch_dist_folder_is_named_and_nothing_written(tmp_path: Path, how: str) -> None:
    make_hf_folder(tmp_path / "hf")
    to_megatron(tmp_path / "hf", tmp_path / "m", ParallelLayout(2))
    broken = tmp_path / "m" / ("__1_0.distcp" if how != "no metadata" else ".metadata")
    if how == "truncated":
        os.truncate(broken, broken.stat().st_size - 1)
    else:
        broken.unlink()
    with pytest.raises(ValueError, match=broken.name):
        to_hf(HfExport(tmp_path / "m", tmp_path / "out", hf_reference=tmp_path / "hf"))
    assert sorted(os.listdir(tmp_path)) == ["hf", "m"]


def test_a_full_disk_is_said_and_resuming_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_hf_folder(tmp_path / "hf", num_files=2)
    layout = ParallelLayout(2, 2)
    to_megatron(tmp_path / "hf", tmp_path / "whole", layout)
    to_hf(HfExport(tmp_path / "whole", tmp_path / "whole-hf", hf_reference=tmp_path / "hf"))
    write_all, left = journal.write_all, [0]

    def limited(stream, buffer):
        left[0] -= len(buffer)
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_all(stream, buffer)

    export = HfExport(tmp_path / "whole", tmp_path / "part-hf", hf_reference=tmp_path / "hf")
    for convert_again, output in (
        (
            lambda resume: to_megatron(tmp_path / "hf", tmp_path / "part", layout, resume=resume),
            "part",
        ),
        (lambda resume: to_hf(export, resume=resume), "part-hf"),
    ):
        monkeypatch.setattr(journal, "write_all", limited)
        left[0] = 60_000
        with pytest.raises(OSError, match="the disk is full; .* go on with --resume"):
            convert_again(False)
        assert not (tmp_path / output).exists()
        monkeypatch.setattr(journal, "write_all", write_all)
        with pytest.raises(ValueError, match="go on with --resume"):
            convert_again(False)
        convert_again(True)
        assert files_of(tmp_path / output) == files_of(tmp_path / output.replace("part", "whole"))


def test_too_little_space_is_said_before_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_hf_folder(tmp_path / "hf")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(carrying_out.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="1,000 bytes are free, .* are needed"):
        to_megatron(tmp_path / "hf", tmp_path / "made" / "out")
    assert os.listdir(tmp_path) == ["hf"]


def test_resuming_from_a_source_that_changed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = make_hf_folder(tmp_path / "hf")
    write_all, calls = journal.write_all, []

    def fails(stream, buffer):
        calls.append(0)
        if len(calls) == 40:
            raise OSError(errno.EIO, "Input/output error")
        write_all(stream, buffer)

    monkeypatch.setattr(journal, "write_all", fails)
    with pytest.raises(OSError, match="Input/output error"):
        to_megatron(tmp_path / "hf", tmp_path / "out")
    monkeypatch.undo()
    tensors["lm_head.weight"] += 1
    save_tensors(tmp_path / "hf", tensors)
    with pytest.raises(ValueError, match=r"files\.model\.safetensors is .* there and .* here"):
        to_megatron(tmp_path / "hf", tmp_path / "out", resume=True)
    with pytest.raises(ValueError, match="other settings or sources"):
        to_megatron(tmp_path / "hf", tmp_path / "out", ParallelLayout(2), resume=True)


def test_a_verification_that_fails_leaves_no_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_hf_folder(tmp_path / "hf")
    sabotaged = []

    def write_wrong(stream, buffer):
        if len(buffer) > 4000 and not sabotaged:
            sabotaged.append(True)
            data = bytearray(buffer)
            data[2000] ^= 1
            buffer = memoryview(data)
        stream.write(buffer)

    monkeypatch.setattr(journal, "write_all", write_wrong)
    with pytest.raises(ValueError, match="differs first at"):
        to_megatron(tmp_path / "hf", tmp_path / "out", verify=True)
    assert sabotaged and not (tmp_path / "out").exists()
    monkeypatch.undo()
    to_megatron(tmp_path / "hf", tmp_path / "out", verify=True, resume=True)  # writes it anew


def _rewritten(path: Path) -> None:
    """The same bytes at another time."""
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))


@pytest.mark.parametrize("direction", ["to_megatron", "to_hf", "reference"])
def test_a_source_that_changes_meanwhile_gives_no_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direction: str
) -> None:
    make_hf_folder(tmp_path / "hf")
    to_megatron(tmp_path / "hf", tmp_path / "m")
    export = HfExport(tmp_path / "m", tmp_path / "out", hf_reference=tmp_path / "hf")
    changing = tmp_path / ("m/__0_0.distcp" if direction == "to_hf" else "hf/model.safetensors")
    write_all = journal.write_all

    def while_changing(stream, buffer):
        write_all(stream, buffer)
        if len(buffer) > 2000:
            _rewritten(changing)

    monkeypatch.setattr(journal, "write_all", while_changing)
    with pytest.raises(ValueError, match=f"{changing}: changed while it was being converted"):
        if direction == "to_megatron":
            to_megatron(tmp_path / "hf", tmp_path / "out")
        else:
            to_hf(export)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["copy_companions", "write_metadata", "_write_manifest"])
def test_a_full_disk_beside_the_pieces_is_said_and_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    make_hf_folder(tmp_path / "hf")

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "some file")

    with monkeypatch.context() as patch:
        patch.setattr(carrying_out if what == "_write_manifest" else converting, what, full)
        with pytest.raises(OSError, match="some file: the disk is full; .* go on with --resume"):
            to_megatron(tmp_path / "hf", tmp_path / "out")
    assert os.path.getsize(tmp_path / ".out.converting" / "__0_0.distcp")
    to_megatron(tmp_path / "hf", tmp_path / "out", resume=True)
    to_megatron(tmp_path / "hf", tmp_path / "whole")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_space_for_companions_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_hf_folder(tmp_path / "hf")
    plan = plan_to_megatron(tmp_path / "hf", tmp_path / "out", ParallelLayout())
    (tmp_path / "hf" / "tokenizer.json").write_bytes(b" " * 50_000)
    usage = shutil.disk_usage(tmp_path)._replace(free=plan.output_bytes + 50_000)
    monkeypatch.setattr(carrying_out.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="bytes are free, .* are needed"):
        to_megatron(tmp_path / "hf", tmp_path / "out")


def test_resuming_what_is_complete_says_so(tmp_path: Path) -> None:
    tensors = make_hf_folder(tmp_path / "hf")
    assert to_megatron(tmp_path / "hf", tmp_path / "out") == ""
    before = files_of(tmp_path)
    complete = f"{tmp_path / 'out'}: already complete"
    assert to_megatron(tmp_path / "hf", tmp_path / "out", resume=True) == complete
    found = to_megatron(tmp_path / "hf", tmp_path / "out", resume=True, verify=True)
    assert found.startswith(f"{complete}; verified: ")
    for resume, layout in ((False, ParallelLayout()), (True, ParallelLayout(2))):
        with pytest.raises(ValueError, match="exists and is not empty"):
            to_megatron(tmp_path / "hf", tmp_path / "out", layout, resume=resume)
    assert files_of(tmp_path) == before
    save_tensors(tmp_path / "hf", {name: tensor + 1 for name, tensor in tensors.items()})
    with pytest.raises(ValueError, match="exists and is not empty"):
        to_megatron(tmp_path / "hf", tmp_path / "out", resume=True)


def test_a_tied_head_is_compared_by_dtype_and_bits(tmp_path: Path) -> None:
    name, embedding = "lm_head.weight", "model.embed_tokens.weight"
    tensors = make_hf_folder(tmp_path / "hf", "llama", tied=True)
    tensors[embedding][3, 3] = float("nan")
    tensors[name] = tensors[embedding].clone()
    save_tensors(tmp_path / "hf", tensors)
    to_megatron(tmp_path / "hf", tmp_path / "nan")
    tensors[embedding][3, 3] = 0.0
    tensors[name][3, 3] = -0.0
    save_tensors(tmp_path / "hf", tensors)
    with pytest.raises(ValueError, match="lm_head.weight .float32. differs from"):
        to_megatron(tmp_path / "hf", tmp_path / "out")
    tensors[embedding] = tensors[embedding].bfloat16()
    tensors[name] = tensors[embedding].view(torch.float16).clone()  # the same bits
    save_tensors(tmp_path / "hf", tensors)
    with pytest.raises(ValueError, match="lm_head.weight .float16. differs from .*bfloat16"):
        to_megatron(tmp_path / "hf", tmp_path / "out")


def test_a_path_that_is_not_utf8_can_be_recorded(tmp_path: Path) -> None:
    hf = tmp_path / os.fsdecode(b"hf-\xff")
    make_hf_folder(tmp_path / "hf")
    os.rename(tmp_path / "hf", hf)
    to_megatron(hf, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "conversion.json").read_bytes())["source"] == str(hf)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_fuzzed_headers_and_indexes_are_refused_or_harmless(tmp_path_factory, data) -> None:
    root = tmp_path_factory.mktemp("fuzz")
    hf = root / "inner" / "hf"
    make_hf_folder(hf, num_layers=1, num_files=2)
    path = data.draw(st.sampled_from(sorted(hf.glob("*.safetensors*"))))
    content = bytearray(path.read_bytes())
    limit = len(content) if path.suffix == ".json" else 600
    for _ in range(data.draw(st.integers(1, 3))):
        what = data.draw(st.sampled_from(["flip", "insert", "traverse"]))
        position = data.draw(st.integers(0, min(limit, len(content)) - 1))
        if what == "flip":
            content[position] = data.draw(st.integers(0, 255))
        elif what == "insert":
            content[position:position] = data.draw(st.binary(max_size=20))
        else:
            content = content.replace(b"model-00001-of", b"../../model-of").replace(
                b"model.embed_tokens.weight", b"../../../../../../escaped"
            )
    path.write_bytes(content)
    before = files_of(root)
    try:
        to_megatron(hf, root / "inner" / "out")
        to_hf(HfExport(root / "inner" / "out", root / "inner" / "back", hf_reference=hf))
    except (ValueError, OSError) as error:
        assert str(error)
    after = files_of(root)
    made = {name for name in after if not name.startswith(("inner/out/", "inner/back/"))}
    assert made == set(before)
    assert all(after[name] == before[name] for name in before)
    shutil.rmtree(root)
