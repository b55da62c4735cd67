"""Weights and programs that stay loaded for many requests.

A stage script loads, runs once and ends. A `Session` runs the same stages for one request after
another: it loads each part of the model once and compiles each shape once. The work is that of the
stage modules, so a request's files are byte for byte those of the scripts run with the same options
in the same folder. A batch uses one session per process; a server would share one among its
clients.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from cogvideox.transformer.precision import Precision
from runtime.progress import working
from stages import condition, decode, denoise, encode, files
from stages.lora import LoraLibrary, Loras
from stages.sections import DECODE, DENOISE, ENCODE
from stages.steps import CompiledSteps, compile_steps, foresee_steps, load_steps

if TYPE_CHECKING:
    import jax
    import numpy as np

    from cogvideox.denoising.program import Denoiser
    from cogvideox.model.folder import ModelFolder
    from cogvideox.model.settings import Condition, DenoisingSettings
    from cogvideox.text.encoder import TextEncoder
    from cogvideox.transformer.block_rules import SparseAttention
    from cogvideox.vae.decode import Decoder
    from cogvideox.vae.encode import Encoder
    from stages.preview import Previews


# Denoising shows its steps.
_DOING = {ENCODE: "encoding the prompt", DECODE: "decoding"}


class Shape(NamedTuple):
    """What the compiled programs depend on. Requests of one shape share them."""

    height: int
    width: int
    num_frames: int
    guided: bool
    text_tokens: int
    masked: bool = False
    gated: bool = False
    sparse: SparseAttention | None = None
    parts: tuple[tuple[bool, bool], ...] = ()
    precision: Precision = Precision()

    def __str__(self) -> str:
        parts = [f"{self.height}x{self.width}x{self.num_frames}"]
        parts += [] if self.guided else ["no guidance"]
        parts += ["step mask"] * self.masked + ["guidance reused"] * self.gated
        parts += ["sparse attention"] * (self.sparse is not None)
        parts += self.precision.options.values()
        return ", ".join(parts)


@dataclasses.dataclass(frozen=True)
class VideoRequest:
    """One video to make: checked settings, and the options of its three stages.

    The requests of one session agree in dtype, mesh, attention, decoder and executables. `lossy` of
    the options of stage 2 is set.
    """

    settings: DenoisingSettings
    encode: encode.EncodeOptions
    denoise: denoise.DenoiseOptions
    decode: decode.DecodeOptions
    text_tokens: int
    condition: Condition | None = None

    @property
    def shape(self) -> Shape:
        s, lossy = self.settings, self.denoise.lossy
        assert lossy is not None
        return Shape(
            *(s.height, s.width, s.num_frames, s.guided, self.text_tokens),
            *lossy.decides_programs(s.executed_steps),
        )


class Weights(NamedTuple):
    """The transformer's weights on the devices, and the LoRAs in them."""

    mesh: jax.sharding.Mesh
    parameters: dict[str, jax.Array]
    loras: Loras


