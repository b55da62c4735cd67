"""What the programs of decoder and encoder share: a mesh, and two programs a video.

A video goes through the VAE a batch of frames at a time; the causal convolutions pass their last
two frames to the next batch as caches. One program runs the first batch, another all later ones; it
donates its caches. See `cogvideox.vae.sharding` for the axis letters.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import cache, cached_property
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from cogvideox.model.config import VaeConfig
from cogvideox.vae.kinds import VaeKind
from cogvideox.vae.weights import abstract_weights
from runtime.compiler_options import vae_options
from runtime.programs import Program, machine_fields

# Files traced into the programs, relative to the project.
SOURCES = ("cogvideox/model/config.py", "cogvideox/vae")

AXIS = "width"
COLUMNS = P(None, None, AXIS)  # [B, T, W, ...]

# A program as lowered, and the abstract caches that it returns.
type Lowered[Caches] = tuple[jax.stages.Lowered, Caches]


@dataclasses.dataclass(frozen=True)
class BatchProgram[AnyForward, Caches]:
    """A decoder or an encoder on a mesh, before compilation.

    Attributes:
        kind: how it is traced.
        config: config of the VAE.
        mesh: has one axis, `AXIS`; its devices may be abstract.
        dtype: bfloat16 or float32.
    """

    kind: VaeKind[AnyForward]
    config: VaeConfig
    mesh: Mesh
    dtype: jnp.dtype

    part: ClassVar[Literal["decoder", "encoder"]]

    @cached_property
    def abstract_weights(self) -> dict[str, jax.ShapeDtypeStruct]:
        """See `cogvideox.vae.weights.abstract_weights`."""
        return abstract_weights(self.config, self.part, self.mesh, self.dtype)

    def over_columns(self, run_columns: Callable) -> Callable:
        """Runs a function on every device's columns.

        Args:
            run_columns: (weights, inputs, caches) -> (results, int32 the same on every device,
                caches); all but weights and the number are arrays with columns in axis 2.
        """
        return jax.shard_map(
            run_columns,
            mesh=self.mesh,
            in_specs=(P(), COLUMNS, COLUMNS),
            out_specs=(COLUMNS, P(), COLUMNS),
            check_vma=False,  # Pallas kernels do not declare which axes their results vary over
        )

    def lower_batch(
        self, run_batch: Callable, shape: tuple[int, ...], dtype: DTypeLike, caches: Caches | None
    ) -> Lowered[Caches]:
        """Lowers (weights, inputs, caches) -> (results, number, caches), of `over_columns`.

        Args:
            shape, dtype: of the inputs, padded columns included.
            caches: abstract caches of the previous batch; None lowers the first batch's program.
        """
        replicated, columns = (NamedSharding(self.mesh, spec) for spec in (P(), COLUMNS))
        program = jax.jit(
            run_batch,
            donate_argnums=() if caches is None else (2,),
            out_shardings=(replicated, replicated, columns),
        )
        inputs = jax.ShapeDtypeStruct(shape, dtype, sharding=columns)
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            lowered = program.lower(self.abstract_weights, inputs, caches)
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=columns),
            lowered.out_info[2],
        )
        return lowered, abstract

    def two_programs(
        self,
        label: str,
        decides: Mapping[str, object],
        lower_first: Callable[[], Lowered[Caches]],
        lower_later: Callable[[Caches], Lowered[Caches]] | None,
    ) -> list[Program]:
        """Returns the programs of the first batch and, if there are more, of all others.

        Args:
            label: the shape, for people.
            decides: what decides the programs beside kind, config, mesh and dtype.
            lower_later: takes the abstract caches of the first batch.
        """
        fields = {
            "vae": dataclasses.asdict(self.config),
            **decides,
            "dtype": jnp.dtype(self.dtype).name,
            "compiler_options": vae_options(self.mesh.devices.flat[0]),
            **machine_fields(self.mesh, self.kind.libraries, SOURCES),
        }
        once = cache(lower_first)
        name = self.kind.name
        programs = [Program(f"{name}_first", label, fields, lambda: once()[0])]
        if lower_later is not None:
            programs.append(
                Program(f"{name}_later", label, fields, lambda: lower_later(once()[1])[0])
            )
        return programs
