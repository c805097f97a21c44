"""Trust: every batch is judged before it is kept, and the facts that do harm are left out."""
