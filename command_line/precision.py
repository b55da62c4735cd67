"""The arguments of how precisely stage 2 multiplies."""

from command_line.parser import ArgumentParser


def add_precision(parser: ArgumentParser) -> None:
    """Adds the lossy options of stage 2 that make products cheaper."""
    parser.add_argument(
        "--attention_precision",
        choices=("bf16", "int8_qk"),
        help="lossy: int8_qk multiplies q and k as pairs of int8, on TPUs (default: bf16)",
    )
