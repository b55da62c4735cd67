"""Typed configurations of a model's parts, read from diffusers' JSON files.

Fields have diffusers' names and defaults, which fill in the keys that older files lack
(`patch_size_t` in 1.0 models, for example). A test compares the defaults with diffusers' own;
importing diffusers would take longer than reading the weights.
"""

import dataclasses
import math
import types
import typing
from pathlib import Path
from typing import ClassVar, TypeVar

from runtime.json_files import read_json_object
from runtime.text import printable

_MOST_REASON = 400  # characters of a message; a damaged file may hold megabytes
_MOST_TEXT = 200  # characters of a string that the code uses
_TIMESTEP_ACTIVATIONS = ("silu", "swish", "mish", "gelu", "relu")  # diffusers' names
_Config = TypeVar("_Config", bound="_JsonConfig")


_KINDS: dict[object, str] = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    type(None): "null",
}


class _JsonConfig:
    """Base of the configurations: reads and checks the keys that are fields of the dataclass."""

    classes: ClassVar[tuple[str, ...]]  # diffusers' classes that the file may configure

    @classmethod
    def from_file(cls: type[_Config], path: Path) -> _Config:
        """Reads a JSON file; keys that are no fields are ignored.

        Raises:
            ValueError: the file cannot be read, or a value has the wrong type or cannot be used;
                one line that names the file and the key.
        """
        values = read_json_object(Path(path))
        try:
            class_name = values.get("_class_name", cls.classes[0])
            if class_name not in cls.classes:
                raise ValueError(f"_class_name is {class_name!r}, not {' or '.join(cls.classes)}")
            kinds = typing.get_type_hints(cls)
            names = [name for name in kinds if name in values and name != "classes"]
            return cls(**{name: _convert(name, values[name], kinds[name]) for name in names})
        except ValueError as error:
            raise ValueError(f"{path}: {printable(str(error))[:_MOST_REASON]}") from error


def _convert(name: str, value: object, kind: object) -> object:
    """The value of a JSON key as the field's type; 4.0 is an int, and 4 a float.

    Raises:
        ValueError: it has another type.
    """
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    for option in options:
        if option is type(None) and value is None:
            return None
        if typing.get_origin(option) is tuple and isinstance(value, list):
            item = typing.get_args(option)[0]
            return tuple(_convert(f"{name}[{i}]", part, item) for i, part in enumerate(value))
        if option in (bool, str) and type(value) is option:
            if isinstance(value, str) and len(value) > _MOST_TEXT:
                raise ValueError(f"{name} is a string of {len(value)} characters")
            return value
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if option is int and (isinstance(value, int) or value.is_integer()):
            return int(value)
        if option is float and abs(value) < 1e300:  # not NaN or infinity, which JSON may hold
            return float(value)
    expected = " or ".join(_KINDS.get(option, "a list") for option in options)
    raise ValueError(f"{name} must be {expected}, not {value!r}")


def _check_range(config: object, least: float, most: float, *names: str) -> None:
    """Checks fields that are numbers or None.

    Raises:
        ValueError: naming the first that is outside [least, most].
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and not least <= value <= most:
            raise ValueError(f"{name} must be from {least:g} to {most:g}, not {value}")


@dataclasses.dataclass(frozen=True)
class TransformerConfig(_JsonConfig):
    """diffusers' CogVideoXTransformer3DModel: `transformer/config.json`.

    Sizes that only decide the checkpoint's shapes have generous upper limits: they turn a damaged
    file into a message instead of an allocation of terabytes.
    """

    classes = ("CogVideoXTransformer3DModel",)

    num_attention_heads: int = 30
    attention_head_dim: int = 64
    in_channels: int = 16
    out_channels: int = 16
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    time_embed_dim: int = 512
    ofs_embed_dim: int | None = None
    text_embed_dim: int = 4096
    num_layers: int = 30
    dropout: float = 0.0
    attention_bias: bool = True
    sample_width: int = 90
    sample_height: int = 60
    sample_frames: int = 49
    patch_size: int = 2
    patch_size_t: int | None = None
    temporal_compression_ratio: int = 4
    max_text_seq_length: int = 226
    activation_fn: str = "gelu-approximate"
    timestep_activation_fn: str = "silu"
    norm_elementwise_affine: bool = True
    norm_eps: float = 1e-5
    spatial_interpolation_scale: float = 1.875
    temporal_interpolation_scale: float = 1.0
    use_rotary_positional_embeddings: bool = False
    use_learned_positional_embeddings: bool = False
    patch_bias: bool = True

    def __post_init__(self) -> None:
        _check_range(self, 1, 1024, "num_attention_heads", "attention_head_dim", "num_layers")
        _check_range(self, 1, 1 << 16, "in_channels", "out_channels", "time_embed_dim")
        _check_range(self, 1, 1 << 16, "text_embed_dim", "max_text_seq_length")
        _check_range(self, 1, 1 << 16, "sample_width", "sample_height", "sample_frames")
        _check_range(self, 1, 64, "patch_size", "patch_size_t", "temporal_compression_ratio")
        _check_range(self, 1e-12, 1, "norm_eps")
        _check_range(self, 1e-3, 1e3, "spatial_interpolation_scale", "temporal_interpolation_scale")
        if self.timestep_activation_fn not in _TIMESTEP_ACTIVATIONS:
            raise ValueError(
                f"timestep_activation_fn must be one of {', '.join(_TIMESTEP_ACTIVATIONS)}, "
                f"not {self.timestep_activation_fn!r}"
            )
        if self.use_learned_positional_embeddings and self.patch_size_t is not None:
            raise ValueError("use_learned_positional_embeddings needs patch_size_t null")
        if self.use_rotary_positional_embeddings and self.attention_head_dim % 16:
            raise ValueError(
                f"attention_head_dim must be a multiple of 16 for rotary positions, "
                f"not {self.attention_head_dim}"
            )

    @property
    def width(self) -> int:
        """E, the numbers of a token: all heads together."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def image_to_video(self) -> bool:
        """Whether the latents of an image are concatenated to the channels of the noisy ones."""
        return self.in_channels == 2 * self.out_channels


