"""What an audit and a search for leaks return: the content of `audit.json`."""

from __future__ import annotations

from collections.abc import Mapping

from cxrscale.io import Artifact, ArtifactPart, Number


class SharedPatient(ArtifactPart):
    """A patient with images in more than one split or dataset."""

    patient: str
    """namespace:patient ID, as in all fields of this kind."""
    also: tuple[str, ...]
    """The patient's other names, when duplicates show that two names are the same patient."""
    datasets: tuple[str, ...]
    splits: Mapping[str, int]
    """Split -> number of the patient's images there."""
    images: Mapping[str, str]
    """Split -> one of the images there."""


class DuplicatePair(ArtifactPart):
    """Two images that are the same; each field has a value for either of them."""

    images: tuple[str, str]
    patients: tuple[str, str]
    datasets: tuple[str, str]
    splits: tuple[str, str]


class Duplicates(ArtifactPart):
    """Pairs of images that are the same. A pair can be both between splits and between datasets."""

    pairs: int
    """Number of all pairs."""
    between_splits: tuple[DuplicatePair, ...]
    """These leak."""
    between_datasets: tuple[DuplicatePair, ...]
    within_dataset_and_split: tuple[DuplicatePair, ...]
    """These do not leak, but count twice."""


class Leaks(ArtifactPart):
    """Patients and images that splits and datasets share, and what could not be checked."""

    verdict: tuple[str, ...]
    """Sentences; those about a leak begin with LEAK."""
    not_checked: tuple[str, ...]
    """Sentences: what could not be checked, and what the user can do about it."""
    patients: int
    """Number of patients; an image of an unknown patient counts as one."""
    images_of_unknown_patients: int
    patients_in_two_splits: tuple[SharedPatient, ...]
    """In two or more; the split of unlabeled images does not count."""
    patients_in_two_datasets: tuple[SharedPatient, ...]
    duplicates: Duplicates


class LabelCounts(ArtifactPart):
    """Images of a split by the state of one finding."""

    present: int
    absent: int
    unlabeled: int


class PixelStatistics(ArtifactPart):
    """Of all stored pixels, on a scale from 0 (black) to 1."""

    mean: float
    std: float


class MaskStatistics(ArtifactPart):
    """Number and size of the masks, and contradictions between masks and labels."""

    labeled: int
    """Images with a mask, empty masks included."""
    with_pixels: int
    area_edges: tuple[float, ...]
    """Bounds of the histogram's bins, as shares of the image."""
    area_counts: tuple[int, ...]
    """Masks with pixels in each bin."""
    area_quantiles: Mapping[str, Number]
    """5%, 50% and 95% quantiles of the share of the image that masks with pixels cover; NaN without any."""
    present_but_empty: tuple[str, ...]
    """Images labeled as present whose mask is empty at the stored size."""
    absent_but_filled: tuple[str, ...]
    """Images not labeled as present whose mask has pixels."""


class DatasetInfo(ArtifactPart):
    """Where a dataset comes from and how it was packed."""

    root: str
    source: str
    patient_namespace: str
    """The source that gave the patient IDs."""
    images: int
    patients: int
    quarantined: int
    tars: int
    bytes: int
    """Size of all tars."""
    pixel_mean: Number
    pixel_std: Number
    version: str
    """Of cxrscale."""
    input: str
    """Digest of the source's tables and the settings."""
    pack: Mapping[str, object]
    """The pack section; a dataset of another version may have other fields."""


class QuarantinedImage(ArtifactPart):
    """An image that could not be read and is in no dataset."""

    dataset: str
    image_id: str
    reason: str


class Audit(Artifact):
    """Everything that is known about one or more datasets without opening a tar."""

    schema_version: int = 2
    datasets: tuple[DatasetInfo, ...]
    manifest: str
    """Digest of the manifests."""
    images: int
    leaks: Leaks
    splits: Mapping[str, int]
    """Split -> images; train, val and test first."""
    findings: Mapping[str, Mapping[str, LabelCounts]]
    """Finding -> split -> images."""
    no_finding: Mapping[str, int]
    """Split -> images with every finding labeled as absent."""
    sex: Mapping[str, Mapping[str, int]]
    """Value -> split -> images; so are `view` and `age`."""
    view: Mapping[str, Mapping[str, int]]
    age: Mapping[str, Mapping[str, int]]
    """By config.AGE_BANDS, the groups that test metrics are computed for."""
    pixels: PixelStatistics
    masks: MaskStatistics
    quarantined: tuple[QuarantinedImage, ...]
    notes: tuple[str, ...] = ()
    """Sentences from the datasets' ledgers: tables of several editions, images that no official list names."""
