"""Hugging Face ``config.json`` -> a model, without weights unless asked for, and inputs of its kind."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from frostline.errors import TargetError

TOKENS = (1, 128)


def model_from_config(path: str | Path, model_class: str | None = None, device: str = "meta") -> nn.Module:
    """Build the model of a ``config.json`` (or of the folder that holds one).

    Args:
        path: the file or its folder. Nothing is downloaded.
        model_class: a class of transformers, such as ``"AutoModelForCausalLM"``; by default the first of the config's
            ``architectures``, or ``AutoModel``, which has no head and no loss.
        device: where. On ``meta`` there are no weights and no memory; elsewhere weights are as transformers draws them.

    Raises:
        TargetError: transformers is not installed, the file is no config, or the class is not in transformers.
    """
    folder = Path(path)
    file = folder / "config.json" if folder.is_dir() else folder
    try:
        written = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise TargetError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(written, dict) or "model_type" not in written:
        raise TargetError(f"{file} is no Hugging Face config: it has no 'model_type'")
    try:
        import transformers
    except ImportError as error:
        raise TargetError(f"{file} needs transformers: pip install 'frostline[transformers]'") from error
    if written["model_type"] not in transformers.CONFIG_MAPPING:
        raise TargetError(
            f"{file}: transformers {transformers.__version__} does not know model_type {written['model_type']!r}"
        )
    config = transformers.CONFIG_MAPPING[written["model_type"]].from_dict(written)
    name = model_class or next(iter(written.get("architectures") or []), "AutoModel")
    cls = getattr(transformers, name, None)
    if cls is None:
        where = "--model-class" if model_class else f"{file}: architectures"
        raise TargetError(f"{where}: transformers {transformers.__version__} has no class {name!r}")
    build = getattr(cls, "from_config", None) or getattr(cls, "_from_config", None) or cls
    with torch.device(device):
        try:
            model = build(config)
        except Exception as error:
            error.add_note(f"frostline: while building {name} from {file}")
            raise
    if not isinstance(model, nn.Module):
        raise TargetError(f"{name} built from {file} is {type(model).__name__}, not a torch.nn.Module")
    return model


def default_inputs(model: nn.Module) -> dict[str, Tensor] | None:
    """Random inputs of the model's kind: 1 x 128 tokens, or one image of the config's size. None: of another kind.

    Audio and others have no size in their config that could be taken.
    """
    config: Any = getattr(model, "config", None)
    name = getattr(model, "main_input_name", None)
    if config is None or name is None:
        return None
    if name == "input_ids":
        longest = getattr(config, "max_position_embeddings", None) or TOKENS[1]
        return made_up({"input_ids": ((TOKENS[0], min(TOKENS[1], longest)), torch.int64)}, model)
    if name == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", None) or 224
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        channels = getattr(vision, "num_channels", 3)
        return made_up({"pixel_values": ((1, channels, height, width), None)}, model)
    return None


def made_up(asked: Mapping[str, tuple[tuple[int, ...], torch.dtype | None]], model: nn.Module) -> dict[str, Tensor]:
    """Made-up inputs of given shapes: tokens below the vocabulary, masks of ones, the same numbers every time."""
    generator = torch.Generator().manual_seed(0)
    floating = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return {name: _made_up(name, shape, dtype, model, floating, generator) for name, (shape, dtype) in asked.items()}


def _made_up(
    name: str, shape: tuple[int, ...], dtype: torch.dtype | None, model: nn.Module, floating: torch.dtype,
    generator: torch.Generator,
) -> Tensor:  # fmt: skip
    if dtype is None:
        dtype = torch.int64 if _holds_integers(name, model) else floating
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)
    if dtype is torch.bool or "mask" in name:
        return torch.ones(shape, dtype=dtype)
    if "type_ids" in name or "labels" in name or "position" in name:
        return torch.zeros(shape, dtype=dtype)
    return torch.randint(0, _vocabulary(model), shape, generator=generator).to(dtype)


def _holds_integers(name: str, model: nn.Module) -> bool:
    """Whether an input of this name holds integers. Unnamed (a position's number): if an embedding comes first."""
    if name.isdigit():
        main = getattr(model, "main_input_name", "")
        if main:
            return name == "0" and main.endswith("ids")
        first = next((m for m in model.modules() if next(m.parameters(recurse=False), None) is not None), None)
        return isinstance(first, (nn.Embedding, nn.EmbeddingBag)) and name == "0"
    return name.endswith(("ids", "mask", "labels", "tokens"))


def _vocabulary(model: nn.Module) -> int:
    """How many different integers the model's first embedding takes."""
    config = getattr(model, "config", None)
    size = getattr(config, "vocab_size", None)
    if isinstance(size, int) and size > 0:
        return size
    sizes = [m.num_embeddings for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    return sizes[0] if sizes else 2
