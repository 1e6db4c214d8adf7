"""LLM feedback: prompts, engines, likelihood and rank-aware rewards, the store of everything the LLM was paid for."""
