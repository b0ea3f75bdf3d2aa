"""Compile a list of variants into a cache for another Python and Triton, which need no torch.

    python -m benchmarks.gpu.dry_run --steps all --ask variants.json  # what the dispatch asks the compiler for
    python3.12 benchmarks/gpu/cache.py variants.json --into DIR       # compiled, with the Triton that it imports
    python3.12 benchmarks/gpu/cache.py variants.json --keys           # the names that the cache gives them

A cache serves one Triton of one Python: its keys hash Triton's own library. So the list is made where torch is, and
compiled by the interpreter of the machine with the GPU, with ``triton==3.6.0`` beside it. Called by `gpu.run prepare`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ("num_warps", "num_stages")  # that a launch gives; the rest are Triton's defaults


def to_json(source: Any, options: dict[str, Any]) -> dict[str, Any]:
    """What a variant is made of. Order counts: the keys hash texts of these dictionaries."""
    return {
        "module": source.fn.fn.__module__,
        "kernel": source.fn.fn.__name__,
        "signature": list(source.signature.items()),
        "constants": [[list(place), value] for place, value in source.constants.items()],
        "attributes": [[list(place), value] for place, value in source.attrs.items()],
        "options": {name: options[name] for name in OPTIONS},
    }


def source_of(variant: dict[str, Any]) -> Any:
    """The variant as the compiler takes it."""
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(variant["module"]), variant["kernel"])
    constants, attributes = (
        {tuple(place): value for place, value in variant[name]} for name in ("constants", "attributes")
    )
    signature = {name: _as_tuples(kind) for name, kind in variant["signature"]}
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def _as_tuples(kind: Any) -> Any:
    """The type of an argument; that of a tuple is one of types, for which JSON has lists."""
    return tuple(map(_as_tuples, kind)) if isinstance(kind, list) else kind


def key_of(source: Any, target: Any, options: dict[str, Any]) -> str:
    """As `triton.compile` makes it: the folder of a variant in the cache."""
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.compiler.compiler import make_backend
    from triton.runtime.cache import get_cache_key

    backend = make_backend(target)
    parsed = backend.parse_options(dict(options))
    key = get_cache_key(source, backend, parsed, env_vars=get_cache_invalidating_env_vars())
    return hashlib.sha256(key.encode()).hexdigest()


def without_torch() -> None:
    """Let ``sparsekd.kernels`` be imported alone: of torch its modules name types, and what they call is not called."""
    torch: Any = types.ModuleType("torch")
    torch.Tensor = object
    package, kernels = types.ModuleType("sparsekd"), types.ModuleType("sparsekd.kernels")
    package.__path__, kernels.__path__ = [], [str(ROOT / "kernels")]
    sys.modules.update({"torch": torch, "sparsekd": package, "sparsekd.kernels": kernels})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", type=Path)
    parser.add_argument("--into", metavar="DIR", help="compile into this cache")
    parser.add_argument("--keys", action="store_true", help="print the keys, and compile nothing")
    options = parser.parse_args()
    if options.into:
        os.environ["TRITON_CACHE_DIR"] = os.path.abspath(options.into)
    without_torch()
    import triton
    from triton.backends.compiler import GPUTarget

    asked = json.loads(options.variants.read_text())
    target = GPUTarget("cuda", asked["capability"], 32)
    for variant in asked["variants"]:
        source = source_of(variant)
        if options.keys:
            print(key_of(source, target, variant["options"]))
        elif options.into:
            triton.compile(source, target=target, options=dict(variant["options"]))
    version = ".".join(map(str, sys.version_info[:2]))
    print(f"{len(asked['variants'])} variants, Python {version}, Triton {triton.__version__}", file=sys.stderr)


if __name__ == "__main__":
    main()
