"""Open a checkpoint: a folder of safetensors or one GGUF file. Only headers are read until a tensor is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slipstream.checkpoint.files import member, read_object
from slipstream.checkpoint.gguf import is_split, read_gguf
from slipstream.checkpoint.gguf_names import to_hugging_face
from slipstream.checkpoint.manifest import check_sizes
from slipstream.checkpoint.packed import gather
from slipstream.checkpoint.safetensors import read_folder
from slipstream.checkpoint.tensors import TensorInfo, read_dense, read_weight
from slipstream.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from slipstream.ops.formats import Weight

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk, in the words of Hugging Face whatever the format.

    Attributes:
        kind: random: there are no tensors, and whoever loads it draws them.
        config: what config.json says (for GGUF: would say); types and ranges are for ModelConfig to check.
        tensors: by Hugging Face name.
        generation_config: {} where there is none.
        metadata: GGUF metadata by key, tokenizer included; {} for safetensors.
        seed: of what is drawn.
    """

    path: Path
    kind: Literal["safetensors", "gguf", "random"]
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    generation_config: dict[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors in the file."""
        return sum(t.nbytes for t in self.tensors.values())

    def read(self, name: str) -> torch.Tensor:
        """A dense tensor in its own dtype and logical shape."""
        info = self._info(name)
        if info.is_quantized:
            raise CheckpointError(f"{self.path}: {name} is packed as {info.dtype}; read its weight or dequantize it")
        return read_dense(info)

    def read_weight(self, name: str) -> Weight:
        """Any tensor as it is held in the file: numbers, GGUF's blocks, or data and scales."""
        return read_weight(self._info(name))

    def dequantize(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Any tensor as `dtype` in its logical shape."""
        from slipstream.ops.formats import decode

        return decode(self.read_weight(name), dtype)

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: has no tensor {name}")
        return self.tensors[name]


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a folder with config.json and safetensors, a .gguf file, or a folder that holds exactly one.

    Raises:
        CheckpointError: it is missing, damaged, hostile, or of a kind that is not read.
    """
    try:
        real = path.resolve(strict=True)
        if real.is_dir():
            return _open_folder(real)
        if not real.is_file():
            raise CheckpointError(f"{path}: is neither a folder nor a regular file")
        if path.suffix == ".gguf":
            return _open_gguf(real)
        if path.suffix in _PICKLES:
            raise _pickle(path)
        raise CheckpointError(f"{path}: is no .gguf file; for safetensors give the folder that holds config.json")
    except FileNotFoundError as e:
        raise CheckpointError(f"{path}: there is no such file or folder; check the name") from e
    except (OSError, RuntimeError) as e:  # RuntimeError: a loop of links
        raise CheckpointError(f"{path}: cannot be read: {e}") from e


def open_random(path: Path, seed: int = 0) -> Checkpoint:
    """Open a folder for its config.json alone: the model of that shape, with random weights.

    Raises:
        CheckpointError: there is no config.json, or it is damaged.
    """
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: random weights take their shapes from a folder with a config.json; leave weights='random' out to read this"
        )
    folder = path.resolve()
    has_generation = (folder / "generation_config.json").is_file()
    generation = read_object(member(folder, "generation_config.json")) if has_generation else {}
    return Checkpoint(folder, "random", read_object(member(folder, "config.json")), {}, generation, seed=seed)


def _open_folder(folder: Path) -> Checkpoint:
    names = sorted(p.name for p in folder.iterdir())
    if any(n.endswith((".safetensors", ".safetensors.index.json")) for n in names):
        if "config.json" not in names:
            raise CheckpointError(f"{folder}: has safetensors but no config.json; fetch the whole model")
        config = read_object(member(folder, "config.json"))
        has_generation = "generation_config.json" in names
        generation = read_object(member(folder, "generation_config.json")) if has_generation else {}
        tensors = gather(read_folder(folder), config, folder)
        check_sizes(folder, [n for n in names if n.endswith(".safetensors")])
        return Checkpoint(folder, "safetensors", config, tensors, generation)
    ggufs = [n for n in names if n.endswith(".gguf")]
    if len(ggufs) == 1 or (ggufs and all(is_split(folder / n) for n in ggufs)):
        return _open_gguf(member(folder, ggufs[0]))
    if ggufs:
        raise CheckpointError(f"{folder}: holds {len(ggufs)} GGUF files; name one, such as {folder / ggufs[0]}")
    for name in names:
        if name.endswith(_PICKLES):
            raise _pickle(folder / name)
    raise CheckpointError(f"{folder}: holds neither safetensors nor GGUF, so there is no model to open")


def _open_gguf(path: Path) -> Checkpoint:
    gguf = read_gguf(path)
    config, tensors = to_hugging_face(gguf)
    generation: dict[str, Any] = {k: config[k] for k in ("bos_token_id", "eos_token_id") if k in config}
    return Checkpoint(path, "gguf", config, tensors, generation, gguf.metadata)


def _pickle(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path}: is a Python pickle, which can run code when it is read, so slipstream never opens one; look for a "
        "revision of the model in safetensors, or convert it with transformers in a place you trust: "
        "from_pretrained(...).save_pretrained(...)"
    )
