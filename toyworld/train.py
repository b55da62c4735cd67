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
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from diffusers.training_utils import EMAModel
from transformers import T5EncoderModel

from toyworld import parts
from toyworld.captions import (
    UNSAID,
    corrupt,
    full_caption,
    held_out_captions,
    partial_caption,
    two_thing_captions,
)
from toyworld.train_vae import encode_videos, sharpen_vae, steady_vae, train_vae
from toyworld.training import Log, TrainingSettings, draw_training_scenes, make_optimizer, recorded
from toyworld.world import BACKGROUNDS, COLORS, MOTIONS, SHAPES, Scene


def write_caption(
    settings: TrainingSettings, scene: Scene, rng: random.Random
) -> tuple[str, Scene]:
    """Returns a caption, sometimes incomplete, and what it says, which may be wrong."""
    said = corrupt(scene, rng) if rng.random() < settings.corrupted else scene
    if len(said.things) == 1 and rng.random() < settings.partial:
        return partial_caption(said, rng)
    return full_caption(said, rng), said


def tokens_of(tokenizer, texts: list[str]) -> torch.Tensor:
    """Returns token ids [B, MAX_TOKENS]. Raises ValueError for a text that does not fit."""
    longest = max(len(ids) for ids in tokenizer(texts).input_ids)
    if longest > parts.MAX_TOKENS:
        raise ValueError(f"a caption takes {longest} tokens, the model {parts.MAX_TOKENS}")
    return tokenizer(
        texts, padding="max_length", max_length=parts.MAX_TOKENS, return_tensors="pt"
    ).input_ids


# The questions the text encoder learns to answer: background, then colour, shape and motion of the
# first and of the second thing.
_THING = (list(COLORS), list(SHAPES), list(MOTIONS))
_QUESTIONS = tuple([UNSAID, *names] for names in (list(BACKGROUNDS), *_THING, *_THING))


def answers_of(said: Scene) -> list[int]:
    """Returns what a caption says, as one index for each of `_QUESTIONS`."""
    answers = [said.background]
    for thing in said.things:
        answers += [thing.color, thing.shape, thing.motion]
    answers += [UNSAID] * (len(_QUESTIONS) - len(answers))
    return [names.index(answer) for names, answer in zip(_QUESTIONS, answers, strict=True)]


