"""What docs/security.md promises, but for Ray (tests/end_to_end/test_ray_security.py)."""

from __future__ import annotations

import ast
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from ray._private import ray_constants
from ray._raylet import AuthenticationMode, AuthenticationTokenLoader, get_authentication_mode

import r2vpo_megatron
from r2vpo_megatron.cli.errors import RunFailed, run_command
from r2vpo_megatron.data.chat import ChatTokenizer
from r2vpo_megatron.observability import write_run_config
from r2vpo_megatron.observability.redaction import redact, redact_arguments
from r2vpo_megatron.orchestration.ray_isolation import private_environment, warn_if_open
from r2vpo_megatron.rollout.engine_settings import engine_environment
from r2vpo_megatron.testbed.tiny_model import make_tiny_model

PACKAGE = Path(r2vpo_megatron.__file__).parent
CANARY = "canary-1f6b2c94"
LOGIN = "https://someone:hunter22@example.org/model"

# Modules whose readers run what the file says, and what may use them.
CODE_READERS = ("pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml", "tarfile")
CODE_RUNNERS = ("eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load")
ALLOWED = {
    # Reads opcodes of plain data; looks no name up.
    ("checkpoint/restricted_pickle.py", "pickle"),
    # Only write.
    ("checkpoint/torch_blob.py", "pickle"),
    ("checkpoint/torch_dist_metadata.py", "pickle"),
    # weights_only, unless the caller of the inspection says that the file is trusted.
    ("checkpoint/torch_dist.py", "torch.load"),
    # Recipes and rewards of the user's own: code by design.
    ("config/user_file.py", "exec_module"),
    # A tokenizers-only class, which knows no remote code; and a folder that was just written.
    ("data/chat.py", "from_pretrained"),
    ("testbed/tiny_model.py", "from_pretrained"),
}


def _dangers(tree: ast.AST) -> Iterator[str]:
    """What in a module may run code that a file brings, by name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name for alias in node.names if (name := _root(alias.name)) in CODE_READERS)
        elif isinstance(node, ast.ImportFrom) and _root(node.module or "") in CODE_READERS:
            yield _root(node.module or "")
        elif isinstance(node, ast.Call):
            yield from _dangers_of_call(node)


def _dangers_of_call(call: ast.Call) -> Iterator[str]:
    name = ast.unparse(call.func)
    last = name.rpartition(".")[2]
    options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    if name in CODE_RUNNERS or last in ("exec_module", "unsafe_load"):
        yield name if name in CODE_RUNNERS else last
    for option in ("shell", "allow_pickle", "trust_remote_code"):
        if options.get(option, "False") != "False":
            yield option
    if last == "from_pretrained" and "trust_remote_code" not in options:
        yield last


def _root(module: str) -> str:
    return module.partition(".")[0]


def test_no_module_runs_what_a_file_says():
    found = {
        (path.relative_to(PACKAGE).as_posix(), danger)
        for path in PACKAGE.rglob("*.py")
        for danger in _dangers(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert found == ALLOWED


@pytest.mark.parametrize(
    ("code", "danger"),
    [
        ("import pickle", "pickle"),
        ("from yaml import load", "yaml"),
        ("torch.load(path, weights_only=True)", "torch.load"),
        ("np.load(path, allow_pickle=True)", "allow_pickle"),
        ("subprocess.run(text, shell=True)", "shell"),
        ("LLM(model, trust_remote_code=flag)", "trust_remote_code"),
        ("AutoConfig.from_pretrained(folder)", "from_pretrained"),
        ("eval(text)", "eval"),
    ],
)
def test_the_search_finds(code, danger):
    assert list(_dangers(ast.parse(code))) == [danger]


def test_code_beside_a_tokenizer_is_not_run(tmp_path):
    marker = tmp_path / "marker"
    (tmp_path / "hostile.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "hostile", "auto_map": {"AutoConfig": "hostile.Config"}})
    )
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["hostile.Tokenizer", None]}})
    )
    with pytest.raises(ValueError, match="no readable tokenizer"):
        ChatTokenizer(tmp_path)
    assert not marker.exists()


ENGINE = """
import sys
from r2vpo_megatron.rollout.vllm_engine import VLLMEngine
if __name__ == "__main__":
    VLLMEngine(sys.argv[1], dtype="float32", max_model_len=64, kv_cache_bytes=16 << 20).shutdown()
    print("loaded")
