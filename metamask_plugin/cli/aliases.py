"""What other frameworks, and habit, call a key or a value: the remedy names ours."""

KEYS = {
    "arch": "backbone.name",
    "betas": "optimizer.kwargs.betas",
    "batch_size": "optimizer.batch_size",
    "config": "--config-name",
    "dataset": "data.dataset",
    "encoder": "backbone.name",
    "epochs": "max_epochs",
    "gpus": "devices",
    "learning_rate": "optimizer.lr",
    "lr": "optimizer.lr",
    "model": "backbone.name",
    "momentum": "optimizer.kwargs.momentum",
    "num_workers": "data.num_workers",
    "output_dir": "checkpoint.dir",
    "pretrained": "pretrained_feature_extractor",
    "pretrained_checkpoint_dir": "pretrained_feature_extractor",
    "resume": "resume_from_checkpoint",
    "save_dir": "checkpoint.dir",
    "temperature": "method_kwargs.task_kwargs.temperature",
    "train_path": "data.train_path",
    "val_path": "data.val_path",
    "wd": "optimizer.weight_decay",
    "weight_decay": "optimizer.weight_decay",
    "workers": "data.num_workers",
}
"""Of the configs; one that a kind of config does not have is passed over."""

BLOCKS = {"backbone": "backbone.name", "data": "data.dataset", "optimizer": "optimizer.name"}
"""Blocks of keys that are given a word, and the key that takes it."""

PRECISIONS = {
    "amp": "16-mixed",
    "bf16": "bf16-mixed",
    "fp16": "16-mixed",
    "fp32": "32-true",
    "half": "16-mixed",
    "mixed": "16-mixed",
}

CHOICES = {
    "ablation": {"no_mask": "no_meta", "baseline": "no_meta"},
    "scheduler.name": {"cosine": "warmup_cosine"},
}
"""Words for a choice, by its group or key."""
