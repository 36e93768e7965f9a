from . import doctor as doctor
from . import jobs as jobs
from . import nodes as nodes
from . import ray_session as ray_session
from .tasks import run_tasks as run_tasks
