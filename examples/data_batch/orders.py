"""A Ray Data batch over files: cleans a shop's raw orders, sums them up per country, writes both as Parquet.

    python orders.py [--data DIRECTORY-OR-BUCKET-URL] [--files 12] [--rows 200_000]

Without ``--data`` it makes its input in a temporary directory and removes all at the end. That is enough
where the nodes share a disk, as on the local cloud; elsewhere give it a bucket.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import ray

COUNTRIES = np.array(["de", "DE", "fr", "FR", "jp", "us", "US ", ""])
"""As people type them: the batch has something to clean."""


@ray.remote(num_cpus=1)
def make_file(data: str, number: int, rows: int) -> int:
    rng = np.random.default_rng(number)
    amount = rng.gamma(2.0, 20.0, rows).round(2)
    amount[rng.random(rows) < 0.01] = -1.0  # what the shop writes for "unknown"
    table = pa.table({"order": np.arange(rows) + number * rows, "country": rng.choice(COUNTRIES, rows), "eur": amount})
    filesystem, path = pafs.FileSystem.from_uri(data)
    filesystem.create_dir(f"{path}/raw", recursive=True)
    pq.write_table(table, f"{path}/raw/{number:04d}.parquet", filesystem=filesystem)
    return rows


def clean(batch: pd.DataFrame) -> pd.DataFrame:
    batch["country"] = batch["country"].str.strip().str.upper()
    good = batch[(batch["country"] != "") & (batch["eur"] >= 0)]
    return good.assign(vat=(good["eur"] * 0.19).round(2))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="", help="directory or bucket URL that all nodes reach")
    parser.add_argument("--files", type=int, default=12)
    parser.add_argument("--rows", type=int, default=200_000, help="rows of each file")
    args = parser.parse_args()

    ray.init(logging_level="warning")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    temporary = "" if args.data else tempfile.mkdtemp(prefix="orders-")
    data = args.data or f"file://{temporary}"
    began = time.monotonic()
    try:
        raw_rows = sum(ray.get([make_file.remote(data, i, args.rows) for i in range(args.files)]))
        print(f"{raw_rows:,} raw orders in {args.files} files below {data}/raw", flush=True)

        cleaned = ray.data.read_parquet(f"{data}/raw").map_batches(clean, batch_format="pandas").materialize()
        cleaned.write_parquet(f"{data}/clean")
        per_country = cleaned.groupby("country").sum(["eur", "vat"]).sort("sum(eur)", descending=True)
        summary = per_country.to_pandas()
        ray.data.from_pandas(summary).write_parquet(f"{data}/per_country")

        rows = ray.data.read_parquet(f"{data}/clean").count()
        print(f"{rows:,} clean orders in {data}/clean, {raw_rows - rows:,} dropped")
        print(summary.to_string(index=False, float_format=lambda n: f"{n:,.2f}"))
        print(f"done in {time.monotonic() - began:.1f} s")
        # 7 of 8 names are a country, 99 of 100 amounts are known.
        if abs(rows / raw_rows - 7 / 8 * 0.99) > 0.01:
            print(f"wrong: {rows / raw_rows:.1%} of the orders survived the cleaning", file=sys.stderr)
            return 1
    finally:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
