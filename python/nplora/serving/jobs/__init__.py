"""Fine-tuning jobs of a server: files, jobs and their events, in the shapes of OpenAI's API."""

from nplora.serving.jobs.fine_tuning import FineTuning

__all__ = ["FineTuning"]
