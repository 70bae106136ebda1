"""Every key of a pretraining config: its type, range, default and meaning; and what cannot be together.

``method_kwargs`` is in :mod:`~metamask_plugin.config.methods`. What only the machine knows (its GPUs, its
memory), and what only building shows, is in :mod:`~metamask_plugin.cli.dry_run`.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from metamask_plugin.config.fields import (
    Anything,
    Block,
    Channels,
    Count,
    Deviations,
    FolderName,
    Keywords,
    Natural,
    NonNegative,
    Path,
    Pixels,
    Positive,
    PositiveShare,
    Rate,
    Seed,
    Text,
    Workers,
    key,
    refuse,
)
from metamask_plugin.config.views import View, count_views
from metamask_plugin.errors import check

Accelerator = Literal["auto", "cpu", "gpu", "cuda", "mps"]
Dataset = Literal[
    "digits",
    "confounded_digits",
    "cifar10",
    "cifar100",
    "stl10",
    "tiny_imagenet",
    "coco",
    "imagenet100",
    "imagenet",
    "custom",
]
Region = Literal["full", "foreground", "background"]
RegionForm = Literal["fill", "zoom"]
Protocol = Literal["paper", "icl_msr", "solo", "fast"]
Fraction = Annotated[float, Field(gt=0, lt=1)] | Literal[-1]
FRACTION = "between 0 and 1 (or -1 for all images)"


def _bits(value: int) -> int:
    if value not in (16, 32, 64):
        raise refuse("16, 32 or 64, or one of Lightning's names")
    return value


Precision = Literal[
    "64-true", "32-true", "16-true", "bf16-true", "16-mixed", "bf16-mixed", "64", "32", "16", "bf16",
    "transformer-engine", "transformer-engine-float16",
] | Annotated[int, AfterValidator(_bits)]  # fmt: skip
"""Lightning's."""
WITH_BOXES = ("confounded_digits", "tiny_imagenet", "coco")
DOWNLOADS = ("cifar10", "cifar100", "stl10")


class Backbone(Block):
    """The encoder."""

    name: Text = key(..., "conv4, conv, fc, resnet18, resnet50, or any model of timm's")
    kwargs: Keywords = key({}, "of the encoder's constructor")


class Data(Block):
    """The images."""

    dataset: Dataset = key(..., "see metamask-ssl list datasets")
    train_path: Path | None = key(None, "folder of the training images")
    val_path: Path | None = key(None, "folder of the test images")
    format: Literal["image_folder", "dali"] = key("image_folder", "dali: NVIDIA DALI reads the files")
    pipeline: Literal["torchvision", "kornia"] | None = key(None, "where the views are made")
    on_device: bool | None = key(None, "images on the GPU; null: where they fit")
    num_workers: Workers = key(2, "processes that read images")
    fraction: Fraction = key(-1, "share of the training images, -1 for all", expected=FRACTION)
    no_labels: bool = key(False, "train without labels")
    download: bool = key(False, "torchvision's data sets are fetched")
    region: Region | None = key(None, "what of the images is seen; needs boxes")
    region_form: RegionForm | None = key(None, "a foreground in its place, or enlarged")
    verify: Literal["none", "header", "decode"] | None = key(None, "what is looked at in every file")
    invalid_images: Literal["stop", "skip"] | None = key(None, "what a file that cannot be read does")
    mean: Channels | None = key(None, "per channel, subtracted from images in [0, 1]; null: the data set's")
    std: Deviations | None = key(None, "what they are then divided by")
    bits: Annotated[int, Field(ge=8, le=16)] | None = key(
        None, "bits that 16-bit grey uses, e.g. 12; null: 16"
    )
    evaluation_resize: Pixels | None = key(
        None, "pixels of the shorter side before the evaluation's centre crop; null: solo-learn's"
    )
    kwargs: Keywords = key({}, "options of the generated data sets; COCO's annotations")
    num_classes: Count | None = key(None, "written by a run")
    num_large_crops: Count | None = key(None, "written by a run of an earlier version")
    num_small_crops: Natural | None = key(None, "written by a run of an earlier version")

    @model_validator(mode="after")
    def check_together(self) -> "Data":
        name, region, dali = self.dataset, self.region or "full", self.format == "dali"
        check(
            region == "full" or name in (*WITH_BOXES, "custom"),
            "data.region",
            f"full for {name}, which has no foreground boxes",
            region,
            f"take one of {', '.join(WITH_BOXES)}",
        )
        check(
            not dali or self.pipeline is None,
            "data.pipeline",
            "left out with data.format=dali",
            self.pipeline,
        )
        check(not dali or region == "full", "data.region", "full with data.format=dali", region)
        check(not dali or self.bits is None, "data.bits", "null with data.format=dali", self.bits)
        check(
            not self.on_device or not (dali or self.pipeline == "torchvision"),
            "data.on_device",
            f"False or left out with the pipeline {'dali' if dali else self.pipeline}",
            self.on_device,
            "its images are files, or views made by workers; set data.pipeline=kornia",
        )
        check(
            not self.download or name in DOWNLOADS,
            "data.download",
            f"False for {name}, which cannot be fetched from here",
            self.download,
        )
        return self


