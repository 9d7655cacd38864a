"""Programs that answer one question each, and write one result: `python -m benchmarks.studies.cpu_pretrain --help`."""
