"""Files that a run leaves, by name."""

THRESHOLDS = "thresholds.json"
TEST_METRICS = "test_metrics.json"
PLOTS = "plots"
REPORT = "report.html"
