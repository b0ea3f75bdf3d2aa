"""Models and training states on disk: safetensors with a JSON header, no pickle, never half-written.

    checkpoint.save(student, "student.safetensors", task="movielens")
    checkpoint.load(student, "student.safetensors")  # a dense one: layers become sparse where those of the file are

A model file holds the tensors of `state_dict()`, so a sparse layer is its kept blocks: `<name>.values [nnzb, bh, bw]`,
`<name>.row_ptr` and `<name>.col_idx`; a packed embedding table is its `values [n]` and the bits `kept`. The header
says which layers are sparse, what the model looks like when dense, the versions of modules that count their own
(`_version`), and what `get_extra_state` of a module gave.
A state file holds any tree of dicts, lists, tuples, numbers, strings and tensors (optimizer, method, history).
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from .blocks import BlockPattern, BlockSparse
from .conversion import table_type
from .convert import replace_layers, sparse_layer, table_as
from .nn import BlockSparseLayer
from .nn.embedding_table import SparseTable

__all__ = ["load", "load_state", "metadata", "save", "save_state", "sweep", "write_atomically"]

VERSION = 1
_PART = (".sparsekd.", ".part")  # how the name of a file that is being written begins and ends
_MODEL, _STATE = "sparsekd-model", "sparsekd-state"
_REMEDY = {
    _MODEL: "fetch or save it again",
    _STATE: "write it again",
}
_EXTRA = "extra state: "  # before the names of tensors that stand in extra state
_KEY = "sparsekd"  # our one entry in the safetensors header, a JSON text

Path_ = str | os.PathLike[str]


def save(model: nn.Module, path: Path_, **json_metadata: Any) -> None:
    """Write the parameters and buffers of a model, dense or sparse, to one safetensors file.

    `json_metadata` is anything `json.dumps` takes; `metadata(path)` gives it back. The file replaces an old one only
    when it is complete.  Raises TypeError for metadata that is not JSON and for extra state that `save_state` would not
    take, OSError for a disk that is full, a folder without permission, or a path that is no regular file.
    """
    sparse = {
        name: {"pattern": [layer.pattern.bh, layer.pattern.bw], "shape": list(layer.weight_shape)}
        for name, layer in _sparse_layers(model).items()
    }
    state: dict[str, Any] = model.state_dict()
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    inside: dict[str, Tensor] = {}
    extra = {
        name: _packed(value, inside, f"sparsekd.checkpoint.save: extra state {name!r} of the model")
        for name, value in state.items()
        if name not in tensors
    }
    for name, tensor in tensors.items():
        if tensor.is_quantized:
            raise TypeError(
                f"sparsekd.checkpoint.save: {name} is a quantised tensor; save the model before it is quantised"
            )
    header = {"format": _MODEL, "model": fingerprint(model), "sparse": sparse, "metadata": json_metadata}
    optional = (("extra", extra), ("versions", _own_versions(model)), ("tables", sorted(_tables(model))))
    header |= {name: value for name, value in optional if value}
    _write(path, {**tensors, **{_EXTRA + name: tensor for name, tensor in inside.items()}}, header)


def load(model: nn.Module, path: Path_) -> nn.Module:
    """Give `model` the tensors of a file that `save` wrote; layers that are sparse in the file become sparse, in place.

    `model`: same architecture, dense or sparse (with any blocks). Returned; left untouched where something is wrong.
    Layers that become sparse, or dense, have new parameters: make optimizers afterwards.
    Raises FileNotFoundError, and ValueError for a damaged file or the file of another model (naming the first
    difference).
    """
    tensors, header = _read(path, _MODEL)
    _check_same_model(path, fingerprint(model), header["model"])
    sparse = {name: BlockPattern(*entry["pattern"]) for name, entry in header["sparse"].items()}
    twins: list[tuple[nn.Module, nn.Module]] = []
    for name, layer in model.named_modules():
        if isinstance(layer, SparseTable) or table_type(layer) is not None:
            try:
                twins.append((layer, table_as(layer, packed=name in header.get("tables", ()))))
            except ValueError as error:
                raise ValueError(
                    f"sparsekd.checkpoint.load: {name!r} is a packed table in the file, {error}"
                ) from error
            continue
        wanted, twin = sparse.get(name), layer
        if isinstance(layer, BlockSparseLayer) and layer.pattern != wanted:
            twin = layer.to_dense()
        if wanted is not None and not isinstance(twin, BlockSparseLayer):
            twin = sparse_layer(twin, wanted)
        if isinstance(twin, BlockSparseLayer):
            parts = [tensors[f"{name}.{part}".lstrip(".")] for part in ("values", "row_ptr", "col_idx")]
            BlockSparse(parts[0], parts[1], parts[2], twin.matrix_shape, twin.pattern).validate()
        twins.append((layer, twin))
    replace_layers(model, twins)
    model.load_state_dict(_state_of(model, tensors, header))
    return model


def metadata(path: Path_) -> dict[str, Any]:
    """What was given to `save` beside the model."""
    return _read(path, _MODEL)[1]["metadata"]


def fingerprint(model: nn.Module) -> dict[str, list[int]]:
    """Name -> shape of every tensor of the state dict of the model when dense."""
    shapes: dict[str, list[int]] = {}
    sparse, tables = _sparse_layers(model), _tables(model)
    for name, tensor in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if not isinstance(tensor, Tensor):
            continue
        if owner in tables:
            if leaf == "values":
                shapes[f"{owner}.weight".lstrip(".")] = [tables[owner].num_embeddings, tables[owner].embedding_dim]
        elif owner not in sparse or leaf == "bias":
            shapes[name] = list(tensor.shape)
        elif leaf == "values":
            shapes[f"{owner}.weight"] = list(sparse[owner].weight_shape)
    return shapes


def _sparse_layers(model: nn.Module) -> dict[str, BlockSparseLayer]:
    """The block-sparse layers by name, one that has several names under each."""
    modules = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if isinstance(module, BlockSparseLayer)}


def _tables(model: nn.Module) -> dict[str, SparseTable]:
    """The packed embedding tables, likewise."""
    modules = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if isinstance(module, SparseTable)}


def _own_versions(model: nn.Module) -> dict[str, int]:
    """The version of the state of every module that counts its own. Torch's modules upgrade what is older than today's
    by themselves, and all that this program has written is newer."""
    modules = model.named_modules(remove_duplicate=False)
    return {
        name: module._version
        for name, module in modules
        if module._version != 1 and not type(module).__module__.startswith("torch.")
    }


def _state_of(model: nn.Module, tensors: dict[str, Tensor], header: dict[str, Any]) -> OrderedDict[str, Any]:
    """The state dict that was saved. A module whose version no file names is of the version that it has now."""
    inside = {name.removeprefix(_EXTRA): tensor for name, tensor in tensors.items() if name.startswith(_EXTRA)}
    state: Any = OrderedDict((name, tensor) for name, tensor in tensors.items() if not name.startswith(_EXTRA))
    state |= {name: _unpacked(value, inside) for name, value in header.get("extra", {}).items()}
    state._metadata = getattr(model.state_dict(), "_metadata", {})
    for name, version in header.get("versions", {}).items():
        state._metadata.setdefault(name, {})["version"] = version
    return state


def save_state(state: Any, path: Path_) -> None:
    """Write a tree of dicts, lists, tuples, None, bools, numbers, strings and tensors to one file.

    Raises TypeError for any other leaf, OSError as `save`.
    """
    tensors: dict[str, Tensor] = {}
    tree = _packed(state, tensors, "sparsekd.checkpoint.save_state")
    _write(path, tensors, {"format": _STATE, "tree": tree})


def load_state(path: Path_, remedy: str | None = None) -> Any:
    """The tree that `save_state` wrote, equal to the bit.  Raises FileNotFoundError, ValueError for a damaged file.

    remedy: what the message of that ValueError advises, as the caller knows what the file is for.
    """
    tensors, header = _read(path, _STATE, remedy)
    return _unpacked(header["tree"], tensors)


def write_atomically(path: Path_, data: bytes) -> None:
    """Write `data` beside `path` and rename it into place: after an OSError, or a kill, the old file is still there.

    The OSError names `path`. A symbolic link stays one: what it points to is replaced. A device, a pipe or a socket is
    refused with an OSError.
    """
    path = Path(path)
    if path.is_symlink():
        path = path.resolve()
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(
            f"sparsekd.checkpoint: {path} is a device, pipe or socket, which no file can take the place of; "
            "give the path of a file"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=_PART[0], suffix=_PART[1], dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files that only their owner may read
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if (
            isinstance(error, OSError) and error.errno and error.filename is None
        ):  # a full disk does not say of which file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def sweep(folder: Path_) -> None:
    """Remove from `folder` what writers that were killed left half written; nobody else may be writing there."""
    if Path(folder).is_dir():
        for left in Path(folder).glob("*".join(_PART)):
            left.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write(path: Path_, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    # Copies: safetensors refuses tensors that share memory, as tied weights do.
    plain = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    header = {**header, "version": VERSION, "sha256": _digest(plain)}
    write_atomically(path, to_bytes(plain, {_KEY: json.dumps(header)}))


def _read(path: Path_, expected: str, remedy: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a file, checked."""
    path, remedy = Path(path), remedy or _REMEDY[expected]
    if not path.is_file():
        raise FileNotFoundError(f"sparsekd.checkpoint: {path} does not exist; give the path of a saved file")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(_KEY, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(
            f"sparsekd.checkpoint: {path} is no safetensors file, or corrupt or cut short ({error}); {remedy}"
        ) from error
    named = header.get("format") if isinstance(header, dict) else None
    if named != expected:
        raise ValueError(
            f"sparsekd.checkpoint: expected a {expected} file, got {named or 'a safetensors file of another program'} "
            f"in {path}; `load` reads what `save` wrote, `load_state` what `save_state`, and `sparsekd.load_frozen` "
            "what `FrozenModel.save` did"
        )
    if header["version"] > VERSION:
        raise ValueError(
            f"sparsekd.checkpoint: {path} has format version {header['version']}, this sparsekd reads up to {VERSION}; "
            "upgrade sparsekd"
        )
    if _digest(tensors) != header["sha256"]:
        raise ValueError(f"sparsekd.checkpoint: {path} is corrupt (its checksum differs); {remedy}")
    return tensors, header


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_same_model(path: Path_, ours: dict[str, list[int]], theirs: dict[str, list[int]]) -> None:
    for name in [*theirs, *ours]:
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"sparsekd.checkpoint.load: {path} belongs to another model: {name} is {_shape(theirs.get(name))} "
                f"in the file and {_shape(ours.get(name))} in the model; build the model that was saved"
            )


def _shape(shape: list[int] | None) -> str:
    return "missing" if shape is None else str(shape)


def _packed(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    """The tree as JSON; tensors go to `tensors`, and what JSON would change is wrapped in a one-key dict."""
    if isinstance(value, Tensor):
        name = f"{len(tensors)}"
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[_packed(k, tensors, where), _packed(v, tensors, where)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_packed(v, tensors, where) for v in value]}
    if isinstance(value, list):
        return [_packed(v, tensors, where) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"{where}: expected tensors, numbers, strings and containers of them, got "
        f"{type(value).__name__}; turn it into one of these"
    )


def _unpacked(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpacked(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_unpacked(v, tensors) for v in content)
    return {_unpacked(k, tensors): _unpacked(v, tensors) for k, v in content}
