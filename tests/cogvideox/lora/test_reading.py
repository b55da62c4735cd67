"""LoRA files in every format give the same updates; what cannot be added is refused by its key."""

import json
import math
import pickle
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from cogvideox.lora.reading import read_lora
from cogvideox.model.config import TransformerConfig
from tests.lora_files import (
    ATTENTION,
    FORMATS,
    block_modules,
    every_linear,
    random_factors,
    write_lora,
)
from tests.tiny_models import save_tiny_model

KEY = "transformer.transformer_blocks.0.attn1.to_q"
ROW = np.ones((2, 32), np.float32)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def config(model) -> TransformerConfig:
    return TransformerConfig.from_file(model / "transformer/config.json")


@pytest.fixture(scope="module")
def factors(model) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return random_factors(model, block_modules(*ATTENTION), 4)


@pytest.mark.parametrize("format_", FORMATS)
def test_every_format_gives_the_same_updates(format_, factors, config, tmp_path):
    path = write_lora(tmp_path / "lora.safetensors", factors, format_)
    lora = read_lora(path, config)
    assert {f"{module}.weight" for module in factors} == lora.updates.keys()
    for module, (down, up) in factors.items():
        update = lora.updates[f"{module}.weight"]
        np.testing.assert_array_equal(update.down.read(), down)
        np.testing.assert_array_equal(update.up.read(), up)
        # SAT trains with alpha = 1 and does not write it.
        assert update.scale == (1 / 4 if format_ == "sat" else 1)


def test_kohya_names_of_all_layers_with_alphas(model, config, tmp_path):
    every = every_linear(model)
    factors = random_factors(model, every, 2)
    alphas = {
        f"lora_unet__{module.replace('.', '_')}.alpha": np.array(1 + i, ml_dtypes.bfloat16)
        for i, module in enumerate(every)
    }
    path = write_lora(tmp_path / "lora.safetensors", factors, "kohya", None, **alphas)
    lora = read_lora(path, config)
    assert [lora.updates[f"{m}.weight"].scale for m in every] == [
        (1 + i) / 2 for i in range(len(every))
    ]
    said = lora.describe(0.5)
    assert f"{len(every)} layers" in said and "rank 2" in said and "kohya" in said
    assert f"alpha 1 to {len(every)}" in said and f"scale 0.25 to {len(every) / 4:.4g}" in said


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"r": 4, "lora_alpha": 2}, 0.5),
        ({"r": 4, "lora_alpha": 2, "use_rslora": True}, 1.0),
        ({"r": 8, "lora_alpha": 2, "rank_pattern": {"attn1.*": 4}}, 0.5),
        ({"r": 4, "lora_alpha": 2, "alpha_pattern": {r"0\.attn1\.to_q": 12}}, 3.0),
    ],
)
def test_settings_of_peft_beside_the_file(settings, scale, factors, config, tmp_path):
    path = write_lora(tmp_path / "adapter_model.safetensors", factors, "peft")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | settings))
    lora = read_lora(path, config)
    assert lora.updates["transformer_blocks.0.attn1.to_q.weight"].scale == scale
    assert "(adapter_config.json)" in lora.describe(1)
    assert lora.settings_sha256
    # They belong to that file only.
    other = write_lora(tmp_path / "other.safetensors", factors)
    assert read_lora(other, config).settings_sha256 is None


def test_the_header_wins_over_a_file_and_alphas(factors, config, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 400}')
    alpha = {f"{KEY}.alpha": np.array(40, np.float32)}
    path = write_lora(
        tmp_path / "lora.safetensors", factors, settings={"r": 4, "lora_alpha": 1}, **alpha
    )
    assert {update.scale for update in read_lora(path, config).updates.values()} == {1 / 4}


