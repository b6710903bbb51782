"""`slipstream models`: the names that `pull` and `generate` know, and what is here already."""

from __future__ import annotations

from typing import Any

from slipstream.cli.options import AsJson
from slipstream.cli.show import Table, print_json, print_tables, size


def models(as_json: AsJson = False) -> None:
    """List known models and architectures.

    Those that have a name here, those pulled from the Hub, and what architectures run.
    """
    from slipstream.models import ARCHITECTURES
    from slipstream.sources import known_models
    from slipstream.sources.hub import all_recorded
    from slipstream.sources.shapes import SHAPES
    from slipstream.sources.wheel import is_whole

    named: list[dict[str, Any]] = [
        {"name": m.name, "bytes": m.bytes, "license": m.license, "here": is_whole(m), "path": m.path}
        for m in known_models()
    ]
    pulled: list[dict[str, Any]] = [
        {"name": str(model), "bytes": sum(n for n, _ in record.files.values()), "path": record.path(model)}
        for model, record in all_recorded()
    ]
    if as_json:
        known = {"models": named, "pulled_from_hub": pulled, "shapes": SHAPES, "architectures": sorted(ARCHITECTURES)}
        print_json(known)
        return
    tables = [
        Table(
            "Models by name",
            [
                (str(m["name"]), size(m["bytes"]), str(m["license"]), str(m["path"]) if m["here"] else "not pulled yet")
                for m in named
            ],
            ("name", "size", "license", "where"),
        ),
    ]
    if pulled:
        rows = [(str(m["name"]), size(m["bytes"]), str(m["path"])) for m in pulled]
        tables.append(Table("Pulled from the Hugging Face Hub", rows, ("name", "size", "where")))
    tables.append(
        Table("Shapes for --weights random, without a download", list(SHAPES.items()), ("name", "the whole model"))
    )
    title = "Architectures: a Hub id, a folder or a .gguf file of one of these runs"
    tables.append(Table(title, [(", ".join(sorted(ARCHITECTURES)),)]))
    print_tables(tables)
