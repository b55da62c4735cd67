"""What the stages share: stage files, the common arguments, errors and progress.

Light on purpose: importing this costs milliseconds, so bad input is refused before torch, JAX or
diffusers are loaded.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import glob
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import safetensors

from runtime import processes
from runtime.files import atomic_path, write_json

if TYPE_CHECKING:
    import numpy as np
    import torch

FORMAT_VERSION = "1"
DEFAULT_MODEL = "zai-org/CogVideoX1.5-5B"
DEFAULT_FOLDER = Path("stage_outputs")
CONFIG_FILE = "generation_config.json"
EMBEDDINGS_FILE = "stage1_embeddings.safetensors"
LATENTS_FILE = "stage2_latents.safetensors"
VIDEO_FILE = "output_video.mp4"
EXECUTABLES_VARIABLE = "COGVIDEOX_EXECUTABLES"


# Errors and exit codes --------------------------------------------------------------------------


def run_main(main: Callable[[], None]) -> NoReturn:
    """Runs a script's `main` with the project's exit codes.

    0 done, 1 failed, 2 bad usage or input (one line on stderr), 130 interrupted, 143 terminated.
    ValueError is what every check of input raises; anything else is a defect and shows its
    traceback.
    """
    # A terminated run unwinds, so that its temporary files are removed.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    sys.unraisablehook = _stop_again
    try:
        main()
        processes.finish()
    except InputError as error:
        _end(2, "error: ", " ".join(str(error).split()))
    except (RunError, FloatingPointError, processes.OtherProcessFailed) as error:
        _end(1, "failed: ", str(error))
    except Stopped as stopped:
        _end(128 + stopped.number, "", str(stopped))
    except Exception as error:
        processes.fail(f"{type(error).__name__}: {error}")
        raise
    sys.exit(0)


def _end(code: int, kind: str, reason: str) -> NoReturn:
    """Says why this process ends, on stderr and to the other processes."""
    print(f"{kind}{reason}", file=sys.stderr)
    processes.fail(reason)
    sys.exit(code)


class Stopped(BaseException):
    """SIGINT or SIGTERM arrived."""

    def __init__(self, number: int):
        super().__init__("interrupted" if number == signal.SIGINT else "terminated")
        self.number = number


def _stop(number: int, _: object) -> NoReturn:
    raise Stopped(number)


def _stop_again(unraisable: Any) -> None:
    """Repeats a signal whose exception was dropped.

    Python drops exceptions in garbage collection callbacks, and JAX registers one: about half of
    all signals were lost there while stage 2 was starting.
    """
    if isinstance(unraisable.exc_value, Stopped):
        number = unraisable.exc_value.number
        threading.Timer(0.05, signal.raise_signal, (number,)).start()
    else:
        sys.__unraisablehook__(unraisable)


class InputError(ValueError):
    """Bad usage or input; the message is one line for the user."""


class RunError(RuntimeError):
    """A run that failed for a reason the user can understand without a traceback."""


@contextlib.contextmanager
def checking_input() -> Iterator[None]:
    """Turns the ValueErrors of input checks into the one-line error with exit code 2.

    Where one of several processes refuses its input, all do.
    """
    refusal = None
    try:
        yield
    # diffusers' schedulers raise NotImplementedError for settings that they do not know.
    except (ValueError, NotImplementedError) as error:
        refusal = error
    refusals = processes.exchange("" if refusal is None else str(refusal))
    for process, message in enumerate(refusals):
        if message:
            raise InputError(f"process {process}: {message}" if process else message) from refusal


# Arguments --------------------------------------------------------------------------------------


class ArgumentParser(argparse.ArgumentParser):
    """One-line errors, defaults in the help, and every `--long_name` also as `--long-name`."""

    def __init__(self, description: str, examples: str):
        super().__init__(
            description=description,
            epilog=f"examples:\n{examples}",
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        hyphenated = [name.replace("_", "-") for name in names if "_" in name]
        return super().add_argument(*names, *hyphenated, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        # None means "from the model" and is said in the help text itself.
        return action.help if action.default is None else super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = [name for name in action.option_strings if "-" not in name.lstrip("-")]
        if not shown or action.nargs == 0:
            return ", ".join(shown) or super()._format_action_invocation(action)
        return ", ".join(shown) + " " + self._format_args(action, action.dest.upper())


def integer(minimum: int, maximum: int | None = None) -> Callable[[str], int]:
    """An argparse type: an integer in [minimum, maximum]."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
        if value < minimum or (maximum is not None and value > maximum):
            bounds = f"at least {minimum}" + ("" if maximum is None else f", at most {maximum}")
            raise argparse.ArgumentTypeError(f"{value} is out of range; it must be {bounds}")
        return value

    return parse