def tensors(**changes: np.ndarray | None) -> dict[str, np.ndarray]:
    """A small good LoRA with changes; None leaves a tensor out, "K" in a name stands for KEY."""
    good = {"K.lora_A.weight": ROW, "K.lora_B.weight": np.ones((32, 2), np.float32)}
    changed = {name: tensor for name, tensor in (good | changes).items() if tensor is not None}
    return {name.replace("K.", f"{KEY}."): np.asarray(t) for name, t in changed.items()}


UP = np.ones((32, 2), np.float32)
NAN = np.array([[1, np.nan]] * 32, np.float32)
BAD = {
    "dora": ({"K.lora_magnitude_vector": ROW}, "to_q.lora_magnitude_vector: it belongs to a DoRA"),
    "dora kohya": ({"K.dora_scale": ROW}, "to_q.dora_scale: it belongs to a DoRA"),
    "lokr": ({"K.lokr_w1": ROW}, "to_q.lokr_w1: it belongs to a LoKr"),
    "loha": ({"K.hada_w1_a": ROW}, "to_q.hada_w1_a: it belongs to a LoHa"),
    "oft": ({"K.oft_diag": ROW}, "to_q.oft_diag: it belongs to another kind"),
    "bias": ({"K.lora_B.bias": ROW}, "to_q.lora_B.bias: LoRAs with a bias"),
    "difference": ({"K.diff": ROW}, "to_q.diff: it is the difference of a whole tensor"),
    "text encoder": (
        {"text_encoder.encoder.block.0.q.lora_A.weight": ROW}, "it is for the text encoder"
    ),
    "kohya text encoder": ({"lora_te_encoder_block.lora_down.weight": ROW}, "the text encoder"),
    "unknown ending": ({"K.lora_C.weight": ROW}, "to_q.lora_C.weight: it is no known part"),
    "another model": (
        {"transformer.double_blocks.0.q.lora_A.weight": ROW},
        "double_blocks.0.q.lora_A.weight: this transformer has no such layer",
    ),
    "a norm": (
        {"transformer.norm_final.lora_A.weight": ROW}, "norm_final.lora_A.weight: this transformer"
    ),
    "more blocks": (
        {"transformer.transformer_blocks.2.attn1.to_q.lora_A.weight": ROW},
        "to_q.lora_A.weight: this transformer has only 2 blocks; the LoRA is of another model",
    ),
    "another width": (
        {"K.lora_A.weight": np.ones((2, 48), np.float32)},
        "lora_A.weight is [2, 48], this transformer takes [rank, 32]; the LoRA is of another model",
    ),
    "another rank": (
        {"K.lora_B.weight": np.ones((32, 3), np.float32)}, "lora_B.weight is [32, 3], this"
    ),
    "rank 0": ({"K.lora_A.weight": np.ones((0, 32), np.float32),
                "K.lora_B.weight": np.ones((32, 0), np.float32)}, "lora_A.weight is [0, 32]"),
    "a scalar": ({"K.lora_A.weight": np.float32(1)}, "lora_A.weight is [], this"),
    "integers": ({"K.lora_A.weight": ROW.astype(np.int32)}, "is of dtype int32, not a float"),
    "nan": ({"K.lora_B.weight": NAN}, "to_q.lora_B.weight holds NaN or infinity"),
    "infinity": (
        {"K.lora_A.weight": np.full((2, 32), np.inf, ml_dtypes.bfloat16)},
        "to_q.lora_A.weight holds NaN or infinity",
    ),
    "half": ({"K.lora_B.weight": None}, "to_q.lora_A.weight: there is no up factor beside it"),
    "alpha alone": (
        {"K.lora_A.weight": None, "K.lora_B.weight": None, "K.alpha": np.float32(1)},
        "to_q.alpha: it stands alone",
    ),
    "alpha 0": ({"K.alpha": np.float32(0)}, "alpha is 0.0, not a positive number"),
    "alpha nan": ({"K.alpha": np.float32(np.nan)}, "alpha is nan"),
    "alphas": ({"K.alpha": np.ones(2, np.float32)}, "its alpha has shape [2]"),
    "twice": ({"transformer_blocks.0.attn1.to_q.lora_A.weight": ROW}, "is the same part"),
    "empty": ({"K.lora_A.weight": None, "K.lora_B.weight": None}, "it holds no tensor"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_tensors(case, config, tmp_path):
    changes, said = BAD[case]
    path = tmp_path / "lora.safetensors"
    save_file(tensors(**changes), path)
    with pytest.raises(ValueError) as refused:
        read_lora(path, config)
    assert said in str(refused.value) and str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


BAD_SETTINGS = {
    "dora": ({"r": 2, "use_dora": True}, "use_dora asks for DoRA"),
    "bias": ({"r": 2, "lora_bias": True}, "lora_bias asks for"),
    "another kind": ({"peft_type": "LOKR", "r": 2}, "peft_type is LOKR"),
    "another rank": ({"r": 4, "lora_alpha": 4}, "its rank is 2, the settings of the LoRA say 4"),
    "rank": ({"r": "two"}, "r is two, not a positive number"),
    "alpha": ({"r": 2, "lora_alpha": -1}, "lora_alpha is -1"),
    "patterns": ({"r": 2, "rank_pattern": ["to_q"]}, "rank_pattern is not an object"),
    "slow pattern": ({"r": 2, "rank_pattern": {"(a+)+b": 2}}, "too complex"),
    "broken pattern": ({"r": 2, "alpha_pattern": {"(": 2}}, "alpha_pattern has the pattern ("),
    "generation": ({"r": 2, "base_model_name_or_path": "THUDM/CogVideoX-5b"}, "trained on THUDM"),
    "layers": ({"r": 2, "modules_to_save": ["proj_out"]}, "modules_to_save asks for"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
@pytest.mark.parametrize("place", ["header", "file"])
def test_bad_settings(case, place, config, tmp_path):
    settings, said = BAD_SETTINGS[case]
    path = tmp_path / "lora.safetensors"
    if place == "header":
        own = {f"transformer.{name}": value for name, value in settings.items()}
        save_file(tensors(), path, {"lora_adapter_metadata": json.dumps(own)})
    else:
        save_file(tensors(), path)
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError) as refused:
        read_lora(path, config)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_pickles_and_damaged_files(config, tmp_path, factors):
    torch.save({"a": torch.ones(1)}, tmp_path / "archive.pt")
    (tmp_path / "bare.bin").write_bytes(pickle.dumps({"a": 1}))
    for name in ("archive.pt", "bare.bin"):
        with pytest.raises(ValueError, match=f"{name} is a pickle, which can run code"):
            read_lora(tmp_path / name, config)
    path = write_lora(tmp_path / "lora.safetensors", factors)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="truncated"):
        read_lora(path, config)
    (tmp_path / "text.safetensors").write_text("a text that is long enough")
    with pytest.raises(ValueError, match="not a safetensors file"):
        read_lora(tmp_path / "text.safetensors", config)
    with pytest.raises(ValueError, match="does not exist|cannot read|No such"):
        read_lora(tmp_path / "absent.safetensors", config)


def test_values_are_checked_in_every_block_of_a_file(config, tmp_path, model, monkeypatch):
    monkeypatch.setattr("cogvideox.lora.reading._BLOCK_BYTES", 64)
    factors = random_factors(model, ["proj_out"], 2)
    down, up = factors["proj_out"]
    read_lora(write_lora(tmp_path / "good.safetensors", factors), config)
    for place in (0, down.size // 2, down.size - 1):
        bad = down.copy()
        bad.flat[place] = -math.inf
        path = write_lora(tmp_path / "bad.safetensors", {"proj_out": (bad, up)})
        with pytest.raises(ValueError, match="proj_out.lora_A.weight holds NaN"):
            read_lora(path, config)
