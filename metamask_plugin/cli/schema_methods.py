"""Every key of ``method_kwargs``, and the settings of the tasks. One entry a key."""

from collections.abc import Mapping

from metamask_plugin.cli.settings import Setting, block, flag, number, registry, text, whole, word

MOST_WIDE = 2**17
"""Units of a layer: two layers of that width would take 64 GB."""
MOST_ENTRIES = 2**24
"""Entries of a queue or bank."""
METAMASK_PRESETS = registry("methods.metamask:PRESETS")
ICL_MSR_PRESETS = registry("methods.icl_msr:PRESETS")
FORMS = registry("methods.metamask:FORMS")

TASK: dict[str, Setting] = {
    "task": text("what fills the task's loss: see metamask-ssl list tasks, or solo:<method of solo-learn>"),
    "task_kwargs": block("the task's settings"),
}

META: dict[str, Setting] = {
    "meta.enabled": flag("whether there is a meta step"),
    "meta.estimator": word("of the meta-gradient", registry("bilevel:ESTIMATORS")),
    "meta.estimator_kwargs": block("the estimator's settings"),
    "meta.trial": word(
        "plain, scaled as the main optimiser's, or with its momentum", registry("methods.trial_steps:TRIALS")
    ),
    "meta.trial_on": word("heads: the encoder takes no trial step", registry("methods.meta_update:TRIAL_ON")),
    "meta.inner_lr": number(
        "length of the trial step; null: the main learning rate; auto: a share of the adaptive step's",
        0,
        1e6,
        null=True,
        also=("auto",),
    ),
    "meta.outer_batch": word(
        "which batch the outer loss is of", registry("methods.meta_update:OUTER_BATCHES")
    ),
    "meta.accumulate": whole("meta-gradients that a meta step is the mean of", 1),
    "meta.every_n_steps": whole("a meta step every n-th iteration", 1),
    "meta.schedule": word("when a meta step is made", registry("methods.meta_update:SCHEDULES")),
    "meta.batch_share": number("of each batch that the meta step sees", above=0, most=1),
    "meta.precision": word("of the encoder in the meta step", registry("methods.meta_update:PRECISIONS")),
    "meta.follow_schedule": flag("the meta learning rate decays with the main one"),
    "meta.update_statistics": flag("the meta step moves BatchNorm's running statistics, too"),
    "meta.optimizer.name": word("the meta parameters' optimiser", registry("host.contract:OPTIMIZERS")),
    "meta.optimizer.lr": number("its learning rate", above=0, most=1e6),
    "meta.optimizer.weight_decay": number("its weight decay", 0, 1e6),
    "meta.optimizer.kwargs": block("of its constructor"),
}

METAMASK: dict[str, Setting] = {
    "preset": word("what the rest defaults to", METAMASK_PRESETS, null=True),
    **TASK,
    "alpha": number("weight of the task's loss, Eq. (5)", 0),
    "scale_loss": number("factor on the whole regular loss", above=0),
    "redundancy.weight": number("of L_drr; 0 leaves it out", 0),
    "redundancy.lamb": number("weight of the off-diagonal, Eq. (2)", 0),
    "redundancy.form": word("of the cross-correlation, Eq. (3)", FORMS),
    "redundancy.proj_hidden_dim": whole("width of its head", 1, MOST_WIDE),
    "redundancy.proj_output_dim": whole("output of its head", 1, MOST_WIDE),
    "redundancy.final_norm": flag("BatchNorm behind its head"),
    "mask.parameterisation": word(
        "M itself, or its logits", registry("modules.dimensional_mask:PARAMETERISATIONS")
    ),
    "mask.start": Setting("a run or checkpoint whose learned mask it starts from", "mask", null=True),
    **META,
}

ICL_MSR: dict[str, Setting] = {
    "preset": word("what the rest defaults to", ICL_MSR_PRESETS, null=True),
    **TASK,
    "lamb": number("weight of L_msr, Eq. (5)", 0),
    "gamma": number("weight of L_uni, Eq. (8)", 0),
    "level": word("where A enters", registry("tasks.interventional:LEVELS")),
    "uniformity.t": number("of Eq. (9)", above=0),
    "uniformity.scope": word(
        "pairs of an image's vectors, or of the batch's", registry("methods.icl_msr:SCOPES")
    ),
    "regularizer.n": whole("number of weight vectors", 1, 10_000),
    "regularizer.name": text("f_msr's network: conv4, conv, fc, resnet18, resnet50, or timm's"),
    "regularizer.kwargs": block("of its constructor"),
    "regularizer.activation": word("of the weights", registry("modules.semantic_regularizer:ACTIVATIONS")),
    **META,
}

