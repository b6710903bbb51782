"""Writes the tables of docs/numbers.md from benchmarks/results/*.jsonl: the last record of each claim, and nothing else.

python benchmarks/page.py            # after recording
python benchmarks/page.py --check    # only says whether the page agrees with the records
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULTS = ROOT / "docs/numbers.md", ROOT / "benchmarks/results"
BEGIN, END = "<!-- {}: made by benchmarks/page.py -->", "<!-- end of {} -->"
Record = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """A claim that must reach a number.

    Attributes:
        vllm: what vLLM 0.25.1 reached, as text.
        lower: whether less is better.
        of_limit: the number is the fraction of the limit, which the record has beside its value.
    """

    figure: str
    claim: str
    must: float
    vllm: str = ""
    lower: bool = False
    of_limit: bool = False

    def reached(self, record: Record) -> bool:
        value = record["fraction"] if self.of_limit else record["value"]
        return value <= self.must if self.lower else value >= self.must

    @property
    def must_text(self) -> str:
        number = f"{self.must:.0%} of the limit" if self.of_limit else f"{self.must:,}"
        return f"at most {number}" if self.lower else number


GOALS = (
    Goal(
        "process start to first token, weights in the page cache, kernels compiled before, s",
        "gpu.first_token",
        10,
        "117 to 151",
        lower=True,
    ),
    Goal("loading, GB/s", "gpu.load", 0.6, of_limit=True),
    Goal("weights on the card, GiB", "gpu.weights_gib.20b", 13.1, "13.02", lower=True),
    Goal("decode, batch 1, tok/s", "gpu.decode.b1", 480, "309"),
    Goal("decode, batch 8, tok/s", "gpu.decode.b8", 1900, "1,492"),
    Goal("decode, batch 32, tok/s", "gpu.decode.b32", 5300, "4,362"),
    Goal("decode, batch 64, tok/s", "gpu.decode.b64", 9500, "8,503"),
    Goal("decode, batch 256, tok/s", "gpu.decode.b256", 24000, "20,067"),
    Goal("prefill of 4096 tokens, ms", "gpu.prefill.4096", 55, "70", lower=True),
    Goal("256 prompts of 1024, 256 new each, tok/s out", "gpu.serve.256", 9500, "7,780"),
    Goal("relative error of all logits", "gpu.logits.20b", 0.02, lower=True),
    Goal("most likely token the same, the same tokens before it", "gpu.top1.20b", 0.98),
)
FRACTIONS = (
    Goal("Llama-3.1-8B, bfloat16", "gpu.fraction.llama8b", 0.80),
    Goal("Qwen3-30B-A3B, MXFP4", "gpu.fraction.qwen30b", 0.45),
    Goal("gpt-oss-120b, MXFP4, on an H200", "gpu.fraction.120b", 0.55),
)


def last_records(folder: Path = RESULTS) -> dict[str, Record]:
    """claim -> its latest record."""
    found: dict[str, Record] = {}
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if record["claim"] not in found or found[record["claim"]]["date"] <= record["date"]:
                found[record["claim"]] = record
    return found


def number(value: float | None) -> str:
    """With as many digits as mean something."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def goals(wanted: tuple[Goal, ...], records: dict[str, Record], *, vllm: bool) -> str:
    rows = []
    for goal in wanted:
        record = records.get(goal.claim)
        measured = ("no record", "", "", "") if record is None else (
            number(record["value"]), number(record["limit"]), "yes" if goal.reached(record) else "no", record["machine"],
        )  # fmt: skip
        rows.append((goal.figure, f"`{goal.claim}`", *((goal.vllm,) if vllm else ()), goal.must_text, *measured))
    columns = (
        "figure",
        "claim",
        *(("vLLM 0.25.1",) if vllm else ()),
        "must reach",
        "measured",
        "limit",
        "reached",
        "on",
    )
    return table(columns, rows)


def others(records: dict[str, Record]) -> str:
    known = {goal.claim for goal in (*GOALS, *FRACTIONS)}
    rows = []
    for claim, record in sorted(records.items()):
        if claim not in known:
            peers = ", ".join(f"{name} {number(value)}" for name, value in record["baseline"].items())
            rows.append(
                (
                    f"`{claim}`",
                    number(record["value"]),
                    record["unit"],
                    peers,
                    number(record["ratio"]),
                    record["machine"],
                )
            )
    return table(("claim", "measured", "unit", "beside it, in the same run", "times better", "on"), rows)


def sources(records: dict[str, Record]) -> str:
    rows = [
        (f"`{claim}`", f"`{record['command']}`", f"`{record['commit']}`", record["date"][:10])
        for claim, record in sorted(records.items())
    ]
    return table(("claim", "command", "commit", "date"), rows)


def parts(records: dict[str, Record]) -> dict[str, str]:
    return {
        "goals": goals(GOALS, records, vllm=True),
        "fractions": goals(FRACTIONS, records, vllm=False),
        "others": others(records),
        "sources": sources(records),
    }


def filled(page: str, records: dict[str, Record]) -> str:
    """The page with its tables made anew."""
    for name, text in parts(records).items():
        begin, end = BEGIN.format(name), END.format(name)
        head, _, rest = page.partition(begin)
        _, found, tail = rest.partition(end)
        if not found:
            raise SystemExit(f"docs/numbers.md has no place for {name}: {begin} ... {end}")
        page = f"{head}{begin}\n\n{text}\n\n{end}{tail}"
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; fail if the page is not what the records say"
    )
    asked = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    new = filled(page, last_records())
    if asked.check and new != page:
        raise SystemExit("docs/numbers.md is not what the records say; run python benchmarks/page.py")
    PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
