"""Checkpoint files: found, read without running code, and compared with their checksums.

Of a run, ours or solo-learn's, ``args.json`` beside the checkpoint is the training config.
"""

import hashlib
import json
import pickle
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError

from metamask_plugin.config.fields import Block, Pixels, key
from metamask_plugin.config.messages import as_line
from metamask_plugin.config.methods import DataKwargs
from metamask_plugin.config.pretraining import Pretraining
from metamask_plugin.errors import UserError, check, choose

SUFFIXES = (".ckpt", ".pth", ".pt")
HOSTS = ("solo", "embedded")
OF_EPOCH = re.compile(r"(?P<run>.+)-ep=(?P<epoch>\d+)\.ckpt")
"""solo-learn's names of checkpoints."""

SCHEDULE = re.compile(
    r"solo\.methods\.base\.static_lr|solo\.utils\.lr_scheduler\.\w+|torch\.optim\.\w+\.\w+"
    r"|functools\.partial|builtins\.(dict|getattr)|collections\.defaultdict"
)
"""What solo-learn's methods with a fixed learning rate (SimSiam) leave in a checkpoint: their schedule."""

READ = ("augmentations", "backbone", "data", "evaluation", "method", "method_kwargs", "name", "seed")
"""Blocks and keys that evaluators and studies read. One that is missing or null is left to its reader."""

LEFT_TO_ITS_READER = ("extra_forbidden", "missing", "refused", "value_error")
"""Faults that a config of solo-learn, or of another version, may have; other words are no fault either."""


class BackboneKwargs(Block):
    """Of what encoders take: what images are resized to."""

    image_size: Pixels | None = key(None, "side of the images, pixels")


PARTS: dict[str, type[BaseModel]] = {
    "": Pretraining,
    "backbone.kwargs": BackboneKwargs,
    "data.kwargs": DataKwargs,
}


def find_checkpoint(path: str | Path) -> Path:
    """Returns the checkpoint file that ``path`` names: a file, or a directory that holds one.

    In a directory with several, ``last.ckpt`` is the one, or the last epoch's of one run of solo-learn.

    Raises:
        UserError: when the path is missing, has another suffix, or does not decide between files.

    Example:
        >>> import tempfile
        >>> run = Path(tempfile.mkdtemp())
        >>> for name in ("best.ckpt", "last.ckpt"):
        ...     torch.save({}, run / name)
        >>> find_checkpoint(run).name
        'last.ckpt'
    """
    path = Path(path)
    check(path.exists(), "checkpoint", "an existing file or directory", str(path), "check the path")
    if path.is_dir():
        found = sorted(path.glob("*.ckpt"))
        if path / "last.ckpt" in found:
            return path / "last.ckpt"
        epochs = [OF_EPOCH.fullmatch(file.name) for file in found]
        if found and all(epochs) and len({epoch["run"] for epoch in epochs}) == 1:
            return max(zip(found, epochs), key=lambda pair: int(pair[1]["epoch"]))[0]
        names = [file.name for file in found]
        check(
            len(found) == 1,
            f"checkpoint directory {path}",
            "one with a last.ckpt or a single .ckpt file",
            names,
            "give the file itself" if found else "train first, or give the directory of one run",
        )
        return found[0]
    check(path.suffix in SUFFIXES, "checkpoint", f"a {', '.join(SUFFIXES)} file", str(path))
    return path


def read_args(checkpoint: Path) -> dict[str, Any]:
    """The training config from ``args.json`` beside a checkpoint, or an empty dict without that file.

    Raises:
        UserError: when the file is not a JSON object, or a key that is read holds what it cannot hold.

    Example:
        >>> import tempfile
        >>> run = Path(tempfile.mkdtemp())
        >>> _ = (run / "args.json").write_text('{"method": "byol"}')
        >>> read_args(run / "last.ckpt")
        {'method': 'byol'}
    """
    path = checkpoint.parent / "args.json"
    if not path.exists():
        return {}
    try:
        args = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} must be readable JSON, got {error}; restore it or move it away and give backbone.name"
        ) from error
    check(isinstance(args, dict), str(path), "a JSON object with the training config", type(args).__name__)
    for fault in _faults(args):
        key, _, rest = str(fault).partition(" must be ")
        raise UserError(f"{key} in {path} must be {rest}; restore what the training wrote")
    return args


def _faults(args: Mapping[str, Any]) -> Iterator[UserError]:
    for where, model in PARTS.items():
        node: Any = args
        for part in where.split(".") if where else ():
            node = node.get(part) or {}
        try:
            model.model_validate(node)
        except ValidationError as error:
            for fault in error.errors(include_url=False):
                kind, found = fault["type"], fault["input"]
                other = kind in LEFT_TO_ITS_READER or kind == "literal_error" and isinstance(found, str)
                if not other and found is not None and (where or fault["loc"][0] in READ):
                    yield as_line(model, fault, where, ())


