"""Names of the environment variables that cxrscale reads."""

CACHE_FOLDER, CACHE_GIGABYTES = "CXRSCALE_CACHE", "CXRSCALE_CACHE_GB"
"""Where local copies of remote shards lie, and how many gigabytes of them at most."""
