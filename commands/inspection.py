"""``inspect PATH``: print what a checkpoint holds and where it came from, from its manifest alone."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

from fulgurite.commands.errors import DONE
from fulgurite.commands.plain import PlainParser
from fulgurite.commands.verify import folders_at


def run(command: str, argv: list[str]) -> int:
    """Print the manifest as text, or as JSON. Tensors are not read; ``verify`` checks them."""
    parser = PlainParser(prog="fulgurite inspect", description="Print what a checkpoint holds.")
    parser.add_argument("path", type=Path, help="checkpoint, artefact or run folder")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--json", action="store_true", help="print the whole manifest as JSON")
    options = parser.parse_args(argv)
    from fulgurite.checkpoints import read_manifest

    for folder in folders_at(options.path):
        manifest = read_manifest(folder)
        if options.json:
            print(json.dumps(asdict(manifest), indent=2, ensure_ascii=False))
        else:
            print("\n".join(_lines(folder, asdict(manifest), options.tensors)))
    return DONE


def _lines(folder: Path, manifest: dict, every_tensor: bool) -> list[str]:
    base = manifest["base"]
    lines = [
        f"{folder}",
        f"  written   {manifest['created']}",
        f"  kind      {manifest['kind']}" + (f" on {base.get('source')} ({base.get('digest')})" if base else ""),
        *(f"  parent    {parent.get('path')} ({parent.get('digest')})" for parent in manifest["parents"]),
    ]
    for name, record in manifest["files"].items():
        tensors = manifest["tensors"].get(name)
        count = sum(math.prod(tensor["shape"]) for tensor in tensors.values()) if tensors else 0
        held = f", {len(tensors)} tensors, {count:,} numbers" if tensors else ""
        lines.append(f"  file      {name}: {record['bytes']:,} bytes{held}")
        for tensor, described in (tensors or {}).items() if every_tensor else ():
            lines.append(f"              {tensor}: {described['dtype']} {described['shape']}")
    for part in ("settings", "metrics", "facts", "structure"):
        for key, value in manifest[part].items():
            text = json.dumps(value, ensure_ascii=False)
            lines.append(f"  {part:<9} {key}: {text if len(text) <= 120 else text[:117] + '...'}")
    return lines