BARE: dict[str, Setting] = {
    **METAMASK,
    **ICL_MSR,
    "preset": word("left aside", lambda: [*METAMASK_PRESETS(), *ICL_MSR_PRESETS()], null=True),
    "alpha": number("factor on the loss", above=0),
    "feature_dropout.rate": number("dropout on the encoder's output", 0, below=1),
    "feature_dropout.shared": flag("the same features in both views"),
}
"""Of ``bare`` and ``supervised``: what belongs to the other methods is left aside, so any config has both."""

METHOD_KWARGS: Mapping[str, Mapping[str, Setting]] = {
    "metamask": METAMASK,
    "icl_msr": ICL_MSR,
    "bare": BARE,
    "supervised": BARE,
}

TASK_KWARGS: dict[str, Setting] = {
    "proj_hidden_dim": whole("hidden width of the projection head", 1, MOST_WIDE),
    "proj_output_dim": whole("its output", 1, MOST_WIDE),
    "proj_layers": whole("its layers", 1, 64),
    "final_norm": flag("BatchNorm behind the head"),
    "pred_hidden_dim": whole("hidden width of the predictor; null: the task's own", 0, MOST_WIDE, null=True),
    "temperature": number("of the similarities", above=0),
    "online_temperature": number("ReSSL's, of the trained network", above=0),
    "target_temperature": number("ReSSL's, of the target", above=0),
    "bank_size": whole("past projections that serve as negatives; 0: none", 0, MOST_ENTRIES),
    "queue_size": whole("entries of the queue", 0, MOST_ENTRIES),
    "queue_start": whole("SwAV's: optimiser steps before the queue is used", 0),
    "base_momentum": number("of the target network at the start", 0, 1),
    "final_momentum": number("and at the end", 0, 1, null=True),
    "tau_plus": number("probability that a random image is of the anchor's class", 0, below=1),
    "beta": number("HCL's: concentration on hard negatives", 0),
    "alpha": number("RELIC's: weight of the invariance penalty", 0),
    "gamma": number("SSL-HSIC's: weight of HSIC(z, z)", 0),
    "kernel": word("SSL-HSIC's", registry("tasks.ssl_hsic:KERNELS")),
    "scale": number("SSL-HSIC's: of the kernel", above=0),
    "lamb": number("weight of the second term", 0),
    "scale_loss": number("factor on the loss", above=0),
    "form": word("Barlow Twins': of the cross-correlation", FORMS),
    "delta_plus": number("LMCL's: lower edge of the margin, a distance (1 - cosine) / 2", 0, 1),
    "delta_minus": number("LMCL's: upper edge of the margin", 0, 1),
    "symmetric": flag("ReSSL's: each view is a target, too"),
    "shared_head": flag("CMC's: one head for both views"),
    "num_prototypes": whole("SwAV's", 2, MOST_WIDE),
    "epsilon": number("SwAV's: of Sinkhorn's codes", above=0),
    "sinkhorn_iterations": whole("SwAV's", 1, 10_000),
    "freeze_prototypes_steps": whole("SwAV's", 0),
    "whitening_size": whole("W-MSE's: images of a slice", 2, 10**7),
    "whitening_iterations": whole("W-MSE's: partitions", 1, 10_000),
    "eps": number("W-MSE's: of the covariance", 0, below=1),
}
"""By name, for all tasks; which of them a task has, its constructor says."""

DATA_KWARGS: dict[str, Setting] = {
    "correlation": number("share of images whose background goes with their class", 0, 1),
    "size": whole("side of the images, pixels", 8, 1024),
    "seed": whole("of backgrounds and colours", 0, 2**32 - 1),
    "copies": whole("of each training digit, on backgrounds of their own", 1, 1000),
    "test_copies": whole("of each test digit, on backgrounds of their own", 1, 1000),
    "train_annotations": Setting("COCO's boxes of the training images", "path", null=True),
    "val_annotations": Setting("of the test images", "path", null=True),
}
"""Of the generated data sets and of COCO."""
