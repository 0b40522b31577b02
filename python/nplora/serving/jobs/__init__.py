"""Fine-tuning jobs of a server: files, jobs and the events of jobs, in the form of OpenAI's API."""

from nplora.serving.jobs.fine_tuning import FineTuning

__all__ = ["FineTuning"]
