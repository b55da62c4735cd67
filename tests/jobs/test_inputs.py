"""Jobs that start from an image: read beside the job file, hashed, resumed, shown, rerun."""

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file

import batch
from jobs import rerun
from jobs.jobfile import read_job_file
from runtime.exit_codes import run_main
from tests.jobs.test_batch import run
from tests.parity.test_conditions import picture
from tests.tiny_models import save_tiny_model

JOB = {"prompt": "A kite", "image": "pictures/a.png", "size": "16x24", "num_frames": 5, "steps": 1}


def test_a_batch_with_images(tmp_path: Path, capsys):
    sizes = {"sample_height": 4, "sample_width": 6, "sample_frames": 5}
    channels = (8, 8, 16)  # 4 pixels a latent
    model = save_tiny_model(
        tmp_path / "tiny", "1.0-rope", image_to_video=True, block_out_channels=channels, **sizes
    )
    (tmp_path / "pictures").mkdir()
    image = picture(tmp_path / "pictures/a.png", "RGB", (40, 30))
    cropped = JOB | {"image_fit": "crop", "size": "auto"}
    assert run(model, tmp_path, jobs=[JOB, cropped]) == 0
    folders = sorted((tmp_path / "out").glob("*/stage2_latents.safetensors"))
    first, second = (load_file(path)["latents"] for path in folders)
    assert (first != second).any()
    page = (tmp_path / "out/index.html").read_text()
    assert page.count('class="input"') == 2 and page.count("stage1_input.png") == 2
    assert run(model, tmp_path, jobs=[JOB, cropped]) == 0  # nothing is left to do
    assert "2 done, 0 failed" in capsys.readouterr().out

    video = folders[0].with_name("output_video.mp4")
    again = ["--dp=1", "--sp=1", "--tp=1", str(video), "--output_dir"]
    moved = image.rename(tmp_path / "moved.png")
    picture(tmp_path / "other.png", "RGB", (41, 30))
    for more, said in (
        ([], "name its place with --input"),
        (["--input", str(tmp_path / "other.png")], "is another file than before"),
    ):
        with pytest.raises(SystemExit):
            arguments = [*again, str(tmp_path / "no"), *more]
            run_main(lambda arguments=arguments: batch.rerun(batch.parse_rerun(arguments)))
        assert said in capsys.readouterr().err
    options = rerun.RerunOptions(video, input=moved)
    encoding, denoising, _ = rerun.stage_options(rerun.read_provenance(video), options, tmp_path)
    assert encoding.condition is not None and encoding.condition.image == moved
    assert encoding.condition.sha256 and encoding.condition.height == denoising.height == 16


@pytest.mark.parametrize("name", ["../a.png", "/etc/hostname", "link.png", "a\u0000.png"])
def test_images_outside_of_the_folder(name: str, tmp_path: Path):
    (tmp_path / "jobs").mkdir()
    (tmp_path / "a.png").touch()
    (tmp_path / "jobs/link.png").symlink_to(tmp_path / "a.png")
    file = tmp_path / "jobs/jobs.jsonl"
    file.write_text(json.dumps({"prompt": "A kite", "image": name}))
    _, problems = read_job_file(file, lambda _: pytest.fail("the line was read"))
    assert len(problems) == 1 and ("lies outside" in problems[0][1] or "NUL" in problems[0][1])


def test_another_folder_of_inputs(tmp_path: Path):
    (tmp_path / "jobs").mkdir()
    file = tmp_path / "jobs/jobs.jsonl"
    file.write_text(json.dumps({"prompt": "A kite", "image": "../a.png"}))
    seen = []

    def parse(settings):
        seen.append(settings["image"])
        raise ValueError("seen")

    read_job_file(file, parse, None, tmp_path)
    assert seen == [str(tmp_path.resolve() / "a.png")]
