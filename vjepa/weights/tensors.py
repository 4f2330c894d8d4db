"""Named tensors on disk and in memory, one at a time; and the two kinds of file that an export is made of.

Imports torch and safetensors, nothing else, and so does `vjepa.weights.native`.
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
    """Named tensors that may lie on disk until asked for; their names and shapes cost nothing."""

    names: Collection[str]

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]: ...

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors of `encoder` or `predictor`, without the name of the part."""
        return {key.removeprefix(f"{name}."): self[key] for key in self if key.startswith(f"{name}.")}


class InMemory(Tensors):
    """Tensors that are there already."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.names = tensors.keys()

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)


class SafeTensors(Tensors):
    """The tensors of a safetensors file, each read when asked for."""

    def __init__(self, path: Path) -> None:
        try:
            self.file = safe_open(path, framework="pt")
        except FileNotFoundError:
            raise BadInput(f"{path} is missing; the folder is not complete, copy or export it again") from None
        except SafetensorError as error:
            raise BadInput(f"{path}: torn or no safetensors file ({error}); copy or export it again") from None
        self.names = dict.fromkeys(self.file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.file.get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.file.get_slice(name).get_shape())


class InFiles(Tensors):
    """Tensors that lie in several safetensors files, and an index that says in which: large models of Hugging Face."""

    def __init__(self, index: Path) -> None:
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
            raise BadInput(f"{index}: its weight_map names no files; copy it again")
        self.files = {name: SafeTensors(index.with_name(Path(name).name)) for name in sorted(set(places.values()))}
        self.places = {name: self.files[file] for name, file in places.items() if name in self.files[file]}
        self.names = self.places.keys()

    def __getitem__(self, name: str) -> Tensor:
        return self.places[name][name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.places[name].shape(name)


def write_safetensors(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write tensors one after another, so that only one is in memory at a time.

    The library's own `save_file` wants them all at once, and doubles them.
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


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object from a file.

    Raises:
        BadInput: missing, or something else.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise BadInput(f"{path} is missing; the folder is not complete, copy or make it again") from None
    except ValueError as error:  # also what is not UTF-8
        raise BadInput(f"{path}: not JSON ({error}); the file is damaged, copy or make it again") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