"""


@pytest.mark.slow
def test_an_engine_runs_no_code_beside_the_weights(tmp_path):
    folder, marker = tmp_path / "model", tmp_path / "marker"
    make_tiny_model(folder, "qwen2", warm_start=False)
    (folder / "hostile.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "hostile.Config", "AutoModelForCausalLM": "hostile.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": classes}))
    script = tmp_path / "engine.py"
    script.write_text(ENGINE)
    result = subprocess.run(
        [sys.executable, str(script), str(folder)],
        env=os.environ | engine_environment("cpu"),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert result.stdout.strip().endswith("loaded"), result.stderr[-2000:]
    assert not marker.exists()


@pytest.fixture
def secret(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setenv("SOME_PASSWORD", "short")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "disabled-for-now")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/place/of/token")


def test_redact(secret):
    assert redact(f"a {CANARY}b short disabled-for-now /place/of/token") == (
        "a ***b short disabled-for-now /place/of/token"
    )
    assert redact(f"no model at {LOGIN}: gone") == "no model at https://***@example.org/model: gone"
    assert redact("s3://me:p@ss@example.org/a@b") == "s3://***@example.org/a@b"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--api-key", "value", "next"], ["--api-key", "***", "next"]),
        (["--x.auth_token=value", "next"], ["--x.auth_token=***", "next"]),
        (["--rollout.max-response-tokens", "12"], ["--rollout.max-response-tokens", "12"]),
        (["--model.path", LOGIN], ["--model.path", "https://***@example.org/model"]),
    ],
)
def test_redact_arguments(arguments, expected):
    assert redact_arguments(arguments) == expected


def test_config_file_holds_no_secret(secret, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", "--api-key", "spoken-aloud", CANARY])
    config = {"model": {"path": LOGIN}, "output": {"run_name": f"with-{CANARY}"}}
    text = write_run_config(tmp_path, config, f"{CANARY}.py:run", Path("/model")).read_text()
    for word in (CANARY, "hunter22", "spoken-aloud"):
        assert word not in text
    assert json.loads(text)["config"]["output"]["run_name"] == "with-***"


@pytest.mark.parametrize("arguments", [[], ["--traceback"]])
def test_a_failure_tells_no_secret(secret, tmp_path, capsys, arguments):
    def fail(_: list[str]) -> int:
        try:
            raise OSError(f"401 for {LOGIN} with {CANARY}")
        except OSError as error:
            raise RunFailed(error, tmp_path / "error.txt") from error

    assert run_command(fail, arguments) == 1
    printed = capsys.readouterr().err
    written = (tmp_path / "error.txt").read_text()
    for text in (printed, written):
        assert "401 for https://***@example.org/model with ***" in text
        assert CANARY not in text


def test_an_unforeseen_error_tells_no_secret(secret, capsys):
    def fail(_: list[str]) -> int:
        raise KeyError(CANARY)

    assert run_command(fail, []) == 1
    assert "KeyError: '***'" in capsys.readouterr().err


@pytest.mark.parametrize(("mask", "mode"), [(0o000, 0o644), (0o002, 0o644), (0o077, 0o600)])
def test_others_cannot_write_to_what_a_command_makes(tmp_path, mask, mode):
    def write(_: list[str]) -> int:
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "file").touch()
        return 0

    before = os.umask(mask)
    try:
        assert run_command(write, []) == 0
        assert os.umask(mask) == mask  # put back
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "folder" / "file").stat().st_mode) == mode
    assert not (tmp_path / "folder").stat().st_mode & 0o022


def test_every_session_has_a_token_of_its_own(monkeypatch):
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    before = dict(os.environ)
    tokens = []
    for _ in range(2):
        with private_environment():
            path = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
            tokens.append(path.read_text())
            # What Ray itself makes of it, which it asked for once before.
            assert get_authentication_mode() == AuthenticationMode.TOKEN
            assert AuthenticationTokenLoader.instance().get_raw_token() == tokens[-1]
            assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
        assert not path.parent.exists()
        assert dict(os.environ) == before
        assert get_authentication_mode() == AuthenticationMode.DISABLED
        assert ray_constants.ENABLE_RAY_CLUSTER
    assert len(set(tokens)) == 2
    assert all(len(token) == 64 for token in tokens)


def test_a_token_of_the_user_is_kept(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "ab" * 32)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    with private_environment():
        assert os.environ["RAY_AUTH_TOKEN"] == "ab" * 32
        assert "RAY_AUTH_TOKEN_PATH" not in os.environ
        assert AuthenticationTokenLoader.instance().get_raw_token() == "ab" * 32


@pytest.mark.parametrize(
    ("mode", "address", "warns"),
    [
        (AuthenticationMode.DISABLED, "192.0.2.7:6379", True),
        (AuthenticationMode.DISABLED, "[2001:db8::7]:6379", True),
        (AuthenticationMode.DISABLED, "127.0.0.1:6379", False),
        (AuthenticationMode.TOKEN, "192.0.2.7:6379", False),
    ],
)
def test_an_open_cluster_is_warned_of(monkeypatch, capsys, mode, address, warns):
    context = SimpleNamespace(gcs_address=address)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(ray._raylet, "get_authentication_mode", lambda: mode)
    warn_if_open()
    assert ("has no authentication" in capsys.readouterr().err) == warns
