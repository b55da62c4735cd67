"""Encoding of prompts to T5 embeddings, on the CPU with transformers."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers

from cogvideox.model.folder import ModelFolder, check_headers, stored_tensors
from runtime.errors import InputError
from runtime.json_files import read_json_object
from runtime.text import printable

# T5's own vocabulary has 32,100 pieces; a list of the words of one this small can be read.
_SMALL_VOCABULARY = 1000
_SAME_WEIGHT = {"shared.weight", "encoder.embed_tokens.weight"}
_MOST_LAYERS = 1024
_MOST_REASON = 300  # characters of a library's message


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """A model's tokenizer and T5 encoder."""

    tokenizer: transformers.PreTrainedTokenizerBase
    encoder: transformers.PreTrainedModel


def check_weights(model: ModelFolder) -> None:
    """Checks the encoder's weight headers against its config.

    transformers initialises missing weights at random and only warns. Extra weights, such as a
    decoder's, are ignored.

    Raises:
        ValueError: weights are missing or of the wrong shape; the message lists them.
    """
    _silence_transformers()
    encoder_class = _class(model, "text_encoder")
    _check_sizes(model.path / "text_encoder" / "config.json")
    with _reading(model.path / "text_encoder"):
        config = encoder_class.config_class.from_pretrained(model.path / "text_encoder")
        with torch.device("meta"):
            module = encoder_class(config)
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    stored = stored_tensors(model.path / "text_encoder")
    if stored.keys() & _SAME_WEIGHT:  # either of the two names is enough
        expected = {
            n: shape for n, shape in expected.items() if n in stored or n not in _SAME_WEIGHT
        }
    used = {name: stored[name] for name in stored.keys() & expected.keys()}
    check_headers(used, expected, what="the text encoder")


def load_text_encoder(model: ModelFolder, dtype: torch.dtype) -> TextEncoder:
    """Loads `tokenizer/` and `text_encoder/` with the classes in model_index.json.

    transformers maps the safetensors files and converts tensor by tensor, so T5-XXL (9.5 GB in
    bfloat16) is in memory only once.

    Raises:
        InputError: transformers cannot read the tokenizer or the encoder.
    """
    _silence_transformers()
    with _reading(model.path / "tokenizer"):
        tokenizer = _class(model, "tokenizer").from_pretrained(model.path / "tokenizer")
        _tokenize(tokenizer, ["a"], 2)  # the first use finds settings of a wrong type
    with _reading(model.path / "text_encoder"):
        encoder = _class(model, "text_encoder").from_pretrained(
            model.path / "text_encoder", dtype=dtype, use_safetensors=True
        )
    return TextEncoder(tokenizer, encoder.eval())


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Turns what a library raises for damaged files into an InputError."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # tokenizers raises plain Exceptions
        reason = printable(" ".join(str(error).split())[:_MOST_REASON]) or type(error).__name__
        raise InputError(f"transformers cannot read {folder}: {reason}") from error


def _check_sizes(path: Path) -> None:
    """Checks the numbers of T5's config that decide how many modules are built.

    Raises:
        ValueError: naming the key.
    """
    config = read_json_object(path)
    for name in ("num_layers", "num_decoder_layers", "num_heads", "d_kv"):
        value = config.get(name)
        if value is not None and not (type(value) is int and 1 <= value <= _MOST_LAYERS):
            shown = printable(str(value)[:80])
            raise ValueError(f"{path}: {name} must be from 1 to {_MOST_LAYERS}, not {shown}")


def _silence_transformers() -> None:
    """Turns off transformers' progress bars and warnings; this project reports the same itself."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _class(model: ModelFolder, part: str) -> type:
    return getattr(transformers, model.component_class(part))


def encode(
    text_encoder: TextEncoder, prompts: list[str], max_sequence_length: int
) -> tuple[torch.Tensor, list[str]]:
    """Encodes prompts as diffusers' `CogVideoXPipeline._get_t5_prompt_embeds` does.

    Padding is encoded and attended to, as in training.

    Args:
        prompts: B texts.
        max_sequence_length: S, tokens per prompt; prompts are padded or truncated to it.

    Returns:
        The embeddings [B, S, E] in the encoder's dtype, and the truncated words of each prompt
        ("" for none).
    """
    tokenizer, encoder = text_encoder.tokenizer, text_encoder.encoder
    cut, whole = _tokenize(tokenizer, prompts, max_sequence_length)
    # The end token takes the last position, so one more token than the excess is lost.
    dropped = [
        str(tokenizer.decode(ids[max_sequence_length - 1 : -1]))
        if len(ids) > max_sequence_length
        else ""
        for ids in whole
    ]
    with torch.no_grad():
        embeddings = encoder(cut)[0]
    return embeddings.to(encoder.dtype), dropped


def _tokenize(
    tokenizer: transformers.PreTrainedTokenizerBase, prompts: list[str], max_length: int
) -> tuple[torch.Tensor, list[list[int]]]:
    """Returns the tokens [B, max_length], padded or truncated, and all tokens of each prompt."""
    cut = tokenizer(
        prompts,
        padding="max_length",
        max_length=max_length,
        truncation=True,
        return_tensors="pt",
    )
    return cut.input_ids, tokenizer(prompts, verbose=False).input_ids


def known_words(tokenizer: transformers.PreTrainedTokenizerBase) -> list[str]:
    """The whole words in a small vocabulary, sorted; empty for one as large as T5's."""
    pieces = tokenizer.get_vocab()
    if len(pieces) > _SMALL_VOCABULARY:
        return []
    return sorted(piece[1:] for piece in pieces if piece.startswith("▁") and len(piece) > 2)


def unknown_words(tokenizer: transformers.PreTrainedTokenizerBase, text: str) -> list[str]:
    """The words of a text that the tokenizer cannot express.

    They hold a character that it lacks, or, if its vocabulary is small, are spelled letter by
    letter, which the model was never shown.
    """
    spells = bool(known_words(tokenizer))
    found = []
    for word in text.split():
        ids = tokenizer(word, add_special_tokens=False, verbose=False).input_ids
        pieces = [str(piece).lstrip("▁") for piece in tokenizer.convert_ids_to_tokens(ids)]
        letters = [piece for piece in pieces if piece.isalnum()]
        spelled = len(letters) > 1 and all(len(piece) == 1 for piece in letters)
        if tokenizer.unk_token_id in ids or (spells and spelled):
            found.append(word)
    return found
