"""Every key of ``method_kwargs``, of the tasks, and of the generated data sets.

A key without a value takes the preset's, or the default of what it is passed to: so null stands for that.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from metamask_plugin.config.fields import (
    BelowOne,
    Block,
    Count,
    Keywords,
    Natural,
    NonNegative,
    Number,
    Path,
    Positive,
    PositiveShare,
    Rate,
    Share,
    Text,
    Width,
    key,
)

Form = Literal["uncentred", "centred", "official"]
PositiveRate = Annotated[float, Field(gt=0, le=1e6)]
Entries = Annotated[int, Field(ge=0, le=2**24)]
"""Of a queue or bank."""
Images = Annotated[int, Field(ge=2, le=10**7)]


class MetaOptimizer(Block):
    """Of the meta parameters."""

    name: Literal["sgd", "lars", "adam", "adamw"] | None = key(None, "the meta parameters' optimiser")
    lr: PositiveRate | None = key(None, "its learning rate")
    weight_decay: Rate | None = key(None, "its weight decay")
    kwargs: Keywords | None = key(None, "of its constructor")


class Meta(Block):
    """The meta step."""

    enabled: bool | None = key(
        None, "False: without meta-learning, M stays 1, and f_msr as it was initialised"
    )
    estimator: Literal["exact", "unrolled", "finite_difference", "first_order", "permuted"] | None = key(
        None, "of the meta-gradient; `permuted` is a control"
    )
    estimator_kwargs: Keywords | None = key(None, "the estimator's settings: `r` of `finite_difference`")
    trial: Literal["auto", "plain", "adaptive", "momentum"] | None = key(
        None,
        "the trial step: plain, scaled as the main optimiser's, or with its momentum (SGD's, without "
        "`nesterov` and `dampening`); `auto` is adaptive for Adam, AdamW and LARS unless `inner_lr` is a "
        "length, else plain",
    )
    trial_on: Literal["all", "heads"] | None = key(None, "heads: the encoder takes no trial step")
    inner_lr: Rate | Literal["auto"] | None = key(
        None,
        "length of the trial step; null: the main optimiser's current learning rate; `auto`: a plain step of "
        "2 % of the length of the adaptive one",
    )
    outer_batch: Literal["same", "next"] | None = key(
        None, "which batch the outer loss is of; a run with `next` is resumed at an epoch's start"
    )
    accumulate: Count | None = key(None, "meta-gradients that a meta step is the mean of")
    every_n_steps: Count | None = key(None, "of the meta steps only every n-th")
    when: Literal["after_step", "before_step", "epoch_end"] | None = key(
        None,
        "a meta step after each optimiser step; before the regular step of the same batch, whose forward "
        "pass it shares; or all of them after the epoch's last",
    )
    batch_share: PositiveShare | None = key(None, "the meta step sees this first part of a batch")
    precision: Literal["full", "bf16"] | None = key(
        None, "of the encoder in the meta step; heads and losses keep the parameters' own"
    )
    decay_lr: bool | None = key(None, "the meta learning rate decays with the main one")
    update_statistics: bool | None = key(
        None, "the meta step moves BatchNorm's running statistics, too; one more forward pass"
    )
    optimizer: MetaOptimizer = MetaOptimizer()


class Redundancy(Block):
    """L_drr."""

    weight: NonNegative | None = key(None, "of L_drr; 0 leaves it out")
    lamb: NonNegative | None = key(None, "weight of the off-diagonal, Eq. (2)")
    form: Form | None = key(
        None, "of the cross-correlation, Eq. (3); `centred` is Barlow Twins', `official` the release's"
    )
    proj_hidden_dim: Width | None = key(None, "width of its head")
    proj_output_dim: Width | None = key(None, "output of its head")
    final_norm: bool | None = key(None, "BatchNorm behind its head")


class Mask(Block):
    """M."""

    parameterisation: Literal["free", "sigmoid"] | None = key(None, "M itself, or its logits")
    start: Path | list[Number] | None = key(
        None,
        "a run or checkpoint whose learned mask it starts from",
        expected="a run, a checkpoint, or a list of weights",
    )


class Uniformity(Block):
    """L_uni."""

    t: Positive | None = key(None, "of Eq. (9)")
    scope: Literal["image", "batch"] | None = key(None, "pairs of an image's vectors, or of the batch's")


class Regularizer(Block):
    """f_msr."""

    n: Annotated[int, Field(ge=1, le=10_000)] | None = key(None, "number of weight vectors")
    name: Text | None = key(None, "f_msr's network: conv4, conv, fc, resnet18, resnet50, or timm's")
    kwargs: Keywords | None = key(None, "of its constructor")
    activation: Literal["sigmoid", "softplus", "none"] | None = key(None, "of the weights")


class FeatureDropout(Block):
    """Table 5 of MetaMask."""

    rate: BelowOne | None = key(None, "dropout on the encoder's output")
    shared: bool | None = key(None, "the same features in both views")


class Task(Block):
    """What every method has."""

    task: Text | None = key(
        None, "what fills the task's loss: see metamask-ssl list tasks, or `solo:<method of solo-learn>`"
    )
    task_kwargs: Keywords | None = key(None, "the task's settings")


class MetaMask(Task):
    """``method=metamask``."""

    preset: Literal["paper", "official"] | None = key(None, "what the rest defaults to")
    alpha: NonNegative | None = key(None, "weight of the task's loss, Eq. (5)")
    scale_loss: Positive | None = key(
        None, "factor on the whole regular loss; below 1 for large learning rates and LARS"
    )
    redundancy: Redundancy = Redundancy()
    mask: Mask = Mask()
    meta: Meta = Meta()


class MSR(Task):
    """What ICL-MSR adds."""

    lamb: NonNegative | None = key(None, "weight of L_msr, Eq. (5)")
    gamma: NonNegative | None = key(None, "weight of L_uni, Eq. (8)")
    level: Literal["features", "feature_map", "projection"] | None = key(None, "where A enters")
    uniformity: Uniformity = Uniformity()
    regularizer: Regularizer = Regularizer()
    meta: Meta = Meta()


class ICLMSR(MSR):
    """``method=icl_msr``."""

    preset: Literal["paper"] | None = key(None, "what the rest defaults to")


class Baseline(MSR, MetaMask):
    """``method=baseline`` and ``supervised``: what belongs to the other methods is left aside."""

    preset: Literal["paper", "official"] | None = key(None, "left aside")
    alpha: Positive | None = key(None, "factor on the loss")
    feature_dropout: FeatureDropout = FeatureDropout()


METHOD_KWARGS: Mapping[str, type[Block]] = {
    "metamask": MetaMask,
    "icl_msr": ICLMSR,
    "baseline": Baseline,
    "supervised": Baseline,
}


class TaskKwargs(Block):
    """By name, for all tasks; which of them a task has, its constructor says."""

    proj_hidden_dim: Width = key(None, "hidden width of the projection head")
    proj_output_dim: Width = key(None, "its output")
    proj_layers: Annotated[int, Field(ge=1, le=64)] = key(None, "its layers")
    final_norm: bool = key(None, "BatchNorm behind the head")
    pred_hidden_dim: Annotated[int, Field(ge=0, le=2**17)] = key(
        None, "hidden width of the predictor; null: the task's own"
    )
    temperature: Positive = key(None, "of the similarities")
    online_temperature: Positive = key(None, "ReSSL's, of the trained network")
    target_temperature: Positive = key(None, "ReSSL's, of the target")
    bank_size: Entries = key(None, "past projections that serve as negatives; 0: none")
    queue_size: Entries = key(None, "entries of the queue")
    queue_start: Natural = key(None, "SwAV's: optimiser steps before the queue is used")
    base_momentum: Share = key(None, "of the target network at the start")
    final_momentum: Share = key(None, "and at the end")
    tau_plus: BelowOne = key(None, "probability that a random image is of the anchor's class")
    beta: NonNegative = key(None, "HCL's: concentration on hard negatives")
    alpha: NonNegative = key(None, "RELIC's: weight of the invariance penalty")
    gamma: NonNegative = key(None, "SSL-HSIC's: weight of HSIC(z, z)")
    kernel: Literal["imq", "gaussian", "linear"] = key(None, "SSL-HSIC's")
    scale: Positive = key(None, "SSL-HSIC's: of the kernel, fixed")
    lamb: NonNegative = key(None, "weight of the second term")
    scale_loss: Positive = key(None, "factor on the loss")
    form: Form = key(None, "Barlow Twins': of the cross-correlation")
    delta_plus: Share = key(None, "LMCL's: a distance (1 - cosine) / 2, lower edge of the margin")
    delta_minus: Share = key(None, "LMCL's: upper edge of the margin")
    symmetric: bool = key(None, "ReSSL's: each view is a target, too")
    shared_head: bool = key(None, "CMC's: one head for both views")
    num_prototypes: Annotated[int, Field(ge=2, le=2**17)] = key(None, "SwAV's")
    epsilon: Positive = key(None, "SwAV's: of Sinkhorn's codes")
    sinkhorn_iterations: Annotated[int, Field(ge=1, le=10_000)] = key(None, "SwAV's")
    freeze_prototypes_steps: Natural = key(None, "SwAV's")
    whitening_size: Images = key(None, "W-MSE's: images of a slice")
    whitening_iterations: Annotated[int, Field(ge=1, le=10_000)] = key(None, "W-MSE's: partitions")
    eps: BelowOne = key(None, "W-MSE's: of the covariance")


class DataKwargs(Block):
    """Of the generated data sets and of COCO."""

    correlation: Share = key(None, "share of images whose background goes with their class")
    size: Annotated[int, Field(ge=8, le=1024)] = key(None, "side of the images, pixels")
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = key(None, "of backgrounds and colours")
    copies: Annotated[int, Field(ge=1, le=1000)] = key(
        None, "of each training digit, on backgrounds of their own"
    )
    test_copies: Annotated[int, Field(ge=1, le=1000)] = key(
        None, "of each test digit, on backgrounds of their own"
    )
    train_annotations: Path = key(None, "COCO's boxes of the training images")
    val_annotations: Path = key(None, "of the test images")
