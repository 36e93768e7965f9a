"""Ray and the machines below it.

`ray_session` connects this process to a cluster, `run_tasks` runs a function over many jobs, `nodes` checks that a
cluster can run a recipe, `doctor` checks machines and says how to fix them (`probe` measures), and `jobs` submits any
command as a job (`job_package` ships the code). Importing this room does not import Ray.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
