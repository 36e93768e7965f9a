from . import checkpoint as checkpoint
from . import launch as launch
from . import overfit as overfit
from . import run_info as run_info
from . import scoring as scoring
from . import tracking as tracking
from .distributed import LocalWorker as LocalWorker
