"""Moving artifacts between machines: any folder, bucket or Hugging Face repository fsspec reaches.

hf://owner/repository/path    gs://bucket/path    /mnt/shared/executables
"""

from pathlib import Path

import fsspec
import huggingface_hub

from runtime.artifacts import Refused, read_artifact
from runtime.files import atomic_path


def push(folder: Path, destination: str) -> list[str]:
    """Copies every whole artifact of `folder` that `destination` lacks.

    An executable goes before its manifest, so that nobody finds half an artifact.

    Returns:
        The names of the manifests copied.

    Raises:
        OSError: the destination cannot be written.
    """
    filesystem, root = fsspec.url_to_fs(destination)
    if destination.startswith("hf://"):
        huggingface_hub.create_repo("/".join(root.split("/")[:2]), exist_ok=True)
    filesystem.makedirs(root, exist_ok=True)
    copied = []
    for path in sorted(folder.glob("*.json")):
        if filesystem.exists(f"{root}/{path.name}"):
            continue
        try:
            artifact = read_artifact(path.name, lambda name: (folder / name).read_bytes())
        except Refused as refused:
            print(f"not pushed: {refused}")
            continue
        for name, data in artifact.files.items():
            # Where the file system can, a file appears when it is whole.
            with filesystem.transaction, filesystem.open(f"{root}/{name}", "wb") as stream:
                stream.write(data)
        copied.append(path.name)
    return copied


def pull(source: str, folder: Path) -> list[str]:
    """Copies every whole artifact of `source` that `folder` lacks.

    Returns:
        The names of the manifests copied.

    Raises:
        OSError: the source cannot be read, or the folder written.
    """
    filesystem, root = fsspec.url_to_fs(source)
    if not filesystem.isdir(root):
        raise FileNotFoundError(f"{source} is no folder")
    copied = []
    for remote in sorted(filesystem.glob(f"{root}/*.json")):
        manifest = Path(remote).name
        if (folder / manifest).exists():
            continue
        try:
            artifact = read_artifact(manifest, lambda name: filesystem.cat_file(f"{root}/{name}"))
        except Refused as refused:
            print(f"not pulled: {refused}")
            continue
        for name, data in artifact.files.items():
            with atomic_path(folder / name) as temporary:
                temporary.write_bytes(data)
        copied.append(manifest)
    return copied
