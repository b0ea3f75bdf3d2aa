"""Files of small graphs, written by hand: what the tests of single operations and of damaged files start from."""

import json
from pathlib import Path

import torch
from safetensors.torch import save

PLAN = {"memory_format": "contiguous", "images": 0, "threads": 1, "isa": ""}


def graph(op, inputs, outputs, tensors=None, **attributes) -> dict:
    """One node over ``inputs``, lists of (shape, dtype); a third entry names a constant."""
    values = [
        {"shape": list(one[0]), "dtype": one[1], **({"tensor": one[2]} if len(one) > 2 else {})} for one in inputs
    ]
    given = len(values)
    values += [{"shape": list(shape), "dtype": dtype} for shape, dtype in outputs]
    made = list(range(given, len(values)))
    ports = [{"name": f"x{i}", "value": i} for i, one in enumerate(inputs) if len(one) == 2]
    return {
        "format": "sparsekd-network",
        "version": 1,
        "values": values,
        "inputs": ports,
        "outputs": [{"name": f"y{i}", "value": value} for i, value in enumerate(made)],
        "nodes": [{"op": op, "name": "node", "inputs": list(range(given)), "outputs": made, "attributes": attributes}],
        "plan": PLAN,
    }


def write(path: Path, described: dict, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    path.write_bytes(save(tensors or {}, {"sparsekd": json.dumps(described)}))
    return path
