"""Bytes to tables of tensors and back: .safetensors, .pth, folders of either, training checkpoints.

What tensors cannot say (taps, head, ...) travels with them in every file of ours: in a safetensors header, as one more
record in a .pth (a zip, of which torch.load reads only its own records), or in config.json.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import pickle
import re
import secrets
import stat
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from model.types import WeightsError

Tensors = dict[str, Tensor]

RECORD = "fathom"  # the key of our facts in a safetensors header; in a .pth the record is called RECORD.json
_PREFIXES = ("module.", "_orig_mod.", "model.")  # DistributedDataParallel, torch.compile, wrapping modules
_NESTS = ("model", "state_dict", "model_state_dict")
# Beside the network in a training checkpoint, and of no use behind it: a student's way to a frozen encoder's width.
_TRAINED_BESIDE = ("projection.",)
_DEEPEST = 4  # how far tables are looked into: a hostile one holds itself
_LONGEST_RECORD = 1 << 20  # bytes
# Classes that training scripts leave beside the tensors; they hold data only.
_HARMLESS = [argparse.Namespace, np.dtype]


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a path holds: tensors under the file's own names, and what is written beside them."""

    path: str
    container: str  # for people: how the tensors were stored
    tensors: Tensors
    record: Mapping[str, Any] | None = None  # our own facts
    config: Mapping[str, Any] | None = None  # a Hugging Face config.json


def read(path: str | os.PathLike[str], ema: bool | None = None) -> Contents:
    """Read a file, a folder of weights, or a training checkpoint's folder.

    Args:
        path: local file or folder.
        ema: of a training checkpoint, True: the averaged weights; False: the last ones; None: the averaged ones, where
            there are any, as its run validates and exports those. Of anything else None.

    Raises:
        WeightsError: nothing there, broken, or not tensors; one line.
    """
    path = os.fspath(path)
    if os.path.isfile(os.path.join(path, "manifest.json")):
        return _read_checkpoint(path, ema)
    if ema is not None and os.path.exists(path):
        raise WeightsError(
            f"{path}: holds one set of weights; averaged (EMA) and last ones are in training checkpoints only: give a "
            "step_* folder"
        )
    if os.path.isdir(path):
        return _read_folder(path)
    return _read_file(path)


def _read_file(path: str) -> Contents:
    """A .safetensors or .pth file, told apart by its first bytes."""
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited for without end
        raise WeightsError(f"{path}: is no regular file; give a weights file or folder")
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = getattr(error, "strerror", None) or one_line(error)
        raise WeightsError(f"{path}: cannot be read ({reason}); give a weights file or folder") from error
    if not head:
        raise WeightsError(f"{path}: the file is empty; copy or download it again")
    if head[8:9] == b"{":
        tensors, record = _read_safetensors(path)
        return Contents(path=path, container="safetensors", tensors=tensors, record=record)
    if head[:2] in (b"PK", b"\x80\x02"):
        is_zip = head[:2] == b"PK"  # older ones are not
        tensors, nesting = unwrap(path, _read_pickle(path, mmap=is_zip))
        record = _zip_record(path) if is_zip else None
        return Contents(path=path, container=f".pth{nesting}", tensors=tensors, record=record)
    raise WeightsError(f"{path}: neither safetensors nor a PyTorch file; give .safetensors, .pth or a saved folder")


def _read_safetensors(path: str) -> tuple[Tensors, Mapping[str, Any] | None]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        tensors = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{path}: broken or truncated safetensors ({one_line(error)}); copy it again") from error
    return unwrap(path, tensors)[0], _parse_record(path, metadata.get(RECORD))


def _read_pickle(path: str, mmap: bool) -> Any:
    try:
        allowed = torch.serialization.safe_globals([*_HARMLESS, *_numpy_scalars()])
        with allowed, warnings.catch_warnings(action="ignore"):  # what it warns of is refused, here or by `unwrap`
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        named = f" ({wanted[1]})" if wanted else ""
        raise WeightsError(
            f"{path}: refused: a broken pickle, or one that runs code beyond tensors{named}; save its state dict alone"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # torch's unpickler lets struct.error, IndexError and more escape on broken bytes
        raise WeightsError(f"{path}: broken or truncated .pth ({one_line(error)}); copy it again") from error


def _numpy_scalars() -> list[Any]:
    # A score beside the weights, as numpy 1 and 2 pickle it.
    scalar = type(np.float64(0)).__reduce__(np.float64(0))[0]
    kinds = [type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "b1")]
    return [*kinds, scalar, (scalar, "numpy.core.multiarray.scalar")]


