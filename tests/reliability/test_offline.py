"""Nothing asks the network unless what the user asked for lies there; then its absence is one line, soon."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from composing import composed

from metamask_plugin.cli import pretrain
from metamask_plugin.errors import UserError
from metamask_plugin.evaluation.encoder import load_encoder
from metamask_plugin.modules import timm_networks

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent


def run_blocked(folder, code):
    """A process of Python, and all that it starts, whose attempts to reach another machine are refused."""
    site = folder / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        f"import sys; sys.path.append({str(TESTS)!r})\n"
        f"import offline_run; offline_run.block({str(folder / 'attempts')!r})\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)]), "CUDA_VISIBLE_DEVICES": ""}
    env |= {
        "METAMASK_HOST": "embedded",
        "OMP_NUM_THREADS": "1",
        "HOME": str(folder),
        "HF_HOME": str(folder / "hf"),
    }
    done = subprocess.run([sys.executable, *code], capture_output=True, text=True, env=env, cwd=folder)
    attempts = folder / "attempts"
    return done, attempts.read_text() if attempts.exists() else ""


@pytest.mark.fault("security")
@pytest.mark.parametrize(
    "attempt",
    [
        "import socket; socket.create_connection(('192.0.2.1', 80), timeout=1)",
        "import socket; socket.getaddrinfo('example.org', 443)",
        "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'', ('192.0.2.1', 53))",
        "import _socket; _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM).connect(('192.0.2.1', 80))",
        "import urllib.request; urllib.request.urlopen('https://example.org')",
        "import subprocess, sys; code = 'import socket; socket.getaddrinfo(chr(97), 1)'\n"
        "subprocess.run([sys.executable, '-c', code])",
    ],
)
def test_every_attempt_is_seen(tmp_path, attempt):
    """Else the test below would pass for nothing."""
    _, attempts = run_blocked(tmp_path, ["-c", attempt])
    assert "socket." in attempts or "urllib" in attempts


@pytest.mark.fault("security")
@pytest.mark.parametrize("extent", ["short", pytest.param("full", marks=pytest.mark.slow)])
def test_no_module_training_evaluation_or_study_asks_the_network(tmp_path, extent):
    done, attempts = run_blocked(tmp_path, [str(TESTS / "offline_run.py"), str(tmp_path), extent])
    assert done.returncode == 0, done.stderr[-2000:]
    assert attempts == ""
    made = json.loads(done.stdout.splitlines()[-1])
    assert (Path(made["run"]) / "last.ckpt").exists()
    if extent == "full":
        assert (Path(made["run"]) / "summary.json").exists() and (
            Path(made["run"]) / "foreground.json"
        ).exists()
        assert (tmp_path / "probe" / "linear").is_dir() and Path(made["report"]).exists()


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """No name is found and no address answers; nothing was fetched before."""

    def refuse(*args, **kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(timm_networks, "SECONDS", 2)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))


@pytest.mark.fault("security")
def test_weights_of_timm_that_cannot_be_fetched_are_one_line_and_soon(no_network):
    started = time.monotonic()
    with pytest.raises(UserError, match="must have weights that can be fetched from here") as caught:
        load_encoder("timm:resnet18")
    assert time.monotonic() - started < 15
    assert "\n" not in str(caught.value) and "timm:resnet18=<file>" in str(caught.value)


@pytest.mark.fault("security")
def test_pretrained_weights_of_a_config_that_cannot_be_fetched_are_one_line_and_soon(
    no_network, tmp_path, capsys
):
    overrides = ["backbone.name=resnet26", "accelerator=cpu", f"checkpoint.dir={tmp_path}"]
    cfg = composed("pretrain", "metamask_barlow", *overrides, "++backbone.kwargs.pretrained=True")
    cfg.backbone.kwargs = {"pretrained": True}
    started = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        pretrain.run(cfg)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and time.monotonic() - started < 30
    assert "backbone.name='resnet26' must have weights that can be fetched from here" in error
    assert len([line for line in error.splitlines() if line.startswith("error: ")]) == 1
