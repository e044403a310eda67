"""Accuracy of a policy on prompts it is not trained on."""
