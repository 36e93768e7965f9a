"""Sources are discovered by the names of their modules: a new one is one file."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cxrscale import sources
from cxrscale.config import Pack
from cxrscale.io import encode_png
from cxrscale.shards import build, manifest
from cxrscale.types import UserError
from tests.dicom_files import gray_image

NEW_SOURCE = '''
"""A folder of PNG files whose names are the patients."""

from pathlib import Path

from cxrscale.sources import LedgerBook, Source, SourceContent
from cxrscale.types import ImageRecord


def read(root: str) -> SourceContent:
    book = LedgerBook("village")
    records = [
        ImageRecord(path.name, "village", str(path), path.stem, findings={"Effusion": number % 2})
        for number, path in enumerate(sorted(Path(root).glob("*.png")))
    ]
    book.count_images(len(records))
    return SourceContent(records, book)


SOURCE = Source("village", read, pack_defaults={"size": 16})
'''


@pytest.fixture
def village(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A raw source, and its module in a folder that counts as a part of the package."""
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "village.py").write_text(NEW_SOURCE)
    monkeypatch.setattr(sources, "__path__", [*sources.__path__, str(modules)])
    root = tmp_path / "village"
    root.mkdir()
    for seed in range(6):
        (root / f"p{seed}.png").write_bytes(encode_png(gray_image(32, 32, seed=seed)))
    yield root
    sys.modules.pop("cxrscale.sources.village", None)
    vars(sources).pop("village", None)


def test_a_new_module_is_a_source_that_can_be_packed(village: Path, tmp_path: Path) -> None:
    assert "village" in sources.names()
    settings = Pack.model_validate({"test_fraction": 0.3, **sources.get("village").pack_defaults})
    out = str(tmp_path / "dataset")
    packed = build.build_shards("village", str(village), settings, out, local=True)
    data = manifest.load(out)
    assert packed.images == len(data) == 6
    assert data.findings() == ("Effusion",)
    assert data.metadata[0]["source"] == "village"


@pytest.mark.parametrize("name", sources.names())
def test_every_source_has_the_name_of_its_module_and_valid_defaults(name: str) -> None:
    source = sources.get(name)
    assert source.name == name
    Pack.model_validate(source.pack_defaults)


def test_the_published_sources_are_listed_with_their_properties() -> None:
    assert sources.names() == ["kermany", "nih", "rsna", "siim"]
    assert {name for name in sources.names() if not sources.get(name).reliable_patient_ids} == {"rsna", "siim"}
    assert dict(sources.get("siim").pack_defaults) == {"masks": True}
    assert dict(sources.get("kermany").pack_defaults) == {"duplicates": "merge"}


def test_an_unknown_source_is_one_line_that_lists_the_others() -> None:
    with pytest.raises(UserError, match=r"^unknown source 'mimic'; choose one of kermany, nih, rsna, siim$"):
        sources.read("mimic", "anywhere")


def test_a_module_without_a_source_is_a_programming_error(village: Path) -> None:
    (village.parent / "modules" / "village.py").write_text("SOURCE = 'village'\n")
    with pytest.raises(TypeError, match=r"cxrscale\.sources\.village\.SOURCE is a str, not a Source"):
        sources.get("village")


def test_listing_the_sources_imports_none_of_them() -> None:
    script = (
        "import sys; from cxrscale import sources; sources.names(); "
        "print([name for name in sys.modules if name.startswith('cxrscale.sources.')], 'cv2' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['cxrscale.sources.ledger', 'cxrscale.sources.registry'] False"
