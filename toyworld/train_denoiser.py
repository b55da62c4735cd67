"""Trains the toy world's transformer, for text alone or for a picture and text."""

import random
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from diffusers.training_utils import EMAModel
from transformers import T5EncoderModel

from toyworld import parts
from toyworld.train_text import encode_texts, write_caption
from toyworld.train_vae import encode_videos
from toyworld.training import Log, TrainingSettings, draw_training_scenes, make_optimizer, recorded

# What the pipeline of image-to-video gives to models with an `ofs` embedding.
_OFS = 2.0


class TrainingData(NamedTuple):
    """Videos and their captions, encoded in bfloat16 on the training's device.

    Attributes:
        captions: [videos, captions of a video, MAX_TOKENS, text width].
        empty: embedding of the empty caption, [1, MAX_TOKENS, text width].
        latents: [videos, T, C, H, W], unscaled.
        pictures: mean and deviation of the first frame's posterior, [videos, 2, C, H, W],
            unscaled; None if the videos start from text alone.
    """

    captions: torch.Tensor
    empty: torch.Tensor
    latents: torch.Tensor
    pictures: torch.Tensor | None


def draw_timesteps(n: int, device: torch.device) -> torch.Tensor:
    """Draws n timesteps in 0..999: 35% uniform, the others around 730 (logit-normal, 500 to 880).

    Below 500 the object is plain to see and above 900 only the background is; colour, shape and
    motion are decided between.
    """
    uniform = torch.rand(n, device=device)
    central = torch.sigmoid(1 + torch.randn(n, device=device))
    share = torch.where(torch.rand(n, device=device) < 0.35, uniform, central)
    return (share * 1000).long().clamp(max=999)


def encode_training_data(
    settings: TrainingSettings,
    tokenizer,
    text_encoder: T5EncoderModel,
    vae: AutoencoderKLCogVideoX,
    device: torch.device,
    pictures: bool = False,
) -> TrainingData:
    """Draws the training videos and encodes them and their captions.

    Args:
        pictures: also encode the first frames, of scenes whose start leaves the motion open.
    """
    rng = random.Random(settings.seed + 2)
    scenes = draw_training_scenes(settings, rng, settings.videos)
    texts = [
        write_caption(settings, scene, rng)[0]
        for scene in scenes
        for _ in range(settings.captions_per_video)
    ]
    captions = encode_texts(texts, tokenizer, text_encoder)
    return TrainingData(
        captions.unflatten(0, (settings.videos, settings.captions_per_video)),
        encode_texts([""], tokenizer, text_encoder),
        *encode_videos(scenes, vae, device, settings.seed + 3, pictures),
    )


def _picture_channels(pictures: torch.Tensor, frames: int) -> torch.Tensor:
    """Draws samples of posteriors [B, 2, C, H, W], as the first of `frames` latent frames."""
    mean, std = pictures.float().unbind(1)
    first = (mean + std * torch.randn_like(mean))[:, None]
    return torch.cat([first, torch.zeros_like(first).expand(-1, frames - 1, -1, -1, -1)], dim=1)


def train_denoiser(
    transformer: CogVideoXTransformer3DModel,
    data: TrainingData,
    scale: float,
    settings: TrainingSettings,
    log: Log,
    snapshot: Callable[[CogVideoXTransformer3DModel], None],
) -> None:
    """Trains the transformer on the mean square error of v, with draws of torch's own generator.

    Args:
        transformer: on the device of the data.
        scale: factor of the latents.
        snapshot: called now and then, and at the end, with the averaged transformer.
    """
    device = data.latents.device
    parameters = list(transformer.parameters())
    optimizer, schedule = make_optimizer(parameters, settings.learning_rate, settings.steps)
    ema = EMAModel(parameters, decay=settings.ema_decay, foreach=True)
    if device.type == "cuda":
        transformer.compile()  # 46 -> 23 ms a step of 256 on one H200, for 32 s of compilation
    signal = parts.make_scheduler().alphas_cumprod.to(device).float()
    # 5 latent frames are padded at the front to 6, the least multiple of the temporal patch; the
    # pipeline drops the first after denoising. Here the padding is a copy of the first frame.
    rotary = parts.rotary_embedding(parts.LATENT_FRAMES + 1, device)
    ofs = None
    if transformer.config["ofs_embed_dim"]:
        ofs = torch.full((1,), _OFS, device=device)

    def step(
        clean: torch.Tensor, text: torch.Tensor, timestep: torch.Tensor, *pictures: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        optimizer.zero_grad(set_to_none=True)
        clean = clean.float() * scale
        clean = torch.cat([clean[:, :1], clean], dim=1)
        noise = torch.randn_like(clean)
        keep = signal[timestep].sqrt()[:, None, None, None, None]
        lose = (1 - signal[timestep]).sqrt()[:, None, None, None, None]
        channels = [_picture_channels(one, clean.shape[1]) * scale for one in pictures]
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            v = transformer(
                hidden_states=torch.cat([keep * clean + lose * noise, *channels], dim=2),
                encoder_hidden_states=text,
                timestep=timestep,
                ofs=ofs,
                image_rotary_emb=rotary,
                return_dict=False,
            )[0]
        loss = F.mse_loss(v.float(), keep * noise - lose * clean)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return {"loss": loss.detach()}

    run = None
    losses = []
    for number in range(settings.steps):
        rows = torch.randint(settings.videos, (settings.batch,), device=device)
        which = torch.randint(settings.captions_per_video, (settings.batch,), device=device)
        dropped = torch.rand(settings.batch, 1, 1, device=device) < settings.dropped
        text = torch.where(dropped, data.empty, data.captions[rows, which])
        batch = (data.latents[rows], text, draw_timesteps(settings.batch, device))
        if data.pictures is not None:
            batch += (data.pictures[rows],)
        run = run or recorded(step, *batch)
        losses.append(run(*batch)["loss"].clone())
        schedule.step()
        ema.step(parameters)
        last = number == settings.steps - 1
        if number % 250 == 249 or last:
            log.add("denoiser", step=number + 1, loss=torch.stack(losses).mean().item())
            losses.clear()
        if number % 10_000 == 9_999 or last:
            ema.store(parameters)
            ema.copy_to(parameters)
            snapshot(transformer)
            ema.restore(parameters)
