"""Trains the toy-world model from a seed and writes it in diffusers layout.

    python -m models.train_toyworld --output_dir models/toyworld

The autoencoder learns to draw the world, then to draw it from inexact latents too, and the text
encoder to tell what a caption says. A set of videos and captions is then encoded once, with the
final, bfloat16-rounded weights of both, and the transformer learns to denoise those latents. Losses
go to `training_log.json` beside the weights. On one H200 it takes about 20 minutes. The same seed
gives the same data, captions and initial weights, and each part draws its own, so a run taken up
with `--resume` sees what one run sees; GPU arithmetic is not bit-reproducible, so neither are the
weights.
"""

import argparse
import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLCogVideoX
from diffusers.training_utils import EMAModel
from transformers import T5EncoderModel, get_cosine_schedule_with_warmup

from models import parts
from models.captions import (
    UNSAID,
    all_things,
    corrupt,
    draw_scene,
    full_caption,
    held_out_captions,
    partial_caption,
    two_thing_captions,
)
from models.world import (
    BACKGROUNDS,
    COLORS,
    HEIGHT,
    MOTIONS,
    SHAPES,
    WIDTH,
    Scene,
    Scenes,
    render,
    scenes_of,
)


@dataclass(frozen=True)
class Recipe:
    """Everything the result depends on."""

    seed: int = 0
    vae_window_steps: int = 5000
    vae_window_batch: int = 8
    vae_steps: int = 2400
    vae_batch: int = 4
    vae_learning_rate: float = 2e-3
    kl_weight: float = 5e-4
    # The noise is the most that latents are given while the autoencoder is refined, over their own
    # deviation.
    refine_learning_rate: float = 1e-3
    steady_steps: int = 1800
    steady_noise: float = 0.5
    sharp_steps: int = 1400
    sharp_noise: float = 0.3
    text_steps: int = 2000
    text_batch: int = 128
    text_learning_rate: float = 2e-3
    videos: int = 80_000
    captions_per_video: int = 2
    steps: int = 36_000
    batch: int = 128
    learning_rate: float = 1e-3
    ema_decay: float = 0.999
    two_things: float = 0.40
    # Shares of the captions that guidance lives on: left out, incomplete, and wrong in one
    # attribute, as captions of real videos are. Guidance then sharpens what a caption means.
    dropped: float = 0.12
    partial: float = 0.15
    corrupted: float = 0.10


class Log:
    """Losses by phase, printed as they come and kept for the JSON file."""

    def __init__(self, recipe: Recipe) -> None:
        self.content: dict = {"recipe": asdict(recipe), "torch": torch.__version__}
        self._began = time.monotonic()

    def add(self, phase: str, **values: float) -> None:
        """Appends one row to a phase."""
        row = {"seconds": round(time.monotonic() - self._began, 1)}
        row |= {name: float(f"{value:.4g}") for name, value in values.items()}
        self.content.setdefault(phase, []).append(row)
        print(phase, json.dumps(row), flush=True)

    def write(self, folder: Path) -> None:
        """Writes `training_log.json`."""
        (folder / "training_log.json").write_text(json.dumps(self.content, indent=1) + "\n")


def draw_training_scenes(recipe: Recipe, rng: random.Random, n: int) -> list[Scene]:
    """n scenes without held-out things, a share of them with two things."""
    things = all_things(held_out=False)
    return [draw_scene(rng, things, two=rng.random() < recipe.two_things) for _ in range(n)]


def to_model(videos: torch.Tensor) -> torch.Tensor:
    """[B, F, H, W, 3] in 0..1 to the autoencoder's [B, 3, F, H, W] in -1..1."""
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


def train_vae(recipe: Recipe, device: torch.device, log: Log) -> AutoencoderKLCogVideoX:
    """Learns to draw the world; returns float32 weights that bfloat16 holds exactly.

    It begins on windows around the things, where a step shows more edges for its cost, and ends on
    whole frames, whose group norms have other statistics.
    """
    torch.manual_seed(recipe.seed)
    vae = parts.make_vae().to(device)
    total = recipe.vae_window_steps + recipe.vae_steps
    training = _optimizer(list(vae.parameters()), recipe.vae_learning_rate, total)
    draws = (random.Random(recipe.seed), torch.Generator().manual_seed(recipe.seed))
    for steps, batch, windowed in (
        (recipe.vae_window_steps, recipe.vae_window_batch, True),
        (recipe.vae_steps, recipe.vae_batch, False),
    ):
        _draw_and_learn(vae, recipe, training, draws, steps, batch, windowed, 0.0, log, "vae")
    return vae.to(torch.bfloat16).float().eval().requires_grad_(False)


