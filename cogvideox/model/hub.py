"""Files of Hugging Face repositories, from the network or from the hub's cache on this machine."""

from pathlib import Path


def names_a_folder(model_id: str) -> bool:
    """Returns whether a model id can only be a folder: hub ids are NAME or OWNER/NAME."""
    return model_id.startswith(("/", ".", "~")) or model_id.count("/") > 1


def download(option: str, hub_id: str, patterns: list[str], *, what: str) -> Path:
    """Returns a hub snapshot with the files of `patterns`.

    Args:
        option: of the command line that names the repository, for messages.
        what: what the user may have meant instead, such as "folder", for messages.

    Raises:
        ValueError: there is no such repository.
    """
    # Imported only here: importing the client takes as long as checking a folder.
    import huggingface_hub
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    ignored = ["*.bin", "*.pt", "*.msgpack", "*.h5"]
    try:
        return Path(
            huggingface_hub.snapshot_download(
                hub_id, allow_patterns=patterns, ignore_patterns=ignored
            )
        )
    except HFValidationError as error:
        raise ValueError(
            f"{option} {hub_id}: there is no such {what}, and it is no hub id such as OWNER/NAME"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"{option} {hub_id}: there is no such {what}, the hub cannot be reached, and its "
            f"cache on this machine lacks this model ({_first_line(error)})"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"{option} {hub_id}: there is no such {what}, and the hub does not give such a "
            f"model: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].removeprefix("Got: ")
