"""Runs the public commands where every attempt to reach another machine is written down and refused.

``python offline_run.py FOLDER short`` (or ``full``): attempts go to ``FOLDER/attempts``. Only in a process
of its own: an audit hook cannot be taken off again. It sees all of Python's sockets, and those of children
in Python, which inherit it by ``sitecustomize``; not the sockets that a library opens by itself.
"""

import importlib
import json
import os
import pkgutil
import sys
import traceback
from pathlib import Path

LOCAL = {"AF_UNIX", "AF_NETLINK"}
EVENTS = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "urllib.Request")


def block(log):
    """Writes each attempt to reach a machine into the file ``log``, and refuses it."""

    def hook(event, arguments):
        if event not in EVENTS:
            return
        family = getattr(getattr(arguments[0], "family", None), "name", "")
        if family in LOCAL:
            return
        with open(log, "a") as file:
            file.write(f"{event} {arguments[1:] if family else arguments} in {os.getpid()}\n")
            file.write("".join(traceback.format_stack(limit=6)) + "\n")
        raise OSError(f"no network: {event}")

    sys.addaudithook(hook)


def modules():
    """Imports every module of the package; what needs a package that is not there is left out."""
    import metamask_plugin

    missing = []
    for found in pkgutil.walk_packages(metamask_plugin.__path__, "metamask_plugin."):
        if not found.name.endswith("__main__"):
            try:
                importlib.import_module(found.name)
            except ModuleNotFoundError as error:
                if (error.name or "").split(".")[0] == "metamask_plugin":
                    raise
                missing.append(found.name)
    return missing


def main(folder, extent):
    from hydra import compose, initialize_config_dir

    missing = modules()
    from metamask_plugin import SCRIPTS
    from metamask_plugin.cli import knn, pretrain

    def composed(kind, name, *overrides):
        with initialize_config_dir(str((SCRIPTS / kind).resolve()), version_base="1.2"):
            return compose(name, list(overrides))

    encoder = [
        "backbone.name=conv4",
        "++backbone.kwargs.width=4",
        "++data.fraction=0.1",
        "++data.kwargs.copies=1",
        "++data.kwargs.test_copies=1",
    ]
    short = [
        "optimizer.batch_size=32",
        "max_epochs=1",
        "accelerator=cpu",
        "++evaluation.linear.protocol=fast",
    ]
    place = [f"checkpoint.dir={folder / 'runs'}", "++evaluation.knn.k=[5]"]
    report = [f"++evaluation.final_report={extent == 'full'}"]
    run = pretrain.run(composed("pretrain", "metamask_barlow", *encoder, *short, *place, *report)).path
    knn.main(["--pretrained_checkpoint_dir", str(run), "--k", "5"])
    made = {"run": str(run), "missing": missing}
    if extent == "full":
        made |= {"report": str(evaluated(run, folder, composed))}
    print(json.dumps(made))


def evaluated(run, folder, composed):
    """Regions, a probe and a study of a run; returns the study's report."""
    from metamask_plugin.cli import foreground, linear
    from metamask_plugin.cli.study import run_trial, sweep

    foreground.main(["--pretrained_checkpoint_dir", str(run), "--protocol", "none"])
    probe = [f'pretrained_feature_extractor="{run}"', f"checkpoint.dir={folder / 'probe'}", "protocol=fast"]
    linear.run(composed("linear", "confounded_digits", *probe))

    def trials(jobs, first):
        for job in jobs:
            run_trial(composed("study", "metamask_fig2", *study, *job))
        return [type("Returned", (), {"return_value": None}) for _ in jobs]

    study = [f"dir={folder / 'studies'}", "size=smoke", "seeds=[5]", f"checkpoint=[{run}]"]
    return sweep(composed("study", "metamask_fig2", *study), trials)


if __name__ == "__main__":
    block(Path(sys.argv[1]) / "attempts")
    main(Path(sys.argv[1]), sys.argv[2])
