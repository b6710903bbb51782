"""`slipstream tune`: choices measured on this card for a model, for the loads to come."""

from __future__ import annotations

from slipstream.cli.bench import Status
from slipstream.cli.options import AsJson, EngineOptions, Model, flat
from slipstream.cli.show import Bar, Table, note, print_json, print_tables


@flat
def tune(model: Model, engine: EngineOptions, as_json: AsJson = False) -> None:
    """Measure what is fastest on this GPU for a model.

    Compiles the model's kernels, and times a few sizes of tiles for its experts and where cuBLAS overtakes our kernels for few
    tokens. What is faster than before is written into a table in the cache folder, which later loads read. It takes a
    minute; a GPU that slipstream was measured on does not need it.

    \b
      slipstream tune gpt-oss-20b
      slipstream tune gpt-oss-20b --weights random
      slipstream tune ./folder --json
    """
    options = engine.changes()
    from slipstream.tuning.run import tune as measure

    with Status() as status, Bar() as bar:
        found = measure(
            model,
            options,
            status,
            progress=lambda done, total: bar(f"loading {model}", done, total),
            compiling=lambda done, total: bar("compiling kernels for this card, once", done, total, "kernels"),
        )
    if as_json:
        print_json(found)
        return
    rows = [
        (line.op, line.shape, line.entry, line.before, _time(line.before_us), line.after, _time(line.after_us))
        for line in found.lines
    ]
    columns = ("op", "shape", "at", "before", "", "now", "")
    title = f"{model} on {found.card}"
    print_tables([Table(title, rows, columns) if rows else Table(title, [("nothing to choose for these weights",)])])
    note(f"written to {found.path}; loads from now on read it, and deleting it takes it back")


def _time(microseconds: float) -> str:
    return f"{microseconds:.1f} us"
