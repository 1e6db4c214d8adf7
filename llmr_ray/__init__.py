"""llmr_ray: retrievers trained by the feedback of the language models that use them, on Ray."""

__version__ = "0.1.0"
