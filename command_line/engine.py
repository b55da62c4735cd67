"""Arguments that say who works on the jobs of a folder."""

from command_line.parser import ArgumentParser, integer


def add_engine(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="local works in this process; ray on every machine of a Ray cluster",
    )
    parser.add_argument(
        "--workers_per_node",
        type=integer(1),
        default=1,
        help="of --engine ray; they share the machine's accelerators",
    )
