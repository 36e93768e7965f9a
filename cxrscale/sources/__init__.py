"""Raw sources, one module for each: where the images lie and what the published tables say about them.

To add a source, write one module here, `cxrscale/sources/<name>.py`, and its test, `tests/sources/test_<name>.py`:

    SOURCE = Source(name="<name>", read=read)

`read(root)` returns a `SourceContent`: one `ImageRecord` per image, sorted by image ID, and the ledger of what was
found and left out. It decodes no image. It raises a `UserError` of one line (file, line, remedy) for every table that
is not as published, because a value that is misread here becomes a wrong label. Three modules make all sources read
alike: `image_files` finds images and compares names, `csv_rows` reads tables and lists, `ledger` holds one against the
other.
`Source` has three more fields: `pack_defaults` for what `cxrscale shard <name>` should set by itself,
`reliable_patient_ids` and `publishes_split`. Nothing else has to be changed: sources are discovered by the names of
their modules.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
