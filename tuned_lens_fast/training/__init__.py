"""How good a lens is: it stands behind the way from hidden state to statistics, and asks it about whole texts."""
