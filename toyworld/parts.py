"""The five parts of the toy-world model, untrained: a CogVideoX 1.5 of a few million parameters.

Everything the architecture of 1.5 fixes is as published: patches of 2 in space and time, slice
RoPE, query and key norm, heads of 64, v-prediction with zero terminal SNR and trailing timesteps.
"""

import copy
import random
import tempfile
from collections import Counter
from pathlib import Path

import sentencepiece
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXSpatialNorm3D
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from toyworld.captions import all_things, draw_scene, full_caption, partial_caption
from toyworld.world import FRAMES, HEIGHT, WIDTH

MAX_TOKENS = 32
LATENT_CHANNELS = 12
LATENT_HEIGHT, LATENT_WIDTH = HEIGHT // 8, WIDTH // 8
LATENT_FRAMES = (FRAMES - 1) // 4 + 1
_PATCH, _PATCH_T, _HEADS, _HEAD_DIM, _TEXT_WIDTH = 2, 2, 4, 64, 128
_VOCABULARY = 128


def make_tokenizer(seed: int) -> T5Tokenizer:
    """Trains a case-insensitive sentencepiece unigram vocabulary on captions of the world.

    Single letters and digits are pieces too, so any other English word still has a spelling.
    """
    rng = random.Random(seed)
    things = all_things(held_out=False)
    lone = [draw_scene(rng, things, two=False) for _ in range(10_000)]
    pairs = [draw_scene(rng, things, two=True) for _ in range(10_000)]
    corpus = [full_caption(scene, rng) for scene in lone + pairs]
    corpus += [partial_caption(scene, rng)[0] for scene in lone]
    words = Counter("▁" + word.strip(",.") for caption in corpus for word in caption.split())
    with tempfile.TemporaryDirectory() as folder:
        # By default sentencepiece proposes only what occurs in several distinct words, so it
        # would spell "moves". These are complete words to consider as well.
        seeds = Path(folder) / "words.tsv"
        seeds.write_text("".join(f"{word}\t{count}\n" for word, count in words.most_common()))
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus),
            model_prefix=str(Path(folder) / "spiece"),
            model_type="unigram",
            seed_sentencepieces_file=str(seeds),
            vocab_size=_VOCABULARY,
            hard_vocab_limit=False,
            normalization_rule_name="nmt_nfkc_cf",
            required_chars="abcdefghijklmnopqrstuvwxyz0123456789.,'-!?",
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            num_threads=1,
            minloglevel=2,
        )
        return T5Tokenizer.from_pretrained(folder, extra_ids=0, model_max_length=MAX_TOKENS)


def make_text_encoder() -> T5EncoderModel:
    """Makes a two-layer T5 1.1 encoder (gated GELU) of 0.3 million parameters."""
    config = T5Config(
        vocab_size=_VOCABULARY,
        d_model=_TEXT_WIDTH,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return T5EncoderModel(config)


def make_vae() -> AutoencoderKLCogVideoX:
    """Makes an autoencoder of 4.9 million parameters, 8x8 in space and 4 in time.

    Against torch's defaults, whose convolutions shrink their input: unit gain everywhere, spatial
    norms that begin as plain group norms, and latents that begin with little noise. After 245 steps
    on small windows that is 19.3 dB against 18.0.
    """
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(24, 48, 64, 96),  # pyright: ignore[reportArgumentType]
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=8,
        sample_height=HEIGHT,
        sample_width=WIDTH,
        scaling_factor=1.0,
    )
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            torch.nn.init.zeros_(_bias_of(module))
    for module in vae.modules():
        if isinstance(module, CogVideoXSpatialNorm3D):
            torch.nn.init.zeros_(module.conv_y.conv.weight)
            torch.nn.init.ones_(_bias_of(module.conv_y.conv))
    last = vae.encoder.conv_out.conv
    torch.nn.init.zeros_(last.weight.data[LATENT_CHANNELS:])
    torch.nn.init.constant_(_bias_of(last).data[LATENT_CHANNELS:], -4.0)  # a deviation of 0.14
    return vae


def _bias_of(layer: torch.nn.Conv2d | torch.nn.Conv3d) -> torch.Tensor:
    assert layer.bias is not None
    return layer.bias


