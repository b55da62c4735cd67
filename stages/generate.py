"""The three stages in one process: prompt -> embeddings -> latents -> frames."""

from __future__ import annotations

import dataclasses

from runtime import processes
from runtime.errors import checking_input
from stages import condition, decode, denoise, encode, files


def run(
    encoding: encode.EncodeOptions,
    denoising: denoise.DenoiseOptions,
    decoding: decode.DecodeOptions,
) -> None:
    """Runs the stages in the output folder of the first.

    Everything that stages 2 and 3 would refuse is refused before stage 1 loads its 9.5 GB.
    """
    from cogvideox.model.folder import MODEL_PARTS, find_model

    folder = encoding.output_dir
    denoising = dataclasses.replace(denoising, input_dir=folder, output_dir=folder)
    decoding = dataclasses.replace(decoding, input_dir=folder)
    with checking_input():
        files.check_executables(denoising.executables)
        find_model(encoding.model_id, MODEL_PARTS)
        model, tokens = encode.check(encoding)
        source = condition.find_source(encoding.condition, model)
        found = source.condition if source else None
        checked = denoise.check(denoising, model, len(encoding.prompt), tokens, found)
        decode.check(decoding, model, checked.latents_shape, decoding.fps or checked.settings.fps)

    if processes.is_first():
        with processes.alone():
            encode.run(encoding)
    denoise.run(denoising)
    decode.run(decoding)
