"""What an encoded image or video adds to a run: the latents of the image, or the start of the loop.

Source: `prepare_latents` of diffusers' CogVideoXImageToVideoPipeline and
CogVideoXVideoToVideoPipeline. Both draw the sample of the posterior first, from the generator that
then draws the noise.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

from cogvideox.denoising.scheduler import Schedule
from cogvideox.model.config import VaeConfig
from cogvideox.model.settings import LatentShape


class Start(NamedTuple):
    """Latents [B, T, C, H, W] in the run's dtype: of step 0, and those of the image if any."""

    latents: np.ndarray
    image: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Conditioning:
    """The posterior of an image or a video; see `stages/condition.py`.

    Attributes:
        kind: "image" for image-to-video, "video" for video-to-video.
        mean, std: [1, C, T, H, W] in the run's dtype; every video of a batch draws its own sample.
        scale: factor of a sample.
    """

    kind: Literal["image", "video"]
    mean: np.ndarray
    std: np.ndarray
    scale: float

    @classmethod
    def of(
        cls, kind: Literal["image", "video"], mean: np.ndarray, std: np.ndarray, vae: VaeConfig
    ) -> "Conditioning":
        """Makes it with the VAE's scale.

        Image-to-video models of CogVideoX 1.5 were trained on latents that were divided by the
        factor; video-to-video always multiplies.
        """
        inverted = kind == "image" and vae.invert_scale_latents
        return cls(kind, mean, std, 1 / vae.scaling_factor if inverted else vae.scaling_factor)

    def draws(self, batch: int) -> list[tuple[int, ...]]:
        """Returns the shapes of the draws that come before the noise."""
        return [self.mean.shape] * batch

    def start(self, draws: Iterator[np.ndarray], latents: LatentShape, schedule: Schedule) -> Start:
        """Takes the samples' draws and the initial noise; returns the start of the loop.

        Args:
            draws: result of `NoiseSource.draw` with `before=self.draws(latents.batch)`.
            latents: shape of the run.
            schedule: of the run.
        """
        samples = [self.mean + self.std * next(draws) for _ in range(latents.batch)]
        noise = next(draws)
        encoded = np.concatenate(samples).swapaxes(1, 2)
        encoded = (encoded.astype(np.float32) * np.float32(self.scale)).astype(self.mean.dtype)
        if self.kind == "video":
            return Start(_add_noise(encoded, noise, schedule), None)
        # The first latent frame is a padding frame if there are any: models were trained so.
        image = np.zeros(latents.sizes, encoded.dtype)
        image[:, :1] = encoded
        return Start(noise, image)


def _add_noise(encoded: np.ndarray, noise: np.ndarray, schedule: Schedule) -> np.ndarray:
    """Adds noise of the first timestep; rounds alpha to the dtype before its root, as diffusers.

    Source: CogVideoXDPMScheduler.add_noise and CogVideoXDDIMScheduler.add_noise.
    """
    assert schedule.start_alpha is not None
    alpha = np.asarray(schedule.start_alpha).astype(encoded.dtype)
    return np.sqrt(alpha) * encoded + np.sqrt(alpha.dtype.type(1) - alpha) * noise
