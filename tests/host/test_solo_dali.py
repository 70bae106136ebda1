"""Our views in solo-learn's own DALI pipeline."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from solo_checkout import REPOSITORY, needs_solo_learn, under_solo

from metamask_plugin.data.registry import IMAGENET_MEAN_STD

pytest.importorskip("nvidia.dali", reason="no NVIDIA DALI: pip install nvidia-dali-cuda130")

pytestmark = needs_solo_learn
SCRIPTS = REPOSITORY / "scripts" / "pretrain"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Two classes of four JPEGs each, none square, cut from scikit-learn's two photographs."""
    root = tmp_path_factory.mktemp("photographs")
    for name in ("china", "flower"):
        photograph = Image.fromarray(load_sample_image(f"{name}.jpg"))
        (root / name).mkdir()
        for index, (width, height) in enumerate([(300, 200), (180, 240), (260, 200), (200, 230)]):
            patch = photograph.crop((40 * index, 20 * index, 40 * index + width, 20 * index + height))
            patch.save(root / name / f"{index}.jpg", quality=90)
    return root


# what solo-learn's main_pretrain.py does with `data.format: dali`, up to its data module, which needs a GPU
COMPOSED = """
import json
import sys
import numpy as np
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from solo.args.pretrain import parse_cfg
from solo.data.dali_dataloader import (
    PretrainDALIDataModule, PretrainPipelineBuilder, build_transform_pipeline_dali)
from solo.data.pretrain_dataloader import FullTransformPipeline, NCropAugmentation
import metamask_plugin.methods

def composed(config, device, *overrides):
    with initialize_config_dir(configs, version_base="1.2"):
        cfg = compose(config, [
            "data.format=dali", f"++dali.device={device}", f"data.train_path={images}",
            f"data.val_path={images}", "optimizer.batch_size=4", "data.num_workers=1",
            f"checkpoint.dir={images}", *overrides])
    OmegaConf.set_struct(cfg, False)
    cfg = parse_cfg(cfg)
    return cfg, FullTransformPipeline([
        NCropAugmentation(
            build_transform_pipeline_dali(cfg.data.dataset, node, dali_device=device), node.num_crops)
        for node in cfg.augmentations])

configs, images, output, given = sys.argv[1:]
"""

ON_THE_CPU = """
for number, (config, overrides) in enumerate(json.loads(given)):
    cfg, transform = composed(config, "cpu", *overrides)
    print("case", number, "crops", cfg.data.num_large_crops, cfg.data.num_small_crops)
    builder = PretrainPipelineBuilder(
        images, batch_size=4, transforms=transform, device="cpu", encode_indexes_into_labels=True)
    pipeline = builder.pipeline(batch_size=4, num_threads=1, device_id=None, seed=3)
    pipeline.build()
    *views, indexes = (np.array(tensors.as_tensor()) for tensors in pipeline.run())
    np.savez(f"{output}/{number}.npz", *views, indexes=indexes.flatten())
"""

CASES = [
    ("imagenet-100/metamask_barlow", [], [224, 224]),
    ("imagenet/metamask_barlow", [], [224, 224]),
    ("imagenet-100/icl_msr_simclr", [], [224, 224, 112]),
    ("imagenet/icl_msr_simclr", [], [224, 224, 112]),
    ("imagenet-100/icl_msr_simclr", ["task=swav"], [224, 224, *[96] * 6, 112]),
    ("imagenet/metamask_barlow", ["task=swav"], [224, 224, *[96] * 6, 112]),
]


@pytest.fixture(scope="module")
def batches(photographs, tmp_path_factory):
    """What solo-learn printed, and the folder of a batch a case: one process, as it starts slowly."""
    output = tmp_path_factory.mktemp("batches")
    cases = json.dumps([case[:2] for case in CASES])
    done = under_solo("-c", COMPOSED + ON_THE_CPU, str(SCRIPTS), str(photographs), str(output), cases)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, output


@pytest.mark.parametrize(
    ("number", "sizes"),
    [(number, sizes) for number, (_, _, sizes) in enumerate(CASES)],
    ids=["-".join([config, *overrides]) for config, overrides, _ in CASES],
)
def test_our_views_pass_through_solo_learns_dali_pipeline(photographs, batches, number, sizes):
    printed, folder = batches
    assert f"case {number} crops 2 {len(sizes) - 2}\n" in printed
    batch = np.load(folder / f"{number}.npz")
    views = [batch[f"arr_{i}"] for i in range(len(sizes))]
    assert [view.shape for view in views] == [(4, 3, size, size) for size in sizes]
    assert all(view.dtype == np.float32 for view in views)
    assert len({view.tobytes() for view in views}) == len(sizes)
    if sizes[-1] != 112:
        return
    # the last is the whole image, nothing changed
    files = sorted(photographs.glob("*/*.jpg"))
    mean, std = (np.array(values).reshape(3, 1, 1) for values in IMAGENET_MEAN_STD)
    for index, view in zip(batch["indexes"].tolist(), views[-1]):
        image = Image.open(files[index])
        if image.width <= 4 / 3 * image.height:  # else what a crop's aspect allows of it
            expected = np.array(image.resize((112, 112), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
            assert np.abs(255 * (view * std + mean) - expected).mean() < 0.5


ON_THE_GPU = """
import lightning.pytorch as pl
from solo.methods import METHODS
device, *overrides = json.loads(given)
cfg, transform = composed("imagenet-100/icl_msr_simclr", device, *overrides)
cfg.method_kwargs.task_kwargs.proj_hidden_dim = 32
model = METHODS[cfg.method](cfg)
data = PretrainDALIDataModule(
    dataset=cfg.data.dataset, train_data_path=images, transforms=transform,
    num_large_crops=cfg.data.num_large_crops, num_small_crops=cfg.data.num_small_crops,
    num_workers=cfg.data.num_workers, batch_size=cfg.optimizer.batch_size, no_labels=cfg.data.no_labels,
    data_fraction=cfg.data.fraction, dali_device=device,
    encode_indexes_into_labels=cfg.dali.encode_indexes_into_labels)
data.val_dataloader = lambda: []
before = {name: value.clone() for name, value in model.regularizer.state_dict().items()}
trainer = pl.Trainer(accelerator="gpu", devices=1, max_epochs=2, logger=False, enable_checkpointing=False,
                     enable_progress_bar=False)
trainer.fit(model, datamodule=data)
after = {name: value.cpu() for name, value in model.regularizer.state_dict().items()}
print("moved", any(not value.equal(after[name]) for name, value in before.items()))
print("steps", trainer.global_step)
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, as solo-learn's DALI module needs")
@pytest.mark.parametrize("dali_device", ["gpu", "cpu"])
@pytest.mark.parametrize("overrides", [[], ["task=swav"]])
def test_icl_msr_trains_on_solo_learns_dali_module(photographs, tmp_path, dali_device, overrides):
    given = json.dumps([dali_device, "max_epochs=2", "backbone.name=resnet18", *overrides])
    done = under_solo("-c", COMPOSED + ON_THE_GPU, str(SCRIPTS), str(photographs), str(tmp_path), given)
    assert "moved True" in done.stdout and "steps 4" in done.stdout, done.stderr[-3000:]