class Dali(Block):
    """NVIDIA DALI."""

    device: Literal["cpu", "gpu"] | None = key(None, "where DALI works")


class Optimizer(Block):
    """Of encoder and heads."""

    name: Literal["sgd", "lars", "adam", "adamw"] = key(..., "of encoder and heads")
    batch_size: Annotated[int, Field(ge=2, le=10**7)] = key(
        ..., "images a step and process; BatchNorm needs two"
    )
    lr: Rate = key(..., "learning rate of a batch of 256: times batch_size x devices x nodes / 256")
    classifier_lr: Rate = key(0.1, "of the online classifier, likewise")
    weight_decay: Rate = key(0.0, "of all parameters of encoder and heads")
    exclude_bias_n_norm_wd: bool = key(False, "no weight decay on biases and norms")
    kwargs: Keywords = key({}, "of the optimiser's constructor")


class Scheduler(Block):
    """Of the learning rate."""

    name: Literal["warmup_cosine", "step", "none", "warmup_step"] = key(..., "how the learning rate changes")
    warmup_epochs: NonNegative = key(10, "of warmup_cosine")
    warmup_start_lr: Rate = key(3e-5, "learning rate at step 0")
    min_lr: Rate = key(0.0, "learning rate at the end of the cosine")
    interval: Literal["step", "epoch"] = key("step", "when warmup_cosine is stepped")
    lr_decay_steps: list[Annotated[int, Field(ge=-(10**9), le=10**9)]] | None = key(
        None, "epochs of step and warmup_step; of the latter negative ones count from the end"
    )
    warmup_steps: Natural | None = key(None, "of warmup_step, optimiser steps")
    decay_factor: PositiveShare | None = key(None, "of warmup_step")

    @model_validator(mode="after")
    def check_together(self) -> "Scheduler":
        name, steps = "scheduler.lr_decay_steps", self.lr_decay_steps
        if self.name == "step":
            check(bool(steps), name, "a list of epochs for scheduler.name='step'", steps)
            check(min(steps or [0]) >= 0, name, "epochs >= 0 for scheduler.name='step'", steps)
        return self


class Checkpoint(Block):
    """What is kept of a run."""

    enabled: bool = key(True, "whether last.ckpt and best.ckpt are written")
    dir: Path = key("trained_models", "folder of all runs")
    frequency: Count = key(1, "epochs between checkpoints")
    every_n_steps: Count | None = key(None, "steps between checkpoints within an epoch")

    @model_validator(mode="after")
    def check_together(self) -> "Checkpoint":
        every = self.every_n_steps
        check(
            every is None or self.enabled,
            "checkpoint.every_n_steps",
            "null with checkpoint.enabled=False",
            every,
        )
        return self


class AutoResume(Block):
    """Going on with a run."""

    enabled: bool = key(True, "the same command goes on with its run")
    extend: bool = key(True, "goes on from a run that was to be shorter")


class Numerics(Block):
    """NaN, infinity, collapse."""

    on_nonfinite: Literal["stop", "skip"] = key("stop", "what a loss or gradient that is not finite does")
    max_skipped_steps: Natural = key(10, "steps of a run that may be skipped")
    collapse_below: NonNegative = key(0.01, "spread of the features below which a warning is due")


class KNN(Block):
    """Nearest neighbours, while training and in the report."""

    k: list[Count] = key([5, 20, 200], "numbers of neighbours", expected="a list like [5, 20]")
    temperature: Positive | None = key(None, "of the votes; null: 1 for k = 5, else 0.07")
    every_n_epochs: Count = key(1, "epochs between evaluations")

    @model_validator(mode="after")
    def check_together(self) -> "KNN":
        check(bool(self.k), "evaluation.knn.k", "a list like [5, 20]", self.k)
        return self


class Probe(Block):
    """The linear probe of the report."""

    protocol: Protocol = key("paper", "of the linear probe")


class Evaluation(Block):
    """Ours; solo-learn ignores it."""

    enabled: bool = key(True, "kNN while training, and the report")
    final_report: bool = key(True, "tables and pictures at the end")
    knn: KNN = KNN()
    linear: Probe = Probe()


