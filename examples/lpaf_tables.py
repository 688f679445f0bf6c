r"""The tables of `benchmark_lpaf.py` over several tasks, in Markdown, from what it has finished: in a second.

    python examples/lpaf_tables.py SST-2=build/lpaf/sst2 MRPC=build/lpaf/mrpc RTE=build/lpaf/rte \
        --tables compressed --card model_cards/all-MiniLM-L6-v2-sst2-lpaf-0.25
    python examples/lpaf_tables.py --smoke        # of numbers that are made up

Each folder is a `--work-dir` of that benchmark. Seeds and rows of a task may lie in several: `SST-2=build/a,build/b`.
With `--card` the tables are kept below the last line of a card, in place of what was there.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_lowrank.sharing.cards.card import KEPT_LINE
from hf_lowrank.sharing.record import CARD_FILE, has_own_card

Numbers = Mapping[str, float]
Rows = dict[tuple[float, str], dict[str, dict[int, Numbers]]]  # kept, what -> task -> seed
REMEDY = "give NAME=FOLDER, the --work-dir of benchmark_lpaf.py"
IN_CARD = (
    "What models made like this one score beside others (`examples/benchmark_lpaf.py`): every row has the same "
    "teacher and number of steps, and was trained from the same dense model, pruned first or trained as long."
)
# table -> title of its rows, and its columns: number -> what stands before it, the factor it is shown with, its unit
TABLES: dict[str, tuple[str, dict[str, tuple[str, float, str]]]] = {
    "pruned": (
        "pruned by",
        {"accuracy": ("", 100, ""), "rank": ("rank ", 100, " %"), "energy_rank": ("90 % energy ", 100, " %")},
    ),
    "compressed": ("compressed", {"accuracy": ("", 100, "")}),
    "recovered": ("recovered", {"before": ("", 100, ""), "after": ("to ", 100, ""), "minutes": ("minutes ", 1, "")}),
}


class Cells:
    """What was found of one model on one task, kept in a folder.

    Args:
        folder: Where; one that is not there yet holds nothing.
        options: What all of it is made with; None takes what is there.
    """

    def __init__(self, folder: Path, options: Mapping[str, Any] | None = None) -> None:
        self._file = folder / "cells.json"
        known = json.loads(self._file.read_text(encoding="utf-8")) if self._file.is_file() else {}
        if options is not None and known.get("options", options) != options:
            raise SystemExit(f"{folder} holds cells of {known['options']}, not of {options}. Give another --work-dir.")
        self._options = known.get("options", options)
        self.list: list[dict[str, Any]] = known.get("cells", [])

    def get(self, make: Callable[[], Numbers], **made: Any) -> Numbers:
        """Numbers of one cell; made, printed and kept if it is not there.

        Args:
            make: What finds them.
            made: `table`, `what`, `keep` and `seed`, those that matter.
        """
        for cell in self.list:
            if {**cell, **made} == cell:
                return dict(cell["found"])
        found = make()
        self.list.append({**made, "found": found})
        self._file.parent.mkdir(parents=True, exist_ok=True)
        stored = {"options": self._options, "cells": self.list}
        self._file.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
        shown = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
        print(f"{', '.join(str(value) for value in made.values())}: {shown}", flush=True)
        return found


class Tables:
    """Means and standard deviations over seeds, in the order the cells were made in.

    Args:
        tasks: Name of a task -> its cells.
    """

    def __init__(self, tasks: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        self.dense: dict[str, float] = {}
        self.seeds: set[int] = set()
        self._found: dict[str, Rows] = {name: {} for name in TABLES}
        for task, cells in tasks.items():
            for cell in cells:
                if cell["table"] == "dense":
                    self.dense[task] = cell["found"]["accuracy"]
                else:
                    row = self._found[cell["table"]].setdefault((cell["keep"], cell["what"]), {})
                    row.setdefault(task, {})[cell["seed"]] = cell["found"]
                    self.seeds.add(cell["seed"])

    def lines(self, names: Sequence[str] = tuple(TABLES)) -> Iterator[str]:
        """Those of the tables that have rows, under a line of what they are of."""
        dense = ", ".join(f"{task} {100 * accuracy:.2f}" for task, accuracy in self.dense.items())
        seeds = ", ".join(str(seed) for seed in sorted(self.seeds))
        yield f"Accuracy in percent, mean ± standard deviation over seeds {seeds}. Dense: {dense}."
        for table in names:
            if rows := self._found[table]:
                yield from ("", *self._table(table, rows))

    def _table(self, table: str, rows: Rows) -> Iterator[str]:
        title, columns = TABLES[table]
        with_mean = len(self.dense) > 1 and list(columns) == ["accuracy"]
        names = ["kept", title, *self.dense, *(["mean"] if with_mean else [])]
        yield f"| {' | '.join(names)} |"
        yield "|---" * len(names) + "|"
        for (keep, what), found in sorted(rows.items(), key=lambda row: -row[0][0]):
            shown = [self._shown(table, task, list(found.get(task, {}).values())) for task in self.dense]
            if with_mean:
                shown.append(_mean_of_tasks(found) if len(found) == len(self.dense) else "")
            yield f"| {keep:g} | {what} | {' | '.join(shown)} |"

    def _shown(self, table: str, task: str, found: Sequence[Numbers]) -> str:
        if not found:
            return ""
        parts = [
            f"{before}{_spread([factor * numbers[name] for numbers in found])}{unit}"
            for name, (before, factor, unit) in TABLES[table][1].items()
        ]
        if table == "recovered":
            parts.insert(2, _closed(self.dense[task], found))
        few = "" if len(found) == len(self.seeds) else f" (seeds: {len(found)})"
        return ", ".join(parts) + few


def _mean_of_tasks(found: Mapping[str, Mapping[int, Numbers]]) -> str:
    """With the deviation of the seeds' means, where every task has the same seeds."""
    seeds = {frozenset(numbers) for numbers in found.values()}
    if len(seeds) > 1:
        return f"{statistics.mean(100 * _mean(numbers.values(), 'accuracy') for numbers in found.values()):.2f}"
    return _spread([100 * _mean((numbers[seed] for numbers in found.values()), "accuracy") for seed in seeds.pop()])


