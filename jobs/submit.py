"""`python jobs/submit.py VERB ...` is `cxrscale submit VERB ...`: any verb as a job on a Ray cluster.

python jobs/submit.py train jobs/chexnet14.yaml scaling.num_workers=8 --address http://HEAD:8265
"""

import sys

from cxrscale import cli

if __name__ == "__main__":
    sys.argv.insert(1, "submit")
    cli.main()
