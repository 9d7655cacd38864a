"""Programs that each answer one question and write one result: `python -m benchmarks.studies.cpu_pretrain --help`."""
