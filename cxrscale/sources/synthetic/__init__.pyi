from . import archive as archive
from .archive import SyntheticPaths as SyntheticPaths
