"""Ways to damage files: JSON, safetensors, and what a path can be instead of a file."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

Json = dict | list | str | int | float | bool | None
_RAW = "@@RAW@@"

# JSON texts that replace a value.
VALUES = {
    "null": "null",
    "true": "true",
    "zero": "0",
    "minus one": "-1",
    "a fraction": "1.5",
    "a billion": "1000000000",
    "1e308": "1e308",
    "1e999": "1e999",
    "NaN": "NaN",
    "-Infinity": "-Infinity",
    "an integer of 400 digits": "1" * 400,
    "an integer of 5000 digits": "1" * 5000,
    "an empty string": '""',
    "a string": '"x"',
    "a digit in a string": '"4"',
    "a string of 2 MB": '"' + "x" * 2_000_000 + '"',
    "a lone surrogate": '"\\ud800"',
    "a NUL character": '"a\\u0000b"',
    "a terminal escape": '"\\u001b[31mred\\u0007"',
    "lines": '"a\\nb\\r\\nc"',
    "a path outside": '"../../../../etc/passwd"',
    "/dev/zero": '"/dev/zero"',
    "an option": '"--help"',
    "an empty list": "[]",
    "an empty object": "{}",
    "a nested list": "[[[]]]",
    "an object": '{"a": {"b": 1}}',
    "a list 100 deep": "[" * 100 + "]" * 100,
    "a list 100000 deep": "[" * 100_000 + "]" * 100_000,
    "objects 50000 deep": '{"a":' * 50_000 + "1" + "}" * 50_000,
}


def paths(value: Json, path: tuple = ()) -> Iterator[tuple]:
    """Returns the path of every value in a JSON document, the root first."""
    yield path
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    for key, child in items:
        yield from paths(child, (*path, key))


def at(document: Json, path: tuple) -> Json:
    for key in path:
        document = document[key]  # type: ignore[index, call-overload]
    return document


def replaced(document: Json, path: tuple, text: str) -> bytes:
    """Returns the document with the JSON `text` at `path`."""
    document = json.loads(json.dumps(document))
    if not path:
        return text.encode("utf-8", "surrogatepass")
    at(document, path[:-1])[path[-1]] = _RAW  # type: ignore[index, call-overload]
    whole = json.dumps(document, indent=2, ensure_ascii=False)
    return whole.replace(json.dumps(_RAW), text).encode("utf-8", "surrogatepass")


def damaged_json(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    """Damages a JSON file by one change of its values, its structure or its bytes."""
    document = json.loads(content)
    kind = rng.random()
    if kind < 0.55:
        path = rng.choice(list(paths(document)))
        name = rng.choice(list(VALUES))
        return replaced(document, path, VALUES[name]), f"{_dotted(path)} is {name}"
    if kind < 0.75:
        return _damaged_structure(rng, document)
    return damaged_text(rng, content)


def _damaged_structure(rng: random.Random, document: Json) -> tuple[bytes, str]:
    inner = [path for path in paths(document) if path]
    path = rng.choice(inner)
    parent, value = at(document, path[:-1]), at(document, path)
    name = _dotted(path)
    how = rng.randrange(7)
    if how == 0:
        del parent[path[-1]]  # type: ignore[attr-defined]
        return json.dumps(document).encode(), f"{name} is missing"
    if how == 1:
        return replaced(document, path, json.dumps([value])), f"{name} is in a list"
    if how == 2:
        return replaced(document, path, json.dumps({"value": value})), f"{name} is in an object"
    if how == 3:
        return replaced(document, path, json.dumps(str(value))), f"{name} is in a string"
    if how == 4:
        objects = [p for p in paths(document) if isinstance(at(document, p), dict)]
        path = rng.choice(objects)
        values = list(at(document, path).values())  # type: ignore[union-attr]
        return replaced(document, path, json.dumps(values)), f"{_dotted(path)} is a list"
    objects = [p for p in paths(document) if isinstance(at(document, p), dict) and at(document, p)]
    path = rng.choice(objects)
    owner = at(document, path)
    key = rng.choice(list(owner))  # type: ignore[arg-type]
    members = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in owner.items()]  # type: ignore
    if how == 5:  # the last one counts in Python
        other = rng.choice(["null", "7", '"other"', json.dumps(owner[key])])  # type: ignore
        members.append(f"{json.dumps(key)}: {other}")
        what = f"{_dotted((*path, key))} is there twice, the second time {other[:20]}"
    else:
        members.append(f'"{key}_": 1')
        what = f"{_dotted((*path, key))}_ is new"
    return replaced(document, path, "{" + ", ".join(members) + "}"), what


def damaged_text(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    """Damages the bytes of a text file."""
    position = rng.randrange(max(1, len(content)))
    options: list[Callable[[], tuple[bytes, str]]] = [
        lambda: (content[:position], f"truncated at {position}"),
        lambda: (b"", "empty"),
        lambda: (b" \n\n ", "blank"),
        lambda: (content.decode().encode("utf-16"), "in UTF-16"),
        lambda: (content.decode().encode("utf-32"), "in UTF-32"),
        lambda: (b"\xef\xbb\xbf" + content, "with a byte order mark"),
        lambda: (flipped(content, position, rng.randrange(8)), f"bit flipped at {position}"),
        lambda: (content[:position] + b"\xff" + content[position:], f"0xff at {position}"),
        lambda: (content[:position] + b"\0" + content[position:], f"NUL at {position}"),
        lambda: (rng.randbytes(200), "random bytes"),
        lambda: (content + content, "written twice"),
        lambda: (content + b"}", "with a brace more"),
        lambda: (b"// comment\n" + content, "with a comment"),
        lambda: (content.replace(b'"', b"'"), "in single quotes"),
        lambda: (b"[" * 200_000, "200000 brackets"),
        lambda: (b"\0" * len(content), "zeros, as after a crash"),
        lambda: (b"[" + content + b"]", "in a list"),
        lambda: (b" " * 30_000_000 + content, "after 30 MB of blanks"),
    ]
    return rng.choice(options)()


def flipped(content: bytes, position: int, bit: int) -> bytes:
    damaged = bytearray(content)
    if damaged:
        damaged[position] ^= 1 << bit
    return bytes(damaged)


def not_a_file(rng: random.Random, path: Path) -> str:
    """Puts at `path` something other than a regular file, or a file too large to read."""
    kept = path.with_name(f"{path.name}.kept")
    path.rename(kept)
    kinds = ["fifo", "folder", "loop", "dangling", "zero", "null", "socket", "terabyte"]
    kinds += ["gigabytes", "link to fifo", "link to folder", "missing", "link"]
    kind = rng.choice(kinds)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    elif kind == "null":
        path.symlink_to("/dev/null")
    elif kind == "socket":
        _make_socket(path)
    elif kind in ("terabyte", "gigabytes"):
        shutil.copyfile(kept, path)
        os.truncate(path, 1 << 40 if kind == "terabyte" else 3 << 30)
    elif kind == "link to fifo":
        os.mkfifo(path.with_name("fifo"))
        path.symlink_to("fifo")
    elif kind == "link to folder":
        path.symlink_to(".")
    elif kind == "link":  # good content: the result is right or the link refused
        path.symlink_to(kept.name)
    return f"is a {kind}"


def _make_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # addresses are limited to 108 bytes
    try:
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(path.name)
    finally:
        os.chdir(here)


# Safetensors -------------------------------------------------------------------------------------

# A dtype, and others of the same size.
_SAME_SIZE = {
    "F32": ["I32", "U32"],
    "BF16": ["F16", "I16", "U16"],
    "F16": ["BF16", "I16", "U16"],
}
_HALF_SIZE = ["F16", "BF16", "I16", "U16"]


def read_safetensors(content: bytes) -> tuple[dict, bytes]:
    """Returns the header as JSON, and the bytes of the tensors."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def tensor_bytes(content: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Returns the dtype, shape and bytes of every tensor by its name."""
    header, body = read_safetensors(content)
    return {
        name: (about["dtype"], tuple(about["shape"]), body[slice(*about["data_offsets"])])
        for name, about in header.items()
        if name != "__metadata__"
    }


