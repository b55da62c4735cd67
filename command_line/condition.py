"""The arguments of the image or video that a run starts from."""

from pathlib import Path

from command_line.parser import ArgumentParser


def add_condition(parser: ArgumentParser) -> None:
    """Adds the arguments of the image or video that a run starts from, except for its size."""
    parser.add_argument(
        "--image", type=Path, help="image that an image-to-video model starts from (PNG, JPEG ...)"
    )
    parser.add_argument(
        "--video",
        type=Path,
        help="video that a text-to-video model starts from: .mp4, .gif, .webp, .npy (uint8 or "
        "floats in 0..1, [F, height, width, 3]), or a folder of PNG frames",
    )
    parser.add_argument(
        "--image_fit",
        choices=("stretch", "crop"),
        default="stretch",
        help="how the image or video takes the size: stretch as diffusers, or cut its middle out",
    )
    parser.add_argument(
        "--size",
        choices=("auto",),
        help="the size of the model that is nearest in shape to the image or video",
    )
    parser.add_argument(
        "--encode_on",
        choices=("cpu", "devices"),
        help="where the VAE encodes (default: an image on the CPU, a video on the devices)",
    )
    add_encoder(parser)


def add_encoder(parser: ArgumentParser) -> None:
    """Adds the argument that chooses the VAE's encoder."""
    parser.add_argument(
        "--encoder", choices=("torchax", "flax"), default="torchax", help="VAE of stage 1"
    )
