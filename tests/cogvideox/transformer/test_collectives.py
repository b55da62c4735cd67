"""The collectives of a block in the compiled program: those that the mesh needs, no others."""

import collections
import re
from pathlib import Path

import pytest

from cogvideox.denoising.program import Denoiser
from cogvideox.model.folder import find_model
from cogvideox.model.settings import LatentShape
from cogvideox.transformer.backends import CpuBackend
from runtime.mesh import make_mesh
from tests.tiny_models import save_tiny_model

_COLLECTIVE = re.compile(
    r" (all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute)(?:-start)?\("
)
# q, k, v and the output change hands over sp, with each of the other shards. Over tp, two gathers
# of the tokens, two sums that scatter them, and a gather of each of the two modulations (a vector).
NEEDED = {
    (1, 1, 1): {},
    (2, 1, 1): {},
    (2, 4, 1): {"collective-permute": 4 * 3},
    (2, 1, 4): {"all-gather": 4, "reduce-scatter": 2},
    (2, 2, 2): {"collective-permute": 4, "all-gather": 4, "reduce-scatter": 2},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), num_attention_heads=8)


@pytest.mark.parametrize("shape", NEEDED)
def test_collectives_of_a_block(shape, model):
    denoiser = Denoiser(
        config=find_model(str(model), ["transformer"]).transformer,
        stored={},
        latents=LatentShape(1, 4, 8, 6, 10),
        text_tokens=16,
        guided=True,
        dtype="float32",
        mesh=make_mesh(shape),
        backend=CpuBackend(),
    )
    hlo = denoiser.compile()["off"].as_text()
    found = collections.Counter(_COLLECTIVE.findall(_loop_body(hlo)))
    assert found == NEEDED[shape]


def _loop_body(hlo: str) -> str:
    """The computation that the loop over the blocks runs."""
    bodies = set(re.findall(r" while\(.*body=%?([\w.\-]+)", hlo))
    texts = [text for text in re.split(r"\n\n", hlo) if text.lstrip().split(" ")[0] in
             {f"%{body}" for body in bodies} | bodies]  # fmt: skip
    assert len(texts) == 1, "one loop: the blocks"
    return texts[0]
