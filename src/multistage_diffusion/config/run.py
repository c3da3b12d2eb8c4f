"""Configuration of a run: data, process, stages, network, training, sampling."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from multistage_diffusion.backbones import Backbone, UNet
from multistage_diffusion.noise import VP, Process
from multistage_diffusion.records import check, check_numbers, check_seed
from multistage_diffusion.sampling.sampler import Sampler

ModelConfig = UNet  # its name in version 0.1
Schedule = Literal["constant", "cosine", "linear", "inverse-sqrt"]
Weighting = Literal["process", "min-snr", "p2", "uncertainty"]
Precision = Literal["fp32", "bf16", "fp16"]
AugmentSigns = Literal["edm", "reversed"]
Scaling = Literal["pictures", "none", "range", "standardise"]
LabelMode = Literal["auto", "none"]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images come from and what is done to them."""

    source: str = "digits"
    """Source, like digits, fashion-mnist or folder:PATH."""
    root: str | None = None
    """Folder that holds the source's files; where they are looked for first."""
    resolution: int | None = None
    """Resize to this many pixels a side; by default the images stay as they are."""
    scale: Scaling = "pictures"
    """What arrays hold: pictures (bytes, or floats in [-1, 1]), or numbers of any range, by channel kept as they are
    (none), brought to [-1, 1] (range) or to mean 0 and deviation 1 (standardise); samples come back in their unit."""
    labels: LabelMode = "auto"
    """Labels of the source, if it has any, of all its images (auto), or no labels (none)."""
    on_bad_file: Literal["error", "skip"] = "error"
    """What to do with a picture that cannot be read: stop and name it, or leave it out and count it."""
    max_bad: float = 0.01
    """With skip, the largest share of pictures that may be left out; where there are more, training stops."""
    memory: float = 0.25
    """Share of the device's memory that the images may take; larger sets of shards are streamed from disk."""
    workers: int = 2
    """Threads that read ahead where images are streamed; 0 reads in the step itself, without a timeout."""
    timeout: float = 60.0
    """Seconds to wait for streamed images before training stops with an error."""
    flip: bool = False
    """Mirror half of the training images left to right."""
    augment_probability: float = 0.0
    """Probability of each of EDM's geometric augmentations; the network sees them with model.augment-labels 9."""
    augment_signs: AugmentSigns = "edm"
    """Signs of a turn and of a stretch's axis in those labels: EDM's, or reversed ones, as in version 0.1."""
    autoencoder: str | None = None
    """Train on the latents of this autoencoder of diffusers: a folder, or a hub id like OWNER/NAME/SUBFOLDER."""
    latent_scale: float | None = None
    """Factor of the latents; by default their measured standard deviation becomes 1."""

    def __post_init__(self) -> None:
        check_numbers(self, "data")
        check(self.resolution is None or self.resolution >= 4, "data.resolution", "at least 4", self.resolution)
        check(0 <= self.max_bad < 1, "data.max-bad", "in [0, 1)", self.max_bad)
        check(0 <= self.memory <= 1, "data.memory", "in [0, 1]", self.memory)
        check(0 <= self.workers <= 64, "data.workers", "in 0..64", self.workers)
        check(0 < self.timeout <= 86_400, "data.timeout", "above 0 and at most 86400", self.timeout)
        check(0 <= self.augment_probability <= 1, "data.augment-probability", "in [0, 1]", self.augment_probability)
        check(self.latent_scale is None or self.latent_scale > 0, "data.latent-scale", "positive", self.latent_scale)
        check(
            self.autoencoder is None or self.augment_probability == 0,
            "data.augment-probability",
            "0 with data.autoencoder: latents do not turn as images do",
            self.augment_probability,
        )
        check(
            self.autoencoder is None or self.scale == "pictures",
            "data.scale",
            "pictures with data.autoencoder, which encodes pictures",
            self.scale,
        )

    @property
    def tolerated(self) -> float:
        """Share of unreadable pictures that is left out without stopping."""
        return self.max_bad if self.on_bad_file == "skip" else 0.0


