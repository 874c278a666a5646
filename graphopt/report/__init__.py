"""Reports for people and scripts: what a program is (explain), how two differ (diff), what a run did (run_report)."""
