from . import archive as archive
from .anatomy import sample_anatomy as sample_anatomy
from .archive import SyntheticPaths as SyntheticPaths
from .lesions import draw as draw
