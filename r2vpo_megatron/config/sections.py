"""The sections of a run's configuration: frozen dataclasses, one concern each.

Each field's docstring is what `--help` prints: meaning, unit, valid values. A section checks
its own fields; what concerns several sections is checked in `RunConfig` alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from r2vpo_megatron.config.checks import require, require_choice, require_positive

DTYPES = ("float32", "bfloat16")
DEVICES = ("auto", "cpu", "cuda", "npu")
TESTBEDS = ("", "pangu", "qwen2", "llama")


@dataclass(frozen=True)
class ModelConfig:
    """The model to train, in Hugging Face format."""

    path: str = ""
    """Folder of the Hugging Face checkpoint (config.json, safetensors, tokenizer)."""
    testbed: str = ""
    """Make and warm-start a tiny model instead of reading `path`: pangu, qwen2 or llama."""
    weights: str = ""
    """Folder of other weights of this model to start from, in Megatron's torch_dist format or
    Hugging Face's; the engines get them before the first rollout. Empty: those of the model."""
    dtype: str = "bfloat16"
    """Parameter dtype of learner and engines: float32 or bfloat16."""

    def __post_init__(self) -> None:
        require_choice("model.testbed", self.testbed, TESTBEDS)
        require_choice("model.dtype", self.dtype, DTYPES)


@dataclass(frozen=True)
class DataConfig:
    """Prompts to train on and prompts held out for evaluation."""

    train_prompts: str = ""
    """Prompt file (.jsonl or .parquet) to train on; empty: the testbed's own."""
    held_out_prompts: str = ""
    """Prompt file evaluated during training; empty: the testbed's own, else none."""
    reward: str = "math_dapo"
    """Reward by name (r2vpo_megatron.rewards.REWARDS), or file.py:function or module:function of
    your own."""
    chat_template: str = "model"
    """Chat template by name (r2vpo_megatron.data.chat.CHAT_TEMPLATES); model: the tokenizer's."""
    thinking: str = ""
    """How an openPangu model thinks: slow (its own default), fast or auto; empty: as it is."""
    check_answer_form: bool = True
    """Refuse prompts that ask for an answer in a form that the reward does not read."""


@dataclass(frozen=True)
class TrainConfig:
    """Sizes of an iteration and of an update."""

    num_iterations: int = 100
    """Iterations of rollout, update and weight push."""
    prompts_per_iteration: int = 128
    """Prompts sampled from per iteration."""
    responses_per_prompt: int = 8
    """G, responses per prompt: the group that advantages compare."""
    mini_batch_samples: int = 256
    """Responses per optimizer step."""
    seed: int = 0
    """Seed of everything random: model making, prompts order, sampling, replay."""

    def __post_init__(self) -> None:
        require_positive(
            "train", self, "num_iterations", "prompts_per_iteration", "mini_batch_samples"
        )
        require(self.seed >= 0, "train.seed", self.seed, "at least 0")
        require(
            self.responses_per_prompt >= 2,
            "train.responses_per_prompt",
            self.responses_per_prompt,
            "at least 2, since an advantage compares the responses of one prompt",
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, as Megatron-core runs it."""

    lr: float = 1e-6
    """Learning rate after warm-up."""
    warmup_updates: int = 0
    """Updates of linear warm-up from 0."""
    beta1: float = 0.9
    """Adam's first moment decay."""
    beta2: float = 0.999
    """Adam's second moment decay."""
    eps: float = 1e-8
    """Adam's denominator offset."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    max_gradient_norm: float = 1.0
    """Gradient norm above which gradients are scaled down; 0 turns it off."""
    distributed: bool = True
    """Shard the optimizer's state over data parallel ranks, where there are several."""

    def __post_init__(self) -> None:
        for name in ("lr", "warmup_updates", "weight_decay", "max_gradient_norm"):
            require(
                getattr(self, name) >= 0, f"optimizer.{name}", getattr(self, name), "at least 0"
            )
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name}", value, "from 0 to below 1")
        require(self.eps > 0, "optimizer.eps", self.eps, "above 0")


