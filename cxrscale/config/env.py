"""Names of the environment variables that cxrscale reads."""

CACHE_FOLDER, CACHE_GIGABYTES = "CXRSCALE_CACHE", "CXRSCALE_CACHE_GB"
"""The folder for local copies of remote shards, and its limit in gigabytes."""

PATIENT_KEY = "CXRSCALE_PATIENT_KEY"
"""The key of the patients' hashes in manifests; the same key gives the same hashes in every dataset."""