def train_text_encoder(
    settings: TrainingSettings, tokenizer, device: torch.device, log: Log
) -> T5EncoderModel:
    """Trains the encoder to tell at every token, also padding, all that a caption says.

    The denoising loss alone teaches the meaning of words slowly: the background and the noise
    themselves explain nearly all of it, and a caption moves it by a hundredth. Features that any
    token shows to a linear layer are there for the transformer from its first step. Returns float32
    weights that bfloat16 holds exactly; the linear layer is thrown away.
    """
    torch.manual_seed(settings.seed + 1)
    rng = random.Random(settings.seed + 1)
    text_encoder = parts.move(parts.make_text_encoder(), device)
    widths = [len(names) for names in _QUESTIONS]
    head = torch.nn.Linear(text_encoder.config.d_model, sum(widths), device=device)
    parameters = [*text_encoder.parameters(), *head.parameters()]
    optimizer, schedule = make_optimizer(
        parameters, settings.text_learning_rate, settings.text_steps
    )

    def ask(captions: list[tuple[str, Scene]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the cross entropy, and the share of tokens that answer every question right."""
        tokens = tokens_of(tokenizer, [text for text, _ in captions]).to(device)
        truth = torch.tensor([answers_of(said) for _, said in captions], device=device)
        truth = truth[:, None].expand(-1, parts.MAX_TOKENS, -1).flatten(0, 1)
        guesses = head(text_encoder(tokens)[0]).flatten(0, 1).split(widths, dim=1)
        losses = [F.cross_entropy(guess, truth[:, i]) for i, guess in enumerate(guesses)]
        loss = sum(losses, torch.zeros((), device=device))
        best = torch.stack([guess.argmax(dim=1) for guess in guesses], dim=1)
        return loss, (best == truth).all(dim=1).float().mean()

    for number in range(settings.text_steps):
        scenes = draw_training_scenes(settings, rng, settings.text_batch)
        loss, right = ask([write_caption(settings, scene, rng) for scene in scenes])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if number % 500 == 499 or number == settings.text_steps - 1:
            log.add("text", step=number + 1, loss=loss.item(), right=right.item())
    text_encoder = parts.freeze(text_encoder)
    with torch.no_grad():
        right = {
            name: ask([(prompt.text, prompt.scene) for prompt in prompts])[1].item()
            for name, prompts in (
                ("held_out_one_thing", held_out_captions(200)),
                ("held_out_two_things", two_thing_captions(200)),
            )
        }
    log.add("text", step=settings.text_steps, **right)
    return text_encoder


@torch.no_grad()
def encode_texts(texts: list[str], tokenizer, text_encoder: T5EncoderModel) -> torch.Tensor:
    """Returns embeddings [B, MAX_TOKENS, text width] in bfloat16, on the encoder's device."""
    tokens = tokens_of(tokenizer, texts).to(text_encoder.device)
    return torch.cat([text_encoder(chunk)[0].to(torch.bfloat16) for chunk in tokens.split(2048)])


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws the training videos and encodes them and their captions, in bfloat16 on the device.

    Returns:
        captions [videos, captions of a video, MAX_TOKENS, text width] and unscaled latents
        [videos, T, C, H, W].
    """
    rng = random.Random(settings.seed + 2)
    scenes = draw_training_scenes(settings, rng, settings.videos)
    texts = [
        write_caption(settings, scene, rng)[0]
        for scene in scenes
        for _ in range(settings.captions_per_video)
    ]
    captions = encode_texts(texts, tokenizer, text_encoder)
    captions = captions.unflatten(0, (settings.videos, settings.captions_per_video))
    return captions, encode_videos(scenes, vae, device, settings.seed + 3)


def train_denoiser(
    settings: TrainingSettings,
    tokenizer,
    text_encoder: T5EncoderModel,
    vae: AutoencoderKLCogVideoX,
    device: torch.device,
    log: Log,
    snapshot: Callable[[CogVideoXTransformer3DModel], None],
) -> None:
    """Trains the transformer on the mean square error of v.

    `snapshot` is called now and then, and at the end, with the averaged transformer; the
    autoencoder's `scaling_factor` is set here.
    """
    torch.manual_seed(settings.seed + 2)
    captions, latents = encode_training_data(settings, tokenizer, text_encoder, vae, device)
    empty = encode_texts([""], tokenizer, text_encoder)
    scale = 1 / latents[:4096].float().std().item()
    vae.register_to_config(scaling_factor=scale)
    log.add("latents", videos=settings.videos, scaling_factor=scale)

    transformer = parts.move(parts.make_transformer(), device)
    parameters = list(transformer.parameters())
    optimizer, schedule = make_optimizer(parameters, settings.learning_rate, settings.steps)
    ema = EMAModel(parameters, decay=settings.ema_decay, foreach=True)
    if device.type == "cuda":
        transformer.compile()  # 46 -> 23 ms a step of 256 on one H200, for 32 s of compilation
    signal = parts.make_scheduler().alphas_cumprod.to(device).float()
    # 5 latent frames are padded at the front to 6, the least multiple of the temporal patch; the
    # pipeline drops the first after denoising. Here the padding is a copy of the first frame.
    rotary = parts.rotary_embedding(parts.LATENT_FRAMES + 1, device)

    def step(
        clean: torch.Tensor, text: torch.Tensor, timestep: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        optimizer.zero_grad(set_to_none=True)
        clean = clean.float() * scale
        clean = torch.cat([clean[:, :1], clean], dim=1)
        noise = torch.randn_like(clean)
        keep = signal[timestep].sqrt()[:, None, None, None, None]
        lose = (1 - signal[timestep]).sqrt()[:, None, None, None, None]
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            v = transformer(
                hidden_states=keep * clean + lose * noise,
                encoder_hidden_states=text,
                timestep=timestep,
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
        text = torch.where(dropped, empty, captions[rows, which])
        batch = (latents[rows], text, draw_timesteps(settings.batch, device))
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

    train_denoiser(settings, tokenizer, text_encoder, vae, device, log, snapshot)


if __name__ == "__main__":
    main()
