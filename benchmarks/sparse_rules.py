"""What rules of sparse attention cost on the small model: PSNR, and captions obeyed, by density.

    python benchmarks/sparse_rules.py --captions 8 --json
    python benchmarks/sparse_rules.py --captions 8 --published_blocks --json

A frame of the small model has 6 rows of 10 tokens and fits one chunk of 128, so with the blocks
that stage 2 takes (--published_blocks) only rules that drop whole frames leave anything out.
Without it, blocks of one row take their place, and rules act on rows as they do at published sizes.
Those blocks are for this measurement alone: no kernel takes them.
"""

import argparse
import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from ablation import ROOT, Prompt, Row, Runner, blocks_of, compare, find_prompts, is_obeyed

# Reaches by distance of the frames, of 3 frames of 6 rows; the defaults of stage 2 are the last
# that keep any row of all frames.
RULES: dict[str, list[int | str]] = {
    "all": ["all"],
    "neighbouring frames": ["all", "all", "none"],
    "frame, 2 rows of others": ["all", 2],
    "frame, 1 row of others": ["all", 1],
    "frame, 2 rows, own row": ["all", 2, 0],
    "frame, own row of others": ["all", 0],
    "1 row of every frame": [1],
    "own frame only": ["all", "none"],
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--captions", type=int, default=8, help="held-out captions")
    parser.add_argument("--published_blocks", action="store_true", help="blocks that stage 2 takes")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    return parser.parse_args()


def rows_as_blocks(grid: tuple[int, int, int], text: int) -> Any:
    """The tiling whose chunks and tiles are single rows, without padding."""
    from cogvideox.transformer.tiling import Tiling

    return Tiling(grid, text, columns=False, lines=1, chunk=grid[2], tile_chunks=1)


def measure(runner: Runner, prompts: list[Prompt], exact: list[Any], name: str) -> dict[str, Any]:
    """One row of the table: a rule for all heads, after the default dense steps and layers."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rules.json"
        path.write_text(json.dumps({"rules": {"rule": RULES[name]}, "heads": "rule"}))
        checked = runner.check(Row(name, "rules", {"sparse_attention": str(path)}), None)
    videos = list(runner.run(checked))
    scores = [compare(a.frames, b.frames) for a, b in zip(exact, videos, strict=True)]
    obeyed = [
        is_obeyed(video.frames, prompt) for video, prompt in zip(videos, prompts, strict=True)
    ]
    return {
        "rule": name,
        "reach": RULES[name],
        "blocks": blocks_of(checked),
        "psnr": round(sum(min(score["psnr"], 150) for score in scores) / len(scores), 2),
        "psnr_min": round(min(score["psnr"] for score in scores), 2),
        "ssim": round(sum(score["ssim"] for score in scores) / len(scores), 4),
        "obeyed": sum(obeyed),
    }


def main() -> None:
    arguments = parse_arguments()
    small = argparse.Namespace(
        model_id=str(ROOT / "models/toyworld"), captions=arguments.captions, prompts=None,
        dtype="float32", num_inference_steps=None, scheduler=None, height=None, width=None,
        num_frames=None,
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        if not arguments.published_blocks:
            patch = mock.patch("cogvideox.denoising.program.choose_tiling", rows_as_blocks)
            stack.enter_context(patch)
            stack.enter_context(mock.patch("splash_attention.block_lists._LANES", 1))
        prompts = find_prompts(small)
        runner = Runner(small, prompts)
        exact = list(runner.run(runner.exact))
        rows: list[dict[str, Any]] = []
        for name in RULES:
            rows.append(measure(runner, prompts, exact, name))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        kept = [is_obeyed(one.frames, prompt) for one, prompt in zip(exact, prompts, strict=True)]
    report = {"captions": len(prompts), "obeyed_of_exact": sum(kept), "rows": rows}
    print(json.dumps(report, indent=1 if arguments.json else None))


if __name__ == "__main__":
    main()
