"""The executor of supernets and derived networks, and its checkpoints."""