def recorded_host(args: Mapping[str, Any]) -> str | None:
    """Which host built the encoder, ``solo`` or ``embedded``; None where there is no training config.

    Our methods record it. A run of solo-learn's own method does not, but solo-learn always writes a
    ``wandb_run_id``; a config with neither is ours, from before the key.

    Args:
        args: the training config from ``args.json``.

    Raises:
        UserError: for a host that does not exist.

    Example:
        >>> recorded_host({"method": "byol", "wandb_run_id": None}), recorded_host({"host": "embedded"})
        ('solo', 'embedded')
    """
    if not args:
        return None
    if args.get("host") is not None:
        return choose("host in args.json", args["host"], HOSTS)
    return "solo" if "wandb_run_id" in args else "embedded"


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The state dict of a checkpoint, its encoder under ``backbone.*``.

    Raises:
        UserError: when the file cannot be read, or holds no encoder.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "weights.pth"
        >>> torch.save({"state_dict": {"encoder.conv1.weight": torch.zeros(1)}}, path)  # of old solo-learn
        >>> read_weights(path)
        {'backbone.conv1.weight': tensor([0.])}
    """
    content = read_checkpoint(path)
    check(
        isinstance(content, dict),
        f"checkpoint {path}",
        "a dictionary with a state_dict",
        type(content).__name__,
    )
    state = content.get("state_dict", content)
    named = state.items() if isinstance(state, dict) else ()
    state = {key: value for key, value in named if isinstance(key, str) and isinstance(value, torch.Tensor)}
    if not any(key.startswith("backbone.") for key in state):
        # solo-learn's name for it before 1.0.3
        state = {re.sub(r"^encoder\.", "backbone.", key): value for key, value in state.items()}
    used = {key: value for key, value in state.items() if key.startswith(("backbone.", "mask."))}
    if not any(key.startswith("backbone.") for key in used):
        prefixes = sorted({str(key).split(".")[0] for key in state or content})[:6]
        raise UserError(
            f"checkpoint {path} must have a state_dict with keys 'backbone.*', got "
            f"{', '.join(prefixes) or 'nothing'}; give a checkpoint of main_pretrain.py or solo-learn, or "
            "rewrite another's: torch.save({'state_dict': {'backbone.' + key: value for key, value in "
            "WEIGHTS.items()}}, PATH)"
        )
    check_tensors(used, path)
    return state


def check_tensors(weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Refuses tensors that are no dense real numbers in memory: sparse, complex, quantised, without numbers.

    Args:
        weights: of an encoder or a mask, by name.
        path: their file.

    Example:
        >>> check_tensors({"conv1.weight": torch.zeros(1)}, Path("weights.pth"))
    """
    for name, tensor in weights.items():
        kinds = {
            "complex": tensor.is_complex(),
            "quantised": tensor.is_quantized,
            "nested": tensor.is_nested,
            "without numbers (on the meta device)": tensor.is_meta,
            f"{tensor.layout}".removeprefix("torch."): tensor.layout != torch.strided,
        }
        found = next((kind for kind, present in kinds.items() if present), None)
        remedy = "save dense real tensors on the CPU: tensor.to_dense(), tensor.cpu()"
        check(found is None, f"{name} in {path}", "a dense tensor of real numbers", found, remedy)


class _Unread:
    """Stands in for an object that is not needed: takes anything, does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Unread":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _plain_dict(*args: Any) -> dict:
    return {}


def read_checkpoint(path: Path) -> Any:
    """What ``torch.save`` wrote, without running code; a schedule of solo-learn's is left out.

    Raises:
        UserError: when the file is damaged, or holds other Python objects.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "last.ckpt"
        >>> torch.save({"epoch": 3}, path)
        >>> read_checkpoint(path)
        {'epoch': 3}
    """
    check_records(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported global" not in str(error) and "GLOBAL" not in str(error):
            raise _unreadable(path, error) from error
        foreign = _foreign_objects(path)
        if not foreign or not all(SCHEDULE.fullmatch(name) for name in foreign):
            found = f" ({', '.join(foreign[:3])})" if foreign else ""
            raise UserError(
                f"checkpoint {path} must hold tensors and plain values only, got Python objects{found}; they "
                "are not loaded, as they can run code; if you trust it, keep its weights alone: "
                "torch.save({'state_dict': torch.load(PATH, weights_only=False)['state_dict']}, PATH)"
            ) from error
    except Exception as error:  # a damaged file fails in many ways: zip, EOF, key, runtime
        raise _unreadable(path, error) from error
    stands_in = {"collections.defaultdict": _plain_dict}
    try:
        with torch.serialization.safe_globals([(stands_in.get(name, _Unread), name) for name in foreign]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # it holds these names, but not as a schedule does
        raise _unreadable(path, error) from error


def _foreign_objects(path: Path) -> list[str]:
    """Names of what a checkpoint holds beside tensors and plain values; empty where torch cannot say."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # torch before 2.6 has no such function, and not every file can be read by it
        return []


