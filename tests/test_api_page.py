"""docs/api.md is what scripts/api_page.py writes."""

import importlib.util
import pathlib

ROOT = pathlib.Path(__file__).parents[1]


def test_the_page_is_up_to_date():
    spec = importlib.util.spec_from_file_location("api_page", ROOT / "scripts" / "api_page.py")
    api_page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(api_page)
    page = api_page.page()
    assert (ROOT / "docs" / "api.md").read_text(encoding="utf-8") == page, (
        "run python scripts/api_page.py"
    )
    for line in ("### `MoeConfig`", "| `num_experts` | `32` |", "### `uj.convert_checkpoint`"):
        assert line in page
