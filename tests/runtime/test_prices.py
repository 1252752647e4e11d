"""The operator's price table: read again when it changes, and told by file and line when it can't be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from heliostat.errors import Unavailable
from heliostat.models.clouds import Market
from runtime import prices
from runtime.settings import Settings

HEAD = "provider,region,instance_type,market,usd_per_hour\n"


def test_a_price_of_the_region_stands_before_one_of_all(tmp_path: Path) -> None:
    table = tmp_path / "prices.csv"
    settings = Settings(home=tmp_path)
    assert prices.load(settings).path is None
    table.write_text(f"{HEAD}aws,*,m6i.large,ON_DEMAND,0.1\naws,us-west-2,m6i.large,ON_DEMAND,0.096\n\n")
    found = prices.load(settings)
    assert found.of("aws", "us-west-2", "m6i.large", Market.ON_DEMAND) == 0.096
    assert found.of("aws", "eu-west-1", "m6i.large", Market.ON_DEMAND) == 0.1
    assert found.of("aws", "us-west-2", "m6i.large", Market.SPOT) is None
    assert found.of("gcp", "us-west-2", "m6i.large", Market.ON_DEMAND) is None
    table.write_text(f"{HEAD}aws,*,m6i.large,ON_DEMAND,0.25\n")
    assert prices.load(settings).of("aws", "us-west-2", "m6i.large", Market.ON_DEMAND) == 0.25


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a,b\n", "line 1 is 'a,b'"),
        ("", "line 1 is ''"),
        (f"{HEAD}aws,*,m6i.large,ON_DEMAND\n", "line 2 has 4 columns"),
        (f"{HEAD}aws,*,m6i.large,ON_DEMAND,cheap\n", "line 2: 'cheap' is not a price"),
        (f"{HEAD}aws,*,m6i.large,ON_DEMAND,-1\n", "line 2: '-1' is not a price"),
        (f"{HEAD}aws,*,m6i.large,ON_DEMAND,nan\n", "line 2: 'nan' is not a price"),
        (f"{HEAD}aws,*,m6i.large,PREFER_SPOT,1\n", "line 2: 'PREFER_SPOT' is not a market"),
        (f"{HEAD}azure,*,m6i.large,SPOT,1\n", "line 2: 'azure' is not a provider"),
        (f"{HEAD}aws,,m6i.large,SPOT,1\n", "line 2 lacks"),
        (f"{HEAD}aws,*,m,SPOT,1\naws,*,m,SPOT,2\n", "line 3 says a price again: aws * m SPOT"),
        ("\udc80", "utf-8"),
    ],
)
def test_an_unreadable_table_is_told_by_file_and_line(tmp_path: Path, text: str, why: str) -> None:
    table = tmp_path / "my-prices.csv"
    table.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(Unavailable) as caught:
        prices.load(Settings(home=tmp_path, prices=table))
    assert str(table) in caught.value.message
    assert why in caught.value.message


def test_a_table_that_was_named_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="there is no such file"):
        prices.load(Settings(home=tmp_path, prices=tmp_path / "none.csv"))
