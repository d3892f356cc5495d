"""Callbacks for trainers; importing `torch_secondorder` imports none of them."""
