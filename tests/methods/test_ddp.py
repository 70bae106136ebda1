"""Two processes on the CPU: one mask, one f_msr, one queue, one target network."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
import lightning.pytorch as pl, torch
from torch.utils.data import DataLoader
from method_config import icl_msr_config, method_config, task_settings
from method_training import Views
from metamask_plugin.methods import ICLMSR, MetaMask

if __name__ == "__main__":
    torch.set_num_threads(1)
    pl.seed_everything(0)
    msr = sys.argv[1] == "icl_msr"
    model = ICLMSR(icl_msr_config()) if msr else MetaMask(method_config(**task_settings("moco")))
    start = [parameter.clone() for parameter in model.meta_parameters()]
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, logger=False,
                         enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(model, DataLoader(Views(32, original=msr), batch_size=8))
    both = [model.all_gather(parameter.detach()) for parameter in model.meta_parameters()]
    kept = {name: value for name, value in model.task.state_dict().items()
            if name.startswith("queue") or name.startswith("target") and name.endswith("weight")}
    shared = [model.all_gather(value) for value in kept.values()]
    if trainer.is_global_zero:
        print("task", len(kept), all(torch.equal(first, second) for first, second in shared))
        print("world", trainer.world_size)
        print("equal", all(torch.equal(first, second) for first, second in both),
              "moved", not any(torch.equal(first, before) for (first, _), before in zip(both, start)))
"""


@pytest.mark.slow  # tests/methods/test_joint_batch.py shows more, without Lightning's processes
@pytest.mark.parametrize("method", ["metamask", "icl_msr"])
def test_meta_parameters_of_two_processes_stay_equal(tmp_path, method):
    script = tmp_path / "two.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), method],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
    )
    assert "world 2" in done.stdout, done.stderr[-2000:]
    assert "equal True moved True" in done.stdout
    # conv4's four layers and the head's two linear ones and their norms, the queue's entries and position
    assert f"task {13 if method == 'metamask' else 0} True" in done.stdout, done.stdout
