"""Trains the toy world's autoencoder, and encodes videos with it."""

import random

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLCogVideoX

from toyworld import parts
from toyworld.training import Log, TrainingSettings, draw_training_scenes, make_optimizer, recorded
from toyworld.world import HEIGHT, WIDTH, Scene, Scenes, render, scenes_of


def to_model(videos: torch.Tensor) -> torch.Tensor:
    """Converts [B, F, H, W, 3] in 0..1 to the autoencoder's [B, 3, F, H, W] in -1..1."""
    return videos.permute(0, 4, 1, 2, 3) * 2 - 1


def windows(videos: torch.Tensor, scenes: Scenes, generator: torch.Generator) -> torch.Tensor:
    """Cuts a window of half the height and width out of each video, at its first thing.

    Videos and result are [B, F, H, W, 3]; the middle of the thing's path lies anywhere in the
    middle half of its window.
    """
    height, width = HEIGHT // 2, WIDTH // 2
    middle = (scenes.start[:, 0, :2] + scenes.end[:, 0, :2]) / 2
    shift = torch.rand(middle.shape, generator=generator) / 2 + 0.25
    corner = (middle - shift * torch.tensor((width, height))).round().int()
    left, top = corner[:, 0].clamp(0, width).tolist(), corner[:, 1].clamp(0, height).tolist()
    cut = [v[:, y : y + height, x : x + width] for v, x, y in zip(videos, left, top, strict=True)]
    return torch.stack(cut)


def train_vae(settings: TrainingSettings, device: torch.device, log: Log) -> AutoencoderKLCogVideoX:
    """Trains the autoencoder; returns float32 weights that bfloat16 holds exactly.

    It begins on windows around the things, where a step shows more edges for its cost, and ends on
    whole frames, whose group norms have other statistics.
    """
    torch.manual_seed(settings.seed)
    vae = parts.move(parts.make_vae(), device)
    total = settings.vae_window_steps + settings.vae_steps
    training = make_optimizer(list(vae.parameters()), settings.vae_learning_rate, total)
    draws = (random.Random(settings.seed), torch.Generator().manual_seed(settings.seed))
    for steps, batch, windowed in (
        (settings.vae_window_steps, settings.vae_window_batch, True),
        (settings.vae_steps, settings.vae_batch, False),
    ):
        _draw_and_learn(vae, settings, training, draws, steps, batch, windowed, 0.0, log, "vae")
    return parts.freeze(vae)


def steady_vae(
    vae: AutoencoderKLCogVideoX, settings: TrainingSettings, log: Log
) -> AutoencoderKLCogVideoX:
    """Teaches a trained autoencoder to draw the same from latents that are a little off.

    A denoiser's latents always are. Without this, noise of 0.13 of their deviation dents every
    outline, differently in each latent frame. Returns float32 weights that bfloat16 holds exactly.
    """
    vae.train().requires_grad_(True)
    return _refine(
        vae, settings, settings.steady_steps, settings.steady_noise, 4, log, "steady_vae"
    )


def sharpen_vae(
    vae: AutoencoderKLCogVideoX, settings: TrainingSettings, log: Log
) -> AutoencoderKLCogVideoX:
    """Trains the decoder alone, on latents as far off as a good denoiser's, for sharper edges."""
    vae.train().requires_grad_(False)
    vae.decoder.requires_grad_(True)
    return _refine(vae, settings, settings.sharp_steps, settings.sharp_noise, 5, log, "sharp_vae")


def _refine(
    vae: AutoencoderKLCogVideoX,
    settings: TrainingSettings,
    steps: int,
    noise: float,
    seed: int,
    log: Log,
    phase: str,
) -> AutoencoderKLCogVideoX:
    """Trains the parameters that require gradients, on complete frames."""
    seed += settings.seed
    torch.manual_seed(seed)
    parameters = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    training = make_optimizer(parameters, settings.refine_learning_rate, steps)
    draws = (random.Random(seed), torch.Generator().manual_seed(seed))
    _draw_and_learn(
        vae, settings, training, draws, steps, settings.vae_batch, False, noise, log, phase
    )
    return parts.freeze(vae)


def _draw_and_learn(
    vae: AutoencoderKLCogVideoX,
    settings: TrainingSettings,
    training: tuple,
    draws: tuple[random.Random, torch.Generator],
    steps: int,
    batch: int,
    windowed: bool,
    noise: float,
    log: Log,
    phase: str,
) -> None:
    """Trains on `steps` batches of new scenes, with up to `noise` on the latents.

    `training` is an optimizer with its schedule, `draws` draws scenes and their trajectories.
    Encoding and decoding go through diffusers' frame batches (9 + 8 frames, 3 + 2 latents), as at
    inference, because the statistics of the group norms are per batch.
    """
    optimizer, schedule = training
    rng, generator = draws
    parameters = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    device = vae.device

    def step(video: torch.Tensor) -> dict[str, torch.Tensor]:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            posterior = vae.encode(video, return_dict=False)[0]
            latents = posterior.sample()
            # Noise in proportion to the latents, so that larger latents gain nothing.
            level = noise * torch.rand(len(video), 1, 1, 1, 1, device=device)
            latents = latents + level * posterior.mean.std() * torch.randn_like(latents)
            drawn = vae.decode(latents, return_dict=False)[0]
        drawn, mean, logvar = drawn.float(), posterior.mean.float(), posterior.logvar.float()
        # The absolute error alone gets stuck at "background everywhere", the median of every pixel.
        absolute, square = F.l1_loss(drawn, video), F.mse_loss(drawn, video)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        (absolute + 4 * square + settings.kl_weight * kl).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return {
            "absolute": absolute.detach(),
            "psnr": -10 * torch.log10(square.detach() / 4),
            "kl": kl.detach(),
            "latent_std": mean.detach().std(),
            "posterior_std": (0.5 * logvar.detach()).exp().mean(),
        }

    run = None
    for number in range(steps):
        scenes = scenes_of(draw_training_scenes(settings, rng, batch), generator)
        video = render(scenes.to(device))
        video = to_model(windows(video, scenes, generator) if windowed else video).contiguous()
        run = run or recorded(step, video)
        measured = run(video)
        schedule.step()
        if number % 250 == 249 or number == steps - 1:
            row = {k: v.item() for k, v in measured.items()}
            log.add(phase, step=schedule.last_epoch, **row)


@torch.no_grad()
def encode_videos(
    scenes: list[Scene],
    vae: AutoencoderKLCogVideoX,
    device: torch.device,
    seed: int,
    pictures: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Renders and encodes scenes, in bfloat16 on the device; nothing is scaled.

    Args:
        pictures: also encode the first frames alone, of scenes whose start leaves the motion open.

    Returns:
        Latents [B, T, C, H, W], and mean and deviation of the first frames' posteriors
        [B, 2, C, H, W] or None.
    """
    generator = torch.Generator().manual_seed(seed)
    latents, posteriors = [], []
    for first in range(0, len(scenes), 64):
        batch = scenes_of(scenes[first : first + 64], generator, open_start=pictures).to(device)
        video = to_model(render(batch))
        with torch.autocast(device.type, torch.bfloat16):
            latents.append(vae.encode(video, return_dict=False)[0].mode().transpose(1, 2))
            if pictures:
                posterior = vae.encode(video[:, :, :1], return_dict=False)[0]
                posteriors.append(torch.stack([posterior.mean, posterior.std], dim=1)[:, :, :, 0])
    encoded = torch.cat(latents).to(torch.bfloat16)
    return encoded, torch.cat(posteriors).to(torch.bfloat16) if pictures else None
