"""Trains the toy-world model from a seed and writes it in diffusers layout.

    python -m toyworld.train --output_dir models/toyworld

The autoencoder learns to draw the world, then to draw it from inexact latents too, and the text
encoder to tell what a caption says. A set of videos and captions is then encoded once, with the
final, bfloat16-rounded weights of both, and the transformer learns to denoise those latents. Losses
go to `training_log.json` beside the weights. On one H200 it takes about 35 minutes. The same seed
gives the same data, captions and initial weights, and each part draws its own, so a run taken up
with `--resume` sees what one run sees; GPU arithmetic is not bit-reproducible, so neither are the
weights.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from transformers import T5EncoderModel

from toyworld import parts
from toyworld.train_denoiser import encode_training_data, train_denoiser
from toyworld.train_text import train_text_encoder
from toyworld.train_vae import sharpen_vae, steady_vae, train_vae
from toyworld.training import Log, TrainingSettings


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="take the autoencoder and the text encoder that an earlier run left in the folder",
    )
    for name, default in asdict(TrainingSettings()).items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    arguments = vars(parser.parse_args())
    folder, resume = arguments.pop("output_dir"), arguments.pop("resume")
    settings = TrainingSettings(**arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    log = Log(settings)
    folder.mkdir(parents=True, exist_ok=True)

    tokenizer = parts.make_tokenizer(settings.seed)
    if resume:
        earlier = json.loads((folder / "training_log.json").read_text())
        kept = ("vae", "steady_vae", "sharp_vae", "text")
        log.content |= {phase: earlier[phase] for phase in kept if phase in earlier}

    def keep(part: AutoencoderKLCogVideoX | T5EncoderModel, name: str) -> None:
        parts.copy_in_bfloat16(part).save_pretrained(folder / name)
        log.write(folder)

    if "vae" in log.content:
        vae = AutoencoderKLCogVideoX.from_pretrained(folder / "vae", torch_dtype=torch.float32)
        vae = parts.move(vae, device).eval().requires_grad_(False)
    else:
        vae = train_vae(settings, device, log)
        keep(vae, "vae")
    for phase, refine in (("steady_vae", steady_vae), ("sharp_vae", sharpen_vae)):
        if phase not in log.content:
            vae = refine(vae, settings, log)
            keep(vae, "vae")

    if "text" in log.content:
        text_encoder = T5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
        text_encoder = parts.move(text_encoder, device).eval().requires_grad_(False)
    else:
        text_encoder = train_text_encoder(settings, tokenizer, device, log)
        keep(text_encoder, "text_encoder")

    def snapshot(transformer: CogVideoXTransformer3DModel) -> None:
        parts.save(folder, tokenizer, text_encoder, vae, transformer)
        log.write(folder)

    data = encode_training_data(settings, tokenizer, text_encoder, vae, device)
    scale = 1 / data.latents[:4096].float().std().item()
    vae.register_to_config(scaling_factor=scale)
    log.add("latents", videos=settings.videos, scaling_factor=scale)
    torch.manual_seed(settings.seed + 2)
    transformer = parts.move(parts.make_transformer(), device)
    train_denoiser(transformer, data, scale, settings, log, snapshot)


if __name__ == "__main__":
    main()
