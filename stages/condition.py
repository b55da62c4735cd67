"""The image or video of stage 1: read, fitted to a size, and encoded to a posterior of latents."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from runtime.devices import insist_on, start_jax
from runtime.errors import InputError, checking_input
from runtime.files import atomic_path
from runtime.progress import working
from stages import files, sections
from stages.video_digest import digest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from PIL.Image import Image

    from cogvideox.denoising.conditioning import Conditioning
    from cogvideox.model.folder import ModelFolder
    from cogvideox.model.presets import Preset
    from cogvideox.model.settings import Condition
    from cogvideox.vae.encode import Encoder
    from cogvideox.vae.encode_program import EncodeProgram
    from runtime.jax_types import Device

AUTO = "auto"  # value of --size
_PREVIEW_SIDE = 256  # pixels


@dataclasses.dataclass(frozen=True)
class ConditionOptions:
    """Options of the image or video, by the names of the command line.

    Attributes:
        image, video: one of them is set.
        image_fit: "stretch" or "crop".
        height, width: None takes the model's default.
        size: "auto" takes the model's size that is nearest in shape; None leaves it to the two
            above.
        allow_unsupported: also take a size that the model was not trained for.
        encode_on: "cpu" or "devices"; None encodes an image on the CPU, a video on the devices.
        encoder: "torchax" or "flax".
        sha256: digest that the file must have; None takes any.
        executables: folder from compile_ahead.py, for an encoder on the devices.
    """

    image: Path | None = None
    video: Path | None = None
    image_fit: Literal["stretch", "crop"] = "stretch"
    height: int | None = None
    width: int | None = None
    size: str | None = None
    allow_unsupported: bool = False
    encode_on: Literal["cpu", "devices"] | None = None
    encoder: str = "torchax"
    sha256: str | None = None
    executables: Path | None = None

    @property
    def kind(self) -> Literal["image", "video"]:
        return "image" if self.image else "video"

    @property
    def path(self) -> Path:
        """Of the image or video."""
        path = self.image or self.video
        assert path is not None
        return path

    @property
    def on_cpu(self) -> bool:
        """Whether the encoder runs on the CPU."""
        return self.encode_on == "cpu" or (self.encode_on is None and self.kind == "image")


@dataclasses.dataclass(frozen=True)
class Source:
    """A checked image or video.

    Attributes:
        condition: its kind and length, and the size that it is fitted to.
        sha256: of the file, or of a folder's files with their names.
        image: as read; None for a video.
    """

    options: ConditionOptions
    condition: Condition
    sha256: str
    image: Image | None

    def read(self) -> np.ndarray:
        """Returns the fitted frames, uint8 [F, height, width, 3].

        Raises:
            ValueError: the video is damaged.
        """
        from cogvideox.video.inputs import fitted, read_video

        size, fit = (self.condition.height, self.condition.width), self.options.image_fit
        if self.image is not None:
            return fitted(self.image, *size, fit)[None]
        return read_video(self.options.path, *size, fit)


class Encoded(NamedTuple):
    """An image or video, its fitted first frame [height, width, 3], and its posterior."""

    source: Source
    first_frame: np.ndarray
    posterior: dict[str, np.ndarray]


def options_of(arguments: Mapping[str, Any]) -> ConditionOptions | None:
    """Makes the options from arguments by their names; None if there is no image and no video.

    Raises:
        InputError: an option is given without them, or two contradict each other.
    """
    with checking_input():
        if arguments["image"] or arguments["video"]:
            names = {field.name for field in dataclasses.fields(ConditionOptions)}
            given = {name: value for name, value in arguments.items() if name in names}
            options = ConditionOptions(**given)
            check_options(options)
            return options
        for name in ("size", "encode_on"):
            if arguments[name] is not None:
                raise ValueError(f"--{name} is for --image or --video")
    return None


def check_options(options: ConditionOptions) -> None:
    """Checks the options against each other.

    Raises:
        ValueError: two of them contradict each other.
    """
    if options.image and options.video:
        raise ValueError("--image and --video are both given; a run starts from one of them")
    if options.size and (options.height or options.width):
        raise ValueError(f"--size {options.size} says height and width already")


def find_source(options: ConditionOptions | None, model: ModelFolder) -> Source | None:
    """Checks everything about the image or video that needs no weights; decodes no video.

    Args:
        options: None if there is none.

    Raises:
        ValueError: the model needs another one, or it cannot be read or encoded.
    """
    from cogvideox.model.settings import Condition, check_condition, complete_settings

    if options is None:
        check_condition(model, None)
        return None
    from cogvideox.model.presets import preset_for
    from cogvideox.vae.weights import stored_weights  # imports JAX: 0.7 s that a text does without
    from cogvideox.video.inputs import count_frames, read_image

    check_options(options)
    files.check_executables(options.executables)
    if not options.path.exists():
        raise InputError(f"--{options.kind} {options.path}: there is no such file")
    preset = preset_for(model.transformer, model.vae.spatial_scale)
    check_condition(model, Condition(options.kind, *preset.sizes[0]))
    stored_weights(model.path / "vae", model.vae, "encoder")
    image = read_image(options.path) if options.image else None
    frames = 1 if image is not None else count_frames(options.path)
    condition = Condition(options.kind, *_size(options, preset, image), frames)
    # Defaults stand for the settings of stage 2.
    wishes = {"use_dynamic_cfg": False, "seed": 0}
    any_size = options.allow_unsupported
    complete_settings(wishes, model, any_size=any_size, condition=condition)
    sha256 = digest(options.path)
    if options.sha256 not in (None, sha256):
        raise InputError(
            f"--{options.kind} {options.path} is another file than before: its sha256 was "
            f"{options.sha256[:12]}, now it is {sha256[:12]}"
        )
    return Source(options, condition, sha256, image)


def _size(options: ConditionOptions, preset: Preset, image: Image | None) -> tuple[int, int]:
    """Returns the height and width to encode."""
    from cogvideox.video.frames import inspect_video

    if options.size != AUTO:
        default = preset.sizes[0]
        return options.height or default[0], options.width or default[1]
    if image is not None:
        width, height = image.size
    else:
        video = inspect_video(options.path)
        height, width = video.height, video.width
    return preset.nearest_size(height, width)


def choose_device(options: ConditionOptions | None) -> None:
    """Keeps JAX off the devices if only the CPU is needed; call it before JAX is imported."""
    if options is not None and options.on_cpu and "jax" not in sys.modules:
        insist_on("cpu")


def encode_program(
    encoder: str, model: ModelFolder, devices: Sequence[Device], dtype: str
) -> EncodeProgram:
    """Makes the programs of `--encode_on devices`, on the devices of the first host."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from cogvideox.vae.encode import make_encode_program

    own = [device for device in devices if device.process_index == devices[0].process_index]
    mesh = jax.sharding.Mesh(np.asarray(own), ("devices",))
    return make_encode_program(f"vae_encoder_{encoder}", model.vae, mesh, jnp.dtype(dtype))


