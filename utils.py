"""What the stages share: the common arguments, errors and progress.

Light on purpose: importing this costs milliseconds, so bad input is refused before torch, JAX or
diffusers are loaded.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from runtime import processes, stopping
from runtime.errors import InputError, RunError, Stopped, checking_input
from runtime.versions import versions

DEFAULT_MODEL = "zai-org/CogVideoX1.5-5B"
DEFAULT_FOLDER = Path("stage_outputs")
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


def _stop(number: int, _: object) -> NoReturn:
    stopping.asked.set()
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
        f"(default: ${EXECUTABLES_VARIABLE}, else those that earlier runs kept in the cache)",
    )


def check_executables(folder: Path | None) -> None:
    """Refuses a folder of executables that is none.

    Raises:
        ValueError: naming it.
    """
    if folder and not os.path.isdir(folder):
        raise ValueError(f"--executables {folder} is not a folder; compile_ahead.py makes it")
