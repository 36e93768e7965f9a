"""The same small archive, as editors, spreadsheets, file managers and copies leave it, gives the same records."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cxrscale import sources
from cxrscale.sources import SourceContent
from cxrscale.types import ImageRecord, UserError

PNG, JPEG, DICOM = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", bytes(128) + b"DICM"
NIH_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
ARCHIVES: Mapping[str, Mapping[str, bytes | str]] = {
    "nih": {
        "images_001/images/00000001_000.png": PNG,
        "images_002/images/00000002_000.png": PNG,
        "images_002/images/00000003_001.png": PNG,
        "Data_Entry_2017_v2020.csv": f"{NIH_HEADER}\n"
        "00000001_000.png,Cardiomegaly|Mass,0,1,57,M,PA,2682,2749,0.143,0.143\n"
        "00000002_000.png,No Finding,0,2,80,F,AP,2500,2048,0.171,0.171\n"
        "00000003_001.png,Hernia,1,3,81,F,AP,2500,2048,0.171,0.171\n",
        "BBox_List_2017.csv": "Image Index,Finding Label,Bbox [x,y,w,h],,,\n00000003_001.png,Mass,1.5,2.5,300.25,4\n",
        "train_val_list.txt": "00000001_000.png\n00000002_000.png\n",
        "test_list.txt": "00000003_001.png\n",
    },
    "siim": {
        "dicom-images-train/9.1/8.1/1.2.276.0.71.dcm": DICOM,
        "dicom-images-train/9.2/8.2/1.2.276.0.72.dcm": DICOM,
        "dicom-images-train/9.3/8.3/1.2.276.0.73.dcm": DICOM,
        "train-rle.csv": "ImageId, EncodedPixels\n1.2.276.0.72, -1\n1.2.276.0.73, 5 2 3 1\n1.2.276.0.73, 7 1\n",
    },
    "rsna": {
        "stage_2_train_images/0004cfab-14fd.dcm": DICOM,
        "stage_2_train_images/00436515-870c.dcm": DICOM,
        "stage_2_test_images/0000a175-0e68.dcm": DICOM,
        "stage_2_train_labels.csv": "patientId,x,y,width,height,Target\n0004cfab-14fd,,,,,0\n"
        "00436515-870c,264.0,152.0,213.5,379.0,1\n00436515-870c,562.0,152.0,256.0,453.0,1\n",
        "stage_2_detailed_class_info.csv": "patientId,class\n0004cfab-14fd,Normal\n00436515-870c,Lung Opacity\n",
    },
    "kermany": {
        "train/NORMAL/IM-0115-0001.jpeg": JPEG,
        "train/PNEUMONIA/person1_bacteria_2.jpeg": JPEG,
        "test/PNEUMONIA/person1_virus_6.jpeg": JPEG,
    },
}
TABLES = [(name, file) for name, files in ARCHIVES.items() for file in files if "/" not in file]
IMAGE = re.compile(r"\w[\w.-]*\.(png|jpeg|dcm)")
NAME = re.compile(r"\b(\d{8}_\d{3}\.png|1\.2\.276[.\d]+|[0-9a-f]{8}-[0-9a-f]{4})\b")


def in_tables(change: Callable[[str], bytes], root: Path) -> None:
    for path in [*root.glob("*.csv"), *root.glob("*.txt")]:
        path.write_bytes(change(path.read_text()))


def in_names(change: Callable[[str], str], root: Path) -> None:
    in_tables(lambda text: NAME.sub(lambda match: change(match[0]), text).encode(), root)


def separated_by(separator: str, root: Path) -> None:
    decimal = {";": ",", "\t": ","}[separator]

    def change(text: str) -> bytes:
        rows = [line.split(",") for line in text.splitlines()]
        cells = [[re.sub(r"(?<=\d)\.(?=\d+$)", decimal, c) if c.count(".") == 1 else c for c in row] for row in rows]
        return "\n".join(separator.join(row) for row in cells).encode()

    in_tables(change, root)


def quoted(text: str) -> bytes:
    if "," not in text:
        return text.encode()
    return "\n".join(",".join(f'"{cell.strip()}"' for cell in row.split(",")) for row in text.splitlines()).encode()


def with_capital_header(text: str) -> bytes:
    first, rest = text.split("\n", 1)
    return f"{first.upper() if ',' in first else first}\n{rest}".encode()


def images(root: Path) -> list[Path]:
    return [path for path in sorted(root.rglob("*")) if IMAGE.fullmatch(path.name) and path.is_file()]


def renamed(change: Callable[[Path], str], root: Path) -> None:
    for path in images(root):
        path.rename(path.with_name(change(path)))


def with_linked_files(root: Path) -> None:
    store = root.with_name(root.name + "-store")
    for number, path in enumerate(images(root)):
        store.mkdir(exist_ok=True)
        path.rename(store / str(number))
        path.symlink_to(store / str(number))


def with_linked_folders(root: Path) -> None:
    for folder in [path for path in root.iterdir() if path.is_dir()]:
        store = root.with_name(f"{root.name}-{folder.name}")
        folder.rename(store)
        folder.symlink_to(store)


def with_links_that_lead_nowhere(root: Path) -> None:
    folder = images(root)[0].parent
    (folder / "00000099_000.png").symlink_to(root / "gone.png")
    (folder / "IM-0099-0001.jpeg").symlink_to(root / "gone.jpeg")
    (folder / "9.9.dcm").symlink_to("9.9.dcm")
    (folder / "again").symlink_to(root)


def with_files_of(name: Callable[[Path], Path], root: Path) -> None:
    for path in images(root):
        other = name(path)
        other.parent.mkdir(parents=True, exist_ok=True)
        other.write_bytes(b"\0\5\26\7")


def macosx(root: Path, path: Path) -> Path:
    return root / "__MACOSX" / path.relative_to(root).parent / f"._{path.name}"


def folders_renamed(change: Callable[[str], str], root: Path) -> None:
    for folder in [path for path in root.iterdir() if path.is_dir()]:
        folder.rename(root / change(folder.name))


DISGUISES: Mapping[str, Callable[[Path], None]] = {
    "as published": lambda _: None,
    "a byte order mark": partial(in_tables, lambda text: text.encode("utf-8-sig")),
    "UTF-16": partial(in_tables, lambda text: text.encode("utf-16")),
    "UTF-16 without a mark": partial(in_tables, lambda text: text.encode("utf-16-le")),
    "UTF-16, big end first": partial(in_tables, lambda text: text.encode("utf-16-be")),
    "UTF-32": partial(in_tables, lambda text: text.encode("utf-32")),
    "CRLF": partial(in_tables, lambda text: text.replace("\n", "\r\n").encode()),
    "CR": partial(in_tables, lambda text: text.replace("\n", "\r").encode()),
    "empty lines": partial(in_tables, lambda text: ("\n" + text.replace("\n", "\n\n")).encode()),
    "no end of the last line": partial(in_tables, lambda text: text.rstrip("\n").encode()),
    "semicolons and decimal commas": partial(separated_by, ";"),
    "tabs": partial(separated_by, "\t"),
    "Excel's line about the separator": partial(
        in_tables, lambda text: (("sep=,\n" if "," in text else "") + text).encode()
    ),
    "quotes": partial(in_tables, quoted),
    "spaces around values": partial(in_tables, lambda text: text.replace(",", " , ").replace("\n", " \n").encode()),
    "a header in capitals": partial(in_tables, with_capital_header),
    "folders before names": partial(in_names, lambda name: f"data/images_001/{name}"),
    "folders of Windows before names": partial(in_names, lambda name: f"C:\\data\\{name}"),
    "names without suffix": partial(in_names, lambda name: name.removesuffix(".png")),
    "names with a suffix": partial(in_names, lambda name: name if name.endswith("png") else f"{name}.dcm"),
    "names in capitals": partial(in_names, str.upper),
    "suffixes in capitals": partial(renamed, lambda path: path.stem + path.suffix.upper()),
    "files in capitals": partial(renamed, lambda path: path.name.upper()),
    "files without suffix": partial(renamed, lambda path: path.stem),
    "another suffix": partial(renamed, lambda path: path.name.replace(".jpeg", ".JPG").replace(".dcm", ".dicom")),
    "links to files": with_linked_files,
    "links to folders": with_linked_folders,
    "links to nothing and in circles": with_links_that_lead_nowhere,
    "metadata of macOS": partial(with_files_of, lambda path: path.with_name(f"._{path.name}")),
    "Finder's and Explorer's files": partial(with_files_of, lambda path: path.with_name(".DS_Store")),
    "Explorer's thumbnails": partial(with_files_of, lambda path: path.with_name("Thumbs.db")),
    "a folder __MACOSX": lambda root: with_files_of(partial(macosx, root), root),
    "compressed copies": partial(with_files_of, lambda path: path.with_name(f"{path.name}.gz")),
    "archives beside the folders": partial(with_files_of, lambda path: path.parent.with_suffix(".zip")),
    "folders in capitals": partial(folders_renamed, str.upper),
    "folders with other numbers": partial(folders_renamed, lambda name: name.replace("images_00", "images_")),
}


def write(name: str, root: Path) -> Path:
    for file, content in ARCHIVES[name].items():
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def without_paths(content: SourceContent) -> list[ImageRecord]:
    return [replace(record, path="") for record in content.records]


@pytest.mark.parametrize("name", ARCHIVES)
def test_every_disguise_gives_the_same_records(name: str, tmp_path: Path) -> None:
    expected = without_paths(sources.read(name, str(write(name, tmp_path / "plain"))))
    assert len(expected) == len(images(tmp_path / "plain"))
    for number, (disguise, wear) in enumerate(DISGUISES.items()):
        root = write(name, tmp_path / str(number))
        wear(root)
        content = sources.read(name, str(root))
        assert without_paths(content) == expected, disguise
        assert all(Path(record.path).is_file() for record in content.records), disguise


@given(name=st.sampled_from(sorted(ARCHIVES)), worn=st.lists(st.sampled_from(sorted(DISGUISES)), max_size=4))
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
def test_disguises_together_give_the_same_records_or_one_line(name: str, worn: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        expected = without_paths(sources.read(name, str(write(name, Path(folder, "plain")))))
        root = write(name, Path(folder, "worn"))
        try:
            for disguise in worn:
                DISGUISES[disguise](root)
        except (UnicodeError, OSError, IndexError):
            return  # a table is no longer text that can be changed again, a file was moved already
        try:
            records = without_paths(sources.read(name, str(root)))
        except UserError as error:
            line, records = str(error), expected
        else:
            line = ""
        assert len(line.splitlines()) <= 1
        assert records == expected


@pytest.mark.parametrize("name", ARCHIVES)
def test_the_ledger_counts_what_looks_like_an_image_with_the_reason(name: str, tmp_path: Path) -> None:
    root = write(name, tmp_path / "archive")
    count = len(images(root))
    for disguise in ("metadata of macOS", "a folder __MACOSX", "compressed copies", "links to nothing and in circles"):
        DISGUISES[disguise](root)
    book = sources.read(name, str(root)).book
    ledger = book.ledger()
    left_out = {item.reason: item.files for item in ledger.left_out}
    assert ledger.images == count
    assert left_out["metadata of macOS"] == 2 * count
    assert sum(files for reason, files in left_out.items() if reason.startswith("compressed (")) == count
    assert left_out["a link to nothing"] == 3
    lines = book.lines()
    assert lines[0] == f"{name}: {count} images found"
    assert all(any(reason in line for line in lines) for reason in left_out)
    assert any("._" in line for line in book.lines(names=True))
    assert not any("._" in line for line in lines)
    assert not any("00000001" in line or "person1" in line for line in ledger.model_dump_json().splitlines())


@pytest.mark.parametrize(("name", "suffix"), [("nih", "png"), ("siim", "dcm"), ("rsna", "dcm"), ("kermany", "jpeg")])
def test_only_compressed_images_are_one_line_that_says_so(name: str, suffix: str, tmp_path: Path) -> None:
    root = write(name, tmp_path / "archive")
    for path in images(root):
        path.rename(path.with_name(f"{path.name}.gz"))
    with pytest.raises(UserError, match=rf"compressed \(\.{suffix}\.gz\); unpack it") as caught:
        sources.read(name, str(root))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(("name", "table"), TABLES)
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff", "not a readable"),
        ("Grüße\n".encode("latin-1"), "not a readable"),
        (b"\x89PNG\r\n\x1a\n\0\0\0", "not a readable"),
    ],
)
def test_a_table_that_is_not_text_is_one_line(
    name: str, table: str, content: bytes, words: str, tmp_path: Path
) -> None:
    root = write(name, tmp_path / "archive")
    (root / table).write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        sources.read(name, str(root))
    assert str(root / table) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(("name", "table"), TABLES)
def test_a_table_or_list_of_other_images_is_one_line(name: str, table: str, tmp_path: Path) -> None:
    root = write(name, tmp_path / "archive")
    text = (root / table).read_text()
    other = {"nih": r"\b0000", "siim": r"1\.2\.276", "rsna": r"\b00"}[name]
    (root / table).write_text(re.sub(other, "77", text))
    with pytest.raises(UserError, match=r"none of the 3 images is in it") as caught:
        sources.read(name, str(root))
    assert str(root / table) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_two_files_of_one_name_are_refused_and_two_links_to_one_file_are_not(tmp_path: Path) -> None:
    for name in ARCHIVES:
        root = write(name, tmp_path / name)
        first = images(root)[0]
        expected = without_paths(sources.read(name, str(root)))
        second = first.with_name(first.stem + first.suffix.upper())
        second.symlink_to(first)
        content = sources.read(name, str(root))
        assert without_paths(content) == expected
        assert sum(item.files for item in content.book.ledger().left_out) >= 1
        second.unlink()
        shutil.copy(first, second)
        with pytest.raises(UserError, match="has the same name as"):
            sources.read(name, str(root))
