"""The vLLM engine. With worker_extension, the only files that import vllm."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from r2vpo_megatron.models import ARCHITECTURES
from r2vpo_megatron.models.spec import read_model_spec
from r2vpo_megatron.records import FloatArray, Generation, GenerationRequest
from r2vpo_megatron.rollout.engine import WeightBucket, WeightUpdateError, WeightUpdateTracker
from r2vpo_megatron.rollout.pangu_plugin import register_openpangu
from r2vpo_megatron.rollout.sampling import SamplingSettings

WORKER_EXTENSION = "r2vpo_megatron.rollout.worker_extension.WeightPushExtension"


def engine_environment(device_name: str, num_threads: int = 1) -> dict[str, str]:
    """Environment variables of a process that is to hold an engine.

    Set them before the process loads torch: OpenMP reads its own only once.

    Args:
        device_name: "cpu", "cuda" or "npu".
        num_threads: OpenMP threads of the engine on a CPU.

    Raises:
        ValueError: the device name is unknown.
    """
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core lives in this very process
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",  # its warnings speak of tokenizers and preloads unused here
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    by_device = {
        # Without PASSIVE, idle OpenMP threads spin and starve the other processes of a busy
        # machine (ten times slower). Without nobind, vLLM claims cores that learners use.
        "cpu": {
            "OMP_NUM_THREADS": str(num_threads),
            "OMP_WAIT_POLICY": "PASSIVE",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            # vLLM compiles a sampler function even in eager mode (batched_count_greater_than).
            # On a CPU that takes a C++ compiler, and one that finds its headers in a path
            # with a space.
            "TORCHDYNAMO_DISABLE": "1",
            # Tensor-parallel workers killed at the end of their grace leave files in /dev/shm.
            "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "60",
        },
        "cuda": {},
        # The NZ layout of vllm-ascend would have to be converted back at every weight push.
        "npu": {"VLLM_ASCEND_ENABLE_NZ": "0"},
    }
    return environment | _for_device(by_device, device_name)


def _for_device(by_device: Mapping[str, dict[str, Any]], device_name: str) -> dict[str, Any]:
    if device_name not in by_device:
        raise ValueError(f"device_name={device_name!r}: must be one of {', '.join(by_device)}")
    return by_device[device_name]


def _platform_arguments(device_name: str) -> dict[str, Any]:
    """Arguments of `vllm.LLM` that depend on the platform."""
    by_device: dict[str, dict[str, Any]] = {
        "cpu": {
            # Compiling costs tens of seconds at start-up and gains nothing on a CPU.
            "enforce_eager": True,
            # For a prompt cut in chunks vLLM winds the request's generator back
            # (GPUModelRunner._bookkeeping_sync), which CPU generators cannot do.
            "enable_chunked_prefill": False,
        },
        "cuda": {"enforce_eager": False},
        "npu": {"enforce_eager": True},
    }
    return _for_device(by_device, device_name)


def engine_arguments(
    model_dir: Path,
    *,
    dtype: str,
    max_model_len: int,
    kv_cache_bytes: int,
    memory_fraction: float | None,
    max_num_seqs: int,
    tensor_parallel: int,
    seed: int,
    device_name: str,
) -> dict[str, Any]:
    """Arguments of `vllm.LLM`; those of `VLLMEngine` have the same meaning here.

    Raises:
        ValueError: the device name is unknown.
    """
    if device_name == "cpu":
        memory: dict[str, Any] = {"kv_cache_memory_bytes": kv_cache_bytes}
    else:
        # A fixed KV cache would make vLLM ignore the fraction.
        memory = {} if memory_fraction is None else {"gpu_memory_utilization": memory_fraction}
    return {
        "model": str(model_dir),
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # ignore sampling defaults and stop ids of the checkpoint
        "tensor_parallel_size": tensor_parallel,
        "dtype": dtype,
        "seed": seed,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "use_tqdm_on_load": False,
        "enable_prefix_caching": True,  # the responses of a group share their prompt
        "logprobs_mode": "processed_logprobs",  # the default is before temperature
        "worker_extension_cls": WORKER_EXTENSION,
        **memory,
        **_platform_arguments(device_name),
    }


def checkpoint_tensor_names(model_dir: Path) -> frozenset[str]:
    """Names of the tensors that a push to a model of this checkpoint must bring.

    Left out are what is computed rather than learned and a tied output layer, which some
    checkpoints write twice.

    Raises:
        ValueError: the folder is no whole safetensors checkpoint of a known architecture.
    """
    # Loads torch, which must not happen before the environment is set.
    from r2vpo_megatron.checkpoint.safetensors_io import CheckpointReader

    spec = read_model_spec(model_dir)
    names = ARCHITECTURES[spec.architecture].names
    with CheckpointReader(model_dir) as reader:
        return frozenset(
            name
            for name in reader.names()
            if not name.endswith(names.ignored_suffixes)
            and not (spec.tied_embeddings and name == names.lm_head)
        )


class VLLMEngine:
    """One vLLM engine in the calling process; satisfies `RolloutEngine`.

    Token ids go in and come out; the tokenizer is not loaded, so that the learner and the engine
    see the very same ids.

    Args:
        model_dir: folder in Hugging Face format with config.json and safetensors files.
        dtype: of weights, activations and KV cache: "float32", "bfloat16", "float16".
        max_model_len: longest prompt plus response, in tokens.
        kv_cache_bytes: size of the KV cache of each tensor-parallel rank, on a CPU.
        memory_fraction: share of a device's memory that the engine takes, weights included, on
            cuda and npu; None: vLLM's default.
        max_num_seqs: most responses that are decoded together.
        tensor_parallel: ranks that share the model.
        seed: of the engine; each request brings its own beside it.
        device_name: "cpu", "cuda" or "npu".
        policy_version: version of the weights in `model_dir`.

    Raises:
        ValueError: `model_dir` is no safetensors checkpoint of a known architecture, or the
            device name is unknown.
    """

    def __init__(
        self,
        model_dir: str | Path,
        *,
        dtype: str = "float32",
        max_model_len: int,
        kv_cache_bytes: int = 64 << 20,
        memory_fraction: float | None = None,
        max_num_seqs: int = 64,
        tensor_parallel: int = 1,
        seed: int = 0,
        device_name: str = "cpu",
        policy_version: int = 0,
    ) -> None:
        model_dir = Path(model_dir)
        arguments = engine_arguments(
            model_dir,
            dtype=dtype,
            max_model_len=max_model_len,
            kv_cache_bytes=kv_cache_bytes,
            memory_fraction=memory_fraction,
            max_num_seqs=max_num_seqs,
            tensor_parallel=tensor_parallel,
            seed=seed,
            device_name=device_name,
        )
        for name, value in engine_environment(device_name).items():
            os.environ.setdefault(name, value)
        self._max_model_len = max_model_len
        self._tracker = WeightUpdateTracker(policy_version, checkpoint_tensor_names(model_dir))

        # vLLM reads the environment while it is imported.
        from vllm import LLM

        register_openpangu()
        try:
            self._llm: Any = LLM(**arguments)
        except ValueError as error:  # pydantic's own cannot be pickled on its way to the driver
            raise ValueError(f"vLLM refuses {model_dir}: {error}") from None

    @property
    def policy_version(self) -> int:
        """Version of the last complete set of weights."""
        return self._tracker.policy_version

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingSettings
    ) -> list[Generation]:
        """Sample one response per request; see `RolloutEngine.generate`."""
        from vllm import SamplingParams

        self._tracker.require_complete()
        for request in requests:
            self._check_prompt(request, sampling.max_response_tokens)
        if not requests:
            return []
        # A prompt found in the cache takes another path through the kernels, with other rounding.
        # An empty cache makes the result a function of the weights and the requests alone.
        self._reset_prefix_cache()
        params = [
            SamplingParams(
                temperature=0.0 if sampling.greedy else sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                seed=request.seed,
                max_tokens=sampling.max_response_tokens,
                stop_token_ids=list(sampling.stop_token_ids),
                ignore_eos=True,  # stop_token_ids alone decide
                logprobs=0,  # that of the sampled token only
                detokenize=False,
            )
            for request in requests
        ]
        prompts = [{"prompt_token_ids": list(request.prompt_token_ids)} for request in requests]
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        return [
            self._as_generation(request, output.outputs[0])
            for request, output in zip(requests, outputs, strict=True)
        ]

    def score(self, token_id_lists: Sequence[Sequence[int]]) -> list[FloatArray]:
        """Log-probs of given sequences at temperature 1; see `RolloutEngine.score`."""
        from vllm import SamplingParams

        self._tracker.require_complete()
        if not token_id_lists:
            return []
        for token_ids in token_id_lists:
            if not 1 <= len(token_ids) < self._max_model_len:
                raise ValueError(
                    f"a sequence of {len(token_ids)} tokens: must have between 1 and "
                    f"max_model_len - 1 = {self._max_model_len - 1}"
                )
        # The engine insists on generating one token; it is thrown away.
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        prompts = [{"prompt_token_ids": list(token_ids)} for token_ids in token_id_lists]
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        return [
            np.array(
                [
                    entry[token_id].logprob
                    for token_id, entry in zip(
                        token_ids[1:], output.prompt_logprobs[1:], strict=True
                    )
                ],
                dtype=np.float32,
            )
            for token_ids, output in zip(token_id_lists, outputs, strict=True)
        ]

    def begin_weight_update(self, version: int) -> None:
        """Open a push; see `RolloutEngine.begin_weight_update`."""
        self._tracker.begin(version)
        self._call_workers("begin_weight_push")

    def load_weight_bucket(self, bucket: WeightBucket) -> dict[str, float]:
        """Load one bucket of the open push.

        Returns:
            Stage times in seconds, of the slowest tensor-parallel rank.

        Raises:
            WeightUpdateError: the bucket is not the next one of the open push, or is damaged.
        """
        try:
            self._tracker.expect(bucket)
        except WeightUpdateError as error:
            self._tracker.fail(str(error))
            raise
        times = self._call_workers("load_weight_push_bucket", bucket)
        self._tracker.accept(bucket)
        return {name: max(of_rank[name] for of_rank in times) for name in times[0]}

    def finish_weight_update(self, version: int, checksum: int) -> dict[str, float]:
        """Verify and activate the open push; see `RolloutEngine.finish_weight_update`.

        Raises:
            WeightUpdateError: the push is not complete; generation stays refused.
        """
        start = time.perf_counter()
        try:
            self._tracker.require_finishable(version, checksum)
        except WeightUpdateError as error:
            self._tracker.fail(str(error))
            raise
        self._call_workers("finish_weight_push")
        self._reset_prefix_cache()
        self._tracker.commit()
        return {"weight_sync/finish_seconds": time.perf_counter() - start}

    def abort_weight_update(self) -> None:
        """Give up the open push, if any."""
        self._tracker.fail("aborted")
        self._llm.collective_rpc("abort_weight_push")

    def shutdown(self) -> None:
        """Free the engine's processes, process groups and memory."""
        llm = self.__dict__.pop("_llm", None)
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()

    def _call_workers(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every worker within the open push, which fails with it.

        Whatever breaks off a load leaves a mixture of two policies, so every error counts; those
        of other processes come as RuntimeError anyway.
        """
        try:
            return list(self._llm.collective_rpc(method, args=args))
        except Exception as error:
            self._tracker.fail(f"{type(error).__name__}: {error}")
            raise WeightUpdateError(f"{method} failed: {error}") from error

    def _reset_prefix_cache(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache: requests are still running")

    def _check_prompt(self, request: GenerationRequest, max_response_tokens: int) -> None:
        num_prompt_tokens = len(request.prompt_token_ids)
        if num_prompt_tokens == 0:
            raise ValueError(f"request {request.sample_id}: the prompt is empty")
        if num_prompt_tokens + max_response_tokens > self._max_model_len:
            raise ValueError(
                f"request {request.sample_id}: {num_prompt_tokens} prompt tokens + "
                f"max_response_tokens={max_response_tokens} exceed "
                f"max_model_len={self._max_model_len}"
            )

    def _as_generation(self, request: GenerationRequest, completion: Any) -> Generation:
        token_ids = tuple(completion.token_ids)
        logprobs = [
            entry[token_id].logprob
            for token_id, entry in zip(token_ids, completion.logprobs, strict=True)
        ]
        return Generation(
            sample_id=request.sample_id,
            token_ids=token_ids,
            rollout_logprobs=np.array(logprobs, dtype=np.float32),
            finish_reason=str(completion.finish_reason),
            policy_version=self.policy_version,
        )