def load_encoder(options: ConditionOptions, model: ModelFolder, dtype: str) -> Encoder:
    """Loads the encoder of the model's VAE.

    On the CPU it computes in float32 whatever the dtype is: bfloat16 is not faster there.

    Args:
        dtype: of the work on devices.

    Raises:
        ValueError: JAX has no CPU device, or the weights do not fit the VAE's config.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from cogvideox.vae import encode
    from runtime.compilation import enable_persistent_cache

    if options.on_cpu:
        enable_persistent_cache()
        try:
            devices = jax.local_devices(backend="cpu")[:1]
        except RuntimeError as error:
            raise InputError(f"--encode_on cpu: JAX has no CPU device here: {error}") from error
    else:
        start_jax(dtype)
        devices = jax.local_devices()
    mesh = jax.sharding.Mesh(np.asarray(devices), ("devices",))
    run_dtype = jnp.dtype("float32" if options.on_cpu else dtype)
    where = "the CPU" if options.on_cpu else f"{len(devices)} x {devices[0].device_kind}"
    with working(f"loading the VAE encoder on {where}"):
        name = f"vae_encoder_{options.encoder}"
        return encode.load_encoder(name, model.path / "vae", mesh, run_dtype)


def encode(
    encoder: Encoder, frames: np.ndarray, options: ConditionOptions, dtype: str
) -> dict[str, np.ndarray]:
    """Encodes an image or a video.

    Args:
        encoder: of the options.
        frames: result of `Source.read`.
        dtype: of the result.

    Returns:
        `mean` and `std` of the posterior, [1, channels, T, H, W] in `dtype`.
    """
    import jax.numpy as jnp

    with working("encoding the image" if len(frames) == 1 else "encoding the video"):
        executables = None if options.on_cpu else options.executables
        posterior = encoder.encode(frames[None], executables)
    return {name: values.astype(jnp.dtype(dtype)) for name, values in posterior._asdict().items()}


def describe(source: Source, model: ModelFolder) -> dict[str, Any]:
    """Returns what stage 1's section says of the image or video: all that decides the posterior."""
    return {
        **dataclasses.asdict(source.condition),
        "sha256": source.sha256,
        "image_fit": source.options.image_fit,
        "vae": model.digest("vae"),
    }


