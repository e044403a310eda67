"""The vLLM engine. With worker_extension, the only files that import vllm."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from r2vpo_megatron.models import ARCHITECTURES
from r2vpo_megatron.models.spec import read_model_spec
from r2vpo_megatron.observability.memory import resident_bytes
from r2vpo_megatron.records import FloatArray, Generation, GenerationRequest
from r2vpo_megatron.rollout.engine import (
    EngineReport,
    NonFiniteLogprob,
    VersionSpans,
    check_request,
    check_token_ids,
    continuation_seed,
)
from r2vpo_megatron.rollout.engine_settings import engine_arguments, engine_environment
from r2vpo_megatron.rollout.pangu_plugin import register_openpangu
from r2vpo_megatron.rollout.sampling import SamplingSettings
from r2vpo_megatron.rollout.weight_receiver import WeightReceiver
from r2vpo_megatron.rollout.weight_transfer import register_weight_transfer
from r2vpo_megatron.rollout.weight_updates import WeightUpdateTracker


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


@dataclass
class _Queued:
    """A request that vLLM has."""

    request: GenerationRequest
    vllm_id: str  # by which vLLM keeps its state
    spans: VersionSpans = field(default_factory=VersionSpans)
    num_reported: int = 0  # of its tokens, in slices before


class VLLMEngine:
    """One vLLM engine in the calling process; satisfies `RolloutEngine`.

    Token ids go in and come out; the tokenizer is not loaded, so that the learner and the engine
    see the very same ids. vLLM is driven step by step and gives outputs of finished requests only;
    what is known of the others meanwhile is read from its output processor.

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
        self._vocab_size = read_model_spec(model_dir).vocab_size
        self._tracker = WeightUpdateTracker(policy_version, checkpoint_tensor_names(model_dir))

        # vLLM reads the environment while it is imported.
        from vllm import LLM

        register_openpangu()
        register_weight_transfer()
        try:
            self._llm: Any = LLM(**arguments)
        except ValueError as error:  # pydantic's own cannot be pickled on its way to the driver
            raise ValueError(f"vLLM refuses {model_dir}: {error}") from None
        self._weights = WeightReceiver(self._llm, self._tracker, self._reset_prefix_cache)
        self._queued: dict[str, _Queued] = {}  # by the id that vLLM's outputs name, in order
        self._finished: list[Generation] = []  # not yet reported
        self._scored: dict[str, Any] = {}  # vLLM's outputs of `score`, by id
        self._num_new_tokens = 0  # of finished requests, not yet reported
        self._sampling_version = policy_version  # of the weights of the last step
        self._ids = map(str, itertools.count())

    @property
    def policy_version(self) -> int:
        """Version of the last complete set of weights."""
        return self._tracker.policy_version

    @property
    def weights(self) -> WeightReceiver:
        """The receiving end of weight pushes; see `WeightReceiver`."""
        return self._weights

    def add_requests(
        self, requests: Sequence[GenerationRequest], sampling: SamplingSettings
    ) -> None:
        """Queue requests, one response each; see `RolloutEngine.add_requests`."""
        sample_ids = {queued.request.sample_id for queued in self._queued.values()}
        sample_ids.update(generation.sample_id for generation in self._finished)
        for request in requests:
            check_request(request, sampling, self._max_model_len, self._vocab_size)
            if request.sample_id in sample_ids:
                raise ValueError(f"request {request.sample_id}: is queued already")
            sample_ids.add(request.sample_id)
        if not self._queued:
            # A prompt found in the cache takes another path through the kernels, with other
            # rounding. An empty cache makes the result a function of weights and requests alone.
            self._reset_prefix_cache()
        added: list[str] = []
        try:
            for request in requests:
                token_ids = (*request.prompt_token_ids, *request.partial_token_ids)
                params = vllm_sampling_params(request, sampling)
                output_id, vllm_id = self._enqueue(token_ids, params, request.sample_id)
                self._queued[output_id] = _Queued(request, vllm_id)
                added.append(output_id)
        except Exception:
            self._forget(added)
            for output_id in added:
                del self._queued[output_id]
            raise

    def advance(self, seconds: float) -> EngineReport:
        """Sample for about so long, or until no request is left; see `RolloutEngine.advance`."""
        self._tracker.require_complete()
        self._close_spans()
        start = now = time.perf_counter()
        while self._queued:
            self._step()
            now = time.perf_counter()
            if now - start >= seconds:
                break
        return EngineReport(
            finished=self._take_finished(),
            num_unfinished=len(self._queued),
            num_tokens=self._take_num_new_tokens(),
            busy_seconds=now - start,
            memory_bytes=resident_bytes(),
        )

    def abort_requests(self) -> list[Generation]:
        """Take all requests back, with their tokens; see `RolloutEngine.abort_requests`."""
        self._close_spans()
        generations = self._take_finished()
        for queued in self._queued.values():
            token_ids, logprobs = _sampled(self._state(queued))
            generations.append(self._as_generation(queued, token_ids, logprobs, "abort"))
        self._forget(self._queued)
        self._queued = {}
        _require_finite(generations)
        return generations

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingSettings
    ) -> list[Generation]:
        """Sample one response per request; see `RolloutEngine.generate`."""
        self._tracker.require_complete()
        if self._queued or self._finished:
            raise ValueError(
                f"{len(self._queued)} other requests are queued and {len(self._finished)} finished "
                "ones not yet reported: advance until none is left"
            )
        self.add_requests(requests, sampling)
        try:
            generations = self.advance(math.inf).finished
        finally:  # an error, or an interrupt, leaves nothing behind
            self._forget(self._queued)
            self._queued, self._finished = {}, []
        by_id = {generation.sample_id: generation for generation in generations}
        return [by_id[request.sample_id] for request in requests]

    def score(self, token_id_lists: Sequence[Sequence[int]]) -> list[FloatArray]:
        """Log-probs of given sequences at temperature 1; see `RolloutEngine.score`."""
        from vllm import SamplingParams

        self._tracker.require_complete()
        for token_ids in token_id_lists:
            if not 1 <= len(token_ids) < self._max_model_len:
                raise ValueError(
                    f"a sequence of {len(token_ids)} tokens: must have between 1 and "
                    f"max_model_len - 1 = {self._max_model_len - 1}"
                )
            check_token_ids("a sequence", token_ids, self._vocab_size)
        self._close_spans()
        # The engine insists on generating one token; it is thrown away.
        params = SamplingParams(
            temperature=0.0, max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False
        )
        output_ids: list[str] = []
        try:
            for index, token_ids in enumerate(token_id_lists):
                output_ids.append(self._enqueue(token_ids, params, f"{index} of score")[0])
            while len(self._scored) < len(output_ids):
                self._step()
            outputs = [self._scored[output_id] for output_id in output_ids]
        finally:
            self._forget(set(output_ids) - self._scored.keys())
            self._scored = {}
        scores = [
            _logprobs_of(token_ids[1:], output.prompt_logprobs)
            for token_ids, output in zip(token_id_lists, outputs, strict=True)
        ]
        for index, logprobs in enumerate(scores):
            if not np.isfinite(logprobs).all():
                raise RuntimeError(f"sequence {index} of score: a log-prob is not finite")
        return scores

    def shutdown(self) -> None:
        """Free the engine's processes, process groups and memory."""
        llm = self.__dict__.pop("_llm", None)
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()

    def _enqueue(self, token_ids: Sequence[int], params: Any, name: str) -> tuple[str, str]:
        """Give vLLM a request; the id in its outputs, and the one by which it keeps the state."""
        output_id = next(self._ids)
        prompt = {"prompt_token_ids": list(token_ids)}
        try:
            vllm_id = self._llm.llm_engine.add_request(output_id, prompt, params)
        except ValueError as error:  # of a class that needs vLLM where it is unpickled
            raise ValueError(f"request {name}: vLLM refuses it: {error}") from None
        return output_id, vllm_id or output_id  # older versions return none

    def _step(self) -> None:
        """One step of all requests; puts away what it finishes."""
        finished = []
        for output in self._llm.llm_engine.step():
            queued = self._queued.pop(output.request_id, None)
            if queued is None:
                self._scored[output.request_id] = output
                continue
            done = output.outputs[0]
            finished.append(
                self._as_generation(queued, done.token_ids, done.logprobs, done.finish_reason)
            )
            self._num_new_tokens += len(done.token_ids) - queued.num_reported
        _require_finite(finished)
        self._finished += finished

    def _close_spans(self) -> None:
        """Before a step: where the weights are new, all tokens so far are of the version before.

        Tokens are sampled in steps alone and each step's are known when it is over, so that this
        holds whenever the weights were replaced.
        """
        if self._sampling_version == self.policy_version:
            return
        for queued in self._queued.values():
            token_ids, _ = _sampled(self._state(queued))
            queued.spans.close(len(token_ids), self._sampling_version)
        self._sampling_version = self.policy_version

    def _take_finished(self) -> list[Generation]:
        finished, self._finished = self._finished, []
        return finished

    def _take_num_new_tokens(self) -> int:
        """Tokens sampled since the last report."""
        num_new_tokens, self._num_new_tokens = self._num_new_tokens, 0
        for queued in self._queued.values():
            num_tokens = len(_sampled(self._state(queued))[0])
            num_new_tokens += num_tokens - queued.num_reported
            queued.num_reported = num_tokens
        return num_new_tokens

    def _state(self, queued: _Queued) -> Any:
        """What vLLM's output processor has gathered of a request."""
        return self._llm.llm_engine.output_processor.request_states[queued.vllm_id]

    def _forget(self, output_ids: Collection[str]) -> None:
        """Have vLLM drop requests."""
        if output_ids:
            self._llm.llm_engine.abort_request(list(output_ids))

    def _reset_prefix_cache(self) -> None:
        """Forget all KV; that of responses under way is computed anew in their next step."""
        if not self._llm.reset_prefix_cache(reset_running_requests=True):
            raise RuntimeError("vLLM did not reset its prefix cache")

    def _as_generation(
        self, queued: _Queued, token_ids: Sequence[int], logprobs: Any, finish_reason: str
    ) -> Generation:
        return Generation(
            sample_id=queued.request.sample_id,
            token_ids=tuple(token_ids),
            rollout_logprobs=_logprobs_of(token_ids, logprobs),
            finish_reason=str(finish_reason),
            policy_versions=queued.spans.stamp(len(token_ids), self._sampling_version),
        )


