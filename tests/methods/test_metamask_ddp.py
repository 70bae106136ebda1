"""Two processes on the CPU: one mask."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import lightning.pytorch as pl, torch
from torch.utils.data import DataLoader
from method_config import method_config
from method_training import Views
from metamask_plugin.methods import MetaMask

if __name__ == "__main__":
    torch.set_num_threads(1)
    pl.seed_everything(0)
    model = MetaMask(method_config())
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, logger=False,
                         enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(model, DataLoader(Views(32), batch_size=8))
    masks = model.all_gather(model.mask.values())
    if trainer.is_global_zero:
        print("world", trainer.world_size)
        print("equal", torch.equal(masks[0], masks[1]), "moved", not torch.equal(masks[0], torch.ones(256)))
"""


def test_masks_of_two_processes_stay_equal(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(SCRIPT)
    tests = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": f"{tests}"},
    )
    assert "world 2" in done.stdout, done.stderr[-2000:]
    assert "equal True moved True" in done.stdout
