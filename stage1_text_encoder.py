#!/usr/bin/env python3
"""Stage 1: prompts to T5 embeddings, on the CPU.

Writes stage1_embeddings.safetensors and generation_config.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import utils
from runtime.errors import checking_input
from runtime.progress import Timings
from stages import files as stage_files
from utils import ArgumentParser

if TYPE_CHECKING:
    import numpy as np

    from cogvideox.model.folder import ModelFolder
    from cogvideox.text.encoder import TextEncoder

STAGE = "stage1_text_encoder"
_CLASSES = {
    "tokenizer": ("T5Tokenizer", "T5TokenizerFast"),
    "text_encoder": ("T5EncoderModel",),
}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(
        "Encodes a prompt with the model's T5 encoder, on the CPU.",
        '  python stage1_text_encoder.py --prompt "A panda plays guitar in a bamboo forest"\n'
        '  python stage1_text_encoder.py --prompt "A red kite" --negative_prompt "blurry" \\\n'
        "      --model_id ./my-cogvideox --output_dir runs/kite",
    )
    add_prompt(parser)
    add_arguments(parser)
    utils.add_model(parser, default=utils.DEFAULT_MODEL)
    utils.add_dtype(parser)
    parser.add_argument(
        "--output_dir", type=Path, default=utils.DEFAULT_FOLDER, help="folder for the stage files"
    )
    return parser.parse_args(argv)


def add_prompt(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--prompt",
        action="append",
        required=True,
        help="what the video shows; give it again for a batch of videos",
    )


def add_arguments(parser: ArgumentParser) -> None:
    """The arguments that only this stage has, but for the prompt."""
    parser.add_argument(
        "--negative_prompt", default="", help="what classifier-free guidance leads away from"
    )
    parser.add_argument(
        "--max_sequence_length",
        type=utils.integer(1, 4096),
        help="tokens per prompt (default: the model's, 226 for the published ones)",
    )


def check_prompts(prompts: list[str], negative_prompt: str) -> None:
    """Raises ValueError for texts that say nothing, are too long or are no Unicode."""
    if not all(prompt.strip() for prompt in prompts):
        raise ValueError("--prompt is empty; describe what the video shows")
    if sum(map(len, prompts)) > 20_000 or len(negative_prompt) > 20_000:
        raise ValueError("--prompt or --negative_prompt is longer than 20,000 characters")
    for text in (*prompts, negative_prompt):
        if "\0" in text:
            raise ValueError("--prompt or --negative_prompt holds a NUL character")
        if not text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError("--prompt or --negative_prompt is not valid UTF-8")


def check(arguments: argparse.Namespace) -> tuple[ModelFolder, int]:
    """The model, and the tokens per prompt; raises ValueError for what cannot be encoded."""
    from cogvideox.model.config import read_json
    from cogvideox.model.folder import find_model, stored_tensors
    from cogvideox.model.settings import text_tokens

    check_prompts(arguments.prompt, arguments.negative_prompt)
    stage_files.check_output_folder(arguments.output_dir, stage_files.EMBEDDINGS_FILE)
    model = find_model(arguments.model_id, ["tokenizer", "text_encoder"])
    for part, known in _CLASSES.items():
        if model.component_class(part) not in known:
            raise ValueError(
                f"the model's {part} is a {model.component_class(part)}, not a {known[0]}"
            )
    read_json(model.path / "text_encoder" / "config.json")
    read_json(model.path / "tokenizer" / "tokenizer_config.json")
    stored_tensors(model.path / "text_encoder")
    return model, text_tokens(arguments.max_sequence_length, model.transformer)


def embed(
    text_encoder: TextEncoder, arguments: argparse.Namespace, tokens: int
) -> dict[str, np.ndarray]:
    """The tensors of this stage's file; warns of words that do not fit into `tokens`."""
    from cogvideox.text.encoder import encode

    prompt_embeds, dropped = encode(text_encoder, arguments.prompt, tokens)
    negatives = [arguments.negative_prompt] * len(arguments.prompt)
    negative_prompt_embeds, negative_dropped = encode(text_encoder, negatives, tokens)
    for name, words in [("prompt", "; ".join(filter(None, dropped)))] + [
        ("negative_prompt", negative_dropped[0])
    ]:
        if words:
            print(f"warning: --{name} is longer than {tokens} tokens; lost: {words!r}")
    return {
        "prompt_embeds": stage_files.to_numpy(prompt_embeds),
        "negative_prompt_embeds": stage_files.to_numpy(negative_prompt_embeds),
    }


def save(
    tensors: dict[str, np.ndarray], arguments: argparse.Namespace, model: ModelFolder, tokens: int
) -> Path:
    """Writes this stage's file and section into `arguments.output_dir`."""
    section = stage_files.make_section(
        {
            "model_id": model.model_id,
            "revision": model.revision,
            "prompt": arguments.prompt if len(arguments.prompt) > 1 else arguments.prompt[0],
            "negative_prompt": arguments.negative_prompt,
            "max_sequence_length": tokens,
            "dtype": arguments.dtype,
        }
    )
    path = arguments.output_dir / stage_files.EMBEDDINGS_FILE
    stage_files.check_finite(tensors, STAGE)
    stage_files.write_stage_file(path, STAGE, tensors, section)
    stage_files.record_section(arguments.output_dir, STAGE, section, inherited=arguments.output_dir)
    return path


def run(arguments: argparse.Namespace) -> None:
    with checking_input():
        model, tokens = check(arguments)

        from cogvideox.text.encoder import check_weights, load_text_encoder

        check_weights(model)

    timings = Timings()
    with timings.phase("load"):
        import torch

        text_encoder = load_text_encoder(model, getattr(torch, arguments.dtype))
    with timings.phase("run"):
        tensors = embed(text_encoder, arguments, tokens)
    with timings.phase("save"):
        path = save(tensors, arguments, model, tokens)
    print(f"{path}: {len(arguments.prompt)} prompt(s) of {tokens} tokens")
    timings.report(arguments.output_dir / "stage1_timings.json")


if __name__ == "__main__":
    utils.run_main(lambda: run(parse_arguments()))
