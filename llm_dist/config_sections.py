"""The sections of the run file: every key, its default, its rule and its help.

The docstring below a field is its help and its line in docs/configuration.md. Validation reads no file, no environment
and no torch.

What may change when a run is resumed is part of a field (`config_fields`). `[model]` stands in `config_model`.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from llm_dist.config_fields import Section, free, from_now, identity


class Run(Section):
    """Which run this is."""

    name: str = free(min_length=1, pattern=r"^[^/]+$")
    """Name of the run; its folder is `run.dir`/`run.name`."""
    dir: str = free("runs")
    """Folder that holds the run folders."""
    seed: int = identity(0, ge=0, lt=2**63)
    """Seeds initial weights, data order, masks and dropout."""
    steps: int = free(ge=1)
    """Optimizer steps after which the run is finished; raise it to go on."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.dir) / self.name


class Segment(Section):
    """Weights of the sources from a step on, until the next segment."""

    from_step: int = Field(ge=0)
    """The first step they rule is the one after so many finished steps."""
    weights: dict[str, float] = Field(min_length=1)
    """Share of a step's sequences by source; they need not sum to 1, and a source left out gives nothing."""


class Data(Section):
    """What the model reads."""

    train: str | dict[str, str] = free()
    """Shard folder, URL of one, or raw text with `data.tokenizer`; a table of them, by name, is a mixture. A source's
    fingerprint, not its path, belongs to the run's identity."""
    mixture: list[Segment] = from_now([])
    """Segments `{from_step, weights}`; sources are read at the same rate when absent. What lies behind the current step
    never changes; later segments, with new sources too, may be added."""
    holdout: str | list[str] = free([])
    """Shard folder or folders for validation; each gets its own curve, named after the folder."""
    sequence_tokens: int = identity(ge=1)
    """Length T of a training sequence."""
    packing: Literal["concatenate", "best_fit", "separate"] = identity("concatenate")
    """concatenate: sequences are cut from the stream. best_fit: whole documents, packed tightly, and padding. separate:
    a document, or a piece of one, per sequence, and padding; labelled data is always read so."""
    document_mask: bool = identity(False)
    """Attention and positions stop at document borders (taken from the index, never inferred)."""
    tokenizer: str | None = free(None)
    """Tokenizer folder for sources that are raw text or labelled: they become shards in `data.cache` when the run
    starts. Labelled sources take that of the run that `init.from` names, when absent."""
    text_column: str | None = identity(None)
    """Column of labelled files that holds the text, the words, the prompt or the messages; a number counts from 0 where
    there is no header."""
    text_pair_column: str | None = identity(None)
    """Column that holds the second text, or what belongs below a prompt; there is one text when absent."""
    label_column: str | None = identity(None)
    """Column that holds the label, the words' labels or the response."""
    labels: list[str] = identity([])
    """Names of the labels, in the order of their ids; those of the training data, sorted, when absent."""
    too_long: Literal["refuse", "cut"] = identity("refuse")
    """Labelled examples longer than `sequence_tokens`: refused, or cut at the end."""
    split: Literal["file", "blank-line", "line"] = free("file")
    """What a document is in raw .txt, as in `llm-dist tokenize`."""
    cache: str = free("~/.cache/llm_dist")
    """Folder for shards made from raw text, and for what is fetched from URLs; ranks of a host share it."""
    cache_gigabytes: float = free(16.0, gt=0)
    """What is fetched from URLs may take so much disk per host; the longest unused goes first."""
    workers: int = free(1, ge=0)
    """Background threads that prepare the next steps' rows; 0 prepares them in the training thread."""

    @model_validator(mode="after")
    def _mixture_fits(self) -> Self:
        if not self.sources or not all(self.sources):
            raise ValueError("data.train names no source; give a folder, or a table of folders by name")
        steps = [segment.from_step for segment in self.mixture]
        if steps and (steps[0] != 0 or steps != sorted(set(steps))):
            raise ValueError(f"data.mixture: from_step must begin at 0 and rise from segment to segment, found {steps}")
        for number, segment in enumerate(self.mixture):
            if unknown := segment.weights.keys() - self.sources.keys():
                raise ValueError(
                    f"data.mixture[{number}] weighs {', '.join(sorted(unknown))}, which data.train does not name; "
                    f"it names {', '.join(self.sources)}"
                )
            weights = segment.weights.values()
            if not all(0 <= weight < float("inf") for weight in weights) or not sum(weights):
                raise ValueError(f"data.mixture[{number}].weights must be at least 0, finite, and not all 0")
        return self

    @property
    def sources(self) -> dict[str, str]:
        """Where each source lies, in the order of their names; a single one is called train."""
        return {"train": self.train} if isinstance(self.train, str) else dict(sorted(self.train.items()))

    @property
    def holdouts(self) -> list[str]:
        """The held-out folders as a list."""
        return [self.holdout] if isinstance(self.holdout, str) else self.holdout

    def segments_before(self, step: int) -> list[tuple[int, dict[str, Fraction | None]]]:
        """Segments that have ruled when `step` steps are finished: shares, so that what means the same is equal.

        None stands for a share that follows from the sources' sizes.
        """
        segments = [(segment.from_step, _shares(segment.weights)) for segment in self.mixture]
        if not segments and len(self.sources) == 1:
            segments = [(0, _shares(dict.fromkeys(self.sources, 1.0)))]
        if not segments:
            segments = [(0, dict.fromkeys(self.sources))]
        return [(first, shares) for first, shares in segments if first < step]


