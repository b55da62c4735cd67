"""Trains the toy world's text encoder, and encodes captions with it."""

import random

import torch
import torch.nn.functional as F
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
from toyworld.training import Log, TrainingSettings, draw_training_scenes, make_optimizer
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