def made_with(source: Source) -> dict[str, Any]:
    """Returns facts about the image or video that do not decide the posterior."""
    options = source.options
    return {
        options.kind: str(options.path.resolve()),
        "encoder": options.encoder,
        "encoded_on": "cpu" if options.on_cpu else "devices",
    }


def save_preview(frame: np.ndarray, folder: Path) -> None:
    """Writes a small picture of the image, or of the video's first frame, [height, width, 3]."""
    from PIL import Image

    picture = Image.fromarray(frame)
    picture.thumbnail((_PREVIEW_SIDE, _PREVIEW_SIDE))
    with atomic_path(folder / files.INPUT_FILE) as temporary:
        picture.save(temporary, format="PNG")


def recorded(section: Mapping[str, Any]) -> Condition | None:
    """Returns the image or video that stage 1's section describes, if any.

    Raises:
        ValueError: the section was not written by stage 1.
    """
    from cogvideox.model.settings import Condition

    described = section.get("conditions")
    if described is None:
        return None
    values = [described.get(name) for name in ("height", "width", "frames")]
    kind = described.get("kind")
    if kind not in ("image", "video") or not all(type(value) is int for value in values):
        raise ValueError(f"section {sections.ENCODE}: conditions is {str(described)[:80]!r}")
    return Condition(kind, *values)


def open_conditions(embeddings: files.StageFile, model: ModelFolder) -> files.StageFile | None:
    """Checks the header of the file beside the embeddings; None if there was no image or video.

    Raises:
        ValueError: the file is missing, stale, or of another shape than the section says.
    """
    from cogvideox.model.settings import encoded_frames

    condition = recorded(embeddings.section)
    if condition is None:
        return None
    folder, config = embeddings.path.parent, {sections.ENCODE: embeddings.section}
    names = {"mean", "std"}
    file = files.open_stage_file(folder, files.CONDITIONS_FILE, sections.ENCODE, config, names)
    vae = model.vae
    expected = (
        *(1, vae.latent_channels, encoded_frames(condition.frames, vae.temporal_compression_ratio)),
        *(condition.height // vae.spatial_scale, condition.width // vae.spatial_scale),
    )
    if any(shape != expected for shape in file.shapes.values()):
        raise ValueError(
            f"{file.path} holds {file.shapes}, not two tensors {list(expected)}; run "
            f"{sections.ENCODE}.py again"
        )
    return file


def make_conditioning(file: files.StageFile, model: ModelFolder, dtype: str) -> Conditioning:
    """Reads the posterior of a checked file, in the dtype of the run."""
    import jax.numpy as jnp

    from cogvideox.denoising.conditioning import Conditioning

    tensors = {
        name: tensor.astype(jnp.dtype(dtype)) for name, tensor in files.read_tensors(file).items()
    }
    condition = recorded(file.section)
    assert condition is not None
    return Conditioning.of(condition.kind, tensors["mean"], tensors["std"], model.vae)
