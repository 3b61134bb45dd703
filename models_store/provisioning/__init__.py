"""Giving a learner a model: a clone of the main model, or on the legacy path a fine-tuned one.

Which of the two is decided from the configuration, before any learner is looked at, and kept with its reason. One never
stands in for the other because something failed.
"""

from __future__ import annotations

from models_store.provisioning.cloner import AivoModelCloner, ProvisionedModel
from models_store.provisioning.decision import Decision, decide
from models_store.provisioning.errors import ProvisioningError
from models_store.provisioning.profiles import LearnerProfile

__all__ = ["AivoModelCloner", "Decision", "LearnerProfile", "ProvisionedModel", "ProvisioningError", "decide"]
