"""The sections of generation_config.json: what each stage did, sealed against later changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from runtime.fingerprint import fingerprint as hash_json
from runtime.versions import versions

if TYPE_CHECKING:
    from cogvideox.model.folder import ModelFolder

# The stages in their order: the names of the scripts, of the sections in generation_config.json,
# and in the stage files' metadata.
ENCODE = "stage1_text_encoder"
DENOISE = "stage2_transformer"
DECODE = "stage3_vae_decoder"
STAGES = (ENCODE, DENOISE, DECODE)

# The sub-folders of a model that each stage loads.
PARTS = {
    ENCODE: ("tokenizer", "text_encoder"),
    DENOISE: ("transformer", "scheduler"),
    DECODE: ("vae",),
}

_FINGERPRINT_LENGTH = 16
# The path of a model and `made_with` do not decide the output.
_NOT_HASHED = ("model_id", "revision", "fingerprint", "made_with", "checksum")

_TEXT, _OPTIONAL_TEXT, _COUNT = (str,), (str, type(None)), (int,)
_NUMBER, _TRUTH = (int, float), (bool,)
_COMMON = {
    "model_id": _TEXT,
    "revision": _OPTIONAL_TEXT,
    "model": (dict,),
    "dtype": _TEXT,
    "made_with": (dict,),
}
_TYPES: dict[str, dict[str, tuple[type, ...]]] = {
    ENCODE: {
        **_COMMON,
        "prompt": (str, list),
        "negative_prompt": _TEXT,
        "max_sequence_length": _COUNT,
        "conditions": (dict, type(None)),
    },
    DENOISE: {
        **_COMMON,
        "embeddings": _TEXT,
        **dict.fromkeys(("height", "width", "num_frames", "fps"), _COUNT),
        **dict.fromkeys(("num_inference_steps", "seed"), _COUNT),
        "guidance_scale": _NUMBER,
        "use_dynamic_cfg": _TRUTH,
        "scheduler": _TEXT,
        "strength": (*_NUMBER, type(None)),
    },
    DECODE: {
        **_COMMON,
        "latents": _TEXT,
        "output_video": (list,),
        "fps": _COUNT,
        "quality": (int, type(None)),
    },
}


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Hashes the settings that decide a stage's output, to 16 hexadecimal digits.

    Exact runs have the fingerprints that they had before there were lossy options. Of LoRAs the
    places of the files do not count.
    """
    exact = {"speed"} if settings.get("speed") == "exact" else set()
    hashed = {k: v for k, v in settings.items() if k not in exact.union(_NOT_HASHED)}
    if "lora" in hashed:
        hashed["lora"] = without_places(hashed["lora"])
    return hash_json(hashed)[:_FINGERPRINT_LENGTH]


def without_places(loras: Any) -> Any:
    """Returns what decides a result of what a section, or a job, says of LoRAs."""
    if not isinstance(loras, list) or not all(isinstance(lora, dict) for lora in loras):
        return loras  # damaged, and reported later
    return [{k: v for k, v in lora.items() if k != "file"} for lora in loras]


def checksum(section: Mapping[str, Any]) -> str:
    """Hashes a section except its own checksum, to 16 hexadecimal digits."""
    whole = {name: value for name, value in section.items() if name != "checksum"}
    return hash_json(whole)[:_FINGERPRINT_LENGTH]


def make_section(settings: Mapping[str, Any], **made_with: Any) -> dict[str, Any]:
    """Makes a section of generation_config.json.

    Args:
        settings: everything that decides the output; also `model_id` and `revision`, which name
            the model for people.
        made_with: facts that do not decide it, such as the mesh.

    Returns:
        The settings, their fingerprint, `made_with` together with the library versions, and a
        checksum of all this.
    """
    made_with["versions"] = versions()
    section = {**settings, "fingerprint": fingerprint(settings), "made_with": made_with}
    return {**section, "checksum": checksum(section)}


def with_facts(section: Mapping[str, Any], **made_with: Any) -> dict[str, Any]:
    """Adds facts to `made_with` of a section and seals it again."""
    section = {**section, "made_with": {**section["made_with"], **made_with}}
    return {**section, "checksum": checksum(section)}


def model_settings(model: ModelFolder, stage: str) -> dict[str, Any]:
    """The settings of a section that say which model made it.

    Raises:
        ValueError: a part that the stage loads is missing or damaged.
    """
    return {
        "model_id": model.model_id,
        "revision": model.revision,
        "model": {part: model.digest(part) for part in PARTS[stage]},
    }


def later_parts(model: ModelFolder, stage: str) -> dict[str, str]:
    """Digests of the parts that later stages load, as far as they are here."""
    later = STAGES[STAGES.index(stage) + 1 :]
    return model.digests([part for name in later for part in PARTS[name]])


def is_whole(section: Mapping[str, Any]) -> bool:
    """Whether a section is as the stage wrote it."""
    return section.get("checksum") == checksum(section) and section.get(
        "fingerprint"
    ) == fingerprint(section)


def check_section(stage: str, section: object) -> dict[str, Any]:
    """Checks a section that was read from a file.

    Raises:
        ValueError: it is missing, was changed, or lacks a setting of the stage; without the name
            of the file.
    """
    if section is None:
        raise ValueError(f"there is no section {stage}")
    if not isinstance(section, dict):
        raise ValueError(f"section {stage} is not an object")
    if not is_whole(section):
        raise ValueError(
            f"section {stage} was changed after {stage}.py wrote it: its checksum is "
            f"{checksum(section)}, not {str(section.get('checksum'))[:80]!r}"
        )
    for name, types in _TYPES[stage].items():
        value = section.get(name)
        if not isinstance(value, types) or (isinstance(value, bool) and types != _TRUTH):
            raise ValueError(f"section {stage}: {name} is {str(value)[:80]!r}")
    for name in ("prompt", "output_video"):
        value = section.get(name)
        if isinstance(value, list) and not (value and all(isinstance(v, str) for v in value)):
            raise ValueError(f"section {stage}: {name} is not a list of texts")
    return section
