"""Which decoder layers each chunk of a pipeline holds, even and uneven; integers alone.

A pipeline of P stages with V chunks each (V > 1 where it is interleaved) cuts the layers, from the
bottom up, into P x V chunks. Chunk c is number c // P of stage c % P, as Megatron deals them out
(megatron/core/transformer/pipeline_parallel_layer_layout.py). Everything else that asks who holds
a layer asks here.
"""

from __future__ import annotations

import re

_COUNTS = re.compile(r"\s*[0-9]{1,6}\s*(,\s*[0-9]{1,6}\s*)*")


def layers_of_chunks(
    num_layers: int, pipeline: int, virtual: int | None = None, layout: str = ""
) -> list[list[int]]:
    """Cut the decoder layers into the chunks of a pipeline.

    Args:
        num_layers: of the whole model.
        pipeline: stages.
        virtual: chunks per stage; None or 1 where nothing is interleaved.
        layout: layers of each chunk, from the bottom up, such as "9,8,8,9"; empty for as many in
            each. The first and the last chunk may have 0, which leaves embedding or LM head.

    Returns:
        0-based layers by chunk; those of stage p are [p::pipeline].

    Raises:
        ValueError: sizes below 1, layers that do not divide without a layout, or a layout whose
            counts are not one for each chunk, add up to other than `num_layers` or leave a chunk
            in between empty.
    """
    num_chunks = _num_chunks(pipeline, virtual)
    if layout:
        counts = _counts(layout, num_layers, pipeline, virtual)
    elif num_layers % num_chunks:
        sizes = [n for n in range(1, num_layers + 1) if num_layers % n == 0]
        raise ValueError(
            f"{_title(virtual)} size {num_chunks} does not divide {num_layers} layers; "
            f"valid sizes: {', '.join(map(str, sizes))}"
            f"{_proposal(num_layers, pipeline, virtual, 'or an uneven split: ')}"
        )
    else:
        counts = [num_layers // num_chunks] * num_chunks
    firsts = [sum(counts[:chunk]) for chunk in range(num_chunks)]
    return [list(range(first, first + count)) for first, count in zip(firsts, counts, strict=True)]


def stage_of_layer(
    layer: int, num_layers: int, pipeline: int, virtual: int | None = None, layout: str = ""
) -> int:
    """Pipeline rank that holds this layer (0-based).

    Raises:
        ValueError: as layers_of_chunks.
    """
    chunks = layers_of_chunks(num_layers, pipeline, virtual, layout)
    return next(chunk for chunk, layers in enumerate(chunks) if layer in layers) % pipeline


def balanced_layout(num_layers: int, pipeline: int, virtual: int | None = None) -> str:
    """The most even layout: chunks, and stages, that differ by one layer at most.

    Layers that are left over go to the stages between the first, which has the embedding too, and
    the last, which has the LM head too; of those to the later ones, which keep the activations of
    fewer micro-batches. Where every stage must take one, the chunks with embedding and head are
    the last that do.

    Raises:
        ValueError: sizes below 1, or fewer layers than chunks.
    """
    num_chunks = _num_chunks(pipeline, virtual)
    if num_layers < num_chunks:
        raise ValueError(f"{num_layers} layers cannot fill {num_chunks} chunks of a pipeline")
    # Most willing first.
    stages = [*reversed(range(1, pipeline - 1)), 0, *([pipeline - 1] if pipeline > 1 else [])]
    chunks = [
        stage + pipeline * (turn if stage else num_chunks // pipeline - 1 - turn)
        for turn in range(num_chunks // pipeline)
        for stage in stages
    ]
    fewest, left_over = divmod(num_layers, num_chunks)
    counts = [fewest] * num_chunks
    for chunk in chunks[:left_over]:
        counts[chunk] += 1
    return ",".join(map(str, counts))


def _num_chunks(pipeline: int, virtual: int | None) -> int:
    for name, size in (("pipeline", pipeline), ("virtual pipeline", virtual)):
        if size is not None and size < 1:
            raise ValueError(f"{name} size {size}: must be at least 1")
    return pipeline * (virtual or 1)


def _counts(layout: str, num_layers: int, pipeline: int, virtual: int | None) -> list[int]:
    num_chunks = _num_chunks(pipeline, virtual)
    proposal = _proposal(num_layers, pipeline, virtual, "for example ")
    if not _COUNTS.fullmatch(layout):
        raise ValueError(
            f"pipeline_layout = {layout!r}: must be numbers of layers with commas between{proposal}"
        )
    counts = [int(count) for count in layout.split(",")]
    if len(counts) != num_chunks:
        raise ValueError(
            f"pipeline_layout = {layout!r}: has {len(counts)} counts, but {_title(virtual)} size "
            f"{num_chunks} needs {num_chunks}{proposal}"
        )
    if 0 in counts[1:-1]:  # it would have no parameters at all
        raise ValueError(
            f"pipeline_layout = {layout!r}: only the first and the last chunk may have no "
            f"layers{proposal}"
        )
    if sum(counts) != num_layers:
        raise ValueError(
            f"pipeline_layout = {layout!r}: adds up to {sum(counts)} layers, but the model has "
            f"{num_layers}{proposal}"
        )
    return counts


def _title(virtual: int | None) -> str:
    return "pipeline" if virtual in (None, 1) else "pipeline x virtual pipeline"


def _proposal(num_layers: int, pipeline: int, virtual: int | None, lead: str) -> str:
    """The end of an error: a layout that would do, where there is one."""
    if num_layers < _num_chunks(pipeline, virtual):
        return ""
    return f"; {lead}pipeline_layout = {balanced_layout(num_layers, pipeline, virtual)!r}"
