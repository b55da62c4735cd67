"""How precisely a step multiplies: lossy options of a run, off by default."""

from collections.abc import Mapping
from typing import NamedTuple

ATTENTION = ("bf16", "int8_qk")
PRECISIONS = {"attention_precision": ATTENTION}


class Precision(NamedTuple):
    """Precision of the matrix products.

    Attributes:
        attention: "bf16" multiplies in the run's dtype; "int8_qk" quantises q and k to pairs of
            int8, see `splash_attention`.
    """

    attention: str = ATTENTION[0]

    @property
    def options(self) -> dict[str, str]:
        """What differs from the run's dtype, by the names of the command line."""
        default = Precision()
        return {
            f"{name}_precision": value
            for name, value in self._asdict().items()
            if value != getattr(default, name)
        }


def read_precision(options: Mapping[str, object]) -> Precision:
    """Inverts `Precision.options`, of a mapping that may hold other names too.

    Raises:
        ValueError: a value is none of these.
    """
    found = {}
    for name, known in PRECISIONS.items():
        if name in options:
            if options[name] not in known:
                raise ValueError(f"{name} is {options[name]!r}")
            found[name.removesuffix("_precision")] = str(options[name])
    return Precision(**found)
