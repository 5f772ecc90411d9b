"""Learning to act: environments, proximal policy optimization, agents that act together."""