def _zip_record(path: str) -> Mapping[str, Any] | None:
    with zipfile.ZipFile(path) as archive:
        entry = next((e for e in archive.infolist() if e.filename.split("/")[-1] == f"{RECORD}.json"), None)
        if entry is None:
            return None
        try:
            with archive.open(entry) as file:
                text = file.read(_LONGEST_RECORD).decode()
        except Exception as error:  # zipfile lets zlib.error, NotImplementedError and more escape on broken bytes
            raise WeightsError(f"{path}: the facts beside the tensors are damaged ({one_line(error)})") from error
    return _parse_record(path, text)


def _parse_record(path: str, text: str | None) -> Mapping[str, Any] | None:
    if text is None:
        return None
    try:
        record = json.loads(text)
        if not isinstance(record, dict):
            raise ValueError("not a table")
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: the facts beside the tensors are damaged ({one_line(error)})") from error
    return record


def _read_folder(path: str) -> Contents:
    config_path = os.path.join(path, "config.json")
    names = ("model.safetensors", "pytorch_model.bin")
    if not os.path.isfile(config_path):
        if os.path.isdir(os.path.join(path, "checkpoints")):
            raise WeightsError(f"{path}: a run's folder; name its weights/ or one of its checkpoints/step_* folders")
        raise WeightsError(f"{path}: no config.json in this folder; give a weights file, or a folder that was saved")
    config = read_json(config_path)
    ours = config if "format_version" in config else None
    for name in names:
        whole, index = os.path.join(path, name), os.path.join(path, f"{name}.index.json")
        if os.path.isfile(whole):
            contents = _read_file(whole)
            tensors, record, container = contents.tensors, contents.record, contents.container
        elif os.path.isfile(index):
            tensors, record = _read_sharded(path, index), None
            container = f"{name} in parts"
        else:
            continue
        return Contents(
            path=path,
            container=f"folder, {container}",
            tensors=tensors,
            record=ours or record,
            config=None if ours else config,
        )
    raise WeightsError(f"{path}: none of {', '.join(names)} (or their .index.json) in this folder; is it complete?")


def _read_sharded(path: str, index: str) -> Tensors:
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(f, str) and os.path.basename(f) == f for f in files.values()):
        raise WeightsError(f"{index}: has no weight_map of file names beside it; copy it again")
    tensors: Tensors = {}
    for name in sorted(set(files.values())):
        tensors |= _read_file(os.path.join(path, name)).tensors
    return tensors


