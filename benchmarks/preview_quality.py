"""What previews cost a step of stage 2, and how near they come to the final video.

The small shipped model in float32. Each preview is compared with the final video, averaged over the
pixels and frames that a latent value stands for. Prints JSON.

    python benchmarks/preview_quality.py --videos 8
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from cogvideox.video.metrics import mean_squared_error, psnr
from cogvideox.video.preview import pictures_of, read_factors, small_frames
from runtime.exit_codes import run_script
from stages.pipeline import Pipeline, Settings, Step
from stages.preview import FACTORS_FILE, Previews
from toyworld.captions import all_things, draw_scene, full_caption

MODEL = Path(__file__).resolve().parents[1] / "models/toyworld"


class _Timed(Previews):
    """Previews that note how long the loop waits for them."""

    seconds: list[float]

    def show(self, state, total):  # noqa: ANN001
        start = time.perf_counter()
        super().show(state, total)
        self.seconds.append(time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--videos", type=int, default=8)
    parser.add_argument("--steps", type=int, default=25)
    arguments = parser.parse_args()
    steps, rng = arguments.steps, random.Random(0)
    pipeline = Pipeline(str(MODEL), dtype="float32")
    factors = read_factors(MODEL / FACTORS_FILE)
    by_share: dict[str, list[float]] = {"quarter": [], "half": [], "three quarters": []}
    wanted = {steps // 4: "quarter", steps // 2: "half", 3 * steps // 4: "three quarters"}
    stamps, shows = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.videos):
            text = full_caption(draw_scene(rng, all_things(True), number % 2 == 1), rng)
            seen: dict[int, np.ndarray] = {}
            timed = _Timed(Path(folder), factors, 1, 0, 4.0)
            timed.seconds = shows

            def progress(step: Step, seen=seen, timed=timed) -> None:
                stamps.append((step.done, time.perf_counter()))
                timed.show(step.state, step.total)
                if step.done in wanted:
                    seen[step.done] = step.preview()

            settings = Settings(seed=number, num_inference_steps=steps)
            embeddings = pipeline.encode(text)
            with timed:
                latents = pipeline.denoise(embeddings, settings, progress=progress)
            final = small_frames(pipeline.decode(latents), latents.shape[2], 8)
            for done, picture in seen.items():
                by_share[wanted[done]].append(mean_squared_error(picture / 255, final))
            best = mean_squared_error(pictures_of(latents[0], factors) / 255, final)
            by_share.setdefault("end", []).append(best)
    each = [b[1] - a[1] for a, b in zip(stamps, stamps[1:], strict=False) if b[0] == a[0] + 1]
    step_ms, show_ms = 1000 * statistics.median(each), 1000 * statistics.median(shows)
    print(json.dumps({
        "step_ms": round(step_ms, 2),
        "preview_ms": round(show_ms, 3),
        "share_of_a_step": round(show_ms / step_ms, 4),
        "psnr_db": {name: round(psnr(float(np.mean(e))), 1) for name, e in by_share.items()},
        "worst_psnr_db_at_half": round(psnr(max(by_share["half"])), 1),
    }, indent=2))  # fmt: skip


if __name__ == "__main__":
    run_script(main)
