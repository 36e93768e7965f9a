from .config import load_recipe as load_recipe
from .inference import Explainer as Explainer
from .inference import Predictor as Predictor
from .loader import make_loader as make_loader
from .run import Run as Run
from .run import ensemble as ensemble
from .run import explain_split as explain_split
from .run import open_run as open_run
from .run import train as train
from .run import tune as tune
from .shards import build_shards as build_shards
from .shards import open_dataset as open_dataset
from .types import UserError as UserError

__version__: str
