"""Reading a model's JSON files: defaults filled in, and one line for what cannot be used."""

import dataclasses
import json

import pytest

from cogvideox.model.config import SchedulerConfig, TransformerConfig, VaeConfig


def read(config, folder, values):
    path = folder / "config.json"
    path.write_text(json.dumps(values))
    return config.from_file(path)


def test_old_and_complete_files_are_equal(tmp_path):
    """Equal models must get equal fingerprints, whatever their files spell out."""
    old = read(TransformerConfig, tmp_path, {"num_layers": 6, "_diffusers_version": "0.30"})
    complete = dataclasses.asdict(TransformerConfig(num_layers=6)) | {"norm_eps": 0.00001}
    assert read(TransformerConfig, tmp_path, complete | {"unknown": [1]}) == old
    assert old.patch_size_t is None and old.width == 30 * 64
    assert read(VaeConfig, tmp_path, {"temporal_compression_ratio": 4.0}) == VaeConfig()


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (TransformerConfig, {"num_layers": "42"}, "num_layers must be an integer, not '42'"),
        (TransformerConfig, {"num_layers": 1.5}, "num_layers must be an integer, not 1.5"),
        (TransformerConfig, {"num_layers": True}, "num_layers must be an integer, not True"),
        (
            TransformerConfig,
            {"num_layers": 10**9},
            "num_layers must be from 1 to 1024, not 1000000000",
        ),
        (TransformerConfig, {"num_layers": None}, "num_layers must be an integer, not None"),
        (TransformerConfig, {"patch_size": 0}, "patch_size must be from 1 to 64, not 0"),
        (TransformerConfig, {"patch_size_t": []}, "patch_size_t must be an integer or null"),
        (TransformerConfig, {"norm_eps": 1e301}, "norm_eps must be a number, not 1e+301"),
        (TransformerConfig, {"attention_bias": 1}, "attention_bias must be true or false, not 1"),
        (TransformerConfig, {"activation_fn": 3}, "activation_fn must be a string, not 3"),
        (
            TransformerConfig,
            {"timestep_activation_fn": "\x1b[31m"},
            "timestep_activation_fn must be one of silu, swish, mish, gelu, relu, not",
        ),
        (TransformerConfig, {"_class_name": "UNet"}, "_class_name is 'UNet', not CogVideoXTran"),
        (
            TransformerConfig,
            {"use_rotary_positional_embeddings": True, "attention_head_dim": 24},
            "attention_head_dim must be a multiple of 16",
        ),
        (VaeConfig, {"block_out_channels": 128}, "block_out_channels must be a list, not 128"),
        (VaeConfig, {"block_out_channels": [1, "2"]}, "block_out_channels[1] must be an integer"),
        (VaeConfig, {"norm_num_groups": 0}, "norm_num_groups must be from 1"),
        (VaeConfig, {"temporal_compression_ratio": 3}, "temporal_compression_ratio must be a pow"),
        (SchedulerConfig, {}, "_class_name is None, not one of CogVideoXDPMScheduler"),
        (
            SchedulerConfig,
            {"_class_name": "CogVideoXDDIMScheduler", "trained_betas": [0.1]},
            "trained_betas holds 1 numbers, num_train_timesteps is 1000",
        ),
    ],
)
def test_unusable_values(config, values, message, tmp_path):
    with pytest.raises(ValueError) as error:
        read(config, tmp_path, values)
    assert str(error.value).startswith(f"{tmp_path}/config.json: {message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["DPM", "DDIM"])
def test_the_schedulers_name_is_that_of_its_class(name, tmp_path):
    values = {"_class_name": f"CogVideoX{name}Scheduler", "snr_shift_scale": 1}
    config = read(SchedulerConfig, tmp_path, values)
    assert (config.name, config.snr_shift_scale) == (name.lower(), 1.0)


@pytest.mark.parametrize("text", ["[]", "{", "\x00"])
def test_no_json_object(text, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="JSON"):
        VaeConfig.from_file(path)
    with pytest.raises(ValueError, match="cannot read"):
        VaeConfig.from_file(tmp_path / "absent.json")
