"""Keys of solo-learn's scripts and of Lightning: accepted in a config, and without effect here."""

SOLO_LEARN = {
    "auto_resume.max_hours": 36,
    "auto_umap.dir": "auto_umap",
    "auto_umap.enabled": False,
    "auto_umap.frequency": 1,
    "checkpoint.keep_prev": False,
    "dali.encode_indexes_into_labels": False,
    "debug_augmentations": False,
    "optimizer.layer_decay": 0.0,
}
"""Keys of its own scripts and their defaults: accepted, handed on, and not checked."""

OF_ITS_METHODS = ("momentum.base_tau", "momentum.classifier", "momentum.final_tau")
"""Likewise, of its momentum methods."""

LIGHTNING = (
    *("barebones", "callbacks", "check_val_every_n_epoch", "default_root_dir", "detect_anomaly"),
    *("enable_autolog_hparams", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"),
    *("fast_dev_run", "inference_mode", "limit_predict_batches", "limit_test_batches", "limit_val_batches"),
    *("log_every_n_steps", "logger", "max_time", "min_epochs", "min_steps", "model_registry"),
    *("num_sanity_val_steps", "overfit_batches", "plugins", "profiler", "reload_dataloaders_every_n_epochs"),
    *("use_distributed_sampler", "val_check_interval"),
)
"""Of Lightning's Trainer: solo-learn hands them on; here they have no effect."""

WITHOUT_EFFECT = (*SOLO_LEARN, *OF_ITS_METHODS, *LIGHTNING)
