"""LoRA files with random values, in every format that people have."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

Factors = Mapping[str, tuple[np.ndarray, np.ndarray]]  # by module: down [R, I...], up [O, R, ...]
ATTENTION = tuple(f"attn1.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0"))


def weights_of(model: Path) -> dict[str, np.ndarray]:
    return load_file(model / "transformer/diffusion_pytorch_model.safetensors")


def block_modules(*names: str, layers: int = 2) -> list[str]:
    return [f"transformer_blocks.{i}.{name}" for i in range(layers) for name in names]


def every_linear(model: Path) -> list[str]:
    """All modules with a weight of two axes or more."""
    return [
        name.removesuffix(".weight")
        for name, weight in weights_of(model).items()
        if name.endswith(".weight") and weight.ndim > 1
    ]


def random_factors(
    model: Path, modules: list[str], rank: int | Callable[[str], int] = 4, seed: int = 0
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Random factors whose product is about twice as large as the weight."""
    rng, weights = np.random.default_rng(seed), weights_of(model)
    factors = {}
    for module in modules:
        weight = weights[f"{module}.weight"]
        r = rank if isinstance(rank, int) else rank(module)
        down = rng.standard_normal((r, *weight.shape[1:]), np.float32)
        up = rng.standard_normal((len(weight), r, *[1] * (weight.ndim - 2)), np.float32)
        factors[module] = down, up * np.float32(2 * weight.std() / r**0.5)
    return factors


def _kohya(module: str) -> str:
    return f"lora_unet__{module.replace('.', '_')}"


def _sat(module: str, factor: str) -> str:
    block, name = re.fullmatch(r"transformer_blocks\.(\d+)\.attn1\.(.*)", module).groups()
    layer = "dense.matrix_{}.0" if name == "to_out.0" else "query_key_value.matrix_{}.{}"
    number = "qkv".find(name[-1])
    place = layer.format(factor, number)
    return f"model.diffusion_model.transformer.layers.{block}.attention.{place}"


def _old_processor(module: str) -> str:
    return module.removesuffix(".0") + "_lora"


# The keys of the two factors of a module.
FORMATS: dict[str, Callable[[str], tuple[str, str]]] = {
    "diffusers": lambda m: (f"transformer.{m}.lora_A.weight", f"transformer.{m}.lora_B.weight"),
    "old": lambda m: (f"transformer.{m}.lora.down.weight", f"transformer.{m}.lora.up.weight"),
    "old processors": lambda m: (
        f"transformer.{_old_processor(m)}.down.weight", f"transformer.{_old_processor(m)}.up.weight"
    ),
    "cogkit": lambda m: (f"{m}.lora_A.weight", f"{m}.lora_B.weight"),
    "peft": lambda m: (
        f"base_model.model.{m}.lora_A.weight", f"base_model.model.{m}.lora_B.weight"
    ),
    "peft named": lambda m: (
        f"base_model.model.{m}.lora_A.default.weight", f"base_model.model.{m}.lora_B.default.weight"
    ),
    "comfyui": lambda m: (
        f"diffusion_model.{m}.lora_A.weight", f"diffusion_model.{m}.lora_B.weight"
    ),
    "comfyui down": lambda m: (
        f"diffusion_model.{m}.lora_down.weight", f"diffusion_model.{m}.lora_up.weight"
    ),
    "kohya": lambda m: (f"{_kohya(m)}.lora_down.weight", f"{_kohya(m)}.lora_up.weight"),
    "sat": lambda m: (_sat(m, "A"), _sat(m, "B")),
}  # fmt: skip


def tensors_of(factors: Factors, format_: str = "diffusers") -> dict[str, np.ndarray]:
    """The tensors of a file in one of FORMATS."""
    found = {}
    for module, both in factors.items():
        for key, factor in zip(FORMATS[format_](module), both, strict=True):
            found[key] = np.ascontiguousarray(factor)
    return found


def write_lora(
    path: Path,
    factors: Factors,
    format_: str = "diffusers",
    settings: Mapping[str, object] | None = None,
    **extra: np.ndarray,
) -> Path:
    """Writes a LoRA file.

    Args:
        settings: diffusers' settings for the header, without their prefix.
        extra: more tensors.
    """
    metadata = {"format": "pt"}
    if settings is not None:
        own = {f"transformer.{name}": value for name, value in settings.items()}
        metadata["lora_adapter_metadata"] = json.dumps(own)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors_of(factors, format_) | extra, path, metadata)
    return path