def _unreadable(path: Path, error: Exception) -> UserError:
    first_line = (str(error).splitlines() or [type(error).__name__])[0][:120]
    return UserError(
        f"checkpoint {path} must be a complete file written by torch.save, got {path.stat().st_size} bytes "
        f"that cannot be read ({first_line}); it may be truncated: copy it again or take another"
    )


def check_records(path: Path) -> None:
    """Compares every record with its CRC-32, which ``torch.save`` writes and ``torch.load`` ignores.

    A file in PyTorch's format from before 1.6 has no checksums and passes.

    Args:
        path: the file.

    Raises:
        UserError: it is truncated, or a record is not what was written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "last.ckpt"
        >>> torch.save({"epoch": 3}, path)
        >>> check_records(path)
    """
    try:
        if not zipfile.is_zipfile(path):
            return  # of the older format, or no such file at all: torch.load will tell
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, ValueError) as error:
        damaged = str(error)
    if damaged is not None:
        raise UserError(
            f"checkpoint {path} must be as torch.save wrote it, got other bytes ({damaged} does not match "
            "its checksum); copy it again or take another"
        )


def content_digest(path: Path) -> str:
    """Hex digits that differ where two files hold something else, whatever their dates say.

    Of a checkpoint only the list of its records is read, with their sizes and checksums.

    Args:
        path: the file.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "notes.txt"
        >>> _ = path.write_text("x")
        >>> content_digest(path)
        '2d711642b726b044'
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = [(record.filename, record.file_size, record.CRC) for record in archive.infolist()]
        return hashlib.sha256(repr(records).encode()).hexdigest()[:16]
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
        return digest.hexdigest()[:16]


def encoder_weights(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The encoder's part of a method's state dict; a momentum encoder (``momentum_backbone``) is another.

    Example:
        >>> state = {"backbone.conv1.weight": torch.zeros(1), "momentum_backbone.conv1.weight": torch.ones(1)}
        >>> encoder_weights(state)
        {'conv1.weight': tensor([0.])}
    """
    prefix = "backbone."
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def load_mask(path: str | Path) -> torch.Tensor | None:
    """The effective mask weights of a trained MetaMask, (D,); None where the checkpoint has no mask.

    Args:
        path: a checkpoint file, or the directory of a run.

    Raises:
        UserError: when the file cannot be read, or its mask is not finite.

    Example:
        >>> import tempfile
        >>> run = Path(tempfile.mkdtemp())
        >>> state = {"backbone.fc.weight": torch.zeros(2, 2), "mask.weight": torch.ones(2)}
        >>> torch.save({"state_dict": state}, run / "last.ckpt")
        >>> load_mask(run)
        tensor([1., 1.])
    """
    path = find_checkpoint(path)
    return effective_mask(read_weights(path), None, path)


def effective_mask(state: Mapping[str, torch.Tensor], dim: int | None, path: Path) -> torch.Tensor | None:
    """The mask's weights in a state dict; None without any.

    Args:
        state: of a method.
        dim: of the features, where it is known.
        path: the file, for messages.

    Raises:
        UserError: for another number of weights, or weights that are not finite.

    Example:
        >>> effective_mask({"mask.logit": torch.zeros(2)}, 2, Path("last.ckpt"))
        tensor([0.5000, 0.5000])
    """
    if "mask.logit" in state:
        mask = state["mask.logit"].float().sigmoid().flatten()
    elif "mask.weight" in state:
        mask = state["mask.weight"].float().flatten()
    else:
        return None
    dim, shape = dim or len(mask), tuple(mask.shape)
    check(shape == (dim,), f"mask in {path}", f"one weight for each of {dim} dimensions", shape)
    broken = int((~mask.isfinite()).sum())
    if broken:
        raise UserError(
            f"mask in {path} must be finite, got NaN or infinity for {broken} of {dim} dimensions; the "
            "training has most likely diverged: lower method_kwargs.meta.optimizer.lr, or evaluate an "
            "earlier checkpoint"
        )
    return mask
