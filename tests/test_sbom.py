"""The bill of materials in an installed wheel; scripts/check_sbom.py compares it with what was compiled."""

import importlib.metadata
import json
from typing import Any

import pytest

import nplora

FILES = importlib.metadata.files("nplora") or []
BILLS = [file for file in FILES if file.match("*.dist-info/sboms/nplora.cdx.json")]

pytestmark = pytest.mark.skipif(not BILLS, reason="an editable install has no bill of materials")


@pytest.fixture(scope="module")
def bill() -> Any:
    return json.loads(BILLS[0].read_text(encoding="utf-8"))


def test_the_bill_is_one_of_this_version(bill: Any) -> None:
    assert len(BILLS) == 1
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    subject = bill["metadata"]["component"]
    assert (subject["name"], subject["version"]) == ("nplora", nplora.__version__)
    assert subject["purl"] == f"pkg:pypi/nplora@{nplora.__version__}"
    metadata = importlib.metadata.metadata("nplora")
    assert subject["licenses"] == [{"expression": metadata["License-Expression"]}]


def test_every_component_has_a_version_and_a_licence(bill: Any) -> None:
    names = [component["name"] for component in bill["components"]]
    assert names[0] == "pybind11"
    assert names[1] in ("libstdc++", "libc++", "Microsoft STL")
    for component in bill["components"]:
        assert component["version"][0].isdigit(), component
        assert len(component["licenses"]) == 1, component
    (root,) = bill["dependencies"]
    assert root["dependsOn"] == [component["bom-ref"] for component in bill["components"]]


def test_the_bill_has_nothing_of_the_machine_that_built_it() -> None:
    text = BILLS[0].read_text(encoding="utf-8")
    assert "@" not in text.replace(f"@{nplora.__version__}", "").replace("pkg:pypi/pybind11@", "")
    assert "/tmp" not in text
    assert "timestamp" not in text
    assert "serialNumber" not in text


def test_the_wheel_has_the_text_of_the_licences() -> None:
    texts = {file.name for file in FILES if "licenses" in file.parts}
    assert {"LICENSE", "pybind11.txt", "gcc-runtime.txt", "GPL-3.0.txt"} <= texts
