from . import audit_page as audit_page
from . import batch_preview as batch_preview
from . import plots as plots
from . import run_report as run_report
from . import tables as tables
from . import tuning_page as tuning_page
from .style import SPLIT_COLORS as SPLIT_COLORS
from .style import STYLE as STYLE
