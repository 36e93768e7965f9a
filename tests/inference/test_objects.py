"""Files of single images: their names, and that each is written once and whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from cxrscale.inference import Prediction
from cxrscale.inference.objects import Draft, has_object, object_name, write_object
from cxrscale.io import storage
from cxrscale.types import AccessError, UnreadableImageError, UserError


def draft(text: str, suffix: str = ".txt") -> Draft:
    return Draft(suffix, (text,), lambda: text.encode())


def test_a_file_is_written_once_and_named_in_the_row(tmp_path: Path) -> None:
    out, made = str(tmp_path), list[str]()

    def drafter(prediction: Prediction) -> Draft:
        def encode() -> bytes:
            made.append(prediction.path)
            return b"content"

        return Draft(".txt", ("x",), encode)

    first = write_object(out, "text", Prediction("/a/scan 1.dcm"), drafter)
    assert write_object(out, "text", Prediction("/a/scan 1.dcm"), drafter) == first
    assert made == ["/a/scan 1.dcm"]
    (name,) = first.objects.values()
    assert (tmp_path / name).read_bytes() == b"content"
    assert name.startswith("objects/scan_1-")
    assert has_object(first, "text")
    assert not has_object(first, "other")
    two = write_object(out, "other", first, drafter)
    assert list(two.objects) == ["text", "other"]


def test_a_bucket_holds_them_too(s3: str) -> None:
    for _ in range(2):
        done = write_object(f"{s3}/objects", "text", Prediction("s3://x/a.png"), lambda _: draft("b"))
    assert storage.read(f"{s3}/objects/{done.objects['text']}") == b"b"
    assert len(storage.listing(f"{s3}/objects/objects")) == 1


@pytest.mark.parametrize(
    ("path", "start"),
    [
        ("/data/a.dcm", "a-"),
        ("s3://bucket/x/a.png", "a-"),
        ("/data/Ünï \udcff*.dcm", "_n____-"),
        ("/data/..dcm", "image-"),
        ("/data/" + "x" * 250, "x" * 80 + "-"),
        ("", "image-"),
    ],
)
def test_a_name_is_the_inputs_in_plain_characters(path: str, start: str) -> None:
    name = object_name(path, draft("a"))
    assert name.startswith(start)
    assert len(name) == len(start) + 16 + len(".txt")
    assert name.isascii()
    assert "/" not in name


def test_names_differ_by_what_the_file_is_made_of() -> None:
    drafts = [draft("a"), draft("b"), draft("a", ".png"), Draft(".txt", ("a", "a"), bytes)]
    assert len({object_name("/data/a.dcm", one) for one in drafts}) == len(drafts)
    assert object_name("/data/a.dcm", draft("a")) == object_name("/other/a.dcm", draft("a"))


def test_what_cannot_be_made_is_a_reason_in_the_row(tmp_path: Path) -> None:
    def failing(error: Exception) -> Draft:
        raise error

    out = str(tmp_path / "out")
    refused = write_object(out, "text", Prediction("a"), lambda _: failing(UnreadableImageError("no\nsource")))
    assert (dict(refused.object_errors), refused.unreachable) == ({"text": "no source"}, False)
    gone = write_object(out, "text", Prediction("a"), lambda _: failing(AccessError("gone")))
    assert (dict(gone.object_errors), gone.unreachable) == ({"text": "gone"}, True)
    unread = Prediction("a", error="no image")
    assert write_object(out, "text", unread, lambda _: failing(AssertionError())) == unread
    assert has_object(refused, "text")
    assert not Path(out).exists()
    Path(out).mkdir()
    (tmp_path / "out" / "objects").write_text("in the way")
    with pytest.raises(UserError):
        write_object(out, "text", Prediction("a"), lambda _: draft("b"))
