from . import artifacts as artifacts
from . import calibration as calibration
from . import comparison as comparison
from . import metrics as metrics
from . import summary as summary
from . import thresholds as thresholds
from .thresholds import MaskRule as MaskRule