def with_header(header: dict | bytes, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def damaged_safetensors(
    rng: random.Random, content: bytes, *, flip_body: bool = True
) -> tuple[bytes, str]:
    """Damages a safetensors file by one change of its bytes, its header or its tensors.

    Args:
        flip_body: also change values, which only a checksum of the tensors detects.
    """
    kinds: list[Callable] = [_damaged_file, _damaged_entry, _damaged_entry, _damaged_header]
    kinds += [_damaged_metadata, _relabelled]
    if flip_body:
        kinds += [_damaged_body]
    return rng.choice(kinds)(rng, content)


def _damaged_file(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    header, body = read_safetensors(content)
    length = int.from_bytes(content[:8], "little")
    cut = rng.choice([0, 1, 7, 8, 9, length, length + 8, len(content) - 1, rng.randrange(length)])
    lie = rng.choice([0, 1, length - 1, length + 1, length * 2, 1 << 31, 1 << 32, (1 << 64) - 1])
    more = rng.choice([1, 8, 4096])
    options = [
        (content[:cut], f"truncated at {cut}"),
        (content[: 8 + length + rng.randrange(len(body))], "truncated in the tensors"),
        (content + rng.randbytes(more), f"{more} bytes too long"),
        (lie.to_bytes(8, "little") + content[8:], f"says its header has {lie} bytes"),
        (rng.randbytes(len(content)), "random bytes"),
        (b"\0" * len(content), "zeros, as after a crash"),
        (b"PK\x03\x04" + content, "a zip's first bytes before it"),
        (flipped(content, rng.randrange(8 + length), rng.randrange(8)), "bit flipped in header"),
        (flipped(content, rng.randrange(8 + length), rng.randrange(8)), "bit flipped in header"),
        (with_header(b"[" * 100_000, body), "header of 100000 brackets"),
        (with_header(b'{"a":' * 100_000, body), "header of 100000 braces"),
        (with_header(json.dumps(header).encode() + b" " * 99_000_000, body), "header of 99 MB"),
        (with_header(b" " * 101_000_000, body), "header of 101 MB of blanks"),
        (with_header(b"[]", body), "header is a list"),
        (with_header(b"null", body), "header is null"),
        (with_header(b"{}", body), "header is empty"),
        (with_header(b"\xff\xfe", body), "header is no UTF-8"),
    ]
    return rng.choice(options)


def _damaged_entry(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    """Changes one tensor's entry in the header."""
    header, body = read_safetensors(content)
    name = rng.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    begin, end = entry["data_offsets"]
    shape = list(entry["shape"])
    how = rng.randrange(6)
    if how == 0:
        shapes = [shape[::-1], [*shape, 1], [1, *shape], shape[1:], [], [0], [-1, *shape[1:]]]
        shapes += [[10**18, *shape], [2**64], [2**63, 2], [1.5], ["4"], None, "4", {"a": 1}]
        shapes += [shape[:-2] + [shape[-1] * (shape[-2] if len(shape) > 1 else 1)]]
        entry["shape"] = rng.choice(shapes)
        what = f"{name} has the shape {entry['shape']}"
    elif how == 1:
        offsets = [[end, begin], [begin, end + 8], [begin + 4, end], [0, 0], [-8, end], [begin]]
        offsets += [[begin, 2**63], None, "0", [begin, end, end], [0.0, float(end)]]
        entry["data_offsets"] = rng.choice(offsets)
        what = f"{name} has the offsets {entry['data_offsets']}"
    elif how == 2:
        entry["dtype"] = rng.choice(["", "X", "f32", "F8_E4M3", "C64", None, 4, ["F32"], "BOOL"])
        what = f"{name} has the dtype {entry['dtype']!r}"
    elif how == 3:
        new = rng.choice(["", "latent", "prompt_embed", "\x1b[31m", name.upper(), "x" * 100_000])
        header = {new if key == name else key: value for key, value in header.items()}
        what = f"{name} is named {new[:20]!r}"
    elif how == 4:
        del header[name]
        if rng.random() < 0.5:
            header["extra"] = entry | {"data_offsets": [begin, end]}
        what = f"{name} is missing"
    else:
        extra = rng.choice([{"dtype": "U8", "shape": [8]}, {"dtype": "F32", "shape": [2]}])
        header["extra"] = extra | {"data_offsets": [len(body), len(body) + 8]}
        body += bytes(8)
        what = "a tensor more"
    return with_header(header, body), what


def _damaged_header(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    """Damages the header's JSON as text."""
    header, body = read_safetensors(content)
    text, what = damaged_json(rng, json.dumps(header).encode())
    return with_header(text, body), f"header: {what}"


def _damaged_metadata(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    header, body = read_safetensors(content)
    metadata: dict[str, Json] = header.get("__metadata__") or {"format": "pt"}
    key = rng.choice(list(metadata))
    how = rng.randrange(4)
    if how == 0:
        values = ["", "x", "2", "\x1b[31m\n", "[" * 10_000, "null", "x" * 3_000_000, "\u202e", "{}"]
        metadata[key] = rng.choice(values)
    elif how == 1:
        wrong: list[Json] = [None, 1, 1.5, [], {}, True, ["1"]]
        metadata[key] = rng.choice(wrong)
    elif how == 2:
        del metadata[key]
    else:
        header["__metadata__"] = rng.choice([None, [], "x", 1, {"a": {"b": 1}}, {"": ""}])
        return with_header(header, body), f"metadata is {header['__metadata__']!r}"
    what = f"metadata {key} is {str(metadata.get(key, 'missing'))[:20]!r}"
    return with_header(header | {"__metadata__": metadata}, body), what


def _relabelled(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    """Declares another dtype for the tensors; the length of the file fits."""
    header, body = read_safetensors(content)
    names = [name for name in header if name != "__metadata__"]
    names = names if rng.random() < 0.5 else [rng.choice(names)]
    was = header[names[0]]["dtype"]
    if was == "F32" and rng.random() < 0.5:
        new = rng.choice(_HALF_SIZE)
        for name in names:
            shape = header[name]["shape"]
            header[name] |= {"dtype": new, "shape": [*shape[:-1], shape[-1] * 2]}
        return with_header(header, body), f"{names} relabelled {new}, twice as wide"
    new = rng.choice(_SAME_SIZE.get(was, ["U8"]))
    for name in names:
        header[name]["dtype"] = new
    return with_header(header, body), f"{names} relabelled {new}"


def as_dtype(content: bytes, dtype: str) -> bytes:
    """Cuts the file to half-size values declared as `dtype`; keeps the shapes."""
    header, body = read_safetensors(content)
    new, end = b"", 0
    for name, entry in header.items():
        if name != "__metadata__":
            begin, stop = entry["data_offsets"]
            data = body[begin : begin + (stop - begin) // 2]
            entry |= {"dtype": dtype, "data_offsets": [end, end + len(data)]}
            new, end = new + data, end + len(data)
    return with_header(header, new)


def _damaged_body(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    """Changes only the tensors' values."""
    header, body = read_safetensors(content)
    count = rng.choice([1, 1, 8, 100])
    how = rng.randrange(6)
    if how <= 1:
        for _ in range(count):
            body = flipped(body, rng.randrange(len(body)), rng.randrange(8))
        what = f"{count} bits flipped in the tensors"
    elif how == 2:
        body, what = bytes(len(body)), "tensors are zeros"
    elif how == 3:
        body, what = b"\xff" * len(body), "tensors are NaN"
    elif how == 4:
        body, what = body[4:] + body[:4], "tensors moved by one value"
    else:
        dtype = rng.choice(_HALF_SIZE)
        return as_dtype(content, dtype), f"tensors are {dtype}, of half the bytes"
    return with_header(header, body), what


def _dotted(path: tuple) -> str:
    return ".".join(map(str, path)) or "the document"