@dataclasses.dataclass(frozen=True)
class VaeConfig(_JsonConfig):
    """diffusers' AutoencoderKLCogVideoX: `vae/config.json`."""

    classes = ("AutoencoderKLCogVideoX",)

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 256, 512)
    up_block_types: tuple[str, ...] = ("CogVideoXUpBlock3D",) * 4
    latent_channels: int = 16
    layers_per_block: int = 3
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-6
    temporal_compression_ratio: int = 4
    scaling_factor: float = 1.15258426
    use_quant_conv: bool = False
    use_post_quant_conv: bool = False
    invert_scale_latents: bool = False

    def __post_init__(self) -> None:
        _check_range(self, 1, 1 << 16, "in_channels", "out_channels", "latent_channels")
        _check_range(self, 1, 1 << 16, "norm_num_groups")
        _check_range(self, 1e-12, 1, "norm_eps")
        _check_range(self, 1, 64, "layers_per_block")
        levels = len(self.block_out_channels)
        if not levels or min(self.block_out_channels) < 1 or max(self.block_out_channels) > 1 << 16:
            raise ValueError(
                f"block_out_channels must be numbers from 1 to {1 << 16}, "
                f"not {list(self.block_out_channels)}"
            )
        if self.up_block_types != ("CogVideoXUpBlock3D",) * levels:
            raise ValueError(
                f"up_block_types must be {levels} times CogVideoXUpBlock3D, as many as "
                f"block_out_channels, not {list(self.up_block_types)}"
            )
        if self.act_fn not in ("silu", "swish"):
            raise ValueError(f"act_fn must be silu, not {self.act_fn!r}")
        unequal = [c for c in self.block_out_channels if c % self.norm_num_groups]
        if unequal:
            raise ValueError(
                f"block_out_channels {unequal} do not divide into "
                f"norm_num_groups={self.norm_num_groups}"
            )
        if self.temporal_compression_ratio not in (1, 2, 4, 8, 16):
            raise ValueError(
                f"temporal_compression_ratio must be a power of two up to 16, "
                f"not {self.temporal_compression_ratio}"
            )
        if not self.scaling_factor:
            raise ValueError("scaling_factor must not be 0")
        if self.use_quant_conv and self.out_channels != self.latent_channels:
            # As for the convolution below, diffusers takes out_channels for the moments of latents.
            raise ValueError(
                f"use_quant_conv needs out_channels={self.out_channels} equal to "
                f"latent_channels={self.latent_channels}"
            )
        if self.use_post_quant_conv and self.out_channels != self.latent_channels:
            # diffusers builds that convolution for out_channels and applies it to the latents.
            raise ValueError(
                f"use_post_quant_conv needs out_channels={self.out_channels} equal to "
                f"latent_channels={self.latent_channels}"
            )

    @property
    def time_levels(self) -> int:
        """Up blocks, from the deepest, that double the frames too; down blocks that halve them."""
        return int(math.log2(self.temporal_compression_ratio))

    @property
    def spatial_scale(self) -> int:
        """Pixels per latent along height and width."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclasses.dataclass(frozen=True)
class SchedulerConfig(_JsonConfig):
    """diffusers' CogVideoX schedulers: `scheduler/scheduler_config.json`.

    Attributes:
        name: as --scheduler has it; diffusers' `_class_name` in the file.
    """

    classes = ("CogVideoXDPMScheduler", "CogVideoXDDIMScheduler")

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    trained_betas: tuple[float, ...] | None = None
    clip_sample: bool = True
    set_alpha_to_one: bool = True
    steps_offset: int = 0
    prediction_type: str = "epsilon"
    clip_sample_range: float = 1.0
    sample_max_value: float = 1.0
    timestep_spacing: str = "leading"
    rescale_betas_zero_snr: bool = False
    snr_shift_scale: float = 3.0
    name: str = "dpm"

    def __post_init__(self) -> None:
        _check_range(self, 1, 1_000_000, "num_train_timesteps")
        _check_range(self, 0, 1, "beta_start", "beta_end")
        _check_range(self, 1e-6, 1e6, "snr_shift_scale")
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            raise ValueError(
                f"trained_betas holds {len(self.trained_betas)} numbers, "
                f"num_train_timesteps is {self.num_train_timesteps}"
            )

    @classmethod
    def from_file(cls, path: Path) -> "SchedulerConfig":
        """Reads a JSON file, which must name its scheduler's class; see `_JsonConfig.from_file`."""
        names = {"CogVideoXDPMScheduler": "dpm", "CogVideoXDDIMScheduler": "ddim"}
        class_name = str(read_json_object(Path(path)).get("_class_name"))
        if class_name not in names:
            class_name = printable(class_name[:_MOST_TEXT])
            raise ValueError(f"{path}: _class_name is {class_name}, not one of {', '.join(names)}")
        return dataclasses.replace(super().from_file(path), name=names[class_name])
