"""Options of stage 2."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from stages import speed
from stages.lora import LoraChoice, parse_choice


@dataclasses.dataclass(frozen=True)
class DenoiseOptions:
    """Options of stage 2, by the names of the command line.

    None takes the model's value, and for the mesh axes the sizes that fit.

    Attributes:
        model_id: None takes the model that made the embeddings.
        allow_unsupported: also compute sizes that the model was not trained for.
        attention: "auto", "splash", "cudnn" or "reference".
        checkpoint_every: steps between two saves of the loop's state; None saves none.
        speed, step_mask, mask_steps, guidance_until, sparse_attention, dense_steps, dense_layers,
            attention_precision: see `speed.SpeedOptions`.
        strength: of video-to-video, the share of the steps that run.
        lossy: what the options of speed resolve to, if it is known.
        lora: files, each as FILE or FILE=WEIGHT.
        loras: what these say, if it is known.
        dtype: "bfloat16" or "float32".
        executables: a folder from compile_ahead.py; missing programs are compiled.
        profile: a folder for a JAX profile of the loop.
        preview_every: steps between two previews; None makes none.
        preview_factors: a file from calibrate.py --preview; None takes the model's own, or else
            those of the published models.
    """

    input_dir: Path
    output_dir: Path
    dtype: str
    seed: int
    model_id: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    use_dynamic_cfg: bool = False
    scheduler: str | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    fps: int | None = None
    allow_unsupported: bool = False
    attention: str = "auto"
    checkpoint_every: int | None = None
    speed: str = speed.EXACT
    step_mask: str | None = None
    mask_steps: int | None = None
    guidance_until: float | None = None
    sparse_attention: str | None = None
    dense_steps: int | None = None
    dense_layers: int | None = None
    attention_precision: str | None = None
    strength: float | None = None
    lossy: speed.Lossy | None = None
    lora: Sequence[str] | None = None
    loras: Sequence[LoraChoice] | None = None
    dp: int | None = None
    sp: int | None = None
    tp: int | None = None
    executables: Path | None = None
    profile: Path | None = None
    preview_every: int | None = None
    preview_factors: Path | None = None

    @property
    def lora_choices(self) -> Sequence[LoraChoice]:
        """The LoRAs, as `lora` or `loras` says.

        Raises:
            ValueError: `lora` names no file, or a weight that cannot be used.
        """
        return (
            [parse_choice(text) for text in self.lora or ()] if self.loras is None else self.loras
        )
