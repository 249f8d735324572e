"""Reads safetensors files that may be missing, cut short or someone else's."""

from pathlib import Path


def read_safetensors(path, what: str):
    """({name: tensor}, metadata) of a file. what: "calibration" or such, for the error. ValueError if it is none."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise ValueError(f"path: no {what} file {str(path)!r}")
    try:
        with safe_open(str(path), framework="pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"path: {str(path)!r} is not a whole safetensors file: {error}") from error
