"""Peak memory of this library with real checkpoints, measured again: the rest of results/real_cpu.json stays.

A peak needs no quiet machine, as the times of `compare_real.py` do.

python bench/real_memory.py
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import compare_real
import real_page
import timing
from gpu import results


def measure_memory(
    case: compare_real.Case, specification: dict[str, Any], python: Path, rows: list[dict[str, Any]]
) -> None:
    """Replaces this library's peaks in the rows of one checkpoint in one dtype."""
    models = Path(specification["models"])
    for drafter in dict.fromkeys((None, case.drafter)):
        labels = {"model": case.name, "dtype": specification["dtype"], "drafter": drafter, "system": "specsamp"}
        row = next(row for row in rows if labels.items() <= row.items())
        folder = drafter if drafter in (None, compare_real.NGRAM) else str(models / drafter)
        with tempfile.TemporaryDirectory() as cache:
            settings = {"target": str(models / case.folder), "drafter": folder, "cache": cache}
            for kept in (False, True):
                worker = compare_real.Worker("specsamp", python, specification | settings)
                peaks = [worker.run(index)["over_weights"] for index in range(len(specification["inputs"]))]
                loaded = worker.loaded["over_weights"]
                worker.close()
                if not kept:
                    row["first_over_weights"] = peaks[0]
            row["over_weights"] = peaks[-1]
            if drafter is None:
                row["load_over_weights"] = loaded


@click.command()
@click.option("--models", default=compare_real.fetched(), type=click.Path(path_type=Path))
@click.option("--out", default=timing.RESULTS / "real_cpu.json", type=click.Path(path_type=Path))
def main(models: Path, out: Path) -> None:
    about, rows = results.read(out)
    about["memory"] = timing.environment()["date"]
    with tempfile.TemporaryDirectory() as folder:
        specifications = compare_real.specifications(models.absolute(), list(compare_real.CASES), 48, Path(folder))
        for case, specification in specifications:
            for dtype in compare_real.DTYPES:
                measure_memory(case, specification | {"dtype": dtype}, Path(sys.executable), rows)
                print(f"{case.name}, {dtype}: done", file=sys.stderr, flush=True)
    results.write(out, timing.four_digits(about), timing.four_digits(rows))
    real_page.write_page(out)


if __name__ == "__main__":
    main()
