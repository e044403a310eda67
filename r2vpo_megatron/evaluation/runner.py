"""Sample and judge the responses of an evaluation, chunk by chunk, keeping each at once.

What a response is depends on the model, its prompt and its seed; not on the order of the work,
the number of engines, or how often the evaluation was interrupted. (Batches of other sizes round
differently, which may change a token now and then, in bfloat16 more than in float32.)
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from r2vpo_megatron.evaluation.response import ResponseRecord
from r2vpo_megatron.evaluation.response_log import ResponseLog
from r2vpo_megatron.records import Generation, GenerationRequest, Prompt
from r2vpo_megatron.rewards import RewardFunction, RewardResult, score_responses
from r2vpo_megatron.rollout.sampling import SamplingSettings

ROUNDS_PER_CHUNK = 2  # times max_num_seqs; see `chunk_size`


class UnorderedGenerator(Protocol):
    """A group of engines that work side by side."""

    def generate_unordered(
        self, chunks: Iterable[Sequence[GenerationRequest]], sampling: SamplingSettings
    ) -> Iterator[list[Generation]]:
        """Give each chunk's responses, in the order of its requests, as chunks are finished."""
        ...


class Progress(Protocol):
    """What is told how far the work is; see `observability.work_progress`."""

    def advance(self, counts: Mapping[str, int], notes: Mapping[str, str]) -> None:
        """Count what is done, by benchmark, with a note to each."""
        ...


@dataclass(frozen=True)
class BenchmarkPrompts:
    """The problems of a benchmark, tokenised.

    Attributes:
        name: of the benchmark.
        prompts: `prompt_id` is the problem's id, unique among them.
    """

    name: str
    prompts: Sequence[Prompt]


@dataclass(frozen=True)
class Sample:
    """One response to be made."""

    benchmark: str
    prompt: Prompt
    sample_index: int
    seed: int


@dataclass(frozen=True)
class Judge:
    """Decodes responses and judges them.

    Attributes:
        decode: token ids -> text, special tokens left out.
        reward: of `load_reward`.
    """

    decode: Callable[[Sequence[int]], str]
    reward: RewardFunction

    def records(
        self, samples: Sequence[Sample], generations: Sequence[Generation]
    ) -> list[ResponseRecord]:
        """One record per sample, in their order."""
        texts = [self.decode(generation.token_ids) for generation in generations]
        prompts = [sample.prompt for sample in samples]
        results = score_responses(self.reward, prompts, texts)
        return [
            _make_record(*parts) for parts in zip(samples, generations, results, texts, strict=True)
        ]


class Evaluation:
    """The responses of an evaluation: those that are kept, and those that are to be made.

    Args:
        benchmarks: in the order in which they are worked on.
        num_samples: responses to each problem.
        seed: of the evaluation.
        log: keeps the responses; what is in it is not made again.

    Raises:
        ValueError: the log is damaged or holds responses that do not belong here.
    """

    def __init__(
        self,
        benchmarks: Sequence[BenchmarkPrompts],
        num_samples: int,
        seed: int,
        log: ResponseLog,
    ) -> None:
        self._log = log
        self._records: dict[str, list[ResponseRecord]] = {}
        self.remaining: list[Sample] = []
        self.totals = {part.name: len(part.prompts) * num_samples for part in benchmarks}
        for part in benchmarks:
            samples = list(_list_samples(part, num_samples, seed))
            kept = {
                (record.problem_id, record.sample_index): replace(record, text="")
                for record in log.read(part.name)
            }
            self._records[part.name] = list(kept.values())
            for sample in samples:
                record = kept.pop((sample.prompt.prompt_id, sample.sample_index), None)
                if record is None:
                    self.remaining.append(sample)
                elif record.seed != sample.seed:
                    raise _stray(log, part.name, record, f"has seed {record.seed}")
            for record in kept.values():
                raise _stray(log, part.name, record, "is no sample of this evaluation")

    @property
    def done(self) -> dict[str, int]:
        """Responses that are kept, by benchmark."""
        return {name: len(records) for name, records in self._records.items()}

    def records(self, benchmark: str) -> list[ResponseRecord]:
        """The records of a benchmark by problem and sample, without their texts.

        Texts of long responses fill the memory; they are in the log.
        """
        return sorted(
            self._records[benchmark], key=lambda record: (record.problem_id, record.sample_index)
        )

    def run(
        self,
        generator: UnorderedGenerator,
        sampling: SamplingSettings,
        judge: Judge,
        progress: Progress,
        chunk_responses: int,
    ) -> None:
        """Make what is missing. After an exception, what was judged is kept.

        Responses of one chunk are judged while the engines work on the next ones.

        Args:
            generator: the engines.
            sampling: the distribution to draw from.
            judge: decodes and judges.
            progress: is told of each chunk.
            chunk_responses: responses that are judged and kept together.
        """
        by_id = {_sample_id(sample): sample for sample in self.remaining}
        assert len(by_id) == len(self.remaining), "a problem id occurs twice"
        previous = time.monotonic()
        for generations in generator.generate_unordered(
            _make_requests(self.remaining, chunk_responses), sampling
        ):
            samples = [by_id.pop(generation.sample_id) for generation in generations]
            records = judge.records(samples, generations)
            now = time.monotonic()
            self._keep(samples, records, now - previous)
            previous = now
            self._tell(progress, Counter(sample.benchmark for sample in samples))
        if by_id:
            raise RuntimeError(f"the engines ended {len(by_id)} responses short")
        self.remaining = []

    def _keep(
        self, samples: Sequence[Sample], records: Sequence[ResponseRecord], seconds: float
    ) -> None:
        by_benchmark: dict[str, list[ResponseRecord]] = defaultdict(list)
        for sample, record in zip(samples, records, strict=True):
            by_benchmark[sample.benchmark].append(record)
        for name, part in by_benchmark.items():
            self._log.append(name, part)
            self._records[name] += [replace(record, text="") for record in part]
        # A chunk may span benchmarks: by tokens, which is what takes the time.
        num_tokens = {
            name: sum(record.num_tokens for record in part) for name, part in by_benchmark.items()
        }
        total = max(sum(num_tokens.values()), 1)
        self._log.append_seconds(
            {name: round(seconds * count / total, 6) for name, count in num_tokens.items()}
        )

    def _tell(self, progress: Progress, counts: Mapping[str, int]) -> None:
        notes = {}
        for name in counts:
            records = self._records[name]
            accuracy = sum(record.acc for record in records) / len(records)
            notes[name] = f"accuracy {accuracy:.3f}"
        progress.advance(counts, notes)


