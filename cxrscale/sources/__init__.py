"""Raw sources, one module for each: where the images lie and what the published tables say about them.

To add a source, write one module here, `cxrscale/sources/<name>.py`, and its test, `tests/sources/test_<name>.py`:

    SOURCE = Source(name="<name>", read=read)

`read(root)` returns one `ImageRecord` per image, sorted by image ID, and opens no image. It raises a `UserError` of one
line (file, line, remedy) for every table that is not as published, because a value that is misread here becomes a wrong
label. `Source` has two more fields: `pack_defaults` for what `cxrscale shard <name>` should set by itself, and
`reliable_patient_ids`. Nothing else has to be changed: sources are discovered by the names of their modules.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
