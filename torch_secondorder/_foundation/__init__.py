"""Small tools that know nothing of optimization, and all that is private in PyTorch."""
