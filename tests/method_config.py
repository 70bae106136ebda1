"""Small configs of every method, for whoever tests a method or a host."""

from omegaconf import OmegaConf

TASK_KWARGS = {
    "simclr": {"bank_size": 20},
    "moco": {"queue_size": 24},
    "cmc": {"bank_size": 20, "temperature": 0.3, "shared_head": False},
    "dcl": {"bank_size": 20},
    "hcl": {"bank_size": 20},
    "lmcl": {"bank_size": 20},
    "nnclr": {"queue_size": 24, "pred_hidden_dim": 20, "bank_size": 20},
    "relic": {"bank_size": 20, "temperature": 0.5},
    "byol": {},
    "simsiam": {"pred_hidden_dim": 8},
    "ressl": {"queue_size": 24},
    "ssl_hsic": {},
    "barlow_twins": {},
    "wmse": {"proj_output_dim": 6},
    "swav": {"num_prototypes": 10, "queue_size": 16},
}
"""What makes each task small enough for a test, and uses all of it."""


def task_settings(name):
    """Overrides that put a small task into :func:`method_config` or :func:`icl_msr_config`."""
    return {
        "method_kwargs__task": name,
        "method_kwargs__task_kwargs": {"proj_hidden_dim": 24, "proj_output_dim": 16, **TASK_KWARGS[name]},
    }


def method_config(backbone="conv4", crop_size=32, **overrides):
    """A complete config of MetaMask with small heads, as the command line would pass it on."""
    cfg = OmegaConf.create(
        {
            "method": "metamask",
            "backbone": {"name": backbone},
            "data": {
                "dataset": "custom",
                "num_classes": 10,
                "num_large_crops": 2,
                "num_small_crops": 0,
            },
            "augmentations": [{"crop_size": crop_size, "num_crops": 2}],
            "max_epochs": 1,
            "optimizer": {
                "name": "sgd",
                "batch_size": 8,
                "lr": 0.1,
                "classifier_lr": 0.1,
                "weight_decay": 1e-4,
                "kwargs": {"momentum": 0.9},
            },
            "scheduler": {"name": "none"},
            "method_kwargs": {
                "task_kwargs": {"proj_hidden_dim": 24, "proj_output_dim": 16},
                "redundancy": {"proj_hidden_dim": 24, "proj_output_dim": 16},
            },
        }
    )
    for key, value in overrides.items():
        OmegaConf.update(cfg, key.replace("__", "."), value, merge=False, force_add=True)
    return cfg


def icl_msr_config(backbone="conv4", crop_size=32, **overrides):
    """A complete config of ICL-MSR with a small head and a small f_msr, un-augmented view included."""
    original = {"crop_size": crop_size + 4, "num_crops": 1}
    settings = {
        "method": "icl_msr",
        "data__num_small_crops": 1,
        "augmentations": [{"crop_size": crop_size, "num_crops": 2}, original],
        "method_kwargs": {
            "task_kwargs": {"proj_hidden_dim": 24, "proj_output_dim": 16},
            "regularizer": {"n": 3, "kwargs": {"width": 8, "norm": "group"}},
            "meta": {"when": "after_step"},
        },
    }
    return method_config(backbone, crop_size, **{**settings, **overrides})


def baseline_config(backbone="conv4", crop_size=32, **overrides):
    """A complete config of a task alone."""
    task_kwargs = {"proj_hidden_dim": 24, "proj_output_dim": 16}
    settings = {"method": "baseline", "method_kwargs": {"task_kwargs": task_kwargs}}
    return method_config(backbone, crop_size, **{**settings, **overrides})
