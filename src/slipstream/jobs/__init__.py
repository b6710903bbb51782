"""Batch jobs: a file of requests in, a file of answers out; a job that was killed goes on where it stopped."""

from slipstream.jobs.run import JobReport, run_batch

__all__ = ["JobReport", "run_batch"]
