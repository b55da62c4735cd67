#!/usr/bin/env python3
"""Stage 3: latents to video, with the VAE decoder in Flax NNX.

The arguments and files are those of stage3_vae_decoder.py; only the decoder differs.
"""

import utils
from stage3_vae_decoder import parse_arguments, run

if __name__ == "__main__":
    utils.run_main(lambda: run(parse_arguments(), "flax"))
