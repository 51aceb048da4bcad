"""``python -m tools.configuration_reference``: write ``docs/configuration.md`` from the configuration's schema."""

from __future__ import annotations

from pathlib import Path

from launchers.config_reference import markdown

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"

if __name__ == "__main__":
    PAGE.write_text(markdown())
    print(f"wrote {PAGE}")
