"""The stages as calls from Python: arrays in, arrays out, weights and programs kept loaded.

    pipeline = Pipeline("zai-org/CogVideoX1.5-5B")
    frames = pipeline.generate("A panda plays guitar in a bamboo forest", Settings(seed=7))

The arrays are those that the stage scripts write into their files.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from stages import decode, encode, speed
from stages.checkpoints import Checkpoints
from stages.condition import ConditionOptions
from stages.denoise import Bar
from stages.denoise_options import DenoiseOptions
from stages.preview import find_factors
from stages.sections import DENOISE, ENCODE
from stages.session import Session, VideoRequest

if TYPE_CHECKING:
    import numpy as np

    from cogvideox.denoising.loop import LoopState
    from cogvideox.model.settings import Condition
    from cogvideox.video.preview import PreviewFactors

Decoder = Literal["torchax", "flax"]
_NOWHERE = Path()  # of requests that read and write no file


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """A prompt and a negative prompt, encoded.

    Attributes:
        prompt_embeds: [1, tokens, text_dim] in the pipeline's dtype.
        negative_prompt_embeds: the same shape.
    """

    prompt_embeds: np.ndarray
    negative_prompt_embeds: np.ndarray


@dataclasses.dataclass(frozen=True)
class Start:
    """An image or a video that a run starts from, encoded.

    Attributes:
        condition: its kind, size and number of frames.
        mean, std: of the posterior, [1, C, T, H, W] in the pipeline's dtype.
    """

    condition: Condition
    mean: np.ndarray
    std: np.ndarray


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a video, by the names of the stages' options; None takes the model's value.

    Attributes:
        strength: of a run that starts from a video: the share of the steps that run.
        allow_unsupported: also compute sizes that the model was not trained for.
        speed, step_mask, mask_steps, guidance_until, sparse_attention, dense_steps, dense_layers,
        attention_precision:
            lossy; see docs/speed.md.
        lora: files, each as FILE or FILE=WEIGHT; another choice compiles nothing.
    """

    seed: int = 42
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    use_dynamic_cfg: bool = False
    scheduler: str | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    strength: float | None = None
    allow_unsupported: bool = False
    speed: str = speed.EXACT
    step_mask: str | None = None
    mask_steps: int | None = None
    guidance_until: float | None = None
    lora: Sequence[str] = ()
    sparse_attention: str | None = None
    dense_steps: int | None = None
    dense_layers: int | None = None
    attention_precision: str | None = None


class Step:
    """A step of denoising that is done, as a progress callback sees it.

    Attributes:
        done: how many steps are done, from 1.
        total: how many there are.
        state: of the loop, on the devices; valid until the callback returns.
    """

    def __init__(self, state: LoopState, total: int, padding: int, factors: PreviewFactors | None):
        self.done, self.total = state.steps, total
        self.state = state
        self._padding, self._factors = padding, factors

    def preview(self) -> np.ndarray:
        """What the video looks like so far: [T, H, W, 3] uint8, a pixel for 8x8 of the video.

        Call it before the callback returns: the next step takes the arrays.

        Raises:
            ValueError: there are no factors for the model's VAE.
        """
        from cogvideox.denoising.loop import x0_to_host
        from cogvideox.video.preview import pictures_of

        if self._factors is None:
            raise ValueError("the model has no factors of previews; see calibrate.py --preview")
        latents = x0_to_host(self.state)[0, self._padding :].swapaxes(0, 1)
        return pictures_of(latents, self._factors)


Callback = Callable[[Step], None]