@dataclass(frozen=True)
class ParallelConfig:
    """How the learner's ranks share the model and the batch."""

    tensor: int = 1
    """Tensor parallel size; must divide the model's KV heads."""
    pipeline: int = 1
    """Pipeline parallel size (stages)."""
    virtual_pipeline: int = 1
    """Model chunks per pipeline stage; above 1 the schedule interleaves them."""
    pipeline_layout: str = ""
    """Layers of each model chunk from the bottom up, as in 9,8,8,9; empty: as many in each."""
    context: int = 1
    """Context parallel size: ranks that share the tokens of each micro-batch."""
    data: int = 1
    """Data parallel size; ranks = tensor x pipeline x context x data."""
    sequence_parallel: bool = False
    """Split activations along the sequence between tensor parallel regions."""
    max_tokens_per_micro_batch: int = 32768
    """Token budget of one packed micro-batch, which context parallel ranks share."""
    recompute: str = "none"
    """Activation recomputation: none, core_attn, mlp or full (whole layers)."""
    threads_per_rank: int = 1
    """CPU threads of one learner rank (cpu only)."""

    def __post_init__(self) -> None:
        require_positive(
            "parallel",
            self,
            "tensor",
            "pipeline",
            "virtual_pipeline",
            "context",
            "data",
            "threads_per_rank",
        )
        num_chunks = self.pipeline * self.virtual_pipeline
        counts = self.pipeline_layout.split(",")
        require(
            not self.pipeline_layout
            or (len(counts) == num_chunks and all(count.strip().isdecimal() for count in counts)),
            "parallel.pipeline_layout",
            self.pipeline_layout,
            f"empty, or a number of layers for each of parallel.pipeline x "
            f"parallel.virtual_pipeline = {num_chunks} chunks, with commas between",
        )
        multiple = self.tokens_multiple
        require(
            self.max_tokens_per_micro_batch >= 1
            and self.max_tokens_per_micro_batch % multiple == 0,
            "parallel.max_tokens_per_micro_batch",
            self.max_tokens_per_micro_batch,
            f"a positive multiple of {multiple} (2 x parallel.context where that is above 1, times "
            "parallel.tensor under parallel.sequence_parallel)",
        )
        require_choice("parallel.recompute", self.recompute, ("none", "core_attn", "mlp", "full"))

    @property
    def interleaved_chunks(self) -> int | None:
        """`virtual_pipeline` as Megatron takes it: None where nothing is interleaved."""
        return self.virtual_pipeline if self.virtual_pipeline > 1 else None

    @property
    def tokens_multiple(self) -> int:
        """What the tokens of a micro-batch must divide by; its tail is padded to it.

        Context parallelism cuts it into two chunks a rank, sequence parallelism what a rank has
        into one part per tensor parallel rank.
        """
        chunks = 2 * self.context if self.context > 1 else 1
        return chunks * (self.tensor if self.sequence_parallel else 1)

    @property
    def num_ranks(self) -> int:
        """Processes of the learner."""
        return self.tensor * self.pipeline * self.context * self.data


@dataclass(frozen=True)
class EvaluationConfig:
    """Accuracy on held-out prompts."""

    every_iterations: int = 10
    """Evaluate (temperature 1) every so many iterations; 0: only before and after."""
    num_prompts: int = 256
    """Held-out prompts used, the file's first ones."""

    def __post_init__(self) -> None:
        every = self.every_iterations
        require(every >= 0, "evaluation.every_iterations", every, "at least 0")
        require_positive("evaluation", self, "num_prompts")


@dataclass(frozen=True)
class OutputConfig:
    """Where the run writes."""

    dir: str = "outputs"
    """Folder that gets one sub-folder per run."""
    run_name: str = ""
    """Name of that sub-folder; empty: recipe name and start time."""
    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""
    cache_dir: str = ".cache"
    """Folder of what is made once and reused, the testbed's models."""


@dataclass(frozen=True)
class RuntimeConfig:
    """The machines."""

    device: str = "auto"
    """Platform: auto, cpu, cuda or npu."""
    ray_address: str = ""
    """Address of a running Ray cluster; empty: start one on this machine for this run."""
    node_groups: bool = False
    """Keep ranks to nodes with Ray's resource `learner` and engines to those with `rollout`, one
    for each device (ray_address only; slurm/ starts such a Ray)."""
    logprob_gap_alarm: float = 0.02
    """Mean absolute rollout/learner log-prob gap above which a warning is printed."""
    parity_samples: int = 4
    """Sequences whose log-probs engines and learner compare: prompts after the first push, and
    with algorithm.behavior_logprobs rollout responses at every iteration; 0: none."""
    head_check_every_updates: int = 10
    """Compare log-probs with log_softmax of whole logits at each such update; 0: never."""
    object_store_bytes: int = 512 << 20
    """Shared memory of a Ray that is started here, for batches on their way, in bytes."""
    timeout_seconds: float = 1800.0
    """Deadline of one collective or remote stage, in seconds."""

    def __post_init__(self) -> None:
        require_choice("runtime.device", self.device, DEVICES)
        require(
            bool(self.ray_address) or not self.node_groups,
            "runtime.node_groups",
            self.node_groups,
            "false unless runtime.ray_address names a Ray whose nodes have these resources",
        )
        require(
            self.head_check_every_updates >= 0,
            "runtime.head_check_every_updates",
            self.head_check_every_updates,
            "0 or above",
        )
        require(
            self.timeout_seconds > 0, "runtime.timeout_seconds", self.timeout_seconds, "above 0"
        )
        num_samples = self.parity_samples
        require(num_samples >= 0, "runtime.parity_samples", num_samples, "at least 0")
        minimum = 80 << 20  # below which Ray refuses to start
        size = self.object_store_bytes
        require(size >= minimum, "runtime.object_store_bytes", size, f"at least {minimum}")
