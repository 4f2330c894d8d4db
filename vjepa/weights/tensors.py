"""Named tensors on disk and in memory, read in turn, and the two kinds of file in an export.

This module imports torch and safetensors alone, so that a native export loads without our other dependencies.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vjepa_data.errors import BadInput

_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}


class Tensors(Mapping[str, Tensor], ABC):
    """Named tensors that may stay on disk until they are used. Names and shapes cost nothing."""

    names: Collection[str]

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]: ...

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def find_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, or an empty shape if it is missing."""
        return self.shape(name) if name in self.names else ()

    def part(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of a part (`encoder`, `predictor`) without its prefix."""
        return {key.removeprefix(f"{name}."): self[key] for key in self if key.startswith(f"{name}.")}


class InMemory(Tensors):
    """Tensors of a dict."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.names = tensors.keys()

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)


class Renamed(Tensors):
    """Some parts of other tensors under new names: `{"encoder": "target"}` reads `encoder.*` from `target.*`."""

    def __init__(self, tensors: Tensors, parts: Mapping[str, str]) -> None:
        self.tensors = tensors
        self.stored = {
            f"{new}.{name.removeprefix(f'{old}.')}": name
            for new, old in parts.items()
            for name in tensors
            if name.startswith(f"{old}.")
        }
        self.names = self.stored.keys()

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self.stored[name]]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors.shape(self.stored[name])


class Joined(Tensors):
    """The tensors of two places. The first place wins where both have a name."""

    def __init__(self, first: Tensors, second: Tensors) -> None:
        self.places = {**dict.fromkeys(second, second), **dict.fromkeys(first, first)}
        self.names = self.places.keys()

    def __getitem__(self, name: str) -> Tensor:
        return self.places[name][name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.places[name].shape(name)


class SafeTensors(Tensors):
    """Tensors of a safetensors file in fp32, whatever type they are stored in, each read when it is used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.file = safe_open(path, framework="pt")
        except FileNotFoundError:
            raise BadInput(f"{path} is missing; the folder is incomplete, copy or export it again") from None
        except SafetensorError as error:
            check_download(path)
            raise BadInput(f"{path}: truncated or not a safetensors file ({error}); copy or export it again") from None
        self.names = dict.fromkeys(self.file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        tensor = self.file.get_tensor(name)
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise BadInput(f"{self.path}: {name} is {kind}, as in quantized models; give a model of float tensors")
        return aligned(tensor.float())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.file.get_slice(name).get_shape())


class InFiles(Tensors):
    """Tensors of several safetensors files with an index, the layout of large Hugging Face models."""

    def __init__(self, index: Path) -> None:
        file_of = read_json(index).get("weight_map")
        if not isinstance(file_of, dict) or not all(isinstance(file, str) for file in file_of.values()):
            raise BadInput(f"{index}: its weight_map names no files; copy it again")
        files = {name: SafeTensors(index.with_name(Path(name).name)) for name in sorted(set(file_of.values()))}
        self.file_of = {name: files[file] for name, file in file_of.items() if name in files[file]}
        self.names = self.file_of.keys()

    def __getitem__(self, name: str) -> Tensor:
        return self.file_of[name][name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.file_of[name].shape(name)


def aligned(tensor: Tensor) -> Tensor:
    """Return the tensor at an address that is a multiple of 64 bytes, as torch allocates, copied only if need be.

    The last bit of a matrix product depends on the alignment of its inputs, and a tensor that is mapped from a file
    starts anywhere.
    """
    return tensor.clone() if tensor.data_ptr() % 64 else tensor


def write_safetensors(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write tensors in turn, so that only one is in memory at a time.

    The library's `save_file` needs all of them in memory. For 16 tensors of 32 MB the peak is 1.0 times the file with
    safetensors 0.8.0 and 0.13 times with this function: two tensors, the current and the next.
    Source: the format of huggingface/safetensors: length of the header, header in JSON, data.
    """
    body = path.with_suffix(".body")
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    with body.open("wb") as file:
        for name, tensor in tensors:
            start = file.tell()
            file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            header[name] = {
                "dtype": _DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [start, file.tell()],
            }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts at a multiple of 8
    with path.open("wb") as file, body.open("rb") as data:
        file.write(len(text).to_bytes(8, "little") + text)
        while chunk := data.read(1 << 24):
            file.write(chunk)
    body.unlink()


def check_download(path: Path) -> None:
    """Check that a file is not the remnant of a failed download.

    Raises:
        BadInput: it is empty, a Git LFS pointer, or a web page.
    """
    with path.open("rb") as file:
        start = file.read(64).lstrip().lower()
    if not start:
        raise BadInput(f"{path} is empty; download or copy it again")
    if start.startswith(b"version https://git-lfs"):
        raise BadInput(
            f"{path} is a Git LFS pointer instead of the file; fetch it with `git lfs pull`, or `hf download`"
        )
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise BadInput(f"{path} is a web page instead of the file, as failed downloads leave it; download it again")


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file.

    Raises:
        BadInput: the file is missing, damaged, or holds something else.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise BadInput(f"{path} is missing; the folder is incomplete, copy or make it again") from None
    except ValueError as error:  # includes text that is not UTF-8
        raise BadInput(f"{path}: not JSON ({error}); the file is damaged, copy or make it again") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def some(names: Sequence[str]) -> str:
    """Return the first three names and the number of further names, for an error text."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
