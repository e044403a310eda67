"""One evaluation: start the engines, sample and judge, write the results, clean up."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from r2vpo_megatron.config import RunConfig
from r2vpo_megatron.evaluation import results
from r2vpo_megatron.evaluation.runner import Judge, chunk_size
from r2vpo_megatron.evaluation.scores import summarize
from r2vpo_megatron.observability import collect_provenance
from r2vpo_megatron.observability.work_progress import WorkProgress
from r2vpo_megatron.orchestration.cluster import get_in_time, ray_session
from r2vpo_megatron.orchestration.evaluation_inputs import PreparedEvaluation
from r2vpo_megatron.orchestration.placement import needed_resources
from r2vpo_megatron.orchestration.rollout_pool import RolloutPool
from r2vpo_megatron.orchestration.watchdog import explain_timeouts

START_UP = "(start-up)"  # of the engines, beside the benchmarks' times; no benchmark's name


def run_evaluation(prepared: PreparedEvaluation) -> results.EvaluationResult:
    """Make what is missing, then write results.json and results.md.

    Raises:
        RuntimeError: an engine failed; what was judged is kept. Errors of workers keep their type.
    """
    print(_describe(prepared), flush=True)
    if prepared.evaluation.remaining:
        _make_remaining(prepared)
    result = _collect(prepared)
    results.write_results(prepared.folder, result)
    return result


def _make_remaining(prepared: PreparedEvaluation) -> None:
    started = time.monotonic()
    evaluation, options = prepared.evaluation, prepared.options
    rollout = prepared.config.rollout
    size = chunk_size(
        len(evaluation.remaining),
        rollout.num_engines,
        rollout.max_num_seqs,
        options.chunk_responses,
    )
    with _engines(prepared.config, prepared.model.folder, prepared.folder) as pool:
        prepared.log.append_seconds({START_UP: round(time.monotonic() - started, 6)})
        with WorkProgress(evaluation.totals, evaluation.done) as progress:
            pool.on_event = progress.message
            evaluation.run(
                pool,
                options.sampling(rollout.max_response_tokens, prepared.tokenizer.stop_token_ids),
                Judge(prepared.tokenizer.decode_response, prepared.reward),
                progress,
                size,
            )


@contextmanager
def _engines(config: RunConfig, model_dir: Path, folder: Path) -> Iterator[RolloutPool]:
    """The engines, ready; gone, with their Ray, however the block ends."""
    with ray_session(config, needed_resources(config, with_learner=False)):
        pool = RolloutPool(config, model_dir)
        try:
            with explain_timeouts(0, folder / "stacks.txt"):
                get_in_time(pool.begin_start(), config.runtime.timeout_seconds, "start")
                pool.finish_start()
                yield pool
        finally:
            pool.stop()


def _describe(prepared: PreparedEvaluation) -> str:
    options, evaluation = prepared.options, prepared.evaluation
    rollout = prepared.config.rollout
    how = "greedy" if options.greedy else f"temperature {options.temperature:g}"
    nucleus = "" if options.greedy else f", top-p {options.top_p:g}"
    num_done, num_total = sum(evaluation.done.values()), sum(evaluation.totals.values())
    kept = f", {num_done} of them kept from before" if num_done else ""
    return (
        f"{prepared.model.name} -> {prepared.folder}\n"
        f"{', '.join(evaluation.totals)}: {num_total} responses{kept} of at most "
        f"{rollout.max_response_tokens} tokens, {how}{nucleus}; on "
        f"{prepared.config.runtime.device}: {rollout.num_engines} "
        f"{'engine' if rollout.num_engines == 1 else 'engines'} (TP {rollout.tensor_parallel})"
    )


def _collect(prepared: PreparedEvaluation) -> results.EvaluationResult:
    options = prepared.options
    seconds = prepared.log.load_seconds()
    return results.EvaluationResult(
        model=results.EvaluatedModel(
            name=prepared.model.name,
            path=options.model,
            checkpoint=prepared.model.checkpoint,
            base=prepared.model.base,
            fingerprint=prepared.fingerprint,
        ),
        settings=results.RecordedSettings(
            temperature=0.0 if options.greedy else options.temperature,
            top_p=options.top_p,
            num_samples=options.num_samples,
            max_response_tokens=prepared.config.rollout.max_response_tokens,
            prompt_template=options.template,
            chat_template=options.chat_template,
            thinking=options.thinking,
            grader=options.reward,
            seed=options.seed,
            limit=options.limit or None,
            system=options.system,
            dtype=options.dtype,
        ),
        benchmarks={
            part.name: results.BenchmarkResult(
                title=part.benchmark.title,
                source=part.source,
                licence=part.benchmark.licence,
                problems_sha256=part.sha256,
                notes=part.notes,
                wall_time_seconds=seconds.get(part.name, 0.0),
                scores=summarize(prepared.evaluation.records(part.name), options.num_samples),
            )
            for part in prepared.data
        },
        wall_time_seconds=sum(seconds.values()),
        provenance=collect_provenance(),
    )
