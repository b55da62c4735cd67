"""Put the TPU backend and layers, interpreted, where a stage chooses its own."""

import contextlib
import functools
from collections.abc import Iterator
from unittest import mock

import cogvideox.transformer.backends as backends
import cogvideox.vae.program as vae_program
from cogvideox.transformer.backends import TpuBackend
from tests.splash_attention.rounding import exp2_as_on_a_tpu


@contextlib.contextmanager
def tpu_path() -> Iterator[None]:
    """Runs stages inside the context on the interpreted TPU code path."""
    choose_layers = functools.partial(vae_program.choose_layers, interpret=True)
    with (
        mock.patch.object(backends, "choose_backend", lambda *_: TpuBackend(interpret=True)),
        mock.patch.object(vae_program, "choose_layers", choose_layers),
        exp2_as_on_a_tpu(),
    ):
        yield