class Pipeline:
    """A model whose parts are loaded once, and whose programs are compiled once a shape.

    What a call needs is loaded by the first one that needs it. One thread may call at a time.
    """

    def __init__(
        self,
        model_id: str,
        *,
        dtype: Literal["bfloat16", "float32"] = "bfloat16",
        decoder: Decoder = "torchax",
        attention: str = "auto",
        dp: int | None = None,
        sp: int | None = None,
        tp: int | None = None,
        executables: Path | None = None,
    ):
        """
        Args:
            model_id: a hub id, or a folder in diffusers layout.
            dp, sp, tp: devices along each axis of the mesh; None takes as many as fit.
            executables: a folder from compile_ahead.py.

        Raises:
            ValueError: there is no such model, parts of it are missing, or it is not supported.
        """
        from cogvideox.model.folder import MODEL_PARTS, find_model
        from cogvideox.model.settings import check_supported

        self._model = find_model(model_id, MODEL_PARTS)
        check_supported(self._model)
        self._mesh: dict[str, Any] = {"dp": dp, "sp": sp, "tp": tp}
        self._common: dict[str, Any] = {
            "model_id": model_id,
            "dtype": dtype,
            "executables": executables,
        }
        self._decoder, self._attention, self._dtype = decoder, attention, dtype
        self._model_id = model_id
        never = threading.Event()
        self._session = Session(self._model, never, never, lambda *_, **__: ())

    @property
    def fps(self) -> int:
        """Frames a second of the model's videos."""
        from cogvideox.model.presets import preset_for

        return preset_for(self._model.transformer, self._model.vae.spatial_scale).fps

    def encode(
        self,
        prompt: str,
        negative_prompt: str = "",
        *,
        max_sequence_length: int | None = None,
    ) -> Embeddings:
        """Encodes a prompt, as stage 1 does.

        Args:
            max_sequence_length: tokens; None takes the model's.

        Raises:
            ValueError: the prompt is empty, too long or not valid Unicode, or the model was not
                trained for that many tokens.
        """
        options = dataclasses.replace(
            self._encode_options(prompt),
            negative_prompt=negative_prompt,
            max_sequence_length=max_sequence_length,
        )
        _, tokens = encode.check(options)
        request = self._request(Settings(), tokens, self._any_condition())
        request = dataclasses.replace(request, encode=options)
        self._session.prepare(ENCODE, request)
        return Embeddings(**self._session.embed(request))

    def start_from(
        self,
        *,
        image: Path | str | None = None,
        video: Path | str | None = None,
        image_fit: Literal["stretch", "crop"] = "stretch",
        height: int | None = None,
        width: int | None = None,
        size: Literal["auto"] | None = None,
        allow_unsupported: bool = False,
        encode_on: Literal["cpu", "devices"] | None = None,
    ) -> Start:
        """Encodes an image or a video, as stage 1 does; see docs/image_and_video.md.

        Args:
            image, video: one of them: a file, or for a video also a folder of PNG frames.
            height, width, size: None takes the model's; size "auto" its nearest in shape.

        Raises:
            ValueError: the model needs another one, or it cannot be read or encoded.
        """
        chosen = ConditionOptions(
            image=None if image is None else Path(image),
            video=None if video is None else Path(video),
            image_fit=image_fit,
            height=height,
            width=width,
            size=size,
            allow_unsupported=allow_unsupported,
            encode_on=encode_on,
            encoder=self._decoder,
            executables=self._common["executables"],
        )
        if image is None and video is None:
            raise ValueError("give an image or a video to start from")
        options = dataclasses.replace(self._encode_options("-"), condition=chosen)
        encoded = self._session.encode_input(options)
        assert encoded is not None
        return Start(encoded.source.condition, **encoded.posterior)

    def denoise(
        self,
        embeddings: Embeddings,
        settings: Settings | None = None,
        *,
        start: Start | None = None,
        progress: Callback | None = None,
    ) -> np.ndarray:
        """Runs the transformer, as stage 2 does.

        Args:
            start: from `start_from`; image-to-video models need one, of an image.
            progress: called after each step; what it raises ends the run.

        Returns:
            Latents [1, C, T, H, W], unscaled, in the pipeline's dtype.

        Raises:
            ValueError: the model cannot compute the settings, or needs another start.
        """
        from cogvideox.denoising.conditioning import Conditioning

        tensors = dataclasses.asdict(embeddings)
        tokens = embeddings.prompt_embeds.shape[1]
        condition = None if start is None else start.condition
        request = self._request(settings or Settings(), tokens, condition)
        self._session.check_denoising(request)
        self._session.prepare(DENOISE, request)
        run = self._session.run_of(request)
        if start is not None:
            kind, vae = start.condition.kind, self._model.vae
            conditioning = Conditioning.of(kind, start.mean, start.std, vae)
            run = dataclasses.replace(run, conditioning=conditioning)
        checkpoints = Checkpoints(_NOWHERE, {"fingerprint": ""}, every=None)
        bar = self._bar(progress, run.padding_frames)
        return self._session.denoise_tensors(run, tensors, checkpoints, bar, None)

    def decode(
        self, latents: np.ndarray, *, output: Literal["uint8", "float32"] = "uint8"
    ) -> np.ndarray:
        """Decodes latents, as stage 3 does.

        Args:
            latents: [1, C, T, H, W], from `denoise`.
            output: "float32" returns values in 0..1.

        Returns:
            Frames [F, height, width, 3].

        Raises:
            ValueError: the latents are not of this model's VAE.
        """
        import numpy as np

        if latents.ndim != 5 or latents.shape[:2] != (1, self._model.vae.latent_channels):
            raise ValueError(
                f"latents are {list(latents.shape)}, not [1, {self._model.vae.latent_channels}, T, "
                "H, W]"
            )
        request = self._request(Settings(), 1, self._any_condition())
        self._session.prepare_decoder(request, latents.shape, output)
        return np.concatenate([batch[0] for batch in self._session.decode_latents(latents, output)])

    def generate(
        self,
        prompt: str,
        settings: Settings | None = None,
        *,
        negative_prompt: str = "",
        start: Start | None = None,
        progress: Callback | None = None,
        output: Literal["uint8", "float32"] = "uint8",
    ) -> np.ndarray:
        """Makes a video: `encode`, `denoise` and `decode`, with their arguments and errors.

        Returns:
            Frames [F, height, width, 3].
        """
        embeddings = self.encode(prompt, negative_prompt)
        latents = self.denoise(embeddings, settings, start=start, progress=progress)
        return self.decode(latents, output=output)

    def _encode_options(self, prompt: str) -> encode.EncodeOptions:
        return encode.EncodeOptions([prompt], self._model_id, self._dtype, _NOWHERE)

    def _any_condition(self) -> Condition | None:
        """A condition that the model takes, for calls to which it makes no difference."""
        from cogvideox.model.settings import likely_condition

        return likely_condition(self._model, None, None)

    def _request(
        self, settings: Settings, tokens: int, condition: Condition | None
    ) -> VideoRequest:
        from cogvideox.model.settings import DenoisingSettings, complete_settings

        options = DenoiseOptions(
            input_dir=_NOWHERE,
            output_dir=_NOWHERE,
            attention=self._attention,
            **dataclasses.asdict(settings),
            **self._common,
            **self._mesh,
        )
        names = [field.name for field in dataclasses.fields(DenoisingSettings)]
        wishes = {name: getattr(options, name) for name in names}
        complete = complete_settings(
            wishes, self._model, any_size=settings.allow_unsupported, condition=condition
        )
        lossy = speed.resolve(options, complete, self._model)
        return VideoRequest(
            settings=complete,
            encode=self._encode_options("-"),
            denoise=dataclasses.replace(options, lossy=lossy),
            decode=decode.DecodeOptions(
                input_dir=_NOWHERE,
                decoder=self._decoder,
                dp=self._mesh["dp"],
                tp=self._mesh["tp"],
                **self._common,
            ),
            text_tokens=tokens,
            condition=condition,
        )

    def _bar(self, progress: Callback | None, padding: int) -> Bar:
        """A bar that tells the callback of each step instead of drawing."""
        factors = self._factors() if progress else None

        def tell(states: Iterable[Any], *, total: int, initial: int, what: str) -> Iterator[Any]:
            for state in states:
                if progress:
                    progress(Step(state, total, padding, factors))
                yield state

        return tell

    def _factors(self) -> PreviewFactors | None:
        options = DenoiseOptions(_NOWHERE, _NOWHERE, self._dtype, seed=0, preview_every=1)
        try:
            return find_factors(options, self._model)
        except ValueError:
            return None
