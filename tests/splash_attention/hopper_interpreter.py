"""The Hopper kernel's bounded path in Mosaic GPU's interpret mode, on a CPU.

Interpret mode has no matrix products with an operand in registers, which P.V is, and no stores to
accumulators, which the online path makes. The first is added here; the second path is left out.
"""

import contextlib
import functools

import jax
import numpy as np
from jax._src import callback
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret
from jax.experimental.pallas import mosaic_gpu as plgpu

from splash_attention.hopper import kernel


@contextlib.contextmanager
def interpreted(monkeypatch):
    """Runs Pallas GPU kernels in the interpreter; all heads must be bounded."""
    interpreter = jaxpr_interpret.JaxprInterpreter
    of_references, attend = interpreter._interpret_wgmma_ref_p, kernel._attend

    def product(self, eqn, token, get):
        if not isinstance(eqn.invars[1].aval, jax.core.ShapedArray):
            return of_references(self, eqn, token, get)
        accumulator, left, right, *leaves = get()
        transforms = jax.tree.unflatten(eqn.params["b_transforms_tree"], leaves)
        right, transforms = jaxpr_interpret.resolve_ref(eqn.invars[2].aval, right, transforms)
        call = functools.partial(_add_product, eqn.source_info)
        token = callback.io_callback(
            call,
            gpu_callbacks.TOKEN_SHAPE_DTYPE,
            **{"token": token, "left": left, "where": self.mesh_location, "thread": self.thread},
            **{"accumulator": accumulator, "right": right, "transforms": transforms},
        )
        return token, []

    monkeypatch.setattr(interpreter, "_interpret_wgmma_ref_p", product)
    monkeypatch.setattr(kernel, "_attend", lambda *a: None if a[-1] else attend(*a))
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        yield


def _add_product(source, *, token, left, where, thread, accumulator, right, transforms):
    memory = gpu_callbacks._get_shared_memory()
    logging = {"logging_info": gpu_callbacks.memory.GPULoggingInfo(where, thread, source)}
    parse = gpu_callbacks.HostAllocationKey.from_array
    accumulator, right = parse(accumulator), parse(right)
    transforms = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms))
    whole = memory.access(accumulator, ())
    b, _, _ = memory.get_buffer_content(right, memory.access(right, transforms), thread, **logging)
    sums, _, _ = memory.get_buffer_content(accumulator, whole, thread, **logging)
    sums = sums + np.matmul(np.asarray(left), b, dtype=np.float32)
    memory.store_buffer_content(accumulator, whole, sums, thread, **logging)
    return token