def number(minimum: float, maximum: float) -> Callable[[str], float]:
    """An argparse type: a number in [minimum, maximum]."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not minimum <= value <= maximum:
            bounds = f"from {minimum:g} to {maximum:g}"
            raise argparse.ArgumentTypeError(f"{text} is not a number {bounds}")
        return value

    return parse


def add_folders(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--input_dir", type=Path, default=DEFAULT_FOLDER, help="folder of the stage before's files"
    )
    parser.add_argument("--output_dir", type=Path, help="folder to write to (default: input_dir)")


def add_model(parser: ArgumentParser, default: str | None) -> None:
    what = "hub id, or a folder in diffusers layout"
    parser.add_argument(
        "--model_id",
        default=default,
        help=what if default else f"{what} (default: the one of the stage before)",
    )


def add_mesh(parser: ArgumentParser, axes: tuple[str, ...] = ("dp", "sp", "tp")) -> None:
    splits = {"dp": "the batch", "sp": "the tokens", "tp": "heads and MLP columns"}
    for axis in axes:
        what = f"devices along {axis}, over which {splits[axis]} are split (default: what fits)"
        parser.add_argument(f"--{axis}", type=integer(1), help=what)


def add_distributed(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="one video on the devices of several hosts: start the same command on each. Outside "
        "of TPU slices, JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID tell the "
        "processes of each other",
    )


def join_processes(arguments: argparse.Namespace) -> None:
    """With --distributed, joins the processes that run this command, once; the first one speaks.

    Raises:
        InputError: they do not find each other, or were not started alike.
    """
    if not arguments.distributed or processes.count() > 1:
        return
    with checking_input():
        processes.join()
        if not processes.is_first():
            sys.stdout = open(os.devnull, "w")
        processes.check_alike({**vars(arguments), "versions": versions()})


def add_dtype(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="dtype of weights and activations; float32 is for comparisons",
    )


def add_executables(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--executables",
        type=Path,
        default=os.environ.get(EXECUTABLES_VARIABLE) or None,
        help="folder of executables from compile_ahead.py; what it lacks is compiled "
        f"(default: ${EXECUTABLES_VARIABLE})",
    )


def check_executables(folder: Path | None) -> None:
    """Refuses a folder of executables that is none.

    Raises:
        ValueError: naming it.
    """
    if folder and not os.path.isdir(folder):
        raise ValueError(f"--executables {folder} is not a folder; compile_ahead.py makes it")


# Stage files ------------------------------------------------------------------------------------


def fingerprint(settings: Mapping[str, Any]) -> str:
    """A short hash of everything that decides a stage's output."""
    text = json.dumps(settings, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """The versions of the libraries that decide a result."""
    names = ("torch", "jax", "jaxlib", "torchax", "diffusers", "transformers", "flax")
    return {name: metadata.version(name) for name in names}


def read_config(folder: Path) -> dict[str, Any]:
    """The sections that earlier stages recorded in `folder`.

    Raises:
        InputError: the file is missing, broken, or of another format version.
    """
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; run the stage before") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    version = config.get("format_version") if isinstance(config, dict) else None
    if version != FORMAT_VERSION:
        raise InputError(f"{path} has format version {version}, this program {FORMAT_VERSION}")
    return config


def record_section(folder: Path, stage: str, section: Mapping[str, Any], inherited: Path) -> None:
    """Writes a stage's section into the config of `folder`; every other section stays.

    Args:
        inherited: the folder whose config holds the sections of the stages before.
    """
    config: dict[str, Any] = {"format_version": FORMAT_VERSION}
    for source in (folder, inherited):
        if (source / CONFIG_FILE).exists():
            config |= read_config(source)
    write_json(folder / CONFIG_FILE, config | {stage: dict(section)})


def make_section(settings: Mapping[str, Any], **made_with: Any) -> dict[str, Any]:
    """A config section: the settings that decide the output, their fingerprint, what made it."""
    made_with["versions"] = versions()
    return {**settings, "fingerprint": fingerprint(settings), "made_with": made_with}


def is_whole(section: Mapping[str, Any]) -> bool:
    """Whether a section's settings are those that it was made with, by its fingerprint."""
    settings = {k: v for k, v in section.items() if k not in ("fingerprint", "made_with")}
    return section.get("fingerprint") == fingerprint(settings)


@dataclasses.dataclass(frozen=True)
class StageFile:
    """A stage's tensors on disk, checked against the config beside them."""

    path: Path
    section: dict[str, Any]  # what its stage recorded in generation_config.json
    shapes: dict[str, tuple[int, ...]]


def write_stage_file(
    path: Path, stage: str, tensors: Mapping[str, Any], section: Mapping[str, Any], **extra: str
) -> None:
    """Writes numpy `tensors` with the metadata that lets the next stage trust them."""
    import numpy as np
    from safetensors.numpy import save

    # safetensors writes the memory as it lies, whatever the strides.
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    stamp = {
        "format_version": FORMAT_VERSION,
        "stage": stage,
        "model_id": section["model_id"],
        "fingerprint": section["fingerprint"],
        "shapes": json.dumps(shapes),
        **extra,
    }
    if path.exists():
        print(f"replacing {path}")
    with atomic_path(path) as temporary:
        temporary.write_bytes(_with_sorted_metadata(save(tensors, metadata=stamp)))


def _with_sorted_metadata(content: bytes) -> bytes:
    """A safetensors file whose metadata, written in random order, is sorted.

    Equal runs then write equal files, and a checksum tells whether two are.
    """
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at multiples of 8 bytes
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def open_stage_file(
    folder: Path, name: str, stage: str, config: Mapping[str, Any], tensor_names: set[str]
) -> StageFile:
    """Checks a stage file's header; reads no tensor.

    Raises:
        InputError: it is missing, truncated, not of `stage`, of another format version, or not
            what the config beside it describes.
    """
    path = folder / name
    again = f"run {stage}.py again"
    if not path.is_file():
        raise InputError(f"{path} does not exist; run {stage}.py first")
    try:
        with safetensors.safe_open(path, "np") as handle:
            stamp = handle.metadata() or {}
            shapes = {key: tuple(handle.get_slice(key).get_shape()) for key in handle.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(
            f"{path} is truncated or no safetensors file ({error}); {again}"
        ) from error
    if stamp.get("stage") != stage or set(shapes) != tensor_names:
        raise InputError(f"{path} was not written by {stage}.py; {again}")
    if stamp.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path} has format version {stamp.get('format_version')}, this program "
            f"{FORMAT_VERSION}; {again}"
        )
    section = config.get(stage)
    if not isinstance(section, dict):
        raise InputError(f"{folder / CONFIG_FILE} has no section {stage}; {again}")
    if stamp.get("fingerprint") != section.get("fingerprint") or not is_whole(section):
        raise InputError(f"{path} is stale: {CONFIG_FILE} beside it describes another run; {again}")
    return StageFile(path, section, shapes)


