from . import synthetic as synthetic
from .registry import Source as Source
from .registry import get as get
from .registry import names as names
from .registry import read as read