def steady_vae(vae: AutoencoderKLCogVideoX, recipe: Recipe, log: Log) -> AutoencoderKLCogVideoX:
    """Teaches a trained autoencoder to draw the same from latents that are a little off.

    A denoiser's latents always are. Without this, noise of 0.13 of their deviation dents every
    outline, differently in each latent frame. Returns float32 weights that bfloat16 holds exactly.
    """
    vae.train().requires_grad_(True)
    return _refine(vae, recipe, recipe.steady_steps, recipe.steady_noise, 4, log, "steady_vae")


def sharpen_vae(vae: AutoencoderKLCogVideoX, recipe: Recipe, log: Log) -> AutoencoderKLCogVideoX:
    """Trains the decoder alone, on latents as far off as a good denoiser's, for sharper edges."""
    vae.train().requires_grad_(False)
    vae.decoder.requires_grad_(True)
    return _refine(vae, recipe, recipe.sharp_steps, recipe.sharp_noise, 5, log, "sharp_vae")


def _refine(
    vae: AutoencoderKLCogVideoX,
    recipe: Recipe,
    steps: int,
    noise: float,
    seed: int,
    log: Log,
    phase: str,
) -> AutoencoderKLCogVideoX:
    """Trains on whole frames what of a trained autoencoder requires gradients."""
    seed += recipe.seed
    torch.manual_seed(seed)
    parameters = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    training = _optimizer(parameters, recipe.refine_learning_rate, steps)
    draws = (random.Random(seed), torch.Generator().manual_seed(seed))
    _draw_and_learn(vae, recipe, training, draws, steps, recipe.vae_batch, False, noise, log, phase)
    return vae.to(torch.bfloat16).float().eval().requires_grad_(False)


