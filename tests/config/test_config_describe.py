"""docs/settings.md is what the schema says today, and says something about every setting."""

from pathlib import Path

from flowdopr.config import Config
from flowdopr.config.describe import settings_markdown
from flowdopr.config.model import MODEL_SECTIONS
from flowdopr.config.schema import ArmConfig

DOCUMENT = Path(__file__).parents[2] / "docs" / "settings.md"


def test_the_reference_is_current():
    hint = "run: python scripts/write_settings.py"
    assert DOCUMENT.read_text(encoding="utf-8") == settings_markdown(), hint


def test_every_setting_has_a_meaning():
    sections = [*MODEL_SECTIONS.values(), ArmConfig]
    sections += [
        f.annotation for f in Config.model_fields.values() if hasattr(f.annotation, "model_fields")
    ]
    for section in sections:
        for name, field in section.model_fields.items():
            tag = section in MODEL_SECTIONS.values() and name == "name"
            assert tag or field.description, f"{section.__name__}.{name}"