def _shares(weights: dict[str, float]) -> dict[str, Fraction | None]:
    exact = {name: Fraction(str(weight)) for name, weight in sorted(weights.items()) if weight}
    return {name: weight / sum(exact.values()) for name, weight in exact.items()}


class BatchSize(Section):
    """How much one optimizer step reads."""

    tokens_per_step: int = identity(ge=1)
    """Tokens per optimizer step over all ranks; a multiple of `data.sequence_tokens`."""
    sequences_per_micro_batch: int = free(8, ge=1)
    """Most rows a rank computes at once; its rows are dealt evenly to as few micro-batches as that allows."""


class Optim(Section):
    """Optimizer and learning-rate schedule."""

    name: Literal["adamw", "sgd"] = identity("adamw")
    """adamw: decoupled weight decay (arXiv 1711.05101), fused. sgd: plain, for tests of the mathematics."""
    lr: float = from_now(3e-4, gt=0)
    """Peak learning rate."""
    beta1: float = from_now(0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = from_now(0.95, ge=0, lt=1)
    """Decay of the second moment."""
    eps: float = from_now(1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = from_now(0.1, ge=0)
    """Decoupled weight decay; never on norms, biases and embeddings."""
    layer_lr_decay: float = from_now(1.0, gt=0, le=1)
    """Rate of a block as a fraction of that of the block above it; below 1 a fine-tuned model keeps what it knows."""
    frozen: list[str] = identity([])
    """Patterns of parameter names that are not trained, as in `["embedding.*", "blocks.0.*"]`; not with engine zero."""
    clip: float = from_now(1.0, ge=0)
    """Global gradient norm above which gradients are scaled down; 0 never clips."""
    warmup_steps: int = from_now(0, ge=0)
    """Steps of linear warm-up from 0."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = from_now("cosine")
    """Shape after warm-up; wsd: constant, then linear decay over the last `decay_fraction`."""
    final_lr_fraction: float = from_now(0.1, ge=0, le=1)
    """Rate at the end of the schedule as a fraction of `lr`."""
    decay_fraction: float = from_now(0.2, gt=0, le=1)
    """Share of `total_steps` over which wsd decays."""
    total_steps: int | None = from_now(None, ge=1)
    """Steps the schedule spans; `run.steps` when the run is created, then frozen."""


class Engine(Section):
    """Who computes the step. Engines differ in speed and memory, never in mathematics."""

    name: Literal["plain", "zero", "fsdp"] = free("plain")
    """plain: one rank or DDP. zero: DeepSpeed ZeRO. fsdp: PyTorch FSDP2."""
    zero_stage: Literal[0, 1, 2, 3] = free(2)
    """What ZeRO partitions: 1 optimizer, 2 and gradients, 3 and parameters."""
    shard_ranks: int | None = free(None, ge=1)
    """fsdp: shard over groups of this many ranks and replicate between them (hybrid sharding); all when absent."""
    precision: Literal["fp32", "bf16"] = from_now("bf16")
    """bf16: matmul and attention in bf16; masters, norm statistics, softmax, loss and reduction in fp32."""
    recompute: Literal["none", "selective", "full"] = free("none")
    """Gradient checkpointing per block: selective keeps matmul and attention outputs, full keeps only the input."""
    compile: Literal["auto", "on", "off"] = free("auto")
    """torch.compile per block; auto: where a compiler is found, else one line says so."""
    deterministic: bool = free(False)
    """Bitwise reproducible kernels on GPU (CPU always is)."""


class Checkpoint(Section):
    """What is saved, when, and how long it is kept."""

    every_steps: int | None = free(None, ge=1)
    """Save every so many steps; a tenth of `run.steps` when absent. The last step is always saved."""
    keep_last: int = free(2, ge=2)
    """How many of the newest checkpoints stay; two at least, so that one may turn out damaged."""
    keep_every_steps: int | None = free(None, ge=1)
    """Checkpoints at multiples of this stay for good."""
    keep_best: bool = free(True)
    """The checkpoint nearest the best validation loss stays."""
    asynchronous: bool = free(False)
    """Training waits only for the copy to host memory; the write happens beside it."""


class Eval(Section):
    """Validation during training."""

    every_steps: int | None = free(None, ge=1)
    """Evaluate the held-out folders every so many steps; only at the end when absent."""
    max_sequences: int | None = free(None, ge=1)
    """Score at most so many windows of each held-out folder; all when absent."""
    patience: int | None = from_now(None, ge=1)
    """Stop when the first held-out folder has not been scored better for so many evaluations."""
    best: Literal["loss", "accuracy", "macro_f1", "f1", "pair_accuracy"] = identity("loss")
    """What the best evaluation is the best by: the lowest loss, or the highest of a score that the objective has."""


class Guard(Section):
    """What is done about numbers that cannot be right."""

    policy: Literal["stop", "skip", "rewind_and_skip"] = from_now("stop")
    """At a bad step: stop; leave its update out (engines plain and fsdp); or go back to the last checkpoint, compute
    again and leave it out there. A step left out is a finished step: its rows are consumed."""
    spike_z: float | None = from_now(None, gt=0)
    """A loss so many robust deviations above the last ones is bad, too; off when absent. Not finite is always bad."""
    spike_window_steps: int = from_now(100, ge=20)
    """How many losses a loss is compared with; at least 20 of them must be there."""
    max_skips: int = from_now(10, ge=0)
    """More steps left out among the last `spike_window_steps` stop the run."""
    replicas_every_steps: int | None = free(None, ge=1)
    """Compare what several ranks hold alike every so many steps; before each save it is done in any case."""


class Watch(Section):
    """What is done about a run in which nothing goes on any more."""

    hang_seconds: float = free(600.0, ge=0)
    """A phase (waiting for data, a micro-batch, a collective) that takes longer on all ranks is a hang: who is at fault
    is said, stacks are dumped, and the run ends with exit code 76. Building, restoring, a first step, evaluating and
    saving may take twice as long without a sign of progress. 0: never."""


class Log(Section):
    """What is reported."""

    every_steps: int = free(10, ge=1)
    """Report every so many steps."""
    sinks: list[Literal["tensorboard", "csv", "wandb"]] = free(["tensorboard"])
    """Where metrics go beside metrics.jsonl; a failing sink never stops a run."""


class Objective(Section):
    """What is learnt."""

    name: Literal["causal", "masked", "masked_nsp", "masked_sop", "classify", "tag", "instruct"] = identity("causal")
    """causal: predict each token from those before it. masked: predict hidden tokens from all around them; masked_nsp
    also tells whether a text goes on with another, masked_sop whether two texts stand in order. classify: a label per
    text or pair of texts. tag: a label per word. instruct: causal, on the responses only."""
    z_loss: float = from_now(0.0, ge=0)
    """Weight of the squared log-normaliser (PaLM's z-loss); 0 is off."""
    mask_fraction: float = identity(0.15, gt=0, le=0.5)
    """Share of a row's tokens that are hidden."""
    mask_unit: Literal["token", "word", "span"] = identity("token")
    """What is hidden as a whole: a token, a word, or a span of words."""
    span_words: float = identity(3.0, ge=1)
    """Mean number of words in a span."""
    mask_token_fraction: float = identity(0.8, ge=0, le=1)
    """Share of the hidden tokens that the mask token stands for."""
    random_token_fraction: float = identity(0.1, ge=0, le=1)
    """Share of the hidden tokens that another token stands for; the rest stays as it is."""
    pair_weight: float = from_now(1.0, ge=0)
    """Weight of a pair's loss beside the mean loss of its hidden tokens."""
    class_weights: Literal["none", "balanced"] | list[float] = from_now("none")
    """Factors of each label's loss; balanced: the rarer, the heavier, so that all labels weigh the same."""

    @model_validator(mode="after")
    def _fates_fit(self) -> Self:
        if self.mask_token_fraction + self.random_token_fraction > 1:
            raise ValueError(
                f"objective.mask_token_fraction={self.mask_token_fraction} and objective.random_token_fraction="
                f"{self.random_token_fraction} must be at most 1 together"
            )
        return self

    @property
    def scores(self) -> tuple[str, ...]:
        """What an evaluation may be judged by."""
        match self.name:
            case "masked":
                return "loss", "accuracy"
            case "masked_nsp" | "masked_sop":
                return "loss", "accuracy", "pair_accuracy"
            case "classify":
                return "loss", "accuracy", "macro_f1"
            case "tag":
                return "loss", "accuracy", "macro_f1", "f1"
            case _:
                return ("loss",)

    @property
    def is_masked(self) -> bool:
        """Whether hidden tokens are predicted."""
        return self.name.startswith("masked")

    @property
    def is_paired(self) -> bool:
        """Whether a row holds two texts that may not belong together."""
        return self.name in ("masked_nsp", "masked_sop")

    @property
    def is_labelled(self) -> bool:
        """Whether it learns from labels that people gave."""
        return self.name in ("classify", "tag", "instruct")

    @property
    def has_classes(self) -> bool:
        """Whether what it learns are labels with names."""
        return self.name in ("classify", "tag")

    @property
    def num_frame_tokens(self) -> int:
        """Tokens of a row that are put around its text."""
        return 3 if self.is_paired else 2 if self.is_masked else 0


class Init(Section):
    """Where the weights come from."""

    source: str | None = identity(None, alias="from")
    """Run folder, checkpoint or Hugging Face folder whose weights start this run; random when absent."""
    std: float = identity(0.02, gt=0)
    """Standard deviation of initial weights; residual outputs are scaled by 1/sqrt(2 layers)."""


class Plan(Section):
    """What planning assumes and refuses."""

    max_waste: float = free(0.1, ge=0, lt=1)
    """Share of computed rows that may be absent (ranks x micro-batch not dividing the step) at submission."""
    vocabulary_tokens: int = free(32_768, ge=1)
    """Vocabulary assumed where `data.train` is not there yet."""