def vllm_sampling_params(request: GenerationRequest, sampling: SamplingSettings) -> Any:
    """vLLM's parameters of a request; a continuation samples what its partial tokens leave."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    num_partial_tokens = len(request.partial_token_ids)
    return SamplingParams(
        temperature=0.0 if sampling.greedy else sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=continuation_seed(request.seed, num_partial_tokens),
        max_tokens=sampling.max_response_tokens - num_partial_tokens,
        stop_token_ids=list(sampling.stop_token_ids),
        ignore_eos=True,  # stop_token_ids alone decide
        logprobs=0,  # that of the sampled token only
        flat_logprobs=True,  # one list instead of an object per token
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _sampled(state: Any) -> tuple[Sequence[int], Any]:
    """Tokens of an unfinished request, and their log-probs in vLLM's flat form."""
    return state.detokenizer.output_token_ids, state.logprobs_processor.logprobs


def _logprobs_of(token_ids: Sequence[int], flat: Any) -> FloatArray:
    """The log-probs [R] in vLLM's flat form, which must be those of these tokens."""
    if list(flat.token_ids) != list(token_ids):
        raise RuntimeError("vLLM's log-probs are not those of the sampled tokens")
    return np.array(flat.logprobs, dtype=np.float32)


def _require_finite(generations: Sequence[Generation]) -> None:
    for generation in generations:
        if not np.isfinite(generation.rollout_logprobs).all():
            position = int(np.argmin(np.isfinite(generation.rollout_logprobs)))
            raise NonFiniteLogprob(
                f"sample {generation.sample_id}: the log-prob of response token {position} is "
                f"{generation.rollout_logprobs[position]}; are the weights of version "
                f"{generation.policy_versions[position]} finite?"
            )
