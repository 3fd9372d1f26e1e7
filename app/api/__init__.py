"""HTTP only: one file per URL noun."""
