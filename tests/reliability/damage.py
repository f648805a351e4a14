"""Files that are not what was saved, made from one that is: each by a kind and a seed."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np

WEIGHTS = "model.weights.h5"
HOOK = "_tapefit_state/vars"


def truncated(data: bytes, rng: np.random.Generator) -> bytes:
    return data[: int(rng.integers(0, len(data)))]


def one_bit(data: bytes, rng: np.random.Generator) -> bytes:
    return _flipped(data, rng, 1)


def many_bits(data: bytes, rng: np.random.Generator) -> bytes:
    return _flipped(data, rng, int(rng.integers(2, 60)))


def block_of_zeros(data: bytes, rng: np.random.Generator) -> bytes:
    start, length = int(rng.integers(0, len(data))), int(rng.integers(1, 600))
    return data[:start] + bytes(len(data[start : start + length])) + data[start + length :]


def block_moved(data: bytes, rng: np.random.Generator) -> bytes:
    a, b = sorted(int(i) for i in rng.integers(0, len(data) - 64, 2))
    return data[:a] + data[b : b + 64] + data[a + 64 :]


def _flipped(data: bytes, rng: np.random.Generator, number: int) -> bytes:
    changed = bytearray(data)
    for place in rng.integers(0, len(data), number):
        changed[place] ^= 1 << int(rng.integers(0, 8))
    return bytes(changed)


def dataset_lost(file: h5py.File, rng: np.random.Generator) -> None:
    del file[_any(file, rng)]


def dataset_renamed(file: h5py.File, rng: np.random.Generator) -> None:
    name = _any(file, rng)
    file.move(name, f"{name}x")


def dataset_of_other_shape(file: h5py.File, rng: np.random.Generator) -> None:
    name = _any(file, rng)
    value = np.asarray(file[name])
    del file[name]
    file[name] = np.zeros([n + 1 for n in value.shape] or [2], value.dtype)


def dataset_of_text(file: h5py.File, rng: np.random.Generator) -> None:
    name = _any(file, rng)
    del file[name]
    file[name] = "text"


def one_value(file: h5py.File, rng: np.random.Generator) -> None:
    item = file[_any(file, rng)]
    flat = np.asarray(item).reshape(-1)
    flat[int(rng.integers(0, flat.size))] += 1
    item[...] = flat.reshape(item.shape)


def layers_swapped(file: h5py.File, rng: np.random.Generator) -> None:
    a, b = rng.choice(sorted(file["layers"]), 2, replace=False)
    file.move(f"layers/{a}", "layers/kept")
    file.move(f"layers/{b}", f"layers/{a}")
    file.move("layers/kept", f"layers/{b}")


def group_lost(file: h5py.File, rng: np.random.Generator) -> None:
    del file[str(rng.choice(["optimizer", "layers", "_tapefit_state"]))]


def hook_state_lost(file: h5py.File, rng: np.random.Generator) -> None:
    """As a file from before checksums, without one variable of a hook or all of them."""
    names = [n for n in file[HOOK] if n.startswith("percentile")]
    for name in names if rng.integers(0, 2) else [str(rng.choice(names))]:
        del file[f"{HOOK}/{name}"]
    del file.attrs["tapefit_checksums"]


def hook_state_renamed(file: h5py.File, rng: np.random.Generator) -> None:
    for name in [n for n in file[HOOK] if n.startswith("percentile")]:
        file.move(f"{HOOK}/{name}", f"{HOOK}/other{rng.integers(0, 9)}_{name}")
    del file.attrs["tapefit_checksums"]


def hook_state_too_much(file: h5py.File, rng: np.random.Generator) -> None:
    """As of a hook that was taken out: harmless."""
    file[f"{HOOK}/stranger.0.count"] = np.int64(rng.integers(0, 9))
    del file.attrs["tapefit_checksums"]


def _any(file: h5py.File, rng: np.random.Generator) -> str:
    names: list[str] = []
    file.visititems(lambda name, item: names.append(name) if hasattr(item, "dtype") else None)
    return str(rng.choice(sorted(names)))


OF_BYTES: dict[str, Callable] = {
    f.__name__: f for f in (truncated, one_bit, many_bits, block_of_zeros, block_moved)
}
OF_HDF5: dict[str, Callable] = {
    f.__name__: f
    for f in (
        dataset_lost,
        dataset_renamed,
        dataset_of_other_shape,
        dataset_of_text,
        one_value,
        layers_swapped,
        group_lost,
        hook_state_lost,
        hook_state_renamed,
        hook_state_too_much,
    )
}
KINDS = [*OF_BYTES, *OF_HDF5]


def damaged(source: Path, kind: str, seed: int, target: Path) -> None:
    """Writes a damaged copy of a `.weights.h5` or `.keras` file.

    Args:
        source: a good file.
        kind: of damage, one of `KINDS`.
        seed: decides where.
        target: where to write the copy.
    """
    rng = np.random.default_rng(seed)
    data = source.read_bytes()
    if kind in OF_BYTES:
        target.write_bytes(OF_BYTES[kind](data, rng))
    elif source.suffix == ".h5":
        target.write_bytes(_edited(data, kind, rng))
    else:
        with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
            for name in old.namelist():
                content = old.read(name)
                new.writestr(name, _edited(content, kind, rng) if name == WEIGHTS else content)


def _edited(data: bytes, kind: str, rng: np.random.Generator) -> bytes:
    memory = io.BytesIO(data)
    with h5py.File(memory, "r+") as file:
        OF_HDF5[kind](file, rng)
    return memory.getvalue()


def with_config(source: Path, target: Path, change: Callable[[dict], None]) -> None:
    """Writes a copy of a `.keras` file with another `config.json`."""
    import json

    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "config.json":
                config = json.loads(content)
                change(config)
                content = json.dumps(config).encode()
            new.writestr(name, content)


def size(path: Path) -> int:
    return os.path.getsize(path)
