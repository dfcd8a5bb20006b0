"""How well a model predicts held-out recordings, and what simple rate models reach on the same tokens."""
