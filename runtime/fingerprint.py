"""The hash of JSON values that names stage files, jobs and executables."""

import hashlib
import json


def fingerprint(value: object, *, compact: bool = False) -> str:
    """Returns the sha256, in hexadecimal, of a JSON value with sorted keys.

    Args:
        compact: hash the shortest ASCII form of the JSON. Job ids are defined with it; every
            other fingerprint uses Python's default separators and UTF-8.
    """
    if compact:
        text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    else:
        text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
