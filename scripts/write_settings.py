"""Write docs/settings.md from the schema: `python scripts/write_settings.py`."""

from pathlib import Path

from flowdopr.config.describe import settings_markdown

path = Path(__file__).resolve().parent.parent / "docs" / "settings.md"
path.write_text(settings_markdown(), encoding="utf-8")
print(path)
