"""Peak memory of learner ranks as `cli.plan` models it, beside what real ranks on this CPU hold.

Each case makes two updates. "tensors" is what torch's allocator had given out at most, above what
the imports hold: the model counts tensors, so it is held to that, to 10% for the fullest rank.
"resident" is the process's high-water mark above the imports, of a run of its own: with the heap's
holes, gloo's buffers and threads, which no model of tensors knows.
Fails where a rank is further off than 10%.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from benchmarks._shapes import Shape

MIB = 2**20
TOLERANCE = 0.10


def make_cases() -> list:
    """Layouts and sizes in which other things decide each time."""
    from benchmarks._learner_cases import LearnerCase
    from r2vpo_megatron.config import ParallelConfig

    deep = Shape(256, 6, 8, 4, 1024, 8192, 32)  # activations
    wide = Shape(768, 4, 12, 4, 2304, 16384, 64)  # weights and optimizer
    head = Shape(256, 2, 8, 4, 768, 153376, 32)  # openPangu's vocabulary

    def layout(tokens: int = 2048, **fields: object) -> ParallelConfig:
        return ParallelConfig(max_tokens_per_micro_batch=tokens, **fields)

    fours, eights, one = (512,) * 4, (512,) * 8, (2048,)
    return [
        LearnerCase("one rank", deep, layout(), fours),
        LearnerCase("wide, bf16", wide, layout(), fours, dtype="bfloat16"),
        LearnerCase("vocabulary", head, layout(), fours),
        LearnerCase("vocabulary, TP2, bf16", head, layout(tensor=2), fours, dtype="bfloat16"),
        LearnerCase("recompute full", deep, layout(4096, recompute="full"), (1024,) * 4),
        LearnerCase("recompute mlp", deep, layout(recompute="mlp"), fours),
        LearnerCase("recompute core_attn", deep, layout(recompute="core_attn"), one),
        LearnerCase("TP2", wide, layout(tensor=2), fours, architecture="qwen2"),
        LearnerCase("TP2, sequence", deep, layout(tensor=2, sequence_parallel=True), fours),
        LearnerCase("CP2, one sequence", deep, layout(context=2), one),
        LearnerCase("CP2, core_attn", deep, layout(context=2, recompute="core_attn"), fours),
        LearnerCase("DP2, distributed, bf16", wide, layout(data=2), eights, dtype="bfloat16"),
        LearnerCase("DP2, not distributed", wide, layout(data=2), eights, distributed=False),
        LearnerCase("PP2", wide, layout(pipeline=2), eights),
        LearnerCase("PP2, 4 and 2 layers", deep, layout(pipeline=2, pipeline_layout="4,2"), eights),
        LearnerCase("PP2 x 3 chunks", deep, layout(512, pipeline=2, virtual_pipeline=3), eights),
        LearnerCase(
            "TP2 x PP2, full", wide, layout(tensor=2, pipeline=2, recompute="full"), eights
        ),
        LearnerCase("TP2 x DP2", deep, layout(tensor=2, data=2), eights),
    ]


def run_case(case, *, resident: bool) -> float:
    """Measure, print a row for every rank that differs, and return the worst relative error."""
    from benchmarks._learner_peaks import measure_peaks, modelled_peak

    worst = 0.0
    with tempfile.TemporaryDirectory(prefix="plan-memory-") as folder:
        peaks = measure_peaks(case, Path(folder), resident=resident)
        for rank, peak in enumerate(peaks):
            modelled = modelled_peak(case, Path(folder) / "model", rank)
            error = modelled.tensor_bytes / peak.tensor_bytes - 1
            worst = max(worst, abs(error))
            of_resident = f"{peak.resident_bytes / MIB:>10,.0f}" if resident else f"{'-':>10}"
            print(
                f"{case.name:<24}{rank:>4}{modelled.tensor_bytes / MIB:>10,.1f}"
                f"{peak.tensor_bytes / MIB:>10,.1f}{error:>+8.1%}{of_resident}  "
                f"{modelled.peak.name}",
                flush=True,
            )
    return worst


def main() -> None:
    """Run the cases and print a row for each rank."""
    parser = argparse.ArgumentParser(description="Modelled and measured peak memory.")
    parser.add_argument("--case", help="this case alone")
    parser.add_argument("--no-resident", action="store_true", help="leave the second run out")
    args = parser.parse_args()
    # The CPU platform refuses to run beside a GPU that Megatron would take.
    os.environ.update(CUDA_VISIBLE_DEVICES="")
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning,ignore::FutureWarning")
    from benchmarks._learner_cases import import_megatron

    import_megatron()
    header = f"{'MiB above the imports':<24}{'rank':>4}{'model':>10}{'tensors':>10}{'error':>8}"
    print(f"{header}{'resident':>10}  at the model's peak")
    cases = [case for case in make_cases() if args.case in (None, case.name)]
    errors = {case.name: run_case(case, resident=not args.no_resident) for case in cases}
    worst = max(errors, key=lambda name: errors[name])
    print(f"worst: {errors[worst]:.1%} ({worst}); target {TOLERANCE:.0%}")
    if errors[worst] > TOLERANCE:
        sys.exit(1)


if __name__ == "__main__":
    main()
