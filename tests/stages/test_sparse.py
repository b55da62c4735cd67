"""Options of sparse attention: what they resolve to, what is refused, what is recorded."""

import dataclasses
import json
from pathlib import Path
from unittest import mock

import pytest

from cogvideox.denoising.program import Denoiser
from cogvideox.model.folder import ModelFolder, find_model
from cogvideox.model.settings import LatentShape
from cogvideox.transformer.backends import GpuBackend
from cogvideox.transformer.block_rules import (
    ALL,
    DENSE,
    NONE,
    Rule,
    SparseAttention,
    radial,
    spatial,
)
from cogvideox.transformer.sparse_step import make_lists, make_sparse_step
from cogvideox.transformer.tiling import choose_tiling
from cogvideox.transformer.tokens import TokenLayout
from runtime.mesh import make_mesh
from stages import estimates
from stages.sparse import density_of, named_rules
from stages.speed import Lossy, read_lossy, resolve
from stages.steps import denoisers_of
from tests.stages.test_speed import Options, settings
from tests.tiny_models import save_tiny_model

PUBLISHED = choose_tiling((11, 48, 85), 226)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> ModelFolder:
    return find_model(str(save_tiny_model(tmp_path_factory.mktemp("model"))), [])


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "rules.json"


@pytest.mark.parametrize(
    ("options", "rule", "dense_steps", "dense_layers"),
    [
        (Options("near"), None, None, 0),
        (Options("fast"), "fast", 10, 1),
        (Options("turbo"), "fast", 5, 1),
        (Options(sparse_attention="near"), "near", 10, 1),
        (Options("fast", sparse_attention="none"), None, None, 0),
        (Options("fast", dense_steps=0, dense_layers=0), "fast", 0, 0),
    ],
)
def test_options(options, rule, dense_steps, dense_layers, model):
    lossy = resolve(options, settings(), model)
    if rule is None:
        assert lossy.sparse is None and lossy.dense_steps is None
        return
    assert lossy.sparse.rules == (named_rules()[rule],)
    assert (lossy.dense_steps, lossy.sparse.dense_layers) == (dense_steps, dense_layers)
    assert f"sparse attention after step {dense_steps}" in lossy.describe()
    assert read_lossy(json.loads(json.dumps(lossy.to_json()))) == lossy


def test_a_model_of_one_layer_has_a_sparse_one(model):
    config = dataclasses.replace(model.transformer, num_layers=1)
    fresh = dataclasses.replace(model)  # has no cached config
    with mock.patch.object(ModelFolder, "transformer", config):
        assert resolve(Options("fast"), settings(), fresh).sparse.dense_layers == 0


def test_densities_of_named_rules():
    """The densities that docs/speed.md states, at 768x1360x81, and where near comes from."""
    rules = named_rules()
    lists = make_lists(list(rules.values()), PUBLISHED, 45568)
    densities = dict(zip(rules, lists.density() * 178 / 177, strict=True))
    expected = {"dense": 1, "near": 0.535, "fast": 0.2535}
    expected |= {"spatial": 0.269, "temporal": 0.247, "both": 0.316}
    assert densities == pytest.approx(expected, abs=0.001)
    near, formula = rules["near"], radial(0.5, PUBLISHED)
    assert [near.at(gap) for gap in range(11)] == [formula.at(gap) for gap in range(11)]