class Session:
    """What is loaded and compiled for one model, and the stages of a request as methods.

    A request names its LoRAs: `check` reads them, and `prepare` of stage 2 loads those parameters
    again that the last request's LoRAs or this one's change. It compiles nothing for them.

    `prepare` and `run` of stage 2 may run in one thread while those of stage 3 run in another.
    """

    def __init__(
        self,
        model: ModelFolder,
        stop: threading.Event,
        abort: threading.Event,
        show_steps: Callable[..., Iterable[Any]],
        show_activity: Callable[[Path, str], None] = lambda folder, what: None,
    ):
        """
        Args:
            stop: ends denoising after the current step, with a checkpoint if they are on.
            abort: also ends decoding.
            show_steps: shows the progress of denoising; called with the folder of a request, then
                as `runtime.progress.progress` is.
            show_activity: called with the folder of a request before anything that takes long.
        """
        self._model = model
        self._stop = stop
        self._abort = abort
        self._show_steps = show_steps
        self._show_activity = show_activity
        self._text_encoder: TextEncoder | None = None
        self._encoder: tuple[tuple[bool, str], Encoder] | None = None
        self._runs: dict[Shape, denoise.DenoisingRun] = {}
        self._library = LoraLibrary(model)
        self._weights: Weights | None = None
        self._step: tuple[Shape, CompiledSteps] | None = None
        self._decoded: set[tuple[tuple[int, ...], str]] = set()  # latents' shapes, frames' dtypes
        self._decoder: tuple[jax.sharding.Mesh, Decoder] | None = None

    def check(self, requests: Sequence[VideoRequest], stages: Sequence[str], folder: Path) -> None:
        """Checks everything that the stages check before they load weights, once per shape.

        Args:
            folder: where the folders of the requests are.

        Raises:
            ValueError: a request cannot be computed.
        """
        if ENCODE in stages:
            from cogvideox.text.encoder import check_weights

            encode.check(requests[0].encode)
            check_weights(self._model)
        for request in {request.shape: request for request in reversed(requests)}.values():
            run = self.check_denoising(request)
            decoding = dataclasses.replace(request.decode, input_dir=folder)
            decode.check(decoding, self._model, run.latents_shape, request.settings.fps)
        for choices in {tuple(request.denoise.lora_choices) for request in requests}:
            self._library.resolve(choices)

    def check_denoising(self, request: VideoRequest) -> denoise.DenoisingRun:
        """Checks what stage 2 checks before it loads weights; `prepare` needs it for the shape.

        Raises:
            ValueError: the request cannot be computed.
        """
        base = dataclasses.replace(request.denoise, lora=None, loras=())
        run = denoise.check(base, self._model, 1, request.text_tokens, request.condition)
        self._runs[request.shape] = run
        return run

    def mesh(self, shape: Shape) -> dict[str, int]:
        """The mesh of the transformer for a shape that `check` has passed."""
        return dict(self._runs[shape].denoiser.mesh.shape)

    def prepare(self, stage: str, request: VideoRequest) -> None:
        """Loads and compiles what `run` needs and is not there yet."""
        {
            ENCODE: self._prepare_encoder,
            DENOISE: self._prepare_transformer,
            DECODE: self._prepare_decoder,
        }[stage](request)

    def run(self, stage: str, request: VideoRequest) -> None:
        """Writes the files of one stage of a request, after `prepare`.

        Raises:
            denoise.StoppedBetweenSteps: `stop` or `abort` was set.
        """
        if stage in _DOING:
            self._show_activity(request.denoise.output_dir, _DOING[stage])
        {ENCODE: self._encode, DENOISE: self._denoise, DECODE: self._decode}[stage](request)

    def release_text_encoder(self) -> None:
        """Frees the memory of T5, 9.5 GB for the published models, and of the VAE's encoder."""
        self._text_encoder = self._encoder = None

    def _prepare_encoder(self, request: VideoRequest) -> None:
        if self._text_encoder is None:
            with self._working(request, "loading the text encoder"):
                import torch

                from cogvideox.text.encoder import load_text_encoder

                dtype = getattr(torch, request.encode.dtype)
                self._text_encoder = load_text_encoder(self._model, dtype)

    def embed(self, request: VideoRequest) -> dict[str, np.ndarray]:
        """Encodes the prompts of a request after `prepare`; see `encode.embed`."""
        # One prompt at a time: the bits of an embedding depend on the size of its batch.
        assert self._text_encoder is not None
        return encode.embed(self._text_encoder, request.encode, request.text_tokens)

    def _encode(self, request: VideoRequest) -> None:
        encoded = self.encode_input(request.encode)
        tensors = self.embed(request)
        encode.save(tensors, request.encode, self._model, request.text_tokens, encoded)

    def encode_input(self, options: encode.EncodeOptions) -> condition.Encoded | None:
        """Encodes the image or video that a request names; None if it names none.

        Raises:
            ValueError: the model needs another one, or it cannot be read or encoded.
        """
        source = condition.find_source(options.condition, self._model)
        if source is None:
            return None
        key = (source.options.on_cpu, source.options.encoder)
        if self._encoder is None or self._encoder[0] != key:
            loaded = condition.load_encoder(source.options, self._model, options.dtype)
            self._encoder = key, loaded
        pixels = source.read()
        posterior = condition.encode(self._encoder[1], pixels, source.options, options.dtype)
        return condition.Encoded(source, pixels[0], posterior)

    def _prepare_transformer(self, request: VideoRequest) -> None:
        shape = request.shape
        run = self._runs[shape]
        denoiser = run.denoiser
        self._load_weights(denoiser, request)
        if self._step is None or self._step[0] != shape:
            from runtime.compilation import CompilationLog

            log, self._step = CompilationLog(), None
            programs = (run.denoisers, run.schedule, request.denoise.executables)
            with self._working(request, f"{shape}: {foresee_steps(*programs)}"):
                self._step = shape, compile_steps(*programs)
            print(f"{shape}: {log.sentence()}")

    def _load_weights(self, denoiser: Denoiser, request: VideoRequest) -> None:
        """Makes the weights on the devices those of a request: base model, LoRAs and mesh."""
        loras = self._library.resolve(request.denoise.lora_choices)
        executables = request.denoise.executables
        with_loras = dataclasses.replace(denoiser, stored=loras.merged(denoiser.stored))
        there, self._weights = self._weights, None  # so that the devices never hold two
        if there is None or there.mesh != denoiser.mesh:
            there = None
            what = f"loading the transformer, mesh {dict(denoiser.mesh.shape)}"
            with self._working(request, what):
                parameters = with_loras.load(executables)
        else:
            parameters = there.parameters
            changed = loras.parameters_changed_from(there.loras)
            if changed:
                for name in changed:
                    del parameters[name]
                what = f"changing the LoRA: loading {len(changed)} parameters"
                with self._working(request, what):
                    parameters |= with_loras.load(executables, changed)
        if (there.loras if there else Loras()) != loras:
            print("\n".join(loras.describe() or ["no LoRA"]))
        self._weights = Weights(denoiser.mesh, parameters, loras)

    def run_of(self, request: VideoRequest) -> denoise.DenoisingRun:
        """The run of stage 2 for a request, after `prepare`."""
        from cogvideox.denoising.scheduler import make_schedule

        options = request.denoise
        assert options.lossy is not None and self._weights is not None
        return dataclasses.replace(
            self._runs[request.shape],
            settings=request.settings,
            schedule=options.lossy.apply(make_schedule(request.settings, self._model.scheduler)),
            lossy=options.lossy,
            loras=self._weights.loras,
        )

    def denoise_tensors(
        self,
        run: denoise.DenoisingRun,
        tensors: Mapping[str, np.ndarray],
        checkpoints: denoise.Checkpoints,
        bar: denoise.Bar,
        previews: Previews | None,
    ) -> np.ndarray:
        """Denoises embeddings after `prepare`; see `denoise.denoise`."""
        from cogvideox.denoising.noise import NoiseSource

        assert self._step is not None and self._weights is not None
        (_, steps), parameters = self._step, self._weights.parameters
        loaded = load_steps(run.denoisers, steps, parameters, tensors)
        return denoise.denoise(run, loaded, checkpoints, NoiseSource(), bar, previews)

    def _denoise(self, request: VideoRequest) -> None:
        run, options = self.run_of(request), request.denoise
        embeddings, _ = denoise.open_embeddings(options.input_dir, options.model_id)
        conditions = condition.open_conditions(embeddings, self._model)
        if conditions is not None:
            dtype = run.denoiser.dtype
            conditioning = condition.make_conditioning(conditions, self._model, dtype)
            run = dataclasses.replace(run, conditioning=conditioning)
        tensors = files.read_tensors(embeddings)
        section = denoise.denoising_section(run, self._model, embeddings)
        every = options.checkpoint_every
        checkpoints = denoise.Checkpoints(options.output_dir, section, every, self._stop.is_set)
        bar = functools.partial(self._show_steps, options.output_dir)
        with denoise.previews_of(run, options, options.output_dir, self._model) as previews:
            latents = self.denoise_tensors(run, tensors, checkpoints, bar, previews)
        denoise.save(latents, section, options.input_dir, options.output_dir)

    def _prepare_decoder(self, request: VideoRequest) -> None:
        options = request.decode
        _, latents_file = decode.open_latents(options.input_dir)
        shape = latents_file.shapes["latents"]
        self.prepare_decoder(
            request, shape, decode.pixel_dtype(decode.video_paths(options, shape[0]))
        )

    def prepare_decoder(
        self, request: VideoRequest, shape: tuple[int, ...], output: Literal["uint8", "float32"]
    ) -> None:
        """Loads and compiles what decodes latents of a shape [B, C, T, H, W]."""
        options = request.decode
        if self._decoder is None:
            import jax

            with self._working(request, "loading the VAE decoder"):
                mesh = decode.make_mesh(options, jax.devices())
                decoder = decode.make_decoder(options, self._model, mesh)
                decoder.load(self._model.path / "vae")
            self._decoder = mesh, decoder
        mesh, decoder = self._decoder
        if (shape, output) not in self._decoded:
            from runtime.executables import foresee

            programs, devices = decoder.programs(shape, output=output), list(mesh.devices.flat)
            todo = foresee(programs, options.executables, devices)
            what = f"{request.shape}: {todo} the VAE decoder's programs"
            with self._working(request, what):
                decoder.compile(shape, output=output, executables=options.executables)
            self._decoded.add((shape, output))

    def decode_latents(
        self, latents: np.ndarray, output: Literal["uint8", "float32"]
    ) -> Iterator[np.ndarray]:
        """Yields frames [B, F, height, width, 3] in batches, after `prepare_decoder`."""
        assert self._decoder is not None
        return self._decoder[1].decode(latents, output=output)

    def _decode(self, request: VideoRequest) -> None:
        assert self._decoder is not None
        (mesh, _), options = self._decoder, request.decode
        config, latents_file = decode.open_latents(options.input_dir)
        latents = files.read_tensors(latents_file)["latents"]
        videos = decode.video_paths(options, len(latents))
        section = decode.decoding_section(options, self._model, latents_file, videos, mesh)
        num_frames = decode.num_frames(self._model, latents.shape)
        batches = self.decode_latents(latents, decode.pixel_dtype(videos))
        config = {**config, DECODE: section}
        decode.write_videos(self._until_aborted(batches), num_frames, videos, options, config)

    def _working(self, request: VideoRequest, what: str) -> AbstractContextManager[None]:
        """Says what is about to take long, here and to those who follow the request."""
        self._show_activity(request.denoise.output_dir, what)
        return working(what)

    def _until_aborted(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for batch in batches:
            if self._abort.is_set():
                raise denoise.StoppedBetweenSteps
            yield batch