def make_transformer() -> CogVideoXTransformer3DModel:
    """Makes a transformer of 6 blocks and 4 heads, whose blocks start as the identity."""
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=_HEADS,
        attention_head_dim=_HEAD_DIM,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        time_embed_dim=64,
        text_embed_dim=_TEXT_WIDTH,
        num_layers=6,
        sample_width=LATENT_WIDTH,
        sample_height=LATENT_HEIGHT,
        sample_frames=FRAMES,
        patch_size=_PATCH,
        patch_size_t=_PATCH_T,
        max_text_seq_length=MAX_TOKENS,
        use_rotary_positional_embeddings=True,
        patch_bias=False,
    )
    gates = []
    for block in transformer.transformer_blocks:
        assert isinstance(block, CogVideoXBlock)
        gates += [block.norm1.linear, block.norm2.linear]
    for layer in (*gates, transformer.norm_out.linear, transformer.proj_out):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return transformer


def expand_transformer(text: CogVideoXTransformer3DModel) -> CogVideoXTransformer3DModel:
    """Makes an image-to-video transformer that starts as a text-to-video one.

    As CogVideoX1.5-5B-I2V it takes the picture's latents as further channels and has an `ofs`
    embedding. The columns of those channels and the end of that embedding start as zero.
    """
    config = {name: value for name, value in text.config.items() if name[0] != "_"} | {
        "in_channels": 2 * LATENT_CHANNELS,
        "ofs_embed_dim": text.config["time_embed_dim"],
    }
    transformer = CogVideoXTransformer3DModel.from_config(config)
    assert isinstance(transformer, CogVideoXTransformer3DModel)
    weights = text.state_dict()
    columns = weights["patch_embed.proj.weight"]  # channels are the outermost part of a patch
    weights["patch_embed.proj.weight"] = torch.cat([columns, torch.zeros_like(columns)], dim=1)
    missing, unexpected = transformer.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.startswith("ofs_embedding.") for name in missing), missing
    assert transformer.ofs_embedding is not None
    last = transformer.ofs_embedding.linear_2
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.zeros_(last.bias)
    return transformer


def make_scheduler() -> CogVideoXDPMScheduler:
    """Makes the noise scheduler that CogVideoX 1.5 publishes."""
    return CogVideoXDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        snr_shift_scale=1.0,
    )


def rotary_embedding(latent_frames: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Makes cosines and sines [S, D] for the tokens of `latent_frames`, as in the pipeline."""
    grid = (LATENT_HEIGHT // _PATCH, LATENT_WIDTH // _PATCH)
    cosines, sines = get_3d_rotary_pos_embed(
        embed_dim=_HEAD_DIM,
        crops_coords=None,
        grid_size=grid,
        temporal_size=latent_frames // _PATCH_T,
        grid_type="slice",
        max_size=grid,
        device=device,
    )
    return cosines, sines


def move[Part: torch.nn.Module](
    part: Part, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Part:
    """`part.to`, whose arguments transformers and diffusers do not declare."""
    return part.to(device=device, dtype=dtype)


def freeze[Part: torch.nn.Module](part: Part) -> Part:
    """Rounds the weights to bfloat16, keeps them as float32, and ends their training."""
    rounded = move(move(part, dtype=torch.bfloat16), dtype=torch.float32)
    return rounded.eval().requires_grad_(False)


def copy_in_bfloat16[Part: torch.nn.Module](part: Part) -> Part:
    """Returns a bfloat16 copy on the CPU; does not change the part."""
    return move(copy.deepcopy(part), "cpu", torch.bfloat16)


def save(
    folder: Path,
    tokenizer: T5Tokenizer,
    text_encoder: T5EncoderModel,
    vae: AutoencoderKLCogVideoX,
    transformer: CogVideoXTransformer3DModel,
) -> None:
    """Writes the parts in diffusers layout, weights in bfloat16."""
    CogVideoXPipeline(
        tokenizer,
        copy_in_bfloat16(text_encoder),
        copy_in_bfloat16(vae),
        copy_in_bfloat16(transformer),
        make_scheduler(),
    ).save_pretrained(folder)
