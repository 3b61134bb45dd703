"""What a release costs in privacy: accounting and the ledger."""
