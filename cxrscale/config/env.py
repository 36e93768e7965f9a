"""Names of the environment variables that cxrscale reads."""

CACHE_FOLDER, CACHE_GIGABYTES = "CXRSCALE_CACHE", "CXRSCALE_CACHE_GB"
"""The folder for local copies of remote shards, and its limit in gigabytes."""

DEFAULT_CACHE_FOLDER, DEFAULT_CACHE_GIGABYTES = "~/.cache/cxrscale", 200
"""Their values if the variables are not set."""

PATIENT_KEY = "CXRSCALE_PATIENT_KEY"
"""The key of the hashes that stand for patient and image ids in datasets; the same key gives the same hashes."""

STATE_HOME, DEFAULT_STATE_HOME = "XDG_STATE_HOME", "~/.local/state"
"""The folder of what a user keeps between runs (XDG Base Directory 0.8), and its value if the variable is not set."""

API_KEY = "CXRSCALE_API_KEY"
"""The key that every request to the service must bring."""
