"""Trains the image-to-video model of the toy world from the text-to-video model.

    python -m toyworld.train_images --output_dir models/toyworld-i2v

The first frame of a video is the picture that was given, and then the caption's motion happens. The
transformer gets the picture's latents as further channels and learns on from the weights of the
text-to-video model; all other parts are that model's, and are copied. The videos begin so that the
picture alone seldom tells the motion. On one H200 it takes about seven minutes.
"""

import argparse
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from transformers import AutoTokenizer, T5EncoderModel

from toyworld import parts
from toyworld.train_denoiser import encode_training_data, train_denoiser
from toyworld.training import Log, TrainingSettings

# Against the text-to-video model: it starts trained and the picture tells it much, so it needs
# fewer videos; and with a picture, captions of few words are the natural ones.
SETTINGS = TrainingSettings(videos=80_000, steps=28_000, learning_rate=5e-4, partial=0.3)
_UNUSED = ("vae_", "text_", "steady_", "sharp_", "kl_", "refine_")
_COPIED = ("tokenizer", "text_encoder", "vae", "scheduler")


def copy_parts(text_model: Path, folder: Path) -> None:
    """Copies everything but the transformer, and names the pipeline of images."""
    for name in _COPIED:
        shutil.copytree(text_model / name, folder / name, dirs_exist_ok=True)
    shutil.copy(text_model / "preview_factors.json", folder)
    index = json.loads((text_model / "model_index.json").read_text())
    index["_class_name"] = "CogVideoXImageToVideoPipeline"
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text_model", type=Path, default=Path("models/toyworld"))
    parser.add_argument("--output_dir", type=Path, required=True)
    for name, default in asdict(SETTINGS).items():
        if not name.startswith(_UNUSED):
            parser.add_argument(f"--{name}", type=type(default), default=default)
    arguments = vars(parser.parse_args())
    text_model, folder = arguments.pop("text_model"), arguments.pop("output_dir")
    settings = TrainingSettings(**arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    log = Log(settings)
    folder.mkdir(parents=True, exist_ok=True)
    copy_parts(text_model, folder)

    tokenizer = AutoTokenizer.from_pretrained(text_model / "tokenizer")
    text_encoder = T5EncoderModel.from_pretrained(text_model / "text_encoder", dtype=torch.float32)
    vae = AutoencoderKLCogVideoX.from_pretrained(text_model / "vae", torch_dtype=torch.float32)
    text_transformer = CogVideoXTransformer3DModel.from_pretrained(
        text_model / "transformer", torch_dtype=torch.float32
    )
    torch.manual_seed(settings.seed + 2)
    transformer = parts.move(parts.expand_transformer(text_transformer), device)
    text_encoder = parts.move(text_encoder, device).eval().requires_grad_(False)
    vae = parts.move(vae, device).eval().requires_grad_(False)
    data = encode_training_data(settings, tokenizer, text_encoder, vae, device, pictures=True)
    scale = vae.config["scaling_factor"]
    log.add("latents", videos=settings.videos, scaling_factor=scale)

    def snapshot(transformer: CogVideoXTransformer3DModel) -> None:
        parts.copy_in_bfloat16(transformer).save_pretrained(folder / "transformer")
        log.write(folder)

    train_denoiser(transformer, data, scale, settings, log, snapshot)


if __name__ == "__main__":
    main()