def _draw_and_learn(
    vae: AutoencoderKLCogVideoX,
    recipe: Recipe,
    training: tuple,
    draws: tuple[random.Random, torch.Generator],
    steps: int,
    batch: int,
    windowed: bool,
    noise: float,
    log: Log,
    phase: str,
) -> None:
    """Trains on `steps` batches of fresh scenes, with up to `noise` on the latents.

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
            posterior = vae.encode(video).latent_dist
            latents = posterior.sample()
            # Noise in proportion to the latents: making them larger is no way out.
            level = noise * torch.rand(len(video), 1, 1, 1, 1, device=device)
            latents = latents + level * posterior.mean.std() * torch.randn_like(latents)
            drawn = vae.decode(latents).sample
        drawn, mean, logvar = drawn.float(), posterior.mean.float(), posterior.logvar.float()
        # The absolute error alone rests at "background everywhere", the median of every pixel.
        absolute, square = F.l1_loss(drawn, video), F.mse_loss(drawn, video)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        (absolute + 4 * square + recipe.kl_weight * kl).backward()
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
        scenes = scenes_of(draw_training_scenes(recipe, rng, batch), generator)
        video = render(scenes.to(device))
        video = to_model(windows(video, scenes, generator) if windowed else video).contiguous()
        run = run or recorded(step, video)
        measured = run(video)
        schedule.step()
        if number % 250 == 249 or number == steps - 1:
            row = {k: v.item() for k, v in measured.items()}
            log.add(phase, step=schedule.last_epoch, **row)


def recorded(step: Callable, *examples: torch.Tensor) -> Callable:
    """A training step as one CUDA graph: its thousands of small kernels are launched at once.

    Runs the step a few times on the examples, which is the warm-up that recording needs. Each
    replay overwrites the tensors that the one before it returned. On the CPU there is nothing to
    record, and the step itself is returned.
    """
    if examples[0].device.type != "cuda":
        return step
    fixed = [example.clone() for example in examples]
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step(*fixed)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        measured = step(*fixed)

    def replay(*inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        for place, value in zip(fixed, inputs, strict=True):
            place.copy_(value)
        graph.replay()
        return measured

    return replay


def _optimizer(parameters: list[torch.nn.Parameter], learning_rate: float, steps: int):
    """AdamW with warm-up and cosine decay. On a GPU the rate is a tensor, for recorded steps."""
    device = parameters[0].device
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.AdamW(
        parameters,
        lr=torch.tensor(learning_rate, device=device) if on_gpu else learning_rate,
        betas=(0.9, 0.99),
        weight_decay=0.01,
        fused=True,
        capturable=on_gpu,
    )
    return optimizer, get_cosine_schedule_with_warmup(optimizer, min(300, steps // 10), steps)


@torch.no_grad()
def encode_videos(
    scenes: list[Scene], vae: AutoencoderKLCogVideoX, device: torch.device, seed: int
) -> torch.Tensor:
    """Renders and encodes scenes: unscaled latents [B, T, C, H, W] in bfloat16, on the device."""
    generator = torch.Generator().manual_seed(seed)
    chunks = []
    for first in range(0, len(scenes), 64):
        batch = scenes_of(scenes[first : first + 64], generator).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            latents = vae.encode(to_model(render(batch))).latent_dist.mode()
        chunks.append(latents.transpose(1, 2).to(torch.bfloat16))
    return torch.cat(chunks)


def write_caption(recipe: Recipe, scene: Scene, rng: random.Random) -> tuple[str, Scene]:
    """A caption, sometimes incomplete, and what it says, which is sometimes wrong."""
    said = corrupt(scene, rng) if rng.random() < recipe.corrupted else scene
    if len(said.things) == 1 and rng.random() < recipe.partial:
        return partial_caption(said, rng)
    return full_caption(said, rng), said


def tokens_of(tokenizer, texts: list[str]) -> torch.Tensor:
    """Token ids [B, MAX_TOKENS]. Raises ValueError for a text that does not fit."""
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
    """What a caption says, as one index for each of `_QUESTIONS`."""
    answers = [said.background]
    for thing in said.things:
        answers += [thing.color, thing.shape, thing.motion]
    answers += [UNSAID] * (len(_QUESTIONS) - len(answers))
    return [names.index(answer) for names, answer in zip(_QUESTIONS, answers, strict=True)]


def train_text_encoder(recipe: Recipe, tokenizer, device: torch.device, log: Log) -> T5EncoderModel:
    """Learns to tell at every token, padding included, all that a caption says.

    The denoising loss alone teaches the meaning of words slowly: the background and the noise
    themselves explain nearly all of it, and a caption moves it by a hundredth. Features that any
    token shows to a linear layer are there for the transformer from its first step. Returns float32
    weights that bfloat16 holds exactly; the linear layer is thrown away.
    """
    torch.manual_seed(recipe.seed + 1)
    rng = random.Random(recipe.seed + 1)
    text_encoder = parts.make_text_encoder().to(device)
    widths = [len(names) for names in _QUESTIONS]
    head = torch.nn.Linear(text_encoder.config.d_model, sum(widths), device=device)
    parameters = [*text_encoder.parameters(), *head.parameters()]
    optimizer, schedule = _optimizer(parameters, recipe.text_learning_rate, recipe.text_steps)

    def ask(captions: list[tuple[str, Scene]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross entropy, and the share of tokens that answer every question right."""
        tokens = tokens_of(tokenizer, [text for text, _ in captions]).to(device)
        truth = torch.tensor([answers_of(said) for _, said in captions], device=device)
        truth = truth[:, None].expand(-1, parts.MAX_TOKENS, -1).flatten(0, 1)
        guesses = head(text_encoder(tokens)[0]).flatten(0, 1).split(widths, dim=1)
        loss = sum(F.cross_entropy(g, truth[:, i]) for i, g in enumerate(guesses))
        best = torch.stack([guess.argmax(dim=1) for guess in guesses], dim=1)
        return loss, (best == truth).all(dim=1).float().mean()

    for number in range(recipe.text_steps):
        scenes = draw_training_scenes(recipe, rng, recipe.text_batch)
        loss, right = ask([write_caption(recipe, scene, rng) for scene in scenes])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if number % 500 == 499 or number == recipe.text_steps - 1:
            log.add("text", step=number + 1, loss=loss.item(), right=right.item())
    text_encoder = text_encoder.to(torch.bfloat16).float().eval().requires_grad_(False)
    with torch.no_grad():
        right = {
            name: ask([(prompt.text, prompt.scene) for prompt in prompts])[1].item()
            for name, prompts in (
                ("held_out_one_thing", held_out_captions(200)),
                ("held_out_two_things", two_thing_captions(200)),
            )
        }
    log.add("text", step=recipe.text_steps, **right)
    return text_encoder


@torch.no_grad()
def encode_texts(texts: list[str], tokenizer, text_encoder: T5EncoderModel) -> torch.Tensor:
    """Embeddings [B, MAX_TOKENS, text width] in bfloat16, on the encoder's device."""
    tokens = tokens_of(tokenizer, texts).to(text_encoder.device)
    return torch.cat([text_encoder(chunk)[0].to(torch.bfloat16) for chunk in tokens.split(2048)])