def _read_checkpoint(path: str, ema: bool | None) -> Contents:
    """One of a training checkpoint's networks, its bytes held against the manifest."""
    manifest = read_json(os.path.join(path, "manifest.json"))
    listed = manifest.get("files")
    files: dict[str, Any] = listed if isinstance(listed, dict) else {}
    ema = "ema.safetensors" in files if ema is None else ema
    name = "ema.safetensors" if ema else "weights.safetensors"
    expected = files.get(name)
    if expected is None:
        what = "no averaged weights (EMA)" if name.startswith("ema") else f"no {name}"
        raise WeightsError(f"{path}: {what} in this checkpoint's manifest.json")
    file_path = os.path.join(path, name)
    try:
        with open(file_path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise WeightsError(f"{file_path}: cannot be read ({error.strerror}); take an earlier checkpoint") from error
    if digest != expected:
        raise WeightsError(f"{file_path}: does not match its checksum in manifest.json; take an earlier checkpoint")
    tensors, _ = _read_safetensors(file_path)
    tensors = {k: v for k, v in tensors.items() if not k.startswith(_TRAINED_BESIDE)}
    container = "training checkpoint" + (", averaged weights" if name.startswith("ema") else "")
    return Contents(path=path, container=container, tensors=tensors, record=manifest.get("network"))


def unwrap(path: str, content: Any) -> tuple[Tensors, str]:
    """The flat {name: tensor} inside a loaded file, and where it lay, for people.

    Raises:
        WeightsError: there is none.
    """
    nesting = ""
    for _ in range(_DEEPEST):
        table = content if isinstance(content, Mapping) else {}
        nested = next((k for k in _NESTS if isinstance(table.get(k), Mapping)), None)
        if nested is None:
            break
        content, nesting = content[nested], f"{nesting}, under `{nested}`"
    if isinstance(content, Mapping) and content and all(isinstance(v, Mapping) for v in content.values()):
        content = {f"{part}.{k}": v for part, table in content.items() for k, v in table.items()}  # muggled_dpt's parts
        nesting += ", in parts"
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        found = some(list(map(str, content))) if isinstance(content, Mapping) and content else type(content).__name__
        raise WeightsError(f"{path}: holds no table of tensors (found {found}); expected a network's state dict")
    tensors = {str(k): v for k, v in content.items()}
    strange = [k for k, v in tensors.items() if v.layout != torch.strided or v.is_meta or v.is_nested]
    if strange:
        raise WeightsError(f"{path}: sparse, nested or empty tensors ({some(strange)}); save plain ones")
    while prefix := next((p for p in _PREFIXES if all(k.startswith(p) for k in tensors)), None):
        tensors = {k.removeprefix(prefix): v for k, v in tensors.items()}
        nesting += f", prefix `{prefix}`"
    return tensors, nesting


def read_json(path: str) -> dict[str, Any]:
    """A JSON table. Raises WeightsError."""
    try:
        with open(path, encoding="utf-8") as file:
            table = json.load(file)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror}); give a folder that was saved") from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: no JSON ({one_line(error)}); copy it again") from error
    if not isinstance(table, dict):
        raise WeightsError(f"{path}: expected a JSON table, found {type(table).__name__}")
    return table


# --- writing ------------------------------------------------------------------------------------------------------


def write_safetensors(path: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any] | None = None) -> None:
    """Write {name: tensor} as safetensors, atomically, our facts in its header."""
    metadata = {"format": "pt"} | ({RECORD: json.dumps(record)} if record else {})
    with _replacing(path) as temporary:
        safetensors.torch.save_file(_plain(tensors), temporary, metadata=metadata)


def write_pth(path: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any] | None = None) -> None:
    """Write {name: tensor} as `torch.save` does, atomically, our facts as one more record of the zip."""
    with _replacing(path) as temporary:
        with open(temporary, "wb") as file:  # by name, torch would write the temporary name into the file
            torch.save(_plain(tensors), file)
        if record:
            with zipfile.ZipFile(temporary, "a") as archive:
                top = archive.namelist()[0].split("/")[0]
                # ZipInfo has a fixed date: the same network is the same file.
                archive.writestr(zipfile.ZipInfo(f"{top}/{RECORD}.json"), json.dumps(record))


def write_json(path: str, table: Mapping[str, Any]) -> None:
    """Write a JSON table, atomically."""
    with _replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(json.dumps(table, indent=2) + "\n")


def _plain(tensors: Mapping[str, Tensor]) -> Tensors:
    return {k: v.detach().cpu().contiguous() for k, v in tensors.items()}


@contextlib.contextmanager
def _replacing(path: str) -> Iterator[str]:
    """A temporary name beside `path`; when the block ends well it takes the name's place, else it goes."""
    temporary = os.path.join(os.path.dirname(path) or ".", f".{os.path.basename(path)}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        yield temporary
        os.chmod(temporary, mode)  # what the umask gives; safetensors makes a file of its own, for its owner only
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        # torch and safetensors have errors of their own for a full disk.
        if isinstance(error, (OSError, RuntimeError, safetensors.SafetensorError)):
            reason = getattr(error, "strerror", None) or one_line(error)
            raise WeightsError(f"{path}: cannot be written ({reason}); is its folder there, and not full?") from error
        raise


def some(names: list[str], limit: int = 3) -> str:
    """The first names, for a message of one line."""
    printable = [name if name.isprintable() else repr(name) for name in names[:limit]]
    first = [name if len(name) <= 120 else f"{name[:120]}..." for name in printable]
    return ", ".join(first) + (", ..." if len(names) > limit else "")


def one_line(error: BaseException, limit: int = 160) -> str:
    """What an error says, for a message of one line; broken files bring control characters into it."""
    text = " ".join(str(error).split())
    return "".join(c if c.isprintable() else "?" for c in text)[:limit] or type(error).__name__
