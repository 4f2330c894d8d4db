"""A trained model outside of training: to others, and from others."""
