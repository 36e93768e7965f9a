"""`python jobs/submit.py COMMAND ...` is `cxrscale submit COMMAND ...`: any command as a job on a Ray cluster.

python jobs/submit.py train jobs/chexnet14.yaml scaling.num_workers=8 --address http://HEAD:8265
"""

import sys

from cxrscale.cli import app

if __name__ == "__main__":
    sys.argv.insert(1, "submit")
    app.main()
