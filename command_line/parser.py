"""The scripts' parser of command lines, and types of arguments."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

from runtime.text import message_line


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
        self.exit(2, f"error: {message_line(message)} (see {self.prog} --help)\n")


class RaisingParser(ArgumentParser):
    """Checks arguments that do not come from the command line; raises instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


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
