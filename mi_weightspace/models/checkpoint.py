"""Reading safetensors folders tensor by tensor: no model instantiated, nothing unpickled."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mi_weightspace.core.errors import CheckpointError
from mi_weightspace.core.json_io import DamagedJson, is_plain_name, parse_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_FLOAT = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, eq=False)
class TensorFolder:
    """The tensors of one checkpoint folder, by key.

    Attributes:
        path: the folder.
        where: key -> file that holds it.
        headers: key -> (shape, storage dtype as safetensors spells it), no data read.
    """

    path: Path
    where: dict[str, Path]
    headers: dict[str, tuple[tuple[int, ...], str]]

    @classmethod
    def open(cls, path: str | Path) -> TensorFolder:
        """Index a folder; every named file is opened once, so that a damaged shard shows now.

        Raises:
            CheckpointError: no safetensors, legacy pickles, a missing or truncated shard, an index
                that names an absent file or tensor.
        """
        folder = Path(path)
        index = folder / INDEX
        # where both are there the single file is what transformers loads, so it is what is read
        if (folder / SINGLE).is_file():
            headers = _headers(folder / SINGLE)
            return cls(folder, dict.fromkeys(headers, folder / SINGLE), headers)
        if not index.is_file():
            raise _no_weights(folder)
        headers = {}
        files = {name: folder / file for name, file in _weight_map(index).items()}
        for file in sorted(set(files.values())):
            if not file.is_file():
                raise CheckpointError(
                    f"checkpoint {folder}",
                    given=f"an index naming {file.name}, which is not there",
                    expected="every shard of the index",
                    remedy="Download or copy the missing shard.",
                )
            held = _headers(file)
            absent = [k for k, f in files.items() if f == file and k not in held]
            if absent:
                raise CheckpointError(
                    f"shard {file}",
                    given=f"no tensor {absent[0]!r}",
                    expected="the tensors the index puts there",
                    remedy="The index and the shards are of different saves; copy them again.",
                )
            headers |= {key: held[key] for key, own in files.items() if own == file}
        return cls(folder, files, headers)

    def get(self, key: str) -> Tensor:
        """One tensor in its storage precision (memory-mapped: pages are read when touched)."""
        file = self.where[key]
        try:
            with safe_open(file, "pt") as handle:
                return handle.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise _damaged(file, error) from error


def _headers(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    try:
        with safe_open(file, "pt") as handle:
            slices = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118
            return {k: (tuple(s.get_shape()), str(s.get_dtype())) for k, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from error


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor -> shard. A shard is a plain file name: an index never leads out of its folder."""
    found = read_json(index, "the index written by save_pretrained").get("weight_map")
    if not isinstance(found, dict) or not found:
        raise CheckpointError(
            f"file {index}",
            given="no weight_map",
            expected="the index written by save_pretrained",
            remedy="Copy it again.",
        )
    for key, file in found.items():
        if not is_plain_name(file):
            raise CheckpointError(
                f"file {index}, weight_map[{key!r}]",
                given=f"{file!r}"[:120],
                expected="the name of a shard in the same folder",
                remedy="Copy the index written by save_pretrained.",
            )
    return found


def _damaged(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"shard {file}",
        given=f"a damaged or truncated file ({error})",
        expected="a complete safetensors file",
        remedy="Download or copy it again.",
    )


def _no_weights(folder: Path) -> CheckpointError:
    legacy = sorted(p.name for p in folder.glob("pytorch_model*.bin"))
    if legacy:
        return CheckpointError(
            f"checkpoint {folder}",
            given=f"{legacy[0]}, a pickle file, which can run code when loaded",
            expected="safetensors",
            remedy="Convert it where you trust it: AutoModelForCausalLM.from_pretrained(FOLDER)"
            ".save_pretrained(NEW_FOLDER).",
        )
    there = "an empty folder" if folder.is_dir() else "no such folder"
    return CheckpointError(
        f"checkpoint {folder}",
        given="no model.safetensors and no index" if _any(folder) else there,
        expected="a folder written by save_pretrained, or a hub id",
        remedy="Check the path; if the weights are .bin files, convert them to safetensors.",
    )


def _any(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def read_json(file: Path, expected: str) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: missing, or not a JSON object; `expected` says what it should have been.
    """
    if not file.is_file():  # a pipe would be waited for
        raise CheckpointError(
            f"checkpoint {file.parent}",
            given=f"no {file.name}" if file.parent.is_dir() else "no such folder",
            expected=expected,
            remedy="Check the path.",
        )
    try:
        found = parse_json(file.read_bytes(), unique=True)
    except (DamagedJson, OSError) as error:
        raise CheckpointError(
            f"file {file}",
            given=f"text that is not JSON ({error})",
            expected=expected,
            remedy="Copy it again.",
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(
            f"file {file}", given="no JSON object", expected=expected, remedy="Copy it again."
        )
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` as a dict.

    Raises:
        CheckpointError: missing or not JSON.
    """
    return read_json(folder / "config.json", "a folder written by save_pretrained, or a hub id")


def resolve(model: str | Path) -> Path:
    """A local folder as it is; a hub id downloaded (safetensors, configuration, tokenizer only).

    Raises:
        CheckpointError: neither a folder nor a repository that can be reached.
    """
    path = Path(model)
    try:
        path = path.expanduser()
        there = "file" if path.is_file() else "folder" if path.is_dir() else ""
    except (OSError, RuntimeError) as error:  # a name no file can have, no such user
        raise _no_model(model, f"no path ({error})") from error
    if str(model) and there == "folder":
        return path
    if there or not _HUB_ID.fullmatch(str(model)):
        raise _no_model(model, "a file" if there == "file" else "no such folder")
    from httpx import HTTPError
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        found = snapshot_download(
            str(model),
            allow_patterns=["*.safetensors", "*.json", "*.txt", "tokenizer*", "*.model"],
            ignore_patterns=["consolidated*", "original/*", "onnx/*"],  # second copies
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, HTTPError, OSError) as error:
        raise CheckpointError(
            f"model {str(model)!r}",
            given=f"no local folder of that name, and the hub answered: {type(error).__name__}",
            expected="a local folder (save_pretrained) or a reachable hub id",
            remedy="Check the name, the network and your access token.",
        ) from error
    return Path(found)


def _no_model(model: str | Path, given: str) -> CheckpointError:
    return CheckpointError(
        f"model {str(model)!r}"[:300],
        given=given[:300],
        expected="a local folder (save_pretrained) or a hub id ORGANISATION/NAME",
        remedy="Check the path.",
    )


def refuse_non_finite(tensor: Tensor, name: str, where: str) -> Tensor:
    """The tensor, or a refusal that names it."""
    if tensor.dtype not in _FLOAT:
        raise CheckpointError(
            f"tensor {name} of {where}",
            given=f"dtype {tensor.dtype}",
            expected="float32, bfloat16 or float16",
            remedy="Use the unquantised checkpoint.",
        )
    if tensor.dtype == torch.float64:
        tensor = tensor.float()  # what is computed with: larger values are infinite there
    # the sum is non-finite if any entry is; entry-wise only then (one pass over the usual case)
    if not torch.isfinite(tensor.sum(dtype=torch.float32)) and not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(
            f"tensor {name} of {where}",
            given=f"{bad} NaN or infinite entries",
            expected="finite weights",
            remedy="The checkpoint is damaged or its training diverged; use another.",
        )
    return tensor
