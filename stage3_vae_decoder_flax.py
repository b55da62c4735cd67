#!/usr/bin/env python3
"""Stage 3: latents to video, with the VAE decoder in Flax NNX.

The arguments and files are those of stage3_vae_decoder.py; only the decoder differs.
"""

from runtime.exit_codes import run_script
from stage3_vae_decoder import parse_arguments, run

if __name__ == "__main__":
    run_script(lambda: run(parse_arguments(), "flax"))
