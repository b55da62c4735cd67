"""Weights with LoRAs: one rounding, the same on every mesh, and the base model's bits without."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from cogvideox.lora.merging import merged
from cogvideox.lora.reading import LoraFile, read_lora
from cogvideox.model.folder import ModelFolder, find_model, stored_tensors
from cogvideox.transformer import loading
from cogvideox.transformer.loading import load_parameters
from cogvideox.transformer.parameters import BLOCKS
from runtime.mesh import make_mesh
from tests.lora_files import every_linear, random_factors, weights_of, write_lora
from tests.tiny_models import save_tiny_model

WEIGHTS = (0.5, -1.5)


# Gated, the rows of the MLP's first layer lie in another order, as those of q and k always do.
@pytest.fixture(scope="module", params=[("1.5", "gelu-approximate"), ("1.0-sincos", "geglu")])
def model(request, tmp_path_factory) -> ModelFolder:
    generation, activation = request.param
    folder = save_tiny_model(
        tmp_path_factory.mktemp("model"),
        generation,
        num_attention_heads=8,
        attention_head_dim=16,
        activation_fn=activation,
    )
    return find_model(str(folder), ["transformer"])


@pytest.fixture(scope="module")
def loras(model, tmp_path_factory) -> list[tuple[LoraFile, float]]:
    """Two LoRAs of all layers, with their weights."""
    folder, files = tmp_path_factory.mktemp("loras"), []
    for seed, rank in ((1, 3), (2, 2)):
        factors = random_factors(model.path, every_linear(model.path), rank, seed)
        path = write_lora(folder / f"{seed}.safetensors", factors)
        files.append(read_lora(path, model.transformer))
    return list(zip(files, WEIGHTS, strict=True))


def load(model: ModelFolder, loras, mesh=(1, 1, 1), dtype="float32", names=None):
    stored = merged(stored_tensors(model.path / "transformer"), loras)
    return load_parameters(
        model.transformer, stored, make_mesh(mesh), jnp.dtype(dtype), names=names
    )


def in_float64(model: ModelFolder, loras) -> dict[str, np.ndarray]:
    """The stored weights with LoRAs, computed the other way: whole, by module."""
    weights = {name: w.astype(np.float64) for name, w in weights_of(model.path).items()}
    for lora, weight in loras:
        for name, update in lora.updates.items():
            down, up = (f.read().astype(np.float64) for f in (update.down, update.up))
            product = up.reshape(len(up), -1) @ down.reshape(len(down), -1)
            weights[name] += weight * product.reshape(weights[name].shape)
    return weights


def check_sum(model: ModelFolder, parameters, bases, expected) -> None:
    """Compares with the sum; rows lie in another order on devices, as the base model tells."""
    plain_weights = weights_of(model.path)
    for name, parameter in parameters.items():
        stacked = name.startswith(BLOCKS)
        for layer in range(model.transformer.num_layers) if stacked else [0]:
            stored = name.replace(BLOCKS, f"{BLOCKS}{layer}.") if stacked else name
            ours, base = (np.asarray(p)[layer] if stacked else np.asarray(p)
                          for p in (parameter, bases[name]))  # fmt: skip
            plain = plain_weights[stored].reshape(len(ours), -1)
            place = {row.tobytes(): i for i, row in enumerate(plain)}
            order = [place[row.tobytes()] for row in base.reshape(len(base), -1)]
            wanted = expected[stored].reshape(len(ours), -1)[order]
            least = 3e-6 * np.abs(wanted).max()
            np.testing.assert_allclose(ours.reshape(len(ours), -1), wanted, rtol=0, atol=least)


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 1, 4), (1, 8, 1), (2, 2, 2)])
def test_the_weights_are_the_sum_on_every_mesh(mesh, model, loras):
    bases, expected = load(model, [], mesh), in_float64(model, loras)
    check_sum(model, load(model, loras, mesh), bases, expected)


def test_layers_stacked_on_the_devices_are_the_sum(model, loras, monkeypatch):
    monkeypatch.setattr(loading, "STACKED_ON_DEVICES_BYTES", 0)
    bases, expected = load(model, [], (2, 2, 2)), in_float64(model, loras)
    check_sum(model, load(model, loras, (2, 2, 2)), bases, expected)


def test_bfloat16_is_one_rounding_of_the_sum_in_float32(model, loras):
    exact, rounded = load(model, loras), load(model, loras, dtype="bfloat16")
    for name, parameter in rounded.items():
        expected = np.asarray(exact[name]).astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(np.asarray(parameter), expected)


def test_undone_the_weights_are_those_of_the_model_bit_for_bit(model, loras):
    base = load(model, [], dtype="bfloat16")
    (first, _), _ = loras
    parameters = load(model, loras, dtype="bfloat16")
    assert first.parameters <= parameters.keys()
    parameters |= load(model, [], dtype="bfloat16", names=first.parameters)
    for name, parameter in parameters.items():
        np.testing.assert_array_equal(np.asarray(parameter), np.asarray(base[name]))


def test_only_the_named_parameters_are_read(model, loras, monkeypatch):
    stored = stored_tensors(model.path / "transformer")
    name = f"{BLOCKS}attn1.to_q.weight"
    wanted = {f"{BLOCKS}{i}.attn1.to_q.weight" for i in range(model.transformer.num_layers)}
    few = {key: tensor for key, tensor in stored.items() if key in wanted}
    mesh, dtype = make_mesh((1, 1, 1)), jnp.dtype("float32")
    loaded = load_parameters(model.transformer, merged(few, loras), mesh, dtype, names=[name])
    assert list(loaded) == [name]
    np.testing.assert_array_equal(np.asarray(loaded[name]), np.asarray(load(model, loras)[name]))


def test_a_product_of_low_precision_factors_is_in_float32(model, tmp_path):
    module = "transformer_blocks.0.attn1.to_v"
    down, up = random_factors(model.path, [module], 4)[module]
    short = {module: (down.astype(ml_dtypes.bfloat16), up.astype(np.float16))}
    lora = read_lora(write_lora(tmp_path / "short.safetensors", short), model.transformer)
    ours = load(model, [(lora, 1.0)])[f"{BLOCKS}attn1.to_v.weight"][0]
    product = short[module][1].astype(np.float64) @ short[module][0].astype(np.float64)
    expected = weights_of(model.path)[f"{module}.weight"] + product
    np.testing.assert_allclose(np.asarray(ours), expected, rtol=0, atol=1e-6)
    assert jax.device_count() == 8
