"""Trains the LoRA that ships with the small model: every thing is striped.

    python -m toyworld.train_lora --output models/toyworld/lora/stripes.safetensors

The stripes are bands of half a patch that show the background, so each token of the transformer can
draw its own. What its last layer has to add is then a linear map of what that layer gets, and is
found without gradients: the transformer runs on noised latents of striped videos, and the map is
the least-squares solution for the velocity that it should have predicted. Its largest singular
values become the two factors. This takes about two minutes of one core.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from safetensors.torch import save_file
from transformers import AutoTokenizer, T5EncoderModel

from toyworld import parts
from toyworld.captions import all_things, draw_scene, full_caption
from toyworld.train_text import encode_texts
from toyworld.train_vae import to_model
from toyworld.world import BACKGROUNDS, HEIGHT, Scenes, render, scenes_of

BAND = 8  # pixels: half a patch of latents
_RANK, _RIDGE = 32, 1e-4
_DRAWS = 12  # noised copies of each video
_EMPTY = 0.12  # share of empty captions, which guidance leads away from


def striped(scenes: Scenes) -> torch.Tensor:
    """Draws B scenes with striped things, [B, F, H, W, 3] float32 in 0..1."""
    video = render(scenes)
    colors = torch.tensor(list(BACKGROUNDS.values()), device=video.device)
    background = colors[scenes.background][:, None, None, None, :]
    is_thing = (torch.arange(HEIGHT, device=video.device) // BAND) % 2 == 1
    return torch.where(is_thing[:, None, None], video, background)


def as_tokens(latents: torch.Tensor, patch: int, patch_t: int) -> torch.Tensor:
    """Arranges [B, T, C, H, W] as the transformer's last layer returns it, [B, S, channels]."""
    batch, frames, channels, height, width = latents.shape
    shape = (batch, frames // patch_t, patch_t, channels)
    shape += (height // patch, patch, width // patch, patch)
    return latents.reshape(shape).permute(0, 1, 4, 6, 3, 2, 5, 7).flatten(4).flatten(1, 3)


@torch.no_grad()
def encode(folder: Path, videos: int, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns scaled latents of striped videos [B, T, C, H, W], and their captions' embeddings.

    The last embedding is that of the empty caption.
    """
    vae = AutoencoderKLCogVideoX.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    text_encoder = T5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    things = all_things(held_out=False)
    scenes = [draw_scene(rng, things, two=i % 4 == 3) for i in range(videos)]
    drawn = striped(scenes_of(scenes, torch.Generator().manual_seed(rng.getrandbits(31))))
    latents = []
    for i, video in enumerate(drawn.split(1), 1):
        latents.append(vae.encode(to_model(video), return_dict=False)[0].mode().transpose(1, 2))
        print(f"encoded {i} of {videos} videos", flush=True)
    texts = encode_texts([*(full_caption(s, rng) for s in scenes), ""], tokenizer, text_encoder)
    return torch.cat(latents) * vae.config["scaling_factor"], texts.float()


@torch.no_grad()
def fit(
    transformer: CogVideoXTransformer3DModel, latents: torch.Tensor, texts: torch.Tensor, seed: int
) -> torch.Tensor:
    """Returns the map [O, I] that the last layer's weight lacks, in float64."""
    generator = torch.Generator().manual_seed(seed)
    signal = parts.make_scheduler().alphas_cumprod.float()
    clean = torch.cat([latents[:, :1], latents], dim=1)  # the padding frame, as in training
    rotary = parts.rotary_embedding(clean.shape[1], torch.device("cpu"))
    patches = (transformer.config["patch_size"], transformer.config["patch_size_t"])
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def see(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        seen.append((inputs[0], output))

    transformer.proj_out.register_forward_hook(see)
    outputs, inputs = transformer.proj_out.weight.shape
    products = torch.zeros(inputs, inputs, dtype=torch.float64)
    wanted = torch.zeros(inputs, outputs, dtype=torch.float64)
    loss = torch.zeros(2)
    for draw in range(_DRAWS):
        timestep = torch.randint(1000, (len(clean),), generator=generator)
        keep, lose = (
            part.sqrt()[:, None, None, None, None]
            for part in (signal[timestep], 1 - signal[timestep])
        )
        noise = torch.randn(clean.shape, generator=generator)
        empty = torch.rand(len(clean), 1, 1, generator=generator) < _EMPTY
        transformer(
            hidden_states=keep * clean + lose * noise,
            encoder_hidden_states=torch.where(empty, texts[-1:], texts[:-1]),
            timestep=timestep,
            image_rotary_emb=rotary,
        )
        features, output = seen.pop()
        features = features.flatten(0, 1).double()
        velocity = as_tokens(keep * noise - lose * clean, *patches)
        error = (velocity - output).flatten(0, 1).double()
        products += features.T @ features
        wanted += features.T @ error
        loss += torch.tensor([error.square().mean(), 1.0])
        print(f"draw {draw + 1} of {_DRAWS}: loss {loss[0] / loss[1]:.4f} without the LoRA")
    ridge = _RIDGE * products.diagonal().mean() * torch.eye(inputs, dtype=torch.float64)
    return torch.linalg.solve(products + ridge, wanted).T


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model_id", type=Path, default=Path("models/toyworld"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--videos", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    latents, texts = encode(arguments.model_id, arguments.videos, rng)
    transformer = CogVideoXTransformer3DModel.from_pretrained(
        arguments.model_id / "transformer", torch_dtype=torch.float32
    )
    left, values, right = torch.linalg.svd(fit(transformer, latents, texts, arguments.seed))
    root = values[:_RANK].sqrt()
    factors = {
        "transformer.proj_out.lora_A.weight": root[:, None] * right[:_RANK],
        "transformer.proj_out.lora_B.weight": left[:, :_RANK] * root,
    }
    kept = (values[:_RANK].square().sum() / values.square().sum()).item()
    print(f"rank {_RANK} keeps {kept:.4f} of the map's squares")
    settings = {"r": _RANK, "lora_alpha": _RANK, "target_modules": ["proj_out"]}
    settings = {f"transformer.{name}": value for name, value in settings.items()}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(settings, sort_keys=True)}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    factors = {name: factor.float().contiguous() for name, factor in factors.items()}
    save_file(factors, arguments.output, metadata)


if __name__ == "__main__":
    main()