def _mean(found: Iterable[Numbers], name: str) -> float:
    return statistics.mean(numbers[name] for numbers in found)


def _closed(dense: float, found: Sequence[Numbers]) -> str:
    """How much of what the compressed models had lost is back."""
    before, after = _mean(found, "before"), _mean(found, "after")
    return f"{(after - before) / (dense - before):.0%} closed" if before < dense else "nothing lost"


def _spread(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def keep_in_card(folder: Path, lines: Sequence[str]) -> None:
    """Put lines below the last line of a card, where what hf_lowrank does not write stands."""
    file = folder / CARD_FILE
    if not file.is_file() or has_own_card(folder):
        raise SystemExit(f"{file} is not there, or was not written by hf_lowrank. Give another --card.")
    head, line, _ = file.read_text(encoding="utf-8").partition(KEPT_LINE)
    text = "\n".join(["", "## Compared", "", IN_CARD, "", *lines])
    file.write_text(f"{head}{line}{text}\n", encoding="utf-8")


def made_up() -> list[dict[str, Any]]:
    """Cells of nothing."""
    seeds = [
        {"table": table, "what": "svd", "keep": 0.5, "seed": seed, "found": dict.fromkeys(columns, 0.5 + 0.1 * seed)}
        for table, (_, columns) in TABLES.items()
        for seed in (0, 1)
    ]
    return [{"table": "dense", "found": {"accuracy": 0.9}}, *seeds]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tasks", nargs="*", metavar="NAME=FOLDER[,FOLDER]", help="of each task its work-dirs")
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--card", type=Path, help="folder of a card that keeps them")
    parser.add_argument("--smoke", action="store_true", help="made-up numbers")
    options = parser.parse_args()
    tasks = {"A": made_up(), "B": made_up()} if options.smoke else {}
    for task in options.tasks:
        name, _, folders = task.partition("=")
        tasks[name] = [cell for folder in folders.split(",") for cell in Cells(Path(folder)).list]
        if not tasks[name]:
            parser.error(f"no finished cells in {folders or task!r}: {REMEDY}")
    if not tasks:
        parser.error(f"no tasks: {REMEDY}")
    lines = list(Tables(tasks).lines(options.tables))
    print("\n".join(lines))
    if options.card:
        keep_in_card(options.card, lines)


if __name__ == "__main__":
    main()
