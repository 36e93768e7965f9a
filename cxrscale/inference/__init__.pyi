from . import predictions as predictions
from . import predictor as predictor
from .predictor import TrainedModel as TrainedModel
from .predictor import load_model as load_model
from .predictor import provenance as provenance
from .predictor import stored_thresholds as stored_thresholds