def read_tensors(file: StageFile) -> dict[str, Any]:
    """The tensors of a checked stage file, as numpy arrays."""
    from safetensors.numpy import load_file

    return load_file(file.path)


def find_same_model(model_id: str | None, made_from: StageFile, parts: list[str]) -> Any:
    """The model of the stage before; another one, if named, is refused.

    Args:
        parts: the sub-folders this stage loads.

    Raises:
        ValueError: `model_id` names another model, or the model is not to be found.
    """
    from cogvideox.checkpoint import find_model

    recorded = made_from.section["model_id"]
    model = find_model(model_id or recorded, parts)
    if model.model_id != recorded:
        raise ValueError(
            f"{made_from.path} was made with {recorded}, not with --model_id {model_id}"
        )
    return model


def check_inputs_are_current(
    file: StageFile, config: Mapping[str, Any], key: str, stage: str
) -> None:
    """Refuses a file whose own input (`key` in its section) was made anew by `stage` since.

    Raises:
        InputError: the file is stale.
    """
    if file.section[key] != config.get(stage, {}).get("fingerprint"):
        raise InputError(
            f"{file.path} is stale: {stage}.py ran again since; run the stage after it, too"
        )


def numbered(path: Path, count: int) -> list[Path]:
    """`path` itself, or for a batch one path a video: video-0.mp4, video-1.mp4, ..."""
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(count)]


