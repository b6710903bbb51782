"""`slipstream kernels`: pin kernels of the Hub, see what is pinned, hash it again, and list all code in a process."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from slipstream.cli.kernels_bench import bench
from slipstream.cli.kernels_lock import COLUMNS, LockFile, PolicyFile, described, lock, row
from slipstream.cli.options import AsJson, EngineOptions, flat
from slipstream.cli.show import Table, print_json, print_tables
from slipstream.errors import TrustError

HELP = """Pin kernels of the Hugging Face Hub, and see what runs.

A kernel is code from elsewhere that runs in your process. Nothing is imported unless a policy allows it and a lock has the SHA-256
of every one of its files; docs/security.md says what is checked when.

\b
  slipstream kernels lock kernels-community/activation
  slipstream kernels list
  slipstream kernels verify
  slipstream kernels audit --model smollm2-135m-instruct --cyclonedx bom.json
  slipstream kernels bench norm --model gpt-oss-20b --plot norm.png
"""


def pinned(lock: LockFile = None, policy: PolicyFile = None, as_json: AsJson = False) -> None:
    """List what is pinned, and whether it may run here."""
    from slipstream.ops.hub import store
    from slipstream.trust import Policy

    rules = Policy.find(lock, policy)
    if rules.denied:
        raise TrustError(rules.denied)
    found = []
    for pin in rules.lock.pins.values():
        for build in pin.builds.values():
            here = store().path(build).exists() or pin.is_local
            found.append({**described(pin, build), "here": here, "refused": rules.why_not(pin.repo)})
    if as_json:
        print_json({"lock": rules.lock.path, "policy": rules.path, "kernels": found})
        return
    rows = [
        (*row(f), "yes" if f["here"] else "no", "no: " + f["refused"] if f["refused"] else "yes") for f in found
    ]  # fmt: skip
    _print(f"Pinned in {rules.lock.path or 'no lock'}", rows, (*COLUMNS, "here", "may run"))


pinned.__name__ = "list"  # what it is on the command line; as a name of Python it would hide the type


def verify(lock: LockFile = None, policy: PolicyFile = None, as_json: AsJson = False) -> None:
    """Hash everything that is pinned and here, and check its signatures.

    Ends with an exit code that is not 0 if a byte differs, a signature does not hold, or the policy does not allow what is pinned.
    """
    from slipstream.ops.hub import check_environment, store, verified
    from slipstream.trust import Policy
    from slipstream.trust.fetch import build_folder

    rules = Policy.find(lock, policy)
    if rules.denied:
        raise TrustError(rules.denied)
    check_environment()
    found = []
    for pin in rules.lock.pins.values():
        for build in pin.builds.values():
            here = build_folder(pin, build).exists() if pin.is_local else store().path(build).exists()
            wrong = rules.why_not(pin.repo)
            try:
                if here and not wrong:
                    verified(pin, build, rules)
            except TrustError as e:
                wrong = str(e)
            state = wrong or ("verified" if here else "not here; compared when it is fetched")
            found.append({**described(pin, build), "state": state, "wrong": wrong is not None})
    if as_json:
        print_json({"lock": rules.lock.path, "policy": rules.path, "kernels": found})
    else:
        rows = [(f["repo"], f["variant"], f["sha256"][:16], f["state"]) for f in found]
        columns = ("repository", "build", "SHA-256 of the tree", "state")
        _print(f"Pinned in {rules.lock.path or 'no lock'}", rows, columns)
    if wrong_ones := [f for f in found if f["wrong"]]:
        raise TrustError(
            f"{len(wrong_ones)} of {len(found)} builds are not what was pinned or may not run: "
            f"{wrong_ones[0]['repo']}: {wrong_ones[0]['state']}"
        )


@flat
def audit(
    engine: EngineOptions,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Load this model first, with its kernels.", show_default=False)
    ] = None,
    cyclonedx: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a CycloneDX 1.6 bill of materials.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the report as JSON.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List every piece of native or downloaded code in the process.

    Kernels of the Hub, code that other libraries downloaded, sources of Triton kernels, libraries that slipstream compiled
    here, and every shared library that is mapped, with its SHA-256 and the package that it belongs to. With --model it is
    the process of a loaded model that has answered once.
    """
    from slipstream import __version__
    from slipstream.cli.show import plain
    from slipstream.trust.audit import audit as look
    from slipstream.trust.cyclonedx import bill
    from slipstream.trust.lock import write_atomically

    llm = _loaded(model, engine)
    pieces = look()
    report = {"slipstream": __version__, "python": sys.version.split()[0], "model": model, "code": plain(pieces)}
    if output is not None:
        write_atomically(output, json.dumps(report, indent=1) + "\n")
    if cyclonedx is not None:
        write_atomically(cyclonedx, json.dumps(bill(pieces, __version__), indent=1) + "\n")
    if as_json:
        print_json(report)
    else:
        rows = [
            (p.kind, p.name, p.sha256[:16], {True: "yes", False: "NO", None: ""}[p.matches], p.origin) for p in pieces
        ]  # fmt: skip
        columns = ("kind", "name", "SHA-256", "as listed", "from")
        _print(f"Code in this process, with {model or 'no model'}", rows, columns)
    del llm
    if differ := [p for p in pieces if p.matches is False]:
        raise TrustError(
            f"{len(differ)} pieces are not what their package or the lock lists; the first is {differ[0].path} of "
            f"{differ[0].origin}; install or fetch it again"
        )


COMMANDS: tuple[Callable[..., None], ...] = (pinned, lock, verify, audit, bench)


def _loaded(model: str | None, engine: EngineOptions) -> Any:
    if model is None:
        if engine.changes():
            raise typer.BadParameter("options of the engine say how --model is loaded, and no model is named")
        return None
    from slipstream.cli.load import load_llm
    from slipstream.request import SamplingParams

    llm = load_llm(model, engine)
    llm.generate("a", SamplingParams(max_new_tokens=2, temperature=0))  # what is compiled on first use is there now
    return llm


def _print(title: str, rows: list[Any], columns: tuple[str, ...]) -> None:
    print_tables([Table(title, rows, columns) if rows else Table(title, [("nothing",)])])