def response_seed(seed: int, benchmark: str, problem_id: str, sample_index: int) -> int:
    """A 32-bit seed of one response, the same whatever else is evaluated, where and when."""
    # Lengths keep the parts apart, whatever characters they hold.
    parts = (str(seed), benchmark, problem_id, str(sample_index))
    text = "".join(f"{len(part)}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:4], "big")


def chunk_size(num_responses: int, num_engines: int, max_num_seqs: int, asked: int = 0) -> int:
    """How many responses are judged and kept together.

    Engines do not wait for the longest response of a chunk. What an interruption loses is the
    chunks that are not whole: small ones lose little. Large ones have more to judge side by side.
    So a chunk is about twice what an engine decodes at a time, smaller where not enough is left to
    make one for every engine.

    Args:
        num_responses: that are to be made.
        num_engines: that share them.
        max_num_seqs: responses that an engine decodes at a time.
        asked: what the user wants it to be; 0: as above.
    """
    if asked:
        return asked
    largest = ROUNDS_PER_CHUNK * max_num_seqs
    rounds = max(1, math.ceil(num_responses / (num_engines * largest)))
    return max(1, math.ceil(num_responses / (num_engines * rounds)))


def _list_samples(part: BenchmarkPrompts, num_samples: int, seed: int) -> Iterator[Sample]:
    """Problem by problem: the samples of a problem share the engine's cache of its prompt."""
    for prompt in part.prompts:
        for index in range(num_samples):
            sample_seed = response_seed(seed, part.name, prompt.prompt_id, index)
            yield Sample(part.name, prompt, index, sample_seed)


def _make_requests(samples: Sequence[Sample], size: int) -> Iterator[list[GenerationRequest]]:
    for start in range(0, len(samples), size):
        yield [
            GenerationRequest(_sample_id(sample), sample.prompt.token_ids, sample.seed)
            for sample in samples[start : start + size]
        ]


def _sample_id(sample: Sample) -> str:
    return f"{sample.benchmark}/{sample.prompt.prompt_id}/{sample.sample_index}"


def _make_record(
    sample: Sample, generation: Generation, result: RewardResult, text: str
) -> ResponseRecord:
    return ResponseRecord(
        problem_id=sample.prompt.prompt_id,
        sample_index=sample.sample_index,
        seed=sample.seed,
        num_tokens=len(generation.token_ids),
        finish_reason=generation.finish_reason,
        acc=bool(result.acc),
        pred=None if result.pred is None else str(result.pred),  # of any reward of a user's
        parsed=bool(result.parsed),
        failure=result.failure,
        text=text,
    )


def _stray(log: ResponseLog, benchmark: str, record: ResponseRecord, what: str) -> ValueError:
    return ValueError(
        f"{log.path(benchmark)}: sample {record.sample_index} of problem "
        f"{record.problem_id!r} {what}; valid: the file as the evaluation wrote it"
    )