@dataclass(frozen=True, kw_only=True)
class StagesConfig:
    """The partition of the noise levels."""

    edges: tuple[float, ...] = ()
    """Edges between stages in sigma, increasing; --stages FILE sets them from `msd cluster`."""

    def __post_init__(self) -> None:
        check_numbers(self, "stages")
        increasing = all(low < high for low, high in zip((0.0, *self.edges), self.edges, strict=False))
        check(increasing, "stages.edges", "positive and increasing in sigma", self.edges)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Optimisation, batches, EMA and checkpoints."""

    steps: int = 100_000
    """Number of optimiser steps."""
    batch_size: int = 128
    """Images a step, over all processes together."""
    learning_rate: float = 2e-4
    """Learning rate after warm-up; never scaled by anything else."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw: Adam with decoupled weight decay; muon: updates of weights made orthogonal, adamw for biases, norms and
    embeddings."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates."""
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW)."""
    warmup_images: int = 0
    """Images over which the learning rate rises linearly from 0."""
    schedule: Schedule = "constant"
    """Learning rate after warm-up: constant; linear or cosine, to 0 at training.steps; inverse-sqrt of images seen."""
    weighting: Weighting = "process"
    """Weight of noise levels in the trained loss: the process's; min-snr, min(SNR, 5); p2, SNR / (1 + SNR);
    uncertainty, the process's over the mean loss at that level, which is learned."""
    clip_norm: float | None = 1.0
    """Largest norm of the gradient; larger ones are scaled down."""
    batches: Literal["mixed", "single-uniform", "single-p"] = "mixed"
    """mixed: every stage in every batch, by quota; single: one stage a batch, uniform or by its probability."""
    quotas: tuple[float, ...] | Literal["auto"] = ()
    """Share of each stage in a mixed batch; by default its probability under the training distribution; auto: such that
    the measured noise of the gradient is least. The trained loss is the same."""
    overlap: float = 0.0
    """How far a decoder is trained beyond its edges in mixed batches, on either side, as a share of its stage."""
    coupling: float = 0.0
    """Share of each decoder's update that is replaced by the mean of all decoders' updates, for decoders of one width;
    1 moves all alike."""
    coupling_images: int = 0
    """Images until which updates are coupled; 0: always."""
    branch_at: float = 0.0
    """Train one unified network first, and branch into stages after this share of the steps (below 1) or after this
    many images (a run that is shorter is not branched yet); 0 trains stages from the start."""
    branch_moments: Literal["carry", "reset"] = "carry"
    """The optimiser's moments at the branch: carried over, each decoder by its share, or set back to 0."""
    encoder_rate: float = 1.0
    """Factor of the learning rate for the encoder; 0 freezes it."""
    stage_rates: tuple[float, ...] = ()
    """Factor of the learning rate for each stage's decoder (and encoder, if separate); 0 freezes it."""
    label_dropout: float = 0.1
    """Share of labels hidden from a class-conditional network, for classifier-free guidance."""
    ema_half_life: float = 500_000.0
    """Half-life of the weights' average, in images."""
    ema_ramp_up: float | None = 0.05
    """The half-life is at most this share of the images seen; none: constant from the start."""
    sigma_rel: tuple[float, ...] = ()
    """Relative widths of power-function averages to track beside it, like 0.05 0.10; from their snapshots
    --sigma-rel makes an average of any width after training."""
    ema_snapshot_every: int = 5_000
    """Steps between snapshots of the power-function averages; each takes 4 bytes a parameter and width."""
    seed: int = 0
    """Seed of weights, data order and noise."""
    save_every: int = 5_000
    """Steps between checkpoints."""
    keep: int = 2
    """Number of newest checkpoints to keep."""
    keep_every: int = 0
    """Steps between checkpoints that are kept for good; 0 keeps none but the newest."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl."""

    def __post_init__(self) -> None:
        check_numbers(self, "training")
        for name in ("steps", "batch_size", "save_every", "keep", "log_every", "ema_snapshot_every"):
            check(getattr(self, name) >= 1, f"training.{name.replace('_', '-')}", "at least 1", getattr(self, name))
        check(self.steps <= 10**12, "training.steps", "at most 10^12", self.steps)
        check(self.batch_size <= 10**6, "training.batch-size", "at most 10^6", self.batch_size)
        check(self.learning_rate > 0, "training.learning-rate", "positive", self.learning_rate)
        check(all(0 <= beta < 1 for beta in self.betas), "training.betas", "in [0, 1)", self.betas)
        check(self.weight_decay >= 0, "training.weight-decay", "at least 0", self.weight_decay)
        check(self.warmup_images >= 0, "training.warmup-images", "at least 0", self.warmup_images)
        check(
            self.schedule != "inverse-sqrt" or self.warmup_images > 0,
            "training.warmup-images",
            "positive with training.schedule inverse-sqrt",
            self.warmup_images,
        )
        check(self.clip_norm is None or self.clip_norm > 0, "training.clip-norm", "positive or none", self.clip_norm)
        given = () if self.quotas == "auto" else self.quotas
        check(all(share > 0 for share in given), "training.quotas", "auto or positive shares", self.quotas)
        measured = self.quotas != "auto" or self.batches == "mixed"
        check(measured, "training.quotas", "shares unless training.batches is mixed", self.quotas)
        check(0 <= self.overlap <= 1, "training.overlap", "in [0, 1]", self.overlap)
        mixed = self.overlap == 0 or self.batches == "mixed"
        check(mixed, "training.overlap", "0 unless training.batches is mixed", self.overlap)
        check(0 <= self.coupling <= 1, "training.coupling", "in [0, 1]", self.coupling)
        check(self.coupling_images >= 0, "training.coupling-images", "at least 0", self.coupling_images)
        check(self.branch_at >= 0, "training.branch-at", "at least 0", self.branch_at)
        check(0 <= self.encoder_rate <= 1000, "training.encoder-rate", "in [0, 1000]", self.encoder_rate)
        rates = all(0 <= rate <= 1000 for rate in self.stage_rates)
        check(rates, "training.stage-rates", "numbers in [0, 1000]", self.stage_rates)
        learned = self.encoder_rate > 0 or not self.stage_rates or any(self.stage_rates)
        check(learned, "training.encoder-rate and training.stage-rates", "not all 0", 0)
        check(0 <= self.label_dropout <= 1, "training.label-dropout", "in [0, 1]", self.label_dropout)
        check(self.ema_half_life > 0, "training.ema-half-life", "positive", self.ema_half_life)
        check(self.ema_ramp_up is None or self.ema_ramp_up > 0, "training.ema-ramp-up", "positive", self.ema_ramp_up)
        distinct = len(set(self.sigma_rel)) == len(self.sigma_rel)
        check(
            distinct and all(0.001 <= value <= 0.28 for value in self.sigma_rel),
            "training.sigma-rel",
            "different numbers in [0.001, 0.28]",
            self.sigma_rel,
        )
        check(self.keep_every >= 0, "training.keep-every", "at least 0", self.keep_every)
        check_seed(self.seed, option="training.seed")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How steps are computed, on one process or many: memory and speed, not what is learned. May change on resume."""

    precision: Precision = "fp32"
    """Precision of matrix products and convolutions; weights, optimiser and average stay float32."""
    gradient_accumulation: int = 1
    """Micro-batches that each process cuts its share of a batch into, to save memory."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """With several processes: ddp, each holds all weights; fsdp, weights, optimiser and average are in shards."""
    compile: bool = False
    """Compile encoders and decoders with torch.compile; the first step then takes minutes."""
    activation_checkpointing: bool = False
    """Recompute residual blocks in the backward pass: less memory, more time."""
    channels_last: bool = False
    """Keep channels side by side in memory, which convolutions of GPUs prefer in half precision."""
    tf32: bool = False
    """Let matrix products in float32 use TF32 on a GPU; convolutions do so anyway."""
    timeout: float = 10.0
    """Minutes that processes wait for one another in a step before they give up."""

    def __post_init__(self) -> None:
        check_numbers(self, "engine")
        parts = self.gradient_accumulation
        check(1 <= parts <= 10**6, "engine.gradient-accumulation", "in 1..10^6", parts)
        check(0 < self.timeout <= 10**4, "engine.timeout", "in (0, 10^4]", self.timeout)
        check(not self.channels_last or self.parallel == "ddp", "engine.channels-last", "false with fsdp shards", True)


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What a run shows of itself while it trains, beside metrics.jsonl; nothing of it changes what is trained."""

    trackers: tuple[Tracker, ...] = ()
    """Trackers that get the metrics and grids, too; each is an extra, like multistage-diffusion[wandb]."""
    project: str = "multistage-diffusion"
    """Project (experiment) of wandb, mlflow and trackio."""
    name: str | None = None
    """Name of the run there; by default that of the run directory."""
    grid_every: int = 0
    """Steps between grids of samples, drawn from the averaged weights with the same seeds; 0 draws none."""
    grid_images: int = 64
    """Images of a grid; the classes of a conditional model take turns."""
    evaluate_every: int = 0
    """Steps between evaluations of the averaged weights on held-out images; 0 makes none."""
    metrics: tuple[str, ...] = ("fd", "loss")
    """What is evaluated, as in msd evaluate; loss alone draws no samples and needs no features."""
    features: str = "classifier"
    """Extractor of the distances' features, as in msd evaluate."""
    evaluate_images: int = 1_000
    """Generated images behind an evaluation's distances."""
    sample_batch: int = 256
    """Images drawn at once in both; halved where memory does not suffice, and changes no image."""

    def __post_init__(self) -> None:
        check_numbers(self, "logging")
        check(len(set(self.trackers)) == len(self.trackers), "logging.trackers", "different names", self.trackers)
        check(self.project != "" and self.name != "", "logging.project and logging.name", "not empty", '""')
        for name in ("grid_every", "evaluate_every"):
            check(getattr(self, name) >= 0, f"logging.{name.replace('_', '-')}", "at least 0", getattr(self, name))
        for name, least in (("grid_images", 1), ("evaluate_images", 2), ("sample_batch", 1)):
            check(
                getattr(self, name) >= least,
                f"logging.{name.replace('_', '-')}",
                f"at least {least}",
                getattr(self, name),
            )
        check(self.evaluate_every == 0 or len(self.metrics) > 0, "logging.metrics", "one or more names", self.metrics)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that determines a run."""

    data: DataConfig = field(default_factory=DataConfig)
    process: Process = field(default_factory=VP)
    stages: StagesConfig = field(default_factory=StagesConfig)
    model: Backbone = field(default_factory=UNet)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    sampling: Sampler = field(default_factory=Sampler)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        stages = len(self.edges) + 1
        self.model.require_stages(stages, self.stages.edges)
        few = stages <= self.training.batch_size
        check(few, "training.batch-size", f"at least {stages}, the number of stages", self.training.batch_size)
        check(
            self.engine.gradient_accumulation <= self.training.batch_size,
            "engine.gradient-accumulation",
            f"at most training.batch-size {self.training.batch_size}",
            self.engine.gradient_accumulation,
        )
        check(
            (self.data.augment_probability > 0) == (self.model.augment_labels > 0),
            "model.augment-labels",
            "9 with data.augment-probability above 0, and 0 without",
            self.model.augment_labels,
        )
        guidance = self.sampling.guidance
        check(guidance == 1 or self.model.classes > 0, "sampling.guidance", "1 without model.classes", guidance)
        if self.training.quotas and self.training.quotas != "auto":
            check(len(self.training.quotas) == stages, "training.quotas", f"{stages} shares", self.training.quotas)
        rates = len(self.training.stage_rates) in (0, stages)
        check(rates, "training.stage-rates", f"{stages} factors, one a stage", self.training.stage_rates)
        if self.training.branch_at > 0:
            divided = self.model.architecture != "unified" and stages > 1
            check(divided, "training.branch-at", "0 for a network without stages", self.training.branch_at)
            given = f"{self.training.branch_at:g}, which is step {self.branch_step} of {self.training.steps}"
            check(self.branch_step > 0, "training.branch-at", "after the first step", given)

    @property
    def branch_step(self) -> int:
        """Steps after which the unified network branches into stages; 0 if it never does."""
        training = self.training
        if training.branch_at < 1:
            return round(training.branch_at * training.steps)
        return math.ceil(training.branch_at / training.batch_size)

    @property
    def trunk(self) -> RunConfig:
        """The run before its branch: the unified network of the encoder's capacity, on all noise levels."""
        training = replace(self.training, branch_at=0.0, quotas=(), stage_rates=(), overlap=0.0)
        return replace(self, model=self.model.unified(), stages=StagesConfig(), training=training)

    @property
    def edges(self) -> tuple[float, ...]:
        """Edges that the network sees: none for a unified one."""
        return () if self.model.architecture == "unified" else self.stages.edges
