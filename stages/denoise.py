"""Stage 2: embeddings to latents, the denoising loop of the transformer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime import processes
from runtime.devices import start_jax
from runtime.errors import Stopped, checking_input
from runtime.open_folder import OpenFolder
from runtime.progress import Timings, progress, working
from stages import files, sections, speed
from stages.checkpoints import Checkpoints
from stages.condition import make_conditioning, open_conditions, recorded
from stages.denoise_options import DenoiseOptions
from stages.lora import LoraLibrary, Loras
from stages.preview import Previews, find_factors
from stages.steps import compile_steps, denoisers_of, describe_sparse, load_steps

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np

    from cogvideox.denoising.conditioning import Conditioning
    from cogvideox.denoising.loop import LoadedDenoiser
    from cogvideox.denoising.noise import NoiseSource
    from cogvideox.denoising.program import Denoiser
    from cogvideox.denoising.scheduler import Schedule
    from cogvideox.model.folder import ModelFolder
    from cogvideox.model.settings import Condition, DenoisingSettings, LatentShape
    from cogvideox.video.preview import PreviewFactors
    from runtime.jax_types import Device
    from runtime.tensor_files import StoredTensor


@dataclasses.dataclass(frozen=True)
class DenoisingRun:
    """A checked run: what to denoise, with which program, on which devices.

    Attributes:
        padding_frames: leading latent frames that `drop_padding` removes.
        lossy: the lossy options in force, which the schedule has.
        loras: in the weights that the denoiser loads.
        denoisers: of each part of the schedule, see `cogvideox.denoising.parts`.
        preview: how previews are drawn; None draws none.
        conditioning: the image or video that the run starts from, if any, once it is read.
    """

    settings: DenoisingSettings
    padding_frames: int
    denoisers: Sequence[Denoiser]
    schedule: Schedule
    lossy: speed.Lossy
    preview: PreviewFactors | None = None
    loras: Loras = Loras()
    conditioning: Conditioning | None = None

    @property
    def denoiser(self) -> Denoiser:
        """Of the first steps; it loads the weights of all."""
        return self.denoisers[0]

    @property
    def latents_shape(self) -> tuple[int, ...]:
        """[B, C, T, H, W], the latents as stage 2 saves and stage 3 decodes them."""
        return saved_shape(self.denoiser.latents, self.padding_frames)


def saved_shape(latents: LatentShape, padding_frames: int) -> tuple[int, ...]:
    """The shape [B, C, T, H, W] that `drop_padding` returns."""
    batch, frames, channels, height, width = latents.sizes
    return batch, channels, frames - padding_frames, height, width


def drop_padding(latents: np.ndarray, padding_frames: int) -> np.ndarray:
    """Removes the padding from diffusers' [B, T, C, H, W]; returns [B, C, T, H, W] for the VAE."""
    return latents[:, padding_frames:].swapaxes(1, 2)


def check(
    options: DenoiseOptions,
    model: ModelFolder,
    batch: int,
    tokens: int,
    condition: Condition | None = None,
) -> DenoisingRun:
    """Checks everything that needs no weights: sizes, steps, mesh, attention, weight headers.

    Args:
        batch: number of prompts.
        tokens: per prompt.
        condition: the image or video of stage 1, if any.

    Raises:
        ValueError: an option cannot be computed; the message names the nearest value that can.
    """
    from cogvideox.model.settings import DenoisingSettings, complete_settings, latent_shape

    fields = dataclasses.fields(DenoisingSettings)
    wishes = {field.name: getattr(options, field.name) for field in fields}
    any_size = options.allow_unsupported
    settings = complete_settings(wishes, model, any_size=any_size, condition=condition)
    latents, padding = latent_shape(settings, model, batch)
    lossy = options.lossy or speed.resolve(options, settings, model)
    preview = find_factors(options, model)
    with ThreadPoolExecutor(1) as background:
        # Starting the devices takes seconds; imports and checks that do not need them run at
        # the same time.
        starting = background.submit(start_jax, options.dtype)
        from cogvideox.denoising.scheduler import make_schedule
        from cogvideox.model.folder import stored_tensors
        from cogvideox.transformer.parameters import check_weights

        stored = stored_tensors(model.path / "transformer")
        check_weights(model.transformer, stored)
        loras = LoraLibrary(model).resolve(options.lora_choices)
        stored = loras.merged(stored)
        schedule = lossy.apply(make_schedule(settings, model.scheduler))
        starting.result()

    import jax

    devices, guided = jax.devices(), settings.guided
    denoiser = make_denoiser(options, model, stored, latents, tokens, guided, devices)
    denoisers = denoisers_of(denoiser, lossy, settings.executed_steps)
    return DenoisingRun(settings, padding, denoisers, schedule, lossy, preview, loras)


