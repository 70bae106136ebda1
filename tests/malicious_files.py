"""Checkpoints that run a command when they are loaded by anything that lets them; it makes a file."""

import functools
import os
import pickle
import struct
import tarfile
import zipfile
from io import BytesIO

import torch


class Payload:
    """Pickles as a call of ``os.system``."""

    def __init__(self, canary):
        self.command = f"touch {canary}"

    def __reduce__(self):
        return os.system, (self.command,)


def text(value):
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def call(function, *arguments):
    return function + b"(" + b"".join(arguments) + b"tR"


def by_names_of_a_schedule(canary):
    """Calls ``os.system`` through no other names than those that a checkpoint with a schedule may hold."""
    getattr_ = name("builtins", "getattr")
    sys = call(getattr_, name("torch.optim.lr_scheduler", "warnings"), text("sys"))
    get = call(getattr_, call(getattr_, sys, text("modules")), text("get"))
    system = call(getattr_, call(get, text("posix")), text("system"))
    return b"\x80\x02" + call(system, text(f"touch {canary}")) + b"."


def zipped(content, *more):
    """Bytes of an archive as ``torch.save`` makes it, around a pickle of one's own."""
    file = BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
        for record in more:
            archive.writestr(f"archive/{record}", content)
    return file.getvalue()


def saved(content, **options):
    file = BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def tarred(canary):
    """The format from before torch 0.1.10."""
    file = BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for record in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps(Payload(canary), protocol=2)
            entry = tarfile.TarInfo(record)
            entry.size = len(content)
            archive.addfile(entry, BytesIO(content))
    return file.getvalue()


def at(key, good=None):
    """Of a shape whose payload stands at ``key`` of an otherwise good checkpoint."""
    return lambda canary: saved(
        {**(good or {"state_dict": {"backbone.x": torch.zeros(1)}}), key: Payload(canary)}
    )


RUNNING = {
    "plain pickle": lambda canary: pickle.dumps(Payload(canary), protocol=2),
    "plain pickle, newest protocol": lambda canary: pickle.dumps({"state_dict": Payload(canary)}, protocol=5),
    "zip": lambda canary: saved(Payload(canary)),
    "legacy": lambda canary: saved({"state_dict": Payload(canary)}, _use_new_zipfile_serialization=False),
    "tar": tarred,
    "state_dict": at("state_dict"),
    "tensor": lambda canary: saved({"state_dict": {"backbone.x": Payload(canary)}}),
    "callbacks": at("callbacks"),
    "hyper_parameters": at("hyper_parameters"),
    "optimizer_states": at("optimizer_states"),
    "loops": at("loops"),
    "rng": at("rng"),
    "a key": lambda canary: saved({"state_dict": {}, ("x", Payload(canary)): 1}),
    "partial": lambda canary: saved({"state_dict": {}, "f": functools.partial(os.system, Payload(canary))}),
    "names of a schedule": lambda canary: zipped(by_names_of_a_schedule(canary)),
    "names of a schedule, plain": by_names_of_a_schedule,
}
"""Of a canary's path: bytes that make it, where they are loaded as pickles are."""

BROKEN = {
    "an item of a stand-in": zipped(
        b"\x80\x02" + call(name("functools", "partial"), name("builtins", "dict")) + text("a") + b"K\x01s."
    ),
    "a call of a stand-in's result": zipped(
        b"\x80\x02" + call(call(name("builtins", "getattr"), text("a"), text("b")), text("c")) + b"."
    ),
    "a state of a stand-in": zipped(b"\x80\x02" + call(name("builtins", "getattr")) + b"}b."),
    "a storage of a stand-in": zipped(b"\x80\x02" + name("builtins", "getattr") + b"Q."),
    "TorchScript": zipped(b"\x80\x02}.", "constants.pkl"),
    "a state dict with numbers as keys": saved({"state_dict": {1: torch.zeros(1), None: torch.zeros(1)}}),
    "a state dict that is a list": saved({"state_dict": [torch.zeros(1)]}),
    "a list": saved([torch.zeros(1)]),
    "a tensor": saved(torch.zeros(1)),
    "nothing": b"",
}
"""Bytes that run nothing, and are no checkpoint either."""
