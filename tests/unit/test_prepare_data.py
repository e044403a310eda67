"""From data sets as published to prompt files: every step, and every kind of bad input."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from r2vpo_megatron.data.prompts import load_prompts
from r2vpo_megatron.data.templates import PROMPT_TEMPLATES

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED = REPOSITORY.parent / "shared" / "data"
DAPO = PROMPT_TEMPLATES["dapo"]
GOOD = {"problem": "What is 1+1?", "answer": "2"}


def _load_tool() -> Any:
    path = REPOSITORY / "tools" / "prepare_data.py"
    spec = importlib.util.spec_from_file_location("prepare_data_tool", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TOOL = _load_tool()


def run(*arguments: str | Path) -> int:
    code: int = TOOL.main([str(argument) for argument in arguments])
    return code


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def dapo_row(problem: str, answer: str, index: int = 0) -> dict[str, Any]:
    return {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": DAPO.apply(problem)}],
        "reward_model": {"ground_truth": answer, "style": "rule"},
        "extra_info": {"index": index},
    }


def manifest_of(output: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(
        output.with_name(output.name + ".manifest.json").read_text(encoding="utf-8")
    )
    return content


def test_the_hubs_schema_with_template_and_copies(tmp_path: Path) -> None:
    rows = [
        dapo_row("Find $x$ if $x+1=3$.", "2"),
        dapo_row("Find $x$ if $x-1=3$.", "4"),  # letters and digits of the row above
        dapo_row("How many primes are below 10?", "04"),
        dapo_row("How many  primes are below $10$?", "4"),  # the row above in another layout
        dapo_row("一共有多少个小于 10 的质数？请给出答案。", "4"),
        dapo_row("What is the area of a unit square?", "1"),
        dapo_row("What is the area of a unit square", "2"),  # which label is right?
    ]
    source = tmp_path / "hub.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows * 100), source)
    output = tmp_path / "new" / "out.parquet"
    assert run("--source", "dapo-math-17k", source, "--output", output) == 0
    prompts = load_prompts(output)
    # x+1 and x-1 share their ascii key and differ in label: dropped as doubtful, never merged.
    assert [(p.extra["problem"], p.ground_truth) for p in prompts] == [
        ("How many primes are below 10?", "4"),
        ("一共有多少个小于 10 的质数？请给出答案。", "4"),
    ]
    assert prompts[0].text == DAPO.apply("How many primes are below 10?")
    assert [p.extra["language"] for p in prompts] == ["en", "zh"]
    assert {p.extra["data_source"] for p in prompts} == {"dapo-math-17k"}
    manifest = manifest_of(output)
    assert [(step["num_removed"], step["num_left"]) for step in manifest["steps"]] == [
        (693, 7),
        (4, 3),
        (1, 2),
    ]
    assert manifest["counts"]["num_rows"] == manifest["counts"]["num_with_template"] == 700
    assert [conflict["labels"] for conflict in manifest["conflicts"]] == [["2", "4"], ["1", "2"]]
    assert manifest["conflicts"][1]["rows"] == [f"{source}:6", f"{source}:7"]
    assert manifest["output"]["num_rows"] == 2
    assert manifest["template"]["name"] == "dapo"
    assert [path.name for path in sorted(output.parent.iterdir())] == [
        "out.parquet",
        "out.parquet.manifest.json",
    ]


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    source = write_jsonl(
        tmp_path / "p.jsonl", [{"problem": f"What is {n}+{n}?", "answer": 2 * n} for n in range(50)]
    )
    outputs = [tmp_path / folder / "out.parquet" for folder in ("a", "b")]
    for output in outputs:
        assert run("--source", "jsonl", source, "--output", output) == 0
    first, second = outputs
    assert first.read_bytes() == second.read_bytes()
    assert manifest_of(first) == manifest_of(second)
    ids = [prompt.prompt_id for prompt in load_prompts(first)]
    assert len(set(ids)) == 50
    # An id follows from the problem, not from its row or its layout.
    moved = write_jsonl(tmp_path / "q.jsonl", [{"problem": "What is $7+7$ ?", "answer": 14}])
    assert run("--source", "jsonl", moved, "--output", tmp_path / "q.parquet") == 0
    assert [prompt.prompt_id for prompt in load_prompts(tmp_path / "q.parquet")] == [ids[7]]


def test_gsm8k_answers_and_template(tmp_path: Path) -> None:
    rows = [
        {"question": "How many clips?", "answer": "48/2 = <<48/2=24>>24.\n#### 72"},
        {"question": "How many dollars?", "answer": "Much.\n#### $1,450,000"},
        {"question": "How cold?", "answer": "Cold.\n#### \u221210"},
    ]
    source = write_jsonl(tmp_path / "g.jsonl", rows)
    output = tmp_path / "g.parquet"
    assert run("--source", "gsm8k", source, "--output", output, "--template", "boxed") == 0
    prompts = load_prompts(output)
    assert [prompt.ground_truth for prompt in prompts] == ["72", "1450000", "-10"]
    assert prompts[0].text == PROMPT_TEMPLATES["boxed"].apply("How many clips?")


def test_own_columns_ids_and_float_answers(tmp_path: Path) -> None:
    rows = [{"meta": {"q": f"What is {n}?"}, "gold": float(n), "uid": f"u{n}"} for n in (1, 27)]
    source = tmp_path / "own.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), source)
    output = tmp_path / "out.parquet"
    columns = ["--problem-column", "meta.q", "--answer-column", "gold", "--id-column", "uid"]
    arguments = ["--source", "parquet", source, "--output", output, "--template", "plain"]
    assert run(*arguments, *columns) == 0
    prompts = load_prompts(output)
    assert [(p.prompt_id, p.text, p.ground_truth) for p in prompts] == [
        ("u1", "What is 1?", "1"),
        ("u27", "What is 27?", "27"),
    ]
    assert prompts[0].extra["data_source"] == "own"


def test_language_and_overlap_filters(tmp_path: Path) -> None:
    long = "A box holds red, green and blue balls, and one draws balls without looking until "
    rows = [
        {"problem": long + "two are red. How many draws?", "answer": "3"},
        {"problem": long + "three are blue. How many draws?", "answer": "4"},
        {"problem": "What is 5!?", "answer": "120"},
        {"problem": "求所有素数的和。", "answer": "5"},
        {"problem": "Сколько существует простых чисел?", "answer": "6"},
    ]
    source = write_jsonl(tmp_path / "p.jsonl", rows)
    evaluation = write_jsonl(
        tmp_path / "e.jsonl",
        [
            {"question": (long + "two are red. How many draws?").replace(" red,", " $red$,")},
            {"question": "What is 6!?"},
            {"question": "What is 6!?"},
        ],
    )
    arguments = ["--source", "jsonl", source, "--language", "en"]
    arguments += ["--evaluation-files", f"eval={evaluation}"]
    left = {}
    for kind in ("none", "exact", "prefix"):
        output = tmp_path / f"{kind}.parquet"
        assert run(*arguments, "--drop-overlap", kind, "--output", output) == 0
        left[kind] = [prompt.ground_truth for prompt in load_prompts(output)]
    assert left == {"none": ["3", "4", "120"], "exact": ["4", "120"], "prefix": ["120"]}
    found = manifest_of(tmp_path / "none.parquet")["evaluation"]["eval"]
    ids = [prompt.prompt_id for prompt in load_prompts(tmp_path / "none.parquet")]
    assert (found["num_problems"], found["num_exact"], found["num_prefix"]) == (2, 1, 1)
    assert found["exact"] == [{"row": 1, "prompt_id": ids[0]}]
    assert [pair["prompt_id"] for pair in found["prefix"]] == ids[:2]


def write_tokenizer(folder: Path) -> Path:
    """A token for every word, and a chat template that adds two."""
    folder.mkdir()
    tokenizer = Tokenizer(models.WordLevel({"?": 0, "<s>": 1, "ask": 2, "say": 3}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "eos_token": "<s>",
        "chat_template": "ask {{ messages[0]['content'] }} say",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_long_prompts_are_left_out_and_tokens_counted(tmp_path: Path) -> None:
    rows = [{"problem": "one two three", "answer": 1}, {"problem": "one two", "answer": 2}]
    source = write_jsonl(tmp_path / "p.jsonl", rows)
    folder = write_tokenizer(tmp_path / "model")
    arguments = ["--source", "jsonl", source, "--template", "plain", "--tokenizer", folder]
    output = tmp_path / "all.parquet"
    assert run(*arguments, "--output", output) == 0
    assert [prompt.extra["num_tokens"] for prompt in load_prompts(output)] == [5, 4]
    output = tmp_path / "short.parquet"
    assert run(*arguments, "--max-prompt-tokens", "4", "--output", output) == 0
    (prompt,) = load_prompts(output)
    assert (prompt.text, prompt.extra["num_tokens"]) == ("one two", 4)
    assert manifest_of(output)["steps"][-1] == {
        "name": "longer than 4 tokens",
        "num_removed": 1,
        "num_left": 1,
    }
    # Without markup one more fits.
    output = tmp_path / "plain.parquet"
    plain = ["--chat-template", "plain", "--max-prompt-tokens", "3"]
    assert run(*arguments, *plain, "--output", output) == 0
    assert [prompt.extra["num_tokens"] for prompt in load_prompts(output)] == [3, 2]


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: BaseException
) -> None:
    source = write_jsonl(tmp_path / "p.jsonl", [GOOD])
    output = tmp_path / "out.parquet"
    assert run("--source", "jsonl", source, "--output", output) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(_table: Any, path: Path, **_options: Any) -> None:
        path.write_bytes(b"half")
        raise fault

    monkeypatch.setattr(parquet, "write_table", fail)
    code = run(
        "--source", "jsonl", source, "--output", output, "--overwrite", "--template", "boxed"
    )
    assert code == (130 if isinstance(fault, KeyboardInterrupt) else 2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_published_counts_of_dapo(tmp_path: Path) -> None:
    source = SHARED / "dapo_math_17k__SvS.parquet"
    if not source.is_file():
        pytest.skip(f"{source} is not there")
    evaluation = {
        "aime24": "aime24__Qwen.jsonl",
        "amc23": "amc23__Qwen.jsonl",
        "hmmt": "hmmt_feb_2025__Klear.jsonl",
        "math500": "math500__simpleRL.jsonl",
    }
    output = tmp_path / "dapo.parquet"
    files = [f"{name}={SHARED / file}" for name, file in evaluation.items()]
    arguments = ["--source", "dapo-math-17k", source, "--output", output]
    assert run(*arguments, "--evaluation-files", *files) == 0
    manifest = manifest_of(output)
    counts = manifest["counts"]
    assert (counts["num_rows"], counts["num_unique_messages"]) == (17_917, 17_290)
    assert (counts["num_ascii_keys"], counts["num_with_chinese"]) == (16_054, 3432)
    assert len(manifest["conflicts"]) == 57
    overlap = {
        name: (found["num_exact"], found["num_prefix"], found["num_problems"])
        for name, found in manifest["evaluation"].items()
    }
    assert overlap == {
        "aime24": (0, 0, 30),
        "amc23": (8, 26, 40),
        "hmmt": (0, 0, 30),
        "math500": (7, 18, 500),
    }


def test_counting_rows_does_not_load_transformers(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "p.jsonl", [GOOD])
    code = (
        "import runpy, sys\n"
        "tool = runpy.run_path(sys.argv[1])\n"
        "code = tool['main'](sys.argv[2:])\n"
        "assert code == 0, code\n"
        "print('loaded:', sorted({'torch', 'transformers'} & set(sys.modules)))\n"
    )
    tool = str(REPOSITORY / "tools" / "prepare_data.py")
    arguments = ["--source", "jsonl", str(source), "--output", str(tmp_path / "o.parquet")]
    done = subprocess.run(
        [sys.executable, "-c", code, tool, *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.endswith("loaded: []\n")


def test_the_tool_runs_from_any_folder(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "p.jsonl", [GOOD])
    tool = str(REPOSITORY / "tools" / "prepare_data.py")
    done = subprocess.run(
        [sys.executable, tool, "--source", "jsonl", "p.jsonl", "--output", "o.parquet"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "o.parquet: 1 prompts" in done.stdout
