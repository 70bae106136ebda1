"""Every key of a config of ``main_linear.py``."""

from typing import Annotated, Literal

from pydantic import Field

from metamask_plugin.config.fields import (
    Anything,
    BelowOne,
    Block,
    Count,
    FolderName,
    Keywords,
    Natural,
    Path,
    Pixels,
    Positive,
    Rate,
    Seed,
    Text,
    Workers,
    key,
)
from metamask_plugin.config.pretraining import (
    FRACTION,
    Accelerator,
    Dataset,
    Fraction,
    Region,
    RegionForm,
)
from metamask_plugin.config.solo_learn import WITHOUT_EFFECT as OF_PRETRAINING
from metamask_plugin.config.views import LinearView

Head = Literal["linear", "mlp"]
WITHOUT_EFFECT = (
    *OF_PRETRAINING,
    *("accumulate_grad_batches", "auto_resume.enabled", "checkpoint.frequency", "dali.device"),
    *("data.on_device", "data.pipeline", "devices", "num_nodes", "optimizer.exclude_bias_n_norm_wd"),
    *("performance.disable_channel_last", "precision", "resume_from_checkpoint", "scheduler.interval"),
    *("scheduler.warmup_epochs", "scheduler.warmup_start_lr", "strategy", "sync_batchnorm"),
    *("wandb.entity", "wandb.offline", "wandb.project"),
)
"""Keys of solo-learn alone: accepted and not checked; one device does it all here."""


class Backbone(Block):
    """The encoder, where no ``args.json`` says it."""

    name: Text | None = key(None, "its encoder, where no args.json says it")
    kwargs: Keywords | None = key(None, "of its constructor")


class OptimizerKwargs(Block):
    """SGD's."""

    momentum: BelowOne = key(0.9, "of SGD")
    nesterov: bool = key(False, "of SGD")


class Optimizer(Block):
    """Of ``protocol=custom``."""

    name: Literal["adam", "adamw", "sgd"] | None = key(None, "of protocol=custom")
    batch_size: Annotated[int, Field(ge=1, le=10**7)] | None = key(None, "images a step")
    lr: Positive | None = key(None, "of a batch of 256")
    weight_decay: Rate = key(0.0, "of all parameters")
    kwargs: OptimizerKwargs = OptimizerKwargs()


class Scheduler(Block):
    """Of ``protocol=custom``."""

    name: Literal["none", "step", "cosine", "exponential", "warmup_cosine"] = key(
        "none", "cosine, step ...; solo-learn's warmup_cosine with protocol=paper alone"
    )
    min_lr: Rate = key(0.0, "at the end")
    lr_decay_steps: list[Natural] = key([], "epochs of step")


class Data(Block):
    """What is tested on, over what the encoder was trained on."""

    dataset: Dataset | None = key(None, "what is tested on; null: what it was trained on")
    train_path: Path | None = key(None, "folder of the training images")
    val_path: Path | None = key(None, "folder of the test images")
    format: Text | None = key(None, "image_folder or dali, which are read alike")
    num_workers: Workers | None = key(None, "processes that read images")
    fraction: Fraction | None = key(None, "share of the labels, -1 for all", expected=FRACTION)
    subset_seed: Seed | None = key(None, "which images of a fraction")
    subset_file: Path | None = key(None, "a list of file names, for finetune=True")
    kwargs: Keywords | None = key(None, "options of the generated data sets; COCO's annotations")
    download: bool | None = key(None, "torchvision's data sets are fetched")
    no_labels: bool | None = key(None, "False here")
    verify: Literal["none", "header", "decode"] | None = key(None, "what is looked at in every file")
    invalid_images: Literal["stop", "skip"] | None = key(None, "what a file that cannot be read does")
    bits: Annotated[int, Field(ge=8, le=16)] | None = key(
        None, "bits that 16-bit grey uses; null: as in training"
    )
    evaluation_resize: Pixels | None = key(
        None, "pixels of the shorter side before the centre crop; null: as in training"
    )
    region: Region | None = key(None, "what of the images is seen")
    region_form: RegionForm | None = key(None, "how a foreground is shown")
    augmentations: LinearView | None = key(
        None, "crop_size, mean, std; of fine-tuning rrc and horizontal_flip"
    )


class Checkpoint(Block):
    """The results."""

    enabled: bool = key(True, "whether results are written")
    dir: Path = key("trained_models", "folder of the results")


class Wandb(Block):
    """solo-learn's."""

    enabled: bool | None = key(None, "ignored: the numbers are in summary.json")


class Linear(Block):
    """A config of ``main_linear.py``."""

    name: FolderName = key("linear", "name of the results' folder, without its digest")
    seed: Seed = key(5, "of the head's weights and the order of the images")
    pretrained_feature_extractor: Path | None = key(None, "a run's folder, or a checkpoint")
    pretrain_method: Text | None = key(None, "its method, where no args.json says it")
    host: Literal["solo", "embedded"] | None = key(None, "who built it, where no args.json says it")
    protocol: Literal["paper", "icl_msr", "solo", "fast", "custom"] | None = key(
        None, "how the probe is trained; null: custom where optimizer.name is given, else paper"
    )
    head: Head = key("linear", "linear, or one hidden layer")
    masked: bool = key(False, "MetaMask's mask on the features")
    finetune: bool = key(False, "train the encoder, too")
    max_epochs: Count = key(100, "of protocol=custom")
    accelerator: Accelerator = key("auto", "where to train")
    backbone: Backbone = Backbone()
    optimizer: Optimizer = Optimizer()
    scheduler: Scheduler = Scheduler()
    data: Data = Data()
    checkpoint: Checkpoint = Checkpoint()
    wandb: Wandb = Wandb()
    mixup: Anything = key(None, "solo-learn's main_linear.py alone")
    cutmix: Anything = key(None, "solo-learn's main_linear.py alone")
    label_smoothing: Anything = key(None, "solo-learn's main_linear.py alone")
    auto_augment: Anything = key(None, "solo-learn's main_linear.py alone")