def make_denoiser(
    options: DenoiseOptions,
    model: ModelFolder,
    stored: Mapping[str, StoredTensor],
    latents: LatentShape,
    tokens: int,
    guided: bool,
    devices: Sequence[Device],
) -> Denoiser:
    """Makes the program for `devices`.

    Args:
        options: of them only the dtype, the attention and the mesh decide the program.
        stored: headers of the weight files; may be empty if nothing will be loaded.
        tokens: of a prompt.
        guided: whether classifier-free guidance doubles the batch.

    Raises:
        ValueError: no such mesh fits, or the devices cannot run that attention.
    """
    from cogvideox.denoising.program import Denoiser
    from cogvideox.transformer.backends import choose_backend
    from runtime.mesh import choose_mesh, make_mesh

    config = model.transformer
    device = devices[0]
    capability = device.compute_capability if device.platform == "gpu" else None
    backend = choose_backend(options.attention, device.platform, options.dtype, capability)
    sizes = choose_mesh(
        *(options.dp, options.sp, options.tp),
        batch=latents.batch * (2 if guided else 1),
        num_heads=config.num_attention_heads,
        num_devices=len(devices),
    )
    return Denoiser(
        config=config,
        stored=stored,
        latents=latents,
        text_tokens=tokens,
        guided=guided,
        dtype=options.dtype,
        mesh=make_mesh(sizes, devices),
        backend=backend,
    )


def run(options: DenoiseOptions) -> None:
    """Runs stage 2: checks, loads and compiles at once, denoises, and writes the latents."""
    from cogvideox.denoising.noise import NoiseSource

    with NoiseSource() as noise_source:
        _run(options, noise_source)


def _run(options: DenoiseOptions, noise_source: NoiseSource) -> None:
    timings, output_dir = Timings(), options.output_dir
    inputs = [files.CONFIG_FILE, files.EMBEDDINGS_FILE, files.CONDITIONS_FILE]
    options = dataclasses.replace(
        options, input_dir=processes.folder_of_first(options.input_dir, inputs)
    )
    # Reading and comparing 15 MB takes 20 ms, while the devices start.
    with (
        timings.phase("start"),
        working("stage 2: importing JAX, starting the devices"),
        ThreadPoolExecutor(1) as background,
        checking_input(),
    ):
        embeddings, model = open_embeddings(options.input_dir, options.model_id)
        reading = background.submit(files.read_tensors, embeddings)
        files.check_executables(options.executables)
        files.check_output_folder(output_dir, files.LATENTS_FILE, files.CONFIG_FILE)
        if options.profile:
            files.check_output_folder(options.profile)
        batch, tokens, _ = embeddings.shapes["prompt_embeds"]
        conditions = open_conditions(embeddings, model)
        checked = check(options, model, batch, tokens, recorded(embeddings.section))
        if conditions is not None:
            conditioning = make_conditioning(conditions, model, options.dtype)
            checked = dataclasses.replace(checked, conditioning=conditioning)
        tensors = reading.result()
    denoiser = checked.denoiser
    mesh, attention = dict(denoiser.mesh.shape), denoiser.backend.name
    print(f"{checked.settings.describe()}\nmesh {mesh}, attention {attention}, {options.dtype}")
    print(checked.lossy.describe())
    for line in (*describe_sparse(checked.denoisers), *checked.loras.describe()):
        print(line)

    from runtime.compilation import CompilationLog

    compilations = CompilationLog()
    with OpenFolder(output_dir) as watched:
        with (
            working("loading the transformer and its program"),
            ThreadPoolExecutor(1) as background,
        ):
            programs = (checked.denoisers, checked.schedule, options.executables)
            compiling = background.submit(compile_steps, *programs)
            with timings.phase("load"):
                parameters = denoiser.load(options.executables)
            with timings.phase("compile"):  # the part that loading did not hide
                steps = compiling.result()
            loaded = load_steps(checked.denoisers, steps, parameters, tensors)
        print(f"stage 2: {compilations.sentence()}")

        section = denoising_section(checked, model, embeddings)
        with timings.phase("run"), _profile(options.profile):
            folder = processes.folder_of_first(output_dir, [files.checkpoint_file(section)])
            checkpoints = Checkpoints(folder, section, options.checkpoint_every)
            with previews_of(checked, options, output_dir, model) as previews:
                latents = denoise(checked, loaded, checkpoints, noise_source, previews=previews)
        if not processes.is_first():
            return
        with timings.phase("save"):
            path = save(latents, section, options.input_dir, output_dir)
        watched.check()
    print(f"{path}: latents {list(latents.shape)}")
    timings.report(output_dir / "stage2_timings.json", compilation=compilations.summary())


