"""Encoding of prompts to T5 embeddings, on the CPU with transformers."""

import dataclasses

import torch
import transformers

from cogvideox.model.folder import ModelFolder, check_names_and_shapes, stored_tensors

# T5's own vocabulary has 32,100 pieces; a list of the words of one this small can be read.
_SMALL_VOCABULARY = 1000
_SAME_WEIGHT = {"shared.weight", "encoder.embed_tokens.weight"}


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
    check_names_and_shapes(used, expected, what="the text encoder")


def load_text_encoder(model: ModelFolder, dtype: torch.dtype) -> TextEncoder:
    """Loads `tokenizer/` and `text_encoder/` with the classes in model_index.json.

    transformers maps the safetensors files and converts tensor by tensor, so T5-XXL (9.5 GB in
    bfloat16) is in memory only once.
    """
    _silence_transformers()
    tokenizer = _class(model, "tokenizer").from_pretrained(model.path / "tokenizer")
    encoder = _class(model, "text_encoder").from_pretrained(
        model.path / "text_encoder", dtype=dtype, use_safetensors=True
    )
    return TextEncoder(tokenizer, encoder.eval())


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
    cut = tokenizer(
        prompts,
        padding="max_length",
        max_length=max_sequence_length,
        truncation=True,
        return_tensors="pt",
    )
    whole = tokenizer(prompts, verbose=False).input_ids
    # The end token takes the last position, so one more token than the excess is lost.
    dropped = [
        str(tokenizer.decode(ids[max_sequence_length - 1 : -1]))
        if len(ids) > max_sequence_length
        else ""
        for ids in whole
    ]
    with torch.no_grad():
        embeddings = encoder(cut.input_ids)[0]
    return embeddings.to(encoder.dtype), dropped


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