def test_a_file(model, file):
    own = {"mine": ["all", 6, "none"], "far": {"radial": 1}}
    heads = [["mine", "dense"], ["far", "mine"]]
    file.write_text(json.dumps({"rules": own, "heads": heads}))
    sparse = resolve(Options(sparse_attention=str(file)), settings(), model).sparse
    assert sparse.heads == ((0, 1), (2, 0))
    # 2 frames of 3 rows: radial's window covers them.
    assert sparse.rules == (Rule((ALL, 6, NONE)), DENSE, Rule((ALL, ALL)))
    lossy = Lossy(sparse=sparse, dense_steps=3)
    assert read_lossy(json.loads(json.dumps(lossy.to_json()))) == lossy
    file.write_text('{"heads": "spatial"}')
    sparse = resolve(Options(sparse_attention=str(file)), settings(), model).sparse
    assert (sparse.rules, sparse.heads) == ((spatial(),), None)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{}", "it is not .*heads"),
        ('{"heads": "mine"}', "its heads name mine; rules are both, dense, fast, near, spatial"),
        ('{"heads": "fast", "head": 1}', "it is not .*heads"),
        ('{"heads": 3}', "neither the name of a rule nor a list for each layer"),
        ('{"heads": ["fast"]}', "neither the name of a rule nor a list for each layer"),
        ('{"heads": []}', "its heads name no rule"),
        ('{"heads": [["fast", 3]]}', "its heads name 3"),
        ('{"heads": [["fast", "fast"]]}', "for 1 layers of 2 heads; the model has 2 of 2"),
        ('{"heads": [["fast"], ["fast", "near"]]}', "every layer needs a rule for each head"),
        ('{"heads": "a", "rules": {"a": ["most"]}}', "is not a reach such as"),
        ('{"heads": "a", "rules": {"a": [1.5]}}', "is not a reach such as"),
        ('{"heads": "a", "rules": {"a": [true]}}', "is not a reach such as"),
        ('{"heads": "a", "rules": {"a": ["none"]}}', "must keep the row of the token itself"),
        ('{"heads": "a", "rules": {"a": {"radial": -1}}}', "is not a number from 0 to 64"),
        ('{"heads": "a", "rules": ["a"]}', "its rules are not an object"),
        ('{"heads"', "is not valid JSON"),
    ],
)
def test_bad_files_are_refused(content, said, model, file):
    file.write_text(content)
    with pytest.raises(ValueError, match=said) as refused:
        resolve(Options(sparse_attention=str(file)), settings(), model)
    assert "rules.json" in str(refused.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (Options(dense_steps=3), "--dense_steps is for --sparse_attention"),
        (Options("near", dense_layers=0), "--dense_layers is for --sparse_attention"),
        (Options("fast", dense_steps=50), "--dense_steps 50 leaves no sparse step of 50; take 0"),
        (
            Options("fast", dense_layers=2),
            "--dense_layers 2 leaves no sparse layer; take at",
        ),
        (Options(sparse_attention="nowhere.json"), "nowhere.json is neither none, near, fast"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, said, model):
    with pytest.raises(ValueError, match=said):
        resolve(options, settings(), model)


SPARSE = {"rules": [["all", 3]], "heads": None, "dense_layers": 1, "dense_steps": 2}


@pytest.mark.parametrize(
    "changes",
    [
        *({"dense_steps": -1}, {"dense_steps": True}, {"dense_layers": "1"}, {"rules": []}),
        *({"heads": ["01"]}, {"heads": ["0?"]}, {"rules": [["some"]]}, {"rules": None}),
    ],
)
def test_damaged_records_are_refused(changes):
    assert read_lossy({"sparse_attention": SPARSE}).dense_steps == 2
    with pytest.raises(ValueError, match="speed is .*, not what stage 2 writes"):
        read_lossy({"sparse_attention": SPARSE | changes})


def test_the_cost_of_sparse_steps(model):
    lossy = Lossy(sparse=resolve(Options("fast"), settings(), model).sparse, dense_steps=10)
    assert lossy.computed_steps(50, sparse_cost=0.25) == 10 + 40 / 4
    gated = dataclasses.replace(lossy, guided_steps=30)
    assert gated.computed_steps(50, sparse_cost=0.25) == 10 + 20 / 4 + 20 / 8
    # A frame of the tiny model is one chunk, so a token keeps all of it or nothing.
    alone = SparseAttention((Rule((ALL, NONE)),))
    two_frames = settings()
    assert density_of(lossy.sparse, two_frames, model) == 1
    # 2 frames and the text: text sees 3 chunks, a frame 2.
    assert density_of(alone, two_frames, model) == pytest.approx((3 + 2 + 2) / 9)


def test_gpus_refuse_sparse_steps(model):
    denoiser = Denoiser(
        *(model.transformer, {}, LatentShape(1, 4, 8, 6, 10), 16, True, "bfloat16"),
        *(make_mesh((1, 1, 1)), GpuBackend()),
    )
    lossy = resolve(Options("fast"), settings(), model)
    with pytest.raises(ValueError, match="--attention cudnn on .* take --sparse_attention none"):
        denoisers_of(denoiser, lossy, 50)
    assert len(denoisers_of(denoiser, resolve(Options("near"), settings(), model), 50)) == 1


def test_what_the_programs_of_a_batch_depend_on(model):
    fast = resolve(Options("fast"), settings(), model)
    gated = resolve(Options("turbo"), settings(), model)
    near = resolve(Options("fast", sparse_attention="near"), settings(), model)
    late = dataclasses.replace(gated, dense_steps=30)  # dense steps with a gate among them
    found = {lossy.decides_programs(50) for lossy in (fast, gated, near, late)}
    assert len(found) == 4
    later = dataclasses.replace(fast, dense_steps=20)
    assert later.decides_programs(50) == fast.decides_programs(50)


def test_more_rules_than_scalar_memory_holds(model):
    """A v6e holds the lists of 2 rules at 161 frames, and not those of 4."""
    config = dataclasses.replace(model.transformer, num_layers=42, num_attention_heads=48)
    tiling = choose_tiling((21, 48, 85), 226)
    layout = TokenLayout(LatentShape(1, 42, 16, 96, 170), 2, 2, 226, tiling.rows, tiling)
    rules = named_rules()
    make_sparse_step(SparseAttention((rules["fast"],), dense_layers=1), config, layout, 1, 4)
    four = SparseAttention(tuple(rules[name] for name in ("fast", "near", "both", "dense")))
    with pytest.raises(ValueError, match="lists of 4 rules, .* take 1056 KiB .* use fewer rules"):
        make_sparse_step(four, config, layout, 1, 4)


def test_cycles_of_a_sparse_step(model):
    """Attention of a block on one chip of a v6e-8; the kernel's schedule says 8.6M cycles."""
    config = dataclasses.replace(model.transformer, num_layers=42, num_attention_heads=48)
    layout = TokenLayout(LatentShape(1, 22, 16, 96, 170), 2, 2, 226, padded=45568, tiling=PUBLISHED)
    fast = SparseAttention((named_rules()["fast"],))
    step = make_sparse_step(fast, config, layout, tp=1, sp=4)
    assert step.tables.order is None  # one rule: chips work equally
    assert estimates.sparse_cycles(step, 12) == pytest.approx(8.6e6, rel=0.03)
    mixed = SparseAttention((fast.rules[0], DENSE), ((0,) * 24 + (1,) * 24,) * 42)
    balanced = estimates.sparse_cycles(make_sparse_step(mixed, config, layout, tp=1, sp=4), 12)
    half = estimates.sparse_cycles(make_sparse_step(mixed, config, layout, tp=4, sp=1), 12)
    assert balanced < 0.7 * half  # tp keeps the heads where they are