def draw_timesteps(n: int, device: torch.device) -> torch.Tensor:
    """n timesteps in 0..999: a fifth uniform, the others around 730 (logit-normal, 500 to 880).

    Below 500 the object is plain to see and above 900 only the background is; colour, shape and
    motion are decided between.
    """
    uniform = torch.rand(n, device=device)
    central = torch.sigmoid(1 + torch.randn(n, device=device))
    share = torch.where(torch.rand(n, device=device) < 0.2, uniform, central)
    return (share * 1000).long().clamp(max=999)


def train_denoiser(
    recipe: Recipe,
    tokenizer,
    text_encoder: T5EncoderModel,
    vae: AutoencoderKLCogVideoX,
    device: torch.device,
    log: Log,
    snapshot: Callable[[torch.nn.Module], None],
) -> None:
    """Trains the transformer on the mean square error of v.

    `snapshot` is called now and then, and at the end, with the averaged transformer; the
    autoencoder's `scaling_factor` is set here.
    """
    torch.manual_seed(recipe.seed + 2)
    rng = random.Random(recipe.seed + 2)
    scenes = draw_training_scenes(recipe, rng, recipe.videos)
    texts = [
        write_caption(recipe, s, rng)[0] for s in scenes for _ in range(recipe.captions_per_video)
    ]
    captions = encode_texts(texts, tokenizer, text_encoder)
    captions = captions.unflatten(0, (recipe.videos, recipe.captions_per_video))
    empty = encode_texts([""], tokenizer, text_encoder)
    latents = encode_videos(scenes, vae, device, recipe.seed + 3)
    scale = 1 / latents[:4096].float().std().item()
    vae.register_to_config(scaling_factor=scale)
    log.add("latents", videos=recipe.videos, scaling_factor=scale)

    transformer = parts.make_transformer().to(device)
    parameters = list(transformer.parameters())
    optimizer, schedule = _optimizer(parameters, recipe.learning_rate, recipe.steps)
    ema = EMAModel(parameters, decay=recipe.ema_decay, foreach=True)
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
    for number in range(recipe.steps):
        rows = torch.randint(recipe.videos, (recipe.batch,), device=device)
        which = torch.randint(recipe.captions_per_video, (recipe.batch,), device=device)
        dropped = torch.rand(recipe.batch, 1, 1, device=device) < recipe.dropped
        text = torch.where(dropped, empty, captions[rows, which])
        batch = (latents[rows], text, draw_timesteps(recipe.batch, device))
        run = run or recorded(step, *batch)
        losses.append(run(*batch)["loss"].clone())
        schedule.step()
        ema.step(parameters)
        last = number == recipe.steps - 1
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="take the autoencoder and the text encoder that an earlier run left in the folder",
    )
    for name, default in asdict(Recipe()).items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    arguments = vars(parser.parse_args())
    folder, resume = arguments.pop("output_dir"), arguments.pop("resume")
    recipe = Recipe(**arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    log = Log(recipe)
    folder.mkdir(parents=True, exist_ok=True)

    tokenizer = parts.make_tokenizer(recipe.seed)
    if resume:
        earlier = json.loads((folder / "training_log.json").read_text())
        kept = ("vae", "steady_vae", "sharp_vae", "text")
        log.content |= {phase: earlier[phase] for phase in kept if phase in earlier}

    def keep(part: torch.nn.Module, name: str) -> None:
        parts.copy_in_bfloat16(part).save_pretrained(folder / name)
        log.write(folder)

    if "vae" in log.content:
        vae = AutoencoderKLCogVideoX.from_pretrained(folder / "vae", torch_dtype=torch.float32)
        vae = vae.to(device).eval().requires_grad_(False)
    else:
        vae = train_vae(recipe, device, log)
        keep(vae, "vae")
    for phase, refine in (("steady_vae", steady_vae), ("sharp_vae", sharpen_vae)):
        if phase not in log.content:
            vae = refine(vae, recipe, log)
            keep(vae, "vae")

    if "text" in log.content:
        text_encoder = T5EncoderModel.from_pretrained(
            folder / "text_encoder", dtype=torch.float32
        ).to(device)
        text_encoder = text_encoder.eval().requires_grad_(False)
    else:
        text_encoder = train_text_encoder(recipe, tokenizer, device, log)
        keep(text_encoder, "text_encoder")

    def snapshot(transformer: torch.nn.Module) -> None:
        parts.save(folder, tokenizer, text_encoder, vae, transformer)
        log.write(folder)

    train_denoiser(recipe, tokenizer, text_encoder, vae, device, log, snapshot)


if __name__ == "__main__":
    main()