def check_output_folder(folder: Path, *names: str, needed_bytes: int = 1 << 30) -> None:
    """Refuses a folder that cannot be made, written to, or is short of space.

    Args:
        names: the files that will be written there.

    Raises:
        ValueError: saying which.
    """
    if not processes.is_first():
        return  # it writes nothing
    # os.path.exists, unlike Path.exists, is false for names that no file system takes.
    existing = next(p for p in (folder, *folder.absolute().parents) if os.path.exists(p))
    if any(len(part.encode()) > 255 for part in folder.absolute().parts):
        raise ValueError(f"{folder} has a part of more than 255 bytes")
    if not existing.is_dir():
        raise ValueError(f"{folder} cannot be a folder: {existing} is a file")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"{folder} is not writable")
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise ValueError(f"{folder} has {free >> 20} MiB free; {needed_bytes >> 20} are needed")
    for name in names:
        if (folder / name).is_dir():
            raise ValueError(f"{folder / name} is a folder; it should be a file")
    if (folder / CONFIG_FILE).exists():
        read_config(folder)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A CPU torch tensor as numpy; bfloat16 as ml_dtypes has it."""
    import ml_dtypes
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def check_finite(tensors: Mapping[str, Any], stage: str) -> None:
    """Raises RunError if a stage made NaN or infinity; it is never written, never replaced."""
    import numpy as np

    for name, tensor in tensors.items():
        bad = int((~np.isfinite(tensor.astype(np.float32))).sum())
        if bad:
            raise RunError(
                f"{stage}: {bad} of {tensor.size} values of {name} are NaN or infinite; "
                "nothing was written"
            )


# Progress and timing ----------------------------------------------------------------------------


def start_jax(dtype: str) -> None:
    """Sets JAX up for a stage: devices, the compilation cache, exact matmuls for float32 runs.

    Raises:
        ValueError: JAX finds no device, or the cache folder cannot be written.
    """
    # libtpu prints five lines of complaint where it finds no TPU.
    accelerators = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*")
    if not any(glob.glob(pattern) for pattern in accelerators):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")

    import jax

    from runtime.compilation import enable_persistent_cache

    try:
        print(f"compilation cache: {enable_persistent_cache()}")
    except OSError as error:
        raise ValueError(f"JAX_COMPILATION_CACHE_DIR: {error}") from error
    try:
        jax.devices()
    except RuntimeError as error:
        raise ValueError(f"JAX finds no device: {error}") from error
    if jax.process_count() > processes.count():
        raise ValueError(
            f"this is one of {jax.process_count()} hosts of a slice; start the same command on "
            "each, with --distributed"
        )
    if dtype == "float32":
        # TPUs and GPUs otherwise multiply float32 in bfloat16 or TF32.
        jax.config.update("jax_default_matmul_precision", "highest")


def progress(
    items: Iterable | None = None,
    *,
    total: int,
    what: str,
    unit: str = "step",
    initial: int = 0,
) -> Any:
    """A progress bar with the seconds a step and the time left; `initial` steps are done."""
    from tqdm import tqdm

    hidden = not processes.is_first()
    return tqdm(items, total=total, desc=what, unit=unit, initial=initial, disable=hidden)


class Timings:
    """Seconds by phase (load, compile, run, save), shown as a table and written as JSON."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.at_once: dict[str, dict[str, float]] = {}  # what went on at once in a phase

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def report(self, path: Path, **details: Any) -> None:
        """Prints the table and writes it, with `details`, to the JSON file `path`."""
        total = sum(self.seconds.values())
        for name, seconds in [*self.seconds.items(), ("total", total)]:
            print(f"  {name:<14}{seconds:>10.2f} s")
            for part, busy in self.at_once.get(name, {}).items():
                print(f"    {part:<12}{busy:>10.2f} s, at the same time")
        rounded = {name: round(seconds, 4) for name, seconds in self.seconds.items()}
        details |= {"at_once": self.at_once} if self.at_once else {}
        write_json(path, {"seconds": {**rounded, "total": round(total, 4)}, **details})
