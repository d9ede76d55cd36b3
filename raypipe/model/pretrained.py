"""A model from a folder in Hugging Face's format, of which each rank reads only its own tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raypipe.model.husk import names_of
from raypipe.model.match_keys import match_keys
from raypipe.model.origin import build_deferred
from raypipe.model.stored import Shelf, Stored
from raypipe.model.weight_files import headers_of, keys_by_file, read

__all__ = ["Pretrained", "from_pretrained"]

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True, slots=True)
class Pretrained:
    """A model in a folder: give it to ``PipelineTrainer`` as ``model``, or call it to load the whole model."""

    folder: Path
    model_class: Any
    dtype: torch.dtype | None

    def __call__(self) -> nn.Module:
        """The whole model in this process."""
        dtype = "auto" if self.dtype is None else self.dtype
        made: nn.Module = self.model_class.from_pretrained(str(self.folder), local_files_only=True, dtype=dtype)
        return made

    def origin(self, seed: int) -> Stored:
        """The model of husks, and where each of its tensors lies.

        Args:
            seed: of what the folder lacks.

        Raises:
            ValueError: names or shapes of the folder are not those of the model.
        """
        where = keys_by_file(self.folder)
        headers = headers_of(self.folder, where)
        model_class, config = _resolved(self.model_class, self.folder)
        saved = getattr(config, "dtype", None) or next((DTYPES[d] for _, d in headers.values() if d in DTYPES), None)
        dtype = self.dtype or saved or torch.float32
        _refuse_mixed(model_class, config, dtype)
        promised = build_deferred(lambda: _made(model_class, config, dtype), seed)
        keys, assembled = match_keys(promised.model, headers)
        parameters, buffers = names_of(promised.model)
        husks: dict[str, Tensor] = {**parameters, **buffers}
        shapes = [(key, headers[key][0], name) for name, of in keys.items() for key in of]
        shapes += [(a.keys[0], a.shapes[name], name) for a in assembled for name in a.shapes if name in husks]
        for key, shape, name in shapes:
            if shape != tuple(husks[name].shape):
                raise ValueError(
                    f"{key} has the shape {list(shape)} in {self.folder}, but {name} of {model_class.__name__} has "
                    f"{list(husks[name].shape)}; give the configuration and the class that the folder was saved with"
                )
        for of in keys.values():
            if len(of) > 1 and not _all_equal([read(self.folder, where, [key])[key] for key in of]):
                raise ValueError(
                    f"{' and '.join(of)} differ in {self.folder}, but are one tensor in {model_class.__name__}; "
                    "save the model with tie_word_embeddings=False in its configuration, or with the weights tied"
                )
        dtypes = {name: husks[name].dtype for _, _, name in shapes}
        first = {name: of[0] for name, of in keys.items()}
        return Stored(promised.model, promised, Shelf(self.folder, where, first, tuple(assembled), dtypes))


def from_pretrained(folder: Any, model_class: Any, *, dtype: torch.dtype | None = None) -> Pretrained:
    """A model from a local folder in Hugging Face's format; each rank reads only its own tensors.

    The folder must be at the same path on every machine of the cluster. Tensors that it lacks, such as those of a new
    head, are initialised by the trainer's seed, with a warning that names them.

    Args:
        folder: with ``config.json`` and ``model.safetensors`` or its shards; no name on a hub.
        model_class: of Hugging Face's, such as ``LlamaForCausalLM`` or ``AutoModelForCausalLM``.
        dtype: of the parameters; None: the one they were saved in.

    Returns:
        What ``PipelineTrainer`` takes as ``model``; called, it loads the whole model here.

    Raises:
        TypeError: ``model_class`` is no class of Hugging Face's.
        FileNotFoundError: the folder, its configuration or a file of its weights is not there.
        ValueError: the weights are pickles, or an index and its shards do not agree.
    """
    if not isinstance(model_class, type) or not (_is_auto(model_class) or getattr(model_class, "config_class", None)):
        raise TypeError(
            f"model_class is {model_class!r}, but must be a model class of Hugging Face's, such as LlamaForCausalLM; "
            "for others give PipelineTrainer the loaded module"
        )
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype is {dtype!r}, but must be a floating torch.dtype, or None for the one in the folder")
    path = Path(folder).expanduser().resolve()
    if not path.is_dir():
        raise FileNotFoundError(
            f"{folder} is no folder here, and names on a hub are not taken; download the model, and give its folder"
        )
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} has no config.json; give a folder that model.save_pretrained wrote")
    keys_by_file(path)
    return Pretrained(path, model_class, dtype)


def _is_auto(model_class: Any) -> bool:
    return hasattr(model_class, "_model_mapping")


def _resolved(model_class: Any, folder: Path) -> tuple[Any, Any]:
    """The concrete class and its configuration."""
    if not _is_auto(model_class):
        return model_class, model_class.config_class.from_pretrained(str(folder), local_files_only=True)
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    if type(config) not in model_class._model_mapping:
        raise ValueError(f"{model_class.__name__} has no model for {type(config).__name__}; give the model's own class")
    found = model_class._model_mapping[type(config)]
    if isinstance(found, (list, tuple)):
        named = [c for c in found if c.__name__ in (config.architectures or ())]
        found = (named or list(found))[0]
    return found, config


def _refuse_mixed(model_class: Any, config: Any, dtype: torch.dtype) -> None:
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("the folder's weights are quantized, which cannot be trained here; save the model dequantized")
    strict = getattr(model_class, "_keep_in_fp32_modules_strict", None)
    loose = getattr(model_class, "_keep_in_fp32_modules", None)
    if (dtype is torch.float16 and (strict or loose)) or (dtype is torch.bfloat16 and strict):
        raise ValueError(
            f"{model_class.__name__} keeps {', '.join(sorted({*(strict or ()), *(loose or ())}))} in float32 beside "
            f"{dtype}, which is not built; give dtype=torch.float32"
        )


def _made(model_class: Any, config: Any, dtype: torch.dtype) -> nn.Module:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model: nn.Module = model_class(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval()  # as Hugging Face's from_pretrained leaves it


def _all_equal(tensors: list[Tensor]) -> bool:
    return all(torch.equal(tensors[0], other) for other in tensors[1:])