class KNNEval(Block):
    """solo-learn's kNN while training."""

    enabled: bool = key(False, "solo-learn's kNN while training")
    k: Count = key(20, "number of its neighbours")
    distance_func: Literal["euclidean", "cosine"] = key("euclidean", "between features")


class Performance(Block):
    """Speed alone."""

    compile: bool | Literal["reduce-overhead", "max-autotune"] = key(False, "torch.compile of the encoder")
    cuda_graph: bool = key(False, "replay the meta step as one CUDA graph")
    matmul_precision: Literal["highest", "high", "medium"] | None = key(None, "high allows TF32")
    disable_channel_last: bool = key(False, "the memory layout of images")


class Wandb(Block):
    """Weights & Biases."""

    enabled: bool = key(False, "log to Weights & Biases")
    project: Text = key("metamask_plugin", "where the run is listed")
    entity: Text | None = key(None, "user or team")
    offline: bool = key(False, "log to files alone")


class Pretraining(Block):
    """A pretraining config."""

    name: FolderName = key("run", "name of the run's folder, without its digest")
    method: Text = key(..., "what is trained: metamask, icl_msr, baseline, supervised")
    seed: Seed = key(5, "of weights, order of the images, views")
    max_epochs: Count = key(100, "passes over the training images")
    max_steps: Count | Literal[-1] = key(-1, "optimiser steps after which training ends; -1: no limit")
    resume_from_checkpoint: Path | None = key(None, "a last.ckpt to go on from")
    accelerator: Accelerator = key("auto", "auto: CUDA if there is a device, else the CPU; mps is untested")
    devices: Anything = key("1", 'a number ("1"), a list ([0, 1]) or auto')
    num_nodes: Annotated[int, Field(ge=1, le=10_000)] = key(1, "machines")
    strategy: Text = key("auto", "Lightning's: auto, ddp ...")
    precision: Precision = key(
        "32-true", "Lightning's: 32-true, 16-mixed, bf16-mixed ... The meta step does not follow it"
    )
    accumulate_grad_batches: Count = key(1, "batches before an optimiser step")
    gradient_clip_val: NonNegative | None = key(None, "largest norm, or value, of the gradient")
    gradient_clip_algorithm: Literal["norm", "value"] | None = key(None, "what gradient_clip_val limits")
    limit_train_batches: Count | PositiveShare | None = key(
        None,
        "batches of an epoch (an integer), or a share of them (a float)",
        expected="an integer >= 1, or a share in (0, 1] as a float",
    )
    process_timeout: Positive | None = key(None, "seconds that processes wait for one another")
    sync_batchnorm: bool = key(False, "BatchNorm over all processes; without a meta step alone")
    benchmark: bool | None = key(None, "cuDNN's search for the fastest convolution")
    deterministic: bool | Literal["warn"] | None = key(
        None, "deterministic algorithms alone; warn where there is none"
    )
    augmentations: Annotated[list[View], Field(min_length=1)] = key(
        ..., "solo-learn's list: how the views are made", expected="a list with at least one entry"
    )
    host: Literal["solo", "embedded"] | None = key(None, "written by a run: which host trained it")
    backbone: Backbone
    data: Data
    dali: Dali = Dali()
    optimizer: Optimizer
    scheduler: Scheduler
    checkpoint: Checkpoint = Checkpoint()
    auto_resume: AutoResume = AutoResume()
    numerics: Numerics = Numerics()
    evaluation: Evaluation = Evaluation()
    knn_eval: KNNEval = KNNEval()
    performance: Performance = Performance()
    wandb: Wandb = Wandb()
    method_kwargs: Keywords = key({}, "of the method")

    @model_validator(mode="after")
    def check_together(self) -> "Pretraining":
        check(
            not (self.deterministic and self.benchmark),
            "benchmark",
            "False with deterministic, since the search for the fastest algorithm is not",
            self.benchmark,
        )
        check(
            self.gradient_clip_algorithm is None or self.gradient_clip_val is not None,
            "gradient_clip_algorithm",
            "left out without gradient_clip_val",
            self.gradient_clip_algorithm,
            "set gradient_clip_val",
        )
        check(
            not (self.data.no_labels and self.method == "supervised"),
            "data.no_labels",
            "False with method=supervised: there is nothing to learn without labels",
            True,
        )
        check(
            not (self.data.no_labels and self.knn_eval.enabled),
            "knn_eval.enabled",
            "False with data.no_labels=True: neighbours have no classes then",
            True,
        )
        large, _ = count_views([(view.crop_size, view.num_crops) for view in self.augmentations])
        check(large >= 2, "augmentations", "pipelines that make at least 2 large crops together", large)
        return self
