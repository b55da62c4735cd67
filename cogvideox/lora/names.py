"""The names of tensors in LoRA files: what people's trainers and user interfaces write.

A LoRA adds `scale * up @ down` to the weight of a module. Its files differ in how they name the
module and the two factors:

    diffusers   transformer.transformer_blocks.0.attn1.to_q.lora_A.weight     (down; lora_B is up)
    old         transformer.transformer_blocks.0.attn1.to_q.lora.down.weight
                transformer.transformer_blocks.0.attn1.to_q_lora.down.weight
    CogKit      transformer_blocks.0.attn1.to_q.lora_A.weight
    peft        base_model.model.transformer_blocks.0.attn1.to_q.lora_A.weight
    ComfyUI     diffusion_model.transformer_blocks.0.attn1.to_q.lora_A.weight
    kohya       lora_unet__transformer_blocks_0_attn1_to_q.lora_down.weight   (CogVideoX-Fun)
    SAT         model.diffusion_model.transformer.layers.0.attention.query_key_value.matrix_A.0
                (CogVideo's export of it writes diffusers' names)

Any of them may also have `MODULE.alpha`.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

Part = Literal["down", "up", "alpha"]

_SAT = "SAT"
# The longest first: one is the end of another.
_PREFIXES = (
    ("base_model.model.transformer.", "peft"),
    ("base_model.model.", "peft"),
    ("model.diffusion_model.transformer.", "ComfyUI"),
    ("model.diffusion_model.", "ComfyUI"),
    ("diffusion_model.transformer.", "ComfyUI"),
    ("diffusion_model.", "ComfyUI"),
    ("lora_transformer__", "kohya"),
    ("lora_transformer_", "kohya"),
    ("lora_unet__", "kohya"),
    ("lora_unet_", "kohya"),
    ("transformer.", "diffusers"),
    ("", "names without a prefix (CogKit)"),
)
_ENDINGS: Mapping[str, Part] = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".alpha": "alpha",
}
_SAT_KEY = re.compile(
    r"(?:model\.diffusion_model\.)?transformer\.layers\.(\d+)\.attention\."
    r"(query_key_value|dense)\.matrix_([AB])\.(\d)",
    re.ASCII,
)
_SAT_MODULES = {
    ("query_key_value", 0): "attn1.to_q",
    ("query_key_value", 1): "attn1.to_k",
    ("query_key_value", 2): "attn1.to_v",
    ("dense", 0): "attn1.to_out.0",
}
_BLOCK = re.compile(r"transformer_blocks[._](\d+)[._]", re.ASCII)
# What is refused, by a part of the key.
_REFUSED = (
    (r"^(text_encoder|text_model|lora_te\d?_|conditioner\.|cond_stage_model\.)",
     "it is for the text encoder; only LoRAs of the transformer can be added"),
    (r"lora_magnitude_vector|dora_scale|\.w_norm|\.b_norm",
     "it belongs to a DoRA, which is not supported; only plain LoRAs are"),
    (r"lokr_", "it belongs to a LoKr, which is not supported; only plain LoRAs are"),
    (r"hada_", "it belongs to a LoHa, which is not supported; only plain LoRAs are"),
    (r"oft_|ia3|lora_mid|lora_embedding|glora",
     "it belongs to another kind of adapter; only plain LoRAs are supported"),
    (r"lora_[AB]\.(default\.)?bias$|lora_(up|down)\.bias$|lora\.(up|down)\.bias$",
     "LoRAs with a bias are not supported"),
    (r"\.(diff|diff_b|set_weight)$",
     "it is the difference of a whole tensor; only low-rank products are supported"),
)  # fmt: skip


class Key(NamedTuple):
    """What a tensor of a LoRA file is.

    Attributes:
        format: whose names the file has, for people.
        module: of the transformer, by diffusers' name.
    """

    format: str
    module: str
    part: Part

    @property
    def from_sat(self) -> bool:
        """Whether SAT wrote the file. It trains with alpha = 1 and writes none."""
        return self.format == _SAT


class Modules:
    """The modules of a transformer that a LoRA can change, by any file's names for them."""

    def __init__(self, names: Iterable[str], num_layers: int):
        """
        Args:
            names: by diffusers, with block numbers.
            num_layers: of the transformer.
        """
        self._layers = num_layers
        self._names = {name: name for name in names}
        self._names |= {name.replace(".", "_"): name for name in self._names}

    def read(self, key: str) -> Key:
        """Finds out what a tensor is.

        Raises:
            ValueError: it is no part of a LoRA of this transformer; without the name of the key.
        """
        for pattern, reason in _REFUSED:
            if re.search(pattern, key):
                raise ValueError(reason)
        if match := _SAT_KEY.fullmatch(key):
            block, layer, factor, number = match.groups()
            name = f"transformer_blocks.{block}.{_SAT_MODULES.get((layer, int(number)), layer)}"
            return Key(_SAT, self._module(name), "down" if factor == "A" else "up")
        ending = next((ending for ending in _ENDINGS if key.endswith(ending)), None)
        if ending is None:
            raise ValueError("it is no known part of a LoRA")
        prefix, format_ = next(one for one in _PREFIXES if key.startswith(one[0]))
        name = key.removeprefix(prefix).removesuffix(ending)
        if ending.startswith("_lora."):  # diffusers' old attention processors
            name = name.replace(".processor.", ".")
            name += ".0" if name.endswith("to_out") else ""
        if ".lora." in ending or ending.startswith("_lora."):
            format_ += ", old names"
        return Key(format_, self._module(name), _ENDINGS[ending])

    def _module(self, name: str) -> str:
        if name in self._names:
            return self._names[name]
        block = _BLOCK.match(name)
        if block and int(block[1]) >= self._layers:
            raise ValueError(
                f"this transformer has only {self._layers} blocks; the LoRA is of another model"
            )
        raise ValueError("this transformer has no such layer; the LoRA is of another model")
