"""Every key of a config of ``main_linear.py``. One entry a key."""

from collections.abc import Mapping

from metamask_plugin.cli.schema import (
    ACCELERATORS,
    DATASETS,
    FOLDER_NAME,
    FORMS,
    REGIONS,
    SEED,
    trainer_settings,
)
from metamask_plugin.cli.settings import (
    MOST_WHOLE,
    Setting,
    block,
    flag,
    number,
    path,
    registry,
    sequence,
    text,
    whole,
    word,
)

HEADS = registry("evaluation.linear:HEADS")
OPTIMIZERS = registry("evaluation.linear:OPTIMIZERS")

LINEAR: dict[str, Setting] = {
    "name": FOLDER_NAME,
    "seed": SEED,
    "pretrained_feature_extractor": path("a run's folder, or a checkpoint", null=True),
    "pretrain_method": text("its method, where no args.json says it", null=True),
    "backbone.name": text("its encoder, where no args.json says it", null=True),
    "backbone.kwargs": block("of its constructor", null=True),
    "host": word("who built it, where no args.json says it", ("solo", "embedded"), null=True),
    "protocol": word(
        "how the probe is trained", registry("evaluation.linear:PROTOCOLS", "custom"), null=True
    ),
    "head": word("linear, or one hidden layer", HEADS, null=True),
    "masked": flag("MetaMask's mask on the features", null=True),
    "finetune": flag("train the encoder, too", null=True),
    "max_epochs": whole("of protocol=custom", 1, null=True),
    "optimizer.name": word("of protocol=custom", OPTIMIZERS, null=True),
    "optimizer.batch_size": whole("images a step", 1, 10**7, null=True),
    "optimizer.lr": number("of a batch of 256", above=0, most=1e300, null=True, expected="a float > 0"),
    "optimizer.weight_decay": number("of all parameters", 0, 1e6, null=True),
    "optimizer.kwargs.momentum": number("of SGD", 0, below=1, null=True),
    "optimizer.kwargs.nesterov": flag("of SGD", null=True),
    "optimizer.exclude_bias_n_norm_wd": flag("solo-learn's", null=True, unused=True),
    "optimizer.layer_decay": number("solo-learn's", 0, null=True, unused=True),
    "scheduler.name": word(
        "cosine, step ...; solo-learn's warmup_cosine with protocol=paper alone",
        registry("evaluation.linear:SCHEDULERS", "warmup_cosine"),
        null=True,
    ),  # fmt: skip
    "scheduler.min_lr": number("at the end", 0, 1e6, null=True),
    "scheduler.lr_decay_steps": sequence("epochs of step", whole("an epoch", 0, MOST_WHOLE), null=True),
    "scheduler.warmup_epochs": number("solo-learn's", 0, null=True, unused=True),
    "scheduler.warmup_start_lr": number("solo-learn's", 0, null=True, unused=True),
    "scheduler.interval": word("solo-learn's", ("step", "epoch"), null=True, unused=True),
    "data.dataset": word("what is tested on; null: what it was trained on", DATASETS, null=True),
    "data.train_path": path("folder of the training images", null=True),
    "data.val_path": path("folder of the test images", null=True),
    "data.format": text("image_folder or dali, which are read alike", null=True),
    "data.num_workers": whole("processes that read images", 0, 1024, null=True),
    "data.fraction": number(
        "share of the labels, -1 for all",
        above=0,
        below=1,
        also=(-1, -1.0),
        null=True,
        expected="between 0 and 1 (or -1 for all images)",
    ),  # fmt: skip
    "data.subset_seed": whole("which images of a fraction", 0, 2**32 - 1, null=True),
    "data.subset_file": path("a list of file names, for finetune=True", null=True),
    "data.kwargs": block("options of the generated data sets; COCO's annotations", null=True),
    "data.download": flag("torchvision's data sets are fetched", null=True),
    "data.no_labels": flag("False here", null=True),
    "data.pipeline": text("left aside: the images are not augmented", null=True, unused=True),
    "data.on_device": flag("left aside", null=True, unused=True),
    "data.verify": word("what is looked at in every file", ("none", "header", "decode"), null=True),
    "data.invalid_images": word("what a file that cannot be read does", ("stop", "skip"), null=True),
    "data.bits": whole("bits that 16-bit grey uses; null: as in training", 8, 16, null=True),
    "data.evaluation_resize": whole(
        "pixels of the shorter side before the centre crop; null: as in training", 1, 8192, null=True
    ),
    "data.region": word("what of the images is seen", REGIONS, null=True),
    "data.region_form": word("how a foreground is shown", FORMS, null=True),
    "data.augmentations": block("crop_size, mean, std; of fine-tuning rrc and horizontal_flip", null=True),
    "dali.device": word("solo-learn's", ("cpu", "gpu"), null=True, unused=True),
    "dali.encode_indexes_into_labels": flag("solo-learn's", null=True, unused=True),
    "checkpoint.enabled": flag("whether results are written", null=True),
    "checkpoint.dir": path("folder of the results", null=True),
    "checkpoint.frequency": whole("solo-learn's", 1, null=True, unused=True),
    "checkpoint.keep_prev": flag("solo-learn's", null=True, unused=True),
    "auto_resume.enabled": flag("solo-learn's", null=True, unused=True),
    "auto_resume.max_hours": number("solo-learn's", 0, null=True, unused=True),
    "accelerator": word("where to train", ACCELERATORS, null=True),
    "devices": Setting("solo-learn's: one device here", unused=True),
    "strategy": Setting("solo-learn's", unused=True),
    "precision": Setting("solo-learn's", unused=True),
    "num_nodes": whole("solo-learn's", 1, null=True, unused=True),
    "accumulate_grad_batches": whole("solo-learn's", 1, null=True, unused=True),
    "resume_from_checkpoint": path("solo-learn's", null=True, unused=True),
    "sync_batchnorm": flag("solo-learn's", null=True, unused=True),
    "debug_augmentations": flag("solo-learn's", null=True, unused=True),
    "performance.disable_channel_last": flag("solo-learn's", null=True, unused=True),
    "wandb.enabled": flag("ignored: the numbers are in summary.json", null=True),
    "wandb.project": text("solo-learn's", null=True, unused=True),
    "wandb.entity": text("solo-learn's", null=True, unused=True),
    "wandb.offline": flag("solo-learn's", null=True, unused=True),
    "auto_umap.enabled": flag("solo-learn's", null=True, unused=True),
    "mixup": Setting("solo-learn's main_linear.py alone"),
    "cutmix": Setting("solo-learn's main_linear.py alone"),
    "label_smoothing": Setting("solo-learn's main_linear.py alone"),
    "auto_augment": Setting("solo-learn's main_linear.py alone"),
}


def linear_schema() -> Mapping[str, Setting]:
    """With Lightning's other keys, which solo-learn's script hands to its Trainer."""
    return {**trainer_settings(), **LINEAR}
