"""Stage 1: prompts to embeddings, with the model's T5 encoder on the CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.errors import checking_input
from runtime.open_folder import OpenFolder
from runtime.progress import Timings, working
from runtime.text import printable
from stages import condition, files, sections

if TYPE_CHECKING:
    import numpy as np

    from cogvideox.model.folder import ModelFolder
    from cogvideox.text.encoder import TextEncoder

_MAX_CHARACTERS = 20_000
_CLASSES = {
    "tokenizer": ("T5Tokenizer", "T5TokenizerFast"),
    "text_encoder": ("T5EncoderModel",),
}


@dataclasses.dataclass(frozen=True)
class EncodeOptions:
    """Options of stage 1, by the names of the command line.

    Attributes:
        prompt: one per video of the batch.
        max_sequence_length: tokens per prompt; None takes the model's.
        allow_unsupported: also take a number that the model was not trained for.
        dtype: "bfloat16" or "float32".
        condition: the image or video that the run starts from; None for text-to-video.
    """

    prompt: Sequence[str]
    model_id: str
    dtype: str
    output_dir: Path
    negative_prompt: str = ""
    max_sequence_length: int | None = None
    allow_unsupported: bool = False
    condition: condition.ConditionOptions | None = None


def check_prompts(prompts: Sequence[str], negative_prompt: str) -> None:
    """Checks the texts of a batch.

    Raises:
        ValueError: a prompt is empty, too long, or not valid Unicode.
    """
    if not all(prompt.strip() for prompt in prompts):
        raise ValueError("--prompt is empty; describe what the video shows")
    if sum(map(len, prompts)) > _MAX_CHARACTERS or len(negative_prompt) > _MAX_CHARACTERS:
        raise ValueError("--prompt or --negative_prompt is longer than 20,000 characters")
    for text in (*prompts, negative_prompt):
        if "\0" in text:
            raise ValueError("--prompt or --negative_prompt contains a NUL character")
        if not text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError("--prompt or --negative_prompt is not valid UTF-8")


def check(options: EncodeOptions) -> tuple[ModelFolder, int]:
    """Checks everything that needs no weights.

    Returns:
        The model, and the tokens per prompt.

    Raises:
        ValueError: the prompts, the output folder or the model cannot be used.
    """
    from cogvideox.model.folder import find_model, stored_tensors
    from cogvideox.model.settings import check_supported, text_tokens
    from runtime.json_files import read_json_object

    check_prompts(options.prompt, options.negative_prompt)
    files.check_output_folder(options.output_dir, files.EMBEDDINGS_FILE, files.CONFIG_FILE)
    parts = [*sections.PARTS[sections.ENCODE], *(["vae"] if options.condition else [])]
    model = find_model(options.model_id, parts)
    check_supported(model)
    for part, known in _CLASSES.items():
        if model.component_class(part) not in known:
            raise ValueError(
                f"the model's {part} is a {model.component_class(part)}, not a {known[0]}"
            )
    read_json_object(model.path / "text_encoder" / "config.json")
    read_json_object(model.path / "tokenizer" / "tokenizer_config.json")
    stored_tensors(model.path / "text_encoder")
    tokens = text_tokens(
        options.max_sequence_length, model.transformer, any_length=options.allow_unsupported
    )
    return model, tokens


def run(options: EncodeOptions) -> None:
    """Runs stage 1: checks, loads the text encoder, encodes, and writes the embeddings."""
    timings = Timings()
    condition.choose_device(options.condition)
    with timings.phase("start"), checking_input():
        model, tokens = check(options)
        source = condition.find_source(options.condition, model)
        pixels = None if source is None else source.read()
        with working("stage 1: importing torch and transformers"):
            import torch

            from cogvideox.text.encoder import check_weights, load_text_encoder
        check_weights(model)

    print("device: CPU, on which the text encoder always runs")
    with OpenFolder(options.output_dir) as folder:
        encoded = None
        if source is not None and pixels is not None:
            # Before the text encoder is loaded, so that memory never holds both.
            with timings.phase("encode"):
                encoder = condition.load_encoder(source.options, model, options.dtype)
                posterior = condition.encode(encoder, pixels, source.options, options.dtype)
                encoded = condition.Encoded(source, pixels[0], posterior)
                del encoder
        with timings.phase("load"), working("loading the text encoder"):
            text_encoder = load_text_encoder(model, getattr(torch, options.dtype))
        with timings.phase("run"), working("encoding"):
            tensors = embed(text_encoder, options, tokens)
        with timings.phase("save"):
            path = save(tensors, options, model, tokens, encoded)
        folder.check()
    print(f"{path}: {len(options.prompt)} prompt(s) of {tokens} tokens")
    if source is not None:
        found = source.condition
        print(
            f"{options.output_dir / files.CONDITIONS_FILE}: {found.kind} of {found.height}x"
            f"{found.width}, {found.frames} frame(s)"
        )
    timings.report(options.output_dir / "stage1_timings.json")


def embed(text_encoder: TextEncoder, options: EncodeOptions, tokens: int) -> dict[str, np.ndarray]:
    """Encodes the prompts; prints warnings about words that are unknown or beyond `tokens`.

    Returns:
        `prompt_embeds` and `negative_prompt_embeds`, each [B, tokens, text_dim].
    """
    from cogvideox.text.encoder import encode, known_words, unknown_words

    prompt_embeds, dropped = encode(text_encoder, list(options.prompt), tokens)
    negatives = [options.negative_prompt] * len(options.prompt)
    negative_prompt_embeds, negative_dropped = encode(text_encoder, negatives, tokens)
    lost = {"prompt": "; ".join(filter(None, dropped)), "negative_prompt": negative_dropped[0]}
    for name, words in lost.items():
        if words:
            print(
                f"warning: --{name} makes more than {tokens} tokens (an unusual word makes "
                f"several); dropped: {printable(words)!r}"
            )
    tokenizer = text_encoder.tokenizer
    for name, texts in (("prompt", options.prompt), ("negative_prompt", [options.negative_prompt])):
        unknown = [word for text in texts for word in unknown_words(tokenizer, text)]
        if unknown:
            words = printable(" ".join(dict.fromkeys(unknown)))
            known = known_words(tokenizer)
            knows = f"; it knows: {' '.join(known)}" if known else ""
            print(f"warning: --{name} has words that the model does not know: {words}{knows}")
    return {
        "prompt_embeds": files.to_numpy(prompt_embeds),
        "negative_prompt_embeds": files.to_numpy(negative_prompt_embeds),
    }


def save(
    tensors: dict[str, np.ndarray],
    options: EncodeOptions,
    model: ModelFolder,
    tokens: int,
    encoded: condition.Encoded | None = None,
) -> Path:
    """Writes the embeddings and this stage's section into `options.output_dir`.

    Args:
        encoded: the image or video, if there is one.
    """
    prompts = list(options.prompt)
    section = sections.make_section(
        {
            **({"conditions": condition.describe(encoded.source, model)} if encoded else {}),
            **sections.model_settings(model, sections.ENCODE),
            "prompt": prompts if len(prompts) > 1 else prompts[0],
            "negative_prompt": options.negative_prompt,
            "max_sequence_length": tokens,
            "dtype": options.dtype,
        },
        later_parts=sections.later_parts(model, sections.ENCODE),
        **(condition.made_with(encoded.source) if encoded else {}),
    )
    path = options.output_dir / files.EMBEDDINGS_FILE
    files.check_finite(tensors, sections.ENCODE)
    if encoded is not None:
        files.check_finite(encoded.posterior, sections.ENCODE)
        conditions = options.output_dir / files.CONDITIONS_FILE
        files.write_stage_file(conditions, sections.ENCODE, encoded.posterior, section)
        condition.save_preview(encoded.first_frame, options.output_dir)
    files.write_stage_file(path, sections.ENCODE, tensors, section)
    files.record_section(options.output_dir, sections.ENCODE, section, inherited=options.output_dir)
    return path
