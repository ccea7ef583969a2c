"""Merge safetensors checkpoints: `python -m samlib.merge ties --base b.safetensors --models a.safetensors c.safetensors
--lambda 0.3 --out merged.safetensors`. `python -m samlib.merge list` shows the methods."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from samlib.merge.files import merge_files
from samlib.merge.method import METHODS


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, merge, and say where the result is."""
    parser = argparse.ArgumentParser("python -m samlib.merge", description=__doc__)
    commands = parser.add_subparsers(dest="method", required=True, metavar="METHOD")
    commands.add_parser("list", help="what there is, with sources and settings")
    for method in METHODS.values():
        if not method.plan:
            continue
        command = commands.add_parser(method.name, help=method.source)
        command.add_argument("--base", type=Path, required=True, help="theta_0: a safetensors file, or a folder of one")
        command.add_argument("--models", type=Path, nargs="+", required=True, help="fine-tuned from theta_0")
        command.add_argument("--out", type=Path, required=True, help="file to write; a folder with --shard-size")
        command.add_argument("--shard-size", type=float, help="GB of one file at most")
        for name, default in method.defaults.items():
            flags = ["--lambda", "--lam"] if name == "lam" else [f"--{name.replace('_', '-')}"]
            kind = type(default)
            command.add_argument(
                *flags, dest=name, type=kind, default=default, help=_help(method.rules[name].text, default)
            )
    a = parser.parse_args(arguments)
    if a.method == "list":
        for method in METHODS.values():
            print(f"{method.name}: {method.source}; needs {method.needs}")
            for name, default in method.defaults.items():
                print(f"    {name}: {_help(method.rules[name].text, default)}")
        return
    settings = {name: getattr(a, name) for name in METHODS[a.method].defaults}
    shard_bytes = None if a.shard_size is None else int(a.shard_size * 1e9)
    try:
        print(merge_files(a.method, a.base, a.models, a.out, shard_bytes, sys.stderr.isatty(), **settings))
    except ValueError as error:
        parser.exit(2, f"{parser.prog} {a.method}: {error}\n")


def _help(allowed: str, default: object) -> str:
    return f"{allowed}; {default} by default"


if __name__ == "__main__":
    main()
