from . import doctor as doctor
from . import groups as groups
from . import jobs as jobs
from . import nodes as nodes
from . import ray_session as ray_session
from .actors import run_actors as run_actors
from .tasks import run_tasks as run_tasks