def open_embeddings(input_dir: Path, model_id: str | None) -> tuple[files.StageFile, ModelFolder]:
    """Checks the header of stage 1's file; reads no tensor.

    Returns:
        The file, and the model that it was made with.

    Raises:
        ValueError: the file cannot be used, or was made with another model than `model_id`.
    """
    from cogvideox.model.settings import text_tokens

    names = {"prompt_embeds", "negative_prompt_embeds"}
    config = files.read_config(input_dir, sections.ENCODE)
    file = files.open_stage_file(input_dir, files.EMBEDDINGS_FILE, sections.ENCODE, config, names)
    model = files.find_same_model(model_id, file, sections.DENOISE)
    transformer = model.transformer
    shape = file.shapes["prompt_embeds"]
    if len(shape) != 3 or 0 in shape or file.shapes["negative_prompt_embeds"] != shape:
        raise ValueError(f"{file.path} does not hold two equal [batch, tokens, width] tensors")
    _, tokens, width = shape
    text_tokens(tokens, transformer, any_length=True)  # stage 1 has checked it
    if width != transformer.text_embed_dim:
        raise ValueError(
            f"{file.path} holds embeddings of width {width}; the model takes "
            f"{transformer.text_embed_dim}"
        )
    return file, model


def _profile(folder: Path | None) -> AbstractContextManager[object]:
    import jax

    return jax.profiler.trace(folder) if folder and processes.is_first() else nullcontext()


def denoising_section(
    run: DenoisingRun, model: ModelFolder, embeddings: files.StageFile
) -> dict[str, Any]:
    """The section of stage 2 in generation_config.json."""
    import jax

    return sections.make_section(
        {
            **sections.model_settings(model, sections.DENOISE),
            "embeddings": embeddings.section["fingerprint"],
            **run.settings.to_json(),
            "dtype": run.denoiser.dtype,
            "speed": run.lossy.to_json(),
            **run.loras.settings(),
        },
        mesh=dict(run.denoiser.mesh.shape),
        attention=run.denoiser.backend.name,
        device=jax.devices()[0].device_kind,
        guidance_scales=list(run.schedule.guidance_scales),
        later_parts=sections.later_parts(model, sections.DENOISE),
    )


def previews_of(
    run: DenoisingRun, options: DenoiseOptions, folder: Path, model: ModelFolder
) -> AbstractContextManager[Previews | None]:
    """The previews of a run, drawn into `folder`; None if it makes none."""
    if run.preview is None or not options.preview_every:
        return nullcontext()
    fps = run.settings.fps / model.vae.temporal_compression_ratio
    return Previews(folder, run.preview, options.preview_every, run.padding_frames, fps)


class StoppedBetweenSteps(Exception):
    """`Checkpoints.stop` returned True."""


Bar = Callable[..., Iterable[Any]]


def denoise(
    run: DenoisingRun,
    loaded: Sequence[LoadedDenoiser],
    checkpoints: Checkpoints,
    noise_source: NoiseSource,
    bar: Bar = progress,
    previews: Previews | None = None,
) -> np.ndarray:
    """Runs the loop, from a checkpoint if there is one.

    Args:
        loaded: result of `steps.load_steps`.
        bar: shows progress; called as `runtime.progress.progress` is.
        previews: are shown the state after every step.

    Returns:
        Latents [B, C, T, H, W] without the padding frames, on the host.

    Raises:
        StoppedBetweenSteps: `checkpoints.stop` returned True.
    """
    from cogvideox.denoising.loop import checkpoint_tensors, run_loop, to_host
    from cogvideox.denoising.loop_checkpoint import read_checkpoint, write_checkpoint

    fingerprint, total = checkpoints.section["fingerprint"], len(run.schedule.timesteps)
    start = None
    if checkpoints.every:
        types = functools.partial(checkpoint_tensors, run.denoiser, run.schedule)
        start = read_checkpoint(checkpoints.source, fingerprint, total=total, tensor_types=types)
    if start:
        print(f"resuming from {checkpoints.source}, {start.steps} of {total} steps done")
    states = run_loop(
        *(loaded, run.schedule, run.settings.seed, noise_source, start),
        conditioning=run.conditioning,
    )
    saved = start.steps if start else 0
    try:
        for state in bar(states, total=total, initial=saved, what="denoising"):
            if previews:
                previews.show(state, total)
            stop = checkpoints.stop() and state.steps < total
            if checkpoints.every and state.steps < total:
                if stop or state.steps % checkpoints.every == 0:
                    checkpoint = to_host(state, run.schedule)
                    if processes.is_first():
                        write_checkpoint(checkpoints.path, checkpoint, fingerprint)
                    saved = state.steps
            if stop:
                raise StoppedBetweenSteps
    except Stopped:
        checkpoints.say_what_is_saved(saved, total)
        raise
    return drop_padding(to_host(state).latents, run.padding_frames)


def save(latents: np.ndarray, section: dict[str, Any], input_dir: Path, output_dir: Path) -> Path:
    """Writes the latents and this stage's section, and removes the checkpoint of the run."""
    tensors = {"latents": latents}
    files.check_finite(tensors, sections.DENOISE)
    path = output_dir / files.LATENTS_FILE
    files.write_stage_file(path, sections.DENOISE, tensors, section, vae_scaling_applied="false")
    files.record_section(output_dir, sections.DENOISE, section, inherited=input_dir)
    Checkpoints(output_dir, section, every=None).remove()
    return path
